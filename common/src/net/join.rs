//! Becoming a member: one `JoinRequest`, one `JoinReply`. The joiner's key never leaves it.

use super::NetError;
use super::ca::fingerprint;
use super::identity::{Identity, PrivateKey};
use super::quic::{attempt, describe, join_transport};
use super::tls;
use super::token::JoinToken;
use crate::codec::{read_frame, read_frame_limited, write_frame};
use crate::protocol::{JoinReply, JoinRequest, PROTOCOL_VERSION};
use quinn::crypto::rustls::QuicClientConfig;
use quinn::{Connection, ConnectionError, SendStream, VarInt};
use rcgen::{CertificateParams, KeyPair, PKCS_ECDSA_P256_SHA256};
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio::time::timeout;

/// A joiner that has not sent its request by then is dropped: it holds a connection and has shown nothing.
const REQUEST_DEADLINE: Duration = Duration::from_secs(3);
/// For the joiner to take its reply.
const REPLY_DEADLINE: Duration = Duration::from_secs(3);
/// For a joiner to get its reply, which waits until the use of the token is committed.
const JOIN_DEADLINE: Duration = Duration::from_secs(15);
/// A request is a token, a name and a key: less than one kilobyte.
const REQUEST_MAX: usize = 16 << 10;

const DONE: VarInt = VarInt::from_u32(0);
const REFUSED: VarInt = VarInt::from_u32(1);

/// Joins the cluster of `token` through the coordinator at `addr` (`HOST:PORT`): makes a key and has it certified.
pub async fn join(addr: &str, token: &JoinToken, name: &str) -> Result<Identity, NetError> {
    let seen = Arc::new(OnceLock::new());
    let crypto = tls::joiner(&token.ca_fingerprint, seen.clone())?;
    let crypto = QuicClientConfig::try_from(crypto).map_err(|error| NetError::Tls(error.to_string()))?;
    let mut config = quinn::ClientConfig::new(Arc::new(crypto));
    config.transport_config(join_transport());
    let connection = attempt(addr, config, None).await.map_err(|failure| match seen.get() {
        Some(shown) => NetError::Refused(format!(
            "{addr}: the token is of another cluster (its CA is {}, the coordinator's is {}); ask for a token there",
            short(&token.ca_fingerprint),
            short(shown),
        )),
        None => failure.at(addr).into(),
    })?;
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(tls_error)?;
    let csr = CertificateParams::default().serialize_request(&key).map_err(tls_error)?;
    let request = JoinRequest {
        version: PROTOCOL_VERSION,
        token_id: token.id.clone(),
        token_secret: token.secret.clone(),
        csr_der: csr.der().to_vec(),
        name: name.to_owned(),
    };
    let reply = timeout(JOIN_DEADLINE, exchange(&connection, &request)).await;
    let reply = reply.map_err(|_| NetError::Lost(format!("{addr} did not answer the request to join")))??;
    connection.close(DONE, b"");
    let (certificate_der, ca_der) = match reply {
        JoinReply::Refused(reason) => return Err(NetError::Refused(format!("{addr}: {reason}"))),
        JoinReply::Accepted { certificate_der, ca_der, .. } => (certificate_der, ca_der),
    };
    if fingerprint(&ca_der) != token.ca_fingerprint {
        return Err(NetError::Refused(format!("{addr}: the coordinator sent the CA of another cluster")));
    }
    let identity = Identity::from_parts(certificate_der, PrivateKey::new(key.serialize_der()), ca_der);
    let identity = identity.map_err(NetError::Tls)?;
    if identity.role != token.role {
        return Err(NetError::Refused(format!("{addr}: the coordinator gave another role than the token's")));
    }
    Ok(identity)
}

/// A joiner that waits for its answer.
#[derive(Debug)]
pub struct JoinExchange {
    pub request: JoinRequest,
    connection: Connection,
    send: SendStream,
}

/// Reads the request of an accepted joiner (`Accepted::Join`); one that is silent, large or of another version is dropped.
pub async fn receive_join(connection: &Connection) -> Result<JoinExchange, NetError> {
    let read = async {
        let (send, mut receive) = connection.accept_bi().await.map_err(|error| describe(&error))?;
        let request: Option<JoinRequest> =
            read_frame_limited(&mut receive, REQUEST_MAX).await.map_err(|error| error.to_string())?;
        Ok((send, request.ok_or("the joiner sent nothing")?))
    };
    let read = timeout(REQUEST_DEADLINE, read).await;
    let read = read.unwrap_or_else(|_| Err("no request to join came in time".to_owned()));
    let (send, request) = read.map_err(|reason| {
        connection.close(REFUSED, reason.as_bytes());
        NetError::Lost(reason)
    })?;
    let exchange = JoinExchange { request, connection: connection.clone(), send };
    if exchange.request.version == PROTOCOL_VERSION {
        return Ok(exchange);
    }
    let reason = format!(
        "this cluster speaks version {PROTOCOL_VERSION} of the protocol, the joiner {}; install the same version of fleet",
        exchange.request.version
    );
    exchange.answer(&JoinReply::Refused(reason.clone())).await?;
    Err(NetError::Refused(reason))
}

impl JoinExchange {
    /// Sends the reply and waits until the joiner, which has read it then, closes the connection.
    pub async fn answer(mut self, reply: &JoinReply) -> Result<(), NetError> {
        let sent = async {
            write_frame(&mut self.send, reply).await.map_err(|error| error.to_string())?;
            self.send.finish().map_err(|error| error.to_string())?;
            match self.connection.closed().await {
                ConnectionError::ApplicationClosed(close) if close.error_code == DONE => Ok(()),
                error => Err(describe(&error)),
            }
        };
        let sent = timeout(REPLY_DEADLINE, sent).await;
        self.connection.close(DONE, b"");
        match sent {
            Ok(Ok(())) => Ok(()),
            Ok(Err(why)) => Err(NetError::Lost(why)),
            Err(_) => Err(NetError::Lost("the joiner did not take its answer".into())),
        }
    }
}

async fn exchange(connection: &Connection, request: &JoinRequest) -> Result<JoinReply, NetError> {
    let lost = |error: &dyn std::fmt::Display| {
        let closed = connection.close_reason().map(|reason| describe(&reason));
        NetError::Lost(closed.unwrap_or_else(|| error.to_string()))
    };
    let (mut send, mut receive) = connection.open_bi().await.map_err(|error| lost(&error))?;
    write_frame(&mut send, request).await.map_err(|error| lost(&error))?;
    send.finish().map_err(|error| lost(&error))?;
    let reply = read_frame(&mut receive).await.map_err(|error| lost(&error))?;
    reply.ok_or_else(|| lost(&"the coordinator closed the stream without an answer"))
}

fn short(fingerprint: &str) -> &str {
    fingerprint.get(..12).unwrap_or("not shown")
}

fn tls_error(error: rcgen::Error) -> NetError {
    NetError::Tls(error.to_string())
}
