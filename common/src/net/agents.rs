//! From one agent to another. Each knows the other by the key that the cluster has told: a certificate alone opens nothing.

use super::connect::attempt;
use super::identity::Identity;
use super::listen::{remote, remote_certificate};
use super::peer::{KeyHash, Peer, key_hash};
use super::verdict::{Failure, describe};
use super::{NetError, limits, tls};
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{ClientConfig, Connection, Endpoint, EndpointConfig, Incoming, ServerConfig, TokioRuntime};
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use tokio::time::timeout;

/// Listens for other agents. Needs a tokio runtime, which from then on moves its packets; port 0 takes a free one.
pub fn serve_agents(listen: SocketAddr, identity: &Identity) -> Result<Endpoint, NetError> {
    let bind = |reason| NetError::Bind { addr: listen, reason };
    let udp = UdpSocket::bind(listen).map_err(bind)?;
    let config = config(identity)?;
    Endpoint::new(EndpointConfig::default(), Some(config), udp, Arc::new(TokioRuntime)).map_err(bind)
}

/// Shows a renewed certificate to whoever connects from now on, and trusts whom it says.
pub fn renew_agents(endpoint: &Endpoint, identity: &Identity) -> Result<(), NetError> {
    endpoint.set_server_config(Some(config(identity)?));
    Ok(())
}

fn config(identity: &Identity) -> Result<ServerConfig, NetError> {
    let crypto = QuicServerConfig::try_from(tls::agents_server(identity)?);
    let crypto = crypto.map_err(|error| NetError::Tls(error.to_string()))?;
    let mut config = ServerConfig::with_crypto(Arc::new(crypto));
    config
        .transport_config(limits::lending())
        .migration(false)
        .max_incoming(limits::INCOMING_MAX)
        .incoming_buffer_size(limits::INCOMING_BYTES)
        .incoming_buffer_size_total(limits::INCOMING_BYTES_TOTAL);
    Ok(config)
}

/// Finishes one incoming handshake, within a deadline, and says who came and with which key. What he may do the caller knows.
pub async fn accept_agent(incoming: Incoming) -> Result<(Connection, Peer, KeyHash), NetError> {
    let handshake = timeout(limits::HANDSHAKE_DEADLINE, incoming).await;
    let connection = handshake
        .map_err(|_| NetError::Lost("the handshake took too long".into()))?
        .map_err(|error| NetError::Lost(describe(&error)))?;
    let peer = remote(&connection).map_err(NetError::Refused)?;
    let key = remote_certificate(&connection).and_then(|der| key_hash(&der)).map_err(NetError::Refused)?;
    Ok((connection, peer, key))
}

/// Calls the agent at `HOST:PORT` that has this key. The error is one line.
pub async fn connect_agent(addr: &str, identity: &Identity, key: KeyHash) -> Result<Connection, String> {
    let crypto = tls::agents_client(identity, key).map_err(|error| error.to_string())?;
    let crypto = QuicClientConfig::try_from(crypto).map_err(|error| error.to_string())?;
    let mut config = ClientConfig::new(Arc::new(crypto));
    config.transport_config(limits::fetching());
    attempt(None, addr, config).await.map_err(|failure| match failure {
        Failure::Silent(why) | Failure::Refused(why) | Failure::OtherCluster(why) | Failure::Revoked(why) => {
            format!("{addr}: {why}")
        }
    })
}
