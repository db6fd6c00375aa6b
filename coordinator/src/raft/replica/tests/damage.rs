//! Disks that forgot, rotted or cannot be read, and logs of newer versions.

use super::*;

#[test]
fn a_replica_that_forgot_what_it_acknowledged_stops_and_says_so() {
    let (mut cluster, leader) = Cluster::led();
    (1..=5).for_each(|seq| cluster.propose(leader, seq));
    let follower = leader % 3 + 1;
    *cluster.at(follower) = replica(follower);
    let mut heartbeats = Vec::new();
    for _ in 0..HEARTBEAT_TICKS {
        cluster.at(leader).tick();
        cluster.at(leader).process(&mut |message| heartbeats.push(message)).unwrap();
    }
    let damage = heartbeats.into_iter().filter(|message| message.to == follower).find_map(|message| {
        cluster.at(follower).step(message).unwrap();
        cluster.at(follower).process(&mut |_| {}).err()
    });
    assert!(damage.unwrap().to_string().contains("acknowledged the entries up to"));
    let again = Replica::open(Arc::new(disk(cluster.at(follower)).after_power_failure(0)), 7);
    let why = again.err().unwrap().to_string();
    assert!(why.contains("acknowledged the entries up to"), "{why}");
}

#[test]
fn one_that_forgot_stops_also_where_its_disk_takes_no_mark() {
    let mut replica = replica(1);
    settle(&mut replica);
    disk(&replica).set_full(true);
    replica.step(Message { commit: 9, ..message(MessageType::MsgHeartbeat) }).unwrap();
    for _ in 0..2 {
        let error = replica.process(&mut |_| panic!("it said something")).unwrap_err();
        assert!(matches!(error, ReplicaError::Log(LogError::Damaged(_))), "{error}");
    }
}

#[test]
fn a_damaged_state_is_named_at_every_start_after_it_was_found() {
    let replica = alone();
    let rotten = Arc::new(disk(&replica).after_power_failure(0));
    // Rows of the table are in the order of their keys: format, hard, snapshot, state.
    assert!(rotten.rot(Table::Meta, 3, 77));
    let first = Replica::open(rotten.clone(), 7).err().unwrap().to_string();
    assert!(first.contains("its state has a wrong checksum"), "{first}");
    assert!(rotten.rot(Table::Meta, 4, 77), "the damage is marked, and the state is as it was");
    assert_eq!(Replica::open(rotten, 7).err().unwrap().to_string(), first);
}

#[test]
fn a_disk_that_cannot_be_read_stops_the_replica_by_name() {
    let broken = DiskError::Failed("sector 7 cannot be read".into());
    for (named, is_rotten) in [("sector 7 cannot be read", false), ("entry 2 has a wrong checksum", true)] {
        let (mut cluster, leader) = Cluster::led();
        let lagging = leader % 3 + 1;
        cluster.cut = Some(lagging);
        propose_much(&mut cluster, leader);
        match is_rotten {
            true => assert!(disk(cluster.at(leader)).rot(Table::Log, 0, 9)),
            false => disk(cluster.at(leader)).set_blind(Some(broken.clone())),
        }
        // That one has nothing and asks for what only the disk has.
        let mut asks = message(MessageType::MsgAppendResponse);
        (asks.to, asks.from, asks.term) = (leader, lagging, cluster.at(leader).term());
        (asks.reject, asks.index, asks.reject_hint, asks.log_term) = (true, 8, 1, 1);
        let mut error = None;
        for index in 1..=9 {
            cluster.at(leader).step(Message { index, ..asks.clone() }).unwrap();
            error = error.or(cluster.at(leader).process(&mut |_| {}).err());
        }
        let why = error.unwrap().to_string();
        assert!(why.contains(named), "{why}");
        disk(cluster.at(leader)).set_blind(None);
        let again = cluster.at(leader).process(&mut |_| panic!("it said something"));
        assert!(again.unwrap_err().to_string().contains(named));
        let opened = Replica::open(Arc::new(disk(cluster.at(leader)).after_power_failure(0)), 7);
        assert_eq!(opened.is_err(), is_rotten, "damage is for ever, and a disk may be well again");
    }
}

#[test]
fn a_disk_that_is_closed_until_there_is_room_is_waited_for() {
    let (mut cluster, leader) = Cluster::led();
    propose_much(&mut cluster, leader);
    let follower = leader % 3 + 1;
    let disk = disk(cluster.at(follower));
    disk.set_full(true);
    disk.set_blind(Some(DiskError::Unwritable("it could not be opened again yet".into())));
    cluster.at(follower).recover().unwrap();
    assert!(cluster.at(follower).full().unwrap().contains("opened again"));
    for _ in 0..50 {
        let mut sent = Vec::new();
        for replica in cluster.replicas.values_mut() {
            replica.tick();
            replica.process(&mut |message| sent.push(message)).unwrap();
        }
        assert!(sent.iter().all(|message| message.from != follower), "it spoke and saw nothing");
        for message in sent {
            cluster.at(message.to).step(message).unwrap();
        }
    }
    disk.set_full(false);
    disk.set_blind(None);
    cluster.at(follower).recover().unwrap();
    cluster.propose(leader, 9);
    cluster.run_until(|cluster| cluster.agree(leader, follower));
    assert_eq!(cluster.at(follower).full(), None);
}

#[test]
fn a_command_of_a_newer_version_stops_the_replica_by_name() {
    let mut replica = replica(1);
    let entry = Entry { index: 2, term: 5, data: vec![0xEE; 9], ..Entry::default() };
    replica.step(Message { entries: vec![entry], commit: 2, ..append(1, 1, &[]) }).unwrap();
    let error = replica.process(&mut |_| {}).unwrap_err();
    assert!(matches!(error, ReplicaError::UnknownCommand { index: 2, .. }), "{error}");
    assert!(error.to_string().contains("entry 2 cannot be understood; it was written by a newer version"));
}

#[test]
fn a_snapshot_of_a_newer_version_stops_the_replica_by_name() {
    let mut replica = replica(1);
    settle(&mut replica);
    let conf_state = Some(ConfState { voters: vec![1, 2, 3], ..ConfState::default() });
    let mut data = transfer::Descriptor::of(b"state").announced();
    data[0] += 1;
    let announced = |index| {
        let metadata = raft::eraftpb::SnapshotMetadata { conf_state: conf_state.clone(), index, term: 5 };
        let snapshot = raft::eraftpb::Snapshot { data: data.clone(), metadata: Some(metadata) };
        Message { snapshot: Some(snapshot), ..message(MessageType::MsgSnapshot) }
    };
    replica.step(announced(9)).unwrap();
    let why = replica.process(&mut |_| {}).unwrap_err().to_string();
    assert!(why.contains(&format!("the snapshot of replica-2 has format {}", image::FORMAT + 1)), "{why}");
}
