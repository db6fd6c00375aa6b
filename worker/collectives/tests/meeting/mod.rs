//! How the ranks of a test find each other.

#![allow(clippy::unwrap_used, dead_code)] // shared by several tests, each of which uses a part

use fleet_collectives::CollectiveError;
use fleet_collectives::net::{Key, Listener, NetCollective, RankAddress, Rendezvous};
use std::net::Ipv4Addr;
use std::time::Duration;

pub const GENERATION: u64 = 7;
/// To come together; under load it takes a while.
pub const TIMEOUT: Duration = Duration::from_secs(60);

/// What carries the bytes between ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wire {
    Tls,
    Plain,
    Quic,
}

pub const WIRES: [Wire; 3] = [Wire::Tls, Wire::Plain, Wire::Quic];

impl Wire {
    pub fn listen(self) -> Listener {
        let anywhere = (Ipv4Addr::LOCALHOST, 0).into();
        match self {
            Wire::Quic => Listener::quic(anywhere).unwrap(),
            Wire::Tls | Wire::Plain => Listener::tcp(anywhere).unwrap(),
        }
    }

    pub fn encrypts(self) -> bool {
        self != Wire::Plain
    }
}

/// One rank before it connects.
pub struct Before {
    pub listener: Listener,
    pub key: Key,
    pub told: Rendezvous,
}

/// Ranks on hosts with these numbers, each with a port and a key of its own.
pub fn ranks(hosts: &[usize], wire: Wire) -> Vec<Before> {
    let listeners: Vec<Listener> = hosts.iter().map(|_| wire.listen()).collect();
    let keys: Vec<Key> = hosts.iter().map(|_| Key::generate().unwrap()).collect();
    let ranks: Vec<RankAddress> = (listeners.iter().zip(&keys).zip(hosts))
        .map(|((listener, key), host)| RankAddress {
            host: *host,
            address: listener.address().unwrap(),
            key: key.public().clone(),
        })
        .collect();
    listeners
        .into_iter()
        .zip(keys)
        .enumerate()
        .map(|(rank, (listener, key))| {
            let told = Rendezvous {
                generation: GENERATION,
                rank,
                ranks: ranks.clone(),
                encryption: wire.encrypts(),
            };
            Before { listener, key, told }
        })
        .collect()
}

impl Before {
    pub fn connect(self, timeout: Duration) -> Result<NetCollective, CollectiveError> {
        self.listener.connect(&self.told, &self.key, timeout)
    }
}

/// A thread for each.
pub fn each<T: Send>(ranks: Vec<Before>, body: impl Fn(Before) -> T + Sync) -> Vec<T> {
    std::thread::scope(|scope| {
        let threads: Vec<_> = ranks.into_iter().map(|before| scope.spawn(|| body(before))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}
