//! How fleet's processes find and trust each other: QUIC with mutual TLS 1.3, a CA per cluster, and tokens for joining it.
//!
//! The CA decides who somebody is: cluster, role, node and name stand in the certificate. Whether he is still, or ever was, one of the
//! cluster is decided by who accepts him (`accept`), from the hash of his key. This never stores a secret in a log, never
//! resumes a session (an expired certificate would come back) and never sends data before the handshake is done.

mod agents;
mod authorities;
mod ca;
mod connect;
mod identity;
mod join;
mod limits;
mod listen;
mod peer;
mod secret;
mod tls;
mod token;
mod verdict;
mod web;

pub use agents::{accept_agent, connect_agent, renew_agents, serve_agents};
pub use authorities::Authorities;
pub use ca::{CERTIFICATE_LIFE, CaError, ClusterCa, fingerprint, requested_key};
pub use connect::{Reached, connect, connect_from, reach};
pub use identity::{Identity, IdentityError, store_authorities};
pub use join::{Applicant, JoinExchange, Joined, join, mend_authorities, receive_join};
pub use limits::widen;
pub use listen::{Accepted, Turned, accept, remote, remote_certificate, renew, serve};
pub use peer::{KeyHash, NAME_MAX, Peer, key_hash};
pub use secret::PrivateKey;
pub use token::{JoinToken, TOKEN_ENV, TokenError, secret_matches};
pub use verdict::{BUSY, DONE, REFUSED, REVOKED, describe};
pub use web::{LOGIN_MAX, Login, LoginError, Seal, Shown};

use crate::exit;
use std::net::SocketAddr;

/// A coordinator has two sockets, so that a flood on one does not reach the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Socket {
    /// For clients and those who join.
    Clients = 1,
    /// For agents and the other coordinators.
    Members = 2,
}

impl TryFrom<u8> for Socket {
    type Error = u8;

    fn try_from(byte: u8) -> Result<Socket, u8> {
        [Socket::Clients, Socket::Members].into_iter().find(|socket| *socket as u8 == byte).ok_or(byte)
    }
}

/// Who connects, which decides how a connection is kept.
#[derive(Clone, Copy, Debug)]
enum Link {
    Client,
    Agent,
    Coordinator,
}

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
    /// Who answers is of another cluster than this side: one of them was made anew, or the address is wrong.
    #[error("{0}")]
    OtherCluster(String),
    /// This side was cut off from the cluster; no other coordinator will take it either.
    #[error("{0}")]
    Revoked(String),
    /// The other side cannot do it at the moment.
    #[error("{0}")]
    Unavailable(String),
    /// The cluster refuses it for now: it is at one of its limits.
    #[error("{0}")]
    Later(String),
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
            NetError::Unreachable(_) | NetError::Unavailable(_) | NetError::Lost(_) => exit::UNREACHABLE,
            NetError::Later(_) => exit::LATER,
            NetError::Refused(_) | NetError::OtherCluster(_) | NetError::Revoked(_) | NetError::Tls(_) => {
                exit::REFUSED_INPUT
            }
        }
    }
}

impl From<rustls::Error> for NetError {
    fn from(error: rustls::Error) -> Self {
        NetError::Tls(error.to_string())
    }
}
