//! HTTP for people and Prometheus: one request per connection, no secrets. What is served is decided by `crate::http`.

use super::Shared;
use crate::control::READER;
use crate::http::{self, Asked, Targets, Unserved};
use crate::targets;
use fleet_common::metrics::Format;
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
    let (pattern, response) = match http::asked(head, &shared.hosts) {
        Ok(asked) => (asked.pattern(), answer(shared, asked).await),
        Err(Unserved { status, message }) => ("other", Response::text(status, message)),
    };
    shared.metrics.served(pattern, response.status);
    response
}

async fn answer(shared: &Shared, asked: Asked) -> Response {
    let request = match asked {
        Asked::Health => return health(shared),
        Asked::Metrics(format) => return metrics(shared, format).await,
        Asked::Targets(kind) => return targets(shared, kind).await,
        Asked::Api(request) => request,
    };
    match ask(shared, request).await {
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
async fn ask(shared: &Shared, request: Request) -> Reply {
    shared.calls.ask(READER, ClientFrame::query(request)).await
}

/// What Prometheus shall scrape, as far as this coordinator knows.
async fn targets(shared: &Shared, kind: Targets) -> Response {
    let request = match kind {
        Targets::Coordinators => Request::Coordinators,
        Targets::Workers => Request::Nodes,
    };
    let frame = ClientFrame { stale: true, ..ClientFrame::query(request) };
    match shared.calls.ask(READER, frame).await {
        Reply::Coordinators(views) => {
            let known = shared.status.borrow().http.clone();
            Response::json(&targets::coordinators(&shared.asked, &views, &known))
        }
        Reply::Nodes(nodes) => Response::json(&targets::workers(&shared.asked, &nodes)),
        Reply::Refused(refusal) => Response::refused(refusal),
        _ => Response::text(500, "the cluster gave an answer that does not fit"),
    }
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
async fn metrics(shared: &Shared, format: Format) -> Response {
    match shared.calls.measure().await {
        Ok(mut page) => {
            shared.metrics.add_to(&mut page, &shared.gate);
            Response { status: 200, kind: format.content_type(), body: page.write(format).into_bytes() }
        }
        Err(refusal) => Response::refused(refusal),
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
