//! `fleet launch -- PROGRAM`: any program, as torchrun would run it.

#![allow(clippy::unwrap_used)] // in a test an unwrap is an assertion

use fleet_tests::{World, eventually};
use nix::sys::signal::Signal;
use std::collections::BTreeSet;

#[test]
fn a_program_finds_its_rank_and_its_peers_in_the_environment() {
    let world = World::new();
    let script = "echo env $RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE $GROUP_RANK $ROLE_RANK $MASTER_ADDR $OMP_NUM_THREADS \
                  $TORCHELASTIC_RUN_ID $TORCHELASTIC_RESTART_COUNT $MASTER_PORT $PWD $GIVEN";
    let mut command = world.command("fleet");
    command.env("GIVEN", "through").args(["launch", "-n", "2", "--json", "--", "sh", "-c", script]);
    let done = fleet_tests::Running::start(command).finish().expect(0);
    assert_eq!(done.summary()["status"], "succeeded");
    let mut ports = BTreeSet::new();
    for rank in 0..2 {
        let logs = done.events("log");
        let line = logs
            .iter()
            .find(|log| log["rank"] == rank && log["line"].as_str().unwrap_or_default().starts_with("env "));
        let line = line.unwrap_or_else(|| panic!("rank {rank} printed nothing: {}", done.all()));
        let words: Vec<&str> = line["line"].as_str().unwrap().split(' ').collect();
        let rank = rank.to_string();
        assert_eq!(words[..9], ["env", &rank, &rank, "2", "2", "0", &rank, "127.0.0.1", "1"]);
        assert_eq!(words[10], "0");
        assert_eq!(words[12..], [world.path("").display().to_string().trim_end_matches('/'), "through"]);
        ports.insert(words[11].parse::<u16>().unwrap());
    }
    assert_eq!(ports.len(), 1, "one port for all");
}

#[test]
fn the_exit_code_is_that_of_the_first_rank_that_fails() {
    let world = World::new();
    let script = "if [ $RANK = 1 ]; then echo last words; exit 7; fi; sleep 60";
    let done = world.run("fleet", &["launch", "-n", "2", "--json", "--", "sh", "-c", script]).expect(7);
    let error = &done.summary()["error"];
    assert_eq!(
        (&error["rank"], &error["exit_code"], &error["signal"]),
        (&1.into(), &7.into(), &().into()),
        "{error}"
    );
    assert!(error["last_lines"].to_string().contains("last words"), "{error}");
    world.is_empty_soon();
}

#[test]
fn a_rank_that_dies_by_a_signal_gives_128_and_the_signal() {
    let world = World::new();
    let script = "if [ $RANK = 1 ]; then kill -SEGV $$; fi; sleep 60";
    let done =
        world.run("fleet", &["launch", "-n", "2", "--json", "--", "sh", "-c", script]).expect(128 + 11);
    let error = &done.summary()["error"];
    assert_eq!((&error["rank"], &error["signal"]), (&1.into(), &11.into()), "{error}");
    world.is_empty_soon();
}

#[test]
fn a_program_that_does_not_exist_is_named() {
    let world = World::new();
    let done = world.run("fleet", &["launch", "-n", "1", "--", "no-such-program-here"]);
    assert!([2, 4, 127].contains(&done.code()), "{}", done.all());
    assert!(done.all().contains("no-such-program-here") && done.stderr.contains("error"), "{}", done.all());
}

#[test]
fn the_signal_that_came_is_passed_on_to_every_rank() {
    for (signal, name, code) in
        [(Signal::SIGINT, "INT", 130), (Signal::SIGHUP, "HUP", 129), (Signal::SIGTERM, "TERM", 143)]
    {
        let world = World::new();
        // What it does with another signal would be told as well.
        let traps: String = ["INT", "HUP", "TERM"]
            .map(|other| format!("trap 'echo {other} > got-$RANK; exit 0' {other}; "))
            .concat();
        let script = format!("{traps} echo ready; while :; do sleep 1; done");
        let mut command = world.enter(std::process::Command::new("env"));
        // As from a terminal, also where the tests run under nohup.
        command.arg("--default-signal=HUP").arg(fleet_tests::program("fleet"));
        command.args(["launch", "-n", "2", "--json", "--", "sh", "-c", &script]);
        let mut launch = fleet_tests::Running::start(command);
        launch.until("ready", |line| line["line"] == "ready");
        launch.until("ready", |line| line["line"] == "ready");
        launch.signal(signal);
        let done = launch.finish().expect(code);
        assert_eq!(done.summary()["status"], "cancelled", "{}", done.all());
        for rank in 0..2 {
            let got = std::fs::read_to_string(world.path(&format!("got-{rank}"))).unwrap_or_default();
            assert_eq!(got.trim(), name, "rank {rank}: {}", done.all());
        }
        world.is_empty_soon();
    }
}

#[test]
fn a_program_that_minds_no_signal_is_ended_by_the_second_ctrl_c() {
    let world = World::new();
    let script = "trap '' INT TERM; echo ready; while :; do sleep 1; done";
    let mut launch = world.start("fleet", &["launch", "-n", "1", "--json", "--", "sh", "-c", script]);
    launch.until("ready", |line| line["line"] == "ready");
    launch.signal(Signal::SIGINT);
    launch.until_it_says("once more stops at once");
    launch.signal(Signal::SIGINT);
    launch.finish().expect(130);
    world.is_empty_soon();
}

#[test]
fn what_a_program_left_behind_ends_with_fleet() {
    let world = World::new();
    // The rank leaves a child in a session of its own.
    let script = "setsid sleep 600 & echo ready; sleep 600";
    let mut launch = world.start("fleet", &["launch", "-n", "1", "--json", "--", "sh", "-c", script]);
    launch.until("ready", |line| line["line"] == "ready");
    eventually("the stray child runs", || {
        world.processes().iter().any(|(_, line)| line.starts_with("sleep 600"))
    });
    launch.signal(Signal::SIGTERM);
    launch.finish().expect(143);
    world.is_empty_soon();
}
