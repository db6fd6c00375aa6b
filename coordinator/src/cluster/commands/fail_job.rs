//! An agent has lost its ranks of a job: nothing more will be heard of them, and the job fails.

use crate::cluster::records::node_error;
use crate::cluster::{Answer, Context, State};
use fleet_common::events::Outcome;
use fleet_common::ids::{Generation, JobId, NodeId};
use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FailJob {
    pub job: JobId,
    /// Only if this is still the job's generation.
    pub generation: Generation,
    /// Whose ranks are gone.
    pub node: NodeId,
    pub message: String,
}

impl FailJob {
    pub(super) fn apply(self, state: &mut State, context: &mut Context) -> Answer {
        if state.placement(self.job, self.generation).is_some() {
            let name = state.node_name(self.node);
            let outcome = Outcome::Failed(node_error(name, self.message));
            state.end_part(self.job, self.node, outcome, context);
        }
        Answer::Done
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::commands::Change;
    use crate::cluster::tests::Script;
    use fleet_common::protocol::JobState;

    #[test]
    fn only_the_generation_that_was_lost_fails() {
        let mut script = Script::with_node(1);
        let job = script.submit(1);
        script.assign(job);
        let node = script.node();
        let fail = |generation| {
            Change::FailJob(FailJob { job, generation, node, message: "agent restarted".into() })
        };
        script.run(fail(2));
        assert_eq!(script.state.jobs()[&job].state, JobState::Starting);
        script.run(fail(1));
        assert_eq!(script.state.jobs()[&job].state, JobState::Failed);
        assert_eq!(script.state.jobs()[&job].error.as_ref().unwrap().message, "agent restarted");
        script.run(fail(1));
        assert_eq!(script.state.jobs()[&job].events, 1);
    }
}
