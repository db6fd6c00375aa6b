//! How a job stands, in a sentence: why it waits, what it does, how it ended.

use super::Observed;
use super::outlook::{Outlook, Placing};
use crate::cluster::State;
use crate::cluster::members::NodeRecord;
use crate::cluster::records::{JobRecord, Stop};
use fleet_common::events::Outcome;
use fleet_common::ids::{JobId, NodeId};
use fleet_common::protocol::{JobState, Wish, listed};

impl Outlook {
    /// Empty for a job that is not in the state.
    pub fn explain(&self, state: &State, observed: &Observed, id: JobId) -> String {
        let Some(job) = state.jobs().get(&id) else { return String::new() };
        let ranks = count(job.world_size, "rank");
        let nodes = || nodes_of(state, job);
        let beware = beware(state, observed, job);
        match job.state {
            JobState::Queued => {
                let waits = self.placing(id).map(|placing| self.sentence(placing, state, observed, id, job));
                let again = if job.generation > 0 {
                    format!("; has been started {}", times(job.generation))
                } else {
                    String::new()
                };
                format!("{}{again}", waits.unwrap_or_default())
            }
            JobState::Starting if job.trains => {
                format!("preparing data for {ranks} on {}{beware}", nodes())
            }
            JobState::Starting => format!("starting {ranks} on {}{beware}", nodes()),
            JobState::Running => match job.progress.total_steps {
                0 => format!(
                    "{ranks} {} on {}{beware}",
                    if job.world_size == 1 { "runs" } else { "run" },
                    nodes()
                ),
                total => format!("step {} of {total} with {ranks} on {}{beware}", job.progress.step, nodes()),
            },
            JobState::Stopping if job.requeue => {
                format!(
                    "goes back to the queue, since a node is drained; what it has is saved on {} if there is time{beware}",
                    nodes()
                )
            }
            JobState::Stopping if let Some(why) = broken_off(job) => {
                format!("{why}; its ranks are being stopped{beware}")
            }
            JobState::Stopping if job.stop == Some(Stop::Now) && job.stall().is_some() => {
                format!(
                    "asked to stop, it stood still; it is ended without a checkpoint on {}{beware}",
                    nodes()
                )
            }
            JobState::Stopping if job.ending.is_some() => {
                format!("a part of it has ended; the others are being stopped{beware}")
            }
            JobState::Stopping => {
                format!("asked to stop; a checkpoint is written on {} if there is time{beware}", nodes())
            }
            JobState::Succeeded | JobState::Failed | JobState::Cancelled => ended(job),
        }
    }

    fn sentence(
        &self,
        placing: &Placing,
        state: &State,
        observed: &Observed,
        id: JobId,
        job: &JobRecord,
    ) -> String {
        match placing {
            Placing::On { parts, .. } => {
                format!("about to start on {}", names(state, parts.iter().map(|(node, _)| *node)))
            }
            Placing::Incomplete => {
                let names = listed(job.removed_secrets());
                format!(
                    "waits for secrets that are not kept any more ({names}); give them again with `fleet secrets give {id} --env NAME`"
                )
            }
            Placing::NoNode => {
                let cure = match idle(state, observed, &job.wish) {
                    none if none.is_empty() => "; start one with `worker join`".to_owned(),
                    idle => idle,
                };
                format!("waits for a node: none that takes work is connected{cure}")
            }
            Placing::TooLarge => {
                let idle = idle(state, observed, &job.wish);
                let join = if idle.is_empty() { " to join" } else { "" };
                format!("waits for more nodes{join}: {}{idle}", self.needs(state, job, None))
            }
            Placing::Full { start_ms } => {
                format!(
                    "waits for free slots: {}{}",
                    self.needs(state, job, Some(observed)),
                    at_latest(*start_ms)
                )
            }
            Placing::Behind { job: first, start_ms } => {
                let order = match state.jobs().get(first) {
                    Some(other) if other.wish.priority > job.wish.priority => "has a higher priority",
                    _ if *first < id => "was submitted earlier",
                    _ => "comes first",
                };
                format!("waits behind {first}, which {order}{}", at_latest(*start_ms))
            }
        }
    }

    /// What the job needs and what there is: free slots, or all slots where it is not about those.
    fn needs(&self, state: &State, job: &JobRecord, free: Option<&Observed>) -> String {
        let takes_work = |id: NodeId| free.is_none_or(|observed| observed.connected(id));
        let nodes = state.nodes().iter().filter(|(id, node)| !node.lost && !node.drained && takes_work(**id));
        let suitable = nodes.filter(|(_, node)| node.slots > 0 && node.suits(&job.wish));
        let each = job.wish.slots_per_rank.max(1);
        // In places for one rank.
        let places: Vec<(&str, u32)> = suitable
            .map(|(id, node)| {
                let used = if free.is_some() { self.used.get(id).copied().unwrap_or_default() } else { 0 };
                (node.name.as_str(), node.slots.saturating_sub(used) / each)
            })
            .collect();
        let like = labels(&job.wish);
        let amount = |ranks: u32| match (each, ranks) {
            (1, _) => ranks.to_string(),
            (_, 1) => format!("1 place of {each} slots"),
            _ => format!("{ranks} places of {each} slots each"),
        };
        let needed = amount(job.world_size);
        let what = if free.is_some() { " free" } else { "" };
        let best = places.iter().max_by_key(|(_, places)| *places);
        match (best, job.wish.nodes) {
            (None, _) => {
                let slots = count(job.world_size.saturating_mul(each), "slot");
                format!("it needs {slots}{like}, and there is no such node")
            }
            (Some((name, best)), Some(1)) => {
                format!("it needs {needed} on one node{like}, and {name} has {best}{what}")
            }
            (Some((name, best)), Some(nodes)) => {
                let on_each = amount(job.world_size / nodes.max(1));
                format!(
                    "it needs {on_each} on each of {nodes} nodes{like}, and of {} the best, {name}, has {best}{what}",
                    places.len()
                )
            }
            (Some(_), None) => {
                let sum: u64 = places.iter().map(|(_, places)| u64::from(*places)).sum();
                let all = if places.len() == 1 {
                    "one node has".to_owned()
                } else {
                    format!("{} nodes together have", places.len())
                };
                format!("it needs {needed}{like}, and {all} {sum}{what}")
            }
        }
    }
}

/// Why a job cannot go on though none of its parts has ended.
fn broken_off(job: &JobRecord) -> Option<&str> {
    let whole = job.placement.as_ref().is_some_and(|at| at.parts.iter().all(|part| !part.finished));
    match &job.ending {
        Some(Outcome::Failed(error)) if whole => Some(&error.message),
        _ => None,
    }
}

/// How a job ended.
pub fn ended(job: &JobRecord) -> String {
    match (&job.state, &job.error) {
        (JobState::Cancelled, _) if job.trains => {
            format!("stopped on request after {} steps", job.progress.step)
        }
        (JobState::Cancelled, _) => "stopped on request".to_owned(),
        (JobState::Failed, Some(error)) => error.message.clone(),
        (JobState::Failed, None) => "failed".to_owned(),
        _ if job.trains => format!("done after {} steps", job.progress.step),
        _ => "done".to_owned(),
    }
}

/// Nodes that the job could use if they took work, and what to do about it.
fn idle(state: &State, observed: &Observed, wish: &Wish) -> String {
    let told = |is: &dyn Fn(NodeId, &NodeRecord) -> bool, one: &str, several: &str| {
        let nodes = state.nodes().iter().filter(|(id, node)| node.suits(wish) && is(**id, node));
        let nodes: Vec<NodeId> = nodes.map(|(id, _)| *id).collect();
        match nodes.len() {
            0 => String::new(),
            1 => format!("; {} is {one}", names(state, nodes.into_iter())),
            _ => format!("; {} are {several}", names(state, nodes.into_iter())),
        }
    };
    let drained = told(
        &|_, node| node.drained && !node.lost,
        "drained (`fleet undrain` takes it back)",
        "drained (`fleet undrain` takes them back)",
    );
    let lost =
        told(&|_, node| node.lost, "lost (see that its worker runs)", "lost (see that their workers run)");
    let away = told(
        &|id, node| !node.drained && !node.lost && !observed.connected(id),
        "out of touch at the moment",
        "out of touch at the moment",
    );
    drained + &lost + &away
}

fn at_latest(start_ms: Option<u64>) -> String {
    match start_ms.map(|ms| ms.div_ceil(1_000)) {
        Some(seconds) if seconds < 120 => format!("; starts within {seconds} s"),
        Some(seconds) => format!("; starts within {} min", seconds.div_ceil(60)),
        None => String::new(),
    }
}

fn labels(wish: &Wish) -> String {
    let labels: Vec<String> = wish.labels.iter().map(|(name, value)| format!("{name}={value}")).collect();
    if labels.is_empty() { String::new() } else { format!(" with {}", labels.join(",")) }
}

fn nodes_of(state: &State, job: &JobRecord) -> String {
    let parts = job.placement.iter().flat_map(|at| &at.parts);
    names(state, parts.map(|part| part.node))
}

/// `node a`, `nodes a and b`, `5 nodes`.
pub(super) fn names(state: &State, nodes: impl Iterator<Item = NodeId>) -> String {
    let names: Vec<String> = nodes.map(|node| state.node_name(node)).collect();
    match &names[..] {
        [one] => format!("node {one}"),
        [first @ .., last] if first.len() < 4 => format!("nodes {} and {last}", first.join(", ")),
        _ => format!("{} nodes", names.len()),
    }
}

/// That a node of the job is out of touch.
fn beware(state: &State, observed: &Observed, job: &JobRecord) -> String {
    let parts = job.placement.iter().flat_map(|at| &at.parts).filter(|part| !part.finished);
    let silent: Vec<NodeId> = parts.map(|part| part.node).filter(|node| !observed.connected(*node)).collect();
    match silent.len() {
        0 => String::new(),
        n => format!(
            "; {} {} out of touch at the moment",
            names(state, silent.into_iter()),
            if n == 1 { "is" } else { "are" }
        ),
    }
}

fn count(number: u32, what: &str) -> String {
    if number == 1 { format!("1 {what}") } else { format!("{number} {what}s") }
}

fn times(number: u64) -> String {
    if number == 1 { "once".to_owned() } else { format!("{number} times") }
}
