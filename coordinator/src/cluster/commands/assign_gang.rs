//! A place for a job: its gang of ranks gets a node and a new generation.

use crate::cluster::records::Placement;
use crate::cluster::{Answer, Context, Effect, State};
use fleet_common::ids::{Generation, JobId, NodeId};
use fleet_common::protocol::JobState;
use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AssignGang {
    pub job: JobId,
    pub node: NodeId,
    /// One above the job's present one; a plan made from an older state is refused by it.
    pub generation: Generation,
}

impl AssignGang {
    pub(super) fn apply(self, state: &mut State, context: &mut Context) -> Answer {
        let used = state.slots_used(self.node);
        let Some(job) = state.jobs.get_mut(&self.job) else {
            return Answer::not_found(format!("there is no {}", self.job));
        };
        if job.state != JobState::Queued || self.generation != job.generation() + 1 {
            return Answer::invalid(format!(
                "{} no longer waits for generation {}",
                self.job, self.generation
            ));
        }
        let free = match state.nodes.get(&self.node) {
            Some(node) if !node.lost => node.slots.saturating_sub(used),
            _ => 0,
        };
        if free < job.world_size {
            return Answer::invalid(format!(
                "{} has {free} free slots, {} needs {}",
                self.node, self.job, job.world_size
            ));
        }
        job.state = JobState::Starting;
        job.placement = Some(Placement { node: self.node, generation: self.generation, next_seq: 1 });
        context.effects.extend([Effect::Node(self.node), Effect::Job(self.job)]);
        Answer::Done
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::commands::Change;
    use crate::cluster::tests::{Script, why};
    use fleet_common::protocol::ToAgent;

    #[test]
    fn a_gang_is_ordered_from_its_node() {
        let mut script = Script::with_node(4);
        let job = script.submit(4);
        script.assign(job);
        let orders = script.state.orders(script.node());
        assert!(
            matches!(&orders[..], [ToAgent::StartGang(gang)] if gang.job == job && gang.generation == 1 && gang.world_size == 4)
        );
    }

    #[test]
    fn slots_are_never_promised_twice() {
        let mut script = Script::with_node(4);
        let first = script.submit(3);
        let second = script.submit(2);
        script.assign(first);
        let assign = AssignGang { job: second, node: script.node(), generation: 1 };
        assert!(why(script.run(Change::AssignGang(assign))).contains("1 free slots"));
    }

    #[test]
    fn an_outdated_plan_is_refused() {
        let mut script = Script::with_node(4);
        let job = script.submit(1);
        script.assign(job);
        let again = AssignGang { job, node: script.node(), generation: 1 };
        assert!(why(script.run(Change::AssignGang(again))).contains("no longer waits"));
    }

    #[test]
    fn a_lost_node_gets_nothing() {
        let mut script = Script::with_node(4);
        let job = script.submit(1);
        script.lose_node();
        let assign = AssignGang { job, node: script.node(), generation: 1 };
        assert!(why(script.run(Change::AssignGang(assign))).contains("0 free slots"));
    }
}
