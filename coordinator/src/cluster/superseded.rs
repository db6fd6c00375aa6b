//! Checkpoints that are recorded and then have newer ones in their place, on nodes to which their job does not write any more: where it
//! writes its ranks remove them.
//!
//! A node is told of them until it says that it has done what it can. Never of one that a gang goes on from just now.

use super::records::RecordedCheckpoint;
use super::{Context, Effect, State};
use fleet_common::ids::NodeId;
use fleet_common::protocol::Superseded;
use std::collections::BTreeSet;

/// Of one node. Beyond it the oldest stay on its disk.
const SUPERSEDED_MAX: usize = 128;

impl State {
    /// What a node need not keep any more.
    pub fn superseded(&self, node: NodeId) -> Vec<Superseded> {
        let active = self.jobs.values().filter(|job| !job.state.is_final());
        let in_use: BTreeSet<&str> = active
            .filter_map(|job| job.placement.as_ref()?.resume.as_ref())
            .map(|resumed| resumed.record.manifest_sha256.as_str())
            .collect();
        let all = self.superseded.get(&node).into_iter().flatten();
        all.filter(|one| !in_use.contains(one.manifest_sha256.as_str())).cloned().collect()
    }

    /// These are not recorded any more. Their nodes are those where nobody else removes them.
    pub(crate) fn supersede(&mut self, gone: Vec<RecordedCheckpoint>, context: &mut Context) {
        for RecordedCheckpoint { record, held, .. } in gone {
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
    use crate::cluster::checkpoints::Continues;
    use crate::cluster::commands::{Change, DrainNode, SettleSuperseded, SubmitJob, UndrainNode};
    use crate::cluster::tests::{Script, checkpoint_of, stopped, training};
    use fleet_common::events::{CheckpointRecord, EventBody};
    use fleet_common::ids::{JobId, NodeId};
    use fleet_common::protocol::Wish;

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
