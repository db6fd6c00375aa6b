//! What an HTTP request asks for. Pure: `server::http` has the sockets, and the fuzzer gets in here.
//!
//! GET only. The Host header must name this machine's loopback or an address that was configured, so that a web page that a browser on
//! this machine shows cannot read the cluster through a name of its own (DNS rebinding).

mod change;
mod query;

pub use change::change;
pub use query::{Distributions, Picture};

use crate::page::{self, File};
use fleet_common::http::{host_of, is_of_this_machine};
use fleet_common::ids::JobId;
use fleet_common::protocol::{Page, Request, RunKey};
use std::str::FromStr;

/// A request that is served.
#[derive(Clone, Debug, PartialEq)]
pub enum Asked {
    Health,
    Metrics,
    /// Answered as Prometheus' service discovery reads it.
    Targets(Targets),
    /// Answered in JSON.
    Api(Request),
    /// What the visitor may change.
    Visitor,
    /// A file of the page.
    File(&'static File),
    /// Curves as SVG.
    Picture(Picture),
    /// Distributions as SVG.
    Distributions(Distributions),
    /// Which series a run has.
    Series(RunKey),
    /// Recorded events of a job from this one on, some of them.
    Events {
        job: JobId,
        from: u64,
    },
    /// What happens, as server-sent events.
    Stream(Followed),
}

/// What a stream tells of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Followed {
    /// The cluster and its queue.
    Cluster,
    /// A job, and its events from this one on.
    Job { job: JobId, from: u64 },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Targets {
    Coordinators,
    Workers,
}

impl Asked {
    /// What its path looks like, without numbers.
    pub fn pattern(&self) -> &'static str {
        match self {
            Asked::Health => "/healthz",
            Asked::Metrics => "/metrics",
            Asked::Targets(Targets::Coordinators) => "/api/v1/targets/coordinators",
            Asked::Targets(Targets::Workers) => "/api/v1/targets/workers",
            Asked::Visitor => "/api/v1/visitor",
            Asked::File(_) => "/",
            Asked::Picture(_) => "/api/v1/runs/plot.svg",
            Asked::Distributions(_) => "/api/v1/profiles/plot.svg",
            Asked::Series(_) => "/api/v1/runs/ID/series",
            Asked::Events { .. } => "/api/v1/jobs/ID/events",
            Asked::Stream(Followed::Cluster) => "/api/v1/stream",
            Asked::Stream(Followed::Job { .. }) => "/api/v1/jobs/ID/stream",
            Asked::Api(request) => match request {
                Request::ClusterStatus => "/api/v1/cluster",
                Request::Coordinators => "/api/v1/coordinators",
                Request::Nodes => "/api/v1/nodes",
                Request::Decisions(_) => "/api/v1/events",
                Request::Jobs { .. } => "/api/v1/jobs",
                Request::Job(_) => "/api/v1/jobs/ID",
                Request::Checkpoints { .. } => "/api/v1/checkpoints",
                Request::Checkpoint { .. } => "/api/v1/checkpoints/JOB/STEP",
                Request::Runs(_) => "/api/v1/runs",
                Request::Run(_) => "/api/v1/runs/ID",
                Request::RunMetrics { .. } => "/api/v1/runs/ID/points",
                Request::Exports(_) => "/api/v1/exports",
                Request::Export(_) => "/api/v1/exports/ID",
                Request::Profiles(_) => "/api/v1/profiles",
                Request::Profile(_) => "/api/v1/profiles/ID",
                _ => "other",
            },
        }
    }
}

/// A request that is not, and the status that says why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unserved {
    pub status: u16,
    pub message: String,
}

const PATHS: &str = "there is /, /healthz, /metrics and /api/v1/{cluster,coordinators,nodes,events,stream,visitor,jobs,jobs/ID,jobs/ID/{checkpoints,events,stream},checkpoints,checkpoints/JOB/STEP,runs,runs/ID,runs/ID/{points,series},runs/plot.svg,exports,exports/ID,profiles,profiles/ID,profiles/plot.svg,targets/coordinators,targets/workers}";

/// What a request says of what it wants.
#[derive(Clone, Copy, Debug)]
pub struct Question<'a> {
    pub method: &'a str,
    pub path: &'a str,
    /// What stands behind `?`, or nothing.
    pub query: &'a str,
    /// `None` where there is not exactly one.
    pub host: Option<&'a str>,
}

/// Understands a request. `hosts` are served besides loopback.
pub fn asked(question: &Question, hosts: &[String]) -> Result<Asked, Unserved> {
    check_host(question, hosts)?;
    if question.method != "GET" {
        return Err(unserved(405, "only GET is served here"));
    }
    if let Some(file) = page::file(question.path) {
        return Ok(Asked::File(file));
    }
    let api = match question.path.trim_end_matches('/') {
        "/healthz" => return Ok(Asked::Health),
        "/metrics" => return Ok(Asked::Metrics),
        path => path.strip_prefix("/api/v1/").ok_or_else(|| unserved(404, PATHS))?,
    };
    let page = Page::default();
    let words: Vec<&str> = api.split('/').collect();
    Ok(Asked::Api(match words[..] {
        ["targets", "coordinators"] => return Ok(Asked::Targets(Targets::Coordinators)),
        ["targets", "workers"] => return Ok(Asked::Targets(Targets::Workers)),
        ["cluster"] => Request::ClusterStatus,
        ["coordinators"] => Request::Coordinators,
        ["nodes"] => Request::Nodes,
        ["events"] => Request::Decisions(page),
        ["jobs"] => Request::Jobs { all: None },
        ["jobs", job] => Request::Job(id(job)?),
        ["jobs", job, "checkpoints"] => Request::Checkpoints { job: Some(id(job)?), page },
        ["jobs", job, "events"] => {
            return Ok(Asked::Events { job: id(job)?, from: from(question.query)? });
        }
        ["jobs", job, "stream"] => {
            return Ok(Asked::Stream(Followed::Job { job: id(job)?, from: from(question.query)? }));
        }
        ["visitor"] => return Ok(Asked::Visitor),
        ["stream"] => return Ok(Asked::Stream(Followed::Cluster)),
        ["checkpoints"] => Request::Checkpoints { job: None, page },
        ["checkpoints", job, step] => Request::Checkpoint { job: id(job)?, step: id(step)? },
        ["runs"] => Request::Runs(page),
        ["runs", "plot.svg"] => return Picture::of(question.query).map(Asked::Picture),
        ["runs", run] => Request::Run(id(run)?),
        ["runs", run, "series"] => return Ok(Asked::Series(id(run)?)),
        ["runs", run, "points"] => Request::RunMetrics { run: id(run)?, from: from(question.query)? },
        ["exports"] => Request::Exports(page),
        ["exports", export] => Request::Export(id(export)?),
        ["profiles"] => Request::Profiles(page),
        ["profiles", "plot.svg"] => return Distributions::of(question.query).map(Asked::Distributions),
        ["profiles", profile] => Request::Profile(id(profile)?),
        _ => return Err(unserved(404, PATHS)),
    }))
}

/// Refuses who asks by a name that is not this coordinator's.
pub fn check_host(question: &Question, hosts: &[String]) -> Result<(), Unserved> {
    let host = question.host.ok_or_else(|| unserved(400, "a request has exactly one Host"))?;
    match host_allowed(host, hosts) {
        true => Ok(()),
        false => Err(unserved(421, "this Host is not served here; ask by the coordinator's address")),
    }
}

fn unserved(status: u16, message: impl Into<String>) -> Unserved {
    Unserved { status, message: message.into() }
}

fn id<T: FromStr<Err: ToString>>(text: &str) -> Result<T, Unserved> {
    text.parse().map_err(|error: T::Err| unserved(400, error.to_string()))
}

/// The `next` of an earlier answer, as `?from=N`.
fn from(query: &str) -> Result<u64, Unserved> {
    query.strip_prefix("from=").map_or(Ok(1), id)
}

fn host_allowed(header: &str, hosts: &[String]) -> bool {
    is_of_this_machine(header) || hosts.iter().any(|known| known.eq_ignore_ascii_case(host_of(header)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use fleet_common::ids::{ExportId, RunId};

    fn get<'a>(target: &'a str) -> Question<'a> {
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        Question { method: "GET", path, query, host: Some("localhost") }
    }

    #[test]
    fn every_path_asks_for_its_thing() {
        let run = RunKey::Own(RunId(3));
        for (target, wanted) in [
            ("/api/v1/jobs/7", Request::Job(JobId(7))),
            (
                "/api/v1/jobs/7/checkpoints",
                Request::Checkpoints { job: Some(JobId(7)), page: Page::default() },
            ),
            ("/api/v1/checkpoints/job-7/50", Request::Checkpoint { job: JobId(7), step: 50 }),
            ("/api/v1/runs/run-3/", Request::Run(run)),
            ("/api/v1/runs/run-3/points", Request::RunMetrics { run, from: 1 }),
            ("/api/v1/runs/run-3/points?from=9", Request::RunMetrics { run, from: 9 }),
            ("/api/v1/exports/export-2", Request::Export(ExportId(2))),
            ("/api/v1/profiles", Request::Profiles(Page::default())),
        ] {
            assert_eq!(asked(&get(target), &[]), Ok(Asked::Api(wanted)), "{target}");
        }
        let of_job = |from| Followed::Job { job: JobId(7), from };
        for (target, followed) in [
            ("/api/v1/stream", Followed::Cluster),
            ("/api/v1/jobs/job-7/stream", of_job(1)),
            ("/api/v1/jobs/job-7/stream?from=12", of_job(12)),
        ] {
            assert_eq!(asked(&get(target), &[]), Ok(Asked::Stream(followed)), "{target}");
        }
        assert!(matches!(asked(&get("/"), &[]), Ok(Asked::File(_))));
        assert!(matches!(asked(&get("/main.js"), &[]), Ok(Asked::File(_))));
        for (target, status) in
            [("/api/v1/jobs/x", 400), ("/api/v1/runs/3/points?from=x", 400), ("/etc", 404)]
        {
            assert_eq!(asked(&get(target), &[]).map_err(|why| why.status), Err(status), "{target}");
        }
        assert_eq!(asked(&Question { method: "PUT", ..get("/") }, &[]).unwrap_err().status, 405);
        assert_eq!(asked(&Question { host: None, ..get("/") }, &[]).unwrap_err().status, 400);
    }

    #[test]
    fn only_loopback_and_the_configured_names_are_served() {
        let hosts = ["box.example".to_owned()];
        for good in ["localhost", "127.0.0.1:7080", "Box.Example:7080"] {
            assert!(host_allowed(good, &hosts), "{good}");
        }
        for bad in ["", "evil.example", "box.example.evil", "10.0.0.1"] {
            assert!(!host_allowed(bad, &hosts), "{bad}");
        }
    }
}
