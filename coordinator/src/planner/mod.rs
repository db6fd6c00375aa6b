//! Decides what should happen next. Pure: it looks at the state, at what has been observed and at the time, and returns commands, each
//! with its reason. It never waits, sends or writes. The same input gives the same plan, and once a plan is carried out there is
//! nothing left to do at that moment.
//!
//! Order is priority, then age. All ranks of a job get a place or none does; few nodes are better than many. Nothing that runs is
//! interrupted for something else. `outlook` says who starts and why the others wait.

mod explain;
mod outlook;
mod timeline;

pub use explain::ended;
pub use outlook::{OVERRUN_MS, Outlook, Placing};

use crate::cluster::commands::{AssignGang, BreakOff, Change, ForceStop, MarkNodeLost};
use crate::cluster::{Command, State};
use fleet_common::ids::{Generation, JobId, NodeId};
use std::collections::BTreeMap;

/// A node that is silent for this long is lost with its jobs. Long enough for a coordinator to restart and an agent to find it.
pub const LEASE_MS: u64 = 10_000;

/// A worker that was told of its part of a gang on several nodes says within this time where its ranks can be called, which takes it a moment.
pub const REPORT_MS: u64 = 60_000;

/// A gang that was asked to stop and stands still has so long to go on, which is what the ranks have that a signal stops.
pub const STUCK_MS: u64 = 10_000;

/// Why the planner wants a command; logged, and shown by `fleet status`.
pub type Why = String;

/// What this leader has seen, in milliseconds of its own monotonic clock. Gone with it.
#[derive(Clone, Debug, Default)]
pub struct Observed {
    pub nodes: BTreeMap<NodeId, Seen>,
    /// Since when each node that should be there could have been heard. Nobody is called silent for longer than that, and who is not
    /// in it not at all.
    pub counted_from_ms: BTreeMap<NodeId, u64>,
    /// Since when each part of a gang could have said where its ranks can be called, and has not. Nobody who is not in it is late.
    pub unreported_ms: BTreeMap<PartId, u64>,
    /// Since when each gang that was asked to stop stands still.
    pub stuck_ms: BTreeMap<(JobId, Generation), u64>,
}

/// A gang's part on this node.
pub type PartId = ((JobId, Generation), NodeId);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    pub connected: bool,
    /// Last sign of life.
    pub heard_ms: u64,
}

impl Observed {
    pub fn connected(&self, node: NodeId) -> bool {
        self.nodes.get(&node).is_some_and(|seen| seen.connected)
    }

    fn silent_ms(&self, node: NodeId, now_ms: u64) -> u64 {
        let Some(counted_from_ms) = self.counted_from_ms.get(&node) else { return 0 };
        match self.nodes.get(&node) {
            Some(seen) if seen.connected => 0,
            Some(seen) => now_ms.saturating_sub(seen.heard_ms.max(*counted_from_ms)),
            None => now_ms.saturating_sub(*counted_from_ms),
        }
    }
}

/// The commands that the state and the observations call for at `now_ms` of the leader's clock and `unix_ms` of the world's.
pub fn plan(state: &State, observed: &Observed, now_ms: u64, unix_ms: u64) -> Vec<(Change, Why)> {
    let mut decisions = lost_nodes(state, observed, now_ms);
    decisions.extend(late_parts(state, observed, now_ms));
    decisions.extend(stuck_stops(state, observed, now_ms));
    if decisions.is_empty() {
        decisions.extend(starts(state, observed, unix_ms));
        return decisions;
    }
    // Who starts follows from what there will be without them.
    let mut without = state.clone();
    for (change, _) in &decisions {
        let command = Command { unix_ms, request: None, by: None, why: None, change: change.clone() };
        without.apply(0, command);
    }
    decisions.extend(starts(&without, observed, unix_ms));
    decisions
}

fn starts(state: &State, observed: &Observed, unix_ms: u64) -> Vec<(Change, Why)> {
    let outlook = Outlook::new(state, observed, unix_ms);
    let starts = outlook.starts().filter_map(|(id, parts, ahead_of)| {
        let generation = state.jobs().get(&id)?.generation + 1;
        let why = why(state, id, parts, ahead_of);
        Some((Change::AssignGang(AssignGang { job: id, generation, parts: parts.to_vec() }), why))
    });
    starts.collect()
}

/// A sentence on how a job stands: why it waits, what it does, how it ended.
pub fn explain(state: &State, observed: &Observed, unix_ms: u64, id: JobId) -> String {
    Outlook::new(state, observed, unix_ms).explain(state, observed, id)
}

fn why(state: &State, id: JobId, parts: &[(NodeId, u32)], ahead_of: Option<JobId>) -> Why {
    let ranks: u32 = parts.iter().map(|(_, ranks)| ranks).sum();
    let nodes = explain::names(state, parts.iter().map(|(node, _)| *node));
    let ranks = if ranks == 1 { "1 rank".to_owned() } else { format!("{ranks} ranks") };
    let place = format!("{id} starts with {ranks} on {nodes}: the tightest place with room for all of them");
    match ahead_of {
        None => place,
        Some(first) => format!("{place}; it goes ahead of {first}, which it cannot delay"),
    }
}

fn lost_nodes(state: &State, observed: &Observed, now_ms: u64) -> Vec<(Change, Why)> {
    let expected = state.nodes().iter().filter(|(_, record)| !record.lost);
    let silent = expected.filter_map(|(node, record)| {
        let silent_ms = observed.silent_ms(*node, now_ms);
        (silent_ms >= LEASE_MS).then(|| {
            let why = format!("node {} ({node}) was not heard for {silent_ms} ms", record.name);
            (Change::MarkNodeLost(MarkNodeLost { node: *node, silent_ms }), why)
        })
    });
    silent.collect()
}

fn late_parts(state: &State, observed: &Observed, now_ms: u64) -> Vec<(Change, Why)> {
    let late = state.unreported().filter_map(|part| {
        let waited_ms = now_ms.saturating_sub(*observed.unreported_ms.get(&part)?);
        let ((job, generation), node) = part;
        (waited_ms >= REPORT_MS).then(|| {
            let name = state.node_name(node);
            let why = format!("node {name} ({node}) has not reported of {job} for {waited_ms} ms");
            (Change::BreakOff(BreakOff { job, generation, node, waited_ms }), why)
        })
    });
    late.collect()
}

fn stuck_stops(state: &State, observed: &Observed, now_ms: u64) -> Vec<(Change, Why)> {
    let stuck = state.stuck_stops().filter_map(|gang| {
        let waited_ms = now_ms.saturating_sub(*observed.stuck_ms.get(&gang)?);
        let (job, generation) = gang;
        (waited_ms >= STUCK_MS).then(|| {
            let why = format!("{job} was asked to stop and has stood still for {waited_ms} ms");
            (Change::ForceStop(ForceStop { job, generation, waited_ms }), why)
        })
    });
    stuck.collect()
}

#[cfg(test)]
mod tests;
