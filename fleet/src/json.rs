//! Every JSON shape that `fleet` prints, in one place. A number that is not finite is written as null, so that each line stays valid JSON.

use fleet_common::events::{CheckpointRecord, Event, EventBody, JobError, Level, Metrics, Outcome, Times};
use fleet_common::protocol::{
    CheckpointPlace, CheckpointView, ClusterView, CoordinatorView, ExportView, Files, JobView, NodeView,
    ProfileView, RunView,
};
use serde_json::{Map, Value, json};

/// `cluster`: the first line of `fleet launch --json`.
pub fn cluster<'a>(
    address: &str,
    http: &str,
    cluster_id: &str,
    directory: &str,
    pids: impl Iterator<Item = (&'a str, Option<u32>)>,
) -> Value {
    let pids: Map<String, Value> =
        pids.into_iter().map(|(name, pid)| (name.to_owned(), json!(pid))).collect();
    json!({"event": "cluster", "address": address, "http": http, "cluster_id": cluster_id, "data_dir": directory, "pids": pids})
}

/// `node`: a process of the local cluster changed its state (`joined`, `lost`, `coordinator_restarted`).
pub fn node(name: &str, state: &str, pid: Option<u32>, message: &str) -> Value {
    json!({"event": "node", "node": name, "state": state, "pid": pid, "message": message})
}

/// `submitted`: the job has its number.
pub fn submitted(job: &str, ranks: u32) -> Value {
    json!({"event": "submitted", "job": job, "ranks": ranks})
}

/// One event of a job. `time` is the node's clock in milliseconds since 1970.
pub fn event(event: &Event) -> Value {
    let mut line = match &event.body {
        EventBody::DataReady(data) => with_event("data", json!(data)),
        EventBody::Started { step, parameters, device } => {
            json!({"event": "started", "step": step, "parameters": parameters, "device": device})
        }
        EventBody::Step(step) => json!({
            "event": "step", "step": step.step, "loss": step.loss, "lr": step.lr, "grad_norm": step.grad_norm,
            "tokens_per_s": step.tokens_per_s, "total_steps": step.total_steps, "epoch": step.epoch,
        }),
        EventBody::Eval(eval) => json!({
            "event": "eval", "step": eval.step, "loss": eval.loss, "bits_per_byte": eval.bits_per_byte, "tokens": eval.tokens,
        }),
        EventBody::Checkpoint(checkpoint) => with_event("checkpoint", record(checkpoint)),
        EventBody::CheckpointFailed { step, error } => {
            json!({"event": "checkpoint", "step": step, "path": null, "error": error})
        }
        EventBody::Log { rank, level, line } => {
            json!({"event": "log", "rank": rank, "level": level_name(*level), "line": line})
        }
        EventBody::Memory { first_rank, rss_mib, pss_mib } => {
            json!({"event": "memory", "first_rank": first_rank, "rss_mib": rss_mib, "pss_mib": pss_mib})
        }
        EventBody::Finished(outcome) => finished(outcome),
        EventBody::CheckpointsRemoved { manifests, .. } => {
            json!({"event": "checkpoints_removed", "manifests": manifests})
        }
        EventBody::CheckpointLost { why, .. } => json!({"event": "checkpoint_lost", "error": why}),
        EventBody::Listening(endpoints) => {
            json!({"event": "listening", "ports": endpoints.iter().map(|at| at.port).collect::<Vec<_>>()})
        }
        EventBody::Stall(stall) => json!({"event": "stall", "stall": stall}),
        EventBody::Times(times) => with_event("times", json!(times)),
        EventBody::Metrics(Metrics { step, values }) => {
            let values: Map<String, Value> =
                values.iter().map(|(name, value)| (name.clone(), json!(value))).collect();
            json!({"event": "metrics", "step": step, "values": values})
        }
        EventBody::LeftOut { lines, bytes } => json!({"event": "left_out", "lines": lines, "bytes": bytes}),
    };
    line["time"] = json!(event.unix_ms);
    line
}

fn finished(outcome: &Outcome) -> Value {
    match outcome {
        Outcome::Succeeded { steps, final_loss, tokens_per_s } => json!({
            "event": "finished", "status": "succeeded", "steps": steps, "final_loss": final_loss, "tokens_per_s": tokens_per_s,
        }),
        Outcome::Stopped { steps } => json!({"event": "finished", "status": "cancelled", "steps": steps}),
        Outcome::Failed(error) => json!({"event": "finished", "status": "failed", "error": job_error(error)}),
    }
}

fn record(checkpoint: &CheckpointRecord) -> Value {
    json!({
        "step": checkpoint.step, "path": checkpoint.path, "bytes": checkpoint.bytes, "loss": checkpoint.loss,
        "manifest_sha256": checkpoint.manifest_sha256,
    })
}

/// `error` of a summary.
pub fn job_error(error: &JobError) -> Value {
    json!({
        "rank": error.rank, "node": error.node, "signal": error.signal, "exit_code": error.exit_code, "message": error.message,
        "kind": error.kind, "fault": error.fault, "last_lines": error.last_lines,
    })
}

/// `error` of a summary where no rank is to blame.
pub fn plain_error(message: &str, exit_code: Option<u8>) -> Value {
    json!({"rank": null, "node": null, "signal": null, "exit_code": exit_code, "message": message})
}

/// What the last line of `fleet launch --json` says.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Summary {
    /// `succeeded`, `failed` or `cancelled`.
    pub status: &'static str,
    /// `job-1`; `None` where none was submitted.
    pub job: Option<String>,
    pub steps: u64,
    pub final_loss: Option<f64>,
    pub eval_loss: Option<f64>,
    pub tokens_per_s: Option<f64>,
    pub first_step_s: Option<f64>,
    pub peak_rss_mib: Vec<u64>,
    /// Of all steps but the first one, unless that is the only one.
    pub times: Option<Times>,
    pub checkpoint: Option<String>,
    pub error: Option<Value>,
}

/// For each part of a step its seconds and its share.
fn times_of(times: &Times) -> Value {
    let step_s = times.step_s();
    let of = |(name, seconds): (&str, f64)| {
        (name.to_owned(), json!({"s": seconds, "share": seconds / step_s.max(f64::MIN_POSITIVE)}))
    };
    let mut value = json!({"steps": times.steps, "step_s": step_s});
    value.as_object_mut().into_iter().for_each(|object| object.extend(times.parts().map(of)));
    value
}

pub fn summary(summary: &Summary) -> Value {
    let mut line = json!({
        "event": "summary", "status": summary.status, "job": summary.job, "steps": summary.steps,
        "final_loss": summary.final_loss, "eval_loss": summary.eval_loss, "tokens_per_s": summary.tokens_per_s,
        "first_step_s": summary.first_step_s, "peak_rss_mib": summary.peak_rss_mib, "checkpoint": summary.checkpoint,
    });
    if let Some(times) = &summary.times {
        line["times"] = times_of(times);
    }
    if let Some(error) = &summary.error {
        line["error"] = error.clone();
    }
    line
}

// ---- listings ---------------------------------------------------------------------------------------------------------

/// As in the cluster's own views, with ids as people write them (`job-1`, `node-1`).
pub fn job(view: &JobView) -> Value {
    let mut value = json!(view);
    value["job"] = json!(view.job.to_string());
    // where rank 0 is; all places are in `parts`
    value["node"] = json!(view.parts.first().map(|part| part.node.to_string()));
    value["parts"] = view
        .parts
        .iter()
        .map(|part| json!({"node": part.node.to_string(), "name": part.name, "ranks": part.ranks}))
        .collect();
    // the canonical job is an object, not a text within a text
    let job = value.as_object_mut().and_then(|object| object.shift_remove("job_json"));
    if let Some(parsed) = job.and_then(|text| serde_json::from_str::<Value>(text.as_str()?).ok()) {
        value["config"] = parsed;
    }
    value
}

pub fn node_view(view: &NodeView) -> Value {
    let mut value = json!(view);
    value["node"] = json!(view.node.to_string());
    value
}

pub fn checkpoint(view: &CheckpointView) -> Value {
    let mut value = record(&view.checkpoint);
    value["job"] = json!(view.job.to_string());
    value["run_name"] = json!(view.run_name);
    value["unix_ms"] = json!(view.unix_ms);
    value["places"] = view.places.iter().map(place).collect();
    if !view.checkpoint.shards.is_empty() {
        value["shards"] = json!(view.checkpoint.shards);
    }
    value
}

/// `ranks`: the first and the last one whose files are there, or null for all files.
fn place(place: &CheckpointPlace) -> Value {
    let ranks = match place.files {
        Files::All => Value::Null,
        Files::Of { first, ranks } => json!([first, first + ranks.max(1) - 1]),
    };
    json!({"node": place.node.to_string(), "name": place.name, "ranks": ranks})
}

pub fn coordinator(view: &CoordinatorView) -> Value {
    json!({
        "replica": view.address.replica.to_string(), "name": view.name, "address": view.address.client,
        "member_address": view.address.member, "version": view.version, "voter": view.voter, "leads": view.leads,
        "matched_index": view.matched_index, "alive": view.alive, "read_only": view.read_only, "alarm": view.alarm,
    })
}

pub fn run(view: &RunView) -> Value {
    let last: Map<String, Value> =
        view.last.iter().map(|(name, value)| (name.clone(), json!(value))).collect();
    json!({
        "run": view.run.to_string(), "name": view.name, "state": view.state, "points": view.points, "last": last,
        "started_unix_ms": view.started_unix_ms, "finished_unix_ms": view.finished_unix_ms,
    })
}

pub fn export(view: &ExportView) -> Value {
    let mut value = json!(view.record);
    value["export"] = json!(view.export.to_string());
    value["job"] = json!(view.record.job.to_string());
    value["manifest_sha256"] = json!(view.manifest_sha256);
    value["unix_ms"] = json!(view.unix_ms);
    value
}

pub fn profile(view: &ProfileView) -> Value {
    json!({
        "profile": view.profile.to_string(), "run": view.record.run.to_string(), "name": view.record.name,
        "unix_ms": view.unix_ms, "features": view.record.features,
    })
}

pub fn cluster_view(view: &ClusterView) -> Value {
    json!(view)
}

/// `info`, `warn`, `error`.
pub fn level_name(level: Level) -> &'static str {
    match level {
        Level::Info => "info",
        Level::Warn => "warn",
        Level::Error => "error",
    }
}

fn with_event(name: &str, fields: Value) -> Value {
    let mut line = Map::new();
    line.insert("event".to_owned(), json!(name));
    if let Value::Object(fields) = fields {
        line.extend(fields);
    }
    Value::Object(line)
}

#[cfg(test)]
mod tests {
    use super::*;
    use fleet_common::events::Step;

    #[test]
    fn a_step_line_begins_as_documented_and_survives_numbers_that_are_not_finite() {
        let step = Step {
            step: 3,
            total_steps: 9,
            epoch: 0.5,
            loss: f64::NAN,
            lr: 1e-3,
            grad_norm: f64::INFINITY,
            tokens_per_s: 12.5,
        };
        let line = event(&Event { unix_ms: 5, body: EventBody::Step(step) }).to_string();
        assert_eq!(
            line,
            r#"{"event":"step","step":3,"loss":null,"lr":0.001,"grad_norm":null,"tokens_per_s":12.5,"total_steps":9,"epoch":0.5,"time":5}"#
        );
    }

    #[test]
    fn a_summary_has_its_fields_in_order_and_an_error_only_when_there_is_one() {
        let mut it = Summary {
            status: "succeeded",
            job: Some("job-1".into()),
            peak_rss_mib: vec![7, 8],
            ..Summary::default()
        };
        assert_eq!(
            summary(&it).to_string(),
            r#"{"event":"summary","status":"succeeded","job":"job-1","steps":0,"final_loss":null,"eval_loss":null,"tokens_per_s":null,"first_step_s":null,"peak_rss_mib":[7,8],"checkpoint":null}"#
        );
        it.times = Some(Times {
            steps: 4,
            forward_s: 0.25,
            backward_s: 0.5,
            communication_s: 0.25,
            ..Times::default()
        });
        let times = &summary(&it)["times"];
        assert_eq!((&times["step_s"], &times["backward"]["share"]), (&json!(1.0), &json!(0.5)));
        it.error = Some(plain_error("no", Some(2)));
        assert_eq!(summary(&it)["error"]["message"], "no");
    }
}
