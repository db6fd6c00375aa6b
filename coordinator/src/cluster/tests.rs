//! Scripts for the commands' tests.

use super::checkpoints::Continues;
use super::commands::*;
use super::history::HistoryRow;
use super::members::Standing;
use super::session::{RequestId, Stamp};
use super::*;
use fleet_common::events::{CheckpointRecord, Event, EventBatch, EventBody, Outcome, Shard, Step};
use fleet_common::protocol::{
    CoordinatorAddress, Feature, NewExport, NewProfile, Point, Program, Role, RunKey, Wish, Work,
};

/// Applies commands one after the other and keeps all history.
pub(crate) struct Script {
    pub state: State,
    pub now: u64,
    pub history: Vec<HistoryRow>,
    pub index: u64,
}

impl Script {
    pub fn new() -> Self {
        Script { state: State::new("test".into()), now: 1_000, history: Vec::new(), index: 1 }
    }

    /// With node 1, called `box`.
    pub fn with_node(slots: u32) -> Self {
        let mut script = Script::new();
        script.run(token("w", Role::Worker, 9));
        script.run(redeem("w", "box"));
        script.describe(slots);
        script
    }

    /// Node 1 has `slots[0]`, and so on.
    pub fn with_nodes(slots: &[u32]) -> Self {
        let mut script = Script::new();
        script.run(token("w", Role::Worker, 999));
        for (at, slots) in slots.iter().enumerate() {
            let node = NodeId(at as u64 + 1);
            script.run(redeem("w", ""));
            assert_eq!(script.run(describe(node, &format!("n{}", node.0), *slots, &[])), Answer::Done);
        }
        script
    }

    /// With coordinators 1 to `voters`.
    pub fn with_replicas(voters: u64) -> Self {
        let founders = (1..=voters).map(|id| {
            let record = ReplicaRecord {
                address: address(id),
                name: format!("c{id}"),
                version: "0".into(),
                level: COMMAND_LEVEL,
                joined_unix_ms: 0,
                standing: Standing::Voter,
            };
            (ReplicaId(id), record)
        });
        Script { state: State::founded("test".into(), founders.collect()), ..Script::new() }
    }

    /// A coordinator's token is redeemed; it is not registered yet.
    pub fn admit_coordinator(&mut self) {
        self.run(token("c", Role::Coordinator, 9));
        assert!(matches!(self.run(redeem("c", "")), Answer::Redeemed { member: Member::Coordinator(_) }));
    }

    pub fn at(&mut self, now: u64) -> &mut Self {
        self.now = now;
        self
    }

    pub fn run(&mut self, change: Change) -> Answer {
        self.run_as(None, change)
    }

    /// A decision of the planner.
    pub fn decide(&mut self, why: &str, change: Change) -> Answer {
        self.apply(None, None, Some(why.to_owned()), change)
    }

    /// As this user wishes.
    pub fn run_by(&mut self, user: UserId, change: Change) -> Answer {
        self.apply(None, Some(user), None, change)
    }

    pub fn run_as(&mut self, request: Option<RequestId>, change: Change) -> Answer {
        self.apply(request.map(Stamp::from), None, None, change)
    }

    pub fn run_stamped(&mut self, stamp: Stamp, change: Change) -> Answer {
        self.apply(Some(stamp), None, None, change)
    }

    fn apply(
        &mut self,
        request: Option<Stamp>,
        by: Option<UserId>,
        why: Option<String>,
        change: Change,
    ) -> Answer {
        self.index += 1;
        let applied = self.state.apply(self.index, Command { unix_ms: self.now, request, by, why, change });
        self.history.extend(applied.history);
        applied.answer
    }

    pub fn node(&self) -> NodeId {
        NodeId(1)
    }

    pub fn describe(&mut self, slots: u32) {
        assert_eq!(self.run(describe(self.node(), "box", slots, &[])), Answer::Done);
    }

    pub fn submit(&mut self, world_size: u32) -> JobId {
        self.submit_as(submit(world_size))
    }

    pub fn submit_training(&mut self, world_size: u32) -> JobId {
        self.submit_as(job(training(), world_size, Wish { queue: true, ..Wish::default() }))
    }

    pub fn submit_as(&mut self, submit: Change) -> JobId {
        match self.run(submit) {
            Answer::Submitted { job } => job,
            other => panic!("{other:?}"),
        }
    }

    /// All of it to node 1.
    pub fn assign(&mut self, job: JobId) {
        let ranks = self.state.jobs()[&job].world_size;
        self.place(job, &[(1, ranks)]);
    }

    pub fn place(&mut self, job: JobId, parts: &[(u64, u32)]) {
        let generation = self.state.jobs()[&job].generation + 1;
        let parts = parts.iter().map(|(node, ranks)| (NodeId(*node), *ranks)).collect();
        assert_eq!(self.run(Change::AssignGang(AssignGang { job, generation, parts })), Answer::Done);
    }

    /// The agent of `node` reports of the job's present generation.
    pub fn tell(&mut self, job: JobId, node: u64, first_seq: u64, bodies: Vec<EventBody>) -> Answer {
        let events = bodies.into_iter().map(|body| Event { unix_ms: 5, body }).collect();
        let generation = self.state.jobs()[&job].generation;
        let batch = EventBatch { job, generation, first_seq, events };
        self.run(Change::RecordEvents(RecordEvents { node: NodeId(node), batch }))
    }

    pub fn lose_node(&mut self) {
        self.run(Change::MarkNodeLost(MarkNodeLost { node: self.node(), silent_ms: 10_000 }));
    }

    pub fn events(&self, job: JobId) -> Vec<&Event> {
        self.history
            .iter()
            .filter_map(|row| match row {
                HistoryRow::Event { job: of, event, .. } if *of == job => Some(event),
                _ => None,
            })
            .collect()
    }

    pub fn last_event_is_finished(&self, job: JobId) -> bool {
        matches!(self.events(job).last(), Some(Event { body: EventBody::Finished(_), .. }))
    }

    pub fn steps_in_history(&self, job: JobId) -> Vec<u64> {
        let steps = self.events(job).into_iter().filter_map(|event| match &event.body {
            EventBody::Step(step) => Some(step.step),
            _ => None,
        });
        steps.collect()
    }
}

pub(crate) fn token(id: &str, role: Role, uses: u32) -> Change {
    let secret_sha256 = [1; 32];
    Change::CreateToken(CreateToken { id: id.into(), secret_sha256, role, ttl_ms: 1 << 40, uses })
}

pub(crate) fn redeem(id: &str, name: &str) -> Change {
    Change::RedeemToken(RedeemToken {
        id: id.into(),
        secret_sha256: [1; 32],
        name: name.into(),
        key: [3; 32],
    })
}

pub(crate) fn address(id: u64) -> CoordinatorAddress {
    CoordinatorAddress { replica: ReplicaId(id), client: format!("c{id}:1"), member: format!("c{id}:2") }
}

pub(crate) fn replica(id: u64) -> RegisterReplica {
    RegisterReplica {
        address: address(id),
        name: format!("c{id}"),
        version: "0".into(),
        level: COMMAND_LEVEL,
    }
}

pub(crate) fn describe(node: NodeId, name: &str, slots: u32, labels: &[(&str, &str)]) -> Change {
    Change::DescribeNode(DescribeNode {
        node,
        name: name.into(),
        slots,
        device: "cpu".into(),
        version: "0".into(),
        labels: labels.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect(),
        host: format!("host-{}", node.0),
        checkpoint_port: 700,
        process: 1,
        earlier: vec![],
    })
}

pub(crate) fn program() -> Work {
    Work::Program(Program { argv: vec!["true".into()], working_dir: "/".into(), env: vec![] })
}

pub(crate) fn training() -> Work {
    Work::Train { job_json: "{}".into() }
}

pub(crate) fn job(work: Work, world_size: u32, wish: Wish) -> Change {
    Change::SubmitJob(SubmitJob {
        name: "test".into(),
        world_size,
        work,
        wish,
        keep_checkpoints: 3,
        continues: Continues::Nothing,
    })
}

/// A program that may wait for nodes.
pub(crate) fn submit(world_size: u32) -> Change {
    job(program(), world_size, Wish { queue: true, ..Wish::default() })
}

pub(crate) fn step(step: u64) -> EventBody {
    EventBody::Step(Step {
        step,
        total_steps: 10,
        epoch: 0.0,
        loss: 2.5,
        lr: 1e-3,
        grad_norm: 1.0,
        tokens_per_s: 100.0,
    })
}

pub(crate) fn checkpoint(step: u64) -> EventBody {
    EventBody::Checkpoint(checkpoint_of(step, 1))
}

pub(crate) fn checkpoint_of(step: u64, writers: u32) -> CheckpointRecord {
    let shards = (0..writers).map(|writer| Shard {
        writer,
        name: format!("part-{writer}"),
        bytes: 10,
        sha256: "ab".repeat(32),
    });
    CheckpointRecord {
        step,
        path: format!("/c/step-{step}"),
        manifest_sha256: "cd".repeat(32),
        bytes: 10 * u64::from(writers),
        loss: 1.0,
        writers,
        disks: vec![0],
        shards: shards.collect(),
    }
}

pub(crate) fn stopped(steps: u64) -> EventBody {
    EventBody::Finished(Outcome::Stopped { steps })
}

pub(crate) fn point(series: &str, step: u64, value: f64) -> Point {
    Point { series: series.into(), step, value, unix_ms: step }
}

pub(crate) fn export(job: u64, step: u64) -> NewExport {
    let (format, path, sha256) = ("onnx".into(), "/m.onnx".into(), "ef".repeat(32));
    NewExport { job: JobId(job), step, format, path, bytes: 9, sha256 }
}

pub(crate) fn profile(run: RunKey) -> NewProfile {
    let feature = Feature {
        name: "length".into(),
        samples: 10,
        mean: 1.0,
        std_dev: 0.5,
        edges: vec![0.0, 1.0, 2.0],
        counts: vec![4, 6],
    };
    NewProfile { run, name: "p".into(), features: vec![feature] }
}

pub(crate) fn finished() -> EventBody {
    EventBody::Finished(Outcome::Succeeded { steps: 7, final_loss: Some(1.5), tokens_per_s: 9.0 })
}

pub(crate) fn why(answer: Answer) -> String {
    match answer {
        Answer::Rejected(refusal) => refusal.message,
        other => panic!("not refused: {other:?}"),
    }
}
