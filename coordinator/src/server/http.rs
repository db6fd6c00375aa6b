//! HTTP for people and Prometheus: GET only, one request per connection, no secrets.
//!
//! The Host header must name this machine's loopback or the address that was configured, so that a web page that a browser on this
//! machine shows cannot read the cluster through a name of its own (DNS rebinding).

use super::Shared;
use fleet_common::ids::{JobId, UserId};
use fleet_common::protocol::{ClientFrame, Member, Page, Refusal, RefusalKind, Reply, Request};
use serde::Serialize;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tracing::debug;

/// Bytes of a request line and its headers.
const HEAD_MAX: usize = 8 << 10;
/// Requests at once.
const CONNECTIONS_MAX: usize = 64;
/// For a request to arrive, and for its answer to be taken.
const DEADLINE: Duration = Duration::from_secs(5);
/// Between attempts to accept when the process has too many files open.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

pub async fn run(shared: Arc<Shared>, listener: TcpListener) {
    let mut connections = JoinSet::new();
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                while connections.len() >= CONNECTIONS_MAX {
                    connections.join_next().await;
                }
                connections.spawn(serve(shared.clone(), stream));
            }
            Err(error) => {
                debug!("HTTP: {error}");
                tokio::time::sleep(ACCEPT_RETRY).await;
            }
        }
        while connections.try_join_next().is_some() {}
    }
}

async fn serve(shared: Arc<Shared>, mut stream: TcpStream) {
    let head = match timeout(DEADLINE, read_head(&mut stream)).await {
        Ok(Ok(head)) => head,
        _ => return,
    };
    let response = match head {
        Some(head) => respond(&shared, &head).await,
        None => Response::text(431, "the request's headers are too long"),
    };
    let sent = timeout(DEADLINE, async {
        stream.write_all(&response.bytes()).await?;
        stream.shutdown().await
    });
    // A reader that went away has no more questions.
    let _ = sent.await;
}

/// Everything up to the empty line; `None` when it is too long.
async fn read_head(stream: &mut TcpStream) -> std::io::Result<Option<String>> {
    let mut head = Vec::new();
    let mut chunk = [0; 1024];
    loop {
        let read = stream.read(&mut chunk).await?;
        head.extend_from_slice(&chunk[..read]);
        if head.windows(4).any(|end| end == b"\r\n\r\n") {
            return Ok(Some(String::from_utf8_lossy(&head).into_owned()));
        }
        if read == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        if head.len() > HEAD_MAX {
            return Ok(None);
        }
    }
}

async fn respond(shared: &Shared, head: &str) -> Response {
    let request = match parse(head) {
        Ok(request) => request,
        Err(why) => return Response::text(400, why),
    };
    if !host_allowed(request.host, &shared.hosts) {
        return Response::text(421, "this Host is not served here; ask by the coordinator's address");
    }
    if request.method != "GET" {
        return Response { allow: true, ..Response::text(405, "only GET is served here") };
    }
    let asked = match request.path.trim_end_matches('/') {
        "/healthz" => return health(shared),
        "/metrics" => return metrics(shared).await,
        "/api/v1/cluster" => Request::ClusterStatus,
        "/api/v1/coordinators" => Request::Coordinators,
        "/api/v1/nodes" => Request::Nodes,
        "/api/v1/jobs" => Request::Jobs { all: None },
        "/api/v1/checkpoints" => Request::Checkpoints { job: None, page: Page::default() },
        path => match path.strip_prefix("/api/v1/jobs/").map(str::parse::<JobId>) {
            Some(Ok(job)) => Request::Job(job),
            Some(Err(error)) => return Response::text(400, error.to_string()),
            None => {
                return Response::text(
                    404,
                    "there is /healthz, /metrics and /api/v1/{cluster,coordinators,nodes,jobs,jobs/ID,checkpoints}",
                );
            }
        },
    };
    match ask(shared, asked, false).await {
        Reply::Cluster(view) => Response::json(&view),
        Reply::Coordinators(views) => Response::json(&views),
        Reply::Nodes(views) => Response::json(&views),
        Reply::Jobs(views) => Response::json(&views.items),
        Reply::Job(view) => Response::json(&view),
        Reply::Checkpoints(views) => Response::json(&views.items),
        Reply::Refused(refusal) => Response::refused(refusal),
        _ => Response::text(500, "the cluster gave an answer that does not fit"),
    }
}

/// A question from this machine. Nobody has this number: ids begin with 1.
async fn ask(shared: &Shared, request: Request, stale: bool) -> Reply {
    let frame = ClientFrame { stale, ..ClientFrame::query(request) };
    shared.calls.ask(Member::Client(UserId(0)), frame).await
}

/// Whether this coordinator can serve, which it can by any leader.
fn health(shared: &Shared) -> Response {
    let status = shared.status.borrow().clone();
    match (status.leader, status.read_only) {
        (Some(_), None) => Response::text(200, "ok"),
        (_, Some(why)) => Response::text(503, format!("read-only: {why}")),
        (None, None) => Response::text(503, "no leader"),
    }
}

/// What this coordinator itself knows, with or without a leader.
async fn metrics(shared: &Shared) -> Response {
    let (cluster, nodes) =
        (ask(shared, Request::ClusterStatus, true).await, ask(shared, Request::Nodes, true).await);
    let (cluster, nodes) = match (cluster, nodes) {
        (Reply::Cluster(cluster), Reply::Nodes(nodes)) => (cluster, nodes),
        (Reply::Refused(refusal), _) | (_, Reply::Refused(refusal)) => return Response::refused(refusal),
        _ => return Response::text(500, "the cluster gave an answer that does not fit"),
    };
    let status = shared.status.borrow().clone();
    match shared.metrics.render(&cluster, &status, &nodes) {
        Ok(body) => Response { status: 200, kind: "text/plain; version=0.0.4", body, allow: false },
        Err(error) => Response::text(500, error.to_string()),
    }
}

#[derive(Debug, PartialEq)]
struct HttpRequest<'a> {
    method: &'a str,
    path: &'a str,
    host: &'a str,
}

fn parse(head: &str) -> Result<HttpRequest<'_>, &'static str> {
    let mut lines = head.split("\r\n");
    let mut words = lines.next().unwrap_or_default().split(' ');
    let (Some(method), Some(target), Some(version), None) =
        (words.next(), words.next(), words.next(), words.next())
    else {
        return Err("this is not an HTTP request");
    };
    if !version.starts_with("HTTP/1.") || !target.starts_with('/') {
        return Err("this is not an HTTP/1.1 request for a path");
    }
    let mut hosts =
        lines.filter_map(|line| line.split_once(':')).filter(|(name, _)| name.eq_ignore_ascii_case("host"));
    match (hosts.next(), hosts.next()) {
        (Some((_, host)), None) => {
            let path = target.split_once('?').map_or(target, |(path, _)| path);
            Ok(HttpRequest { method, path, host: host.trim() })
        }
        _ => Err("a request has exactly one Host"),
    }
}

/// `HOST` of `HOST` or `HOST:PORT`, where an IPv6 address stands in brackets.
pub fn host_of(address: &str) -> &str {
    match address.strip_prefix('[') {
        Some(rest) => rest.split_once(']').map_or(rest, |(host, _)| host),
        None => address.rsplit_once(':').map_or(address, |(host, _)| host),
    }
}

fn host_allowed(header: &str, hosts: &[String]) -> bool {
    let host = host_of(header);
    let loopback = host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback());
    loopback
        || host.eq_ignore_ascii_case("localhost")
        || hosts.iter().any(|known| known.eq_ignore_ascii_case(host))
}

struct Response {
    status: u16,
    kind: &'static str,
    body: Vec<u8>,
    allow: bool,
}

impl Response {
    fn text(status: u16, line: impl Into<String>) -> Response {
        let mut body: String = line.into();
        body.push('\n');
        Response { status, kind: "text/plain; charset=utf-8", body: body.into_bytes(), allow: false }
    }

    fn json(value: &impl Serialize) -> Response {
        match serde_json::to_vec(value) {
            Ok(body) => Response { status: 200, kind: "application/json", body, allow: false },
            Err(error) => Response::text(500, error.to_string()),
        }
    }

    fn refused(refusal: Refusal) -> Response {
        let status = match refusal.kind {
            RefusalKind::Invalid => 400,
            RefusalKind::Forbidden => 403,
            RefusalKind::NotFound => 404,
            RefusalKind::Unavailable => 503,
        };
        Response::text(status, refusal.message)
    }

    fn bytes(&self) -> Vec<u8> {
        let reason = match self.status {
            200 => "OK",
            400 => "Bad Request",
            403 => "Forbidden",
            404 => "Not Found",
            405 => "Method Not Allowed",
            421 => "Misdirected Request",
            431 => "Request Header Fields Too Large",
            503 => "Service Unavailable",
            _ => "Internal Server Error",
        };
        let allow = if self.allow { "Allow: GET\r\n" } else { "" };
        let head = format!(
            "HTTP/1.1 {} {reason}\r\nContent-Type: {}\r\nContent-Length: {}\r\nX-Content-Type-Options: nosniff\r\nCache-Control: no-store\r\n{allow}Connection: close\r\n\r\n",
            self.status,
            self.kind,
            self.body.len()
        );
        [head.as_bytes(), &self.body].concat()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_taken_apart_or_refused() {
        let head = "GET /api/v1/jobs?x=1 HTTP/1.1\r\nAccept: */*\r\nhOST: localhost:7080\r\n\r\n";
        assert_eq!(
            parse(head),
            Ok(HttpRequest { method: "GET", path: "/api/v1/jobs", host: "localhost:7080" })
        );
        for bad in [
            "",
            "GET /\r\nHost: a\r\n\r\n",
            "GET / HTTP/2\r\nHost: a\r\n\r\n",
            "GET http://a/ HTTP/1.1\r\nHost: a\r\n\r\n",
            "GET / HTTP/1.1\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
            "GET / x HTTP/1.1\r\nHost: a\r\n\r\n",
        ] {
            assert!(parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn only_loopback_and_the_configured_names_are_served() {
        let hosts = ["box.example".to_owned()];
        for good in [
            "localhost",
            "LOCALHOST:80",
            "127.0.0.1:7080",
            "127.1.2.3",
            "[::1]:7080",
            "[::1]",
            "Box.Example:7080",
        ] {
            assert!(host_allowed(good, &hosts), "{good}");
        }
        for bad in ["", "evil.example", "127.0.0.1.evil.example:80", "localhost.evil", "10.0.0.1", "[::2]:80"]
        {
            assert!(!host_allowed(bad, &hosts), "{bad}");
        }
    }
}
