//! A job is asked to stop. One that waits ends at once, one that runs is told through its agent.

use crate::cluster::ends::wake_parts;
use crate::cluster::records::Stop;
use crate::cluster::{Answer, Context, Effect, State};
use fleet_common::events::Outcome;
use fleet_common::ids::JobId;
use fleet_common::protocol::JobState;
use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CancelJob {
    pub job: JobId,
    pub stop: Stop,
}

impl CancelJob {
    pub(super) fn apply(self, state: &mut State, context: &mut Context) -> Answer {
        let Some(job) = state.jobs.get_mut(&self.job) else {
            // One that ended so long ago that it is only in the history.
            return match self.job.0 {
                id if id > 0 && id <= state.last_job => Answer::Done,
                _ => Answer::not_found(format!("there is no {}", self.job)),
            };
        };
        if job.state.is_final() {
            return Answer::Done;
        }
        if job.placement.is_none() {
            let steps = job.progress.step;
            state.finish(self.job, Outcome::Stopped { steps }, context);
            return Answer::Done;
        }
        job.state = JobState::Stopping;
        job.stop = job.stop.max(Some(self.stop));
        // It was asked to end, not to start again elsewhere.
        job.requeue = false;
        wake_parts(job, context);
        context.effects.push(Effect::Job(self.job));
        Answer::Done
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::commands::Change;
    use crate::cluster::tests::Script;
    use fleet_common::protocol::ToAgent;

    fn cancel(script: &mut Script, job: JobId, stop: Stop) -> Answer {
        script.run(Change::CancelJob(CancelJob { job, stop }))
    }

    #[test]
    fn a_waiting_job_ends_at_once() {
        let mut script = Script::new();
        let job = script.submit(1);
        assert_eq!(cancel(&mut script, job, Stop::AfterCheckpoint), Answer::Done);
        assert_eq!(script.state.jobs()[&job].state, JobState::Cancelled);
        assert!(script.last_event_is_finished(job));
    }

    #[test]
    fn a_running_job_is_stopped_through_its_agent_and_now_wins() {
        let mut script = Script::with_node(1);
        let job = script.submit(1);
        script.assign(job);
        cancel(&mut script, job, Stop::Now);
        cancel(&mut script, job, Stop::AfterCheckpoint);
        assert_eq!(script.state.jobs()[&job].state, JobState::Stopping);
        let orders = script.state.orders(script.node());
        assert!(matches!(orders[1], ToAgent::StopGang { now: true, generation: 1, .. }));
    }

    #[test]
    fn cancelling_twice_or_too_late_is_fine_and_an_unknown_job_is_not() {
        let mut script = Script::new();
        let job = script.submit(1);
        cancel(&mut script, job, Stop::Now);
        assert_eq!(cancel(&mut script, job, Stop::Now), Answer::Done);
        assert_eq!(script.state.jobs()[&job].events, 1);
        assert!(matches!(cancel(&mut script, JobId(9), Stop::Now), Answer::Rejected(_)));
    }
}
