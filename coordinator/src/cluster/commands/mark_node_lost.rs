//! A node was silent for a whole lease: its jobs fail.

use crate::cluster::{Answer, Context, Effect, State};
use fleet_common::ids::NodeId;
use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MarkNodeLost {
    pub node: NodeId,
    pub silent_ms: u64,
}

impl MarkNodeLost {
    pub(super) fn apply(self, state: &mut State, context: &mut Context) -> Answer {
        let Some(node) = state.nodes.get_mut(&self.node) else {
            return Answer::not_found(format!("{} is not registered", self.node));
        };
        node.lost = true;
        let name = node.name.clone();
        let message = format!(
            "node {name} was lost: not heard for {} s; see that its worker runs, then start the job again with resume_from_checkpoint = \"latest\"",
            self.silent_ms / 1000
        );
        state.give_up_node(self.node, &message, context);
        context.effects.extend([Effect::Plan, Effect::Node(self.node)]);
        Answer::Done
    }
}

#[cfg(test)]
mod tests {
    use crate::cluster::tests::Script;
    use fleet_common::ids::JobId;
    use fleet_common::protocol::JobState;

    #[test]
    fn its_jobs_fail_by_name_and_its_slots_are_free() {
        let mut script = Script::with_node(4);
        let running = script.submit(2);
        script.assign(running);
        let queued = script.submit(4);
        script.lose_node();
        let job = &script.state.jobs()[&running];
        assert_eq!(job.state, JobState::Failed);
        assert_eq!(job.error.as_ref().unwrap().node.as_deref(), Some("box"));
        assert!(job.error.as_ref().unwrap().message.contains("node box was lost"));
        assert_eq!(script.state.jobs()[&queued].state, JobState::Queued);
        assert_eq!(script.state.slots_used(script.node()), 0);
        assert!(script.last_event_is_finished(JobId(1)));
    }
}
