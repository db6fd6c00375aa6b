//! Processes that are killed, stopped or not listened to, under `fleet launch`.

#![allow(clippy::unwrap_used)] // in a test an unwrap is an assertion

use fleet_tests::{Running, TinyJob, World, eventually, program};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use std::path::Path;
use std::process::Command;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

fn strike(pid: u32, signal: Signal) {
    kill(Pid::from_raw(pid as i32), signal).unwrap();
}

/// A job that would go on for longer than a test.
fn endless() -> TinyJob {
    TinyJob { max_steps: 1_000_000, ..TinyJob::default() }
}

#[test]
fn a_rank_that_is_killed_fails_the_job_with_its_name_and_signal() {
    let world = World::new();
    let mut launch = world.launch(2, &endless(), &[]);
    launch.until_step(2);
    strike(world.ranks()[0], Signal::SIGKILL);
    let done = launch.finish().expect(1);
    let summary = done.summary();
    assert_eq!(summary["status"], "failed", "{summary}");
    let error = &summary["error"];
    assert!(error["rank"].as_u64() < Some(2), "{summary}");
    assert_eq!(error["signal"], 9);
    assert!(error["node"].is_string(), "{summary}");
    assert!(error["message"].as_str().unwrap_or_default().contains("SIGKILL"), "{summary}");
    world.is_empty_soon();
}

/// Whether the agent itself logged this, with `text` in it.
fn is_logged(value: &Value, level: &str, text: &str) -> bool {
    let line = value["line"].as_str().unwrap_or_default();
    value["event"] == "log" && value["rank"].is_null() && value["level"] == level && line.contains(text)
}

#[test]
fn a_rank_that_stands_still_is_named_and_the_job_goes_on_with_it() {
    let world = World::new();
    let job = TinyJob { max_steps: 1_000, ..TinyJob::default() };
    let mut launch = world.launch(2, &job, &[]);
    launch.until_step(3);
    let pid = world.ranks()[1];
    strike(pid, Signal::SIGSTOP);
    let begun = Instant::now();
    let stall = || {
        let shown = world.run("fleet", &["status", "job-1", "--json"]).expect(0).stdout.concat();
        serde_json::from_str::<Value>(&shown).unwrap()["stall"].clone()
    };
    eventually("its status says for whom it waits", || {
        stall()["what"]
            .as_str()
            .is_some_and(|what| what.contains(&format!("process {pid}, stopped by a signal")))
    });
    world
        .run("fleet", &["status", "job-1"])
        .expect(0)
        .stdout
        .iter()
        .find(|line| line.starts_with("held up for "))
        .unwrap();
    let overview = world.run("fleet", &["status"]).expect(0).stdout;
    assert!(
        overview.iter().any(|line| line.starts_with("job-1 ") && line.contains("held up for ")),
        "{overview:?}"
    );
    let stalled = launch.until("a stall", |value| is_logged(value, "warn", "has not come to"));
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
    let line = stalled["line"].as_str().unwrap().to_owned();
    assert!(line.contains(&format!("process {pid}, stopped by a signal")), "{line}");
    let others = if line.starts_with("rank 1 ") { "rank 0 waits for it" } else { "rank 1 waits for it" };
    assert!(line.ends_with(others), "{line}");
    let logs = world.run("fleet", &["logs"]).expect(0);
    assert!(logs.stdout.iter().any(|said| said.contains(&line)), "{}", logs.all());
    strike(pid, Signal::SIGCONT);
    launch.until("going on", |value| is_logged(value, "info", "the ranks go on after"));
    eventually("its status says nothing of it any more", || stall().is_null());
    let done = launch.finish().expect(0);
    assert_eq!(done.summary()["status"], "succeeded", "{}", done.all());
    world.is_empty_soon();
}

#[test]
fn a_rank_that_is_slower_than_the_others_is_named_while_it_is() {
    let world = World::new();
    let mut launch = world.launch(2, &endless(), &[]);
    launch.until_step(3);
    let pid = world.ranks()[1];
    let (release, released) = mpsc::channel::<()>();
    // It stands still for two thirds of the time.
    let brake = thread::spawn(move || {
        let held = |signal, ms| {
            strike(pid, signal);
            released.recv_timeout(Duration::from_millis(ms)) == Err(RecvTimeoutError::Timeout)
        };
        while held(Signal::SIGSTOP, 40) && held(Signal::SIGCONT, 20) {}
        strike(pid, Signal::SIGCONT);
    });
    let slow =
        launch.until("a slow rank", |value| is_logged(value, "warn", "times as slow as the others since"));
    let line = slow["line"].as_str().unwrap().to_owned();
    assert!(line.starts_with("rank "), "{line}");
    let stall = || {
        let shown = world.run("fleet", &["status", "job-1", "--json"]).expect(0).stdout.concat();
        serde_json::from_str::<Value>(&shown).unwrap()["stall"].clone()
    };
    eventually("its status says so", || stall()["what"] == line.as_str());
    drop(release);
    brake.join().unwrap();
    launch.until("the end of it", |value| is_logged(value, "info", "is as fast as the others again"));
    eventually("its status says nothing of it any more", || stall().is_null());
    launch.signal(Signal::SIGINT);
    launch.finish().expect(130);
    world.is_empty_soon();
}

#[test]
fn a_job_that_stands_still_ends_some_time_after_it_was_cancelled() {
    let world = World::new();
    let mut launch = world.launch(2, &endless(), &[]);
    launch.until_step(3);
    strike(world.ranks()[1], Signal::SIGSTOP);
    launch.until("a stall", |value| is_logged(value, "warn", "stopped by a signal"));
    world.run("fleet", &["cancel", "job-1"]).expect(0);
    launch
        .until("its end by force", |value| is_logged(value, "info", "and ends without a checkpoint: rank "));
    let done = launch.finish().expect(1);
    assert_eq!(done.summary()["status"], "cancelled", "{}", done.all());
    world.is_empty_soon();
}

#[test]
fn a_gang_that_is_stopped_as_a_whole_blames_nobody() {
    let world = World::new();
    let mut launch = world.launch(2, &endless(), &[]);
    launch.until_step(3);
    let ranks = world.ranks();
    ranks.iter().for_each(|pid| strike(*pid, Signal::SIGSTOP));
    let stalled = launch.until("a stall", |value| is_logged(value, "warn", " for "));
    let line = stalled["line"].as_str().unwrap();
    assert!(line.starts_with("all ranks stand still for "), "{line}");
    ranks.iter().for_each(|pid| strike(*pid, Signal::SIGCONT));
    launch.until("going on", |value| is_logged(value, "info", "the ranks go on after"));
    launch.signal(Signal::SIGINT);
    launch.finish().expect(130);
    world.is_empty_soon();
}

#[test]
fn nothing_outlives_a_fleet_that_is_killed() {
    let world = World::new();
    let mut launch = world.launch(2, &endless(), &[]);
    launch.until_step(2);
    assert!(
        world.processes().len() >= 5,
        "fleet, coordinator, worker and two ranks: {:?}",
        world.processes()
    );
    launch.signal(Signal::SIGKILL);
    assert_eq!(launch.finish().code(), 128 + 9);
    world.is_empty_soon();
}

#[test]
fn stopping_signals_end_the_job_with_a_checkpoint() {
    for (signal, code) in [(Signal::SIGINT, 130), (Signal::SIGTERM, 143), (Signal::SIGHUP, 129)] {
        let world = World::new();
        let mut command = world.enter(Command::new("env"));
        // As from a terminal, also where the tests run under nohup.
        command.arg("--default-signal=HUP").arg(program("fleet")).args(["launch", "-n", "2", "--json"]);
        command.arg(world.job(&endless()));
        let mut launch = Running::start(command);
        launch.until_step(2);
        launch.signal(signal);
        let done = launch.finish().expect(code);
        let summary = done.summary();
        assert_eq!(summary["status"], "cancelled", "{summary}");
        let checkpoint =
            summary["checkpoint"].as_str().unwrap_or_else(|| panic!("no checkpoint: {}", done.all()));
        assert!(Path::new(checkpoint).join("model.safetensors.index.json").is_file());
        world.is_empty_soon();
    }
}

#[test]
fn a_second_ctrl_c_stops_at_once() {
    let world = World::new();
    let mut launch = world.launch(2, &endless(), &[]);
    launch.until_step(2);
    // Ranks that are stopped cannot come to the next step, so the first Ctrl-C waits for them.
    world.ranks().into_iter().for_each(|pid| strike(pid, Signal::SIGSTOP));
    launch.signal(Signal::SIGINT);
    launch.until_it_says("once more, after a second, stops at once");
    let begun = Instant::now();
    press_until_it_ends(&mut launch);
    launch.finish().expect(130);
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    world.is_empty_soon();
}

/// As somebody does who finds that once was not enough.
fn press_until_it_ends(launch: &mut Running) {
    eventually("it ends", || {
        let ended = launch.has_ended();
        if !ended {
            launch.signal(Signal::SIGINT);
        }
        ended
    });
}

#[test]
fn signals_that_come_together_are_one_and_cost_no_checkpoint() {
    let world = World::new();
    let mut launch = world.launch(2, &endless(), &[]);
    launch.until_step(2);
    // Where a second signal counted, this would be over before the ranks go on.
    let ranks = world.ranks();
    ranks.iter().for_each(|pid| strike(*pid, Signal::SIGSTOP));
    // As GNU `timeout` sends them, to its child and then to the group; two different ones, since of one kind only one may wait.
    launch.signal(Signal::SIGTERM);
    launch.signal(Signal::SIGINT);
    launch.until_it_says("stopping after a checkpoint");
    // Time in which a second one would do its work: no more than the rule gives it.
    std::thread::sleep(Duration::from_millis(500));
    ranks.iter().for_each(|pid| strike(*pid, Signal::SIGCONT));
    let done = launch.finish();
    assert!([130, 143].contains(&done.code()), "{}", done.all());
    let summary = done.summary();
    assert_eq!(summary["status"], "cancelled", "{summary}");
    assert!(summary["checkpoint"].is_string(), "no checkpoint: {}", done.all());
    world.is_empty_soon();
}

#[test]
fn a_schedulers_warning_costs_a_training_nothing() {
    let world = World::new();
    let mut launch = world.launch(1, &TinyJob { max_steps: 600, ..TinyJob::default() }, &[]);
    launch.until_step(2);
    launch.signal(Signal::SIGUSR1);
    launch.until_it_says("SIGUSR1");
    assert_eq!(launch.finish().expect(0).losses().len(), 600);
    world.is_empty_soon();
}

#[test]
fn a_closed_stdout_stops_the_printing_and_not_the_job() {
    let world = World::new();
    let job = TinyJob { max_steps: 200, ..TinyJob::default() };
    let mut launch = world.launch(1, &job, &[]);
    launch.until_step(1);
    assert_eq!(launch.finish_unheard().code(), 0);
    let last = world.path("out/checkpoints/tiny/step-00000200/model.safetensors");
    assert!(last.is_file(), "{}", last.display());
}

#[test]
fn a_coordinator_that_dies_under_a_launch_costs_nothing() {
    let world = World::new();
    let job = TinyJob { max_steps: 600, save_steps: 300, ..TinyJob::default() };
    let mut launch = world.launch(2, &job, &[]);
    let cluster = launch.until_event("cluster");
    let coordinator = cluster["pids"]["coordinator"].as_u64().unwrap_or_else(|| panic!("no pid: {cluster}"));
    launch.until_step(50);
    let ranks = world.ranks();
    strike(coordinator as u32, Signal::SIGKILL);
    launch.until("the coordinator's return", |line| {
        line["node"] == "coordinator" && line["state"] == "restarted"
    });
    let same = world.ranks();
    assert!(same.is_empty() || same == ranks, "the ranks must not notice: {ranks:?}, {same:?}");
    let done = launch.finish().expect(0);
    assert_eq!(done.summary()["status"], "succeeded");
    let steps: Vec<u64> = done.losses().into_iter().map(|(step, _)| step).collect();
    assert_eq!(steps, (1..=600).collect::<Vec<_>>(), "a step was lost or doubled");
    world.is_empty_soon();
}

#[test]
fn the_leader_of_three_dies_under_a_launch_and_no_step_is_lost() {
    let world = World::new();
    let job = TinyJob { max_steps: 600, save_steps: 300, ..TinyJob::default() };
    let mut launch = world.launch(2, &job, &["--coordinators", "3"]);
    let cluster = launch.until_event("cluster");
    let dir = cluster["data_dir"].as_str().unwrap().to_owned();
    let pids = cluster["pids"].as_object().unwrap();
    assert!(
        ["coordinator", "coordinator-2", "coordinator-3"].iter().all(|name| pids[*name].is_u64()),
        "{cluster}"
    );
    launch.until_step(50);
    let ranks = world.ranks();
    for _ in 0..2 {
        let status = world.run("fleet", &["status", "--json", "--data-dir", &dir]).expect(0);
        let status: serde_json::Value = serde_json::from_str(&status.stdout.concat()).unwrap();
        assert_eq!(status["replicas"].as_array().map(Vec::len), Some(3), "{status}");
        assert!(status["replicas"][0]["matched_index"].is_u64(), "{status}");
        strike(status["leader"]["pid"].as_u64().unwrap() as u32, Signal::SIGKILL);
        launch.until("the coordinator's return", |line| line["state"] == "restarted");
    }
    let same = world.ranks();
    assert!(same.is_empty() || same == ranks, "the ranks must not notice: {ranks:?}, {same:?}");
    let done = launch.finish().expect(0);
    let steps: Vec<u64> = done.losses().into_iter().map(|(step, _)| step).collect();
    assert_eq!(steps, (1..=600).collect::<Vec<_>>(), "a step was lost or doubled");
    world.is_empty_soon();
}

#[test]
fn two_launches_run_side_by_side() {
    let world = World::new();
    let job = |run_name| TinyJob { run_name, max_steps: 100, ..TinyJob::default() };
    let mut launches = ["left", "right"].map(|name| world.launch(2, &job(name), &[]));
    let directories = launches.each_mut().map(|launch| launch.until_event("cluster")["data_dir"].to_string());
    assert_ne!(directories[0], directories[1]);
    for (launch, name) in launches.into_iter().zip(["left", "right"]) {
        let done = launch.finish().expect(0);
        assert_eq!(done.losses().len(), 100);
        assert!(done.summary()["checkpoint"].as_str().unwrap_or_default().contains(name), "{}", done.all());
    }
    world.is_empty_soon();
}

#[test]
fn ranks_run_while_their_log_and_events_are_read_from_elsewhere() {
    let world = World::new();
    let mut launch = world.launch(1, &endless(), &[]);
    launch.until_step(1);
    // Without --cluster: the newest local launch.
    let nodes = world.run("fleet", &["nodes", "--json"]).expect(0);
    assert!(nodes.stdout.concat().contains("\"slots_used\":1"), "{}", nodes.all());
    let jobs = world.run("fleet", &["jobs", "--json"]).expect(0);
    assert!(jobs.stdout.concat().contains("\"running\""), "{}", jobs.all());
    world.run("fleet", &["cancel", "job-1"]).expect(0);
    let done = launch.finish();
    assert_eq!(done.summary()["status"], "cancelled", "{}", done.all());
    eventually("the launch is gone", || world.run("fleet", &["jobs"]).code() == 3);
}

#[test]
fn a_chaos_that_is_told_to_end_leaves_nothing() {
    let world = World::new();
    let inner = world.path("inner");
    std::fs::create_dir(&inner).unwrap();
    let mut command = world.command("chaos");
    command.args(["--seed", "1", "--steps", "1000000"]).env("TMPDIR", &inner);
    let chaos = Running::start(command);
    let inside = || {
        let pids = std::fs::read_dir("/proc").unwrap().flatten();
        let lines = pids.filter_map(|pid| std::fs::read_to_string(pid.path().join("cmdline")).ok());
        lines.filter(|line| line.contains(inner.to_str().unwrap())).count()
    };
    eventually("a coordinator and a worker", || inside() >= 2);
    chaos.signal(Signal::SIGTERM);
    chaos.finish().expect(128 + 15);
    assert_eq!(inside(), 0);
    assert_eq!(std::fs::read_dir(&inner).unwrap().count(), 0);
}
