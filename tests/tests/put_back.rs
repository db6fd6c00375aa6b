//! The whole directory of a coordinator is put back to an older state, as by a virtual machine that returns to a snapshot.

#![allow(clippy::unwrap_used)] // in a test an unwrap is an assertion

use fleet_tests::{Coordinators, World, eventually};
use nix::sys::signal::Signal;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

/// What coordinators have seen of each other is told about once in a second.
const TOLD: Duration = Duration::from_secs(3);

fn copy(from: &Path, to: &Path) {
    assert!(Command::new("cp").arg("-a").arg(from).arg(to).status().unwrap().success());
}

fn submit(all: &Coordinators) -> String {
    let submitted = all.ask(&["submit", "-n", "1", "--queue", "--", "true"]);
    submitted["job"].as_str().unwrap().to_owned()
}

/// Makes changes for so long that all know of each other what they have; returns how many.
fn work(all: &Coordinators) -> usize {
    let begun = Instant::now();
    let mut made = 0;
    while begun.elapsed() < TOLD {
        submit(all);
        made += 1;
    }
    made
}

fn jobs(all: &Coordinators) -> usize {
    all.ask(&["jobs"]).as_array().unwrap().len()
}

/// The leader, and the two others.
fn three(all: &Coordinators) -> (usize, usize, usize) {
    eventually("a leader", || all.leader().is_some());
    let leader = all.leader().unwrap();
    let others: Vec<usize> = (0..3).filter(|n| *n != leader).collect();
    (leader, others[0], others[1])
}

fn put_back(all: &mut Coordinators, n: usize, older: &Path) {
    all.kill(n);
    fs::remove_dir_all(all.data_dir(n)).unwrap();
    copy(older, &all.data_dir(n));
}

#[test]
fn it_is_found_by_the_others_though_the_leader_is_another_one_and_nothing_is_lost() {
    let world = World::new();
    let mut all = Coordinators::start(&world, 3);
    let (leader, old, _) = three(&all);
    let older = world.path("older");
    submit(&all);
    all.kill(old);
    copy(&all.data_dir(old), &older);
    all.start_again(old);
    eventually("it has caught up", || all.client(old).coordinators().is_ok());
    let made = work(&all);
    put_back(&mut all, old, &older);
    all.kill(leader);
    let said = all.try_again(old).finish().all();
    assert!(said.contains("has seen that it") && said.contains("it must not take part any more"), "{said}");
    let again = all.try_again(old).finish().all();
    assert!(again.contains("has seen that it"), "it is marked: {again}");
    all.start_again(leader);
    assert_eq!(jobs(&all), 1 + made);
}

#[test]
fn what_nobody_could_know_is_said_as_soon_as_one_comes_back_who_does() {
    let world = World::new();
    let mut all = Coordinators::start(&world, 3);
    let (leader, old, paused) = three(&all);
    let older = world.path("older");
    submit(&all);
    all.kill(old);
    copy(&all.data_dir(old), &older);
    all.start_again(old);
    eventually("it has caught up", || all.client(old).coordinators().is_ok());
    all.signal(paused, Signal::SIGSTOP);
    // What was sent to it before that would wait for it in its socket.
    let lost = format!("lost the connection to replica-{}", paused + 1);
    eventually("nothing is sent to it", || all.complaints(leader).contains(&lost));
    let made = work(&all);
    put_back(&mut all, old, &older);
    all.kill(leader);
    all.start_again(old);
    all.signal(paused, Signal::SIGCONT);
    eventually("a leader of the two", || all.leader().is_some());
    // They have another past now, and go on with it.
    assert!(jobs(&all) < 1 + made);
    submit(&all);
    let said = all.try_again(leader).finish().all();
    assert!(said.contains("is committed here") && said.contains("put back to an older state"), "{said}");
    let metric = |n: usize| {
        let text = all.metrics(n).unwrap_or_default();
        text.lines().any(|line| line.starts_with("fleet_raft_contradictions_total ") && !line.ends_with(" 0"))
    };
    eventually("the others' alarm", || metric(paused));
}

/// What `/healthz` of this coordinator says.
fn health(all: &Coordinators, n: usize) -> String {
    all.health(n).unwrap_or_default()
}

#[test]
fn another_past_under_the_same_term_stops_who_has_the_one_that_was_acknowledged() {
    let world = World::new();
    let mut all = Coordinators::start(&world, 3);
    let (leader, old, paused) = three(&all);
    let older = world.path("older");
    submit(&all);
    all.kill(old);
    copy(&all.data_dir(old), &older);
    all.start_again(old);
    eventually("it has caught up", || all.client(old).coordinators().is_ok());
    all.signal(paused, Signal::SIGSTOP);
    let lost = format!("lost the connection to replica-{}", paused + 1);
    eventually("nothing is sent to it", || all.complaints(leader).contains(&lost));
    let term = |all: &Coordinators, n: usize| {
        let text = all.metrics(n).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("fleet_raft_term ")).map(str::to_owned);
        line.and_then(|term| term.parse::<u64>().ok()).unwrap_or_default()
    };
    // An election that the put back one and the paused one will not know of.
    let before = term(&all, leader);
    all.kill(leader);
    all.start_again(leader);
    eventually("the next term", || all.leader().is_some() && term(&all, leader) > before);
    let given = term(&all, leader);
    submit(&all);
    submit(&all);
    put_back(&mut all, old, &older);
    all.kill(leader);
    all.start_again(old);
    all.signal(paused, Signal::SIGCONT);
    eventually("a leader of the two", || all.leader().is_some());
    for _ in 0..6 {
        submit(&all);
    }
    let said = all.try_again(leader).finish().all();
    // Elections that went wrong may have taken them to a later term, which raft sees by itself.
    let expected = if term(&all, paused) == given { "has another entry" } else { "where one of term" };
    assert!(said.contains(expected) && said.contains("put back to an older state"), "{said}");
    let stopped = format!("replica-{} stops", leader + 1);
    eventually("it is said", || health(&all, paused).contains(&stopped));
    // The two may have to elect again first.
    let alarm = || {
        let views = all.any_client().coordinators().ok()?;
        views
            .into_iter()
            .find(|view| view.address.replica.to_string() == format!("replica-{}", leader + 1))?
            .alarm
    };
    eventually("the alarm in the list", || alarm().is_some_and(|alarm| alarm.contains("operating.md")));
    // As it is advised: the others' past is kept.
    all.ask(&["coordinators", "remove", &format!("replica-{}", leader + 1)]);
    eventually("all is well again", || health(&all, paused).contains("ok"));
}
