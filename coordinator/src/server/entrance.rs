//! What comes before a question is looked at: who asks, the form that lets a browser in, and what a visitor may change.

use super::door::{Door, Visitor};
use super::http::{refused, text};
use super::{Shared, changes};
use crate::http::{self, Question, Unserved};
use bytes::Bytes;
use fleet_common::http::{
    Body, Caller, HeaderMap, Incoming, Request, Response, header, is_own_origin, plain, read,
};
use fleet_common::net::LoginError;
use std::time::Duration;
use tokio::time::timeout;

/// Bytes of a form with a login.
const FORM_MAX: usize = 4 << 10;
/// For it to arrive: whoever sends it has shown nothing yet.
const FORM_TIME: Duration = Duration::from_secs(5);

const LOGIN: &str = include_str!("../page/login.html");
const LOGIN_POLICY: &str = "default-src 'none'; style-src 'self'; img-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'";

/// What anybody may have: whether this coordinator lives, and what the form needs.
fn is_open(path: &str) -> bool {
    path == "/healthz" || path.ends_with(".css") || path.ends_with(".svg") && !path.starts_with("/api/")
}

/// Who asks a question, if he may look; `None` for the form with a login, which is still to be read. Everything else is answered.
pub async fn enter(
    shared: &Shared,
    question: Question<'_>,
    request: &Request<Incoming>,
) -> Result<Option<Visitor>, Response<Body>> {
    let served = http::check_host(&question, &shared.hosts);
    served.map_err(|Unserved { status, message }| text(status, message))?;
    let headers = request.headers();
    let visitor = shared.door.visitor(headers, request.extensions().get::<Caller>());
    if let Door::Loopback = shared.door {
        return visitor.map(Some).map_err(unauthorized);
    }
    let is_post = question.method == "POST";
    if is_post && !is_own_origin(headers) {
        return Err(text(403, "this comes from a page of another site"));
    }
    match (question.path, is_post, visitor) {
        ("/login", true, _) => Ok(None),
        ("/login", false, _) => {
            Err(login_page(200, "This page is for those who have a login of the cluster."))
        }
        ("/logout", true, _) => Err(moved("/login", &Door::no_cookie())),
        (_, true, Ok(visitor)) => Err(changed(shared, visitor, &question).await),
        (_, false, Ok(visitor)) => Ok(Some(visitor)),
        (path, false, Err(_)) if is_open(path) => Ok(Some(Visitor { user: None, operates: false })),
        (_, false, Err(_)) if wants_a_page(headers) => Err(moved("/login", "")),
        (_, _, Err(error)) => Err(unauthorized(error)),
    }
}

/// Answers the form.
pub async fn log_in(shared: &Shared, request: Request<Incoming>) -> Response<Body> {
    let form = match timeout(FORM_TIME, read(request.into_body(), FORM_MAX, FORM_MAX)).await {
        Ok(Ok(form)) => String::from_utf8_lossy(&form).into_owned(),
        Ok(Err(unread)) => return text(400, unread.to_string()),
        Err(_) => return text(408, "the form did not arrive in time"),
    };
    // A login has no signs that a form would write otherwise, but for blanks around it.
    let login = form.strip_prefix("login=").unwrap_or_default().trim_matches('+');
    match shared.door.cookie(login) {
        Ok(cookie) => moved("/", &cookie),
        Err(error) => login_page(401, &error.to_string()),
    }
}

async fn changed(shared: &Shared, visitor: Visitor, question: &Question<'_>) -> Response<Body> {
    let request = match http::change(question) {
        Ok(request) => request,
        Err(Unserved { status, message }) => return text(status, message),
    };
    let Some(user) = visitor.user.filter(|_| visitor.operates) else {
        return text(403, "this login may only look; `fleet web token --operate` makes one that may do more");
    };
    match changes::carry_out(shared, user, request).await {
        Ok(()) => text(200, "done"),
        Err(refusal) => refused(refusal),
    }
}

/// A browser is shown the form, a program is told what is missing.
fn wants_a_page(headers: &HeaderMap) -> bool {
    let accepts = headers.get(header::ACCEPT).and_then(|accept| accept.to_str().ok());
    accepts.is_some_and(|accept| accept.contains("text/html"))
}

fn unauthorized(error: LoginError) -> Response<Body> {
    let mut response = text(401, format!("{error}; send it as `Authorization: Bearer LOGIN`"));
    response.headers_mut().insert(header::WWW_AUTHENTICATE, header::HeaderValue::from_static("Bearer"));
    response
}

/// `message` is a text of ours.
fn login_page(status: u16, message: &str) -> Response<Body> {
    let body = LOGIN.replace("{message}", &message.replace('<', "&lt;"));
    let mut response = plain(status, "text/html; charset=utf-8", body);
    let policy = header::HeaderValue::from_static(LOGIN_POLICY);
    response.headers_mut().insert(header::CONTENT_SECURITY_POLICY, policy);
    response
}

fn moved(to: &'static str, cookie: &str) -> Response<Body> {
    let mut response = plain(303, "text/plain; charset=utf-8", Bytes::new());
    let headers = response.headers_mut();
    headers.insert(header::LOCATION, header::HeaderValue::from_static(to));
    if let Ok(cookie) = header::HeaderValue::from_str(cookie)
        && !cookie.is_empty()
    {
        headers.insert(header::SET_COOKIE, cookie);
    }
    response
}
