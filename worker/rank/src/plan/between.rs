//! What goes between the nodes of a job: how long it takes, by a model of their links, and what it takes of the cores that compute.

use super::timeline::Unit;
use fleet_collectives::algorithm::Topology;
use fleet_collectives::cost::{self, Link, Links};
use fleet_collectives::net::{Key, Listener, RankAddress, Rendezvous};
use fleet_collectives::{DType, Exchange, Gang, Op, Posted};
use fleet_common::job::Shape;
use fleet_common::link::{Latency, Rate};
use fleet_learn::{Error, Result};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use std::collections::HashMap;
use std::net::Ipv4Addr;
use std::time::Duration;

/// Bytes that are sent to see what that costs, so often after once.
const SAMPLE: usize = 8 << 20;
const TIMES: usize = 4;
/// Bytes of the sums that all ranks make in each step: what targets count, loss, norm and votes.
const SMALL: usize = 32;
/// So many of them, and one meeting.
const SMALL_CALLS: f64 = 3.0;
/// For two ranks of one process to meet.
const MEETING: Duration = Duration::from_secs(30);

/// The gradients of a unit, summed and left as shards, or summed everywhere.
pub const SUMMED: Posted = Posted::AllReduce(DType::F32, Op::Sum);
pub const SCATTERED: Posted = Posted::ReduceScatter(DType::F32, Op::Sum);
/// The weights of a unit.
pub const COLLECTED: Posted = Posted::AllGather(DType::U8);

/// The links of a model: those that were told, or those that are assumed.
pub fn links(rate: Option<Rate>, latency: Option<Latency>) -> Links {
    let assumed = Links::ASSUMED.across;
    let bandwidth = rate.map_or(assumed.bandwidth, |rate| rate.bits_per_s / 8.0);
    let latency = latency.map_or(assumed.latency, |latency| latency.0);
    Links { across: Link { latency, bandwidth, ..assumed }, ..Links::ASSUMED }
}

/// For people.
pub fn describe(links: &Links, told: bool) -> String {
    let rate = Rate { bits_per_s: links.across.bandwidth * 8.0 };
    let assumed = if told { "" } else { ", as assumed; --link and --latency say other ones" };
    format!("between nodes {rate} and {}{assumed}", Latency(links.across.latency))
}

/// What exchanges between the hosts of a gang cost.
pub struct Between {
    topology: Topology,
    links: Links,
    /// Seconds of a core for each byte that goes from rank to rank, at both ends together.
    work: f64,
    /// No core is left for that: it keeps others from computing.
    crowded: bool,
    known: HashMap<(Posted, usize), Cost>,
}

/// Seconds of an exchange, and of a core for it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cost {
    pub time: f64,
    pub stolen: f64,
}

impl Between {
    /// `crowded`: every core of a node computes.
    pub fn new(shape: Shape, links: Links, encryption: bool, crowded: bool) -> Result<Between> {
        let topology = Topology::even(shape.nodes as usize, shape.of_node() as usize);
        let work = if shape.nodes > 1 { work_of_a_byte(encryption)? } else { 0.0 };
        Ok(Between { topology, links, work, crowded, known: HashMap::new() })
    }

    pub fn cost(&mut self, exchange: Posted, bytes: usize) -> Cost {
        if self.topology.hosts() == 1 || bytes == 0 {
            return Cost::default();
        }
        let Between { topology, links, work, crowded, known } = self;
        *known.entry((exchange, bytes)).or_insert_with(|| {
            let crossing = cost::between_hosts(exchange, bytes, topology, links);
            let worked = crossing.sent as f64 * *work;
            // A thread that shares its core takes twice as long.
            let (slowed, stolen) = if *crowded { (2.0 * worked, worked) } else { (worked, 0.0) };
            Cost { time: crossing.time.as_secs_f64().max(slowed), stolen }
        })
    }

    /// Of the small sums that a step waits for.
    pub fn of_small_calls(&mut self) -> f64 {
        SMALL_CALLS * self.cost(Posted::AllReduce(DType::F64, Op::Sum), SMALL).time
    }

    /// `unit` with what is summed and collected for it; and what that takes of computing in a step in which it is collected so often.
    pub fn add(&mut self, unit: Unit, summed: (Posted, usize), collected: usize, times: f64) -> (Unit, f64) {
        let reduce = self.cost(summed.0, summed.1);
        let gather = self.cost(COLLECTED, collected);
        let unit = Unit { reduce: reduce.time, gather: gather.time, ..unit };
        (unit, reduce.stolen + times * gather.stolen)
    }
}

/// Seconds of a core for a byte that one rank sends and another takes, over a connection within this machine.
fn work_of_a_byte(encryption: bool) -> Result<f64> {
    let anywhere = (Ipv4Addr::LOCALHOST, 0).into();
    let listeners = [Listener::tcp(anywhere)?, Listener::tcp(anywhere)?];
    let keys = [Key::generate()?, Key::generate()?];
    let mut ranks = Vec::new();
    for (host, (listener, key)) in listeners.iter().zip(&keys).enumerate() {
        ranks.push(RankAddress { host, address: listener.address()?, key: key.public().clone() });
    }
    let rank = |rank: usize, listener: Listener, key: &Key| -> Result<f64> {
        let told = Rendezvous { generation: 1, rank, ranks: ranks.clone(), encryption };
        let mut gang = listener.connect(&told, key, MEETING)?;
        let mut data = vec![0; SAMPLE];
        gang.broadcast(&mut data, 0)?;
        gang.barrier()?;
        let before = cpu_seconds();
        (0..TIMES).try_for_each(|_| gang.broadcast(&mut data, 0))?;
        gang.barrier()?;
        Ok(cpu_seconds() - before)
    };
    let [first, second] = listeners;
    std::thread::scope(|scope| {
        let peer = scope.spawn(|| rank(1, second, &keys[1]));
        let seconds = rank(0, first, &keys[0]);
        peer.join().map_err(|_| Error::Job("a rank of the plan panicked".into()))??;
        Ok(seconds? / (TIMES * SAMPLE) as f64)
    })
}

/// Of all threads of this process.
fn cpu_seconds() -> f64 {
    let used = getrusage(UsageWho::RUSAGE_SELF).expect("a process may ask for its own usage");
    (used.user_time() + used.system_time()).num_microseconds() as f64 / 1e6
}

#[cfg(test)]
mod tests {
    use super::*;

    fn between(rate: &str, nodes: u32, crowded: bool) -> Between {
        let links = links(Some(rate.parse().unwrap()), None);
        Between {
            work: 1e-9,
            ..Between::new(Shape { ranks: 2 * nodes, nodes }, links, false, crowded).unwrap()
        }
    }

    #[test]
    fn a_slow_link_is_what_counts_and_a_fast_one_costs_work() {
        let bytes = 64 << 20;
        let cost = |rate, nodes, crowded| between(rate, nodes, crowded).cost(SUMMED, bytes);
        assert_eq!(cost("10Gbit", 1, true).time, 0.0);
        let slow = cost("100Mbit", 2, false);
        let least = bytes as f64 * 8.0 / 1e8;
        assert!(slow.time >= least && slow.time < 1.2 * least && slow.stolen == 0.0, "{slow:?}");
        // Each rank of a host sends half of all.
        let fast = cost("1000Gbit", 2, false);
        assert!((fast.time / (0.5 * bytes as f64 * 1e-9) - 1.0).abs() < 0.1, "{fast:?}");
        let crowded = cost("1000Gbit", 2, true);
        assert!(
            (crowded.time / fast.time - 2.0).abs() < 0.1 && crowded.stolen > 0.9 * fast.time,
            "{crowded:?}"
        );
    }

    #[test]
    fn what_is_assumed_is_said() {
        assert_eq!(
            describe(&links(None, None), false),
            "between nodes 10 Gbit/s and 30µs, as assumed; --link and --latency say other ones"
        );
        let told = links(Some("1Gbit".parse().unwrap()), Some("2ms".parse().unwrap()));
        assert_eq!(describe(&told, true), "between nodes 1 Gbit/s and 2ms");
    }
}
