//! The trace of a run says what each rank did when, without a gap.

#![allow(clippy::unwrap_used)] // a test may panic

mod gang;

use fleet_common::job::{Job, Strategy};
use gang::{job, launch};
use serde_json::Value;
use std::collections::BTreeMap;
use std::ops::Range;

/// Within what two looks at the clock may differ, in microseconds: what is rounded, and not what is measured.
const ROUNDED: f64 = 0.01;

struct Part {
    rank: u64,
    events: Vec<Value>,
}

impl Part {
    fn read(job: &Job, rank: u32) -> Part {
        let text = std::fs::read(job.trace_of(rank).unwrap()).unwrap();
        let whole: Value = serde_json::from_slice(&text).unwrap();
        Part { rank: rank.into(), events: whole["traceEvents"].as_array().unwrap().clone() }
    }

    /// Name, thread and time of the complete events.
    fn spans(&self) -> Vec<(String, u64, Range<f64>)> {
        let spans = self.events.iter().filter(|event| event["ph"] == "X");
        let of = |event: &Value| {
            assert_eq!(event["pid"], self.rank);
            let (begin, length) = (event["ts"].as_f64().unwrap(), event["dur"].as_f64().unwrap());
            let name = event["name"].as_str().unwrap().to_owned();
            (name, event["tid"].as_u64().unwrap(), begin..begin + length)
        };
        spans.map(of).collect()
    }

    /// The names of asynchronous events, each of which has ended after it began.
    fn reductions(&self) -> Vec<String> {
        let mut open = BTreeMap::new();
        let mut names = Vec::new();
        for event in &self.events {
            let id = event["id"].to_string();
            match event["ph"].as_str() {
                Some("b") => assert!(open.insert(id, event).is_none()),
                Some("e") => {
                    let began = open.remove(&id).unwrap();
                    assert!(event["ts"].as_f64() >= began["ts"].as_f64() && event["name"] == began["name"]);
                    names.push(event["name"].as_str().unwrap().to_owned());
                }
                _ => {}
            }
        }
        assert!(open.is_empty(), "{open:?}");
        names
    }
}

#[test]
fn spans_nest_and_cover_every_step_of_every_rank() {
    let dir = tempfile::tempdir().unwrap();
    for (world, strategy) in [(1, Strategy::Auto), (2, Strategy::Ddp), (2, Strategy::Fsdp)] {
        let run_name = format!("{strategy:?}-{world}");
        let job = Job { batch_size: 2, strategy, run_name: run_name.clone(), ..job(dir.path()) };
        let job = Job { trace: Some(dir.path().join(run_name)), ..job };
        let ended = launch(&job, world, None, None);
        assert_eq!(ended.losses().len(), 12, "{:?}", ended.outcomes);
        let parts: Vec<Part> = (0..world).map(|rank| Part::read(&job, rank)).collect();
        for part in &parts {
            let spans = part.spans();
            assert!(spans.iter().all(|(_, _, time)| time.start >= 0.0 && time.end >= time.start));
            let (steps, others): (Vec<_>, Vec<_>) =
                spans.iter().partition(|(name, ..)| name.starts_with("step "));
            let names: Vec<&str> = steps.iter().map(|(name, ..)| name.as_str()).collect();
            assert_eq!(names, (1..=12).map(|step| format!("step {step}")).collect::<Vec<_>>());
            for (name, _, step) in steps {
                let mut within: Vec<_> = others
                    .iter()
                    .filter(|(_, tid, time)| {
                        *tid != 5 && time.start < step.end - ROUNDED && step.start < time.end - ROUNDED
                    })
                    .collect();
                within.sort_by(|a, b| a.2.start.total_cmp(&b.2.start));
                // One after the other from its first moment to its last: each moment is in one.
                let mut at = step.start;
                for (what, _, time) in &within {
                    assert!(
                        (time.start - at).abs() < ROUNDED,
                        "{name}: {what} begins at {}, not {at}",
                        time.start
                    );
                    at = time.end;
                }
                assert!((at - step.end).abs() < ROUNDED, "{name}");
                let has = |wanted: &str| within.iter().any(|(what, ..)| what == wanted);
                let all = [
                    "data",
                    "forward embedding",
                    "forward block 1",
                    "backward head",
                    "backward block 2",
                    "optimizer",
                ];
                assert!(all.iter().all(|wanted| has(wanted)), "{name}: {within:?}");
            }
            let reduced = part.reductions();
            let wanted = if world == 1 { 0 } else { 12 };
            for unit in ["reduce head", "reduce block 1", "reduce block 2", "reduce embedding"] {
                assert_eq!(reduced.iter().filter(|name| *name == unit).count(), wanted, "{unit}");
            }
            let has = |name: &str| spans.iter().any(|(what, ..)| what == name);
            assert!(has("evaluation") && has("checkpoint") && has("checkpoint of step 6"));
        }
        // A step begins when the one before is over on all ranks, by one clock.
        if let [one, other] = &parts[..] {
            let steps = |part: &Part| -> Vec<Range<f64>> {
                part.spans()
                    .into_iter()
                    .filter(|(name, ..)| name.starts_with("step "))
                    .map(|(.., time)| time)
                    .collect()
            };
            for (one, other) in steps(one).into_iter().zip(steps(other)) {
                assert!(one.start < other.end && other.start < one.end, "{one:?} {other:?}");
            }
        }
    }
}

#[test]
fn a_trace_that_cannot_be_written_is_told_before_the_first_step() {
    let dir = tempfile::tempdir().unwrap();
    let job = Job { trace: Some(dir.path().join("nowhere/t.json")), ..job(dir.path()) };
    let ended = launch(&job, 1, None, None);
    let error = ended.outcomes[0].as_ref().unwrap_err().to_string();
    assert!(error.contains("no trace can be written") && error.contains("nowhere"), "{error}");
    assert!(ended.losses().is_empty());
}
