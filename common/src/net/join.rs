//! Becoming a member: one `JoinRequest`, one `JoinReply`. The joiner's key never leaves it.

use super::NetError;
use super::authorities::Authorities;
use super::ca::ClusterCa;
use super::connect::attempt;
use super::identity::{Identity, store_authorities};
use super::listen::remote_chain;
use super::secret::{PrivateKey, wipe};
use super::token::JoinToken;
use super::verdict::{DONE, REFUSED, describe};
use super::{ca, limits, tls};
use crate::codec::{self, CodecError, read_frame, read_versioned, write_frame};
use crate::protocol::{
    Admission, CoordinatorAddress, JoinReply, JoinRequest, PROTOCOL_VERSION, Refusal, RefusalKind, Role,
};
use quinn::crypto::rustls::QuicClientConfig;
use quinn::{ClientConfig, Connection, ConnectionError, SendStream};
use rcgen::{CertificateParams, KeyPair, PKCS_ECDSA_P256_SHA256};
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};
use tokio::time::{sleep, timeout};

/// A joiner that has not sent its request by then is dropped: it holds a connection and has shown nothing.
const REQUEST_DEADLINE: Duration = Duration::from_secs(3);
/// For the joiner to take its reply.
const REPLY_DEADLINE: Duration = Duration::from_secs(3);
/// For a joiner to get its reply, which waits until the use of the token is committed.
const JOIN_DEADLINE: Duration = Duration::from_secs(15);
/// A request is a token, a name and a key: less than one kilobyte.
const REQUEST_MAX: usize = 16 << 10;

/// So long a cluster that cannot admit anybody at the moment, or cannot be reached, is asked again.
const PATIENCE: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(100);

/// What a joiner has become.
#[derive(Debug)]
pub struct Joined {
    pub identity: Identity,
    pub coordinators: Vec<CoordinatorAddress>,
    /// Of a coordinator: the one that issues first.
    pub cas: Vec<ClusterCa>,
}

/// A key that was just made, for which there is no certificate yet. It never leaves the process that made it.
pub struct Applicant {
    key: KeyPair,
    /// DER of the PKCS#10 request.
    pub csr_der: Vec<u8>,
}

impl Applicant {
    pub fn new() -> Result<Applicant, NetError> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(tls_error)?;
        let csr = CertificateParams::default().serialize_request(&key).map_err(tls_error)?;
        Ok(Applicant { key, csr_der: csr.der().to_vec() })
    }

    /// With the certificate that was made for it.
    pub fn certified(self, certificate_der: Vec<u8>, authorities: Authorities) -> Result<Identity, NetError> {
        let key = PrivateKey::new(self.key.serialize_der());
        Identity::from_parts(certificate_der, key, authorities).map_err(NetError::Tls)
    }
}

/// Joins the cluster of `token` through the first of these coordinators (`HOST:PORT`) that lets it in: makes a key and has it certified.
/// However often the request is sent, it is one use of the token.
pub async fn join(addrs: &[String], token: &JoinToken, name: &str) -> Result<Joined, NetError> {
    let applicant = Applicant::new()?;
    let request = JoinRequest {
        version: PROTOCOL_VERSION,
        token_id: token.id.clone(),
        token_secret: token.secret.clone(),
        csr_der: applicant.csr_der.clone(),
        name: name.to_owned(),
    };
    let begun = Instant::now();
    let mut asked = false;
    loop {
        let mut last = NetError::Unreachable("no address was given".into());
        for addr in addrs {
            match ask(addr, token, &request).await {
                Ok(admission) => return settle(addr, token, applicant, admission),
                Err(Asked::Refused(error)) => return Err(error),
                Err(Asked::Later(error)) => (asked, last) = (true, error),
                Err(Asked::Silent(error)) => last = error,
            }
        }
        // Nobody has heard the request: there is nothing to wait for.
        if !asked || begun.elapsed() > PATIENCE {
            return Err(last);
        }
        sleep(PAUSE).await;
    }
}

/// Why one coordinator did not admit.
enum Asked {
    Refused(NetError),
    /// It may have been heard, and may be admitted later.
    Later(NetError),
    Silent(NetError),
}

async fn ask(addr: &str, token: &JoinToken, request: &JoinRequest) -> Result<Admission, Asked> {
    let seen = Arc::new(OnceLock::new());
    let config = config(token, seen.clone()).map_err(Asked::Refused)?;
    let connection = attempt(None, addr, config).await.map_err(|failure| match seen.get() {
        Some(shown) => Asked::Refused(NetError::Refused(format!(
            "{addr}: the token is of another cluster (its CA is {}, the coordinator's is {}), or of before the cluster's CA was replaced; ask for a new one there",
            short(&token.ca_fingerprint),
            short(shown),
        ))),
        None => match NetError::from(failure.at(addr)) {
            error @ NetError::Unreachable(_) => Asked::Silent(error),
            error => Asked::Refused(error),
        },
    })?;
    let reply = timeout(JOIN_DEADLINE, exchange(&connection, request)).await;
    let reply = reply.map_err(|_| NetError::Lost(format!("{addr} did not answer the request to join")));
    let reply = reply.and_then(|reply| reply).map_err(Asked::Later)?;
    connection.close(DONE, b"");
    match reply {
        JoinReply::Accepted(admission) => Ok(*admission),
        JoinReply::Refused(refusal) => {
            let message = format!("{addr}: {}", refusal.message);
            Err(match refusal.kind {
                kind if kind.is_passing() => Asked::Later(NetError::Unavailable(message)),
                RefusalKind::Later => Asked::Refused(NetError::Later(message)),
                _ => Asked::Refused(NetError::Refused(message)),
            })
        }
    }
}

fn config(token: &JoinToken, seen: Arc<OnceLock<String>>) -> Result<ClientConfig, NetError> {
    joining(tls::joiner(&token.ca_fingerprint, seen)?)
}

fn joining(crypto: rustls::ClientConfig) -> Result<ClientConfig, NetError> {
    let crypto = QuicClientConfig::try_from(crypto).map_err(|error| NetError::Tls(error.to_string()))?;
    let mut config = ClientConfig::new(Arc::new(crypto));
    config.transport_config(limits::joining());
    Ok(config)
}

/// Believes an admission only as far as the token's fingerprint and role go.
fn settle(
    addr: &str,
    token: &JoinToken,
    applicant: Applicant,
    admission: Admission,
) -> Result<Joined, NetError> {
    let refused = |what: &str| NetError::Refused(format!("{addr}: the coordinator {what}"));
    let Admission { certificate_der, authorities, coordinators, cas, .. } = admission;
    if !authorities.contains(&token.ca_fingerprint) {
        return Err(refused("sent the CA of another cluster"));
    }
    let identity = applicant.certified(certificate_der, authorities)?;
    if identity.role() != token.role.in_certificate() {
        return Err(refused("gave another role than the token's"));
    }
    if token.role != Role::Coordinator {
        return Ok(Joined { identity, coordinators, cas: Vec::new() });
    }
    let cas: Result<Vec<ClusterCa>, _> =
        cas.into_iter().map(|(der, key)| ClusterCa::from_parts(der, &key)).collect();
    let cas = cas.map_err(|error| refused(&format!("sent no CA: {error}")))?;
    if cas.is_empty() || cas.iter().any(|ca| !identity.authorities.contains(&ca.fingerprint())) {
        return Err(refused("did not send the CA's key"));
    }
    Ok(Joined { identity, coordinators, cas })
}

/// Replaces a member's damaged file of CAs by what a coordinator shows, which must have the fingerprint that the file says. `dir` is where
/// `Identity::store` wrote; the next `Identity::load` sees whether all belongs together.
pub async fn mend_authorities(addrs: &[String], fingerprint: &str, dir: &Path) -> Result<(), NetError> {
    let mut last = NetError::Unreachable("no address was given".into());
    for addr in addrs {
        let crypto = tls::joiner(fingerprint, Arc::default())?;
        match attempt(None, addr, joining(crypto)?).await {
            Ok(connection) => {
                connection.close(DONE, b"");
                let shown = remote_chain(&connection);
                let ca = shown.iter().map(|der| der.to_vec()).find(|der| ca::fingerprint(der) == fingerprint);
                let ca = ca.ok_or_else(|| NetError::Refused(format!("{addr} does not show its CA")))?;
                return store_authorities(dir, &Authorities::one(ca))
                    .map_err(|error| NetError::Tls(error.to_string()));
            }
            Err(failure) => last = failure.at(addr).into(),
        }
    }
    Err(last)
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
        let request = match read_versioned::<_, JoinRequest>(&mut receive, REQUEST_MAX).await {
            Err(error @ CodecError::Version(_)) => Err(error.to_string()),
            request => {
                let request = request.map_err(|error| error.to_string())?;
                Ok(request.ok_or("the joiner sent nothing")?)
            }
        };
        Ok((send, request))
    };
    let read = timeout(REQUEST_DEADLINE, read).await;
    let read = read.unwrap_or_else(|_| Err("no request to join came in time".to_owned()));
    let (send, request) = read.map_err(|reason| {
        connection.close(REFUSED, reason.as_bytes());
        NetError::Lost(reason)
    })?;
    match request {
        Ok(request) => Ok(JoinExchange { request, connection: connection.clone(), send }),
        Err(reason) => {
            let refusal = Refusal { kind: RefusalKind::Invalid, message: reason.clone() };
            answer(connection, send, &JoinReply::Refused(refusal)).await?;
            Err(NetError::Refused(reason))
        }
    }
}

impl JoinExchange {
    /// Sends the reply and waits until the joiner, which has read it then, closes the connection.
    pub async fn answer(self, reply: &JoinReply) -> Result<(), NetError> {
        answer(&self.connection, self.send, reply).await
    }
}

async fn answer(connection: &Connection, mut send: SendStream, reply: &JoinReply) -> Result<(), NetError> {
    let sent = async {
        // It may hold the CA's key.
        let mut bytes = codec::frame(reply).map_err(|error| error.to_string())?;
        let written = send.write_all(&bytes).await;
        wipe(&mut bytes);
        written.map_err(|error| error.to_string())?;
        send.finish().map_err(|error| error.to_string())?;
        match connection.closed().await {
            ConnectionError::ApplicationClosed(close) if close.error_code == DONE => Ok(()),
            error => Err(describe(&error)),
        }
    };
    let sent = timeout(REPLY_DEADLINE, sent).await;
    connection.close(DONE, b"");
    match sent {
        Ok(Ok(())) => Ok(()),
        Ok(Err(why)) => Err(NetError::Lost(why)),
        Err(_) => Err(NetError::Lost("the joiner did not take its answer".into())),
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
