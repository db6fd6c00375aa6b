//! Disks that were put back to an older state: who finds it, and what is said.

use super::net::*;
use crate::cluster::commands::{Change, RemoveReplica};
use crate::cluster::tests::step;
use crate::control::{Input, PeerMessage};
use crate::raft::memory::MemoryDisk;
use fleet_common::ids::ReplicaId;
use std::sync::Arc;

fn copy(net: &Net, id: u64) -> Arc<MemoryDisk> {
    Arc::new(net.disks[&id].after_power_failure(usize::MAX))
}

/// The leader and the two others.
fn three(net: &Net) -> (u64, u64, u64) {
    let leader = net.leading();
    let others: Vec<u64> = net.controls.keys().copied().filter(|id| *id != leader).collect();
    (leader, others[0], others[1])
}

#[test]
fn a_disk_that_was_put_back_is_found_by_whoever_saw_what_it_had_also_after_the_leader_has_changed() {
    let mut net = Net::new(3);
    let (leader, old, other) = three(&net);
    net.submit(leader);
    net.run(2_000);
    let copied = copy(&net, old);
    net.submit(leader);
    net.run(2_000);
    net.kill(old);
    net.kill(leader);
    net.disks.insert(old, copied);
    net.restart_from(old, net.disks[&old].clone());
    net.run_until("the end of the one that forgot", |net| net.stopped.contains_key(&old));
    let why = &net.stopped[&old];
    assert!(why.contains("replica-") && why.contains("has seen that it acknowledged entry"), "{why}");
    assert!(net.alarms.iter().any(|(at, what)| *at == other && what.contains("stops")), "{:?}", net.alarms);
    net.restart(leader);
    net.run_until("a leader", |net| net.leader().is_some());
    assert_eq!(net.state(net.leading()).jobs().len(), 2, "nothing acknowledged is lost");
    let reopened = crate::raft::replica::Replica::open(net.disks[&old].clone(), 7);
    assert!(reopened.is_err_and(|error| error.to_string().contains("has seen")), "it is marked for ever");
}

#[test]
fn an_emptied_disk_is_found_before_it_votes() {
    let mut net = Net::new(3);
    let (leader, old, _) = three(&net);
    net.submit(leader);
    net.run(2_000);
    net.kill(old);
    net.kill(leader);
    let empty = Arc::new(MemoryDisk::default());
    net.join_as(old, empty);
    net.run_until("its end", |net| net.stopped.contains_key(&old));
    assert!(net.stopped[&old].contains("its disk knows 0"), "{}", net.stopped[&old]);
}

#[test]
fn a_replica_whose_committed_entries_are_contradicted_stops_and_says_so_and_names_who_forgot() {
    let mut net = Net::new(3);
    let (leader, old, paused) = three(&net);
    net.run(2_000);
    let copied = copy(&net, old);
    net.cut.insert(paused);
    let lost = net.submit(leader);
    net.run(2_000);
    net.kill(old);
    net.kill(leader);
    net.disks.insert(old, copied);
    net.restart_from(old, net.disks[&old].clone());
    net.cut.clear();
    // Nobody is there who knows better.
    net.run_until("a leader", |net| net.leader().is_some());
    assert!(!net.state(net.leading()).jobs().contains_key(&lost));
    net.submit(net.leading());
    let honest = copy(&net, leader);
    net.restart_from(leader, honest);
    net.run_until("the end of the honest one", |net| net.stopped.contains_key(&leader));
    let why = net.stopped[&leader].clone();
    assert!(why.contains("is committed here") && why.contains("put back to an older state"), "{why}");
    net.run_until("the end of the one that forgot", |net| net.stopped.contains_key(&old));
    assert!(net.stopped[&old].contains("has seen that it acknowledged entry"), "{}", net.stopped[&old]);
    assert!(
        net.alarms.iter().any(|(at, what)| *at == paused && what.contains("is committed here")),
        "{:?}",
        net.alarms
    );
    assert!(net.controls[&paused].status().contradictions > 0);
    // Its disk is not spoilt by what others did: it says the same again, and can be backed up.
    assert!(crate::raft::replica::Replica::open(net.disks[&leader].clone(), 7).is_ok());
}

#[test]
fn one_that_starts_again_waits_for_the_others_marks_and_no_longer_than_it_must() {
    let mut net = Net::new(3);
    let (leader, one, other) = three(&net);
    net.kill(leader);
    net.kill(one);
    net.kill(other);
    net.restart(one);
    net.run(2_000);
    assert!(net.controls[&one].status().leader.is_none());
    net.restart(other);
    net.run_until("a leader", |net| net.leader().is_some());
    let node = net.admit_node();
    let session = net.welcome(one, node, vec![]);
    let job = net.submit(net.leading());
    net.run_until("the start", |net| net.started(session) == [job]);
    net.say(session, events(job, 1, vec![step(1)]));
    net.run_until("the acknowledgement", |net| net.acknowledged(session) == 1);
}

/// The same term is given twice: one disk was put back to before it, and another coordinator was away. Returns who has the past that was
/// acknowledged, and who was put back.
fn same_term_twice(net: &mut Net) -> (u64, u64) {
    let (leader, old, away) = three(net);
    net.run(2_000);
    let copied = copy(net, old);
    net.cut.insert(away);
    net.kill(leader);
    net.restart_from(leader, net.disks[&leader].clone());
    net.run_until("the next leader", |net| net.leader().is_some_and(|id| id != away));
    let term = net.controls[&leader].status().term;
    for _ in 0..3 {
        net.submit(net.leading());
    }
    net.run(2_000);
    net.kill(old);
    net.kill(leader);
    net.disks.insert(old, copied);
    net.restart_from(old, net.disks[&old].clone());
    net.cut.clear();
    net.run_until("a leader of the two", |net| net.leader().is_some());
    assert_eq!(net.controls[&net.leading()].status().term, term);
    for _ in 0..9 {
        net.submit(net.leading());
    }
    net.run(2_000);
    (leader, old)
}

#[test]
fn another_past_under_the_same_term_is_found_before_the_one_that_comes_back_takes_part() {
    let mut net = Net::new(3);
    let (honest, _) = same_term_twice(&mut net);
    let jobs = net.state(net.leading()).jobs().len();
    net.restart_from(honest, copy(&net, honest));
    net.run_until("the end of the honest one", |net| net.stopped.contains_key(&honest));
    let why = &net.stopped[&honest];
    assert!(why.contains("has another entry") && why.contains("put back to an older state"), "{why}");
    assert!(crate::raft::replica::Replica::open(net.disks[&honest].clone(), 7).is_ok(), "it is not marked");
    let leading = net.leading();
    assert_eq!(net.state(leading).jobs().len(), jobs);
    let said = net.controls[&leading].status().contradicting.unwrap();
    assert!(said.contains(&format!("replica-{honest} stops")) && said.contains("operating.md"), "{said}");
    let change = Change::RemoveReplica(RemoveReplica { replica: ReplicaId(honest) });
    net.propose(leading, change).unwrap();
    net.run(2_000);
    assert_eq!(net.controls[&leading].status().contradicting, None, "it was taken out");
}

#[test]
fn what_a_former_leader_could_not_commit_is_no_other_past() {
    let mut net = Net::new(3);
    let (former, ..) = three(&net);
    net.run(2_000);
    let committed = net.controls[&former].replica().commit_index();
    net.cut.insert(former);
    net.send(former, frame(7, 1, program()));
    net.run_until("the next leader", |net| net.leader().is_some());
    let leading = net.leading();
    net.submit(leading);
    let theirs = |net: &Net| net.controls[&leading].replica().landmark_at(committed + 1).unwrap();
    let (theirs, former) = (theirs(&net), net.controls[&former].replica());
    let here = former.landmark_at(committed + 1).unwrap();
    assert!(here.at.term < theirs.at.term && former.commit_index() == committed);
    assert_eq!(former.instead_of(&theirs), None);
}

#[test]
fn another_past_under_the_same_term_is_found_by_who_could_ask_nobody() {
    let mut net = Net::new(3);
    let (honest, old) = same_term_twice(&mut net);
    // It hears from nobody until it takes part.
    net.cut.insert(honest);
    net.restart_from(honest, copy(&net, honest));
    net.run(4_000);
    net.cut.clear();
    net.submit(net.leading());
    net.run_until("the end of the honest one", |net| net.stopped.contains_key(&honest));
    assert!(net.stopped[&honest].contains("has another entry"), "{}", net.stopped[&honest]);
    assert!(net.controls.contains_key(&old) || net.stopped[&old].contains("has seen"));
}

#[test]
fn one_that_comes_back_with_the_same_past_is_no_alarm_any_more() {
    let mut net = Net::new(3);
    let (leader, other, _) = three(&net);
    net.submit(leader);
    let why = "of something that was mended".to_owned();
    net.handle(leader, Input::Peer { from: ReplicaId(other), message: PeerMessage::Stops { why } });
    assert!(net.controls[&leader].status().contradicting.is_some());
    net.kill(other);
    net.restart(other);
    net.run(1_000);
    assert_eq!(net.controls[&leader].status().contradicting, None);
}
