//! When slots are free, as far as time limits prove it. Times are milliseconds from now.

use fleet_common::ids::NodeId;
use std::collections::{BTreeMap, BTreeSet};

/// For what nothing proves the end of.
pub const NEVER: u64 = u64::MAX;
/// Times at which the start of a waiting job is tried. Where there are more, some are left out, which proves a later start than
/// would be possible but never a wrong one.
const TIMES_MAX: usize = 16;

/// Slots that somebody holds on a node.
#[derive(Clone, Copy, Debug)]
struct Hold {
    from: u64,
    until: u64,
    slots: u32,
}

#[derive(Clone, Debug)]
struct Line {
    slots: u32,
    holds: Vec<Hold>,
    /// A job that is first in line for this node may start at any time.
    claimed: bool,
}

#[derive(Clone, Debug, Default)]
pub struct Timeline {
    nodes: BTreeMap<NodeId, Line>,
}

impl Timeline {
    pub fn add_node(&mut self, node: NodeId, slots: u32) {
        self.nodes.insert(node, Line { slots, holds: Vec::new(), claimed: false });
    }

    /// The slots are taken from `from` for `duration`.
    pub fn hold(&mut self, node: NodeId, slots: u32, from: u64, duration: u64) {
        if let Some(line) = self.nodes.get_mut(&node) {
            line.holds.push(Hold { from, until: from.saturating_add(duration), slots });
        }
    }

    pub fn hold_all(&mut self, node: NodeId, duration: u64) {
        if let Some(slots) = self.slots(node) {
            self.hold(node, slots, 0, duration);
        }
    }

    /// Nobody else may count on this node.
    pub fn claim(&mut self, node: NodeId) {
        if let Some(line) = self.nodes.get_mut(&node) {
            line.claimed = true;
        }
    }

    pub fn slots(&self, node: NodeId) -> Option<u32> {
        self.nodes.get(&node).map(|line| line.slots)
    }

    /// Slots of `node` that are free over the whole of `from..from + duration`.
    pub fn free(&self, node: NodeId, from: u64, duration: u64) -> u32 {
        let Some(line) = self.nodes.get(&node).filter(|line| !line.claimed) else { return 0 };
        let until = from.saturating_add(duration);
        let taken_at = |at: u64| -> u32 {
            let there = line.holds.iter().filter(|hold| hold.from <= at && at < hold.until);
            there.fold(0, |sum, hold| sum.saturating_add(hold.slots))
        };
        let begins = line.holds.iter().map(|hold| hold.from).filter(|at| (from..until).contains(at));
        let most = begins.chain([from]).map(taken_at).max().unwrap_or_default();
        line.slots.saturating_sub(most)
    }

    /// When slots become free, soonest first.
    pub fn times(&self) -> Vec<u64> {
        let ends = self.nodes.values().flat_map(|line| &line.holds).map(|hold| hold.until);
        let ends: Vec<u64> = ends.filter(|at| *at < NEVER).collect::<BTreeSet<_>>().into_iter().collect();
        let stride = ends.len().div_ceil(TIMES_MAX).max(1);
        // From the end, so that the last one is among them.
        let mut some: Vec<u64> = ends.into_iter().rev().step_by(stride).collect();
        some.reverse();
        some
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NODE: NodeId = NodeId(1);

    #[test]
    fn free_is_what_nobody_holds_at_any_time_of_the_span() {
        let mut line = Timeline::default();
        line.add_node(NODE, 8);
        line.hold(NODE, 3, 0, 100);
        line.hold(NODE, 4, 50, 100);
        assert_eq!(line.free(NODE, 0, 50), 5);
        assert_eq!(line.free(NODE, 0, 51), 1);
        assert_eq!(line.free(NODE, 100, 10), 4);
        assert_eq!(line.free(NODE, 150, NEVER), 8);
        assert_eq!(line.times(), [100, 150]);
        line.hold(NODE, 1, 0, NEVER);
        assert_eq!(line.free(NODE, 150, NEVER), 7);
        assert_eq!(line.times(), [100, 150], "what never ends is no time to start");
        line.claim(NODE);
        assert_eq!(line.free(NODE, 150, 1), 0);
    }

    #[test]
    fn few_times_are_tried_and_the_last_is_among_them() {
        let mut line = Timeline::default();
        line.add_node(NODE, 1_000);
        (1..=500).for_each(|at| line.hold(NODE, 1, 0, at));
        let times = line.times();
        assert!(times.len() <= TIMES_MAX && times.last() == Some(&500), "{times:?}");
    }
}
