//! HTTP for people and Prometheus: no secrets. What is served is decided by `crate::http`.

use super::door::Visitor;
use super::{Shared, curves, entrance, streams};
use crate::control::READER;
use crate::http::{self, Asked, Followed, Question, Targets, Unserved};
use crate::page::{self, File};
use crate::targets;
use fleet_common::http::{
    Body, HeaderMap, Incoming, Limits, Request as Asking, Response, accept, header, host, plain, serve, with,
};
use fleet_common::metrics::Format;
use fleet_common::protocol::{ClientFrame, Refusal, RefusalKind, Reply, Request};
use serde::Serialize;
use serde_json::json;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;

const LIMITS: Limits =
    Limits { connections: 64, head: 8 << 10, asking: Duration::from_secs(5), taking: Duration::from_secs(5) };

pub async fn run(shared: Arc<Shared>, listener: TcpListener) {
    let tls = shared.door.tls();
    serve(listener, LIMITS, tls, move |request| respond(shared.clone(), request)).await;
}

async fn respond(shared: Arc<Shared>, request: Asking<Incoming>) -> Response<Body> {
    let question = Question {
        method: request.method().as_str(),
        path: request.uri().path(),
        query: request.uri().query().unwrap_or_default(),
        host: host(request.headers()),
    };
    let visitor = match entrance::enter(&shared, question, &request).await {
        Ok(Some(visitor)) => visitor,
        Ok(None) => return finished(&shared, "/login", entrance::log_in(&shared, request).await),
        Err(answer) => return finished(&shared, "other", answer),
    };
    match http::asked(&question, &shared.hosts) {
        Ok(asked) => {
            let pattern = asked.pattern();
            finished(&shared, pattern, answer(&shared, asked, visitor, request.headers()).await)
        }
        Err(Unserved { status, message }) => finished(&shared, "other", text(status, message)),
    }
}

/// Counts an answer, and says what a browser may do with it.
fn finished(shared: &Shared, pattern: &'static str, mut response: Response<Body>) -> Response<Body> {
    shared.metrics.served(pattern, response.status().as_u16());
    let headers = response.headers_mut();
    let policy = header::HeaderValue::from_static(page::POLICY);
    headers.entry(header::CONTENT_SECURITY_POLICY).or_insert(policy);
    headers.insert(header::REFERRER_POLICY, header::HeaderValue::from_static("no-referrer"));
    let own = header::HeaderName::from_static("cross-origin-resource-policy");
    headers.insert(own, header::HeaderValue::from_static("same-origin"));
    response
}

async fn answer(shared: &Arc<Shared>, asked: Asked, visitor: Visitor, headers: &HeaderMap) -> Response<Body> {
    let question = match asked {
        Asked::Health => return health(shared),
        Asked::Metrics => return metrics(shared, Format::wanted(accept(headers))).await,
        Asked::Targets(kind) => return targets(shared, kind).await,
        Asked::Visitor => return json_of(&json!({"may": visitor.may()})),
        Asked::File(File { kind, text, .. }) => return plain(200, kind, *text),
        Asked::Picture(picture) => return drawn(curves::picture(shared, picture).await),
        Asked::Distributions(of) => return drawn(curves::distributions(shared, of).await),
        Asked::Series(run) => return answered(curves::series(shared, run).await),
        Asked::Events { job, from } => return answered(streams::events(shared, job, from).await),
        Asked::Stream(followed) => return stream(shared, followed, headers),
        Asked::Api(question) => question,
    };
    match ask(shared, question, false).await {
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
            let mut response = plain(200, "image/svg+xml", svg);
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
async fn metrics(shared: &Shared, format: Format) -> Response<Body> {
    match shared.calls.measure().await {
        Ok(mut page) => {
            shared.metrics.streams.set(shared.streams.open() as i64);
            shared.metrics.add_to(&mut page, &shared.gate);
            plain(200, format.content_type(), page.write(format))
        }
        Err(refusal) => refused(refusal),
    }
}

/// What Prometheus shall scrape, as far as this coordinator knows.
async fn targets(shared: &Shared, kind: Targets) -> Response<Body> {
    let question = match kind {
        Targets::Coordinators => Request::Coordinators,
        Targets::Workers => Request::Nodes,
    };
    match ask(shared, question, true).await {
        Reply::Coordinators(views) => {
            let known = shared.status.borrow().http.clone();
            json_of(&targets::coordinators(&shared.asked, &views, &known))
        }
        Reply::Nodes(nodes) => json_of(&targets::workers(&shared.asked, &nodes)),
        Reply::Refused(refusal) => refused(refusal),
        _ => text(500, "the cluster gave an answer that does not fit"),
    }
}

pub(super) fn text(status: u16, line: impl Into<String>) -> Response<Body> {
    let mut body: String = line.into();
    body.push('\n');
    plain(status, "text/plain; charset=utf-8", body)
}

fn json_of(value: &impl Serialize) -> Response<Body> {
    match serde_json::to_vec(value) {
        Ok(body) => plain(200, "application/json", body),
        Err(error) => text(500, error.to_string()),
    }
}

pub(super) fn refused(refusal: Refusal) -> Response<Body> {
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
