//! Around a ring, and pairwise: every byte goes over as few links as it can, in as many messages as there are ranks.

use super::{Group, Kind, Ranges, Steps, Turned};
use crate::memory::reduce::First;
use std::ops::Range;

/// Chunk `i` goes around from the rank behind place `i` and arrives there with all ranks' numbers in it, summed in the order of the way.
pub fn reduce_scatter(steps: &mut Steps, group: Group, chunk: impl Fn(usize) -> Ranges) {
    let (right, left) = (group.ranks[group.after(1)], group.ranks[group.before(1)]);
    for step in 1..group.len() {
        steps.push_all(Kind::Send, right, chunk(group.before(step)));
        steps.push_all(Kind::Reduce(First::Received), left, chunk(group.before(step + 1)));
    }
}

pub fn all_gather(steps: &mut Steps, group: Group, chunk: impl Fn(usize) -> Ranges) {
    let (right, left) = (group.ranks[group.after(1)], group.ranks[group.before(1)]);
    for step in 1..group.len() {
        steps.push_all(Kind::Send, right, chunk(group.before(step - 1)));
        steps.push_all(Kind::Receive, left, chunk(group.before(step)));
    }
}

/// A chain: each hands on what it gets while it comes.
pub fn broadcast(steps: &mut Steps, group: Turned, range: Range<usize>) {
    let me = group.me();
    if me > 0 {
        steps.push(Kind::Receive, group.rank(me - 1), range.clone());
    }
    if me + 1 < group.group.len() {
        steps.push(Kind::Send, group.rank(me + 1), range);
    }
}

/// Everybody with everybody, each time with others. A rank's own part is its driver's to copy.
pub fn all_to_all(steps: &mut Steps, group: Group, bytes: usize) {
    let (world, half) = (group.len(), bytes / 2);
    let size = half / world;
    for distance in 1..world {
        let (to, from) = (group.after(distance), group.before(distance));
        steps.push(Kind::Send, group.ranks[to], to * size..(to + 1) * size);
        steps.push(Kind::Receive, group.ranks[from], half + from * size..half + (from + 1) * size);
    }
}
