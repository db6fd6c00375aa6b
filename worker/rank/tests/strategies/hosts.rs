//! The gangs of a test: ranks are threads of this process, on hosts that are segments.

use fleet_collectives::net::{Key, Listener, RankAddress, Rendezvous};
use fleet_collectives::{HostCollective, Segment, SharedHost, ShmCollective};
use std::net::Ipv4Addr;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;

const GENERATION: u64 = 1;
/// To come together; under load it takes a while.
const TIMEOUT: Duration = Duration::from_secs(60);

/// A rank before it meets the others.
pub struct Seat {
    segment: Arc<Segment>,
    local: usize,
    locals: usize,
    network: Option<(Listener, Key, Rendezvous)>,
}

/// For each rank the number of its host, from 0 on without a gap.
pub fn seats(hosts: &[usize]) -> Vec<Seat> {
    let size = |host: usize| hosts.iter().filter(|one| **one == host).count();
    let count = hosts.iter().max().map_or(0, |last| last + 1);
    let segments: Vec<Arc<Segment>> =
        (0..count).map(|host| Arc::new(Segment::create(size(host), GENERATION).unwrap())).collect();
    let network = |_: &usize| {
        let listener = Listener::tcp((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        (listener, Key::generate().unwrap())
    };
    let doors: Vec<(Listener, Key)> = hosts.iter().map(network).collect();
    let address = |(host, (listener, key)): (&usize, &(Listener, Key))| RankAddress {
        host: *host,
        address: listener.address().unwrap(),
        key: key.public().clone(),
    };
    let ranks: Vec<RankAddress> = hosts.iter().zip(&doors).map(address).collect();
    let seat = |(rank, (listener, key)): (usize, (Listener, Key))| {
        let host = hosts[rank];
        let told = Rendezvous { generation: GENERATION, rank, ranks: ranks.clone(), encryption: true };
        Seat {
            segment: segments[host].clone(),
            local: hosts[..rank].iter().filter(|one| **one == host).count(),
            locals: size(host),
            network: (count > 1).then_some((listener, key, told)),
        }
    };
    doors.into_iter().enumerate().map(seat).collect()
}

impl Seat {
    pub fn take(self) -> Box<dyn SharedHost> {
        let fd = self.segment.fd().as_raw_fd();
        let shm = ShmCollective::attach(fd, self.local, self.locals, GENERATION).unwrap();
        match self.network {
            None => Box::new(shm),
            Some((listener, key, told)) => {
                let net = listener.connect(&told, &key, TIMEOUT).unwrap();
                Box::new(HostCollective::new(shm, net).unwrap())
            }
        }
    }
}
