//! Replicas on the simulated disk: here one alone over restarts and full disks, in the files below several together.

mod cluster;
mod damage;
mod members;
mod snapshots;
mod three;

use super::super::memory::MemoryDisk;
use super::*;
use crate::cluster::commands::{Change, CreateToken, SubmitJob};
use crate::cluster::session::RequestId;
use crate::cluster::tests::submit;
use crate::raft::disk::Table;
use crate::raft::{history, transfer};
use cluster::{Cluster, replica};
use fleet_common::ids::{ClientId, JobId};
use fleet_common::protocol::Role;
use raft::eraftpb::{Entry, MessageType};
use std::collections::BTreeMap;

type TestReplica = Replica<MemoryDisk>;

fn alone() -> TestReplica {
    let mut replica =
        Replica::create(Arc::new(MemoryDisk::default()), 1, &[1], State::new("test".into()), 7).unwrap();
    settle(&mut replica);
    replica
}

fn settle(replica: &mut TestReplica) -> Output {
    replica.process(&mut |_| {}).unwrap()
}

fn command(seq: u64) -> Command {
    let request = Some(RequestId { client: ClientId(1), seq }.into());
    Command { unix_ms: 1_000 + seq, request, by: None, why: None, change: submit(1) }
}

fn disk(replica: &TestReplica) -> Arc<MemoryDisk> {
    replica.node.store().disk().clone()
}

fn restart(replica: &TestReplica, kept: usize) -> TestReplica {
    let mut restarted = Replica::open(Arc::new(disk(replica).after_power_failure(kept)), 7).unwrap().unwrap();
    settle(&mut restarted);
    restarted
}

fn joining(id: u64) -> TestReplica {
    Replica::join(Arc::new(MemoryDisk::default()), id, "test", 7).unwrap()
}

fn token(id: &str) -> Change {
    Change::CreateToken(CreateToken {
        id: id.into(),
        secret_sha256: [1; 32],
        role: Role::Worker,
        ttl_ms: 1 << 40,
        uses: 1,
    })
}

fn message(kind: MessageType) -> Message {
    let mut message = Message { to: 1, from: 2, term: 5, ..Message::default() };
    message.set_msg_type(kind);
    message
}

fn append(index: u64, log_term: u64, entries: &[u64]) -> Message {
    let entry = |index: &u64| Entry { index: *index, term: 5, ..Entry::default() };
    let entries = entries.iter().map(entry).collect();
    Message { index, log_term, commit: index, entries, ..message(MessageType::MsgAppend) }
}

/// Some megabytes of commands, more than a log keeps in memory.
fn propose_much(cluster: &mut Cluster, at: u64) {
    for seq in 1..=6 {
        let Change::SubmitJob(job) = submit(1) else { unreachable!() };
        let change = Change::SubmitJob(SubmitJob { name: "x".repeat(COMMAND_MAX / 4), ..job });
        let command = Command { unix_ms: 1, request: None, by: None, why: None, change };
        cluster.at(at).propose(seq, &command).unwrap();
        cluster.settle();
    }
}

#[test]
fn a_single_voter_leads_at_once_and_answers_after_its_disk() {
    let mut replica = alone();
    assert!(replica.leads() && replica.is_alone());
    replica.propose(7, &command(1)).unwrap();
    let output = settle(&mut replica);
    assert_eq!(output.answers, [(7, Answer::Submitted { job: JobId(1) })]);
    let restarted = restart(&replica, 0);
    assert_eq!(restarted.state().without_epochs(), replica.state().without_epochs());
}

#[test]
fn many_proposals_share_one_sync() {
    let mut replica = alone();
    let before = disk(&replica).syncs();
    for seq in 1..=100 {
        replica.propose(seq, &command(seq)).unwrap();
    }
    assert_eq!(settle(&mut replica).answers.len(), 100);
    assert_eq!(disk(&replica).syncs() - before, 1);
}

#[test]
fn nothing_acknowledged_is_lost_by_a_power_failure_whatever_unsynced_writes_survive() {
    let mut replica = alone();
    for seq in 1..=20 {
        replica.propose(seq, &command(seq)).unwrap();
        assert_eq!(settle(&mut replica).answers.len(), 1);
        for kept in 0..=disk(&replica).unsynced_batches() {
            let mut restarted = restart(&replica, kept);
            assert_eq!(restarted.state().without_epochs(), replica.state().without_epochs());
            assert!(restarted.leads());
            let history = history::History::new(disk(&restarted));
            assert!(history.work(JobId(seq)).unwrap().is_some());
            restarted.propose(1, &command(seq)).unwrap();
            assert_eq!(settle(&mut restarted).answers, [(1, Answer::Submitted { job: JobId(seq) })]);
        }
    }
}

#[test]
fn a_full_disk_acknowledges_nothing_and_goes_on_when_there_is_room() {
    let mut replica = alone();
    replica.propose(1, &command(1)).unwrap();
    settle(&mut replica);
    disk(&replica).set_full(true);
    replica.propose(2, &command(2)).unwrap();
    assert!(settle(&mut replica).answers.is_empty());
    assert!(replica.full().is_some());
    assert_eq!(replica.propose(3, &command(3)), Err(Declined::DiskFull(replica.full().unwrap().into())));
    for _ in 0..50 {
        replica.tick();
        assert!(settle(&mut replica).answers.is_empty());
    }
    assert_eq!(replica.state().jobs().len(), 1);
    assert_eq!(restart(&replica, 9).state().jobs().len(), 1);
    disk(&replica).set_full(false);
    replica.recover().unwrap();
    assert_eq!(settle(&mut replica).answers, [(2, Answer::Submitted { job: JobId(2) })]);
    assert_eq!(replica.full(), None);
    assert!(restart(&replica, 0).state().without_epochs() == replica.state().without_epochs());
}

#[test]
fn the_log_is_compacted_and_a_restart_needs_only_the_snapshot_and_the_rest() {
    let mut replica = alone();
    for round in 0..160 {
        for n in 0..400 {
            let ttl_ms = if n % 2 == 0 { 1 } else { 0 };
            let id = format!("{round}-{n}");
            let change = Change::CreateToken(CreateToken {
                id,
                secret_sha256: [1; 32],
                role: Role::Worker,
                ttl_ms,
                uses: 1,
            });
            replica
                .propose(n, &Command { unix_ms: round * 10, request: None, by: None, why: None, change })
                .unwrap();
        }
        settle(&mut replica);
    }
    assert!(replica.first_index() > 40_000, "{}", replica.first_index());
    assert!(restart(&replica, 0).state().without_epochs() == replica.state().without_epochs());
}

#[test]
fn a_read_comes_back_when_the_state_is_new_enough() {
    let mut replica = alone();
    replica.read_index(5);
    replica.propose(6, &command(1)).unwrap();
    let output = settle(&mut replica);
    assert_eq!((output.reads, output.answers.len()), (vec![5], 1));
}

#[test]
fn what_is_too_large_is_declined() {
    let mut replica = alone();
    let Change::SubmitJob(job) = submit(1) else { unreachable!() };
    let change = Change::SubmitJob(SubmitJob { name: "x".repeat(COMMAND_MAX), ..job });
    assert_eq!(
        replica.propose(1, &Command { unix_ms: 0, request: None, by: None, why: None, change }),
        Err(Declined::TooLarge)
    );
}

#[test]
fn a_follower_declines_proposals() {
    let disk = Arc::new(MemoryDisk::default());
    let mut replica = Replica::create(disk, 1, &[1, 2, 3], State::new("test".into()), 7).unwrap();
    settle(&mut replica);
    assert_eq!(replica.propose(1, &command(1)), Err(Declined::NotLeader));
    assert!(!replica.is_alone());
}

#[test]
fn a_replica_that_was_just_opened_does_not_take_itself_for_alone() {
    let mut replica = alone();
    replica.propose(6, &command(1)).unwrap();
    settle(&mut replica);
    let mut opened = Replica::open(Arc::new(disk(&replica).after_power_failure(0)), 7).unwrap().unwrap();
    assert!(!opened.is_alone(), "its log may admit others");
    settle(&mut opened);
    assert!(opened.is_alone());
}
