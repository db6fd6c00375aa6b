//! What an algorithm costs on given links, and which one to take. All ranks must choose alike, so what is known of the links is told to all and
//! never measured by each for itself.

mod hosts;
mod simulate;

pub use hosts::{Crossing, between_hosts};

use crate::algorithm::{Algorithm, Operation, Topology, Work};
use crate::collective::{Exchange, Posted};
use crate::dtype::{DType, Op};
use crate::error::Result;
use crate::memory::reduce::{First, reduce_into};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

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

/// How long the slowest rank takes for an exchange of `bytes`, by the model.
pub fn predict(
    exchange: Posted,
    bytes: usize,
    algorithm: Algorithm,
    topology: &Topology,
    links: &Links,
) -> Duration {
    cost(algorithm, &work(exchange, bytes, topology), topology, links)
}

/// The algorithm that a gang takes for an exchange of `bytes`, whatever its links are: the cheapest for a size near it on assumed ones.
pub fn chosen(exchange: Posted, bytes: usize, topology: &Topology) -> Algorithm {
    Chooser::new(Arc::new(topology.clone())).choose(&work(exchange, bytes, topology))
}

/// The cheapest algorithm for an exchange of `bytes`, by the model.
pub fn cheapest(exchange: Posted, bytes: usize, topology: &Topology, links: &Links) -> Algorithm {
    choose(&work(exchange, bytes, topology), topology, links)
}

fn work(exchange: Posted, bytes: usize, topology: &Topology) -> Work {
    let size = match exchange {
        Posted::AllReduce(dtype, _) | Posted::ReduceScatter(dtype, _) | Posted::AllGather(dtype) => {
            dtype.size()
        }
        Posted::Broadcast { .. } | Posted::AllToAll => 1,
    };
    Work::by_part(exchange.into(), bytes, size, topology.world())
}

/// Measures latency and bandwidth between the ranks of a gang of two, or the worst of more. A collective call; all ranks get the same.
pub fn measure_link(gang: &mut dyn Exchange) -> Result<Link> {
    let mut seconds = [0.0; 2];
    for _ in 0..MEASURED {
        let start = Instant::now();
        gang.barrier()?;
        seconds[0] =
            f64::min(if seconds[0] == 0.0 { f64::MAX } else { seconds[0] }, start.elapsed().as_secs_f64());
    }
    let (mut data, mut fastest) = (vec![0; MEASURED_BYTES], f64::MAX);
    for _ in 0..MEASURED {
        gang.barrier()?;
        let start = Instant::now();
        gang.broadcast(&mut data, 0)?;
        gang.barrier()?;
        fastest = fastest.min(start.elapsed().as_secs_f64() - seconds[0]);
    }
    seconds[1] = fastest.max(1e-9);
    gang.all_reduce_f64(&mut seconds, Op::Max)?;
    Ok(Link {
        // Of as many rounds as a barrier has.
        latency: Duration::from_secs_f64(
            seconds[0] / f64::from(gang.world_size().max(2).next_power_of_two().ilog2()),
        ),
        bandwidth: MEASURED_BYTES as f64 / seconds[1],
        loss: 0.0,
        retransmit: Duration::ZERO,
    })
}

/// Measures how long this machine takes to add a byte to another, in seconds.
pub fn measure_reduce() -> f64 {
    let (mut own, other) = (vec![0u8; MEASURED_BYTES], vec![0u8; MEASURED_BYTES]);
    let times = (0..MEASURED).map(|_| {
        let start = Instant::now();
        reduce_into(&mut own, &other, DType::F32, Op::Sum, First::Own);
        start.elapsed().as_secs_f64()
    });
    times.fold(f64::MAX, f64::min) / MEASURED_BYTES as f64
}

const MEASURED: usize = 8;
const MEASURED_BYTES: usize = 8 << 20;

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
        Algorithm::Hierarchical | Algorithm::HierarchicalTree => {
            topology.hosts() > 1 && topology.hosts() < topology.world()
        }
        Algorithm::Tree | Algorithm::Halving => true,
    };
    let costs =
        Algorithm::ALL.into_iter().filter(possible).map(|one| (cost(one, work, topology, links), one));
    costs.min_by_key(|(cost, _)| *cost).map_or(Algorithm::Tree, |(_, algorithm)| algorithm)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(bytes: usize, topology: &Topology) -> Algorithm {
        let operation = Operation::AllReduce(DType::F32, Op::Sum);
        choose(&Work::by_part(operation, bytes, 4, topology.world()), topology, &Links::ASSUMED)
    }

    #[test]
    fn small_goes_by_trees_large_by_rings_and_by_hosts_where_there_are_some() {
        let flat = Topology::even(1, 8);
        assert_eq!(chosen(4, &flat), Algorithm::Tree);
        assert_ne!(chosen(64 << 20, &flat), Algorithm::Tree);
        assert_eq!(chosen(1 << 20, &Topology::even(16, 8)), Algorithm::HierarchicalTree);
        let large = chosen(64 << 20, &Topology::even(4, 8));
        assert!(matches!(large, Algorithm::Hierarchical | Algorithm::HierarchicalTree), "{large}");
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

    #[test]
    fn a_lossy_link_costs_more_and_the_same_each_time() {
        let clean = Links {
            across: Link { retransmit: Duration::from_millis(1), ..Links::ASSUMED.across },
            ..Links::ASSUMED
        };
        let lossy = Links { across: Link { loss: 0.01, ..clean.across }, ..clean };
        let time = |links: &Links| {
            predict(Posted::AllGather(DType::F32), 1 << 20, Algorithm::Ring, &Topology::even(4, 2), links)
        };
        assert!(time(&lossy) > time(&clean) + Duration::from_millis(1));
        assert_eq!(time(&lossy), time(&lossy));
    }

    #[test]
    fn a_thousand_ranks_are_predicted() {
        let (topology, sum) = (Topology::even(128, 8), Posted::AllReduce(DType::F32, Op::Sum));
        let time = |algorithm| predict(sum, 256 << 10, algorithm, &topology, &Links::ASSUMED);
        assert!(time(Algorithm::HierarchicalTree) < time(Algorithm::Tree));
        assert_eq!(cheapest(sum, 4, &topology, &Links::ASSUMED), Algorithm::Tree);
    }
}
