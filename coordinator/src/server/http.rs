//! HTTP for people and Prometheus: one request per connection, no secrets. What is served is decided by `crate::http`.

use super::Shared;
use crate::control::READER;
use crate::http::{self, Asked, Unserved};
use fleet_common::protocol::{ClientFrame, Refusal, RefusalKind, Reply, Request};
use serde::Serialize;
use serde_json::json;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::timeout;
use tracing::debug;

/// Bytes of a request line and its headers.
const HEAD_MAX: usize = 8 << 10;
/// Connections at once. Beyond that the oldest that has not asked anything yet makes room, or the oldest of all.
const CONNECTIONS_MAX: usize = 64;
/// For a request to arrive, and for its answer to be taken.
const DEADLINE: Duration = Duration::from_secs(5);
/// Between attempts to accept when the process has too many files open.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

pub async fn run(shared: Arc<Shared>, listener: TcpListener) {
    let (mut tasks, mut connections) = (JoinSet::new(), Vec::new());
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                make_room(&mut connections);
                let asked = Arc::new(AtomicBool::new(false));
                let task = tasks.spawn(serve(shared.clone(), stream, asked.clone()));
                connections.push(Connection { task, asked });
            }
            Err(error) => {
                debug!("HTTP: {error}");
                tokio::time::sleep(ACCEPT_RETRY).await;
            }
        }
        while tasks.try_join_next().is_some() {}
    }
}

struct Connection {
    task: AbortHandle,
    /// Its request has arrived.
    asked: Arc<AtomicBool>,
}

/// For one more. They are in the order in which they came.
fn make_room(connections: &mut Vec<Connection>) {
    connections.retain(|connection| !connection.task.is_finished());
    if connections.len() >= CONNECTIONS_MAX {
        let silent = connections.iter().position(|connection| !connection.asked.load(Ordering::Relaxed));
        connections.remove(silent.unwrap_or(0)).task.abort();
    }
}

async fn serve(shared: Arc<Shared>, mut stream: TcpStream, asked: Arc<AtomicBool>) {
    let head = match timeout(DEADLINE, read_head(&mut stream)).await {
        Ok(Ok(head)) => head,
        _ => return,
    };
    asked.store(true, Ordering::Relaxed);
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
    let asked = match http::asked(head, &shared.hosts) {
        Ok(Asked::Health) => return health(shared),
        Ok(Asked::Metrics) => return metrics(shared).await,
        Ok(Asked::Api(request)) => request,
        Err(Unserved { status, message }) => return Response::text(status, message),
    };
    match ask(shared, asked, false).await {
        Reply::Cluster(view) => Response::json(&view),
        Reply::Coordinators(views) => Response::json(&views),
        Reply::Nodes(views) => Response::json(&views),
        Reply::Jobs(views) => Response::json(&views.items),
        Reply::Job(view) => Response::json(&view),
        Reply::Checkpoints(views) => Response::json(&views.items),
        Reply::Checkpoint(view) => Response::json(&view),
        Reply::Decisions(views) => Response::json(&views.items),
        Reply::Runs(views) => Response::json(&views.items),
        Reply::Run(view) => Response::json(&view),
        Reply::Points { points, next } => Response::json(&json!({"points": points, "next": next})),
        Reply::Exports(views) => Response::json(&views.items),
        Reply::Export(view) => Response::json(&view),
        Reply::Profiles(views) => Response::json(&views.items),
        Reply::Profile(view) => Response::json(&view),
        Reply::Refused(refusal) => Response::refused(refusal),
        _ => Response::text(500, "the cluster gave an answer that does not fit"),
    }
}

/// A question from this machine.
async fn ask(shared: &Shared, request: Request, stale: bool) -> Reply {
    let frame = ClientFrame { stale, ..ClientFrame::query(request) };
    shared.calls.ask(READER, frame).await
}

/// Whether this coordinator can serve, which it can by any leader.
fn health(shared: &Shared) -> Response {
    let status = shared.status.borrow().clone();
    if let Some(why) = status.removed {
        return Response::text(503, why);
    }
    match (status.leader, status.read_only) {
        // It serves all the same, but for what it cannot read.
        (Some(_), None) => match status.contradicting.or(status.unreadable_snapshot).or(status.damaged) {
            Some(what) => Response::text(200, format!("degraded: {what}")),
            None => Response::text(200, "ok"),
        },
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
        Ok(body) => Response { status: 200, kind: "text/plain; version=0.0.4", body },
        Err(error) => Response::text(500, error.to_string()),
    }
}

struct Response {
    status: u16,
    kind: &'static str,
    body: Vec<u8>,
}

impl Response {
    fn text(status: u16, line: impl Into<String>) -> Response {
        let mut body: String = line.into();
        body.push('\n');
        Response { status, kind: "text/plain; charset=utf-8", body: body.into_bytes() }
    }

    fn json(value: &impl Serialize) -> Response {
        match serde_json::to_vec(value) {
            Ok(body) => Response { status: 200, kind: "application/json", body },
            Err(error) => Response::text(500, error.to_string()),
        }
    }

    fn refused(refusal: Refusal) -> Response {
        let status = match refusal.kind {
            RefusalKind::Invalid | RefusalKind::Spent => 400,
            RefusalKind::Forbidden => 403,
            RefusalKind::NotFound => 404,
            RefusalKind::Unavailable
            | RefusalKind::Later
            | RefusalKind::Undecided
            | RefusalKind::Forgotten => 503,
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
        let allow = if self.status == 405 { "Allow: GET\r\n" } else { "" };
        let head = format!(
            "HTTP/1.1 {} {reason}\r\nContent-Type: {}\r\nContent-Length: {}\r\nX-Content-Type-Options: nosniff\r\nCache-Control: no-store\r\n{allow}Connection: close\r\n\r\n",
            self.status,
            self.kind,
            self.body.len()
        );
        [head.as_bytes(), &self.body].concat()
    }
}
