//! Where checkpoints lie, and which one a gang goes on from.
//!
//! A checkpoint lies on the disks of the nodes whose ranks have written it, and on those that have fetched it since. The one that a generation
//! goes on from is chosen when the gang gets its place, once for all of its nodes. Each node that has not got it is told who has, and those
//! are told to whom they lend it until the ranks start. When a node cannot get it, the gang stops and starts again from an older one.

use super::ends::wake_parts;
use super::records::{JobRecord, Part, RecordedCheckpoint, Stop, node_error};
use super::{Context, Effect, State};
use fleet_common::events::{CheckpointRecord, Event, EventBody, HOSTS_MAX, Level};
use fleet_common::exit::Fault;
use fleet_common::ids::{JobId, NodeId};
use fleet_common::protocol::{Files, Holder, JobState, Loan, Member, ResumePoint};
use serde::{Deserialize, Serialize};
use std::path::Path;

/// Nodes of which it is known that they have fetched one checkpoint.
const COPIES_MAX: usize = 64;
/// Characters of what is said of a checkpoint that cannot be had.
const WHY_MAX: usize = 1_000;

/// What a job goes on from when it starts for the first time, as its file says.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub enum Continues {
    #[default]
    Nothing,
    /// The checkpoint at this path.
    From(String),
    /// The newest one in this directory.
    Newest(String),
}

/// A node that has a checkpoint, or files of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {
    pub node: NodeId,
    pub files: Files,
}

/// The checkpoint that a generation goes on from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Resumed {
    /// Whose it is.
    pub job: JobId,
    /// Without its shards and disks.
    pub record: CheckpointRecord,
    pub held: Vec<Held>,
}

impl Continues {
    pub(super) fn takes(&self, path: &str) -> bool {
        match self {
            Continues::Nothing => false,
            Continues::From(of) => path == of,
            Continues::Newest(dir) => Path::new(path).parent() == Some(Path::new(dir)),
        }
    }
}

impl State {
    /// What the next start of a job on these nodes goes on from, as far as the cluster knows of it. What one node alone has, and the job starts
    /// there, is left to it, until it turns out not to have it, as is what the cluster has not recorded.
    pub(crate) fn resume_of(&self, id: JobId, nodes: &[NodeId]) -> Option<Resumed> {
        let job = self.jobs.get(&id)?;
        let is_first = job.generation == 0 || job.checkpoints.is_empty();
        let is_left_to_them = |known: &Resumed| {
            let on_it = |held: &Held| nodes == [held.node] && held.files == Files::All;
            is_first && job.passed_over.is_empty() && known.held.iter().all(on_it)
        };
        self.newest_for(id).filter(|known| !is_left_to_them(known))
    }

    /// The newest checkpoint from which a job can go on: of its own, or before it has one of what its file says.
    fn newest_for(&self, id: JobId) -> Option<Resumed> {
        let job = self.jobs.get(&id)?;
        let passed = |known: &RecordedCheckpoint| job.passed_over.contains(&known.record.manifest_sha256);
        let resumed = |of: JobId, known: &RecordedCheckpoint| Resumed {
            job: of,
            record: known.record.clone(),
            held: known.held.clone(),
        };
        if job.generation > 0 && !job.checkpoints.is_empty() {
            let newest = job.checkpoints.iter().rev().find(|known| !passed(known));
            return newest.map(|known| resumed(id, known));
        }
        let all =
            self.jobs.iter().flat_map(|(of, job)| job.checkpoints.iter().map(move |known| (*of, known)));
        let meant = all.filter(|(_, known)| job.continues.takes(&known.record.path) && !passed(known));
        let newest = meant.max_by_key(|(of, known)| (known.unix_ms, *of, known.event));
        newest.map(|(of, known)| resumed(of, known))
    }

    /// As agents are told.
    pub(super) fn resume_point(&self, resumed: &Resumed) -> ResumePoint {
        let Resumed { record, held, .. } = resumed;
        let holder = |held: &Held| {
            let node = self.nodes.get(&held.node).filter(|node| !node.lost && node.checkpoint_port != 0);
            let admitted = self.admitted.get(&Member::Worker(held.node));
            Holder {
                node: held.node,
                name: self.node_name(held.node),
                address: node.zip(admitted).map(|(node, _)| match node.host.contains(':') {
                    true => format!("[{}]:{}", node.host, node.checkpoint_port),
                    false => format!("{}:{}", node.host, node.checkpoint_port),
                }),
                key: admitted.map(|admitted| admitted.key).unwrap_or_default(),
                files: held.files,
            }
        };
        ResumePoint {
            step: record.step,
            path: record.path.clone(),
            manifest_sha256: record.manifest_sha256.clone(),
            holders: held.iter().map(holder).collect(),
        }
    }

    /// What other nodes may read on this one: checkpoints of gangs that were placed there and have not started.
    pub fn loans(&self, node: NodeId) -> Vec<Loan> {
        let mut loans = Vec::new();
        for job in self.jobs.values().filter(|job| job.state == JobState::Starting) {
            let Some(at) = &job.placement else { continue };
            let Some(resumed) = at.resume.as_ref().filter(|resumed| resumed.has(node)) else { continue };
            for part in at.parts.iter().filter(|part| part.node != node && !part.finished) {
                let Some(admitted) = self.admitted.get(&Member::Worker(part.node)) else { continue };
                loans.push(Loan {
                    to: part.node,
                    key: admitted.key,
                    path: resumed.record.path.clone(),
                    manifest_sha256: resumed.record.manifest_sha256.clone(),
                });
            }
        }
        loans
    }

    /// A node has what its part of the job goes on from.
    pub(crate) fn has_checkpoint(&mut self, id: JobId, node: NodeId) {
        let Some((at, job)) = self.jobs.get(&id).and_then(|job| Some((job.placement.as_ref()?, job))) else {
            return;
        };
        // Of one that looks on its own node first it is not known which it took.
        let looks =
            at.generation == 1 && at.parts.len() == 1 && matches!(job.continues, Continues::Newest(_));
        let Some(resumed) = at.resume.as_ref().filter(|_| !looks) else { return };
        let (of, record) = (resumed.job, resumed.record.clone());
        let sha256 = &record.manifest_sha256;
        let mut all = self.jobs.get_mut(&of).into_iter().flat_map(|job| &mut job.checkpoints);
        let known = all.find(|known| known.record.manifest_sha256 == *sha256);
        let copy = Held { node, files: Files::All };
        let was_there = known.as_ref().is_some_and(|known| known.held.iter().any(|held| held.node == node));
        if let Some(known) =
            known.filter(|known| known.held.len() < COPIES_MAX && !known.held.contains(&copy))
        {
            known.held.push(copy);
        }
        let Some(job) = self.jobs.get_mut(&id).filter(|_| of != id && !was_there) else { return };
        match job.fetched.iter_mut().find(|fetched| fetched.record.manifest_sha256 == *sha256) {
            Some(fetched) if fetched.held.contains(&copy) || fetched.held.len() >= HOSTS_MAX => {}
            Some(fetched) => fetched.held.push(copy),
            None => job.fetched.push(Resumed { job: of, record, held: vec![copy] }),
        }
    }

    /// The nodes of these hosts of the job's gang do not have these checkpoints any more, whosever they are. One that no node has is none.
    pub(crate) fn checkpoints_removed(&mut self, id: JobId, hosts: &[u32], manifests: &[String]) {
        let parts = self.jobs.get(&id).and_then(|job| job.placement.as_ref()).map(|at| &at.parts[..]);
        let part = |host: &u32| parts?.get(*host as usize);
        let nodes: Vec<NodeId> = hosts.iter().filter_map(part).map(|part| part.node).collect();
        let stays = |record: &CheckpointRecord, held: &mut Vec<Held>| {
            if !manifests.contains(&record.manifest_sha256) {
                return true;
            }
            held.retain(|held| !nodes.contains(&held.node));
            !held.is_empty()
        };
        for job in self.jobs.values_mut() {
            job.checkpoints.retain_mut(|known| stays(&known.record, &mut known.held));
            job.fetched.retain_mut(|fetched| stays(&fetched.record, &mut fetched.held));
        }
    }

    /// A node cannot get what its part of the job was to go on from: the gang stops, and starts again from an older one, if there is any.
    pub(crate) fn checkpoint_lost(
        &mut self,
        id: JobId,
        node: NodeId,
        manifest_sha256: &str,
        why: &str,
        context: &mut Context,
    ) {
        let name = self.node_name(node);
        let Some(job) = self.jobs.get_mut(&id).filter(|job| job.stop.is_none() && !job.state.is_final())
        else {
            return;
        };
        let Some(at) = &job.placement else { return };
        let meant = at.resume.as_ref().filter(|resumed| resumed.record.manifest_sha256 == manifest_sha256);
        let Some(resumed) = meant else { return };
        let step = resumed.record.step;
        let why: String = why.chars().filter(|c| !c.is_control()).take(WHY_MAX).collect();
        job.passed_over.push(manifest_sha256.to_owned());
        let next = self.newest_for(id);
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let Some(next) = next else {
            let message = format!(
                "on node {name} the job cannot go on from step {step}, and there is no older checkpoint that it could go on from: {why}; bring that \
                 node back, or its files to the same path on {name}, and submit the job again with resume_from_checkpoint = \"latest\""
            );
            let mut error = node_error(name, message);
            error.fault = Fault::Environment;
            return self.break_off(id, error, context);
        };
        let line = format!(
            "on node {name}: {why}; the job goes back to the checkpoint of step {}",
            next.record.step
        );
        let body = EventBody::Log { rank: None, level: Level::Warn, line };
        job.record(id, Event { unix_ms: context.unix_ms, body }, context);
        job.state = JobState::Stopping;
        job.stop = Some(Stop::Now);
        job.requeue = true;
        context.effects.push(Effect::Job(id));
        wake_parts(job, context);
    }
}

impl Resumed {
    fn has(&self, node: NodeId) -> bool {
        self.held.iter().any(|held| held.node == node)
    }
}

impl JobRecord {
    /// Where a checkpoint lies that the present gang has written. A node has what was written to the disk that it sees.
    pub(super) fn written_by(&self, record: &CheckpointRecord) -> Vec<Held> {
        let parts = self.placement.as_ref().map_or(&[][..], |at| &at.parts[..]);
        let on_disks: Vec<(&Part, u32)> = parts.iter().zip(record.disks.iter().copied()).collect();
        let mut all = Vec::new();
        for (part, disk) in &on_disks {
            let there = on_disks.iter().filter(|(other, of)| of == disk && other.first_rank < record.writers);
            let held = there.map(|(other, _)| Held {
                node: part.node,
                files: Files::Of {
                    first: other.first_rank,
                    ranks: other.ranks.min(record.writers - other.first_rank),
                },
            });
            let held: Vec<Held> = held.collect();
            let ranks = |held: &Held| if let Files::Of { ranks, .. } = held.files { ranks } else { 0 };
            match held.iter().map(ranks).sum::<u32>() == record.writers {
                true => all.push(Held { node: part.node, files: Files::All }),
                false => all.extend(held),
            }
        }
        all
    }
}

/// Those who lend the gang its checkpoint have something new to be told.
pub(crate) fn wake_holders(job: &JobRecord, context: &mut Context) {
    let resumed = job.placement.iter().filter_map(|at| at.resume.as_ref());
    context.effects.extend(resumed.flat_map(|resumed| &resumed.held).map(|held| Effect::Node(held.node)));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::commands::{Change, DrainNode, MarkNodeLost, SubmitJob};
    use crate::cluster::tests::{Script, checkpoint_of, stopped, training};
    use fleet_common::events::DataStats;
    use fleet_common::protocol::{ToAgent, Wish};

    fn saved(step: u64, writers: u32) -> EventBody {
        let manifest_sha256 = format!("{step:064x}");
        EventBody::Checkpoint(CheckpointRecord { manifest_sha256, ..checkpoint_of(step, writers) })
    }

    fn lost(step: u64) -> EventBody {
        EventBody::CheckpointLost { manifest_sha256: format!("{step:064x}"), why: "it is gone".into() }
    }

    fn submit(script: &mut Script, continues: Continues, nodes: u32) -> JobId {
        let wish = Wish { queue: true, nodes: Some(nodes), ..Wish::default() };
        let (name, work) = ("test".into(), training());
        script.submit_as(Change::SubmitJob(SubmitJob {
            name,
            world_size: 2 * nodes,
            work,
            wish,
            keep_checkpoints: 3,
            continues,
        }))
    }

    fn told(script: &Script, node: u64) -> Option<ResumePoint> {
        script.state.orders(NodeId(node)).into_iter().find_map(|order| match order {
            ToAgent::StartGang(gang) => gang.resume,
            _ => None,
        })
    }

    /// A job that has saved steps 5 and 6 on node 1 and waits for another place.
    fn drained() -> (Script, JobId) {
        let mut script = Script::with_nodes(&[2, 2, 2]);
        let job = submit(&mut script, Continues::Nothing, 1);
        script.place(job, &[(1, 2)]);
        script.tell(job, 1, 1, vec![saved(5, 2), saved(6, 2)]);
        script.run(Change::DrainNode(DrainNode { node: NodeId(1), now: true }));
        script.tell(job, 1, 3, vec![stopped(6)]);
        (script, job)
    }

    #[test]
    fn who_has_written_a_checkpoint_lends_it_to_the_next_place_until_the_ranks_start() {
        let (mut script, job) = drained();
        assert!(script.state.loans(NodeId(1)).is_empty());
        script.place(job, &[(2, 2)]);
        let point = told(&script, 2).unwrap();
        assert_eq!((point.step, point.path.as_str()), (6, "/c/step-6"));
        let [holder] = &point.holders[..] else { panic!("{point:?}") };
        assert_eq!((holder.node, holder.files), (NodeId(1), Files::All));
        assert_eq!(holder.address.as_deref(), Some("host-1:700"));
        let loans = script.state.loans(NodeId(1));
        assert!(
            matches!(&loans[..], [loan] if loan.to == NodeId(2) && loan.path == "/c/step-6"),
            "{loans:?}"
        );
        assert!(script.state.loans(NodeId(2)).is_empty() && script.state.loans(NodeId(3)).is_empty());
        script.tell(job, 2, 1, vec![EventBody::DataReady(DataStats::default())]);
        let held = &script.state.jobs()[&job].checkpoints[1].held;
        assert_eq!(held[1], Held { node: NodeId(2), files: Files::All }, "it has a copy now");
        script.tell(job, 2, 2, vec![EventBody::Started { step: 6, parameters: 1, device: "cpu".into() }]);
        assert!(script.state.loans(NodeId(1)).is_empty(), "it has started");
    }

    #[test]
    fn what_several_hosts_have_written_lies_on_the_disks_that_they_see() {
        let of = |node, first, ranks| Held { node: NodeId(node), files: Files::Of { first, ranks } };
        let all = |node| Held { node: NodeId(node), files: Files::All };
        let cases = [
            (2, vec![0, 1, 2], vec![all(1)]),
            (5, vec![0, 1, 2], vec![of(1, 0, 2), of(2, 2, 2), of(3, 4, 1)]),
            (6, vec![0, 0, 0], vec![all(1), all(2), all(3)]),
            (2, vec![0, 0, 1], vec![all(1), all(2)]),
            (6, vec![0, 1, 0], vec![of(1, 0, 2), of(1, 4, 2), of(2, 2, 2), of(3, 0, 2), of(3, 4, 2)]),
        ];
        for (writers, disks, held) in cases {
            let mut script = Script::with_nodes(&[2, 2, 2]);
            let job = submit(&mut script, Continues::Nothing, 3);
            script.place(job, &[(1, 2), (2, 2), (3, 2)]);
            let record = CheckpointRecord { disks, ..checkpoint_of(5, writers) };
            script.tell(job, 1, 1, vec![EventBody::Checkpoint(record)]);
            assert_eq!(script.state.jobs()[&job].checkpoints[0].held, held);
        }
    }

    #[test]
    fn without_the_newest_one_a_gang_goes_back_to_an_older_one_and_fails_without_any() {
        let (mut script, job) = drained();
        script.run(Change::MarkNodeLost(MarkNodeLost { node: NodeId(1), silent_ms: 10_000 }));
        script.place(job, &[(2, 2)]);
        assert_eq!(told(&script, 2).unwrap().holders[0].address, None, "nobody can ask it");
        script.tell(job, 2, 1, vec![lost(5)]);
        assert_eq!(script.state.jobs()[&job].state, JobState::Starting, "it goes on from another one");
        script.tell(job, 2, 2, vec![lost(6)]);
        assert!(script.state.jobs()[&job].requeue);
        script.tell(job, 2, 3, vec![stopped(0)]);
        assert_eq!(script.state.jobs()[&job].state, JobState::Queued);
        script.place(job, &[(3, 2)]);
        assert_eq!(told(&script, 3).unwrap().step, 5);
        script.tell(job, 3, 1, vec![lost(5)]);
        script.tell(job, 3, 2, vec![stopped(0)]);
        let record = &script.state.jobs()[&job];
        let error = record.error.clone().unwrap();
        assert_eq!((record.state, error.fault), (JobState::Failed, Fault::Environment));
        assert!(
            error.message.contains("it is gone") && error.message.contains("node n3"),
            "{}",
            error.message
        );
    }

    #[test]
    fn what_a_disk_has_no_more_is_not_said_to_be_on_the_nodes_that_see_it() {
        let mut script = Script::with_nodes(&[2, 2, 2]);
        let job = submit(&mut script, Continues::Nothing, 3);
        script.place(job, &[(1, 2), (2, 2), (3, 2)]);
        let saved = |step: u64| {
            let manifest_sha256 = format!("{step:064x}");
            let record = CheckpointRecord { disks: vec![0, 1, 1], manifest_sha256, ..checkpoint_of(step, 6) };
            EventBody::Checkpoint(record)
        };
        script.tell(job, 1, 1, vec![saved(5), saved(6)]);
        let removed = |hosts: &[u32], step: u64| {
            let manifests = vec![format!("{step:064x}"), "ef".repeat(32)];
            EventBody::CheckpointsRemoved { hosts: hosts.to_vec(), manifests }
        };
        let nodes = |script: &Script| -> Vec<(u64, Vec<u64>)> {
            let known = script.state.jobs()[&job].checkpoints.iter();
            known.map(|one| (one.record.step, one.held.iter().map(|held| held.node.0).collect())).collect()
        };
        let before = nodes(&script);
        assert_eq!(before, [(5, vec![1, 2, 2, 3, 3]), (6, vec![1, 2, 2, 3, 3])]);
        let kept = script.state.jobs()[&job].events;
        script.tell(job, 2, 1, vec![removed(&[1, 2, 9], 5)]);
        assert_eq!(nodes(&script), [(5, vec![1]), before[1].clone()]);
        script.tell(job, 1, 3, vec![removed(&[0], 5)]);
        assert_eq!(nodes(&script), before[1..], "nobody has it");
        assert_eq!(script.state.jobs()[&job].events, kept);
    }

    #[test]
    fn a_job_that_names_a_checkpoint_gets_it_from_whoever_has_it() {
        let (mut script, _) = drained();
        for (continues, step) in [
            (Continues::From("/c/step-5".into()), Some(5)),
            (Continues::Newest("/c".into()), Some(6)),
            (Continues::Newest("/d".into()), None),
            (Continues::Nothing, None),
        ] {
            let job = submit(&mut script, continues, 1);
            script.place(job, &[(2, 2)]);
            assert_eq!(told(&script, 2).map(|point| point.step), step);
            script.tell(job, 2, 1, vec![stopped(0)]);
        }
        // On the node where it lies it is the node's to look at.
        script.run(Change::UndrainNode(crate::cluster::commands::UndrainNode { node: NodeId(1) }));
        let job = submit(&mut script, Continues::Newest("/c".into()), 1);
        script.place(job, &[(1, 2)]);
        assert_eq!(told(&script, 1), None);
    }

    #[test]
    fn a_node_that_has_it_is_told_who_else_has() {
        let (mut script, _) = drained();
        let other = submit(&mut script, Continues::From("/c/step-5".into()), 1);
        script.place(other, &[(2, 2)]);
        script.tell(other, 2, 1, vec![EventBody::DataReady(DataStats::default()), stopped(0)]);
        let job = submit(&mut script, Continues::From("/c/step-5".into()), 1);
        script.place(job, &[(2, 2)]);
        let holders = told(&script, 2).unwrap().holders;
        assert_eq!(holders.iter().map(|holder| holder.node).collect::<Vec<_>>(), [NodeId(1), NodeId(2)]);
    }

    #[test]
    fn an_older_one_that_all_its_nodes_have_is_what_a_gang_goes_back_to() {
        let (mut script, _) = drained();
        let ready = || EventBody::DataReady(DataStats::default());
        let other = submit(&mut script, Continues::From("/c/step-5".into()), 1);
        script.place(other, &[(2, 2)]);
        script.tell(other, 2, 1, vec![ready(), stopped(0)]);
        let job = submit(&mut script, Continues::Newest("/c".into()), 1);
        script.place(job, &[(2, 2)]);
        assert_eq!(told(&script, 2).map(|point| point.step), Some(6));
        script.tell(job, 2, 1, vec![lost(6)]);
        assert!(script.state.jobs()[&job].requeue);
        script.tell(job, 2, 2, vec![stopped(0)]);
        script.place(job, &[(2, 2)]);
        assert_eq!(told(&script, 2).map(|point| point.step), Some(5));
    }
}
