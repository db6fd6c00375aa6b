//! Collective algorithms as data: what each rank sends, receives and reduces, in which order. Nothing is moved here; transports carry the
//! steps out, the cost model counts them, the tests interpret them.
//!
//! | algorithm | all_reduce | reduce_scatter, all_gather | broadcast | messages per rank |
//! |---|---|---|---|---|
//! | `Ring` | ring, twice around | ring | chain | of order n, each byte twice on every link |
//! | `Tree` | recursive doubling | Bruck's, n of any kind | binomial tree | of order log n |
//! | `Halving` | reduce_scatter, then all_gather, as `Tree` | as `Tree` | as `Tree` | of order log n |
//! | `Hierarchical` | inside the hosts, across, inside | the same | chain of hosts, chains inside | of order hosts + ranks of a host |
//! | `HierarchicalTree` | the same, across as `Halving` | the same, across as `Tree` | as `Hierarchical` | of order log hosts + ranks of a host |
//!
//! Sources: rings as in Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms", 2009; doubling and halving as in Thakur, Rabenseifner
//! and Gropp, "Optimization of collective communication operations in MPICH", 2005; Bruck et al., "Efficient algorithms for all-to-all
//! communications", 1997.

mod hierarchical;
mod plan;
mod ring;
mod topology;
mod tree;

#[cfg(test)]
mod tests;

use crate::collective::{Posted, part};
use crate::dtype::{DType, Op};
use crate::memory::reduce::First;
pub(crate) use hierarchical::{across, barrier_of_hosts, carried_by, shards_across};
pub(crate) use plan::Plan;
use std::fmt;
use std::ops::Range;
pub use topology::Topology;

/// One thing that a rank does with one peer. Ranges are bytes of the one buffer that an operation works in.
///
/// A step takes its range in ascending order. It may touch a byte when the earlier steps of its rank that touch the same byte have, save
/// where both only read. What one rank sends to another arrives in the order of its steps, and is received in that of the other's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Step {
    pub peer: usize,
    pub kind: Kind,
    pub range: Range<usize>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Send,
    Receive,
    /// The range becomes the reduction of itself and of what is received.
    Reduce(First),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Algorithm {
    Ring,
    Tree,
    Halving,
    Hierarchical,
    HierarchicalTree,
}

impl Algorithm {
    pub const ALL: [Algorithm; 5] = [
        Algorithm::Ring,
        Algorithm::Tree,
        Algorithm::Halving,
        Algorithm::Hierarchical,
        Algorithm::HierarchicalTree,
    ];
}

impl Algorithm {
    fn across(self) -> hierarchical::Across {
        match self {
            Algorithm::HierarchicalTree => hierarchical::Across::Tree,
            _ => hierarchical::Across::Ring,
        }
    }
}

impl fmt::Display for Algorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Algorithm::Ring => "ring",
            Algorithm::Tree => "tree",
            Algorithm::Halving => "halving",
            Algorithm::Hierarchical => "hierarchical ring",
            Algorithm::HierarchicalTree => "hierarchical tree",
        })
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Operation {
    AllReduce(DType, Op),
    ReduceScatter(DType, Op),
    AllGather,
    Broadcast {
        root: usize,
    },
    /// Input in the first half of the buffer, output in the second.
    AllToAll,
    /// On a buffer of one byte, whose value means nothing.
    Barrier,
}

impl Operation {
    /// By which received and own numbers become one, where any do.
    pub fn reduction(self) -> Option<(DType, Op)> {
        match self {
            Operation::AllReduce(dtype, op) | Operation::ReduceScatter(dtype, op) => Some((dtype, op)),
            _ => None,
        }
    }
}

impl From<Posted> for Operation {
    fn from(posted: Posted) -> Operation {
        match posted {
            Posted::AllReduce(dtype, op) => Operation::AllReduce(dtype, op),
            Posted::ReduceScatter(dtype, op) => Operation::ReduceScatter(dtype, op),
            Posted::AllGather(_) => Operation::AllGather,
            Posted::Broadcast { root } => Operation::Broadcast { root },
            Posted::AllToAll => Operation::AllToAll,
        }
    }
}

/// An operation on a buffer of so many bytes, of which each rank owns a part.
#[derive(Clone, Debug)]
pub(crate) struct Work {
    pub operation: Operation,
    pub bytes: usize,
    /// In rank order, contiguous, covering all that is scattered or gathered.
    pub parts: Vec<Range<usize>>,
}

impl Work {
    /// Parts are `part`s of elements of `size` bytes.
    pub fn by_part(operation: Operation, bytes: usize, size: usize, world: usize) -> Work {
        let of = |rank| {
            let part = part(bytes / size, rank, world);
            part.start * size..part.end * size
        };
        Work { operation, bytes, parts: (0..world).map(of).collect() }
    }

    /// Parts are equally long.
    pub fn in_equal_parts(operation: Operation, bytes: usize, world: usize) -> Work {
        let size = bytes / world;
        Work { operation, bytes, parts: (0..world).map(|rank| rank * size..(rank + 1) * size).collect() }
    }
}

/// What `rank` does. All ranks must ask for the same algorithm of the same work and topology.
pub(crate) fn steps(algorithm: Algorithm, work: &Work, topology: &Topology, rank: usize) -> Vec<Step> {
    let world = topology.world();
    let all: Vec<usize> = (0..world).collect();
    let group = Group { ranks: &all, me: rank };
    let chunks = |at: usize| -> Ranges { vec![work.parts[at].clone()] };
    let mut steps = Steps::default();
    match (work.operation, algorithm) {
        (Operation::AllReduce(..), Algorithm::Tree) => tree::all_reduce(&mut steps, group, 0..work.bytes),
        (Operation::AllReduce(..), Algorithm::Ring) => {
            ring::reduce_scatter(&mut steps, group, chunks);
            ring::all_gather(&mut steps, group, chunks);
        }
        (Operation::AllReduce(..), Algorithm::Halving) => {
            tree::reduce_scatter(&mut steps, group, &work.parts);
            tree::all_gather(&mut steps, group, &work.parts);
        }
        (Operation::AllReduce(..), Algorithm::Hierarchical | Algorithm::HierarchicalTree) => {
            hierarchical::all_reduce(&mut steps, algorithm.across(), topology, rank, &work.parts);
        }
        (Operation::ReduceScatter(..), Algorithm::Ring) => ring::reduce_scatter(&mut steps, group, chunks),
        (Operation::ReduceScatter(..), Algorithm::Hierarchical | Algorithm::HierarchicalTree) => {
            hierarchical::reduce_scatter(&mut steps, algorithm.across(), topology, rank, &work.parts);
        }
        (Operation::ReduceScatter(..), _) => tree::reduce_scatter(&mut steps, group, &work.parts),
        (Operation::AllGather, Algorithm::Ring) => ring::all_gather(&mut steps, group, chunks),
        (Operation::AllGather, Algorithm::Hierarchical | Algorithm::HierarchicalTree) => {
            hierarchical::all_gather(&mut steps, algorithm.across(), topology, rank, &work.parts);
        }
        (Operation::AllGather, _) => tree::all_gather(&mut steps, group, &work.parts),
        (Operation::Broadcast { root }, Algorithm::Ring) => {
            ring::broadcast(&mut steps, group.from(root), 0..work.bytes);
        }
        (Operation::Broadcast { root }, Algorithm::Hierarchical | Algorithm::HierarchicalTree) => {
            hierarchical::broadcast(&mut steps, topology, rank, root, 0..work.bytes);
        }
        (Operation::Broadcast { root }, _) => tree::broadcast(&mut steps, group, root, 0..work.bytes),
        (Operation::AllToAll, _) => ring::all_to_all(&mut steps, group, work.bytes),
        (Operation::Barrier, _) => tree::barrier(&mut steps, group),
    }
    steps.list
}

/// A set of bytes, in pieces.
type Ranges = Vec<Range<usize>>;

/// Ranks that do something together, in an order; `me` is a place in it.
#[derive(Clone, Copy)]
struct Group<'a> {
    ranks: &'a [usize],
    me: usize,
}

impl<'a> Group<'a> {
    /// The group that `rank` is in.
    fn of(ranks: &'a [usize], rank: usize) -> Option<Group<'a>> {
        Some(Group { ranks, me: ranks.iter().position(|one| *one == rank)? })
    }

    fn len(self) -> usize {
        self.ranks.len()
    }

    /// The place that is `distance` behind this one, around.
    fn before(self, distance: usize) -> usize {
        (self.me + self.len() - distance % self.len()) % self.len()
    }

    /// The place that is `distance` further.
    fn after(self, distance: usize) -> usize {
        (self.me + distance) % self.len()
    }

    /// The same group with the rank at place `first`, in which this rank's place is counted from there.
    fn from(self, first: usize) -> Turned<'a> {
        Turned { group: self, first }
    }
}

/// A group that begins elsewhere.
#[derive(Clone, Copy)]
struct Turned<'a> {
    group: Group<'a>,
    first: usize,
}

impl Turned<'_> {
    fn me(self) -> usize {
        (self.group.me + self.group.len() - self.first) % self.group.len()
    }

    fn rank(self, place: usize) -> usize {
        self.group.ranks[(place + self.first) % self.group.len()]
    }
}

/// A list of steps that grows.
#[derive(Default)]
struct Steps {
    list: Vec<Step>,
}

impl Steps {
    /// Also where the range is empty: the message itself says something.
    fn push(&mut self, kind: Kind, peer: usize, range: Range<usize>) {
        self.list.push(Step { peer, kind, range });
    }

    fn push_all(&mut self, kind: Kind, peer: usize, ranges: Ranges) {
        for range in ranges.into_iter().filter(|range| !range.is_empty()) {
            self.push(kind, peer, range);
        }
    }
}
