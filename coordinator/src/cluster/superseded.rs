//! Checkpoints that are recorded and then have newer ones in their place, on nodes to which their job does not write any more, and copies of
//! another job's that nodes fetched for one that has its own now: where a job writes its ranks remove them.
//!
//! A node is told of them until it says that it has done what it can. Never of one that a job goes on from which has not started yet.

use super::checkpoints::Resumed;
use super::records::JobRecord;
use super::{Context, Effect, State};
use fleet_common::ids::NodeId;
use fleet_common::protocol::{JobState, Superseded};
use std::collections::BTreeSet;

/// Of one node. Beyond it the oldest stay on its disk.
const SUPERSEDED_MAX: usize = 128;

impl State {
    /// What a node need not keep any more.
    pub fn superseded(&self, node: NodeId) -> Vec<Superseded> {
        let Some(all) = self.superseded.get(&node) else { return Vec::new() };
        let starts =
            |job: &&JobRecord| matches!(job.state, JobState::Queued | JobState::Starting) || job.requeue;
        let starting: Vec<&JobRecord> = self.jobs.values().filter(starts).collect();
        let goes_on_from = |job: &JobRecord, one: &Superseded| {
            let resume = job.placement.as_ref().and_then(|at| at.resume.as_ref());
            resume.is_some_and(|resumed| resumed.record.manifest_sha256 == one.manifest_sha256)
                || job.checkpoints.is_empty() && job.continues.takes(&one.path)
        };
        let is_free = |one: &&Superseded| !starting.iter().any(|job| goes_on_from(job, one));
        all.iter().filter(is_free).cloned().collect()
    }

    /// A job has started or is over: what it went on from may be free.
    pub(crate) fn wake_superseded(&self, context: &mut Context) {
        context.effects.extend(self.superseded.keys().map(|node| Effect::Node(*node)));
    }

    /// These are not needed any more on the nodes where they lie. Where another job's record has a copy, it is not in it any more.
    pub(crate) fn supersede(&mut self, gone: Vec<Resumed>, context: &mut Context) {
        for Resumed { job, record, held } in gone {
            let of = self.jobs.get_mut(&job).into_iter().flat_map(|job| &mut job.checkpoints);
            for known in of.filter(|known| known.record.manifest_sha256 == record.manifest_sha256) {
                known.held.retain(|copy| !held.contains(copy));
            }
            let nodes: BTreeSet<NodeId> = held.iter().map(|held| held.node).collect();
            for node in nodes.into_iter().filter(|node| self.nodes.contains_key(node)) {
                let known = self.superseded.entry(node).or_default();
                let (path, manifest_sha256) = (record.path.clone(), record.manifest_sha256.clone());
                known.push(Superseded { path, manifest_sha256 });
                known.drain(..known.len().saturating_sub(SUPERSEDED_MAX));
                context.effects.push(Effect::Node(node));
            }
        }
    }

    /// A node has done with these what it could.
    pub(crate) fn settle_superseded(&mut self, node: NodeId, manifests: &[String]) {
        if let Some(known) = self.superseded.get_mut(&node) {
            known.retain(|one| !manifests.contains(&one.manifest_sha256));
            if known.is_empty() {
                self.superseded.remove(&node);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::cluster::checkpoints::{Continues, Held};
    use crate::cluster::commands::{CancelJob, Change, DrainNode, SettleSuperseded, SubmitJob, UndrainNode};
    use crate::cluster::records::Stop;
    use crate::cluster::tests::{Script, checkpoint_of, stopped, training};
    use fleet_common::events::{CheckpointRecord, DataStats, EventBody};
    use fleet_common::ids::{JobId, NodeId};
    use fleet_common::protocol::{Files, Wish};

    fn saved(step: u64) -> EventBody {
        let manifest_sha256 = format!("{step:064x}");
        EventBody::Checkpoint(CheckpointRecord { manifest_sha256, ..checkpoint_of(step, 1) })
    }

    fn steps(script: &Script, node: u64) -> Vec<String> {
        script.state.superseded(NodeId(node)).into_iter().map(|one| one.path).collect()
    }

    /// A job that keeps two, has saved steps 5 and 6 on node 1, and goes on on node 2.
    fn moved() -> (Script, JobId) {
        let mut script = Script::with_nodes(&[1, 1]);
        let job = script.submit_as(Change::SubmitJob(SubmitJob {
            name: "test".into(),
            world_size: 1,
            work: training(),
            wish: Wish { queue: true, ..Wish::default() },
            keep_checkpoints: 2,
            continues: Continues::Nothing,
        }));
        script.place(job, &[(1, 1)]);
        script.tell(job, 1, 1, vec![saved(5), saved(6)]);
        script.run(Change::DrainNode(DrainNode { node: NodeId(1), now: true }));
        script.tell(job, 1, 3, vec![stopped(6)]);
        script.place(job, &[(2, 1)]);
        (script, job)
    }

    #[test]
    fn a_node_that_was_left_is_told_what_newer_ones_have_replaced_until_it_has_heard() {
        let (mut script, job) = moved();
        assert!(steps(&script, 1).is_empty(), "both are recorded");
        script.tell(job, 2, 1, vec![saved(7), saved(8), saved(9)]);
        assert_eq!(steps(&script, 1), ["/c/step-5"], "the gang goes on from 6");
        assert!(steps(&script, 2).is_empty(), "there the job removes them itself");
        script.tell(job, 2, 4, vec![stopped(9)]);
        assert_eq!(steps(&script, 1), ["/c/step-5", "/c/step-6"]);
        let heard = SettleSuperseded { node: NodeId(1), manifests: vec![format!("{:064x}", 5)] };
        script.run(Change::SettleSuperseded(heard.clone()));
        script.run(Change::SettleSuperseded(heard));
        assert_eq!(steps(&script, 1), ["/c/step-6"]);
    }

    #[test]
    fn copies_of_another_jobs_checkpoint_go_when_the_job_has_as_many_of_its_own_as_it_keeps() {
        let mut script = Script::with_nodes(&[1, 1, 1]);
        let submit = |script: &mut Script, world_size, continues| {
            script.submit_as(Change::SubmitJob(SubmitJob {
                name: "test".into(),
                world_size,
                work: training(),
                wish: Wish { queue: true, nodes: Some(world_size), ..Wish::default() },
                keep_checkpoints: 2,
                continues,
            }))
        };
        let first = submit(&mut script, 1, Continues::Nothing);
        script.place(first, &[(1, 1)]);
        script.tell(first, 1, 1, vec![saved(5), saved(6), stopped(6)]);
        let job = submit(&mut script, 2, Continues::From("/c/step-6".into()));
        script.place(job, &[(2, 1), (3, 1)]);
        let ready = || EventBody::DataReady(DataStats::default());
        let own = |step: u64| {
            let (path, disks) = (format!("/d/step-{step}"), vec![0, 1]);
            let manifest_sha256 = format!("{step:064x}");
            EventBody::Checkpoint(CheckpointRecord { path, disks, manifest_sha256, ..checkpoint_of(step, 1) })
        };
        script.tell(job, 3, 1, vec![ready()]);
        script.tell(
            job,
            2,
            1,
            vec![ready(), EventBody::Started { step: 6, parameters: 1, device: "cpu".into() }],
        );
        script.tell(job, 2, 3, vec![own(7)]);
        let held = |script: &Script| {
            script.state.jobs()[&first].checkpoints[1].held.iter().map(|held| held.node.0).collect::<Vec<_>>()
        };
        assert_eq!((steps(&script, 3).len(), held(&script)), (0, vec![1, 3, 2]), "it keeps two");
        script.tell(job, 2, 4, vec![own(8)]);
        assert_eq!(held(&script), [1], "the record says who keeps it");
        assert!(steps(&script, 1).is_empty(), "it was written there");
        assert_eq!([2, 3].map(|node| steps(&script, node)), [["/c/step-6"], ["/c/step-6"]]);
        let third = submit(&mut script, 1, Continues::Newest("/c".into()));
        assert!(steps(&script, 3).is_empty(), "somebody waits to go on from it");
        script.run(Change::CancelJob(CancelJob { job: third, stop: Stop::Now }));
        assert_eq!(steps(&script, 3), ["/c/step-6"]);
    }

    #[test]
    fn where_another_job_has_written_it_a_checkpoint_is_no_copy() {
        let (mut script, first) = moved();
        script.tell(first, 2, 1, vec![stopped(6)]);
        script.run(Change::UndrainNode(UndrainNode { node: NodeId(1) }));
        let job = script.submit_as(Change::SubmitJob(SubmitJob {
            name: "test".into(),
            world_size: 2,
            work: training(),
            wish: Wish { queue: true, nodes: Some(2), ..Wish::default() },
            keep_checkpoints: 1,
            continues: Continues::From("/c/step-6".into()),
        }));
        script.place(job, &[(1, 1), (2, 1)]);
        for node in [1, 2] {
            script.tell(job, node, 1, vec![EventBody::DataReady(DataStats::default())]);
        }
        let own = CheckpointRecord { path: "/d/step-7".into(), ..checkpoint_of(7, 1) };
        script.tell(job, 1, 2, vec![EventBody::Started { step: 6, parameters: 1, device: "cpu".into() }]);
        script.tell(job, 1, 3, vec![EventBody::Checkpoint(own)]);
        assert_eq!((steps(&script, 1).len(), steps(&script, 2)), (0, vec!["/c/step-6".to_owned()]));
        let held = &script.state.jobs()[&first].checkpoints[1].held;
        assert_eq!(held[..], [Held { node: NodeId(1), files: Files::All }]);
    }

    #[test]
    fn what_a_job_itself_removes_is_left_to_it() {
        let (mut script, job) = moved();
        script.run(Change::DrainNode(DrainNode { node: NodeId(2), now: true }));
        script.tell(job, 2, 1, vec![stopped(6)]);
        script.run(Change::UndrainNode(UndrainNode { node: NodeId(1) }));
        script.place(job, &[(1, 1)]);
        script.tell(job, 1, 1, vec![saved(7), saved(8)]);
        assert!(steps(&script, 1).is_empty());
    }
}
