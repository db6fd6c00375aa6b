//! The decoders of bytes from outside, on damaged copies of real messages: a short form of what `tests/fuzz` does for as long as one likes.

#![allow(clippy::unwrap_used)] // in a test an unwrap is an assertion

use fleet_common::codec;
use fleet_common::events::{
    CheckpointRecord, Culprit, Event, EventBatch, EventBody, FailureKind, JobError, Level, Outcome, Shard,
    Stall,
};
use fleet_common::exit::Fault;
use fleet_common::ids::{ClientId, JobId, NodeId, ReplicaId, RunId};
use fleet_common::net::{Authorities, PrivateKey};
use fleet_common::protocol::{
    Admission, AgentHello, ClientFrame, CoordinatorAddress, Files, FromAgent, FromRank, Gang, Holder,
    JoinReply, JoinRequest, Loan, Member, Network, PROTOCOL_VERSION, Page, Peer, Point, Printed, Program,
    RankStart, Reply, Request, ResumePoint, SubmitJob, ToAgent, ToRank, Wish, Work,
};
use fleet_coordinator::archive::{self, Record};
use fleet_coordinator::cluster::commands::{Change, StartRun};
use fleet_coordinator::cluster::session::RequestId;
use fleet_coordinator::cluster::{Command, State};
use fleet_coordinator::control::{PeerMessage, Report, Sighting, Told};
use fleet_coordinator::raft::disk::{Disk, Table};
use fleet_coordinator::raft::image;
use fleet_coordinator::raft::log::Position;
use fleet_coordinator::raft::memory::MemoryDisk;
use fleet_coordinator::raft::replica::Replica;
use fleet_coordinator::raft::transfer::{self, Cursor, Descriptor, Fetch};
use fleet_tests::fuzz;
use fleet_tests::sim::random::Random;
use prost::Message as _;
use raft::eraftpb::{ConfState, Entry, Message, MessageType, Snapshot, SnapshotMetadata};
use serde::Serialize;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Damaged copies of each input, the same every time.
const COPIES: usize = 400;

fn damaged(input: &[u8], random: &mut Random) -> Vec<u8> {
    let mut bytes = input.to_vec();
    for _ in 0..=random.index(4) {
        if bytes.is_empty() {
            break;
        }
        let at = random.index(bytes.len());
        match random.index(4) {
            0 => bytes[at] ^= 1 << random.index(8),
            1 => bytes.truncate(at),
            2 => bytes.insert(at, random.next() as u8),
            _ => bytes[at] = [0, 1, 127, 128, 250, 251, 252, 253, 255][random.index(9)],
        }
    }
    bytes
}

type Target = fn(&[u8]);

fn try_all(target: Target, inputs: Vec<Vec<u8>>) {
    let mut random = Random::new(1);
    for input in inputs {
        target(&input);
        for _ in 0..COPIES {
            target(&damaged(&input, &mut random));
        }
    }
}

/// Which message the first byte names, and a real one of it.
fn tagged<T: Serialize>(kind: u8, message: &T) -> Vec<u8> {
    [vec![kind], codec::encode(message).unwrap()].concat()
}

fn command() -> Command {
    let request = Some(RequestId { client: ClientId(7), seq: 2 }.into());
    let change = Change::StartRun(StartRun { name: "r".into() });
    Command { unix_ms: 9, request, by: None, why: Some("because".into()), change }
}

fn events() -> EventBatch {
    let shard = Shard { writer: 0, name: "part-0".into(), bytes: 9, sha256: "ab".repeat(32) };
    let checkpoint = CheckpointRecord {
        step: 5,
        path: "/c/step-5".into(),
        manifest_sha256: "cd".repeat(32),
        bytes: 10,
        loss: 1.5,
        writers: 1,
        disks: vec![0],
        shards: vec![shard],
    };
    let bodies = [
        EventBody::Started { step: 0, parameters: 9, device: "cpu".into() },
        EventBody::Log { rank: Some(1), level: Level::Warn, line: "l".into() },
        EventBody::Memory { first_rank: 0, rss_mib: vec![7], pss_mib: vec![6] },
        EventBody::Checkpoint(checkpoint),
        EventBody::CheckpointsRemoved { hosts: vec![1], manifests: vec!["cd".repeat(32)] },
        EventBody::CheckpointLost { manifest_sha256: "cd".repeat(32), why: "n4 had it".into() },
        EventBody::Stall(Some(Stall {
            since_unix_ms: 4,
            what: "rank 1 has not come".into(),
            culprit: Culprit::Silent,
        })),
        EventBody::Finished(Outcome::Failed(failure())),
    ];
    let events = bodies.into_iter().map(|body| Event { unix_ms: 3, body }).collect();
    EventBatch { job: JobId(5), generation: 1, first_seq: 2, events }
}

fn failure() -> JobError {
    JobError {
        kind: FailureKind::Signal,
        fault: Fault::Job,
        rank: Some(1),
        node: Some("n".into()),
        signal: Some(9),
        exit_code: None,
        message: "it ended".into(),
        last_lines: vec!["l".into()],
    }
}

fn program() -> Work {
    Work::Program(Program { argv: vec!["true".into()], working_dir: "/".into(), env: Vec::new() })
}

/// One or more of each kind that `fuzz::messages` tells apart.
fn real_messages() -> Vec<Vec<u8>> {
    let address = || CoordinatorAddress { replica: ReplicaId(2), client: "c:1".into(), member: "c:2".into() };
    let change = |request| ClientFrame::change(ClientId(7), 3, request);
    let points = vec![Point { series: "loss".into(), step: 1, value: 0.5, unix_ms: 3 }];
    let labels = BTreeMap::from([("gpu".to_owned(), "h200".to_owned())]);
    let submit = SubmitJob { world_size: 2, work: program(), wish: Wish { labels, ..Wish::default() } };
    let hello = AgentHello {
        version: PROTOCOL_VERSION,
        name: "n".into(),
        slots: 4,
        device: "cpu".into(),
        program_version: "0".into(),
        labels: BTreeMap::new(),
        host: "h".into(),
        checkpoint_port: 0,
        process: 7,
        gangs: vec![(JobId(5), 1)],
        lost: vec![(JobId(4), 2)],
        earlier: vec![6],
    };
    let holder = Holder {
        node: NodeId(4),
        name: "n4".into(),
        address: Some("h:7".into()),
        key: [7; 32],
        files: Files::Of { first: 0, ranks: 2 },
    };
    let (path, manifest_sha256) = ("/c/step-5".to_owned(), "cd".repeat(32));
    let loan =
        Loan { to: NodeId(3), key: [8; 32], path: path.clone(), manifest_sha256: manifest_sha256.clone() };
    let resume = ResumePoint { step: 5, path, manifest_sha256, holders: vec![holder] };
    let gang = Gang {
        job: JobId(5),
        generation: 1,
        world_size: 2,
        first_rank: 0,
        ranks: 2,
        nodes: 1,
        node_index: 0,
        meeting: None,
        max_time_ms: Some(9),
        resume: Some(resume),
        work: program(),
    };
    let peers = vec![Peer { host: 0, address: "n1".into(), port: 29_600, key: vec![48; 44] }];
    let start = RankStart {
        job: JobId(5),
        generation: 1,
        rank: 1,
        world_size: 2,
        local_rank: 0,
        local_world_size: 1,
        host: 1,
        hosts: 2,
        job_json: "{}".into(),
        cache_dir: "/cache".into(),
        resume: Some("/c/step-5".into()),
        run: "c/job-5".into(),
        threads: 1,
        device: "cpu".into(),
        shm_fd: Some(7),
        network: Some(Network { peers: peers.clone(), key: PrivateKey::new(vec![48; 20]), listener_fd: 8 }),
    };
    let join = JoinRequest {
        version: PROTOCOL_VERSION,
        token_id: "t".into(),
        token_secret: "s".into(),
        csr_der: vec![48; 20],
        name: "n".into(),
    };
    let admission = Admission {
        member: Member::Worker(NodeId(3)),
        certificate_der: vec![48; 20],
        authorities: Authorities::one(vec![48; 20]),
        coordinators: vec![address()],
        cas: vec![(vec![48; 20], PrivateKey::new(vec![48; 20]))],
    };
    let sighting = Sighting { node: NodeId(3), connected: true, heard_ms_ago: 40 };
    let (fetch, chunk) = (first_fetch(), transfer::cut(&MemoryDisk::default(), b"s", &first_fetch(), 9));
    vec![
        tagged(0, &change(Request::StartRun { name: "n".into() })),
        tagged(0, &change(Request::Submit(submit))),
        tagged(0, &change(Request::RecordMetrics { run: RunId(3), points })),
        tagged(0, &ClientFrame::query(Request::Jobs { all: Some(Page { before: Some(3), max: 9 }) })),
        tagged(1, &Reply::Submitted { job: JobId(9) }),
        tagged(1, &Reply::RunStarted(RunId(9))),
        tagged(2, &FromAgent::Hello(hello)),
        tagged(2, &FromAgent::Heartbeat { unix_ms: 9 }),
        tagged(2, &FromAgent::Events(events())),
        tagged(2, &FromAgent::Renew { csr_der: vec![48; 20] }),
        tagged(3, &ToAgent::Welcome { node: NodeId(3) }),
        tagged(3, &ToAgent::StartGang(gang)),
        tagged(3, &ToAgent::Lend(vec![loan])),
        tagged(3, &ToAgent::StopGang { job: JobId(5), generation: 1, now: true }),
        tagged(3, &ToAgent::MeetPeers { job: JobId(5), generation: 1, peers }),
        tagged(3, &ToAgent::Coordinators(vec![address(), address()])),
        tagged(4, &FromRank::Event(events().events.remove(3))),
        tagged(4, &FromRank::Done(Outcome::Stopped { steps: 3 })),
        tagged(4, &FromRank::Failed(failure())),
        tagged(5, &ToRank::Start(Box::new(start))),
        tagged(5, &ToRank::CheckpointCommitted { step: 5 }),
        tagged(6, &join),
        tagged(7, &JoinReply::Accepted(Box::new(admission))),
        tagged(8, &events()),
        tagged(9, &PeerMessage::Raft(message(MessageType::MsgAppend).encode_to_vec())),
        tagged(9, &PeerMessage::Propose { ticket: 7, command: Box::new(command()) }),
        tagged(9, &PeerMessage::Query { ticket: 7, request: Box::new(Request::Nodes) }),
        tagged(9, &PeerMessage::Told { ticket: 7, told: Told::Elsewhere }),
        tagged(
            9,
            &PeerMessage::Observations(Report {
                seq: 3,
                whole: true,
                nodes: vec![sighting],
                read_only: false,
            }),
        ),
        tagged(9, &PeerMessage::WantCa { der: vec![48; 9] }),
        tagged(9, &PeerMessage::Ca { der: vec![48; 9], key: PrivateKey::new(vec![48; 9]) }),
        tagged(9, &PeerMessage::Coordinators(vec![(address(), [7; 32])])),
        tagged(9, &PeerMessage::Fetch(fetch)),
        tagged(9, &PeerMessage::Chunk(Box::new(chunk.unwrap().chunk().unwrap()))),
        tagged(10, &Printed { rank: 1, stderr: true, bytes: b"50%\r".to_vec() }),
        tagged(11, &command()),
    ]
}

#[test]
fn damaged_messages_are_refused_or_understood() {
    let messages = real_messages();
    for kind in 0..fuzz::KINDS {
        assert!(messages.iter().any(|message| message[0] == kind), "kind {kind} has no message");
    }
    try_all(fuzz::messages, messages);
}

#[test]
fn damaged_requests_over_http_are_refused_or_understood() {
    let get = |path: &str| format!("GET\n{path}\nlocalhost:7080").into_bytes();
    let paths = ["/metrics\n", "/api/v1/runs/run-3/points\nfrom=9", "/api/v1/jobs/7\n"];
    try_all(fuzz::http, paths.map(get).to_vec());
}

/// As `fuzz::raft` reads it: the replica works after it.
fn said(message: &Message) -> Vec<u8> {
    let bytes = message.encode_to_vec();
    assert!(bytes.len() < 0x80, "{} bytes", bytes.len());
    [vec![0x80 | bytes.len() as u8], bytes].concat()
}

/// A message of replica 2 to this one, as it would be at the beginning of a cluster's life.
fn message(kind: MessageType) -> Message {
    let mut message = Message { to: 1, from: 2, term: 2, log_term: 1, index: 1, ..Message::default() };
    message.set_msg_type(kind);
    match kind {
        MessageType::MsgAppend => {
            let data = codec::encode(&command()).unwrap();
            message.entries = vec![Entry { term: 2, index: 2, data, ..Entry::default() }];
            message.commit = 2;
        }
        MessageType::MsgReadIndex | MessageType::MsgReadIndexResp => {
            message.entries = vec![Entry { data: vec![0; 16], ..Entry::default() }];
        }
        MessageType::MsgSnapshot => message.snapshot = Some(announced(b"state", &[1, 2, 3])),
        _ => {}
    }
    if kind == MessageType::MsgReadIndex {
        message.term = 0;
    }
    message
}

fn announced(state: &[u8], voters: &[u64]) -> Snapshot {
    let conf_state = Some(ConfState { voters: voters.to_vec(), learners: vec![4], ..ConfState::default() });
    let metadata = Some(SnapshotMetadata { conf_state, index: 9, term: 2 });
    Snapshot { data: Descriptor::of(state).announced(), metadata }
}

#[test]
fn a_replica_survives_whatever_another_one_says() {
    let kinds = [
        MessageType::MsgAppend,
        MessageType::MsgAppendResponse,
        MessageType::MsgRequestVote,
        MessageType::MsgRequestVoteResponse,
        MessageType::MsgHeartbeat,
        MessageType::MsgHeartbeatResponse,
        MessageType::MsgSnapshot,
        MessageType::MsgReadIndex,
        MessageType::MsgReadIndexResp,
        MessageType::MsgTimeoutNow,
        MessageType::MsgRequestPreVote,
        MessageType::MsgRequestPreVoteResponse,
    ];
    let words = kinds.map(|kind| said(&message(kind)));
    let mut inputs: Vec<Vec<u8>> = words.to_vec();
    inputs.push(words.concat());
    try_all(fuzz::raft, inputs.clone());
    try_all(fuzz::newcomer, inputs);
}

/// What fuzzing has found, as it was found.
#[test]
fn what_was_found_once_is_not_found_again() {
    let hex = |hex: &str| -> Vec<u8> {
        let digit = |at: usize| u8::from_str_radix(&hex[at..at + 2], 16).unwrap();
        (0..hex.len()).step_by(2).map(digit).collect()
    };
    let found: &[(Target, &str)] = &[(fuzz::disk, "000200")];
    for (target, bytes) in found {
        target(&hex(bytes));
    }
}

fn first_fetch() -> Fetch {
    Fetch { at: Position { index: 9, term: 2 }, cursor: Cursor::State { offset: 0 } }
}

fn founded() -> State {
    State::new("fuzz".into())
}

#[test]
fn damaged_snapshots_are_noticed() {
    let state = image::encode(&founded()).unwrap();
    let message = Message { from: 1, to: 4, ..message(MessageType::MsgSnapshot) };
    let message = Message { snapshot: Some(announced(&state, &[1])), ..message };
    let message = message.encode_to_vec();
    let with = |rest: Vec<u8>| [vec![message.len() as u8], message.clone(), rest].concat();
    let chunk =
        transfer::cut(&MemoryDisk::default(), &state, &first_fetch(), 1 << 20).unwrap().chunk().unwrap();
    let inputs = vec![
        with(codec::encode(&chunk).unwrap()),
        with(codec::encode(&first_fetch()).unwrap()),
        with(vec![]),
    ];
    try_all(fuzz::snapshot, inputs);
    let row = codec::encode(&events().events[0]).unwrap();
    try_all(fuzz::installed, vec![[vec![row.len() as u8], row, state[4..].to_vec()].concat()]);
    try_all(fuzz::state, vec![state.clone(), state[4..].to_vec()]);
}

#[test]
fn damaged_rows_and_backups_are_noticed() {
    let disk = Arc::new(MemoryDisk::default());
    let mut replica = Replica::create(disk.clone(), 1, &[1], founded(), 7).unwrap();
    replica.process(&mut |_| {}).unwrap();
    let meta = [&b"format"[..], b"hard", b"snapshot", b"state"].map(|key| (Table::Meta, key));
    let second = 2u64.to_be_bytes();
    let rows = meta.into_iter().chain([(Table::Log, &second[..])]);
    let rows = rows.enumerate().map(|(which, (table, key))| {
        let sealed = disk.get(table, key).unwrap().unwrap();
        // Without its checksum, which the target adds.
        [vec![which as u8], sealed[..sealed.len() - 8].to_vec()].concat()
    });
    try_all(fuzz::disk, rows.collect());

    let state = image::encode(&founded()).unwrap();
    let mut writer = archive::Writer::new(Vec::new());
    let (cluster_id, note) = ("c".to_owned(), "n".to_owned());
    let header = archive::Header { format: archive::FORMAT, cluster_id, log_index: 7, made_unix_ms: 1, note };
    writer.header(&header).unwrap();
    let rows = vec![(b"k".to_vec(), b"v".to_vec())];
    let records = [
        Record::State { index: 7, term: 2, state },
        Record::Rows { table: "events".into(), rows },
        Record::End,
    ];
    let mut bodies = Vec::new();
    for record in &records {
        writer.record(record).unwrap();
        let body = codec::encode_record(record).unwrap();
        bodies.extend([vec![body.len().min(255) as u8], body].concat());
    }
    try_all(fuzz::backup, vec![writer.finish().unwrap(), bodies]);
}
