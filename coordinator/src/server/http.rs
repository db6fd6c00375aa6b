//! HTTP for people and Prometheus: no secrets. What is served is decided by `crate::http`.

use super::{Shared, entrance};
use crate::control::READER;
use crate::http::{self, Asked, Question, Targets, Unserved};
use crate::targets;
use fleet_common::http::{Body, Incoming, Limits, Request as Asking, Response, accept, host, plain, serve};
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
        Ok(None) => return counted(&shared, "/login", entrance::log_in(&shared, request).await),
        Err(answer) => return counted(&shared, "other", answer),
    };
    let format = Format::wanted(accept(request.headers()));
    match http::asked(&question, &shared.hosts) {
        Ok(asked) => counted(&shared, asked.pattern(), answer(&shared, asked, format).await),
        Err(Unserved { status, message }) => counted(&shared, "other", text(status, message)),
    }
}

fn counted(shared: &Shared, pattern: &'static str, response: Response<Body>) -> Response<Body> {
    shared.metrics.served(pattern, response.status().as_u16());
    response
}

async fn answer(shared: &Shared, asked: Asked, format: Format) -> Response<Body> {
    let question = match asked {
        Asked::Health => return health(shared),
        Asked::Metrics => return metrics(shared, format).await,
        Asked::Targets(kind) => return targets(shared, kind).await,
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
async fn metrics(shared: &Shared, format: Format) -> Response<Body> {
    match shared.calls.measure().await {
        Ok(mut page) => {
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
