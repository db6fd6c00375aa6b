//! Three together: lost messages, elections, reads, and the catching up of one that lagged.

use super::*;

#[test]
fn three_replicas_agree_and_one_that_lagged_catches_up() {
    let (mut cluster, leader) = Cluster::led();
    let lagging = leader % 3 + 1;
    cluster.cut = Some(lagging);
    (1..=5).for_each(|seq| cluster.propose(leader, seq));
    assert_eq!(cluster.answers.len(), 5);
    assert!(cluster.at(lagging).state().jobs().is_empty());
    cluster.cut = None;
    cluster.run_until(|cluster| cluster.agree(leader, lagging));
    assert_eq!(cluster.at(lagging).state().jobs().len(), 5);
}

#[test]
fn a_leader_that_is_cut_off_is_replaced_and_loses_only_what_it_never_acknowledged() {
    let (mut cluster, old) = Cluster::led();
    cluster.propose(old, 1);
    cluster.cut = Some(old);
    cluster.propose(old, 2);
    assert_eq!(cluster.answers.len(), 1);
    cluster.run_until(|cluster| cluster.leader().is_some());
    let new = cluster.leader().unwrap();
    assert_ne!(new, old);
    cluster.propose(new, 3);
    cluster.cut = None;
    cluster.run_until(|cluster| cluster.agree(old, new));
    assert_eq!(cluster.answers.keys().copied().collect::<Vec<_>>(), [1, 3]);
}

#[test]
fn a_read_at_a_leader_that_was_deposed_does_not_come_back_and_one_at_a_follower_does() {
    let (mut cluster, old) = Cluster::led();
    cluster.cut = Some(old);
    cluster.at(old).read_index(77);
    cluster.settle();
    assert!(cluster.reads.is_empty());
    cluster.run_until(|cluster| cluster.leader().is_some());
    let new = cluster.leader().unwrap();
    cluster.propose(new, 1);
    let follower = (1..=3).find(|id| *id != old && *id != new).unwrap();
    cluster.at(follower).read_index(78);
    cluster.settle();
    cluster.cut = None;
    cluster.run_until(|cluster| cluster.agree(old, new));
    assert_eq!(cluster.reads, [(follower, 78)]);
}

#[test]
fn a_replica_that_missed_a_snapshots_worth_gets_the_snapshot_with_its_history() {
    let (mut cluster, leader) = Cluster::led();
    let lagging = leader % 3 + 1;
    cluster.cut = Some(lagging);
    (1..=40).for_each(|seq| cluster.propose(leader, seq));
    for seq in 0..20_000 {
        let change = submit(0);
        let command = Command { unix_ms: seq, request: None, by: None, why: None, change };
        cluster.at(leader).propose(1 << 32 | seq, &command).unwrap();
        if seq % 500 == 0 {
            cluster.settle();
        }
    }
    cluster.settle();
    cluster.at(leader).snapshot().unwrap();
    assert!(cluster.at(leader).first_index() > 1_000);
    cluster.cut = None;
    cluster.run_until(|cluster| cluster.agree(leader, lagging));
    let restarted = restart(cluster.at(lagging), 0);
    assert_eq!(restarted.state(), cluster.at(leader).state());
    let history = history::History::new(disk(&restarted));
    assert!((1..=40).all(|job| history.work(JobId(job)).unwrap().is_some()));
}

#[test]
fn a_transfer_goes_on_after_a_pause_and_is_given_up_after_the_lease() {
    let (mut cluster, leader) = Cluster::led();
    let new = 4;
    cluster.replicas.insert(new, joining(new));
    cluster.propose(leader, 1);
    let add = Command { unix_ms: 9, request: None, by: None, why: None, change: token("a") };
    cluster.at(leader).propose_membership(500, Membership::AddLearner(new), &add).unwrap();
    let announced = |cluster: &Cluster| cluster.replicas[&new].wants().is_some();
    for _ in 0..200 {
        if announced(&cluster) {
            break;
        }
        cluster.replicas.values_mut().for_each(Replica::tick);
        let mut sent = Vec::new();
        for replica in cluster.replicas.values_mut() {
            replica.process(&mut |message| sent.push(message)).unwrap();
        }
        for message in sent {
            cluster.at(message.to).step(message).unwrap();
        }
    }
    let (from, fetch) = cluster.at(new).wants().unwrap();
    assert_eq!(from, leader);
    let chunk = cluster.at(leader).serve(new, &fetch).unwrap().chunk().unwrap();
    cluster.at(new).take_chunk(leader, chunk).unwrap();
    let (_, later) = cluster.at(new).wants().unwrap();
    assert!(later.cursor > fetch.cursor);
    assert!(cluster.at(leader).progress().iter().any(|it| it.id == new && it.snapshot_pending));
    for _ in 0..=TRANSFER_LEASE_TICKS {
        cluster.at(leader).tick();
    }
    let refused = cluster.at(leader).serve(new, &later).unwrap().chunk().unwrap();
    assert_eq!(refused.content, transfer::Content::Gone);
    cluster.at(new).take_chunk(leader, refused).unwrap();
    assert_eq!(cluster.at(new).wants(), None);
    cluster.run_until(|cluster| cluster.leader().is_some_and(|leader| cluster.agree(leader, new)));
}

#[test]
fn the_same_seed_elects_the_same_leader_at_the_same_tick() {
    let run = || {
        let mut cluster = Cluster::new();
        let mut ticks = 0;
        while cluster.leader().is_none() {
            cluster.replicas.values_mut().for_each(Replica::tick);
            cluster.settle();
            ticks += 1;
        }
        (cluster.leader(), ticks)
    };
    assert_eq!(run(), run());
}

#[test]
fn a_vote_is_sent_only_after_it_is_durable() {
    let disk = Arc::new(MemoryDisk::default());
    let mut replica = Replica::create(disk.clone(), 1, &[1, 2], State::new("test".into()), 7).unwrap();
    settle(&mut replica);
    let mut request = Message { to: 1, from: 2, term: 5, log_term: 9, index: 9, ..Message::default() };
    request.set_msg_type(MessageType::MsgRequestVote);
    replica.step(request).unwrap();
    let mut votes = Vec::new();
    replica
        .process(&mut |message| {
            let after = LogStore::open(Arc::new(disk.after_power_failure(0))).unwrap().unwrap();
            votes.push((
                message.get_msg_type(),
                message.reject,
                after.hard_state().vote,
                after.hard_state().term,
            ));
        })
        .unwrap();
    assert_eq!(votes, [(MessageType::MsgRequestVoteResponse, false, 2, 5)]);
}

#[test]
fn nobody_leads_with_entries_that_are_not_on_its_disk() {
    let mut replica = replica(1);
    settle(&mut replica);
    replica.step(append(1, 1, &[2])).unwrap();
    assert!(replica.step(message(MessageType::MsgTimeoutNow)).is_err());
    settle(&mut replica);
    replica.step(message(MessageType::MsgTimeoutNow)).unwrap();
    replica.step(Message { term: 6, ..message(MessageType::MsgRequestVoteResponse) }).unwrap();
    settle(&mut replica);
    assert_eq!(replica.leader(), Some(1));
}
