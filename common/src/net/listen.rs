//! Listening and deciding who is there. Handshakes have a deadline, and a refusal's reason reaches the one refused.

use super::identity::Identity;
use super::peer::{KeyHash, Peer, key_hash};
use super::verdict::{BUSY, REFUSED, REVOKED, describe};
use super::{NetError, Socket, limits, tls};
use nix::sys::socket::{setsockopt, sockopt};
use quinn::crypto::rustls::{HandshakeData, QuicServerConfig};
use quinn::crypto::{CryptoError, HmacKey};
use quinn::{
    Connection, ConnectionId, ConnectionIdGenerator, Endpoint, EndpointConfig, Incoming, ServerConfig,
    TokioRuntime,
};
use rand::RngCore;
use rustls_pki_types::CertificateDer;
use sha2::{Digest, Sha256};
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use tokio::time::timeout;

/// What an accepted connection is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Accepted {
    /// Has no certificate yet; see `receive_join`.
    Join,
    /// A member, as the cluster's CA named it.
    Peer(Peer),
}

/// Why somebody with a certificate is not let in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Turned {
    Away(String),
    /// It may come back.
    Later(String),
    /// It was cut off from the cluster.
    Forever(String),
}

/// Listens on one of a coordinator's sockets. Needs a tokio runtime, which from then on moves its packets; port 0 takes a free one.
pub fn serve(listen: SocketAddr, socket: Socket, identity: &Identity) -> Result<Endpoint, NetError> {
    let config = config(socket, identity)?;
    let bind = |reason| NetError::Bind { addr: listen, reason };
    let udp = UdpSocket::bind(listen).map_err(bind)?;
    // The system's own size is enough for all but the largest clusters.
    let _ = setsockopt(&udp, sockopt::RcvBuf, &limits::SOCKET_BUFFER);
    let _ = setsockopt(&udp, sockopt::SndBuf, &limits::SOCKET_BUFFER);
    Endpoint::new(endpoint_config(identity), Some(config), udp, Arc::new(TokioRuntime)).map_err(bind)
}

/// Shows a renewed certificate to whoever connects from now on.
pub fn renew(endpoint: &Endpoint, socket: Socket, identity: &Identity) -> Result<(), NetError> {
    endpoint.set_server_config(Some(config(socket, identity)?));
    Ok(())
}

fn config(socket: Socket, identity: &Identity) -> Result<ServerConfig, NetError> {
    let crypto =
        QuicServerConfig::try_from(tls::server(identity)?).map_err(|e| NetError::Tls(e.to_string()))?;
    let mut config = ServerConfig::with_crypto(Arc::new(crypto));
    config
        .transport_config(match socket {
            Socket::Clients => limits::clients(),
            Socket::Members => limits::members(),
        })
        .migration(false)
        .max_incoming(limits::INCOMING_MAX)
        .incoming_buffer_size(limits::INCOMING_BYTES)
        .incoming_buffer_size_total(limits::INCOMING_BYTES_TOTAL);
    Ok(config)
}

/// A coordinator that was restarted on its address tells those who still send to its former life that it is over: the tokens that say
/// so follow from its key, which stays.
fn endpoint_config(identity: &Identity) -> EndpointConfig {
    let secret = identity.key_pkcs8_der.secret_der();
    let key = Sha256::new().chain_update("fleet reset").chain_update(secret).finalize();
    let mut config = EndpointConfig::new(Arc::new(ResetKey(key.into())));
    config.cid_generator(|| Box::new(RandomIds)).min_reset_interval(limits::RESET_INTERVAL);
    config
}

/// Of the length that quinn gives its own, but none is refused as not ours: it may be of the former life.
struct RandomIds;

impl ConnectionIdGenerator for RandomIds {
    fn generate_cid(&mut self) -> ConnectionId {
        let mut id = [0; ID_BYTES];
        rand::rng().fill_bytes(&mut id);
        ConnectionId::new(&id)
    }

    fn cid_len(&self) -> usize {
        ID_BYTES
    }

    fn cid_lifetime(&self) -> Option<std::time::Duration> {
        None
    }
}

const ID_BYTES: usize = 8;

struct ResetKey([u8; 32]);

impl HmacKey for ResetKey {
    fn sign(&self, data: &[u8], out: &mut [u8]) {
        let inner = Sha256::new().chain_update(self.0).chain_update(data).finalize();
        out.copy_from_slice(&Sha256::new().chain_update(self.0).chain_update(inner).finalize());
    }

    fn signature_len(&self) -> usize {
        32
    }

    fn verify(&self, data: &[u8], signature: &[u8]) -> Result<(), CryptoError> {
        let mut own = [0; 32];
        self.sign(data, &mut own);
        if own == signature { Ok(()) } else { Err(CryptoError) }
    }
}

/// Finishes one incoming handshake, within a deadline, and says who came. Run each in a task of its own. `admit` says whether the holder of
/// this certificate, whose key has this hash, is one of the cluster. Who is let in is told `mark`, of the CAs to be trusted.
pub async fn accept<F: Future<Output = Result<(), Turned>>>(
    incoming: Incoming,
    socket: Socket,
    mark: [u8; 32],
    admit: impl FnOnce(Peer, KeyHash) -> F,
) -> Result<(Connection, Accepted), NetError> {
    let handshake = timeout(limits::HANDSHAKE_DEADLINE, incoming).await;
    let connection = handshake
        .map_err(|_| NetError::Lost("the handshake took too long".into()))?
        .map_err(|error| NetError::Lost(describe(&error)))?;
    match classify(&connection, socket, admit).await {
        Ok(Accepted::Join) => Ok((connection, Accepted::Join)),
        Ok(accepted) => {
            let lost = |error: &dyn std::fmt::Display| NetError::Lost(error.to_string());
            // One byte says which socket this is, and that the certificate was accepted. The mark says whether it will be later.
            let mut welcome =
                connection.open_uni().await.map_err(|error| NetError::Lost(describe(&error)))?;
            let said = [&[socket as u8][..], &mark].concat();
            welcome.write_all(&said).await.map_err(|error| lost(&error))?;
            welcome.finish().map_err(|error| lost(&error))?;
            Ok((connection, accepted))
        }
        Err(turned) => {
            let (code, error, message): (_, fn(String) -> NetError, _) = match turned {
                Turned::Away(message) => (REFUSED, NetError::Refused, message),
                Turned::Later(message) => (BUSY, NetError::Later, message),
                Turned::Forever(message) => (REVOKED, NetError::Revoked, message),
            };
            connection.close(code, message.as_bytes());
            Err(error(message))
        }
    }
}

async fn classify<F: Future<Output = Result<(), Turned>>>(
    connection: &Connection,
    socket: Socket,
    admit: impl FnOnce(Peer, KeyHash) -> F,
) -> Result<Accepted, Turned> {
    if protocol(connection).as_deref() == Some(tls::JOIN) {
        return match socket {
            Socket::Clients => Ok(Accepted::Join),
            Socket::Members => {
                Err(Turned::Away("this address is for members; join at the one for clients".into()))
            }
        };
    }
    let certificate = remote_certificate(connection).map_err(Turned::Away)?;
    let peer = Peer::from_certificate(&certificate).map_err(Turned::Away)?;
    admit(peer.clone(), key_hash(&certificate).map_err(Turned::Away)?).await?;
    Ok(Accepted::Peer(peer))
}

/// The member at the other end, from the certificate that TLS has verified.
pub fn remote(connection: &Connection) -> Result<Peer, String> {
    Peer::from_certificate(&remote_certificate(connection)?)
}

/// The certificate of the other end, which TLS has verified.
pub fn remote_certificate(connection: &Connection) -> Result<CertificateDer<'static>, String> {
    let certificate = remote_chain(connection).into_iter().next();
    certificate.ok_or_else(|| "a certificate of this cluster is needed; join it with a token first".into())
}

/// All that it showed.
pub(super) fn remote_chain(connection: &Connection) -> Vec<CertificateDer<'static>> {
    let chain =
        connection.peer_identity().and_then(|any| any.downcast::<Vec<CertificateDer<'static>>>().ok());
    chain.map(|chain| *chain).unwrap_or_default()
}

fn protocol(connection: &Connection) -> Option<Vec<u8>> {
    connection.handshake_data()?.downcast::<HandshakeData>().ok()?.protocol
}
