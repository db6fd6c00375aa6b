//! Decoders of bytes that come from outside, as functions that must not panic, hang or take much memory whatever the bytes are.
//!
//! `tests/fuzz` lets libFuzzer loose on each of them; `tests/tests/decoders.rs` runs them on damaged copies of real messages.

use fleet_common::codec;
use fleet_common::events::EventBatch;
use fleet_common::protocol::{
    ClientFrame, FromAgent, FromRank, JoinReply, JoinRequest, Reply, ToAgent, ToRank,
};
use fleet_coordinator::cluster::{Command, State};
use fleet_coordinator::control::PeerMessage;
use fleet_coordinator::http;
use fleet_coordinator::raft::disk::{Batch, Disk, Durability, Table};
use fleet_coordinator::raft::memory::MemoryDisk;
use fleet_coordinator::raft::replica::Replica;
use fleet_coordinator::raft::transfer::{Chunk, Fetch};
use prost::Message as _;
use raft::eraftpb::Message;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::sync::Arc;

/// Every message between fleet's processes: the first byte says which, the rest is its body. What decodes encodes to the same value.
pub fn messages(data: &[u8]) {
    let Some((kind, body)) = data.split_first() else { return };
    match kind % 11 {
        0 => round_trip::<ClientFrame>(body),
        1 => round_trip::<Reply>(body),
        2 => round_trip::<FromAgent>(body),
        3 => round_trip::<ToAgent>(body),
        4 => round_trip::<FromRank>(body),
        5 => round_trip::<ToRank>(body),
        6 => round_trip::<JoinRequest>(body),
        7 => drop(codec::decode::<JoinReply>(body)),
        8 => round_trip::<EventBatch>(body),
        9 => round_trip::<PeerMessage>(body),
        _ => round_trip::<Command>(body),
    }
}

fn round_trip<T: Serialize + DeserializeOwned>(body: &[u8]) {
    let Ok(value) = codec::decode::<T>(body) else { return };
    let Ok(bytes) = codec::encode(&value) else { return };
    let again: T = codec::decode(&bytes).expect("what was encoded decodes");
    // Compared as bytes: a number that is not a number is unequal to itself.
    assert_eq!(codec::encode(&again).ok(), Some(bytes));
}

/// The head of an HTTP request.
pub fn http(data: &[u8]) {
    let hosts = ["box.example".to_owned()];
    if let Err(why) = http::asked(&String::from_utf8_lossy(data), &hosts) {
        assert!((400..500).contains(&why.status) && !why.message.contains('\n'), "{why:?}");
    }
}

/// Messages of another replica, one after the other, each with its length before it: whatever they say, the replica goes on or stops with an
/// error.
pub fn raft(data: &[u8]) {
    let disk = Arc::new(MemoryDisk::default());
    let state = State::new("fuzz".into());
    let Ok(mut replica) = Replica::create(disk, 1, &[1, 2, 3], state, 7) else { return };
    let mut rest = data;
    while let Some((length, tail)) = rest.split_first() {
        let (body, tail) = tail.split_at(usize::from(*length).min(tail.len()));
        rest = tail;
        match Message::decode(body) {
            Ok(message) => drop(replica.step(message).is_ok()),
            Err(_) => replica.tick(),
        }
        if replica.process(&mut |_| {}).is_err() {
            return;
        }
    }
}

/// Chunks of a snapshot for a replica that waits for one, and requests for chunks of its own.
pub fn snapshot(data: &[u8]) {
    let disk = Arc::new(MemoryDisk::default());
    let Ok(mut replica) = Replica::join(disk, 4, "fuzz", 7) else { return };
    let Some((length, rest)) = data.split_first() else { return };
    let (announced, rest) = rest.split_at(usize::from(*length).min(rest.len()));
    if let Ok(message) = Message::decode(announced) {
        let _ = replica.step(message).is_ok();
    }
    if let Ok(fetch) = codec::decode::<Fetch>(rest) {
        let _ = replica.serve(1, &fetch).is_ok();
    }
    if let Ok(chunk) = codec::decode::<Chunk>(rest)
        && replica.take_chunk(1, chunk).is_ok()
    {
        let _ = replica.process(&mut |_| {}).is_ok();
    }
}

/// The rows that a replica finds on its disk when it starts: the first byte says which row is replaced by the rest.
pub fn disk(data: &[u8]) {
    let disk = Arc::new(MemoryDisk::default());
    let state = State::new("fuzz".into());
    if Replica::create(disk.clone(), 1, &[1], state, 7).is_err() {
        return;
    }
    let Some((which, row)) = data.split_first() else { return };
    let (table, key) = match which % 5 {
        0 => (Table::Meta, &b"format"[..]),
        1 => (Table::Meta, &b"hard"[..]),
        2 => (Table::Meta, &b"snapshot"[..]),
        3 => (Table::Meta, &b"state"[..]),
        _ => (Table::Log, &[0, 0, 0, 0, 0, 0, 0, 2][..]),
    };
    let mut batch = Batch::default();
    batch.put(table, key, row.to_vec());
    if disk.write(&batch, Durability::Synced).is_ok() {
        assert!(Replica::open(disk, 7).is_err(), "a replica opened with a damaged row");
    }
}
