//! What becomes of the jobs that wait: who starts now and where, who waits for what.
//!
//! In order of priority and then age each job gets the earliest start that the time limits of the others prove. A later job goes ahead
//! only on slots that are free until then, so that it delays nobody before it (conservative backfill). A job whose start nothing proves
//! keeps all nodes that it could use to itself. What not even all nodes together could hold waits for others to join and blocks nobody.

use super::Observed;
use super::timeline::{NEVER, Timeline};
use crate::cluster::State;
use crate::cluster::fit::{Room, fit};
use crate::cluster::members::NodeRecord;
use crate::cluster::records::JobRecord;
use fleet_common::ids::{JobId, NodeId};
use std::collections::BTreeMap;

/// A gang that has run out of time is told to stop, may save what it has, and is killed within this time at the latest.
pub const OVERRUN_MS: u64 = 60_000;
/// A node that is out of touch is back or lost after this long.
const AWAY_MS: u64 = super::LEASE_MS;
/// Waiting jobs for which a start is worked out; the others behind them wait. With the times that are tried this bounds a look at
/// 10,000 nodes to a tenth of a second.
const RESERVED_MAX: usize = 16;

/// What becomes of a job that waits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Placing {
    /// Starts now.
    On { parts: Vec<Room>, ahead_of: Option<JobId> },
    /// Values of its environment were removed, or are not in the backup from which the cluster was restored.
    Incomplete,
    /// Nobody who could take work is connected.
    NoNode,
    /// All nodes that take work could not hold it together.
    TooLarge,
    /// There is no room. `start_ms`: it starts at the latest after this long.
    Full { start_ms: Option<u64> },
    /// There is room, but it belongs to an earlier job.
    Behind { job: JobId, start_ms: Option<u64> },
}

/// Who starts and who waits, at one moment.
pub struct Outlook {
    placings: BTreeMap<JobId, Placing>,
    /// Slots in use, by node.
    pub(super) used: BTreeMap<NodeId, u32>,
}

impl Outlook {
    pub fn new(state: &State, observed: &Observed, unix_ms: u64) -> Outlook {
        let queue = state.queued_jobs();
        let mut started: BTreeMap<JobId, Placing> = BTreeMap::new();
        let used = state.slots_in_use();
        if queue.is_empty() {
            return Outlook { placings: started, used };
        }
        let now = timeline(state, observed, unix_ms);
        // A start can make room in the plan of others, since a job before it may then choose other nodes for later. Look again until
        // nothing new starts, so that a second look at the result finds nothing to do.
        loop {
            let mut line = now.clone();
            for (id, placing) in &started {
                if let (Placing::On { parts, .. }, Some(job)) = (placing, state.jobs().get(id)) {
                    hold(&mut line, job, parts, 0);
                }
            }
            let rest = queue.iter().copied().filter(|(id, _)| !started.contains_key(id));
            let placings = look(state, observed, line, rest);
            let before = started.len();
            let new = placings.iter().filter(|(_, placing)| matches!(placing, Placing::On { .. }));
            started.extend(new.map(|(id, placing)| (*id, placing.clone())));
            if started.len() == before {
                return Outlook { placings: placings.into_iter().chain(started).collect(), used };
            }
        }
    }

    pub fn placing(&self, job: JobId) -> Option<&Placing> {
        self.placings.get(&job)
    }

    pub fn starts(&self) -> impl Iterator<Item = (JobId, &[Room], Option<JobId>)> {
        self.placings.iter().filter_map(|(id, placing)| match placing {
            Placing::On { parts, ahead_of } => Some((*id, &parts[..], *ahead_of)),
            _ => None,
        })
    }
}

/// Nodes that can take work, connected or just out of touch, with what is held on them.
fn timeline(state: &State, observed: &Observed, unix_ms: u64) -> Timeline {
    let mut line = Timeline::default();
    for (id, _) in state.nodes().iter().filter(|(_, node)| can_work(node)) {
        line.add_node(*id, state.nodes()[id].slots);
        if !observed.connected(*id) {
            line.hold_all(*id, AWAY_MS);
        }
    }
    for job in state.jobs().values() {
        let Some(at) = job.placement.as_ref().filter(|_| !job.state.is_final()) else { continue };
        let left = job.wish.max_time_s.map(|seconds| {
            let ran = unix_ms.saturating_sub(at.placed_unix_ms);
            seconds.saturating_mul(1_000).saturating_add(OVERRUN_MS).saturating_sub(ran)
        });
        // One that is over its time already proves nothing.
        let left = left.filter(|left| *left > 0).unwrap_or(NEVER);
        job.slots().for_each(|(node, slots)| line.hold(node, slots, 0, left));
    }
    line
}

fn can_work(node: &NodeRecord) -> bool {
    !node.lost && !node.drained && node.slots > 0
}

/// How long the job holds its slots at most.
fn duration(job: &JobRecord) -> u64 {
    job.wish.max_time_s.map_or(NEVER, |seconds| seconds.saturating_mul(1_000).saturating_add(OVERRUN_MS))
}

fn hold(line: &mut Timeline, job: &JobRecord, parts: &[Room], from: u64) {
    for (node, ranks) in parts {
        line.hold(*node, ranks.saturating_mul(job.wish.slots_per_rank), from, duration(job));
    }
}

fn look<'a>(
    state: &State,
    observed: &Observed,
    mut line: Timeline,
    queue: impl Iterator<Item = (JobId, &'a JobRecord)>,
) -> BTreeMap<JobId, Placing> {
    let anyone = state.nodes().iter().any(|(id, node)| can_work(node) && observed.connected(*id));
    // Without what waiting jobs have set aside.
    let mut free_now = line.clone();
    let mut placings = BTreeMap::new();
    let mut first_waiting = None;
    let mut reserved = 0;
    for (id, job) in queue {
        if job.removed_secrets().next().is_some() {
            placings.insert(id, Placing::Incomplete);
            continue;
        }
        let each = job.wish.slots_per_rank.max(1);
        let fits = |nodes: &[NodeId], slots: &dyn Fn(NodeId) -> u32| {
            let room: Vec<Room> = nodes.iter().map(|node| (*node, slots(*node) / each)).collect();
            fit(&room, job.world_size, job.wish.nodes)
        };
        let suitable: Vec<NodeId> = state
            .nodes()
            .iter()
            .filter(|(_, node)| can_work(node) && node.suits(&job.wish))
            .map(|(id, _)| *id)
            .collect();
        if fits(&suitable, &|node| line.slots(node).unwrap_or_default()).is_none() {
            let placing = if anyone { Placing::TooLarge } else { Placing::NoNode };
            placings.insert(id, placing);
            continue;
        }
        if let (Some(first), true) = (first_waiting, reserved >= RESERVED_MAX) {
            placings.insert(id, Placing::Behind { job: first, start_ms: None });
            continue;
        }
        let duration = duration(job);
        if let Some(parts) = fits(&suitable, &|node| line.free(node, 0, duration)) {
            hold(&mut line, job, &parts, 0);
            hold(&mut free_now, job, &parts, 0);
            placings.insert(id, Placing::On { parts, ahead_of: first_waiting });
            continue;
        }
        let later = line.times().into_iter().find_map(|at| {
            let parts = fits(&suitable, &|node| line.free(node, at, duration))?;
            Some((at, parts))
        });
        let start_ms = later.as_ref().map(|(at, _)| *at);
        match later {
            Some((at, parts)) => hold(&mut line, job, &parts, at),
            // The least that it would put on a node; one with fewer slots is of no use to it.
            None => {
                let least =
                    job.wish.nodes.map_or(1, |nodes| job.world_size / nodes.max(1)).saturating_mul(each);
                let useful = |node: &&NodeId| line.slots(**node).is_some_and(|slots| slots >= least);
                let useful: Vec<NodeId> = suitable.iter().filter(useful).copied().collect();
                useful.into_iter().for_each(|node| line.claim(node));
            }
        }
        let room_now = fits(&suitable, &|node| free_now.free(node, 0, 1)).is_some();
        let placing = match first_waiting {
            Some(job) if room_now => Placing::Behind { job, start_ms },
            _ if !anyone => Placing::NoNode,
            _ => Placing::Full { start_ms },
        };
        placings.insert(id, placing);
        first_waiting.get_or_insert(id);
        reserved += 1;
    }
    placings
}
