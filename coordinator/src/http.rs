//! What an HTTP request asks for. Pure: `server::http` has the sockets, and the fuzzer gets in here.
//!
//! GET only. The Host header must name this machine's loopback or an address that was configured, so that a web page that a browser on
//! this machine shows cannot read the cluster through a name of its own (DNS rebinding).

use fleet_common::http::{host_of, is_of_this_machine};
use fleet_common::metrics::Format;
use fleet_common::protocol::{Page, Request};
use std::str::FromStr;

/// A request that is served.
#[derive(Clone, Debug, PartialEq)]
pub enum Asked {
    Health,
    Metrics(Format),
    /// Answered as Prometheus' service discovery reads it.
    Targets(Targets),
    /// Answered in JSON.
    Api(Request),
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
            Asked::Metrics(_) => "/metrics",
            Asked::Targets(Targets::Coordinators) => "/api/v1/targets/coordinators",
            Asked::Targets(Targets::Workers) => "/api/v1/targets/workers",
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

const PATHS: &str = "there is /healthz, /metrics and /api/v1/{cluster,coordinators,nodes,events,jobs,jobs/ID,checkpoints,checkpoints/JOB/STEP,runs,runs/ID,runs/ID/points,exports,exports/ID,profiles,profiles/ID,targets/coordinators,targets/workers}";

/// Understands the head of a request, up to its empty line. `hosts` are served besides loopback.
pub fn asked(head: &str, hosts: &[String]) -> Result<Asked, Unserved> {
    let request = parse(head).map_err(|why| unserved(400, why))?;
    if !host_allowed(request.host, hosts) {
        let why = "this Host is not served here; ask by the coordinator's address";
        return Err(unserved(421, why));
    }
    if request.method != "GET" {
        return Err(unserved(405, "only GET is served here"));
    }
    let api = match request.path.trim_end_matches('/') {
        "/healthz" => return Ok(Asked::Health),
        "/metrics" => return Ok(Asked::Metrics(Format::wanted(request.accept))),
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
        ["checkpoints"] => Request::Checkpoints { job: None, page },
        ["checkpoints", job, step] => Request::Checkpoint { job: id(job)?, step: id(step)? },
        ["runs"] => Request::Runs(page),
        ["runs", run] => Request::Run(id(run)?),
        ["runs", run, "points"] => Request::RunMetrics { run: id(run)?, from: from(request.query)? },
        ["exports"] => Request::Exports(page),
        ["exports", export] => Request::Export(id(export)?),
        ["profiles"] => Request::Profiles(page),
        ["profiles", profile] => Request::Profile(id(profile)?),
        _ => return Err(unserved(404, PATHS)),
    }))
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

#[derive(Debug, PartialEq)]
struct HttpRequest<'a> {
    method: &'a str,
    path: &'a str,
    query: &'a str,
    host: &'a str,
    accept: &'a str,
}

fn parse(head: &str) -> Result<HttpRequest<'_>, &'static str> {
    let mut words = head.split("\r\n").next().unwrap_or_default().split(' ');
    let (Some(method), Some(target), Some(version), None) =
        (words.next(), words.next(), words.next(), words.next())
    else {
        return Err("this is not an HTTP request");
    };
    if !version.starts_with("HTTP/1.") || !target.starts_with('/') || target.contains(char::is_control) {
        return Err("this is not an HTTP/1.1 request for a path");
    }
    let headers = || head.split("\r\n").skip(1).filter_map(|line| line.split_once(':'));
    let all = |wanted: &'static str| {
        headers().filter(move |(name, _)| name.eq_ignore_ascii_case(wanted)).map(|(_, value)| value.trim())
    };
    match (all("host").next(), all("host").nth(1)) {
        (Some(host), None) => {
            let (path, query) = target.split_once('?').unwrap_or((target, ""));
            let accept = all("accept").next().unwrap_or_default();
            Ok(HttpRequest { method, path, query, host, accept })
        }
        _ => Err("a request has exactly one Host"),
    }
}

fn host_allowed(header: &str, hosts: &[String]) -> bool {
    is_of_this_machine(header) || hosts.iter().any(|known| known.eq_ignore_ascii_case(host_of(header)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use fleet_common::ids::{ExportId, JobId, RunId};
    use fleet_common::protocol::RunKey;

    #[test]
    fn a_request_is_taken_apart_or_refused() {
        let head = "GET /api/v1/jobs?x=1 HTTP/1.1\r\nAccept: */*\r\nhOST: localhost:7080\r\n\r\n";
        assert_eq!(
            parse(head),
            Ok(HttpRequest {
                method: "GET",
                path: "/api/v1/jobs",
                query: "x=1",
                host: "localhost:7080",
                accept: "*/*"
            })
        );
        for bad in [
            "",
            "GET /\r\nHost: a\r\n\r\n",
            "GET / HTTP/2\r\nHost: a\r\n\r\n",
            "GET http://a/ HTTP/1.1\r\nHost: a\r\n\r\n",
            "GET / HTTP/1.1\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
            "GET / x HTTP/1.1\r\nHost: a\r\n\r\n",
            "GET /a\nb HTTP/1.1\r\nHost: a\r\n\r\n",
        ] {
            assert!(parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn every_path_asks_for_its_thing() {
        let get = |target: &str| asked(&format!("GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n"), &[]);
        let run = RunKey::Own(RunId(3));
        for (target, wanted) in [
            ("/api/v1/jobs/7", Request::Job(JobId(7))),
            ("/api/v1/checkpoints/job-7/50", Request::Checkpoint { job: JobId(7), step: 50 }),
            ("/api/v1/runs/run-3/", Request::Run(run)),
            ("/api/v1/runs/run-3/points", Request::RunMetrics { run, from: 1 }),
            ("/api/v1/runs/run-3/points?from=9", Request::RunMetrics { run, from: 9 }),
            ("/api/v1/exports/export-2", Request::Export(ExportId(2))),
            ("/api/v1/profiles", Request::Profiles(Page::default())),
        ] {
            assert_eq!(get(target), Ok(Asked::Api(wanted)), "{target}");
        }
        for (target, status) in
            [("/api/v1/jobs/x", 400), ("/api/v1/runs/3/points?from=x", 400), ("/etc", 404)]
        {
            assert_eq!(get(target).map_err(|why| why.status), Err(status), "{target}");
        }
        assert_eq!(asked("PUT / HTTP/1.1\r\nHost: localhost\r\n\r\n", &[]).unwrap_err().status, 405);
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
