//! In a logarithmic number of rounds.

use super::{Group, Kind, Steps};
use crate::memory::reduce::First;
use std::ops::Range;

/// Recursive doubling. Where the number of ranks is no power of two, the first ranks go in pairs: one of each gives its numbers to the
/// other before, and gets the result after. Both sides of an exchange add in the same order, so all get the same bits.
pub fn all_reduce(steps: &mut Steps, group: Group, range: Range<usize>) {
    let (n, me) = (group.len(), group.me);
    let power = 1 << n.ilog2();
    let paired = 2 * (n - power);
    if me < paired && !me.is_multiple_of(2) {
        steps.push(Kind::Send, group.ranks[me - 1], range.clone());
        steps.push(Kind::Receive, group.ranks[me - 1], range);
        return;
    }
    if me < paired {
        steps.push(Kind::Reduce(First::Own), group.ranks[me + 1], range.clone());
    }
    let place = if me < paired { me / 2 } else { me - paired / 2 };
    let rank = |place: usize| group.ranks[if place < paired / 2 { place * 2 } else { place + paired / 2 }];
    let mut distance = 1;
    while distance < power {
        let other = place ^ distance;
        let first = if other < place { First::Received } else { First::Own };
        steps.push(Kind::Send, rank(other), range.clone());
        steps.push(Kind::Reduce(first), rank(other), range.clone());
        distance *= 2;
    }
    if me < paired {
        steps.push(Kind::Send, group.ranks[me + 1], range);
    }
}

/// The parts of `count` places from `first` on, around: one range, or two.
fn around(parts: &[Range<usize>], first: usize, count: usize) -> impl Iterator<Item = Range<usize>> {
    let (n, end) = (parts.len(), first + count);
    let run = |from: usize, to: usize| parts[from].start..parts[to - 1].end;
    let one = (count > 0).then(|| run(first, end.min(n)));
    one.into_iter().chain((end > n).then(|| run(0, end - n)))
}

/// The rounds of Bruck's algorithm: how far the partner is, and how many parts are exchanged.
pub fn rounds(n: usize) -> impl DoubleEndedIterator<Item = (usize, usize)> {
    let count = if n < 2 { 0 } else { (n - 1).ilog2() + 1 };
    (0..count).map(move |round| (1 << round, (1 << round).min(n - (1 << round))))
}

/// After each round a rank has twice as many parts, from its own on.
pub fn all_gather(steps: &mut Steps, group: Group, parts: &[Range<usize>]) {
    for (distance, count) in rounds(group.len()) {
        let (to, from) = (group.before(distance), group.after(distance));
        around(parts, group.me, count).for_each(|range| steps.push(Kind::Send, group.ranks[to], range));
        around(parts, from, count).for_each(|range| steps.push(Kind::Receive, group.ranks[from], range));
    }
}

/// `all_gather` backwards: what was a tree that spreads a part is one that sums it.
pub fn reduce_scatter(steps: &mut Steps, group: Group, parts: &[Range<usize>]) {
    for (distance, count) in rounds(group.len()).rev() {
        let (to, from) = (group.after(distance), group.before(distance));
        around(parts, to, count).for_each(|range| steps.push(Kind::Send, group.ranks[to], range));
        around(parts, group.me, count)
            .for_each(|range| steps.push(Kind::Reduce(First::Own), group.ranks[from], range));
    }
}

/// A binomial tree.
pub fn broadcast(steps: &mut Steps, group: Group, root: usize, range: Range<usize>) {
    let (n, turned) = (group.len(), group.from(root));
    let me = turned.me();
    let below = if me == 0 { n.next_power_of_two() } else { 1 << me.trailing_zeros() };
    if me > 0 {
        steps.push(Kind::Receive, turned.rank(me - below), range.clone());
    }
    let mut distance = below / 2;
    while distance > 0 {
        if me + distance < n {
            steps.push(Kind::Send, turned.rank(me + distance), range.clone());
        }
        distance /= 2;
    }
}

/// Dissemination: after round k a rank has heard, by way of others, of 2^k ranks. The byte orders the rounds.
pub fn barrier(steps: &mut Steps, group: Group) {
    for (distance, _) in rounds(group.len()) {
        steps.push(Kind::Send, group.ranks[group.after(distance)], 0..1);
        steps.push(Kind::Receive, group.ranks[group.before(distance)], 0..1);
    }
}
