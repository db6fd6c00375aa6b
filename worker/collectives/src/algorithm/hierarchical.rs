//! Inside the hosts and across them. On each host every rank carries a share of what belongs to other hosts, so that all ranks of a host
//! send across at once, and a byte crosses between two hosts as rarely as in a ring of hosts.

use super::{Algorithm, Group, Kind, Operation, Ranges, Step, Steps, Topology, Work, ring, tree};
use crate::collective::part;
use crate::memory::reduce::First;
use std::ops::Range;

/// The parts that `carrier` carries on its host.
fn carried<'a>(
    topology: &'a Topology,
    carrier: usize,
    parts: &'a [Range<usize>],
) -> impl Iterator<Item = usize> + 'a {
    let host = topology.host_of(carrier);
    (0..parts.len()).filter(move |rank| topology.carrier(host, *rank) == carrier)
}

/// How hosts reach each other.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Across {
    Ring,
    Tree,
}

/// Large buffers are cut into this many pieces, so that one goes across while the next is summed inside.
const PIECES: usize = 8;
/// Bytes of a piece of one rank's part, at least: below it, more messages cost more than they gain. Tests cut small buffers.
const PIECE_MIN: usize = if cfg!(test) { 256 } else { 64 << 10 };

/// Inside: everybody gets the host's sum of what it carries. Across: each part ends at its rank with the sums of all hosts.
pub fn reduce_scatter(
    steps: &mut Steps,
    across: Across,
    topology: &Topology,
    rank: usize,
    parts: &[Range<usize>],
) {
    let at = Place { across, topology, rank };
    in_turn(
        parts,
        [&|steps, parts| at.sum_inside(steps, parts), &|steps, parts| at.sum_across(steps, parts)],
        steps,
    );
}

/// Backwards: each part goes to all hosts, then around inside.
pub fn all_gather(
    steps: &mut Steps,
    across: Across,
    topology: &Topology,
    rank: usize,
    parts: &[Range<usize>],
) {
    let at = Place { across, topology, rank };
    in_turn(
        parts,
        [&|steps, parts| at.spread_across(steps, parts), &|steps, parts| at.spread_inside(steps, parts)],
        steps,
    );
}

/// Both, one behind the other.
pub fn all_reduce(
    steps: &mut Steps,
    across: Across,
    topology: &Topology,
    rank: usize,
    parts: &[Range<usize>],
) {
    let at = Place { across, topology, rank };
    let stages: [Stage; 4] = [
        &|steps, parts| at.sum_inside(steps, parts),
        &|steps, parts| at.sum_across(steps, parts),
        &|steps, parts| at.spread_across(steps, parts),
        &|steps, parts| at.spread_inside(steps, parts),
    ];
    in_turn(parts, stages, steps);
}

type Stage<'a> = &'a dyn Fn(&mut Steps, &[Range<usize>]);

/// Takes the same piece of every part through all stages, each piece one stage behind the one before it.
fn in_turn<const STAGES: usize>(parts: &[Range<usize>], stages: [Stage<'_>; STAGES], steps: &mut Steps) {
    let longest = parts.iter().map(Range::len).max().unwrap_or(0);
    let pieces = (longest / PIECE_MIN).clamp(1, PIECES);
    let piece = |number: usize| -> Vec<Range<usize>> {
        let of = |part: &Range<usize>| {
            // Whole elements of every type, where parts are.
            let size = part.len().div_ceil(pieces).next_multiple_of(8);
            let end = |number: usize| (part.start + number * size).min(part.end);
            end(number)..end(number + 1)
        };
        parts.iter().map(of).collect()
    };
    for turn in 0..pieces + STAGES - 1 {
        for (stage, emit) in stages.iter().enumerate() {
            if let Some(number) = turn.checked_sub(stage).filter(|number| *number < pieces) {
                emit(steps, &piece(number));
            }
        }
    }
}

/// One rank on its host.
#[derive(Clone, Copy)]
struct Place<'a> {
    across: Across,
    topology: &'a Topology,
    rank: usize,
}

impl Place<'_> {
    fn locals(&self) -> Group<'_> {
        let ranks = self.topology.ranks_of(self.topology.host_of(self.rank));
        Group { ranks, me: self.topology.place_of(self.rank) }
    }

    fn sum_inside(&self, steps: &mut Steps, parts: &[Range<usize>]) {
        let locals = self.locals();
        ring::reduce_scatter(steps, locals, |place| merged(self.topology, locals.ranks[place], parts));
    }

    fn spread_inside(&self, steps: &mut Steps, parts: &[Range<usize>]) {
        let locals = self.locals();
        ring::all_gather(steps, locals, |place| merged(self.topology, locals.ranks[place], parts));
    }

    /// Rounds: how far the partners are, and the hosts whose parts are sent and come, as first and count.
    fn sum_across(&self, steps: &mut Steps, parts: &[Range<usize>]) {
        let hosts = Ring::of(self.topology, self.rank);
        match self.across {
            Across::Ring => {
                for step in 1..hosts.len {
                    self.send(steps, parts, hosts.after(1), (hosts.before(step), 1));
                    let kind = Kind::Reduce(First::Received);
                    self.take(steps, parts, kind, hosts.before(1), (hosts.before(step + 1), 1));
                }
            }
            Across::Tree => {
                for (distance, count) in tree::rounds(hosts.len).rev() {
                    self.send(steps, parts, hosts.after(distance), (hosts.after(distance), count));
                    let kind = Kind::Reduce(First::Own);
                    self.take(steps, parts, kind, hosts.before(distance), (hosts.me, count));
                }
            }
        }
    }

    fn spread_across(&self, steps: &mut Steps, parts: &[Range<usize>]) {
        let hosts = Ring::of(self.topology, self.rank);
        match self.across {
            Across::Ring => {
                for step in 1..hosts.len {
                    self.send(steps, parts, hosts.after(1), (hosts.before(step - 1), 1));
                    self.take(steps, parts, Kind::Receive, hosts.before(1), (hosts.before(step), 1));
                }
            }
            Across::Tree => {
                for (distance, count) in tree::rounds(hosts.len) {
                    self.send(steps, parts, hosts.before(distance), (hosts.me, count));
                    let from = hosts.after(distance);
                    self.take(steps, parts, Kind::Receive, from, (from, count));
                }
            }
        }
    }

    /// Sends to `host` what this rank carries of `owners`: so many hosts from the first on, around.
    fn send(&self, steps: &mut Steps, parts: &[Range<usize>], host: usize, owners: (usize, usize)) {
        for owner in self.carried_of(owners) {
            steps.push_all(Kind::Send, self.topology.carrier(host, owner), vec![parts[owner].clone()]);
        }
    }

    fn take(
        &self,
        steps: &mut Steps,
        parts: &[Range<usize>],
        kind: Kind,
        host: usize,
        owners: (usize, usize),
    ) {
        for owner in self.carried_of(owners) {
            steps.push_all(kind, self.topology.carrier(host, owner), vec![parts[owner].clone()]);
        }
    }

    fn carried_of(&self, (first, count): (usize, usize)) -> impl Iterator<Item = usize> + '_ {
        let here = self.topology.host_of(self.rank);
        let hosts = (first..first + count).map(|host| host % self.topology.hosts());
        let owners = hosts.flat_map(|host| self.topology.ranks_of(host).iter().copied());
        owners.filter(move |owner| self.topology.carrier(here, *owner) == self.rank)
    }
}

/// A chain of hosts, from the root to the first rank of each other host, and on each host a chain of its ranks.
pub fn broadcast(steps: &mut Steps, topology: &Topology, rank: usize, root: usize, range: Range<usize>) {
    let home = topology.host_of(root);
    let leader = |host: usize| if host == home { root } else { topology.ranks_of(host)[0] };
    let leaders: Vec<usize> = (0..topology.hosts()).map(leader).collect();
    if let Some(group) = Group::of(&leaders, rank) {
        ring::broadcast(steps, group.from(home), range.clone());
    }
    let host = topology.host_of(rank);
    let locals = topology.ranks_of(host);
    let local = Group { ranks: locals, me: topology.place_of(rank) };
    ring::broadcast(steps, local.from(topology.place_of(leader(host))), range);
}

/// What one rank carries, pieces that touch as one.
fn merged(topology: &Topology, carrier: usize, parts: &[Range<usize>]) -> Ranges {
    let mut ranges: Ranges = Vec::new();
    for part in carried(topology, carrier, parts).map(|rank| parts[rank].clone()) {
        match ranges.last_mut() {
            Some(last) if last.end == part.start => last.end = part.end,
            _ => ranges.push(part),
        }
    }
    ranges
}

/// The hosts around, seen from that of a rank.
struct Ring {
    me: usize,
    len: usize,
}

impl Ring {
    fn of(topology: &Topology, rank: usize) -> Ring {
        Ring { me: topology.host_of(rank), len: topology.hosts() }
    }
    fn before(&self, distance: usize) -> usize {
        (self.me + self.len - distance % self.len) % self.len
    }
    fn after(&self, distance: usize) -> usize {
        (self.me + distance) % self.len
    }
}

/// A barrier of the first ranks of all hosts; the others have nothing to do.
pub(crate) fn barrier_of_hosts(topology: &Topology, rank: usize) -> Vec<Step> {
    let leaders: Vec<usize> = (0..topology.hosts()).map(|host| topology.ranks_of(host)[0]).collect();
    let mut steps = Steps::default();
    if let Some(group) = Group::of(&leaders, rank) {
        tree::barrier(&mut steps, group);
    }
    steps.list
}

/// What is left of a reduce_scatter or an all_gather of `parts` when the ranks of each host share memory. Before a reduce_scatter each rank has
/// its host's sums of what it carries; after an all_gather what it carries is there.
pub(crate) fn shards_across(
    algorithm: Algorithm,
    operation: Operation,
    topology: &Topology,
    rank: usize,
    parts: &[Range<usize>],
) -> Vec<Step> {
    let across = match algorithm {
        Algorithm::Ring | Algorithm::Hierarchical => Across::Ring,
        Algorithm::Tree | Algorithm::Halving | Algorithm::HierarchicalTree => Across::Tree,
    };
    let (at, mut steps) = (Place { across, topology, rank }, Steps::default());
    match operation {
        Operation::ReduceScatter(..) => at.sum_across(&mut steps, parts),
        _ => at.spread_across(&mut steps, parts),
    }
    steps.list
}

/// What `rank` carries on its host of `parts`, pieces that touch as one.
pub(crate) fn carried_by(topology: &Topology, rank: usize, parts: &[Range<usize>]) -> Vec<Range<usize>> {
    merged(topology, rank, parts)
}

/// The part of an all_reduce that is left when the ranks of each host have reduced among themselves in shared memory: each has the host's
/// sum of its `part` among its host's ranks, of elements of `size` bytes, and gets the sum over all hosts. Where hosts have different
/// numbers of ranks, the buffer is cut at the ends of all parts of all hosts.
pub(crate) fn across(
    algorithm: Algorithm,
    work: &Work,
    size: usize,
    topology: &Topology,
    rank: usize,
) -> Vec<Step> {
    let elements = work.bytes / size;
    let ends = |host: usize| {
        let ranks = topology.ranks_of(host).len();
        (0..ranks).map(move |place| part(elements, place, ranks).end)
    };
    let mut cuts: Vec<usize> = std::iter::once(0).chain((0..topology.hosts()).flat_map(ends)).collect();
    cuts.sort_unstable();
    cuts.dedup();
    let owner = |host: usize, element: usize| {
        let ranks = topology.ranks_of(host);
        ranks.iter().enumerate().find(|(at, _)| part(elements, *at, ranks.len()).contains(&element))
    };
    let mut steps = Steps::default();
    for segment in cuts.windows(2).map(|cut| cut[0]..cut[1]) {
        let owners: Vec<usize> =
            (0..topology.hosts()).filter_map(|host| Some(*owner(host, segment.start)?.1)).collect();
        if let Some(group) = Group::of(&owners, rank) {
            let chunks: Ranges = (0..owners.len())
                .map(|at| {
                    let of = part(segment.len(), at, owners.len());
                    (segment.start + of.start) * size..(segment.start + of.end) * size
                })
                .collect();
            match algorithm {
                Algorithm::Tree => {
                    tree::all_reduce(&mut steps, group, segment.start * size..segment.end * size);
                }
                Algorithm::Halving | Algorithm::HierarchicalTree => {
                    tree::reduce_scatter(&mut steps, group, &chunks);
                    tree::all_gather(&mut steps, group, &chunks);
                }
                Algorithm::Ring | Algorithm::Hierarchical => {
                    ring::reduce_scatter(&mut steps, group, |at| vec![chunks[at].clone()]);
                    ring::all_gather(&mut steps, group, |at| vec![chunks[at].clone()]);
                }
            }
        }
    }
    steps.list
}
