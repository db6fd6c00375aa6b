//! Damage in the history: told once, mended from another coordinator, and never sent on.

use super::net::*;
use crate::control::*;
use crate::raft::disk::{Disk, Table};
use crate::raft::stretch::{self, END_OF_KEYS, Row};
use fleet_common::ids::{JobId, ReplicaId};
use fleet_common::protocol::{Reply, Request, Role};

const JOBS: usize = 5;

/// Coordinators with the work of some jobs in their history.
fn recorded(voters: u64) -> Net {
    let mut net = Net::new(voters);
    for _ in 0..JOBS {
        net.submit(net.leading());
    }
    net.run(1_000);
    for at in 1..=voters {
        assert_eq!(works(&net, at).len(), JOBS);
    }
    net
}

fn works(net: &Net, at: u64) -> Vec<Row> {
    let mut rows = Vec::new();
    let scanned = net.disks[&at].scan(Table::Works, &[], &END_OF_KEYS, &mut |key, value| {
        rows.push((key.to_vec(), value.to_vec()));
        true
    });
    scanned.unwrap();
    rows
}

/// Asks about a job, which reads its row.
fn ask(net: &mut Net, job: usize) -> Reply {
    let seq = net.number();
    let at = net.leading();
    net.ask(at, frame(7, seq, Request::Job(JobId(job as u64))))
}

fn spoil(net: &Net, at: u64, job: usize) {
    assert!(net.disks[&at].rot(Table::Works, job - 1, 9));
}

fn refusal(reply: Reply) -> String {
    match reply {
        Reply::Refused(refusal) => refusal.message,
        other => panic!("{other:?}"),
    }
}

fn warnings(net: &Net, at: u64) -> Vec<&str> {
    net.alarms.iter().filter(|(who, _)| *who == at).map(|(_, what)| what.as_str()).collect()
}

#[test]
fn a_damaged_row_is_told_once_and_mended_from_another_coordinator() {
    let mut net = recorded(3);
    let leader = net.leading();
    spoil(&net, leader, 3);
    for _ in 0..3 {
        let why = refusal(ask(&mut net, 3));
        assert!(why.contains("history is damaged") && why.contains("of table works"), "{why}");
        assert!(matches!(ask(&mut net, 2), Reply::Job(_)), "others are served");
    }
    let status = net.controls[&leader].status();
    assert!(status.damaged.unwrap().contains("rows of works") && status.damaged_tables == 1);
    assert_eq!(warnings(&net, leader).len(), 1);
    // Rows that come meanwhile are in the table that is made anew.
    net.submit(leader);
    net.run(1_000);
    assert!(matches!(ask(&mut net, 3), Reply::Job(_)));
    let follower = net.follower();
    assert_eq!(works(&net, leader), works(&net, follower));
    let status = net.controls[&leader].status();
    assert_eq!((status.damaged, status.damaged_tables), (None, 0));
    assert!(status.rows_mended > 0);
    assert_eq!(warnings(&net, leader).len(), 1, "{:?}", net.alarms);
    assert!(net.decided.iter().any(|what| what.contains("rows of works are mended")), "{:?}", net.decided);
    net.restart(leader);
    assert_eq!(works(&net, leader), works(&net, follower), "and durably");
}

#[test]
fn coordinators_that_miss_different_rows_mend_each_other() {
    let mut net = recorded(3);
    let leader = net.leading();
    let whole = works(&net, leader);
    for at in 1..=3 {
        spoil(&net, at, at as usize);
    }
    for job in 1..=3 {
        ask(&mut net, job);
    }
    net.run(10_000);
    assert_eq!(works(&net, leader), whole);
    // The others find out when they read theirs.
    for at in (1..=3).filter(|at| *at != leader) {
        net.controls[&at].history().work(JobId(at)).unwrap_err();
    }
    net.run(10_000);
    for at in 1..=3 {
        assert_eq!(works(&net, at), whole, "{at}");
    }
}

#[test]
fn a_row_that_nobody_has_is_not_made_up_and_stays_told() {
    for voters in [1, 3] {
        let mut net = recorded(voters);
        for at in 1..=voters {
            spoil(&net, at, 2);
        }
        let leader = net.leading();
        refusal(ask(&mut net, 2));
        net.run(5_000);
        refusal(ask(&mut net, 2));
        assert!(matches!(ask(&mut net, 3), Reply::Job(_)));
        net.submit(leader);
        assert!(net.controls[&leader].status().damaged.is_some());
        assert_eq!(works(&net, leader).len(), JOBS + 1, "the row is there for another attempt");
        assert!(warnings(&net, leader).len() <= 2, "{:?}", net.alarms);
        // It can be read again.
        for at in 1..=voters {
            spoil(&net, at, 2);
        }
        assert!(matches!(ask(&mut net, 2), Reply::Job(_)));
    }
}

#[test]
fn rows_of_a_coordinator_that_is_behind_are_not_taken_for_all() {
    let mut net = recorded(3);
    let leader = net.leading();
    let [behind, other] = [1, 2, 3].into_iter().filter(|at| *at != leader).collect::<Vec<_>>()[..] else {
        panic!("three");
    };
    net.cut.insert(behind);
    let last = net.submit(leader);
    net.run(500);
    let whole = works(&net, leader);
    spoil(&net, leader, last.0 as usize);
    net.cut.remove(&behind);
    net.cut.insert(other);
    // Only the one that is behind can be asked, which does not have the row until it has caught up.
    refusal(ask_stale(&mut net, leader, last));
    net.run(40_000);
    net.cut.remove(&other);
    net.run(40_000);
    assert_eq!(works(&net, leader), whole);
}

fn ask_stale(net: &mut Net, at: u64, job: JobId) -> Reply {
    let seq = net.number();
    let mut asked = frame(7, seq, Request::Job(job));
    asked.stale = true;
    net.ask(at, asked)
}

#[test]
fn a_newcomer_waits_for_what_is_damaged_and_lacks_nothing() {
    let mut net = recorded(3);
    let leader = net.leading();
    let whole = works(&net, leader);
    spoil(&net, leader, 4);
    assert_eq!(net.admit(leader, Role::Coordinator), Member::Coordinator(ReplicaId(4)));
    net.join(4);
    net.run_until("a vote", |net| net.controls[&4].status().voter);
    assert_eq!(works(&net, 4), whole);
    assert_eq!(works(&net, leader), whole);

    // Where there is nobody to mend it, nobody dies of it and nothing is left out.
    let mut net = recorded(1);
    let whole = works(&net, 1);
    spoil(&net, 1, 4);
    net.admit(1, Role::Coordinator);
    net.join(2);
    net.run(60_000);
    assert!(!net.controls[&2].status().voter && net.controls[&1].status().damaged.is_some());
    spoil(&net, 1, 4);
    net.run_until("a vote", |net| net.controls[&2].status().voter);
    assert_eq!(works(&net, 2), whole);
    let all = stretch::read(net.disks[&2].as_ref(), Table::Works, &[], usize::MAX).unwrap();
    assert_eq!(all.end, stretch::End::OfTable);
}
