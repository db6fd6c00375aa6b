//! Who is where, and by which key it is known: what the coordinator hands to the ranks of one generation of a gang.

use super::driver::Stop;
use super::gang::NetCollective;
use super::tcp;
use super::tls;
use crate::algorithm::Topology;
use crate::error::{CollectiveError, Result};
use rcgen::{KeyPair, PKCS_ED25519};
use rustls_pki_types::PrivatePkcs8KeyDer;
use std::fmt;
use std::io;
use std::net::{SocketAddr, TcpListener};
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

/// A port that is open before the others are told of it.
pub struct Listener {
    pub(super) socket: TcpListener,
}

impl From<TcpListener> for Listener {
    /// One that was inherited.
    fn from(socket: TcpListener) -> Listener {
        Listener { socket }
    }
}

impl Listener {
    /// `address` may have port 0.
    pub fn bind(address: SocketAddr) -> Result<Listener> {
        let socket = TcpListener::bind(address).map_err(failed("cannot listen"))?;
        Ok(Listener { socket })
    }

    pub fn address(&self) -> Result<SocketAddr> {
        self.socket.local_addr().map_err(failed("cannot listen"))
    }

    /// Connects with all other ranks over TCP, with TLS 1.3 where `encryption` says so. Fails where they have not come within `timeout`, and
    /// names one.
    pub fn tcp(self, rendezvous: &Rendezvous, key: &Key, timeout: Duration) -> Result<NetCollective> {
        let world = rendezvous.ranks.len();
        if world == 0 || world > RANKS_MAX || rendezvous.rank >= world {
            let message =
                format!("rank {} of {world}; 1 to {RANKS_MAX} ranks can be connected", rendezvous.rank);
            return Err(CollectiveError::Refused { operation: "connect", message });
        }
        let stop = Stop::default();
        let (links, waker) = tcp::connect(self, rendezvous, key, timeout)?;
        Ok(NetCollective::new(Box::new(links), waker, rendezvous, stop))
    }
}

pub(super) fn failed(what: &'static str) -> impl Fn(io::Error) -> CollectiveError {
    move |source| CollectiveError::Network { what, source: Arc::new(source) }
}
