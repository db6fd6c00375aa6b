//! Who is where, and by which key it is known: what the coordinator hands to the ranks of one generation of a gang.

use super::driver::Stop;
use super::gang::NetCollective;
use super::links::{Links, Wake};
use super::{quic, tcp, tls};
use crate::algorithm::Topology;
use crate::error::{CollectiveError, Result};
use rcgen::{KeyPair, PKCS_ED25519};
use rustix::net::SocketType;
use rustls_pki_types::PrivatePkcs8KeyDer;
use std::fmt;
use std::io;
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

/// Ranks that are connected with each other. Each has a connection to every other one.
pub const RANKS_MAX: usize = 1024;

/// A rank's ed25519 key pair, made anew for each generation. The agent makes it and hands it to the rank; it never leaves their host.
pub struct Key {
    pub(super) private: PrivatePkcs8KeyDer<'static>,
    public: PublicKey,
}

/// By which the others know a rank: a SubjectPublicKeyInfo in DER.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct PublicKey(pub Vec<u8>);

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let tail = &self.0[self.0.len().saturating_sub(4)..];
        write!(f, "PublicKey(..{tail:02x?})")
    }
}

impl Key {
    pub fn generate() -> Result<Key> {
        let failed = |source: String| CollectiveError::Network {
            what: "cannot make a key",
            source: Arc::new(io::Error::other(source)),
        };
        let pair = KeyPair::generate_for(&PKCS_ED25519).map_err(|error| failed(error.to_string()))?;
        Key::from_pkcs8(pair.serialize_der())
    }

    /// What `secret_der` gave.
    pub fn from_pkcs8(der: Vec<u8>) -> Result<Key> {
        let private = PrivatePkcs8KeyDer::from(der);
        let public = tls::public_key(&private).map_err(|error| CollectiveError::Network {
            what: "cannot use a key",
            source: Arc::new(io::Error::other(error.to_string())),
        })?;
        Ok(Key { private, public: PublicKey(public) })
    }

    /// PKCS#8 in DER, for the process that is to be known by it.
    pub fn secret_der(&self) -> &[u8] {
        self.private.secret_pkcs8_der()
    }

    pub fn public(&self) -> &PublicKey {
        &self.public
    }
}

/// Where one rank listens.
#[derive(Clone, Debug)]
pub struct RankAddress {
    /// Ranks with the same number are on one host.
    pub host: usize,
    pub address: SocketAddr,
    pub key: PublicKey,
}

/// What one rank is told. The same for all ranks of a generation but for `rank`.
#[derive(Clone, Debug)]
pub struct Rendezvous {
    pub generation: u64,
    pub rank: usize,
    /// In rank order.
    pub ranks: Vec<RankAddress>,
    /// Without it what ranks exchange can be read and changed by whoever is on the way; strangers are refused all the same.
    pub encryption: bool,
}

impl Rendezvous {
    pub fn topology(&self) -> Topology {
        Topology::new(&self.ranks.iter().map(|rank| rank.host).collect::<Vec<_>>())
    }
}

/// A port that is open before the others are told of it. Its kind says what connects the ranks: a TCP port TCP, a UDP port QUIC.
pub struct Listener(Socket);

enum Socket {
    Tcp(TcpListener),
    Quic(UdpSocket),
}

impl From<TcpListener> for Listener {
    fn from(socket: TcpListener) -> Listener {
        Listener(Socket::Tcp(socket))
    }
}

impl From<UdpSocket> for Listener {
    fn from(socket: UdpSocket) -> Listener {
        Listener(Socket::Quic(socket))
    }
}

impl TryFrom<OwnedFd> for Listener {
    type Error = CollectiveError;

    /// A socket that was inherited, of whichever kind.
    fn try_from(socket: OwnedFd) -> Result<Listener> {
        let kind = rustix::net::sockopt::socket_type(&socket);
        match kind.map_err(|error| failed("cannot use the inherited socket")(error.into()))? {
            SocketType::DGRAM => Ok(UdpSocket::from(socket).into()),
            _ => Ok(TcpListener::from(socket).into()),
        }
    }
}

impl Listener {
    /// For TCP. `address` may have port 0.
    pub fn tcp(address: SocketAddr) -> Result<Listener> {
        TcpListener::bind(address).map(Listener::from).map_err(failed("cannot listen"))
    }

    /// For QUIC. `address` may have port 0.
    pub fn quic(address: SocketAddr) -> Result<Listener> {
        UdpSocket::bind(address).map(Listener::from).map_err(failed("cannot listen"))
    }

    pub fn address(&self) -> Result<SocketAddr> {
        let address = match &self.0 {
            Socket::Tcp(socket) => socket.local_addr(),
            Socket::Quic(socket) => socket.local_addr(),
        };
        address.map_err(failed("cannot listen"))
    }

    /// Connects with all other ranks: over TCP, with TLS 1.3 where `encryption` says so, or over QUIC, which always encrypts. Fails where
    /// they have not come within `timeout`, and names one. Not to be called by a task of an async runtime.
    pub fn connect(self, rendezvous: &Rendezvous, key: &Key, timeout: Duration) -> Result<NetCollective> {
        let refused = |message| CollectiveError::Refused { operation: "connect", message };
        let (rank, world) = (rendezvous.rank, rendezvous.ranks.len());
        if world == 0 || world > RANKS_MAX || rank >= world {
            return Err(refused(format!("rank {rank} of {world}; 1 to {RANKS_MAX} ranks can be connected")));
        }
        let (links, waker): (Box<dyn Links>, Arc<dyn Wake>) = match self.0 {
            Socket::Tcp(socket) => {
                let (links, waker) = tcp::connect(&socket, rendezvous, key, timeout)?;
                (Box::new(links), waker)
            }
            Socket::Quic(_) if !rendezvous.encryption => {
                let message = "QUIC always encrypts; without encryption ranks are connected by TCP";
                return Err(refused(message.to_owned()));
            }
            Socket::Quic(socket) => {
                let (links, waker) = quic::connect(socket, rendezvous, key, timeout)?;
                (Box::new(links), waker)
            }
        };
        Ok(NetCollective::new(links, waker, rendezvous, Stop::default()))
    }
}

pub(super) fn failed(what: &'static str) -> impl Fn(io::Error) -> CollectiveError {
    move |source| CollectiveError::Network { what, source: Arc::new(source) }
}
