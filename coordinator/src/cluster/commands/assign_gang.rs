//! A place for a job: its gang of ranks gets nodes and a new generation.

use crate::cluster::checkpoints::wake_holders;
use crate::cluster::ends::wake_parts;
use crate::cluster::records::{Part, Placement, Report};
use crate::cluster::{Answer, Context, Effect, State};
use fleet_common::ids::{Generation, JobId, NodeId};
use fleet_common::protocol::JobState;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AssignGang {
    pub job: JobId,
    /// One above the job's present one; a plan made from an older state is refused by it.
    pub generation: Generation,
    /// Nodes in rank order, each with its number of ranks.
    pub parts: Vec<(NodeId, u32)>,
}

impl AssignGang {
    pub(super) fn apply(self, state: &mut State, context: &mut Context) -> Answer {
        if let Err(refusal) = self.check(state) {
            return refusal;
        }
        let trains = state.jobs.get(&self.job).is_some_and(|job| job.trains);
        let port = match self.parts.first() {
            Some((leader, _)) if self.parts.len() > 1 && !trains => state.free_port(self.job, *leader),
            _ => None,
        };
        let nodes: Vec<NodeId> = self.parts.iter().map(|(node, _)| *node).collect();
        let resume = state.resume_of(self.job, &nodes);
        let mut first_rank = 0;
        let parts = self.parts.iter().map(|(node, ranks)| {
            let part = Part {
                node: *node,
                first_rank,
                ranks: *ranks,
                next_seq: 1,
                finished: false,
                memory_mib: None,
                stall: None,
                report: Report::default(),
            };
            first_rank += ranks;
            part
        });
        let placement = Placement {
            generation: self.generation,
            parts: parts.collect(),
            placed_unix_ms: context.unix_ms,
            port,
            resume,
        };
        if let Some(job) = state.jobs.get_mut(&self.job) {
            job.state = JobState::Starting;
            job.generation = self.generation;
            job.placement = Some(placement);
            wake_parts(job, context);
            wake_holders(job, context);
        }
        context.effects.push(Effect::Job(self.job));
        Answer::Done
    }

    fn check(&self, state: &State) -> Result<(), Answer> {
        let Some(job) = state.jobs.get(&self.job) else {
            return Err(Answer::not_found(format!("there is no {}", self.job)));
        };
        if job.state != JobState::Queued || self.generation != job.generation + 1 {
            return Err(Answer::invalid(format!(
                "{} no longer waits for generation {}",
                self.job, self.generation
            )));
        }
        if job.removed_secrets().next().is_some() {
            return Err(Answer::invalid(format!("{} lacks secrets", self.job)));
        }
        let ranks = self.parts.iter().try_fold(0u32, |sum, (_, ranks)| sum.checked_add(*ranks));
        let nodes: BTreeSet<NodeId> = self.parts.iter().map(|(node, _)| *node).collect();
        let as_wished = job.wish.nodes.is_none_or(|nodes| nodes as usize == self.parts.len());
        let idle = self.parts.iter().any(|(_, ranks)| *ranks == 0);
        if ranks != Some(job.world_size) || nodes.len() != self.parts.len() || !as_wished || idle {
            return Err(Answer::invalid(format!("{} does not run like that", self.job)));
        }
        let used = state.slots_in_use();
        for (id, ranks) in &self.parts {
            let used = used.get(id).copied().unwrap_or_default();
            let free = match state.nodes.get(id) {
                Some(node) if !node.lost && !node.drained && node.suits(&job.wish) => {
                    node.slots.saturating_sub(used)
                }
                _ => 0,
            };
            let needed = ranks.saturating_mul(job.wish.slots_per_rank);
            if free < needed {
                return Err(Answer::invalid(format!(
                    "{id} has {free} free slots, {} needs {needed}",
                    self.job
                )));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::commands::{Change, DrainNode};
    use crate::cluster::tests::{Script, why};
    use fleet_common::protocol::{Meeting, ToAgent};

    fn assign(job: JobId, parts: &[(u64, u32)]) -> Change {
        let parts = parts.iter().map(|(node, ranks)| (NodeId(*node), *ranks)).collect();
        Change::AssignGang(AssignGang { job, generation: 1, parts })
    }

    #[test]
    fn a_gang_is_ordered_from_its_node() {
        let mut script = Script::with_node(4);
        let job = script.submit(4);
        script.assign(job);
        let orders = script.state.orders(script.node());
        assert!(matches!(&orders[..], [ToAgent::StartGang(gang)] if gang.job == job && gang.generation == 1
                && (gang.world_size, gang.first_rank, gang.ranks, gang.nodes) == (4, 0, 4, 1) && gang.meeting.is_none()));
    }

    #[test]
    fn a_gang_on_two_nodes_meets_where_its_first_rank_is() {
        let mut script = Script::with_nodes(&[2, 4]);
        let job = script.submit(5);
        assert_eq!(script.run(assign(job, &[(2, 4), (1, 1)])), Answer::Done);
        let [ToAgent::StartGang(gang)] = &script.state.orders(NodeId(1))[..] else { panic!("one order") };
        assert_eq!((gang.first_rank, gang.ranks, gang.node_index, gang.nodes), (4, 1, 1, 2));
        assert_eq!(gang.meeting, Some(Meeting { host: "host-2".into(), port: 29_501 }));
    }

    #[test]
    fn slots_are_never_promised_twice() {
        let mut script = Script::with_node(4);
        let first = script.submit(3);
        let second = script.submit(2);
        script.assign(first);
        assert!(why(script.run(assign(second, &[(1, 2)]))).contains("1 free slots"));
    }

    #[test]
    fn all_ranks_get_a_place_or_none() {
        let mut script = Script::with_nodes(&[4, 4]);
        let job = script.submit(4);
        for parts in [&[(1, 3)][..], &[(1, 2), (1, 2)], &[(1, 4), (2, 0)], &[]] {
            assert!(why(script.run(assign(job, parts))).contains("does not run like that"), "{parts:?}");
        }
        assert_eq!(script.state.slots_used(NodeId(1)), 0);
    }

    #[test]
    fn an_outdated_plan_is_refused() {
        let mut script = Script::with_node(4);
        let job = script.submit(1);
        script.assign(job);
        assert!(why(script.run(assign(job, &[(1, 1)]))).contains("no longer waits"));
    }

    #[test]
    fn a_lost_or_drained_node_gets_nothing() {
        let mut script = Script::with_node(4);
        let job = script.submit(1);
        script.run(Change::DrainNode(DrainNode { node: script.node(), now: false }));
        assert!(why(script.run(assign(job, &[(1, 1)]))).contains("0 free slots"));
        let mut script = Script::with_node(4);
        let job = script.submit(1);
        script.lose_node();
        assert!(why(script.run(assign(job, &[(1, 1)]))).contains("0 free slots"));
    }
}
