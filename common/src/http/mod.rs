//! HTTP/1.1 of all programs that serve it: who may ask, how many at once, for how long. The protocol is hyper's.

mod body;
mod hosts;
mod request;
mod response;
mod server;

pub use body::{Body, Feed, Left};
pub use hosts::{host_of, is_of_this_machine};
pub use request::{Unread, accept, host, is_own_origin, read};
pub use response::{plain, with};
pub use server::{Caller, Limits, Tls, serve};

/// Requests and responses as `serve` takes them.
pub use hyper::body::Incoming;
pub use hyper::{HeaderMap, Method, Request, Response, StatusCode, header};
pub use rustls::ServerConfig as TlsConfig;
