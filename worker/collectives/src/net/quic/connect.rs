//! How ranks meet over QUIC: all calls and all handshakes are tasks of the runtime, of one endpoint that calls and is called.

use super::link::Link;
use super::{CLOSING, QuicLinks, SOCKET_BUFFER, Wake, transport};
use crate::error::Result;
use crate::net::meeting::{
    Arrival, CallFailed, HANDSHAKE, HANDSHAKES_MAX, HELLO, Hello, Meeting, PAUSE, caller,
};
use crate::net::rendezvous::{Key, Rendezvous, failed};
use crate::net::tls;
use quinn::crypto::rustls::{HandshakeData, QuicClientConfig, QuicServerConfig};
use quinn::{ClientConfig, Connecting, Connection, ConnectionError, Endpoint, Incoming, ServerConfig};
use quinn::{EndpointConfig, RecvStream, SendStream, TokioRuntime, TransportErrorCode, VarInt};
use rustix::net::sockopt::{set_socket_recv_buffer_size, set_socket_send_buffer_size};
use rustls_pki_types::CertificateDer;
use std::io;
use std::net::UdpSocket;
use std::sync::Arc;
use std::time::Duration;
use tokio::runtime::Builder;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until, timeout, timeout_at};

pub fn connect(
    socket: UdpSocket,
    rendezvous: &Rendezvous,
    key: &Key,
    patience: Duration,
) -> Result<(QuicLinks, Arc<dyn Wake>)> {
    let unusable = |error: rustls::Error| failed("cannot use the key")(io::Error::other(error));
    let transport = Arc::new(transport());
    let accepting = tls::accepting(rendezvous, key).map_err(unusable)?;
    let accepting = QuicServerConfig::try_from(accepting).expect("the provider has AES-128-GCM");
    let mut accepting = ServerConfig::with_crypto(Arc::new(accepting));
    accepting.transport_config(transport.clone());
    let calling = (0..rendezvous.rank).map(|rank| {
        let config = tls::connecting(rendezvous, rank, key).map_err(unusable)?;
        let config = QuicClientConfig::try_from(config).expect("the provider has AES-128-GCM");
        let mut config = ClientConfig::new(Arc::new(config));
        config.transport_config(transport.clone());
        Ok(config)
    });
    let calling = calling.collect::<Result<Vec<ClientConfig>>>()?;
    let runtime = Builder::new_multi_thread()
        .worker_threads(1)
        .thread_name("fleet-quic")
        .enable_all()
        .build()
        .map_err(failed("cannot start a thread"))?;
    // What the system does not give is not needed.
    let _ = set_socket_recv_buffer_size(&socket, SOCKET_BUFFER);
    let _ = set_socket_send_buffer_size(&socket, SOCKET_BUFFER);
    let endpoint = runtime.block_on(async {
        Endpoint::new(EndpointConfig::default(), Some(accepting), socket, Arc::new(TokioRuntime))
    });
    let endpoint = endpoint.map_err(failed("cannot use a socket"))?;
    let met = runtime.block_on(async {
        let until = Instant::now() + patience;
        let met = meet(&endpoint, Arc::new(rendezvous.clone()), calling, until).await;
        if met.is_err() {
            close(&endpoint).await;
        }
        met
    });
    let links = QuicLinks::new(met?, endpoint, runtime);
    let waker = links.signal.clone();
    Ok((links, waker))
}

/// Ends all connections, and waits a little until the others know.
pub async fn close(endpoint: &Endpoint) {
    endpoint.close(VarInt::from_u32(0), b"");
    let _ = timeout(CLOSING, endpoint.wait_idle()).await;
}

/// Takes those who call, and those who were called, until all are there.
async fn meet(
    endpoint: &Endpoint,
    rendezvous: Arc<Rendezvous>,
    calling: Vec<ClientConfig>,
    until: Instant,
) -> Result<Vec<Option<Link>>> {
    let mut meeting = Meeting::new(&rendezvous);
    let mut talks = JoinSet::new();
    for (rank, config) in calling.into_iter().enumerate() {
        let (endpoint, rendezvous) = (endpoint.clone(), rendezvous.clone());
        talks.spawn(async move {
            match call(&endpoint, &rendezvous, rank, config, until).await {
                Ok(link) => Arrival::Joined(rank, link),
                Err(why) => Arrival::Wrong(why.of(rank, rendezvous.ranks[rank].address)),
            }
        });
    }
    let talks_max = rendezvous.rank + HANDSHAKES_MAX;
    while !meeting.is_complete() {
        tokio::select! {
            Some(arrival) = talks.join_next() => {
                meeting.take(arrival.map_err(|error| failed("a handshake")(error.into()))?)?;
            }
            Some(incoming) = endpoint.accept(), if talks.len() < talks_max => {
                let rendezvous = rendezvous.clone();
                talks.spawn(async move { greet(incoming, &rendezvous).await });
            }
            () = sleep_until(until) => return Err(meeting.late()),
        }
    }
    Ok(meeting.links())
}

/// A stranger that says nothing keeps nobody waiting.
async fn greet(incoming: Incoming, rendezvous: &Rendezvous) -> Arrival<Link> {
    let from = incoming.remote_address();
    let mut claims = None;
    let arrival = match timeout(HANDSHAKE, accept(incoming, rendezvous, &mut claims)).await {
        Ok(arrival) => arrival,
        Err(_) => Err(io::ErrorKind::TimedOut.into()),
    };
    arrival.unwrap_or_else(|why| Arrival::refused(from, claims.as_deref(), &why))
}

async fn accept(
    incoming: Incoming,
    rendezvous: &Rendezvous,
    claims: &mut Option<String>,
) -> io::Result<Arrival<Link>> {
    let mut connecting: Connecting = incoming.accept()?;
    let hello = connecting.handshake_data().await?.downcast::<HandshakeData>();
    *claims = hello.ok().and_then(|hello| hello.server_name);
    let connection = connecting.await?;
    let shown = connection.peer_identity().and_then(|keys| keys.downcast::<Vec<CertificateDer<'_>>>().ok());
    let rank = caller(rendezvous, shown.as_ref().and_then(|keys| keys.first()).map(|key| key.as_ref()))?;
    let mut data = connection.accept_bi().await?;
    let mine = Hello::of(rendezvous);
    let theirs = read_hello(&mut data.1).await?;
    data.0.write_all(&mine.encode()).await?;
    if let Some(what) = theirs.difference(mine, rank) {
        // It shall read what this rank is, before the connection ends.
        let _ = data.0.finish();
        let _ = timeout(HANDSHAKE / 5, data.0.stopped()).await;
        return Ok(Arrival::wrong(rank, what));
    }
    let mut parting = connection.accept_bi().await?;
    parting.1.read_exact(&mut [0]).await.map_err(io::Error::other)?;
    Ok(Arrival::Joined(rank, Link::new(connection, data, parting)))
}

async fn read_hello(from: &mut RecvStream) -> io::Result<Hello> {
    let mut bytes = [0; HELLO];
    from.read_exact(&mut bytes).await.map_err(io::Error::other)?;
    Hello::decode(&bytes)
}

/// Calls `rank` until it answers.
async fn call(
    endpoint: &Endpoint,
    rendezvous: &Rendezvous,
    rank: usize,
    config: ClientConfig,
    until: Instant,
) -> std::result::Result<Link, CallFailed> {
    let (address, name) = (rendezvous.ranks[rank].address, tls::name(rendezvous));
    loop {
        let connecting = endpoint.connect_with(config.clone(), address, &name.to_str());
        let connecting = connecting.map_err(|error| CallFailed::BrokenOff(error.to_string()))?;
        let shaken = async {
            let connection = connecting.await?;
            let shaken = shake_hands(&connection, rendezvous).await;
            // The other side may have refused this rank's key after its own part of the handshake.
            shaken.map_err(|error| connection.close_reason().map_or(Ended::Other(error), Ended::Connection))
        };
        match timeout_at(until, shaken).await {
            Err(_) => return Err(CallFailed::Late),
            // It may not listen yet, or its host be on its way.
            Ok(Err(Ended::Connection(ConnectionError::TimedOut))) => sleep(PAUSE).await,
            Ok(Err(Ended::Connection(error))) => return Err(refused(&error)),
            Ok(Err(Ended::Other(error))) => return Err(CallFailed::BrokenOff(error.to_string())),
            Ok(Ok((theirs, link))) => {
                let differs = theirs.difference(Hello::of(rendezvous), rank);
                return differs.map_or(Ok(link), |what| Err(CallFailed::Differs(what)));
            }
        }
    }
}

/// Why a handshake came to nothing.
enum Ended {
    Connection(ConnectionError),
    Other(io::Error),
}

impl From<ConnectionError> for Ended {
    fn from(error: ConnectionError) -> Ended {
        Ended::Connection(error)
    }
}

async fn shake_hands(connection: &Connection, rendezvous: &Rendezvous) -> io::Result<(Hello, Link)> {
    let mut data: (SendStream, RecvStream) = connection.open_bi().await?;
    data.0.write_all(&Hello::of(rendezvous).encode()).await?;
    let mut parting = connection.open_bi().await?;
    // The other side learns of a stream by what comes on it.
    parting.0.write_all(&[0]).await?;
    let theirs = read_hello(&mut data.1).await?;
    Ok((theirs, Link::new(connection.clone(), data, parting)))
}

fn refused(error: &ConnectionError) -> CallFailed {
    let about_keys = |code: TransportErrorCode| (0x100..0x200).contains(&u64::from(code));
    match error {
        ConnectionError::TransportError(mine) if about_keys(mine.code) => CallFailed::OtherKey,
        ConnectionError::ConnectionClosed(theirs) if about_keys(theirs.error_code) => CallFailed::Unknown,
        _ => CallFailed::BrokenOff(error.to_string()),
    }
}
