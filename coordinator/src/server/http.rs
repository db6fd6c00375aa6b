//! HTTP for people and Prometheus: no secrets. What is served is decided by `crate::http`.

use super::{Shared, curves, streams};
use crate::control::READER;
use crate::http::{self, Asked, Followed, Question, Unserved};
use crate::page::{self, File};
use bytes::Bytes;
use fleet_common::http::{
    Body, HeaderMap, Incoming, Limits, Request as Asking, Response, StatusCode, header, host, serve,
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
        Ok(Asked::File(File { kind, text, .. })) => return response(200, kind, *text),
        Ok(Asked::Picture(picture)) => return drawn(curves::picture(&shared, picture).await),
        Ok(Asked::Distributions(of)) => return drawn(curves::distributions(&shared, of).await),
        Ok(Asked::Series(run)) => return answered(curves::series(&shared, run).await),
        Ok(Asked::Events { job, from }) => return answered(streams::events(&shared, job, from).await),
        Ok(Asked::Stream(followed)) => return stream(&shared, followed, request.headers()),
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

/// A browser that was cut off says how far it had come.
fn stream(shared: &Arc<Shared>, followed: Followed, headers: &HeaderMap) -> Response<Body> {
    let seen = headers.get("last-event-id").and_then(|id| id.to_str().ok()?.parse::<u64>().ok());
    let body = match followed {
        Followed::Cluster => streams::cluster(shared),
        Followed::Job { job, from } => {
            streams::job(shared, job, seen.map_or(from, |seen| seen.saturating_add(1)))
        }
    };
    match body {
        Ok(body) => with(200, "text/event-stream", body),
        Err(refusal) => refused(refusal),
    }
}

/// A picture brings a style of its own, for whoever opens it by itself.
fn drawn(picture: Result<String, Refusal>) -> Response<Body> {
    match picture {
        Ok(svg) => {
            let mut response = response(200, "image/svg+xml", svg);
            let policy = header::HeaderValue::from_static("default-src 'none'; style-src 'unsafe-inline'");
            response.headers_mut().insert(header::CONTENT_SECURITY_POLICY, policy);
            response
        }
        Err(refusal) => refused(refusal),
    }
}

fn answered(answer: Result<impl Serialize, Refusal>) -> Response<Body> {
    match answer {
        Ok(value) => json_of(&value),
        Err(refusal) => refused(refusal),
    }
}

/// A question from this machine.
pub(super) async fn ask(shared: &Shared, request: Request, stale: bool) -> Reply {
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
    with(status, kind, Body::from(body))
}

fn with(status: u16, kind: &'static str, body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    *response.status_mut() = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let headers = response.headers_mut();
    let mut say = |name, value| headers.insert(name, header::HeaderValue::from_static(value));
    say(header::CONTENT_TYPE, kind);
    say(header::CACHE_CONTROL, "no-store");
    say(header::X_CONTENT_TYPE_OPTIONS, "nosniff");
    say(header::CONTENT_SECURITY_POLICY, page::POLICY);
    say(header::REFERRER_POLICY, "no-referrer");
    say(header::HeaderName::from_static("cross-origin-resource-policy"), "same-origin");
    if status == 405 {
        say(header::ALLOW, "GET");
    }
    response
}
