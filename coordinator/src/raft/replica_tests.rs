//! Tests of replicas on the simulated disk: alone over restarts and full disks, and three together with lost messages.

use super::super::memory::MemoryDisk;
use super::*;
use crate::cluster::commands::{Change, CreateToken, SubmitJob};
use crate::cluster::session::RequestId;
use crate::cluster::tests::submit;
use crate::raft::disk::Table;
use crate::raft::{history, transfer};
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

/// Replicas, the messages between them, and the snapshots that they fetch.
struct Cluster {
    replicas: BTreeMap<u64, TestReplica>,
    /// What every replica answered, by ticket.
    answers: BTreeMap<Ticket, Answer>,
    cut: Option<u64>,
    /// Reads that came back, by replica.
    reads: Vec<(u64, Ticket)>,
}

fn replica(id: u64) -> TestReplica {
    Replica::create(Arc::new(MemoryDisk::default()), id, &[1, 2, 3], State::new("test".into()), 7).unwrap()
}

impl Cluster {
    fn new() -> Self {
        let replicas = (1..=3).map(|id| (id, replica(id))).collect();
        Cluster { replicas, answers: BTreeMap::new(), cut: None, reads: Vec::new() }
    }

    fn is_cut(&self, a: u64, b: u64) -> bool {
        self.cut.is_some_and(|cut| cut == a || cut == b)
    }

    /// Delivers messages until none is left. A message counts as sent only with what its sender's disk holds by then.
    fn settle(&mut self) {
        loop {
            let mut sent = Vec::new();
            for (id, replica) in &mut self.replicas {
                let output = replica.process(&mut |message| sent.push(message)).unwrap();
                for (ticket, answer) in output.answers {
                    assert_eq!(self.answers.entry(ticket).or_insert(answer.clone()), &answer);
                }
                self.reads.extend(output.reads.into_iter().map(|ticket| (*id, ticket)));
            }
            let fetched = self.fetch();
            sent.retain(|message| !self.is_cut(message.from, message.to));
            if sent.is_empty() && !fetched {
                break;
            }
            for message in sent {
                if let Some(to) = self.replicas.get_mut(&message.to) {
                    to.step(message).unwrap();
                }
            }
        }
    }

    /// One chunk for everybody who wants one.
    fn fetch(&mut self) -> bool {
        let wants: Vec<_> = self
            .replicas
            .iter()
            .filter_map(|(id, replica)| replica.wants().map(|want| (*id, want)))
            .collect();
        let mut moved = false;
        for (id, (from, fetch)) in wants {
            if !self.is_cut(id, from) {
                let chunk = self.replicas.get_mut(&from).unwrap().serve(id, &fetch).unwrap().chunk().unwrap();
                self.replicas.get_mut(&id).unwrap().take_chunk(from, chunk).unwrap();
                moved = true;
            }
        }
        moved
    }

    fn run_until(&mut self, done: impl Fn(&Cluster) -> bool) {
        for _ in 0..200 {
            if done(self) {
                return;
            }
            self.replicas.values_mut().for_each(Replica::tick);
            self.settle();
        }
        panic!("not reached in 200 ticks");
    }

    fn leader(&self) -> Option<u64> {
        let mut leaders = self.replicas.values().filter(|it| it.leads() && self.cut != Some(it.id()));
        leaders.next().map(Replica::id)
    }

    /// With a leader.
    fn led() -> (Self, u64) {
        let mut cluster = Cluster::new();
        cluster.run_until(|cluster| cluster.leader().is_some());
        let leader = cluster.leader().unwrap();
        (cluster, leader)
    }

    fn at(&mut self, id: u64) -> &mut TestReplica {
        self.replicas.get_mut(&id).unwrap()
    }

    fn propose(&mut self, id: u64, seq: u64) {
        self.at(id).propose(seq, &command(seq)).unwrap();
        self.settle();
    }

    fn agree(&self, a: u64, b: u64) -> bool {
        let (a, b) = (&self.replicas[&a], &self.replicas[&b]);
        a.applied_index() == b.applied_index() && a.state() == b.state()
    }
}

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

/// Proposes a change of members with a command that leaves a trace, and lets it happen.
fn change_members(cluster: &mut Cluster, ticket: Ticket, change: Membership) -> Result<(), Declined> {
    let leader = cluster.leader().unwrap();
    let command =
        Command { unix_ms: 1, request: None, by: None, why: None, change: token(&ticket.to_string()) };
    cluster.at(leader).propose_membership(ticket, change, &command)?;
    cluster.run_until(|cluster| cluster.answers.contains_key(&ticket));
    Ok(())
}

#[test]
fn a_replica_joins_votes_and_is_taken_out_and_the_command_travels_with_the_change() {
    let (mut cluster, leader) = Cluster::led();
    cluster.propose(leader, 1);
    cluster.replicas.insert(4, joining(4));
    for _ in 0..50 {
        cluster.at(4).tick();
        cluster.settle();
    }
    assert!(!cluster.at(4).was_removed() && cluster.at(4).leader().is_none());
    change_members(&mut cluster, 100, Membership::AddLearner(4)).unwrap();
    cluster.run_until(|cluster| cluster.agree(leader, 4));
    assert!(!cluster.at(4).is_voter() && cluster.at(4).state().tokens().contains_key("100"));
    assert!(matches!(change_members(&mut cluster, 101, Membership::AddLearner(4)), Err(Declined::Misfit(_))));
    change_members(&mut cluster, 102, Membership::Promote(4)).unwrap();
    cluster.run_until(|cluster| cluster.replicas[&4].is_voter());
    let own = change_members(&mut cluster, 103, Membership::Remove(leader));
    assert!(matches!(own, Err(Declined::Misfit(_))));
    let out = leader % 3 + 1;
    change_members(&mut cluster, 104, Membership::Remove(out)).unwrap();
    cluster.run_until(|cluster| cluster.replicas[&leader].conf().voters.len() == 3);
    assert!(!cluster.at(leader).conf().voters.contains(&out));
    let restarted = restart(cluster.at(leader), 9);
    assert_eq!(restarted.conf(), cluster.at(leader).conf());
    assert_eq!(restarted.state(), cluster.at(leader).state());
}

#[test]
fn a_leader_whose_removal_its_predecessor_proposed_steps_down() {
    let (mut cluster, first) = Cluster::led();
    let (out, stays) = (first % 3 + 1, (first + 1) % 3 + 1);
    let command_with_it = Command { unix_ms: 1, request: None, by: None, why: None, change: token("x") };
    cluster.at(first).propose_membership(1, Membership::Remove(out), &command_with_it).unwrap();
    // Only the one that is to leave gets it before the leader is cut off: it alone can lead now, and writes all the time.
    let mut sent = Vec::new();
    cluster.at(first).process(&mut |message| sent.push(message)).unwrap();
    for message in sent.into_iter().filter(|message| message.to == out) {
        cluster.at(out).step(message).unwrap();
    }
    for seq in 2..2_000 {
        if cluster.at(out).was_removed() {
            break;
        }
        let _ = cluster.at(out).propose(seq, &command(seq));
        let mut sent = Vec::new();
        for id in [out, stays] {
            cluster.at(id).tick();
            cluster.at(id).process(&mut |message| sent.push(message)).unwrap();
        }
        for message in sent.into_iter().filter(|message| message.to != first) {
            cluster.at(message.to).step(message).unwrap();
        }
    }
    assert!(cluster.at(out).was_removed() && cluster.at(out).leader().is_none());
    cluster.replicas.remove(&out);
    cluster.run_until(|cluster| cluster.replicas.values().all(|replica| replica.conf().voters.len() == 2));
    cluster.run_until(|cluster| cluster.agree(first, stays));
}

#[test]
fn one_change_of_members_at_a_time() {
    let (mut cluster, leader) = Cluster::led();
    let command = Command { unix_ms: 1, request: None, by: None, why: None, change: token("x") };
    cluster.at(leader).propose_membership(1, Membership::AddLearner(4), &command).unwrap();
    let second = cluster.at(leader).propose_membership(2, Membership::AddLearner(5), &command);
    assert_eq!(second, Err(Declined::Pending));
}

#[test]
fn members_do_not_change_when_the_command_is_rejected() {
    let (mut cluster, leader) = Cluster::led();
    let change = submit(0);
    let command = Command { unix_ms: 1, request: None, by: None, why: None, change };
    cluster.at(leader).propose_membership(1, Membership::AddLearner(4), &command).unwrap();
    cluster.settle();
    assert!(matches!(cluster.answers[&1], Answer::Rejected(_)));
    assert!(cluster.replicas.values().all(|replica| replica.conf().learners.is_empty()));
    change_members(&mut cluster, 2, Membership::AddLearner(4)).unwrap();
}

#[test]
fn leadership_moves_on_request() {
    let (mut cluster, leader) = Cluster::led();
    let to = leader % 3 + 1;
    cluster.at(leader).transfer_leadership(to);
    assert_eq!(cluster.at(leader).propose(1, &command(1)), Err(Declined::NotLeader));
    cluster.settle();
    cluster.run_until(|cluster| cluster.leader() == Some(to));
}

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

#[test]
fn a_newcomer_survives_messages_that_only_make_sense_to_others() {
    for message in [
        append(5, 0, &[]),
        append(5, 0, &[6]),
        append(u64::MAX, 5, &[0]),
        append(0, 0, &[1, 2]),
        Message { entries: vec![Entry { index: 1, ..Entry::default() }], commit: 1, ..append(0, 0, &[]) },
        Message { priority: -1, ..message(MessageType::MsgRequestPreVote) },
        message(MessageType::MsgTimeoutNow),
        message(MessageType::MsgRequestVote),
    ] {
        let mut new = joining(1);
        let _ = new.step(message);
        new.process(&mut |_| {}).unwrap();
    }
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
