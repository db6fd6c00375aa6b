//! What holds for all commands together, in any order.

use super::checkpoints::Continues;
use super::commands::*;
use super::ends::FINISHED_IN_STATE;
use super::history::HistoryRow;
use super::records::Stop;
use super::session::{RequestId, Stamp};
use super::tests::*;
use super::*;
use crate::raft::disk::{Disk, Table};
use crate::raft::memory::MemoryDisk;
use crate::raft::replica::{Membership, Replica, Sizes};
use fleet_common::codec;
use fleet_common::events::{
    Culprit, DataStats, Endpoint, Evaluation, Event, EventBatch, EventBody, FailureKind, JobError, Outcome,
    Stall,
};
use fleet_common::exit::Fault;
use fleet_common::ids::{ClientId, UserId};
use fleet_common::protocol::{JobState, Program, Role, RunKey, Secret, Variable, Wish, Work};
use proptest::prelude::*;
use std::sync::Arc;

/// The largest node; a node may shrink under its jobs, but never had more.
const SLOTS: u32 = 4;

fn any_body() -> impl Strategy<Value = EventBody> {
    let log = EventBody::Log { rank: None, level: fleet_common::events::Level::Info, line: "l".into() };
    prop_oneof![
        (1..20u64).prop_map(step),
        (1..20u64).prop_map(checkpoint),
        (1..20u64).prop_map(|step| EventBody::Checkpoint(checkpoint_of(step, 3))),
        (0..20u64).prop_map(|step| EventBody::Started { step, parameters: 9, device: "cpu".into() }),
        (1..20u64).prop_map(|step| {
            EventBody::Eval(Evaluation { step, loss: 1.5, bits_per_byte: 0.5, tokens: 7 })
        }),
        any::<bool>().prop_map(|cached| EventBody::DataReady(DataStats {
            documents: 3,
            fingerprint: if cached { "a".into() } else { "b".into() },
            cached,
            ..DataStats::default()
        })),
        (0..3u32, 1..9_000u64).prop_map(|(first_rank, mib)| {
            EventBody::Memory { first_rank, rss_mib: vec![mib; 2], pss_mib: vec![mib, u64::MAX] }
        }),
        (1..20u64).prop_map(|step| EventBody::CheckpointFailed { step, error: "no room".into() }),
        any_fault().prop_map(|fault| {
            EventBody::Finished(Outcome::Failed(JobError {
                kind: FailureKind::Rank,
                fault,
                rank: Some(1),
                node: None,
                signal: None,
                exit_code: Some(1),
                message: "m".into(),
                last_lines: vec!["l".into()],
            }))
        }),
        Just(log),
        (0..3u16, 1..3u8).prop_map(|(ranks, key)| {
            EventBody::Listening(
                (0..ranks).map(|rank| Endpoint { port: 9 + rank, key: vec![key; 44] }).collect(),
            )
        }),
        any::<bool>().prop_map(|stands| {
            let (what, culprit) = ("rank 1 has not come".to_owned(), Culprit::Silent);
            EventBody::Stall(stands.then_some(Stall { since_unix_ms: 1, what, culprit }))
        }),
        (0..3u32).prop_map(|host| EventBody::CheckpointsRemoved {
            hosts: vec![host],
            manifests: vec!["cd".repeat(32)]
        }),
        any::<bool>().prop_map(|meant| EventBody::CheckpointLost {
            manifest_sha256: if meant { "cd".repeat(32) } else { "ef".repeat(32) },
            why: "node n1 had it".into(),
        }),
        (0..9u64).prop_map(|lines| EventBody::LeftOut { lines, bytes: 3 * lines }),
        Just(finished()),
        (0..5u64).prop_map(stopped),
    ]
}

fn any_fault() -> impl Strategy<Value = Fault> {
    prop_oneof![Just(Fault::Job), Just(Fault::Input), Just(Fault::Environment)]
}

fn any_wish() -> impl Strategy<Value = Wish> {
    (-1..2i32, prop::option::of(1..3u32), 1..3u32, any::<bool>(), prop::option::of(1..9u64), any::<bool>())
        .prop_map(|(priority, nodes, slots_per_rank, labelled, max_time_s, queue)| {
            let labels = labelled.then(|| ("gpu".to_owned(), "h200".to_owned())).into_iter().collect();
            Wish { priority, nodes, slots_per_rank, labels, max_time_s, queue }
        })
}

fn job_id() -> impl Strategy<Value = JobId> {
    (1..5u64).prop_map(JobId)
}

fn node_id() -> impl Strategy<Value = NodeId> {
    (1..4u64).prop_map(NodeId)
}

fn run_id() -> impl Strategy<Value = RunId> {
    (1..4u64).prop_map(RunId)
}

fn any_role() -> impl Strategy<Value = Role> {
    prop_oneof![3 => Just(Role::Worker), 1 => Just(Role::Client), 1 => Just(Role::Coordinator), 1 => Just(Role::Admin)]
}

fn any_member() -> impl Strategy<Value = Member> {
    (1..4u64, 0..3u8).prop_map(|(id, role)| match role {
        0 => Member::Coordinator(ReplicaId(id)),
        1 => Member::Worker(NodeId(id)),
        _ => Member::Client(UserId(id)),
    })
}

/// Changes of who belongs to the cluster, over few ids, so that they meet.
fn member_change() -> impl Strategy<Value = Change> {
    let labels: &[(&str, &str)] = &[("gpu", "h200")];
    let replica_id = || (1..4u64).prop_map(ReplicaId);
    prop_oneof![
        (0..3u8, any_role(), 1..4u32).prop_map(|(id, role, uses)| {
            let secret_sha256 = [1; 32];
            Change::CreateToken(CreateToken { id: format!("t{id}"), secret_sha256, role, ttl_ms: 500, uses })
        }),
        (0..3u8, 1..3u8).prop_map(|(id, secret)| {
            let (id, secret_sha256) = (format!("t{id}"), [secret; 32]);
            Change::RedeemToken(RedeemToken { id, secret_sha256, name: "n".into(), key: [0; 32] })
        }),
        (0..3u8).prop_map(|id| Change::RevokeToken(RevokeToken { id: format!("t{id}") })),
        any_member().prop_map(|member| Change::RevokeMember(RevokeMember { member })),
        (1..4u64).prop_map(|id| Change::RegisterReplica(replica(id))),
        replica_id().prop_map(|replica| Change::PromoteReplica(PromoteReplica { replica })),
        replica_id().prop_map(|replica| Change::RemoveReplica(RemoveReplica { replica })),
        (1..4u64, 0..3u32).prop_map(|(id, level)| {
            Change::DescribeReplica(DescribeReplica { address: address(id), version: "1".into(), level })
        }),
        (node_id(), 1..=SLOTS, any::<bool>()).prop_map(move |(node, slots, labelled)| describe(
            node,
            "n",
            slots,
            if labelled { labels } else { &[] }
        )),
        node_id().prop_map(|node| Change::MarkNodeLost(MarkNodeLost { node, silent_ms: 10_000 })),
        (node_id(), any::<bool>()).prop_map(|(node, now)| Change::DrainNode(DrainNode { node, now })),
        node_id().prop_map(|node| Change::UndrainNode(UndrainNode { node })),
        (1..4u8, replica_id())
            .prop_map(|(ca, holder)| Change::IntroduceCa(IntroduceCa { der: vec![ca], holder })),
        (1..4u8, replica_id()).prop_map(|(ca, replica)| Change::HoldCa(HoldCa { replica, der: vec![ca] })),
        (any_member(), 0..4u64).prop_map(|(member, ca)| Change::ShowCa(ShowCa { member, ca })),
        any::<bool>().prop_map(|force| Change::FinishCa(FinishCa { force })),
    ]
}

/// A value that is nowhere else.
const SECRET: &str = "kept-to-itself";

fn with_secret() -> Work {
    let env = vec![Variable::open("PATH", "/bin"), Variable::secret("KEY", SECRET)];
    Work::Program(Program { argv: vec!["true".into()], working_dir: "/".into(), env })
}

fn job_change() -> impl Strategy<Value = Change> {
    let parts = prop_oneof![
        (node_id(), 1..3u32).prop_map(|part| vec![part]),
        (node_id(), 1..3u32, node_id(), 1..3u32).prop_map(|(a, m, b, n)| vec![(a, m), (b, n)]),
    ];
    prop_oneof![
        2 => (1..4u32, any_wish(), any::<bool>(), 1..5u32).prop_map(|(world_size, wish, trains, keep)| {
            let work = if trains { training() } else { with_secret() };
            Change::SubmitJob(SubmitJob { name: "test".into(), world_size, work, wish, keep_checkpoints: keep, continues: Continues::Nothing })
        }),
        1 => (1..4u32, 0..3u8).prop_map(|(world_size, id)| {
            let (work, wish) = (program(), Wish::default());
            let job = SubmitJob { name: "test".into(), world_size, work, wish, keep_checkpoints: 1, continues: Continues::Nothing };
            Change::SubmitOnce(SubmitOnce { id: format!("s{id}"), job })
        }),
        4 => (job_id(), 1..3u64, parts)
            .prop_map(|(job, generation, parts)| Change::AssignGang(AssignGang { job, generation, parts })),
        6 => (job_id(), node_id(), 1..3u64, 1..6u64, prop::collection::vec(any_body(), 1..4)).prop_map(
            |(job, node, generation, first_seq, bodies)| {
                let events = bodies.into_iter().map(|body| Event { unix_ms: 1, body }).collect();
                let batch = EventBatch { job, generation, first_seq, events };
                Change::RecordEvents(RecordEvents { node, batch })
            }
        ),
        1 => (job_id(), any::<bool>()).prop_map(|(job, now)| {
            Change::CancelJob(CancelJob { job, stop: if now { Stop::Now } else { Stop::AfterCheckpoint } })
        }),
        1 => (job_id(), any::<bool>()).prop_map(|(job, given)| {
            let values = given.then(|| vec![("KEY".to_owned(), Secret::new(SECRET.to_owned()))]);
            Change::ChangeSecrets(ChangeSecrets { job, values })
        }),
        1 => (job_id(), 1..3u64, node_id()).prop_map(|(job, generation, node)| {
            Change::FailJob(FailJob { job, generation, node, message: "m".into() })
        }),
        1 => (job_id(), 1..3u64, node_id()).prop_map(|(job, generation, node)| {
            Change::BreakOff(BreakOff { job, generation, node, waited_ms: 60_000 })
        }),
        1 => (job_id(), 1..3u64).prop_map(|(job, generation)| {
            Change::ForceStop(ForceStop { job, generation, waited_ms: 10_000 })
        }),
        1 => node_id().prop_map(|node| {
            Change::SettleSuperseded(SettleSuperseded { node, manifests: vec!["cd".repeat(32)] })
        }),
    ]
}

fn record_change() -> impl Strategy<Value = Change> {
    let key = prop_oneof![job_id().prop_map(RunKey::Job), run_id().prop_map(RunKey::Own)];
    prop_oneof![
        Just(Change::StartRun(StartRun { name: "r".into() })),
        (run_id(), 1..9u64, -1.0..1.0f64).prop_map(|(run, at, value)| {
            Change::RecordMetrics(RecordMetrics { run, points: vec![point("loss", at, value)] })
        }),
        (run_id(), any::<bool>())
            .prop_map(|(run, succeeded)| Change::FinishRun(FinishRun { run, succeeded })),
        (1..5u64, 1..20u64)
            .prop_map(|(job, step)| Change::RecordExport(RecordExport { record: export(job, step) })),
        key.prop_map(|run| Change::RecordProfile(RecordProfile { record: profile(run) })),
    ]
}

/// Any command there is.
pub(crate) fn any_change() -> impl Strategy<Value = Change> {
    prop_oneof![2 => member_change(), 3 => job_change(), 1 => record_change()]
}

fn any_command() -> impl Strategy<Value = Command> {
    let request = prop::option::of((1..4u128, 1..12u64));
    let why = prop::option::of(Just("because".to_owned()));
    (any_change(), request, why, 0..5_000u64).prop_map(|(change, request, why, unix_ms)| Command {
        unix_ms,
        by: None,
        request: request.map(|(client, seq)| RequestId { client: ClientId(client), seq }.into()),
        why,
        change,
    })
}

/// With three coordinators, three nodes and tokens of each kind, so that not everything is refused.
fn furnished() -> State {
    let mut script = Script::with_replicas(2);
    script.run(token("t0", Role::Worker, 9));
    script.run(token("t1", Role::Coordinator, 9));
    for node in 1..=3 {
        script.run(redeem("t0", "n"));
        script.run(describe(NodeId(node), "n", SLOTS, &[]));
    }
    script.run(redeem("t1", "c3"));
    script.state
}

pub(crate) fn check_invariants(state: &State) {
    for (id, used) in state.slots_in_use() {
        assert!(used <= SLOTS, "{used} slots of {id} are promised");
    }
    for (id, job) in state.jobs() {
        let ended = job.state.is_final();
        assert_eq!(ended, job.finished_unix_ms.is_some(), "{id}");
        assert_eq!(ended, job.work.is_none(), "{id}");
        assert_eq!(ended, state.finished.contains(id), "{id}");
        assert!(job.checkpoints.len() <= job.keep_checkpoints as usize);
        assert!(job.checkpoints.iter().all(|known| !known.held.is_empty()), "{id}: {job:?}");
        assert_eq!(job.state == JobState::Queued, !ended && job.placement.is_none(), "{id}");
        assert!(job.stop.is_none() || job.state == JobState::Stopping, "{id}: {job:?}");
        assert!(
            !job.requeue || job.stop == Some(Stop::AfterCheckpoint) || job.stop == Some(Stop::Now),
            "{id}"
        );
        if let Some(at) = &job.placement {
            assert_eq!(at.generation, job.generation);
            assert_eq!(at.parts.iter().map(|part| part.ranks).sum::<u32>(), job.world_size);
            assert!(ended || !at.all_finished(), "{id} has ended everywhere and is not over");
        }
    }
    assert!(state.replicas().is_empty() || state.voters() > 0);
    for member in state.revoked() {
        match member {
            Member::Coordinator(replica) => assert!(!state.replicas().contains_key(&replica)),
            Member::Worker(node) => assert!(!state.nodes().contains_key(&node)),
            Member::Client(user) => assert!(!state.users().contains_key(&user)),
        }
        assert!(!state.admitted().contains_key(&member), "{member} was cut off and is let in");
    }
    for member in state.admitted().keys() {
        match member {
            // Registered or not yet.
            Member::Coordinator(_) => {}
            Member::Worker(node) => assert!(state.nodes().contains_key(node)),
            Member::Client(user) => assert!(state.users().contains_key(user)),
        }
    }
    let known = |replica| state.admitted().contains_key(&Member::Coordinator(replica));
    assert!(state.replicas().keys().all(|replica| known(*replica)));
    if let Some(next) = &state.cas().next {
        assert!(next.moving || !state.without_next_key().is_empty(), "nobody is missing, and none moves");
    }
}

/// Rows as they would lie on the disk: every key has one content for ever.
fn keep(rows: &mut BTreeMap<(Table, Vec<u8>), Vec<u8>>, new: &[HistoryRow]) {
    for row in new {
        assert!(Table::HISTORY.contains(&row.table()), "{:?} is not a table of history", row.table());
        let bytes = row.encode().unwrap();
        let has_secret = bytes.windows(SECRET.len()).any(|window| window == SECRET.as_bytes());
        assert!(!has_secret, "what stays for ever has a secret: {row:?}");
        let before = rows.insert((row.table(), row.key()), bytes);
        assert!(before.is_none(), "{row:?} was written twice");
    }
}

proptest! {
    #[test]
    fn a_snapshot_continues_like_the_state_it_was_taken_from(
        before in prop::collection::vec(any_command(), 0..120),
        after in prop::collection::vec(any_command(), 0..40),
    ) {
        let mut state = furnished();
        let mut rows = BTreeMap::new();
        for (index, command) in before.into_iter().enumerate() {
            let bytes = codec::encode(&command).unwrap();
            prop_assert_eq!(&codec::decode::<Command>(&bytes).unwrap(), &command);
            keep(&mut rows, &state.apply(index as u64 + 1_000, command).history);
            check_invariants(&state);
        }
        let mut restored: State = codec::decode_record(&codec::encode_record(&state).unwrap()).unwrap();
        prop_assert_eq!(&restored, &state);
        for (index, command) in after.into_iter().enumerate() {
            let index = index as u64 + 2_000;
            let applied = state.apply(index, command.clone());
            keep(&mut rows, &applied.history);
            prop_assert_eq!(restored.apply(index, command), applied);
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
        let script = || Script { state: furnished(), ..Script::new() };
        let mut once = script();
        let answers: Vec<Answer> =
            changes.iter().map(|change| once.run_as(None, change.clone())).collect();
        let mut repeated = script();
        for at in order {
            let id = RequestId { client: ClientId(1), seq: at as u64 + 1 };
            let stamp = Stamp { id, answered_below: 1, since: 0 };
            prop_assert_eq!(&repeated.run_stamped(stamp, changes[at].clone()), &answers[at]);
        }
        prop_assert_eq!(&repeated.history, &once.history);
        repeated.state.sessions = Default::default();
        prop_assert_eq!(repeated.state, once.state);
    }
}

/// A leader and a learner that gets all it has by way of a snapshot, in pieces.
struct Pair {
    source: Replica<MemoryDisk>,
    learner: Replica<MemoryDisk>,
    disks: [Arc<MemoryDisk>; 2],
    chunks: usize,
}

impl Pair {
    fn new() -> Pair {
        let disks = [(); 2].map(|()| Arc::new(MemoryDisk::default()));
        let source = Replica::restore(disks[0].clone(), 1, (1_000, 1), furnished(), 7).unwrap();
        let learner = Replica::join(disks[1].clone(), 2, "test", 7).unwrap();
        let sizes = Sizes { chunk_bytes: 512, ..Sizes::default() };
        Pair { source: source.sized(sizes), learner, disks, chunks: 0 }
    }

    fn apply(&mut self, commands: Vec<Command>) {
        for command in commands {
            self.source.propose(0, &command).unwrap();
            self.step();
        }
    }

    /// Whatever either wants is done once.
    fn step(&mut self) {
        let (mut from_source, mut from_learner) = (Vec::new(), Vec::new());
        self.source.process(&mut |message| from_source.push(message)).unwrap();
        self.learner.process(&mut |message| from_learner.push(message)).unwrap();
        let to_learner = from_source.into_iter().filter(|message| message.to == 2);
        to_learner.for_each(|message| self.learner.step(message).unwrap());
        from_learner.into_iter().for_each(|message| self.source.step(message).unwrap());
        if let Some((_, fetch)) = self.learner.wants() {
            let chunk = self.source.serve(2, &fetch).unwrap().chunk().unwrap();
            self.learner.take_chunk(1, chunk).unwrap();
            self.chunks += 1;
        }
    }

    fn meet(&mut self) {
        for _ in 0..20_000 {
            if self.learner.applied_index() == self.source.applied_index() {
                return;
            }
            self.source.tick();
            self.step();
        }
        panic!("the learner is at {} of {}", self.learner.applied_index(), self.source.applied_index());
    }

    fn rows(&self, of: usize) -> Vec<(Table, Vec<u8>, Vec<u8>)> {
        let mut rows = Vec::new();
        for table in Table::HISTORY {
            let mut keep = |key: &[u8], value: &[u8]| {
                rows.push((table, key.to_vec(), value.to_vec()));
                true
            };
            self.disks[of].scan(table, &[], &[0xFF; 64], &mut keep).unwrap();
        }
        rows
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_replica_that_came_by_a_snapshot_has_and_does_what_its_source_has_and_does(
        before in prop::collection::vec(any_command(), 0..80),
        after in prop::collection::vec(any_command(), 0..30),
    ) {
        let mut pair = Pair::new();
        pair.apply(before);
        let change = token("for-the-learner", Role::Coordinator, 1);
        let command = Command { unix_ms: 1, request: None, by: None, why: None, change };
        pair.source.propose_membership(1, Membership::AddLearner(2), &command).unwrap();
        pair.meet();
        prop_assert!(pair.chunks >= Table::HISTORY.len(), "it came by {} chunks", pair.chunks);
        prop_assert_eq!(pair.learner.state(), pair.source.state());
        prop_assert_eq!(pair.rows(1), pair.rows(0));
        pair.apply(after);
        pair.meet();
        prop_assert_eq!(pair.learner.state(), pair.source.state());
        prop_assert_eq!(pair.rows(1), pair.rows(0));
    }
}

#[test]
fn only_what_was_done_leaves_its_reason() {
    let mut state = Script::with_node(1).state;
    let mut apply = |index, change| {
        let why = Some("because".to_owned());
        state.apply(index, Command { unix_ms: 7, request: None, by: None, why, change }).history
    };
    let lose = |node| Change::MarkNodeLost(MarkNodeLost { node: NodeId(node), silent_ms: 10_000 });
    assert!(apply(10, lose(2)).is_empty(), "a refused one leaves nothing");
    let decision = history::Decision { unix_ms: 7, why: "because".into() };
    assert_eq!(apply(11, lose(1)), [HistoryRow::Decision { number: 1, decision }]);
    assert_eq!(state.last_decision(), 1);
}

#[test]
fn jobs_that_ended_long_ago_are_only_in_the_history() {
    let mut script = Script::with_node(1);
    let jobs = FINISHED_IN_STATE as u64 + 3;
    for _ in 0..jobs {
        let job = script.submit_training(1);
        script.assign(job);
        script.tell(job, 1, 1, vec![checkpoint(5), finished()]);
    }
    assert_eq!(script.state.jobs().len(), FINISHED_IN_STATE);
    let moved = script.history.iter().filter_map(|row| match row {
        HistoryRow::Job { job, record } => Some((job.0, record.state, record.checkpoints.len())),
        _ => None,
    });
    assert_eq!(moved.collect::<Vec<_>>(), [1, 2, 3].map(|job| (job, JobState::Succeeded, 1)));
    let cancel = CancelJob { job: JobId(1), stop: Stop::Now };
    assert_eq!(script.run(Change::CancelJob(cancel)), Answer::Done, "it has ended long ago");
    // What they left may still be referred to.
    let record = |job, step| Change::RecordExport(RecordExport { record: export(job, step) });
    assert!(matches!(script.run(record(1, 5)), Answer::ExportRecorded { .. }));
    assert!(why(script.run(record(1, 6))).contains("no checkpoint of step 6"));
    let profile = RecordProfile { record: profile(RunKey::Job(JobId(2))) };
    assert!(matches!(script.run(Change::RecordProfile(profile)), Answer::ProfileRecorded { .. }));
}

/// The bytes of commands as they lie in logs. A change here needs a new format version.
#[test]
fn commands_keep_their_bytes() {
    let (job_id, node) = (JobId(5), NodeId(3));
    let member = Member::Worker(node);
    let secret_sha256 = [0; 32];
    let zeros = "00".repeat(32);
    let batch = EventBatch { job: job_id, generation: 1, first_seq: 2, events: vec![] };
    let address = address(2);
    let described = "0204".to_owned() + &hex::encode("c2:1") + "04" + &hex::encode("c2:2");
    let golden: Vec<(Change, String)> = vec![
        (
            Change::CreateToken(CreateToken {
                id: "t".into(),
                secret_sha256,
                role: Role::Worker,
                ttl_ms: 1,
                uses: 2,
            }),
            format!("000174{zeros}010102"),
        ),
        (
            Change::RedeemToken(RedeemToken {
                id: "t".into(),
                secret_sha256,
                name: "n".into(),
                key: [0; 32],
            }),
            format!("010174{zeros}016e{}", "00".repeat(32)),
        ),
        (
            describe(node, "n", 4, &[("a", "b")]),
            "0203016e040363707501300101610162".to_owned()
                + "06"
                + &hex::encode("host-3")
                + "fbbc02"
                + "01"
                + "00",
        ),
        (Change::MarkNodeLost(MarkNodeLost { node, silent_ms: 4 }), "030304".into()),
        (
            job(training(), 4, Wish { nodes: Some(1), max_time_s: Some(9), ..Wish::default() }),
            "040474657374040002".to_owned()
                + "7b7d"
                + "00"
                + "0101"
                + "01"
                + "00"
                + "0109"
                + "00"
                + "03"
                + "00",
        ),
        (
            Change::AssignGang(AssignGang { job: job_id, generation: 1, parts: vec![(node, 4)] }),
            "050501010304".into(),
        ),
        (Change::RecordEvents(RecordEvents { node, batch }), "060305010200".into()),
        (Change::CancelJob(CancelJob { job: job_id, stop: Stop::Now }), "070501".into()),
        (
            Change::FailJob(FailJob { job: job_id, generation: 1, node, message: "m".into() }),
            "08050103016d".into(),
        ),
        (Change::RevokeToken(RevokeToken { id: "t".into() }), "090174".into()),
        (Change::RegisterReplica(replica(2)), format!("0a{described}026332013006")),
        (Change::PromoteReplica(PromoteReplica { replica: ReplicaId(2) }), "0b02".into()),
        (Change::RemoveReplica(RemoveReplica { replica: ReplicaId(2) }), "0c02".into()),
        (
            Change::DescribeReplica(DescribeReplica { address, version: "0".into(), level: 2 }),
            format!("0d{described}013002"),
        ),
        (Change::RevokeMember(RevokeMember { member }), "0e0103".into()),
        (Change::DrainNode(DrainNode { node, now: true }), "0f0301".into()),
        (Change::UndrainNode(UndrainNode { node }), "1003".into()),
        (Change::StartRun(StartRun { name: "r".into() }), "110172".into()),
        (
            Change::RecordMetrics(RecordMetrics { run: RunId(3), points: vec![point("l", 1, 0.0)] }),
            "120301016c01000000000000000001".into(),
        ),
        (Change::FinishRun(FinishRun { run: RunId(3), succeeded: true }), "130301".into()),
        (
            Change::RecordExport(RecordExport { record: export(5, 2) }),
            "140502046f6e6e78072f6d2e6f6e6e780940".to_owned() + &hex::encode("ef".repeat(32)),
        ),
        (Change::ChangeSecrets(ChangeSecrets { job: job_id, values: None }), "170500".into()),
        (Change::Forget(Forget), "1c".into()),
        (Change::SetRetention(SetRetention { age_ms: Some(7), bytes: None }), "1d010700".into()),
        (
            Change::RecordProfile(RecordProfile { record: profile(RunKey::Job(job_id)) }),
            "1500050170".to_owned()
                + "01066c656e6774680a000000000000f03f000000000000e03f"
                + "030000000000000000000000000000f03f0000000000000040020406",
        ),
        (
            match job(training(), 1, Wish::default()) {
                Change::SubmitJob(job) => Change::SubmitOnce(SubmitOnce { id: "i".into(), job }),
                other => other,
            },
            "160169047465737401".to_owned() + "00027b7d" + "000001000000" + "03" + "00",
        ),
        (Change::IntroduceCa(IntroduceCa { der: vec![9], holder: ReplicaId(2) }), "18010902".into()),
        (Change::HoldCa(HoldCa { replica: ReplicaId(2), der: vec![9] }), "19020109".into()),
        (Change::ShowCa(ShowCa { member, ca: 2 }), "1a010302".into()),
        (Change::FinishCa(FinishCa { force: true }), "1b01".into()),
        (
            Change::BreakOff(BreakOff { job: job_id, generation: 1, node, waited_ms: 60_000 }),
            "1e050103fb60ea".into(),
        ),
        (
            Change::SettleSuperseded(SettleSuperseded { node, manifests: vec!["ab".into()] }),
            "1f0301026162".into(),
        ),
        (
            Change::ForceStop(ForceStop { job: job_id, generation: 1, waited_ms: 10_000 }),
            "200501fb1027".into(),
        ),
    ];
    assert_eq!(golden.len(), COMMANDS, "a command has no golden bytes");
    for (change, hex) in golden {
        let name = change.name();
        let command = Command { unix_ms: 1, request: None, by: None, why: None, change };
        assert_eq!(hex::encode(codec::encode(&command).unwrap()), format!("01000000{hex}"), "{name}");
    }
    let id = RequestId { client: ClientId(7), seq: 2 };
    let request = Some(Stamp { id, answered_below: 1, since: 9 });
    let change = Change::UndrainNode(UndrainNode { node });
    let command = Command { unix_ms: 1, request, by: Some(UserId(5)), why: Some("w".into()), change };
    assert_eq!(
        hex::encode(codec::encode(&command).unwrap()),
        "01010702".to_owned() + "0109" + "0105" + "010177" + "1003"
    );
}

/// Variants of `Change`.
const COMMANDS: usize = 33;
