//! Coordinators come and go: learners, votes, removals, and what each is told.

use super::net::*;
use crate::cluster::commands::{Change, DescribeReplica, RemoveReplica, SubmitJob};
use crate::cluster::members::Standing;
use crate::cluster::session::RequestId;
use crate::cluster::tests::{submit, token};
use crate::control::*;
use fleet_common::ids::ClientId;
use fleet_common::protocol::{Program, RefusalKind, Reply, Role, Work};

fn remove(
    net: &mut Net,
    at: u64,
    replica: u64,
) -> Result<crate::cluster::Answer, fleet_common::protocol::Refusal> {
    net.propose(at, Change::RemoveReplica(RemoveReplica { replica: ReplicaId(replica) }))
}

fn standing(net: &Net, id: u64) -> Option<Standing> {
    net.state(net.leading()).replicas().get(&ReplicaId(id)).map(|record| record.standing)
}

#[test]
fn a_coordinator_joins_gets_a_snapshot_and_then_its_vote() {
    let mut net = Net::new(1);
    for n in 0..20u64 {
        let Change::SubmitJob(job) = submit(1) else { unreachable!() };
        let argv = vec![format!("{n}{}", "x".repeat(120_000))];
        let work = Work::Program(Program { argv, working_dir: "/".into(), env: Vec::new() });
        let change = Change::SubmitJob(SubmitJob { work, ..job });
        net.propose(1, change).unwrap();
    }
    // So many entries that the first ones are only in the snapshot and in the history's tables.
    for n in 0..12_000 {
        let call = net.number();
        let request = RequestId { client: ClientId(call.into()), seq: 1 };
        net.handle(
            1,
            Input::Propose { call, request: request.into(), by: None, change: token("t", Role::Worker, 1) },
        );
        if n % 1_000 == 0 {
            net.settle();
        }
    }
    net.settle();
    net.controls.get_mut(&1).unwrap().replica.snapshot().unwrap();
    assert!(net.controls[&1].replica().first_index() > 100);
    let admitted = net.admit(1, Role::Coordinator);
    assert_eq!(admitted, Member::Coordinator(ReplicaId(2)));
    net.join(2);
    net.run_until("a vote", |net| standing(net, 2) == Some(Standing::Voter));
    net.run(500);
    assert!(net.controls[&2].status().voter);
    assert_eq!(net.state(2), net.state(1));
    assert!(net.decided.iter().any(|why| why.contains("replica-2 has caught up")));
    net.admit(2, Role::Coordinator);
    net.join(3);
    net.run_until("a vote", |net| standing(net, 3) == Some(Standing::Voter));
    net.kill(1);
    net.run_until("a leader", |net| net.leader().is_some());
    let job = net.submit(net.follower());
    assert_eq!(job.0, 21);
}

#[test]
fn one_that_was_not_admitted_is_not_taken_in() {
    let mut net = Net::new(1);
    net.join(5);
    net.run(5_000);
    assert!(net.state(1).replicas().len() == 1 && !net.controls[&5].is_member());
    assert_eq!(net.controls[&1].replica().conf().voters, [1]);
}

#[test]
fn a_leader_is_removed_after_it_has_handed_over() {
    for at_leader in [true, false] {
        let mut net = Net::new(3);
        net.run(1_000);
        let (old, follower) = (net.leading(), net.follower());
        let at = if at_leader { old } else { follower };
        let answer = remove(&mut net, at, old);
        // One that is taken out may not hear of it any more.
        assert!(answer.is_ok() || at_leader, "{answer:?}");
        net.run_until("the removal is known", |net| net.removed.contains_key(&old));
        assert!(net.removed[&old].contains("was removed from the cluster"));
        net.kill(old);
        let leader = net.leading();
        assert_ne!(leader, old);
        assert_eq!(net.controls[&leader].replica().conf().voters.len(), 2);
        assert_eq!(net.submit(net.follower()).0, 1);
        assert_eq!(remove(&mut net, leader, old), Ok(crate::cluster::Answer::Done), "twice is once");
    }
}

#[test]
fn a_removal_that_would_lose_the_majority_is_refused() {
    let mut net = Net::new(3);
    let (leader, dead) = (net.leading(), net.follower());
    net.kill(dead);
    net.run(3_000);
    let healthy = *net.controls.keys().find(|id| **id != leader).unwrap();
    let refusal = remove(&mut net, healthy, healthy).unwrap_err();
    assert_eq!(refusal.kind, RefusalKind::Later);
    assert!(refusal.message.contains("could decide nothing"), "{}", refusal.message);
    remove(&mut net, healthy, dead).unwrap();
    net.run(1_000);
    remove(&mut net, leader, healthy).unwrap();
    net.run_until("one is left", |net| net.controls[&leader].replica().conf().voters == [leader]);
    let refusal = remove(&mut net, leader, leader).unwrap_err();
    assert!(refusal.message.contains("only coordinator"), "{}", refusal.message);
    assert_eq!(net.submit(leader).0, 1);
}

#[test]
fn one_change_at_a_time() {
    let mut net = Net::new(5);
    net.run(1_000);
    let leader = net.leading();
    let others: Vec<u64> = net.controls.keys().copied().filter(|id| *id != leader).collect();
    let calls: Vec<Call> = others[..2]
        .iter()
        .map(|id| {
            let call = net.number();
            let request = RequestId { client: ClientId(call.into()), seq: 1 };
            let change = Change::RemoveReplica(RemoveReplica { replica: ReplicaId(*id) });
            net.handle(leader, Input::Propose { call, request: request.into(), by: None, change });
            call
        })
        .collect();
    net.run(1_000);
    assert!(net.proposed[&calls[0]].is_ok());
    let refusal = net.proposed[&calls[1]].as_ref().unwrap_err();
    assert_eq!(refusal.kind, RefusalKind::Unavailable);
    assert!(refusal.message.contains("another change"), "{}", refusal.message);
    assert_eq!(net.controls[&leader].replica().conf().voters.len(), 4);
}

#[test]
fn a_coordinator_that_starts_with_another_address_says_so() {
    let mut net = Net::new(3);
    let follower = net.follower();
    net.kill(follower);
    net.restart(follower);
    let address = &mut net.controls.get_mut(&follower).unwrap().myself.address;
    address.client = "elsewhere:1".into();
    net.run_until("the record", |net| {
        net.state(net.leading()).replicas()[&ReplicaId(follower)].address.client == "elsewhere:1"
    });
}

#[test]
fn one_that_was_removed_while_it_was_away_is_told_when_it_comes_back() {
    let mut net = Net::new(3);
    let (leader, away) = (net.leading(), net.follower());
    net.kill(away);
    net.run(1_000);
    remove(&mut net, leader, away).unwrap();
    net.restart(away);
    net.run_until("it hears", |net| net.removed.contains_key(&away));
    let call = net.send(away, frame(0, 0, fleet_common::protocol::Request::Nodes));
    net.settle();
    assert!(matches!(net.reply(call), Some(Reply::Refused(why)) if why.message.contains("was removed")));
}

#[test]
fn one_that_was_removed_votes_until_the_others_know_of_it() {
    let mut net = Net::new(4);
    net.run(1_000);
    let (leader, leaves) = (net.leading(), net.follower());
    let others: Vec<u64> = net.controls.keys().copied().filter(|id| *id != leader && *id != leaves).collect();
    let call = net.number();
    let request = RequestId { client: ClientId(call.into()), seq: 1 };
    let change = Change::RemoveReplica(RemoveReplica { replica: ReplicaId(leaves) });
    net.handle(leader, Input::Propose { call, request: request.into(), by: None, change });
    // The entry goes out, and is acknowledged.
    net.exchange();
    net.exchange();
    // Two do not hear that it is committed, and who refuses the third from now on is lost for ever.
    net.cut.extend(&others);
    net.settle();
    net.step();
    assert_eq!(net.controls[&leader].replica().conf().voters.len(), 3);
    assert_eq!(net.controls[&others[0]].replica().conf().voters.len(), 4);
    net.kill(leader);
    net.cut.clear();
    net.run(500);
    assert!(net.controls[&leaves].status().removed.is_some() && net.removed.is_empty());
    net.run_until("a leader", |net| net.leader().is_some_and(|leader| others.contains(&leader)));
    net.run_until("it goes", |net| net.removed.contains_key(&leaves));
    let job = net.submit(others[0]);
    assert_eq!(job.0, 1);
}

#[test]
fn one_that_was_removed_does_not_wait_for_ever_for_another_that_is_gone() {
    let mut net = Net::new(4);
    net.run(1_000);
    let (leader, gone) = (net.leading(), net.follower());
    net.kill(gone);
    let leaves = net.follower();
    remove(&mut net, leader, leaves).unwrap();
    net.run(10_000);
    assert!(net.controls[&leaves].status().removed.is_some() && net.removed.is_empty());
    net.run_until("it goes", |net| net.removed.contains_key(&leaves));
}

#[test]
fn a_removal_is_remembered_over_a_power_failure_by_who_counts_without_the_removed_one() {
    let mut net = Net::new(4);
    net.run(1_000);
    let (leader, leaves) = (net.leading(), net.follower());
    remove(&mut net, leader, leaves).unwrap();
    net.kill(leader);
    net.restart(leader);
    net.settle();
    assert_eq!(net.controls[&leader].replica().conf().voters.len(), 3);
}

#[test]
fn a_leader_that_stops_hands_over_first() {
    let mut net = Net::new(3);
    net.run(1_000);
    let old = net.leading();
    net.handle(old, Input::StepDown);
    net.settle();
    net.run(2 * TICK_MS);
    assert_ne!(net.leading(), old);
}

#[test]
fn nothing_is_proposed_that_a_coordinator_does_not_know() {
    let mut net = Net::new(3);
    let leader = net.leading();
    let address = crate::cluster::tests::address(net.follower());
    let old = DescribeReplica { address, version: "0".into(), level: 1 };
    net.propose(leader, Change::DescribeReplica(old)).unwrap();
    for at in [leader, net.follower()] {
        let run = fleet_common::protocol::Request::StartRun { name: "r".into() };
        let Reply::Refused(refusal) = net.ask(at, frame(9, 1, run)) else { panic!("not refused") };
        assert!(refusal.message.contains("update them first"), "{}", refusal.message);
    }
    assert_eq!(net.submit(leader).0, 1, "what the oldest knows goes on");
}
