//! Connections and requests. The protocol is hyper's; here are the paths and the limits.

use super::Refusal;
use super::answer::{self, Head};
use super::api::{self, Kind};
use super::body::{Body, Events};
use super::queue::{Queue, Told};
use bytes::Bytes;
use fleet_common::http::{self, Limits, Unread, is_of_this_machine};
use hyper::body::Incoming;
use hyper::header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE, HeaderValue, RETRY_AFTER};
use hyper::{HeaderMap, Method, Request, Response, StatusCode};
use serde_json::{Value, json};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::net::TcpListener;
use tokio::time::timeout;

const LIMITS: Limits = Limits {
    connections: 64,
    head: 32 << 10,
    asking: Duration::from_secs(15),
    taking: Duration::from_secs(30),
};
/// Bytes of a request's body that are kept, and of one that is too long those that are thrown away, so that its client reads the answer.
const BODY_MAX: usize = 4 << 20;
const THROWN_MAX: usize = 64 << 20;
/// Bytes of a request that one token can be, and of all that is no prompt: what is longer than that for each token that the model takes is not
/// even tokenised.
const TOKEN_MAX: usize = 128;
const SETTINGS_MAX: usize = 64 << 10;
/// For a body to arrive.
const BODY_TIME: Duration = Duration::from_secs(30);

/// What all requests need.
pub struct Shared {
    pub queue: Queue,
    /// Names of the variants, in their order.
    pub names: Vec<String>,
    pub context: usize,
    /// Serve only whoever names this machine's loopback: what a browser is shown from elsewhere cannot.
    pub only_local: bool,
    /// Seconds since 1970.
    pub started: u64,
    pub asked: AtomicU64,
}

/// Until it is dropped.
pub async fn run(shared: Arc<Shared>, listener: TcpListener) {
    let answer = move |request: Request<Incoming>| {
        let shared = shared.clone();
        async move { respond(&shared, request).await.unwrap_or_else(refused) }
    };
    http::serve(listener, LIMITS, None, answer).await;
}

async fn respond(shared: &Shared, request: Request<Incoming>) -> Result<Response<Body>, Refusal> {
    if shared.only_local && !is_of_this_machine(host(request.headers())?) {
        let message = "this Host is not served; ask by the address that fleet serve listens on";
        return Err(Refusal::new(421, message));
    }
    let path = request.uri().path().trim_end_matches('/').to_owned();
    let (get, kind) = match path.as_str() {
        "/health" => (Some(json!({"status": "ok"})), None),
        "/v1/models" => (Some(shared.models()), None),
        "/v1/chat/completions" => (None, Some(Kind::Chat)),
        "/v1/completions" => (None, Some(Kind::Completion)),
        path => match path.strip_prefix("/v1/models/") {
            Some(name) => (Some(shared.model(shared.variant(name)?)), None),
            None => return Err(Refusal::new(404, PATHS)),
        },
    };
    match (get, kind, request.method().clone()) {
        (Some(value), _, Method::GET | Method::HEAD) => Ok(json_response(StatusCode::OK, &value)),
        (_, Some(kind), Method::POST) => complete(shared, kind, request).await,
        (get, ..) => Err(Refusal::new(405, if get.is_some() { ONLY_GET } else { ONLY_POST })),
    }
}

const PATHS: &str = "there is /health, /v1/models, /v1/chat/completions and /v1/completions";
const ONLY_GET: &str = "only GET is served here";
const ONLY_POST: &str = "only POST is served here";

async fn complete(
    shared: &Shared,
    kind: Kind,
    request: Request<Incoming>,
) -> Result<Response<Body>, Refusal> {
    check_content(request.headers())?;
    let body = timeout(BODY_TIME, http::read(request.into_body(), BODY_MAX, THROWN_MAX)).await;
    let body = body.map_err(|_| Refusal::new(408, "the body did not arrive in time"))?.map_err(unread)?;
    if body.len() > SETTINGS_MAX + shared.context * TOKEN_MAX {
        let message = format!(
            "the request has {} bytes, and the model takes {} tokens; shorten it",
            body.len(),
            shared.context
        );
        return Err(Refusal::new(400, message).coded("context_length_exceeded"));
    }
    let asked = api::asked(kind, &body)?;
    let variant = match &asked.model {
        Some(name) => shared.variant(name)?,
        None => 0,
    };
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let number = shared.asked.fetch_add(1, Ordering::Relaxed);
    let word = if kind == Kind::Chat { "chatcmpl" } else { "cmpl" };
    let head = Head {
        kind,
        id: format!("{word}-{:x}-{number}", now.as_millis()),
        created: now.as_secs(),
        model: shared.names[variant].clone(),
    };
    let seed = asked.seed.unwrap_or(now.as_nanos() as u64 ^ number);
    let (stream, usage) = (asked.stream, asked.usage);
    let mut told = shared.queue.ask(asked, variant, seed)?;
    loop {
        match told.recv().await {
            Some(Told::Begun) if stream => return Ok(events(Events::new(told, head, usage))),
            Some(Told::Begun | Told::Piece(_)) => {}
            Some(Told::Done(generated)) => return Ok(json_response(StatusCode::OK, &head.whole(&generated))),
            Some(Told::Refused(refusal)) => return Err(refusal),
            None => return Err(Refusal::new(500, "the model is gone; start fleet serve again")),
        }
    }
}

fn unread(why: Unread) -> Refusal {
    let status = if matches!(why, Unread::TooLong(_)) { 413 } else { 400 };
    Refusal::new(status, why.to_string())
}

/// A page of another site may send what it likes to this machine as long as it is no JSON.
fn check_content(headers: &HeaderMap) -> Result<(), Refusal> {
    let kind = headers.get(CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
    let kind = kind.split(';').next().unwrap_or_default().trim();
    match kind.eq_ignore_ascii_case("application/json") {
        true => Ok(()),
        false => Err(Refusal::new(415, "send JSON, with the header Content-Type: application/json")),
    }
}

fn host(headers: &HeaderMap) -> Result<&str, Refusal> {
    http::host(headers).ok_or_else(|| Refusal::new(400, "a request has exactly one Host"))
}

impl Shared {
    fn variant(&self, name: &str) -> Result<usize, Refusal> {
        self.names.iter().position(|known| known == name).ok_or_else(|| {
            let message = format!("there is no model {name:?}; there is {}", self.names.join(", "));
            Refusal { param: Some("model".into()), ..Refusal::new(404, message).coded("model_not_found") }
        })
    }

    fn models(&self) -> Value {
        let models: Vec<Value> = (0..self.names.len()).map(|variant| self.model(variant)).collect();
        json!({"object": "list", "data": models})
    }

    fn model(&self, variant: usize) -> Value {
        answer::model(&self.names[variant], self.started, self.context)
    }
}

fn refused(refusal: Refusal) -> Response<Body> {
    let status = StatusCode::from_u16(refusal.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let mut response = json_response(status, &refusal.json());
    let headers = response.headers_mut();
    if status == StatusCode::SERVICE_UNAVAILABLE {
        headers.insert(RETRY_AFTER, HeaderValue::from_static("1"));
    }
    if status == StatusCode::METHOD_NOT_ALLOWED {
        let allowed = if refusal.message == ONLY_GET { "GET" } else { "POST" };
        headers.insert(ALLOW, HeaderValue::from_static(allowed));
    }
    response
}

fn json_response(status: StatusCode, value: &Value) -> Response<Body> {
    let body = Body::Whole(Some(Bytes::from(value.to_string())));
    response(status, "application/json", body)
}

fn events(events: Events) -> Response<Body> {
    response(StatusCode::OK, "text/event-stream", Body::Events(events))
}

fn response(status: StatusCode, kind: &'static str, body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert("x-content-type-options", HeaderValue::from_static("nosniff"));
    response
}
