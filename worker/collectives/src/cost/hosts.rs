//! What an exchange costs between hosts when the ranks of each share memory: what `HostCollective` does when its ranks have summed inside, or
//! before they spread what they got.

use super::{Chooser, Links, work};
use crate::algorithm::{Algorithm, Kind, Step, Topology, Work};
use crate::collective::Posted;
use crate::cost::simulate;
use std::sync::Arc;
use std::time::Duration;

/// One exchange, as it is carried out.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Crossing {
    pub algorithm: Algorithm,
    /// Until the slowest rank is done.
    pub time: Duration,
    /// Bytes that the rank sends that sends most.
    pub sent: usize,
}

/// An all-reduce, a reduce-scatter or an all-gather of `bytes`, the same on every host; other exchanges do not go this way. The algorithm
/// is the one that gangs choose, whatever the links really are.
pub fn between_hosts(exchange: Posted, bytes: usize, topology: &Topology, links: &Links) -> Crossing {
    let work = work(exchange, bytes, topology);
    let algorithm = Chooser::new(Arc::new(topology.clone())).across(&work);
    let steps = |rank| steps(exchange, algorithm, &work, topology, rank);
    let sent = |rank| {
        let sends = steps(rank).into_iter().filter(|step| step.kind == Kind::Send);
        sends.map(|step| step.range.len()).sum::<usize>()
    };
    Crossing {
        algorithm,
        time: simulate::time(steps, topology, links),
        sent: (0..topology.world()).map(sent).max().unwrap_or(0),
    }
}

fn steps(exchange: Posted, algorithm: Algorithm, work: &Work, topology: &Topology, rank: usize) -> Vec<Step> {
    match exchange {
        Posted::AllReduce(dtype, _) => {
            crate::algorithm::across(algorithm, work, dtype.size(), topology, rank)
        }
        _ => crate::algorithm::shards_across(algorithm, work.operation, topology, rank, &work.parts),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::{DType, Op};

    #[test]
    fn a_host_sends_each_byte_of_a_sum_twice_and_nothing_where_there_is_one() {
        let (bytes, sum) = (32 << 20, Posted::AllReduce(DType::F32, Op::Sum));
        let cost = |hosts, ranks| between_hosts(sum, bytes, &Topology::even(hosts, ranks), &Links::ASSUMED);
        assert_eq!((cost(1, 4).time, cost(1, 4).sent), (Duration::ZERO, 0));
        for (hosts, ranks) in [(2, 1), (2, 4), (4, 2)] {
            let crossing = cost(hosts, ranks);
            let each = 2.0 * (hosts - 1) as f64 / hosts as f64 * bytes as f64;
            let sent = (crossing.sent * ranks) as f64;
            assert!((sent / each - 1.0).abs() < 0.02, "{hosts} x {ranks}: {sent} of {each}");
            let time = crossing.time.as_secs_f64();
            let least = each / Links::ASSUMED.across.bandwidth;
            assert!(time >= 0.99 * least && time < 1.5 * least, "{hosts} x {ranks}: {time} s, {least}");
        }
        let half = |exchange| between_hosts(exchange, bytes, &Topology::even(2, 2), &Links::ASSUMED).sent;
        assert_eq!(half(Posted::ReduceScatter(DType::F32, Op::Sum)), bytes / 4);
        assert_eq!(half(Posted::AllGather(DType::F32)), bytes / 4);
    }
}
