//! Inside the hosts and across them. On each host every rank carries a share of what belongs to other hosts, so that all ranks of a host
//! send across at once, and a byte crosses between two hosts as rarely as in a ring of hosts.

use super::{Algorithm, Group, Kind, Ranges, Step, Steps, Topology, Work, ring, tree};
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

/// Inside: everybody gets the host's sum of what it carries. Across: each part goes around the hosts and ends at its rank.
pub fn reduce_scatter(steps: &mut Steps, topology: &Topology, rank: usize, parts: &[Range<usize>]) {
    let locals = topology.ranks_of(topology.host_of(rank));
    let local = Group { ranks: locals, me: topology.place_of(rank) };
    ring::reduce_scatter(steps, local, |place| merged(topology, locals[place], parts));
    let (hosts, mine) = (Ring::of(topology, rank), Carried::of(topology, rank, parts));
    for step in 1..hosts.len {
        for owner in mine.of_host(hosts.before(step)) {
            let to = topology.carrier(hosts.after(1), owner);
            steps.push_all(Kind::Send, to, vec![parts[owner].clone()]);
        }
        for owner in mine.of_host(hosts.before(step + 1)) {
            let from = topology.carrier(hosts.before(1), owner);
            steps.push_all(Kind::Reduce(First::Received), from, vec![parts[owner].clone()]);
        }
    }
}

/// Backwards: each part goes around the hosts, then around inside.
pub fn all_gather(steps: &mut Steps, topology: &Topology, rank: usize, parts: &[Range<usize>]) {
    let (hosts, mine) = (Ring::of(topology, rank), Carried::of(topology, rank, parts));
    for step in 1..hosts.len {
        for owner in mine.of_host(hosts.before(step - 1)) {
            let to = topology.carrier(hosts.after(1), owner);
            steps.push_all(Kind::Send, to, vec![parts[owner].clone()]);
        }
        for owner in mine.of_host(hosts.before(step)) {
            let from = topology.carrier(hosts.before(1), owner);
            steps.push_all(Kind::Receive, from, vec![parts[owner].clone()]);
        }
    }
    let locals = topology.ranks_of(topology.host_of(rank));
    let local = Group { ranks: locals, me: topology.place_of(rank) };
    ring::all_gather(steps, local, |place| merged(topology, locals[place], parts));
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

/// The parts that one rank carries, by the host of those to whom they belong.
struct Carried {
    by_host: Vec<Vec<usize>>,
}

impl Carried {
    fn of(topology: &Topology, rank: usize, parts: &[Range<usize>]) -> Carried {
        let mut by_host = vec![Vec::new(); topology.hosts()];
        for owner in carried(topology, rank, parts) {
            by_host[topology.host_of(owner)].push(owner);
        }
        Carried { by_host }
    }

    fn of_host(&self, host: usize) -> impl Iterator<Item = usize> + '_ {
        self.by_host[host].iter().copied()
    }
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
                Algorithm::Halving => {
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
