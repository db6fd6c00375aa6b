//! HTTP for people and Prometheus: no secrets. What is served is decided by `crate::http`.

use super::Shared;
use crate::control::READER;
use crate::http::{self, Asked, Question, Unserved};
use bytes::Bytes;
use fleet_common::http::{
    Body, Incoming, Limits, Request as Asking, Response, StatusCode, header, host, serve,
};
use fleet_common::protocol::{ClientFrame, Refusal, RefusalKind, Reply, Request};
use serde::Serialize;
use serde_json::json;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;

const LIMITS: Limits =
    Limits { connections: 64, head: 8 << 10, asking: Duration::from_secs(5), taking: Duration::from_secs(5) };

pub async fn run(shared: Arc<Shared>, listener: TcpListener) {
    serve(listener, LIMITS, None, move |request| respond(shared.clone(), request)).await;
}

async fn respond(shared: Arc<Shared>, request: Asking<Incoming>) -> Response<Body> {
    let question = Question {
        method: request.method().as_str(),
        path: request.uri().path(),
        query: request.uri().query().unwrap_or_default(),
        host: host(request.headers()),
    };
    let asked = match http::asked(&question, &shared.hosts) {
        Ok(Asked::Health) => return health(&shared),
        Ok(Asked::Metrics) => return metrics(&shared).await,
        Ok(Asked::Api(request)) => request,
        Err(Unserved { status, message }) => return text(status, message),
    };
    match ask(&shared, asked, false).await {
        Reply::Cluster(view) => json_of(&view),
        Reply::Coordinators(views) => json_of(&views),
        Reply::Nodes(views) => json_of(&views),
        Reply::Jobs(views) => json_of(&views.items),
        Reply::Job(view) => json_of(&view),
        Reply::Checkpoints(views) => json_of(&views.items),
        Reply::Checkpoint(view) => json_of(&view),
        Reply::Decisions(views) => json_of(&views.items),
        Reply::Runs(views) => json_of(&views.items),
        Reply::Run(view) => json_of(&view),
        Reply::Points { points, next } => json_of(&json!({"points": points, "next": next})),
        Reply::Exports(views) => json_of(&views.items),
        Reply::Export(view) => json_of(&view),
        Reply::Profiles(views) => json_of(&views.items),
        Reply::Profile(view) => json_of(&view),
        Reply::Refused(refusal) => refused(refusal),
        _ => text(500, "the cluster gave an answer that does not fit"),
    }
}

/// A question from this machine.
async fn ask(shared: &Shared, request: Request, stale: bool) -> Reply {
    let frame = ClientFrame { stale, ..ClientFrame::query(request) };
    shared.calls.ask(READER, frame).await
}

/// Whether this coordinator can serve, which it can by any leader.
fn health(shared: &Shared) -> Response<Body> {
    let status = shared.status.borrow().clone();
    if let Some(why) = status.removed {
        return text(503, why);
    }
    match (status.leader, status.read_only) {
        // It serves all the same, but for what it cannot read.
        (Some(_), None) => match status.contradicting.or(status.unreadable_snapshot).or(status.damaged) {
            Some(what) => text(200, format!("degraded: {what}")),
            None => text(200, "ok"),
        },
        (_, Some(why)) => text(503, format!("read-only: {why}")),
        (None, None) => text(503, "no leader"),
    }
}

/// What this coordinator itself knows, with or without a leader.
async fn metrics(shared: &Shared) -> Response<Body> {
    let (cluster, nodes) =
        (ask(shared, Request::ClusterStatus, true).await, ask(shared, Request::Nodes, true).await);
    let (cluster, nodes) = match (cluster, nodes) {
        (Reply::Cluster(cluster), Reply::Nodes(nodes)) => (cluster, nodes),
        (Reply::Refused(refusal), _) | (_, Reply::Refused(refusal)) => return refused(refusal),
        _ => return text(500, "the cluster gave an answer that does not fit"),
    };
    let status = shared.status.borrow().clone();
    match shared.metrics.render(&cluster, &status, &nodes) {
        Ok(body) => response(200, "text/plain; version=0.0.4", body),
        Err(error) => text(500, error.to_string()),
    }
}

fn text(status: u16, line: impl Into<String>) -> Response<Body> {
    let mut body: String = line.into();
    body.push('\n');
    response(status, "text/plain; charset=utf-8", body)
}

fn json_of(value: &impl Serialize) -> Response<Body> {
    match serde_json::to_vec(value) {
        Ok(body) => response(200, "application/json", body),
        Err(error) => text(500, error.to_string()),
    }
}

fn refused(refusal: Refusal) -> Response<Body> {
    let status = match refusal.kind {
        RefusalKind::Invalid | RefusalKind::Spent => 400,
        RefusalKind::Forbidden => 403,
        RefusalKind::NotFound => 404,
        RefusalKind::Unavailable | RefusalKind::Later | RefusalKind::Undecided | RefusalKind::Forgotten => {
            503
        }
    };
    text(status, refusal.message)
}

fn response(status: u16, kind: &'static str, body: impl Into<Bytes>) -> Response<Body> {
    let mut response = Response::new(Body::from(body));
    *response.status_mut() = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let headers = response.headers_mut();
    let mut say = |name, value| headers.insert(name, header::HeaderValue::from_static(value));
    say(header::CONTENT_TYPE, kind);
    say(header::CACHE_CONTROL, "no-store");
    say(header::X_CONTENT_TYPE_OPTIONS, "nosniff");
    if status == 405 {
        say(header::ALLOW, "GET");
    }
    response
}
