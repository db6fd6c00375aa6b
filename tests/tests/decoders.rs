//! The decoders of bytes from outside, on damaged copies of real messages: a short form of what `tests/fuzz` does for as long as one likes.

#![allow(clippy::unwrap_used)] // in a test an unwrap is an assertion

use fleet_common::codec;
use fleet_common::ids::{ClientId, JobId, NodeId};
use fleet_common::protocol::{ClientFrame, Reply, Request, ToAgent};
use fleet_tests::fuzz;
use fleet_tests::sim::random::Random;
use prost::Message as _;
use raft::eraftpb::{Entry, Message, MessageType};

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

fn try_all(target: fn(&[u8]), inputs: Vec<Vec<u8>>) {
    let mut random = Random::new(1);
    for input in inputs {
        target(&input);
        for _ in 0..COPIES {
            target(&damaged(&input, &mut random));
        }
    }
}

#[test]
fn damaged_messages_are_refused_or_understood() {
    let tagged = |kind: u8, body: Vec<u8>| [vec![kind], body].concat();
    let frame = ClientFrame::change(ClientId(7), 3, Request::StartRun { name: "n".into() });
    try_all(
        fuzz::messages,
        vec![
            tagged(0, codec::encode(&frame).unwrap()),
            tagged(1, codec::encode(&Reply::Submitted { job: JobId(9) }).unwrap()),
            tagged(3, codec::encode(&ToAgent::Welcome { node: NodeId(3) }).unwrap()),
            tagged(9, vec![0; 40]),
            tagged(10, vec![3; 60]),
        ],
    );
}

#[test]
fn damaged_requests_over_http_are_refused_or_understood() {
    let get = |path: &str| format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n").into_bytes();
    try_all(fuzz::http, ["/metrics", "/api/v1/runs/run-3/points?from=9", "/api/v1/jobs/7"].map(get).to_vec());
}

#[test]
fn a_replica_survives_whatever_another_one_says() {
    let kinds = [
        MessageType::MsgAppend,
        MessageType::MsgAppendResponse,
        MessageType::MsgRequestVote,
        MessageType::MsgHeartbeat,
        MessageType::MsgHeartbeatResponse,
        MessageType::MsgSnapshot,
        MessageType::MsgReadIndex,
        MessageType::MsgReadIndexResp,
        MessageType::MsgTimeoutNow,
        MessageType::MsgRequestPreVote,
    ];
    let words = kinds.map(|kind| {
        let entries = vec![Entry { term: 2, index: 2, ..Entry::default() }];
        let mut message =
            Message { to: 1, from: 2, term: 2, log_term: 1, index: 1, entries, ..Message::default() };
        message.set_msg_type(kind);
        let bytes = message.encode_to_vec();
        [vec![bytes.len() as u8], bytes].concat()
    });
    let mut inputs: Vec<Vec<u8>> = words.to_vec();
    inputs.push(words.concat());
    try_all(fuzz::raft, inputs);
}

#[test]
fn damaged_snapshots_and_disks_are_noticed() {
    try_all(fuzz::snapshot, vec![vec![0; 80], vec![9; 200]]);
    try_all(fuzz::disk, (0..5u8).map(|which| [vec![which], vec![7; 60]].concat()).collect());
}
