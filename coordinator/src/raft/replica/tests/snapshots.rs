//! Snapshots that come at a bad time or make no sense.

use super::*;

#[test]
fn a_snapshot_whose_last_piece_comes_while_the_disk_is_full_waits() {
    let mut source = replica(2);
    settle(&mut source);
    let mut replica = replica(1);
    settle(&mut replica);
    let conf_state = Some(ConfState { voters: vec![1, 2, 3], ..ConfState::default() });
    let metadata = raft::eraftpb::SnapshotMetadata { conf_state, index: 9, term: 5 };
    let state = image::encode(source.state()).unwrap();
    let data = transfer::Descriptor::of(&state).announced();
    let snapshot = Some(raft::eraftpb::Snapshot { data, metadata: Some(metadata) });
    replica.step(Message { snapshot, ..message(MessageType::MsgSnapshot) }).unwrap();
    replica.step(append(1, 1, &[2])).unwrap();
    disk(&replica).set_full(true);
    settle(&mut replica);
    assert!(replica.full().is_some());
    let fetch_all = |replica: &mut TestReplica| {
        for _ in 0..20 {
            let Some((from, fetch)) = replica.wants() else { return };
            let cut = transfer::cut(&MemoryDisk::default(), &state, &fetch, 1 << 20).unwrap();
            let chunk = cut.chunk().unwrap();
            replica.take_chunk(from, chunk).unwrap();
        }
    };
    fetch_all(&mut replica);
    assert!(replica.wants().is_some(), "raft took a snapshot while it waited for the disk");
    settle(&mut replica);
    disk(&replica).set_full(false);
    settle(&mut replica);
    fetch_all(&mut replica);
    assert!(settle(&mut replica).installed);
    assert_eq!(replica.applied_index(), 9);
}

#[test]
fn a_snapshot_of_another_past_is_not_taken() {
    let mut replica = replica(1);
    settle(&mut replica);
    let mine = Entry { index: 2, term: 5, ..Entry::default() };
    replica.step(Message { entries: vec![mine], commit: 2, ..append(1, 1, &[]) }).unwrap();
    settle(&mut replica);
    assert_eq!(replica.commit_index(), 2);
    let offered = |replica: &mut TestReplica, pasts: &[(u64, u64)]| {
        let mut other = State::new("test".into());
        pasts.iter().for_each(|(index, term)| other.reach(*index, *term));
        let state = image::encode(&other).unwrap();
        let conf_state = Some(ConfState { voters: vec![1, 2, 3], ..ConfState::default() });
        let metadata = raft::eraftpb::SnapshotMetadata { conf_state, index: 9, term: 6 };
        let data = transfer::Descriptor::of(&state).announced();
        let snapshot = Some(raft::eraftpb::Snapshot { data, metadata: Some(metadata) });
        replica.step(Message { snapshot, term: 6, ..message(MessageType::MsgSnapshot) }).unwrap();
        while let Some((from, fetch)) = replica.wants() {
            let chunk =
                transfer::cut(&MemoryDisk::default(), &state, &fetch, 1 << 20).unwrap().chunk().unwrap();
            replica.take_chunk(from, chunk).unwrap();
        }
        replica.process(&mut |_| {})
    };
    let error = offered(&mut replica, &[(1, 1), (2, 6)]).unwrap_err();
    assert!(matches!(error, ReplicaError::Contradicted(_)), "{error}");
    assert!(
        error.to_string().contains("has entry 2 of term 6, where one of term 5 is committed here"),
        "{error}"
    );
    let mut again = restart(&replica, usize::MAX);
    assert!(offered(&mut again, &[(1, 1), (2, 5), (3, 6)]).unwrap().installed, "its own past is in this one");
}

/// Offers this replica a snapshot at entry 9 and takes all that it fetches of it; returns how many pieces that were.
fn offer(replica: &mut TestReplica, state: &[u8]) -> usize {
    let conf_state = Some(ConfState { voters: vec![1, 2, 3], ..ConfState::default() });
    let metadata = raft::eraftpb::SnapshotMetadata { conf_state, index: 9, term: 5 };
    let data = transfer::Descriptor::of(state).announced();
    let snapshot = Some(raft::eraftpb::Snapshot { data, metadata: Some(metadata) });
    replica.step(Message { snapshot, ..message(MessageType::MsgSnapshot) }).unwrap();
    let mut pieces = 0;
    while let Some((from, fetch)) = replica.wants() {
        let cut = transfer::cut(&MemoryDisk::default(), state, &fetch, 1 << 20).unwrap();
        replica.take_chunk(from, cut.chunk().unwrap()).unwrap();
        pieces += 1;
    }
    pieces
}

#[test]
fn a_snapshot_that_makes_no_sense_is_told_of_and_not_fetched_again() {
    let mut replica = replica(1);
    settle(&mut replica);
    let state = image::encode(replica.state()).unwrap();
    let senseless = [&state[..4], &[0xFF; 9]].concat();
    assert!(offer(&mut replica, &senseless) > 0);
    let what = replica.unreadable_snapshot().unwrap().to_owned();
    assert!(what.contains("the snapshot of replica-2 at entry 9 cannot be read"), "{what}");
    assert_eq!(offer(&mut replica, &senseless), 0);
    assert!(!settle(&mut replica).installed);
    assert!(offer(&mut replica, &state) > 0, "another one is");
    assert!(settle(&mut replica).installed);
    assert_eq!(replica.unreadable_snapshot(), None);
}
