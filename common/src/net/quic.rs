//! Listening, connecting and deciding who is there. Handshakes have deadlines, and a refusal's reason reaches the one refused.

use super::NetError;
use super::identity::Identity;
use super::peer::{COORDINATOR_DNS, Peer};
use super::tls;
use crate::protocol::Role;
use quinn::crypto::rustls::{HandshakeData, QuicClientConfig, QuicServerConfig};
use quinn::{
    Connection, ConnectionError, Endpoint, EndpointConfig, IdleTimeout, Incoming, TokioRuntime,
    TransportConfig, VarInt,
};
use rustls_pki_types::CertificateDer;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinSet;
use tokio::time::timeout;

/// A dead peer is noticed after this long.
const IDLE_TIMEOUT_MS: u32 = 2_000;
/// Four chances within the idle timeout.
const KEEP_ALIVE: Duration = Duration::from_millis(500);
/// A dead UDP port gives no error: this long and no answer counts as unreachable.
const CONNECT_DEADLINE: Duration = Duration::from_secs(1);
/// For one peer's handshake as the listener sees it.
const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(5);
/// Requests that one client may have open; an agent uses one stream.
const STREAMS_MAX: u32 = 64;
/// Handshakes that may wait to be accepted: a cluster of that many machines that all come back at once.
const INCOMING_MAX: usize = 1024;
/// Bytes kept for one and for all waiting handshakes.
const INCOMING_BYTES: u64 = 16 << 10;
const INCOMING_BYTES_TOTAL: u64 = 4 << 20;
/// Unread bytes of one stream, of one connection, and unacknowledged ones.
const STREAM_WINDOW: u32 = 1 << 20;
const CONNECTION_WINDOW: u32 = 8 << 20;
const SEND_WINDOW: u64 = 8 << 20;

/// Application close code of a connection that `classify` refused; the reason is its text.
const REFUSED: VarInt = VarInt::from_u32(1);

/// TLS alerts (RFC 8446, section 6) that appear as QUIC errors `0x100 + alert`.
mod alert {
    pub const BAD_CERTIFICATE: u8 = 42;
    pub const UNSUPPORTED_CERTIFICATE: u8 = 43;
    pub const CERTIFICATE_EXPIRED: u8 = 45;
    pub const UNKNOWN_CA: u8 = 48;
    pub const DECRYPT_ERROR: u8 = 51;
    pub const NO_APPLICATION_PROTOCOL: u8 = 120;
}

/// What an accepted connection is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Accepted {
    /// Has no certificate yet; see `receive_join`.
    Join,
    /// A member, as the cluster's CA named it.
    Peer(Peer),
}

/// Listens for members and joiners. Needs a tokio runtime; port 0 takes a free one (`local_addr`).
pub fn serve(listen: SocketAddr, identity: &Identity) -> Result<Endpoint, NetError> {
    let crypto =
        QuicServerConfig::try_from(tls::server(identity)?).map_err(|e| NetError::Tls(e.to_string()))?;
    let mut config = quinn::ServerConfig::with_crypto(Arc::new(crypto));
    config
        .transport_config(Arc::new(transport(STREAMS_MAX, 0)))
        .migration(false)
        .max_incoming(INCOMING_MAX)
        .incoming_buffer_size(INCOMING_BYTES)
        .incoming_buffer_size_total(INCOMING_BYTES_TOTAL);
    let bind = |reason| NetError::Bind { addr: listen, reason };
    let socket = UdpSocket::bind(listen).map_err(bind)?;
    Endpoint::new(EndpointConfig::default(), Some(config), socket, Arc::new(TokioRuntime)).map_err(bind)
}

/// Finishes one incoming handshake, within a deadline, and says who came. Run each in a task of its own.
pub async fn accept(incoming: Incoming) -> Result<(Connection, Accepted), NetError> {
    let handshake = timeout(HANDSHAKE_DEADLINE, incoming).await;
    let connection = handshake
        .map_err(|_| NetError::Lost("the handshake took too long".into()))?
        .map_err(|error| NetError::Lost(describe(&error)))?;
    let accepted = classify(&connection).await?;
    Ok((connection, accepted))
}

/// Who came, after the handshake. Tells a member that it is welcome, and anybody else why not before closing.
pub async fn classify(conn: &Connection) -> Result<Accepted, NetError> {
    if protocol(conn).as_deref() == Some(tls::JOIN) {
        return Ok(Accepted::Join);
    }
    match peer(conn) {
        Ok(peer) => {
            let mut greeting = conn.open_uni().await.map_err(|error| NetError::Lost(describe(&error)))?;
            // The stream itself is the message; it ends at once.
            greeting.finish().map_err(|error| NetError::Lost(error.to_string()))?;
            Ok(Accepted::Peer(peer))
        }
        Err(reason) => {
            conn.close(REFUSED, reason.as_bytes());
            Err(NetError::Refused(reason))
        }
    }
}

/// Connects to the first of these coordinators (`HOST:PORT`) that answers and accepts this identity.
pub async fn connect(addrs: &[String], identity: &Identity) -> Result<Connection, NetError> {
    let crypto =
        QuicClientConfig::try_from(tls::client(identity)?).map_err(|e| NetError::Tls(e.to_string()))?;
    let mut config = quinn::ClientConfig::new(Arc::new(crypto));
    config.transport_config(Arc::new(transport(0, 1)));
    let mut attempts = JoinSet::new();
    for (position, addr) in addrs.iter().cloned().enumerate() {
        let (config, cluster_id) = (config.clone(), identity.cluster_id.clone());
        attempts.spawn(async move {
            let attempt = attempt(&addr, config, Some(&cluster_id)).await;
            (position, attempt.map_err(|failure| failure.at(&addr)))
        });
    }
    let mut failures = Vec::new();
    while let Some(done) = attempts.join_next().await {
        match done.map_err(|error| NetError::Lost(error.to_string()))? {
            (_, Ok(connection)) => return Ok(connection),
            (position, Err(failure)) => failures.push((position, failure)),
        }
    }
    failures.sort_by_key(|(position, _)| *position);
    Err(summarise(failures.into_iter().map(|(_, failure)| failure).collect()))
}

/// One line for a connection that ended: who closed it and why.
pub fn describe(error: &ConnectionError) -> String {
    match error {
        ConnectionError::TimedOut => "the other side stopped answering".into(),
        ConnectionError::LocallyClosed => "closed here".into(),
        ConnectionError::Reset => "the other side was restarted".into(),
        ConnectionError::ApplicationClosed(close) if close.reason.is_empty() => {
            "closed by the other side".into()
        }
        ConnectionError::ApplicationClosed(close) => String::from_utf8_lossy(&close.reason).into_owned(),
        ConnectionError::ConnectionClosed(close) => match alert_of(close.error_code) {
            Some(alert) => their_verdict(alert, &close.reason),
            None => format!("closed by the other side: {close}"),
        },
        ConnectionError::TransportError(error) => match alert_of(error.code) {
            Some(alert) => our_verdict(alert, &error.reason),
            None => error.to_string(),
        },
        other => other.to_string(),
    }
}

/// How one address failed.
pub(super) enum Failure {
    Silent(String),
    Refused(String),
}

impl Failure {
    pub(super) fn at(self, addr: &str) -> Failure {
        match self {
            Failure::Silent(why) => Failure::Silent(format!("{addr}: {why}")),
            Failure::Refused(why) => Failure::Refused(format!("{addr}: {why}")),
        }
    }
}

impl From<Failure> for NetError {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Silent(why) => NetError::Unreachable(why),
            Failure::Refused(why) => NetError::Refused(why),
        }
    }
}

/// Connects to one `HOST:PORT`. With a cluster id, waits until the coordinator of that cluster has said welcome.
pub(super) async fn attempt(
    addr: &str,
    config: quinn::ClientConfig,
    cluster_id: Option<&str>,
) -> Result<Connection, Failure> {
    let work = async {
        let mut last = Failure::Silent("the name has no address".into());
        let resolved = tokio::net::lookup_host(addr).await;
        for address in resolved.map_err(|error| Failure::Silent(format!("not an address ({error})")))? {
            match handshake(address, config.clone(), cluster_id).await {
                Ok(connection) => return Ok(connection),
                Err(failure) => last = failure,
            }
        }
        Err(last)
    };
    timeout(CONNECT_DEADLINE, work).await.unwrap_or_else(|_| {
        Err(Failure::Silent(format!("no answer within {} s", CONNECT_DEADLINE.as_secs())))
    })
}

async fn handshake(
    address: SocketAddr,
    config: quinn::ClientConfig,
    cluster_id: Option<&str>,
) -> Result<Connection, Failure> {
    let any =
        if address.is_ipv4() { IpAddr::V4(Ipv4Addr::UNSPECIFIED) } else { Ipv6Addr::UNSPECIFIED.into() };
    let local = Endpoint::client((any, 0).into()).map_err(|error| Failure::Silent(error.to_string()))?;
    let connecting = local.connect_with(config, address, COORDINATOR_DNS);
    let connecting = connecting.map_err(|error| Failure::Silent(error.to_string()))?;
    let connection = connecting.await.map_err(failure)?;
    if let Some(cluster_id) = cluster_id {
        let peer = peer(&connection).map_err(Failure::Refused)?;
        if peer.role != Role::Coordinator || peer.cluster_id != cluster_id {
            return Err(Failure::Refused(NOT_OUR_COORDINATOR.into()));
        }
        connection.accept_uni().await.map_err(failure)?;
    }
    Ok(connection)
}

fn failure(error: ConnectionError) -> Failure {
    let why = describe(&error);
    match error {
        ConnectionError::ApplicationClosed(_) => Failure::Refused(why),
        ConnectionError::ConnectionClosed(close) if alert_of(close.error_code).is_some() => {
            Failure::Refused(why)
        }
        ConnectionError::TransportError(error) if alert_of(error.code).is_some() => Failure::Refused(why),
        _ => Failure::Silent(why),
    }
}

/// All addresses failed: one that answered and refused tells more than those that were silent.
fn summarise(failures: Vec<Failure>) -> NetError {
    let refused = failures.iter().any(|failure| matches!(failure, Failure::Refused(_)));
    let lines: Vec<String> = failures
        .into_iter()
        .map(|failure| match failure {
            Failure::Silent(why) | Failure::Refused(why) => why,
        })
        .collect();
    let text = if lines.is_empty() { "no address was given".to_owned() } else { lines.join("; ") };
    if refused { NetError::Refused(text) } else { NetError::Unreachable(text) }
}

/// The member at the other end, from the certificate that TLS has verified.
fn peer(conn: &Connection) -> Result<Peer, String> {
    let chain = conn.peer_identity().and_then(|any| any.downcast::<Vec<CertificateDer<'static>>>().ok());
    let certificate = chain.as_deref().and_then(|chain| chain.first());
    let certificate =
        certificate.ok_or("a certificate of this cluster is needed; join it with a token first")?;
    Peer::from_certificate(certificate)
}

fn protocol(conn: &Connection) -> Option<Vec<u8>> {
    conn.handshake_data()?.downcast::<HandshakeData>().ok()?.protocol
}

fn transport(bidi: u32, uni: u32) -> TransportConfig {
    let mut config = TransportConfig::default();
    config
        .max_idle_timeout(Some(IdleTimeout::from(VarInt::from_u32(IDLE_TIMEOUT_MS))))
        .keep_alive_interval(Some(KEEP_ALIVE))
        .max_concurrent_bidi_streams(bidi.into())
        .max_concurrent_uni_streams(uni.into())
        .stream_receive_window(STREAM_WINDOW.into())
        .receive_window(CONNECTION_WINDOW.into())
        .send_window(SEND_WINDOW)
        .datagram_receive_buffer_size(None);
    config
}

/// Settings of a joiner's connection.
pub(super) fn join_transport() -> Arc<TransportConfig> {
    Arc::new(transport(0, 0))
}

const NOT_OUR_COORDINATOR: &str = "what answers there is no coordinator of this cluster; check the address";

fn alert_of(code: quinn::TransportErrorCode) -> Option<u8> {
    u64::from(code).checked_sub(0x100).and_then(|alert| u8::try_from(alert).ok())
}

/// The other side did not like our certificate or protocol.
fn their_verdict(alert: u8, reason: &[u8]) -> String {
    match alert {
        alert::CERTIFICATE_EXPIRED => {
            "this side's certificate is expired or not valid yet; compare the clocks or join again".into()
        }
        alert::UNKNOWN_CA | alert::DECRYPT_ERROR => {
            "this side's certificate is of another cluster; join this one with a token".into()
        }
        alert::BAD_CERTIFICATE | alert::UNSUPPORTED_CERTIFICATE => {
            "the other side does not accept this side's certificate; join again with a token".into()
        }
        alert::NO_APPLICATION_PROTOCOL => "the two sides have different versions of fleet".into(),
        alert => {
            format!("refused by the other side (TLS alert {alert}: {})", String::from_utf8_lossy(reason))
        }
    }
}

/// We did not like theirs.
fn our_verdict(alert: u8, reason: &str) -> String {
    match alert {
        alert::CERTIFICATE_EXPIRED => {
            "the other side's certificate is expired or not valid yet; compare the clocks".into()
        }
        alert::UNKNOWN_CA | alert::DECRYPT_ERROR => "the other side belongs to another cluster".into(),
        alert::BAD_CERTIFICATE | alert::UNSUPPORTED_CERTIFICATE => NOT_OUR_COORDINATOR.into(),
        alert::NO_APPLICATION_PROTOCOL => "the two sides have different versions of fleet".into(),
        alert => format!("the handshake failed (TLS alert {alert}: {reason})"),
    }
}
