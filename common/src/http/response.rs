//! An answer.

use super::Body;
use bytes::Bytes;
use hyper::header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE, HeaderValue, X_CONTENT_TYPE_OPTIONS};
use hyper::{Response, StatusCode};

/// Of this status and content type, for no cache, and taken for nothing else than it says. Where only GET is served, 405 says so.
pub fn plain(status: u16, kind: &'static str, body: impl Into<Bytes>) -> Response<Body> {
    with(status, kind, Body::from(body))
}

/// The same with a body that may grow.
pub fn with(status: u16, kind: &'static str, body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    *response.status_mut() = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let headers = response.headers_mut();
    let mut say = |name, value| headers.insert(name, HeaderValue::from_static(value));
    say(CONTENT_TYPE, kind);
    say(CACHE_CONTROL, "no-store");
    say(X_CONTENT_TYPE_OPTIONS, "nosniff");
    if status == 405 {
        say(ALLOW, "GET");
    }
    response
}
