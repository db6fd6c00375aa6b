//! Decides what should happen next. Pure: it looks at the state, at what the leader has observed and at the time, and returns
//! commands, each with its reason. It never waits, sends or writes.
//!
//! Order is age. A job that fits nowhere now holds back the younger ones, so that it is not overtaken for ever; one that is larger
//! than every node there is does not.

use crate::cluster::State;
use crate::cluster::commands::{AssignGang, Change, MarkNodeLost};
use fleet_common::ids::{JobId, NodeId};
use fleet_common::protocol::JobState;
use std::collections::BTreeMap;

/// A node that is silent for this long is lost with its jobs. Long enough for a coordinator to restart and an agent to find it.
pub const LEASE_MS: u64 = 10_000;

/// Why the planner wants a command; logged, and shown by `fleet status`.
pub type Why = String;

/// What this leader has seen, in milliseconds of its own monotonic clock. Gone with it.
#[derive(Clone, Debug, Default)]
pub struct Observed {
    /// Since when this replica leads. Nobody is called silent for longer than that.
    pub leader_since_ms: u64,
    pub nodes: BTreeMap<NodeId, Seen>,
}

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
        match self.nodes.get(&node) {
            Some(seen) if seen.connected => 0,
            Some(seen) => now_ms.saturating_sub(seen.heard_ms.max(self.leader_since_ms)),
            None => now_ms.saturating_sub(self.leader_since_ms),
        }
    }
}

/// The commands that the state and the observations call for at `now_ms`.
pub fn plan(state: &State, observed: &Observed, now_ms: u64) -> Vec<(Change, Why)> {
    let mut decisions = lost_nodes(state, observed, now_ms);
    for (job, placing) in place(state, observed) {
        if let Placing::On { node, generation } = placing {
            let why =
                format!("{job} goes to {} ({node}), which has enough free slots", state.node_name(node));
            decisions.push((Change::AssignGang(AssignGang { job, node, generation }), why));
        }
    }
    decisions
}

/// Slots of the largest node that is connected; `None` when none is.
pub fn largest_node(state: &State, observed: &Observed) -> Option<u32> {
    usable(state, observed).map(|(_, slots)| slots).max()
}

/// A sentence on how a job stands: why it waits, what it does, how it ended.
pub fn explain(state: &State, observed: &Observed, id: JobId) -> String {
    let Some(job) = state.jobs().get(&id) else { return format!("there is no {id}") };
    let node = || job.placement.map_or_else(String::new, |at| state.node_name(at.node));
    let silent = job.placement.is_some_and(|at| !observed.connected(at.node));
    let beware = if silent { format!("; {} is out of touch at the moment", node()) } else { String::new() };
    match job.state {
        JobState::Queued => place(state, observed)
            .remove(&id)
            .map_or_else(String::new, |placing| placing.sentence(state, job.world_size)),
        JobState::Starting => {
            format!("node {} prepares the data and starts {} ranks{beware}", node(), job.world_size)
        }
        JobState::Running => match job.progress.total_steps {
            0 => format!("{} ranks run on node {}{beware}", job.world_size, node()),
            total => format!(
                "step {} of {total} with {} ranks on node {}{beware}",
                job.progress.step,
                job.world_size,
                node()
            ),
        },
        JobState::Stopping => {
            format!("asked to stop; node {} writes a checkpoint if there is time{beware}", node())
        }
        JobState::Succeeded => format!("done after {} steps", job.progress.step),
        JobState::Cancelled => format!("stopped on request after {} steps", job.progress.step),
        JobState::Failed => {
            job.error.as_ref().map_or_else(|| "failed".to_owned(), |error| error.message.clone())
        }
    }
}

fn lost_nodes(state: &State, observed: &Observed, now_ms: u64) -> Vec<(Change, Why)> {
    let silent = state.nodes().iter().filter(|(_, record)| !record.lost).filter_map(|(node, record)| {
        let silent_ms = observed.silent_ms(*node, now_ms);
        (silent_ms >= LEASE_MS).then(|| {
            let why = format!("node {} ({node}) was not heard for {silent_ms} ms", record.name);
            (Change::MarkNodeLost(MarkNodeLost { node: *node, silent_ms }), why)
        })
    });
    silent.collect()
}

/// What becomes of a job that waits.
enum Placing {
    On { node: NodeId, generation: u64 },
    NoNode,
    TooLarge { largest: u32 },
    Full { best: NodeId, free: u32 },
    Behind(JobId),
}

impl Placing {
    fn sentence(&self, state: &State, ranks: u32) -> String {
        match self {
            Placing::On { node, .. } => format!("about to start on node {}", state.node_name(*node)),
            Placing::NoNode => "waits for a node: none is connected; start one with `worker join`".to_owned(),
            Placing::TooLarge { largest } => {
                format!(
                    "waits for a larger node: it has {ranks} ranks, and the largest connected node has {largest} slots"
                )
            }
            Placing::Full { best, free } => {
                format!(
                    "waits for free slots: it needs {ranks} on one node, and {} has {free} free",
                    state.node_name(*best)
                )
            }
            Placing::Behind(job) => format!("waits behind {job}, which was submitted earlier"),
        }
    }
}

/// Nodes that can take work, with all their slots.
fn usable(state: &State, observed: &Observed) -> impl Iterator<Item = (NodeId, u32)> {
    let nodes =
        state.nodes().iter().filter(|(id, node)| !node.lost && node.slots > 0 && observed.connected(**id));
    nodes.map(|(id, node)| (*id, node.slots))
}

fn place(state: &State, observed: &Observed) -> BTreeMap<JobId, Placing> {
    let used = state.slots_in_use();
    let free =
        |(id, slots): (NodeId, u32)| (id, slots.saturating_sub(used.get(&id).copied().unwrap_or_default()));
    let mut free: BTreeMap<NodeId, u32> = usable(state, observed).map(free).collect();
    let largest = largest_node(state, observed);
    let mut first_waiting = None;
    let mut placings = BTreeMap::new();
    for (id, job) in state.queued_jobs() {
        let ranks = job.world_size;
        // The fullest node that still fits: it keeps large holes for large jobs.
        let fit = free
            .iter()
            .filter(|(_, free)| **free >= ranks)
            .min_by_key(|(node, free)| (**free, **node))
            .map(|(node, _)| *node);
        let placing = match (largest, first_waiting, fit) {
            (None, _, _) => Placing::NoNode,
            (Some(largest), _, _) if largest < ranks => Placing::TooLarge { largest },
            (_, Some(earlier), _) => Placing::Behind(earlier),
            (_, None, Some(node)) => {
                free.entry(node).and_modify(|free| *free -= ranks);
                Placing::On { node, generation: job.generation() + 1 }
            }
            (_, None, None) => {
                first_waiting = Some(id);
                let best = free.iter().max_by_key(|(_, free)| **free).map(|(node, free)| (*node, *free));
                best.map_or(Placing::NoNode, |(best, free)| Placing::Full { best, free })
            }
        };
        placings.insert(id, placing);
    }
    placings
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::commands::DescribeNode;
    use crate::cluster::tests::{Script, redeem, token};
    use fleet_common::protocol::Role;

    /// Node 1 has `slots[0]`, and so on.
    fn cluster(slots: &[u32]) -> Script {
        let mut script = Script::new();
        script.run(token("w", Role::Worker, 99));
        for (at, slots) in slots.iter().enumerate() {
            let name = format!("n{}", at + 1);
            script.run(redeem("w", &name));
            let node = NodeId(at as u64 + 1);
            let (device, version) = ("cpu".into(), "0".into());
            script.run(Change::DescribeNode(DescribeNode { node, name, slots: *slots, device, version }));
        }
        script
    }

    fn all_connected(script: &Script) -> Observed {
        let seen = Seen { connected: true, heard_ms: 0 };
        Observed { leader_since_ms: 0, nodes: script.state.nodes().keys().map(|id| (*id, seen)).collect() }
    }

    /// Plans and carries it out.
    fn settle(script: &mut Script, observed: &Observed) -> Vec<(u64, u64)> {
        let mut placed = Vec::new();
        for (change, _) in plan(&script.state, observed, 0) {
            if let Change::AssignGang(assign) = &change {
                placed.push((assign.job.0, assign.node.0));
            }
            assert_eq!(script.run(change), crate::cluster::Answer::Done);
        }
        placed
    }

    #[test]
    fn jobs_go_to_the_tightest_node_that_fits() {
        let mut script = cluster(&[8, 4, 2]);
        for ranks in [3, 2, 8] {
            script.submit(ranks);
        }
        let observed = all_connected(&script);
        assert_eq!(settle(&mut script, &observed), [(1, 2), (2, 3), (3, 1)]);
        assert!(plan(&script.state, &observed, 0).is_empty());
    }

    #[test]
    fn a_waiting_job_is_not_overtaken_and_every_wait_has_a_reason() {
        let mut script = cluster(&[4]);
        let jobs: Vec<JobId> = [3, 2, 1].map(|ranks| script.submit(ranks)).into();
        let observed = all_connected(&script);
        assert_eq!(settle(&mut script, &observed), [(1, 1)]);
        assert_eq!(
            explain(&script.state, &observed, jobs[1]),
            "waits for free slots: it needs 2 on one node, and n1 has 1 free"
        );
        assert_eq!(
            explain(&script.state, &observed, jobs[2]),
            "waits behind job-2, which was submitted earlier"
        );
    }

    #[test]
    fn a_job_too_large_for_every_node_blocks_nobody() {
        let mut script = cluster(&[2]);
        let large = script.submit(16);
        script.submit(2);
        let observed = all_connected(&script);
        assert_eq!(settle(&mut script, &observed), [(2, 1)]);
        assert!(explain(&script.state, &observed, large).contains("largest connected node has 2 slots"));
    }

    #[test]
    fn a_node_out_of_touch_gets_no_work() {
        let mut script = cluster(&[4]);
        let job = script.submit(1);
        let observed = Observed::default();
        assert!(plan(&script.state, &observed, LEASE_MS - 1).is_empty());
        assert!(explain(&script.state, &observed, job).contains("none is connected"));
        assert_eq!(largest_node(&script.state, &observed), None);
    }

    #[test]
    fn nobody_is_lost_before_a_whole_lease_of_this_leader() {
        let script = cluster(&[4]);
        let mut observed = Observed { leader_since_ms: 5_000, ..Observed::default() };
        assert!(plan(&script.state, &observed, 5_000 + LEASE_MS - 1).is_empty());
        assert!(matches!(
            &plan(&script.state, &observed, 5_000 + LEASE_MS)[..],
            [(Change::MarkNodeLost(_), _)]
        ));
        observed.nodes.insert(NodeId(1), Seen { connected: false, heard_ms: 9_000 });
        assert!(plan(&script.state, &observed, 9_000 + LEASE_MS - 1).is_empty());
        assert!(matches!(
            &plan(&script.state, &observed, 9_000 + LEASE_MS)[..],
            [(Change::MarkNodeLost(_), _)]
        ));
    }
}
