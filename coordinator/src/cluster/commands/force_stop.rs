//! A gang that was asked to stop stands still, and will not come to the checkpoint after which it was to stop: it stops now, without one.

use crate::cluster::ends::wake_parts;
use crate::cluster::records::{JobRecord, Stop};
use crate::cluster::{Answer, Context, Effect, State};
use fleet_common::events::Culprit;
use fleet_common::ids::{Generation, JobId};
use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ForceStop {
    pub job: JobId,
    /// Only if this is still the job's generation.
    pub generation: Generation,
    pub waited_ms: u64,
}

impl ForceStop {
    pub(super) fn apply(self, state: &mut State, context: &mut Context) -> Answer {
        if !state.stuck_stops().any(|stuck| stuck == (self.job, self.generation)) {
            return Answer::Done;
        }
        let Some(job) = state.jobs.get_mut(&self.job) else { return Answer::Done };
        let what = job.stall().map_or("", |stall| stall.what.as_str());
        let line = format!(
            "asked to stop, it has stood still for {} s, and ends without a checkpoint: {what}",
            self.waited_ms / 1_000
        );
        job.note(self.job, line, context);
        job.stop = Some(Stop::Now);
        wake_parts(job, context);
        context.effects.push(Effect::Job(self.job));
        Answer::Done
    }
}

impl State {
    /// Gangs that train, were asked to stop after a checkpoint, and stand still.
    pub fn stuck_stops(&self) -> impl Iterator<Item = (JobId, Generation)> {
        let asked = |job: &JobRecord| job.trains && job.stop == Some(Stop::AfterCheckpoint);
        let jobs = self.jobs.iter().filter(move |(_, job)| asked(job));
        let still = jobs.filter(|(_, job)| job.stall().is_some_and(|stall| stall.culprit != Culprit::Slow));
        still.filter_map(|(id, job)| Some((*id, job.placement.as_ref()?.generation)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::commands::{CancelJob, Change, DrainNode};
    use crate::cluster::tests::{Script, job, step, stopped, training};
    use fleet_common::events::{EventBody, Stall};
    use fleet_common::ids::NodeId;
    use fleet_common::protocol::{JobState, ToAgent, Wish};

    fn stall(culprit: Culprit) -> EventBody {
        EventBody::Stall(Some(Stall { since_unix_ms: 7, what: "rank 1 has not come".into(), culprit }))
    }

    fn running() -> (Script, JobId) {
        let mut script = Script::with_node(2);
        let gang = script.submit_as(job(training(), 2, Wish::default()));
        script.place(gang, &[(1, 2)]);
        let started = EventBody::Started { step: 0, parameters: 1, device: "cpu".into() };
        script.tell(gang, 1, 1, vec![started, step(3)]);
        (script, gang)
    }

    fn force(script: &mut Script, job: JobId) -> bool {
        script.run(Change::ForceStop(ForceStop { job, generation: 1, waited_ms: 10_000 }));
        let orders = script.state.orders(NodeId(1));
        orders.iter().any(|order| matches!(order, ToAgent::StopGang { now: true, .. }))
    }

    #[test]
    fn what_stands_still_and_shall_stop_does_so_without_a_checkpoint() {
        let (mut script, job) = running();
        script.tell(job, 1, 3, vec![stall(Culprit::Stopped)]);
        assert!(!force(&mut script, job), "it may stand still as long as it likes");
        script.run(Change::CancelJob(CancelJob { job, stop: Stop::AfterCheckpoint }));
        script.tell(job, 1, 4, vec![stall(Culprit::Slow)]);
        assert!(!force(&mut script, job), "it is slow");
        script.tell(job, 1, 5, vec![EventBody::Stall(None)]);
        assert!(!force(&mut script, job), "it goes on");
        script.tell(job, 1, 6, vec![stall(Culprit::Stopped)]);
        assert!(script.state.jobs()[&job].stall().is_some(), "shown while it stops");
        assert!(force(&mut script, job));
        script.tell(job, 1, 7, vec![stopped(3)]);
        assert_eq!(script.state.jobs()[&job].state, JobState::Cancelled);
        let said = |body: &EventBody| matches!(body, EventBody::Log { line, .. } if line.contains("rank 1 has not come"));
        assert!(script.events(job).iter().any(|event| said(&event.body)));
    }

    #[test]
    fn a_job_of_a_drained_node_goes_back_to_the_queue_all_the_same() {
        let (mut script, job) = running();
        script.run(Change::DrainNode(DrainNode { node: NodeId(1), now: true }));
        script.tell(job, 1, 3, vec![stall(Culprit::Silent)]);
        assert!(force(&mut script, job));
        script.tell(job, 1, 4, vec![stopped(3)]);
        assert_eq!(script.state.jobs()[&job].state, JobState::Queued);
    }
}
