//! Tests of replicas on the simulated disk: alone over restarts and full disks, and three together with lost messages.

use super::super::memory::MemoryDisk;
use super::*;
use crate::cluster::commands::{Change, CreateToken, SubmitJob};
use crate::cluster::session::RequestId;
use crate::cluster::tests::submit;
use fleet_common::ids::{ClientId, JobId};
use fleet_common::protocol::Role;
use raft::eraftpb::MessageType;
use std::collections::BTreeMap;

type TestReplica = Replica<MemoryDisk>;

fn alone() -> TestReplica {
    let mut replica =
        Replica::create(Arc::new(MemoryDisk::default()), 1, &[1], State::new("test".into())).unwrap();
    settle(&mut replica);
    replica
}

fn settle(replica: &mut TestReplica) -> Output {
    replica.process(&mut |_| {}).unwrap()
}

fn command(seq: u64) -> Command {
    let request = Some(RequestId { client: ClientId(1), seq });
    Command { unix_ms: 1_000 + seq, request, why: None, change: submit(1, None) }
}

fn disk(replica: &TestReplica) -> Arc<MemoryDisk> {
    replica.node.store().disk().clone()
}

fn restart(replica: &TestReplica, kept: usize) -> TestReplica {
    let mut restarted = Replica::open(Arc::new(disk(replica).after_power_failure(kept))).unwrap().unwrap();
    settle(&mut restarted);
    restarted
}

#[test]
fn a_single_voter_leads_at_once_and_answers_after_its_disk() {
    let mut replica = alone();
    assert!(replica.leads() && replica.is_alone());
    replica.propose(7, &command(1)).unwrap();
    let output = settle(&mut replica);
    assert_eq!(output.answers, [(7, Answer::Submitted { job: JobId(1) })]);
    let restarted = restart(&replica, 0);
    assert_eq!(restarted.state(), replica.state());
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
            assert_eq!(restarted.state(), replica.state());
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
    assert_eq!(restart(&replica, 0).state(), replica.state());
}

#[test]
fn the_log_is_compacted_and_a_restart_needs_only_the_snapshot_and_the_rest() {
    let mut replica = alone();
    for round in 0..30 {
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
            replica.propose(n, &Command { unix_ms: round * 10, request: None, why: None, change }).unwrap();
        }
        settle(&mut replica);
    }
    assert!(replica.first_index() > 8_000, "{}", replica.first_index());
    assert_eq!(restart(&replica, 0).state(), replica.state());
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
    let Change::SubmitJob(job) = submit(1, None) else { unreachable!() };
    let change = Change::SubmitJob(SubmitJob { name: "x".repeat(COMMAND_MAX), ..job });
    assert_eq!(
        replica.propose(1, &Command { unix_ms: 0, request: None, why: None, change }),
        Err(Declined::TooLarge)
    );
}

#[test]
fn a_follower_declines_proposals() {
    let disk = Arc::new(MemoryDisk::default());
    let mut replica = Replica::create(disk, 1, &[1, 2, 3], State::new("test".into())).unwrap();
    settle(&mut replica);
    assert_eq!(replica.propose(1, &command(1)), Err(Declined::NotLeader));
    assert!(!replica.is_alone());
}

/// Three replicas and the messages between them.
struct Cluster {
    replicas: Vec<TestReplica>,
    /// What every replica answered, by ticket.
    answers: BTreeMap<Ticket, Answer>,
    cut: Option<u64>,
}

impl Cluster {
    fn new() -> Self {
        let replica = |id| {
            Replica::create(Arc::new(MemoryDisk::default()), id, &[1, 2, 3], State::new("test".into()))
                .unwrap()
        };
        Cluster { replicas: (1..=3).map(replica).collect(), answers: BTreeMap::new(), cut: None }
    }

    /// Delivers messages until none is left. A message counts as sent only with what its sender's disk holds by then.
    fn settle(&mut self) {
        loop {
            let mut sent = Vec::new();
            for replica in &mut self.replicas {
                for (ticket, answer) in replica.process(&mut |message| sent.push(message)).unwrap().answers {
                    assert_eq!(self.answers.entry(ticket).or_insert(answer.clone()), &answer);
                }
            }
            sent.retain(|message| self.cut.is_none_or(|cut| message.from != cut && message.to != cut));
            if sent.is_empty() {
                break;
            }
            for message in sent {
                self.replicas[message.to as usize - 1].step(message);
            }
        }
    }

    fn run_until(&mut self, done: impl Fn(&Cluster) -> bool) {
        for _ in 0..200 {
            if done(self) {
                return;
            }
            self.replicas.iter_mut().for_each(Replica::tick);
            self.settle();
        }
        panic!("not reached in 200 ticks");
    }

    fn leader(&self) -> Option<usize> {
        let connected = |id: u64| self.cut != Some(id);
        (0..3).find(|at| self.replicas[*at].leads() && connected(self.replicas[*at].id()))
    }
}

#[test]
fn three_replicas_agree_and_one_that_lagged_catches_up() {
    let mut cluster = Cluster::new();
    cluster.run_until(|cluster| cluster.leader().is_some());
    let leader = cluster.leader().unwrap();
    let lagging = (leader + 1) % 3;
    cluster.cut = Some(cluster.replicas[lagging].id());
    for seq in 1..=5 {
        cluster.replicas[leader].propose(seq, &command(seq)).unwrap();
        cluster.settle();
    }
    assert_eq!(cluster.answers.len(), 5);
    assert!(cluster.replicas[lagging].state().jobs().is_empty());
    cluster.cut = None;
    cluster.run_until(|cluster| cluster.replicas[lagging].state().jobs().len() == 5);
    assert_eq!(cluster.replicas[lagging].state(), cluster.replicas[leader].state());
}

#[test]
fn a_leader_that_is_cut_off_is_replaced_and_loses_only_what_it_never_acknowledged() {
    let mut cluster = Cluster::new();
    cluster.run_until(|cluster| cluster.leader().is_some());
    let old = cluster.leader().unwrap();
    cluster.replicas[old].propose(1, &command(1)).unwrap();
    cluster.settle();
    cluster.cut = Some(cluster.replicas[old].id());
    cluster.replicas[old].propose(2, &command(2)).unwrap();
    cluster.settle();
    assert_eq!(cluster.answers.len(), 1);
    cluster.run_until(|cluster| cluster.leader().is_some());
    let new = cluster.leader().unwrap();
    assert_ne!(new, old);
    cluster.replicas[new].propose(3, &command(3)).unwrap();
    cluster.settle();
    cluster.cut = None;
    cluster
        .run_until(|cluster| cluster.replicas[old].applied_index() == cluster.replicas[new].applied_index());
    assert_eq!(cluster.replicas[old].state(), cluster.replicas[new].state());
    assert_eq!(cluster.answers.keys().copied().collect::<Vec<_>>(), [1, 3]);
}

#[test]
fn a_replica_that_missed_a_snapshots_worth_gets_the_snapshot() {
    let mut cluster = Cluster::new();
    cluster.run_until(|cluster| cluster.leader().is_some());
    let leader = cluster.leader().unwrap();
    let lagging = (leader + 1) % 3;
    cluster.cut = Some(cluster.replicas[lagging].id());
    for seq in 1..=3_000 {
        let change = submit(1, Some(0));
        cluster.replicas[leader]
            .propose(seq, &Command { unix_ms: seq, request: None, why: None, change })
            .unwrap();
        if seq % 500 == 0 {
            cluster.settle();
        }
    }
    cluster.replicas[leader].propose(9_999, &command(1)).unwrap();
    cluster.settle();
    cluster.replicas[leader].snapshot().unwrap();
    assert!(cluster.replicas[leader].first_index() > 1_000);
    cluster.cut = None;
    cluster.run_until(|cluster| cluster.replicas[lagging].state().jobs().len() == 1);
    assert_eq!(cluster.replicas[lagging].state(), cluster.replicas[leader].state());
    assert_eq!(restart(&cluster.replicas[lagging], 0).state(), cluster.replicas[leader].state());
}

#[test]
fn a_vote_is_sent_only_after_it_is_durable() {
    let disk = Arc::new(MemoryDisk::default());
    let mut replica = Replica::create(disk.clone(), 1, &[1, 2], State::new("test".into())).unwrap();
    settle(&mut replica);
    let mut request = Message { to: 1, from: 2, term: 5, log_term: 9, index: 9, ..Message::default() };
    request.set_msg_type(MessageType::MsgRequestVote);
    replica.step(request);
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
