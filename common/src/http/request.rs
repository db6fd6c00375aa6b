//! What a request says of itself, and its body.

use super::hosts::host_of;
use hyper::HeaderMap;
use hyper::body::{Body as _, Incoming};
use hyper::header::{HOST, HeaderName, ORIGIN};
use std::future::poll_fn;
use std::pin::Pin;

/// Of the one Host header that a request must have; `None` where there is none, or several.
pub fn host(headers: &HeaderMap) -> Option<&str> {
    only(headers, HOST)
}

/// Whether a request that changes something comes from a page of this server, or from no page: a browser says on every such request which
/// page it is from.
pub fn is_own_origin(headers: &HeaderMap) -> bool {
    if !headers.contains_key(ORIGIN) {
        return true;
    }
    let (Some(origin), Some(host)) = (only(headers, ORIGIN), host(headers)) else { return false };
    let origin = origin.strip_prefix("https://").or_else(|| origin.strip_prefix("http://"));
    origin.is_some_and(|origin| origin.eq_ignore_ascii_case(host) && !host_of(origin).is_empty())
}

fn only(headers: &HeaderMap, name: HeaderName) -> Option<&str> {
    let mut values = headers.get_all(name).iter();
    match (values.next().and_then(|value| value.to_str().ok()), values.next()) {
        (Some(value), None) => Some(value),
        _ => None,
    }
}

/// Why a body was not read.
#[derive(Debug, thiserror::Error)]
pub enum Unread {
    #[error("the body has more than {0} bytes")]
    TooLong(usize),
    #[error("the body cannot be read: {0}")]
    Broken(#[from] hyper::Error),
}

/// A body of at most `most` bytes. Of a longer one up to `thrown` bytes are read and thrown away, so that its client reads the answer.
pub async fn read(mut body: Incoming, most: usize, thrown: usize) -> Result<Vec<u8>, Unread> {
    let (mut kept, mut length) = (Vec::new(), 0);
    while let Some(frame) = poll_fn(|context| Pin::new(&mut body).poll_frame(context)).await {
        let Ok(bytes) = frame?.into_data() else { continue };
        length += bytes.len();
        if length <= most {
            kept.extend_from_slice(&bytes);
        } else if length <= thrown {
            kept = Vec::new();
        } else {
            break;
        }
    }
    if length <= most { Ok(kept) } else { Err(Unread::TooLong(most)) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hyper::header::HeaderValue;

    fn headers(lines: &[(&'static str, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in lines {
            headers.append(*name, HeaderValue::from_str(value).unwrap());
        }
        headers
    }

    #[test]
    fn a_request_has_one_host() {
        assert_eq!(host(&headers(&[("host", "a:1")])), Some("a:1"));
        assert_eq!(host(&headers(&[])), None);
        assert_eq!(host(&headers(&[("host", "a"), ("host", "b")])), None);
    }

    #[test]
    fn a_page_of_another_site_is_told_from_ours() {
        let from = |origin| is_own_origin(&headers(&[("host", "box:7080"), ("origin", origin)]));
        assert!(from("http://box:7080") && from("https://BOX:7080"));
        for other in ["http://box", "http://evil.example", "null", "box:7080", "http://box:7080.evil", ""] {
            assert!(!from(other), "{other:?}");
        }
        assert!(is_own_origin(&headers(&[("host", "box:7080")])), "no page");
        assert!(!is_own_origin(&headers(&[("origin", "http://box")])));
    }
}
