//! Decoders of bytes that come from outside, as functions that must not panic, hang or take much memory whatever the bytes are.
//!
//! `tests/fuzz` lets libFuzzer loose on each of them; `tests/tests/decoders.rs` runs them on damaged copies of real messages. What is kept
//! behind a checksum is reached both ways: with whatever checksum the bytes have, and with the right one put in.

use fleet_common::codec;
use fleet_common::events::EventBatch;
use fleet_common::protocol::{
    ClientFrame, FromAgent, FromRank, JoinReply, JoinRequest, Printed, Reply, ToAgent, ToRank,
};
use fleet_coordinator::archive::{self, Header, Writer};
use fleet_coordinator::cluster::{Command, State};
use fleet_coordinator::control::PeerMessage;
use fleet_coordinator::http::{self, Question};
use fleet_coordinator::raft::disk::{Batch, Disk, Durability, Table};
use fleet_coordinator::raft::memory::MemoryDisk;
use fleet_coordinator::raft::replica::Replica;
use fleet_coordinator::raft::transfer::{self, Chunk, Descriptor, Fetch};
use fleet_coordinator::raft::{image, seal};
use prost::Message as _;
use raft::eraftpb::{ConfState, Message, MessageType, Snapshot, SnapshotMetadata};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::sync::Arc;

/// The kinds of message that `messages` tells apart.
pub const KINDS: u8 = 12;

/// Every message between fleet's processes: the first byte says which, the rest is its body. What decodes encodes to the same value.
pub fn messages(data: &[u8]) {
    let Some((kind, body)) = data.split_first() else { return };
    match kind % KINDS {
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
        10 => round_trip::<Printed>(body),
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

/// What hyper hands on of an HTTP request: method, path, query and host, one a line.
pub fn http(data: &[u8]) {
    let hosts = ["box.example".to_owned()];
    let text = String::from_utf8_lossy(data);
    let mut lines = text.split('\n');
    let mut next = || lines.next().unwrap_or_default();
    let question = Question { method: next(), path: next(), query: next(), host: Some(next()) };
    if let Err(why) = http::asked(&question, &hosts) {
        assert!((400..500).contains(&why.status) && !why.message.contains('\n'), "{why:?}");
    }
}

/// Messages of another replica, one after the other, each with its length before it: whatever they say, the replica goes on or stops with an
/// error.
pub fn raft(data: &[u8]) {
    let state = State::new("fuzz".into());
    if let Ok(replica) = Replica::create(Arc::new(MemoryDisk::default()), 1, &[1, 2, 3], state, 7) {
        listen(replica, data);
    }
}

/// The same for one that has just joined and knows nobody.
pub fn newcomer(data: &[u8]) {
    if let Ok(replica) = Replica::join(Arc::new(MemoryDisk::default()), 1, "fuzz", 7) {
        listen(replica, data);
    }
}

/// A length with its highest bit set: the replica works before the message after this one comes.
fn listen(mut replica: Replica<MemoryDisk>, data: &[u8]) {
    let mut rest = data;
    while let Some((length, tail)) = rest.split_first() {
        let (body, tail) = tail.split_at(usize::from(length & 0x7F).min(tail.len()));
        rest = tail;
        match Message::decode(body) {
            Ok(message) => drop(replica.step(message).is_ok()),
            Err(_) => replica.tick(),
        }
        if length & 0x80 != 0 && replica.process(&mut |_| {}).is_err() {
            return;
        }
    }
    let _ = replica.process(&mut |_| {}).is_ok();
}

/// A chunk of a snapshot for a replica that waits for one, and requests for chunks of its own. The first byte is the length of the message
/// that announces the snapshot.
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
    if let Ok(chunk) = codec::decode::<Chunk>(rest) {
        let taken = replica.take_chunk(1, chunk.clone()).is_ok();
        if taken && replica.take_chunk(1, chunk.hashed()).is_ok() {
            let _ = replica.process(&mut |_| {}).is_ok();
        }
    }
}

/// A snapshot that arrives whole, with the right hashes around whatever is its state and one row of its history.
pub fn installed(data: &[u8]) {
    let Some((length, rest)) = data.split_first() else { return };
    let (row, state) = rest.split_at(usize::from(*length).min(rest.len()));
    let source = MemoryDisk::default();
    let mut batch = Batch::default();
    for table in Table::HISTORY {
        batch.put(table, &[7; 16], seal::seal(table, &[7; 16], row.to_vec()));
    }
    let disk = Arc::new(MemoryDisk::default());
    let (Ok(()), Ok(mut replica)) =
        (source.write(&batch, Durability::Written), Replica::join(disk.clone(), 4, "fuzz", 7))
    else {
        return;
    };
    let state = [image::FORMAT.to_le_bytes().as_slice(), state].concat();
    let conf_state = Some(ConfState { voters: vec![1], learners: vec![4], ..ConfState::default() });
    let metadata = Some(SnapshotMetadata { conf_state, index: 9, term: 2 });
    let snapshot = Some(Snapshot { data: Descriptor::of(&state).announced(), metadata });
    let mut message = Message { to: 4, from: 1, term: 2, snapshot, ..Message::default() };
    message.set_msg_type(MessageType::MsgSnapshot);
    assert_eq!(replica.step(message), Ok(()));
    while let Some((from, fetch)) = replica.wants() {
        let cut = transfer::cut(&source, &state, &fetch, 256).expect("memory can be read");
        let chunk = cut.chunk().expect("its rows are sealed");
        assert!(replica.take_chunk(from, chunk).is_ok(), "memory can be written");
    }
    if replica.process(&mut |_| {}).is_ok() {
        // One that cannot be read is not taken.
        assert_eq!(replica.applied_index(), if image::decode(&state).is_ok() { 9 } else { 0 });
        let again = Replica::open(disk, 7);
        assert!(again.is_ok_and(|again| again.is_some_and(|again| again.state() == replica.state())));
    }
}

/// The state of a cluster. What decodes encodes to the same value.
pub fn state(data: &[u8]) {
    let whole = image::decode(data);
    let image = [image::FORMAT.to_le_bytes().as_slice(), data].concat();
    for state in [whole, image::decode(&image)].into_iter().flatten() {
        let bytes = image::encode(&state).expect("what was decoded encodes");
        let again = image::decode(&bytes).expect("what was encoded decodes");
        assert_eq!(image::encode(&again).ok(), Some(bytes));
    }
}

/// The file of a backup, as it is, and as the records of a file that is whole otherwise, each with a length byte before it.
pub fn backup(data: &[u8]) {
    let _ = archive::verify(&mut &*data).is_ok();
    let mut writer = Writer::new(Vec::new());
    let (cluster_id, note) = ("fuzz".to_owned(), String::new());
    let header = Header { format: archive::FORMAT, cluster_id, log_index: 1, made_unix_ms: 1, note };
    let mut written = writer.header(&header);
    let mut rest = data;
    while let (Some((length, tail)), Ok(())) = (rest.split_first(), &written) {
        let (body, tail) = tail.split_at(usize::from(*length).min(tail.len()));
        rest = tail;
        written = writer.encoded(body);
    }
    written = written.and_then(|()| writer.record(&archive::Record::End));
    let Ok(file) = written.and_then(|()| writer.finish()) else { return };
    // It may end sooner, with the end among the records.
    let whole = archive::verify(&mut file.as_slice()).is_ok();
    let mut records = 0;
    let read = archive::read(&mut file.as_slice(), &mut |_| {
        records += 1;
        Ok(())
    });
    assert!(whole || read.is_err(), "a damaged backup was read");
}

/// The rows that a replica finds on its disk when it starts: the first byte says which row is replaced by the rest.
pub fn disk(data: &[u8]) {
    let Some((which, row)) = data.split_first() else { return };
    let (table, key) = match which % 5 {
        0 => (Table::Meta, &b"format"[..]),
        1 => (Table::Meta, &b"hard"[..]),
        2 => (Table::Meta, &b"snapshot"[..]),
        3 => (Table::Meta, &b"state"[..]),
        _ => (Table::Log, &[0, 0, 0, 0, 0, 0, 0, 2][..]),
    };
    for sealed in [false, true] {
        let disk = Arc::new(MemoryDisk::default());
        let state = State::new("fuzz".into());
        let Ok(mut replica) = Replica::create(disk.clone(), 1, &[1], state, 7) else { return };
        // Entry 2 is the leader's first.
        let _ = replica.process(&mut |_| {}).is_ok();
        let mut batch = Batch::default();
        let value = if sealed { seal::seal(table, key, row.to_vec()) } else { row.to_vec() };
        batch.put(table, key, value);
        if disk.write(&batch, Durability::Synced).is_err() {
            return;
        }
        match Replica::open(disk.clone(), 7) {
            Ok(Some(mut replica)) => {
                // libFuzzer does not guess the checksum, and if it does it may have what it found.
                assert!(sealed || seal::open(table, key, row).is_some(), "a damaged row was believed");
                let _ = replica.process(&mut |_| {}).is_ok();
            }
            Ok(None) => panic!("a log was overlooked"),
            Err(_) => assert!(Replica::open(disk, 7).is_err(), "damage went away"),
        }
    }
}
