//! The cluster gives a job up, because its agent lost it.

use crate::cluster::records::node_error;
use crate::cluster::{Answer, Context, State};
use fleet_common::events::Outcome;
use fleet_common::ids::{Generation, JobId};
use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FailJob {
    pub job: JobId,
    /// Only if this is still the job's generation.
    pub generation: Generation,
    pub message: String,
}

impl FailJob {
    pub(super) fn apply(self, state: &mut State, context: &mut Context) -> Answer {
        let Some(job) = state.jobs.get(&self.job) else {
            return Answer::not_found(format!("there is no {}", self.job));
        };
        let Some(at) = job.placement.filter(|at| at.generation == self.generation && !job.state.is_final())
        else {
            return Answer::Done;
        };
        let node = state.node_name(at.node);
        state.finish(self.job, Outcome::Failed(node_error(node, self.message)), context);
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
        let fail =
            |generation| Change::FailJob(FailJob { job, generation, message: "agent restarted".into() });
        script.run(fail(2));
        assert_eq!(script.state.jobs()[&job].state, JobState::Starting);
        script.run(fail(1));
        assert_eq!(script.state.jobs()[&job].state, JobState::Failed);
        assert_eq!(script.state.jobs()[&job].error.as_ref().unwrap().message, "agent restarted");
        script.run(fail(1));
        assert_eq!(script.state.jobs()[&job].events, 1);
    }
}
