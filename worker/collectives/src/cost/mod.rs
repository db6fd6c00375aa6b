//! What an algorithm costs on given links, and which one to take. All ranks must choose alike, so what is known of the links is told to all and
//! never measured by each for itself.

mod simulate;

use crate::algorithm::{Algorithm, Operation, Topology, Work};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

/// One kind of link: between ranks of a host, or between hosts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Link {
    /// From the call that sends a message to the one that receives it, for the first byte.
    pub latency: Duration,
    /// Bytes per second, in each direction. Between hosts: of all ranks of a host together.
    pub bandwidth: f64,
    /// Share of packets of `PACKET` bytes that are lost.
    pub loss: f64,
    /// What a lost packet costs the message that it is of.
    pub retransmit: Duration,
}

/// Bytes of a packet, for losses.
pub const PACKET: usize = 1448;

/// What a model of the machines says.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Links {
    pub inside: Link,
    pub across: Link,
    /// Seconds to add a byte to another.
    pub reduce: f64,
}

impl Links {
    /// Ranks that speak over loopback, hosts over 10 Gbit/s Ethernet, through the kernel's TCP: what is assumed where nobody has measured.
    pub const ASSUMED: Links = Links {
        inside: Link {
            latency: Duration::from_micros(15),
            bandwidth: 3e9,
            loss: 0.0,
            retransmit: Duration::ZERO,
        },
        across: Link {
            latency: Duration::from_micros(30),
            bandwidth: 1.25e9,
            loss: 0.0,
            retransmit: Duration::ZERO,
        },
        reduce: 1.0 / 10e9,
    };
}

/// How long the slowest rank takes for `work`, by the model.
pub(crate) fn cost(algorithm: Algorithm, work: &Work, topology: &Topology, links: &Links) -> Duration {
    let lists = |rank| crate::algorithm::steps(algorithm, work, topology, rank);
    simulate::time(lists, topology, links)
}

/// Worlds beyond this are not asked for algorithms whose messages grow with the world.
const RING_MAX: usize = 256;

/// Chooses the cheapest algorithm, and remembers it for all works of about the same size.
pub(crate) struct Chooser {
    topology: Arc<Topology>,
    /// One rank of each host, for what is done across alone.
    hosts: Topology,
    chosen: HashMap<(u8, u32, bool), Algorithm>,
}

impl Chooser {
    pub fn new(topology: Arc<Topology>) -> Chooser {
        let hosts = Topology::even(topology.hosts(), 1);
        Chooser { topology, hosts, chosen: HashMap::new() }
    }

    pub fn choose(&mut self, work: &Work) -> Algorithm {
        self.remembered(work, false)
    }

    /// For `algorithm::across`.
    pub fn across(&mut self, work: &Work) -> Algorithm {
        self.remembered(work, true)
    }

    fn remembered(&mut self, work: &Work, across: bool) -> Algorithm {
        let kind = match work.operation {
            Operation::AllReduce(..) => 0,
            Operation::ReduceScatter(..) => 1,
            Operation::AllGather => 2,
            Operation::Broadcast { .. } => 3,
            Operation::AllToAll | Operation::Barrier => return Algorithm::Tree,
        };
        let topology = if across { &self.hosts } else { &*self.topology };
        let size = work.bytes.next_power_of_two();
        *self.chosen.entry((kind, size.trailing_zeros(), across)).or_insert_with(|| {
            let element = work.operation.reduction().map_or(1, |(dtype, _)| dtype.size());
            let work = Work::by_part(work.operation, size, element, topology.world());
            choose(&work, topology, &Links::ASSUMED)
        })
    }
}

/// The cheapest by the model; of equals the first of `Algorithm::ALL`.
pub(crate) fn choose(work: &Work, topology: &Topology, links: &Links) -> Algorithm {
    let possible = |algorithm: &Algorithm| match algorithm {
        Algorithm::Ring => topology.world() <= RING_MAX,
        Algorithm::Hierarchical => topology.hosts() > 1 && topology.hosts() < topology.world(),
        Algorithm::Tree | Algorithm::Halving => true,
    };
    let costs =
        Algorithm::ALL.into_iter().filter(possible).map(|one| (cost(one, work, topology, links), one));
    costs.min_by_key(|(cost, _)| *cost).map_or(Algorithm::Tree, |(_, algorithm)| algorithm)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::{DType, Op};

    fn chosen(bytes: usize, topology: &Topology) -> Algorithm {
        let operation = Operation::AllReduce(DType::F32, Op::Sum);
        choose(&Work::by_part(operation, bytes, 4, topology.world()), topology, &Links::ASSUMED)
    }

    #[test]
    fn small_goes_by_trees_large_by_rings_and_by_hosts_where_there_are_some() {
        let flat = Topology::even(1, 8);
        assert_eq!(chosen(4, &flat), Algorithm::Tree);
        assert_ne!(chosen(64 << 20, &flat), Algorithm::Tree);
        assert_eq!(chosen(1 << 20, &Topology::even(16, 8)), Algorithm::Hierarchical);
    }

    #[test]
    fn a_ring_costs_what_its_bytes_cost() {
        let links = Links {
            inside: Link { latency: Duration::ZERO, bandwidth: 1e9, ..Links::ASSUMED.inside },
            reduce: 0.0,
            ..Links::ASSUMED
        };
        let work = Work::by_part(Operation::AllReduce(DType::F32, Op::Sum), 64 << 20, 4, 8);
        let cost = cost(Algorithm::Ring, &work, &Topology::even(1, 8), &links).as_secs_f64();
        let want = 2.0 * 7.0 / 8.0 * f64::from(64 << 20) / 1e9;
        assert!((cost / want - 1.0).abs() < 0.05, "{cost} s instead of {want}");
    }
}
