//! How fleet's processes find and trust each other: QUIC with mutual TLS 1.3, a CA per cluster, and tokens for joining it.
//!
//! The CA decides who somebody is: cluster, role, node and name stand in the certificate. It never stores a secret in a log, never
//! resumes a session (an expired certificate would come back) and never sends data before the handshake is done.

mod ca;
mod identity;
mod join;
mod peer;
mod quic;
mod tls;
mod token;

pub use ca::{CaError, ClusterCa};
pub use identity::{Identity, IdentityError, PrivateKey};
pub use join::{JoinExchange, join, receive_join};
pub use peer::{NAME_MAX, Peer};
pub use quic::{Accepted, accept, classify, connect, describe, serve};
pub use token::{JoinToken, TOKEN_ENV, TokenError, secret_matches};

use crate::exit;
use std::net::SocketAddr;

/// Why a connection could not be made or kept. Each is one line with the cure.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    #[error("cannot listen on {addr}: {reason}; stop what uses that port or choose another")]
    Bind { addr: SocketAddr, reason: std::io::Error },
    /// Nothing answered.
    #[error("cannot reach the coordinator ({0}); is it running?")]
    Unreachable(String),
    /// The other side, or this one on seeing it, said no.
    #[error("{0}")]
    Refused(String),
    #[error("the connection failed: {0}")]
    Lost(String),
    #[error("this identity cannot be used for TLS: {0}; remove it and join again")]
    Tls(String),
}

impl NetError {
    /// The exit code of a program that ends because of this.
    pub fn exit_code(&self) -> u8 {
        match self {
            NetError::Bind { .. } => exit::ENVIRONMENT,
            NetError::Unreachable(_) | NetError::Lost(_) => exit::UNREACHABLE,
            NetError::Refused(_) | NetError::Tls(_) => exit::REFUSED_INPUT,
        }
    }
}

impl From<rustls::Error> for NetError {
    fn from(error: rustls::Error) -> Self {
        NetError::Tls(error.to_string())
    }
}
