//! Scripts for the commands' tests, and the properties that hold for all commands together.

use super::commands::*;
use super::history::HistoryRow;
use super::members::Standing;
use super::records::Stop;
use super::session::RequestId;
use super::*;
use fleet_common::events::{CheckpointRecord, Event, EventBatch, EventBody, Outcome, Step};
use fleet_common::ids::ClientId;
use fleet_common::protocol::{CoordinatorAddress, Program, Role, Work};
use proptest::prelude::*;

/// Applies commands one after the other and keeps all history.
pub(crate) struct Script {
    pub state: State,
    pub now: u64,
    pub history: Vec<HistoryRow>,
    index: u64,
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

    pub fn run_as(&mut self, request: Option<RequestId>, change: Change) -> Answer {
        self.index += 1;
        let applied = self.state.apply(self.index, Command { unix_ms: self.now, request, why: None, change });
        self.history.extend(applied.history);
        applied.answer
    }

    pub fn node(&self) -> NodeId {
        NodeId(1)
    }

    pub fn describe(&mut self, slots: u32) {
        let describe = DescribeNode {
            node: self.node(),
            name: "box".into(),
            slots,
            device: "cpu".into(),
            version: "0".into(),
        };
        assert_eq!(self.run(Change::DescribeNode(describe)), Answer::Done);
    }

    pub fn submit(&mut self, world_size: u32) -> JobId {
        match self.run(submit(world_size, None)) {
            Answer::Submitted { job } => job,
            other => panic!("{other:?}"),
        }
    }

    pub fn assign(&mut self, job: JobId) {
        let generation = self.state.jobs()[&job].generation() + 1;
        let assign = AssignGang { job, node: self.node(), generation };
        assert_eq!(self.run(Change::AssignGang(assign)), Answer::Done);
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
    Change::RedeemToken(RedeemToken { id: id.into(), secret_sha256: [1; 32], name: name.into() })
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

pub(crate) fn submit(world_size: u32, largest_node: Option<u32>) -> Change {
    let program = Program { argv: vec!["true".into()], working_dir: "/".into(), env: vec![] };
    let work = Work::Program(program);
    Change::SubmitJob(SubmitJob { name: "test".into(), world_size, work, keep_checkpoints: 3, largest_node })
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
    let record = CheckpointRecord {
        step,
        path: format!("/c/step-{step}"),
        manifest_sha256: "00".into(),
        bytes: 1,
        loss: 1.0,
    };
    EventBody::Checkpoint(record)
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

/// The largest node of the properties below; a node may shrink under its jobs, but never had more.
const SLOTS: u32 = 4;

/// Commands over few ids, so that they meet.
fn any_change() -> impl Strategy<Value = Change> {
    let job = || (1..5u64).prop_map(JobId);
    let node = || (1..4u64).prop_map(NodeId);
    let body = prop_oneof![(1..20u64).prop_map(step), (1..20u64).prop_map(checkpoint), Just(finished())];
    prop_oneof![
        (0..3u8, 1..4u32).prop_map(|(id, uses)| {
            let id = format!("t{id}");
            Change::CreateToken(CreateToken {
                id,
                secret_sha256: [1; 32],
                role: Role::Worker,
                ttl_ms: 500,
                uses,
            })
        }),
        (0..3u8, 1..3u8).prop_map(|(id, secret)| {
            Change::RedeemToken(RedeemToken {
                id: format!("t{id}"),
                secret_sha256: [secret; 32],
                name: "n".into(),
            })
        }),
        (node(), 1..=SLOTS).prop_map(|(node, slots)| {
            Change::DescribeNode(DescribeNode {
                node,
                name: "n".into(),
                slots,
                device: "cpu".into(),
                version: "0".into(),
            })
        }),
        node().prop_map(|node| Change::MarkNodeLost(MarkNodeLost { node, silent_ms: 10_000 })),
        (1..4u32).prop_map(|world_size| submit(world_size, None)),
        (job(), node(), 1..3u64).prop_map(|(job, node, generation)| Change::AssignGang(AssignGang {
            job,
            node,
            generation
        })),
        (job(), node(), 1..6u64, prop::collection::vec(body, 1..4)).prop_map(
            |(job, node, first_seq, bodies)| {
                let events = bodies.into_iter().map(|body| Event { unix_ms: 1, body }).collect();
                Change::RecordEvents(RecordEvents {
                    node,
                    batch: EventBatch { job, generation: 1, first_seq, events },
                })
            }
        ),
        (job(), any::<bool>()).prop_map(|(job, now)| {
            Change::CancelJob(CancelJob { job, stop: if now { Stop::Now } else { Stop::AfterCheckpoint } })
        }),
        (job(), 1..3u64).prop_map(|(job, generation)| Change::FailJob(FailJob {
            job,
            generation,
            message: "m".into()
        })),
    ]
}

fn any_command() -> impl Strategy<Value = Command> {
    let request = prop::option::of((1..4u128, 1..12u64));
    (any_change(), request, 0..5_000u64).prop_map(|(change, request, unix_ms)| Command {
        unix_ms,
        request: request.map(|(client, seq)| RequestId { client: ClientId(client), seq }),
        why: None,
        change,
    })
}

fn check_invariants(state: &State) {
    for id in state.nodes().keys() {
        assert!(state.slots_used(*id) <= SLOTS, "slots of {id} are promised twice");
    }
    for (id, job) in state.jobs() {
        assert_eq!(job.state.is_final(), job.finished_unix_ms.is_some(), "{id}");
        assert_eq!(job.state.is_final(), job.work.is_none(), "{id}");
        assert!(job.checkpoints.len() <= job.keep_checkpoints as usize);
    }
}

proptest! {
    #[test]
    fn a_snapshot_continues_like_the_state_it_was_taken_from(
        before in prop::collection::vec(any_command(), 0..60),
        after in prop::collection::vec(any_command(), 0..30),
    ) {
        let mut state = State::new("test".into());
        for (index, command) in before.into_iter().enumerate() {
            state.apply(index as u64 + 1, command);
            check_invariants(&state);
        }
        let mut restored: State = fleet_common::codec::decode(&fleet_common::codec::encode(&state).unwrap()).unwrap();
        prop_assert_eq!(&restored, &state);
        for (index, command) in after.into_iter().enumerate() {
            let index = index as u64 + 1_000;
            prop_assert_eq!(restored.apply(index, command.clone()), state.apply(index, command));
        }
        prop_assert_eq!(restored, state);
    }

    #[test]
    fn duplicated_requests_apply_once_in_any_interleaving(
        changes in prop::collection::vec(any_change(), 1..20),
        repeats in prop::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>()), 0..40),
    ) {
        // Each change is a request of its own; a repeat is put anywhere after its original.
        let mut order: Vec<usize> = (0..changes.len()).collect();
        for (which, place) in repeats {
            let original = which.index(changes.len());
            let first = order.iter().position(|at| *at == original).unwrap();
            let place = first + 1 + place.index(order.len() - first);
            order.insert(place, original);
        }
        let mut once = Script::new();
        let answers: Vec<Answer> =
            changes.iter().map(|change| once.run_as(None, change.clone())).collect();
        let mut repeated = Script::new();
        for at in order {
            let request = RequestId { client: ClientId(1), seq: at as u64 + 1 };
            prop_assert_eq!(&repeated.run_as(Some(request), changes[at].clone()), &answers[at]);
        }
        prop_assert_eq!(&repeated.history, &once.history);
        prop_assert_eq!(repeated.state.jobs(), once.state.jobs());
        prop_assert_eq!(repeated.state.nodes(), once.state.nodes());
        prop_assert_eq!(repeated.state.tokens(), once.state.tokens());
    }
}

/// The bytes of commands as they lie in logs. A change here needs a new format version.
#[test]
fn commands_keep_their_bytes() {
    let request = Some(RequestId { client: ClientId(7), seq: 2 });
    let bytes = |change| {
        hex::encode(fleet_common::codec::encode(&Command { unix_ms: 1, request, why: None, change }).unwrap())
    };
    let (job, node) = (JobId(5), NodeId(3));
    assert_eq!(
        bytes(Change::MarkNodeLost(MarkNodeLost { node, silent_ms: 4 })),
        "010107020003".to_owned() + "0304"
    );
    assert_eq!(
        bytes(Change::AssignGang(AssignGang { job, node, generation: 1 })),
        "010107020005".to_owned() + "050301"
    );
    assert_eq!(
        bytes(Change::CancelJob(CancelJob { job, stop: Stop::Now })),
        "010107020007".to_owned() + "0501"
    );
    let fail = FailJob { job, generation: 1, message: "m".into() };
    assert_eq!(bytes(Change::FailJob(fail)), "010107020008".to_owned() + "0501016d");
}
