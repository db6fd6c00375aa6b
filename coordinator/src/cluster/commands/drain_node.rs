//! A node gets no more work. With `now` the jobs on it write a checkpoint and go back to the queue.

use crate::cluster::ends::wake_parts;
use crate::cluster::records::Stop;
use crate::cluster::{Answer, Context, Effect, State};
use fleet_common::ids::NodeId;
use fleet_common::protocol::JobState;
use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DrainNode {
    pub node: NodeId,
    pub now: bool,
}

impl DrainNode {
    pub(super) fn apply(self, state: &mut State, context: &mut Context) -> Answer {
        let Some(node) = state.nodes.get_mut(&self.node) else {
            return Answer::not_found(format!("there is no {}; `fleet nodes` lists them", self.node));
        };
        node.drained = true;
        let name = node.name.clone();
        context.effects.push(Effect::Plan);
        if self.now {
            for (id, job) in &mut state.jobs {
                // One that is ending already ends as it was asked to.
                if job.live_part(self.node).is_none() || job.state == JobState::Stopping {
                    continue;
                }
                job.state = JobState::Stopping;
                job.stop = Some(Stop::AfterCheckpoint);
                job.requeue = true;
                let line =
                    format!("node {name} is drained: the job saves what it has and goes back to the queue");
                job.note(*id, line, context);
                wake_parts(job, context);
                context.effects.push(Effect::Job(*id));
            }
        }
        Answer::Done
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::commands::{CancelJob, Change};
    use crate::cluster::tests::{Script, checkpoint, finished, stopped, why};
    use fleet_common::ids::JobId;
    use fleet_common::protocol::ToAgent;

    fn drain(script: &mut Script, now: bool) {
        assert_eq!(script.run(Change::DrainNode(DrainNode { node: script.node(), now })), Answer::Done);
    }

    #[test]
    fn jobs_on_a_drained_node_run_on() {
        let mut script = Script::with_node(4);
        let job = script.submit(2);
        script.assign(job);
        drain(&mut script, false);
        assert!(script.state.nodes()[&NodeId(1)].drained);
        assert_eq!(script.state.orders(NodeId(1)).len(), 1, "no order to stop");
        script.describe(4);
        assert!(script.state.nodes()[&NodeId(1)].drained, "a greeting changes nothing");
    }

    #[test]
    fn drained_now_a_job_starts_again_from_its_checkpoint_once_every_part_has_ended() {
        let mut script = Script::with_nodes(&[2, 2, 4]);
        let job = script.submit(4);
        script.place(job, &[(1, 2), (2, 2)]);
        drain(&mut script, true);
        for node in [1, 2] {
            let orders = script.state.orders(NodeId(node));
            assert!(matches!(orders[1], ToAgent::StopGang { now: false, generation: 1, .. }), "{orders:?}");
        }
        script.tell(job, 1, 1, vec![checkpoint(5), stopped(5)]);
        assert_eq!(script.state.jobs()[&job].state, JobState::Stopping, "node 2 has not reported its end");
        script.tell(job, 2, 1, vec![stopped(5)]);
        let record = &script.state.jobs()[&job];
        assert_eq!((record.state, record.generation), (JobState::Queued, 1));
        assert!(!script.last_event_is_finished(job));
        script.place(job, &[(3, 4)]);
        let [ToAgent::StartGang(gang)] = &script.state.orders(NodeId(3))[..] else { panic!("one order") };
        let resume = gang.resume.as_ref().map(|point| point.path.as_str());
        assert_eq!((gang.generation, resume), (2, Some("/c/step-5")));
    }

    #[test]
    fn a_job_that_ends_or_is_cancelled_meanwhile_does_not_come_back() {
        let mut script = Script::with_node(4);
        let (done, unwanted) = (script.submit(1), script.submit(1));
        script.assign(done);
        script.assign(unwanted);
        drain(&mut script, true);
        script.tell(done, 1, 1, vec![finished()]);
        assert_eq!(script.state.jobs()[&done].state, JobState::Succeeded);
        script.run(Change::CancelJob(CancelJob { job: unwanted, stop: Stop::AfterCheckpoint }));
        script.tell(unwanted, 1, 1, vec![stopped(0)]);
        assert_eq!(script.state.jobs()[&unwanted].state, JobState::Cancelled);
    }

    #[test]
    fn an_unknown_node_is_named() {
        let mut script = Script::new();
        let drain = DrainNode { node: NodeId(3), now: false };
        assert!(why(script.run(Change::DrainNode(drain))).contains("no node-3"));
        assert!(script.events(JobId(1)).is_empty());
    }
}
