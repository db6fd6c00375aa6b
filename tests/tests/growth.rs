//! Disks that fill: what a talkative job leaves on the coordinators and on its node, and what can be done when a disk is nearly full.

#![allow(clippy::unwrap_used)] // in a test an unwrap is an assertion

use fleet_tests::{Coordinators, Finished, Running, World, eventually, program};
use std::fs;
use std::path::{Path, PathBuf};

/// Lines of the talkative program, each of 4 KB with its newline.
const LINES: u64 = 8_000;
/// What they may leave on a coordinator: the burst, some seconds of the rate, once in the log and once in the history, and RocksDB's
/// own files.
const BOUND: u64 = 32 << 20;

/// Prints `count` lines as fast as it can, each beginning with its number.
fn talk(count: u64) -> String {
    format!(
        "awk 'BEGIN {{ s = sprintf(\"%4085s\", \"\"); gsub(/ /, \"x\", s); for (n = 0; n < {count}; n++) printf \"%09d %s\\n\", n, s }}'"
    )
}

fn bytes_in(dir: &Path) -> u64 {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let size = |entry: fs::DirEntry| match entry.metadata() {
        Ok(found) if found.is_dir() => bytes_in(&entry.path()),
        // A file that goes in this moment has no size.
        found => found.map_or(0, |found| found.len()),
    };
    entries.map(size).sum()
}

/// The numbers at the heads of the lines that `fleet logs` shows, and how many it says are left out.
fn shown(logs: &Finished) -> (Vec<u64>, u64) {
    let number = |line: &serde_json::Value| line["line"].as_str()?.split(' ').next()?.parse().ok();
    let left_out = logs.events("left_out").iter().filter_map(|event| event["lines"].as_u64()).sum();
    (logs.events("log").iter().filter_map(number).collect(), left_out)
}

#[test]
fn a_talkative_job_leaves_little_on_the_coordinators_and_all_of_it_on_its_node() {
    let world = World::new();
    let all = Coordinators::start(&world, 3);
    let worker = all.worker(7, 1);
    let cluster = all.data_dir(0).display().to_string();
    let fleet = |args: &[&str]| world.run("fleet", &[args, &["--cluster", &cluster]].concat());
    let script = format!("{}; echo the last words", talk(LINES));
    let done =
        world.run("fleet", &["submit", "--wait", "--json", "--cluster", &cluster, "--", "sh", "-c", &script]);
    done.expect(0);
    let logs = fleet(&["logs", "job-1", "--json"]).expect(0);
    assert!(logs.events("log").iter().any(|log| log["line"] == "the last words"), "the end is missing");
    let (lines, left_out) = shown(&logs);
    assert!(left_out > LINES / 2, "{left_out} lines are said to be left out, {} were shown", lines.len());
    assert_eq!(lines.len() as u64 + left_out, LINES, "every line was shown or is counted");
    assert!(
        lines.is_sorted() && lines[..100] == (0..100).collect::<Vec<_>>()[..],
        "the first ones are there"
    );
    for n in 0..all.count() {
        let bytes = bytes_in(&all.data_dir(n));
        assert!(bytes < BOUND, "{} MiB on coordinator {n}", bytes >> 20);
    }
    let said = fleet(&["logs", "job-1"]).expect(0).stdout.concat();
    assert!(said.contains("left out here; `fleet logs JOB --full` has all of them"), "it is not said");

    let full = fleet(&["logs", "job-1", "--full", "--rank", "0"]).expect(0);
    assert_eq!(full.stdout.len() as u64, LINES + 1);
    let whole =
        |(n, line): (usize, &String)| line.starts_with(&format!("[rank 0] {n:09} x")) && line.len() == 4_104;
    assert!(
        full.stdout.iter().take(LINES as usize).enumerate().all(whole),
        "a line is not whole, or not in its place"
    );
    fleet(&["logs", "job-1", "--full", "--rank", "3"]).expect(2).says("job-1 has no rank 3");
    drop(worker);
    let away = fleet(&["logs", "job-1", "--full"]).expect(3);
    away.says("error: rank 0: ");
    assert_eq!(away.stderr.matches("box-7 is not connected").count(), 1, "{}", away.all());
}

#[test]
fn on_a_disk_that_is_nearly_full_a_job_can_be_cancelled_and_a_member_cut_off() {
    let world = World::new();
    let disk = world.path("disk");
    fs::create_dir(&disk).unwrap();
    let coordinator = program("coordinator").display().to_string();
    let any = "127.0.0.1:0";
    let args = [&coordinator, "start", "--data-dir", "disk/cluster", "--listen", any, "--http", any];
    let Some(command) = world.on_a_disk_of("128M", &disk, "exec \"$@\"", &args) else { return };
    let process = Running::start(command);
    // The mount is seen through the process that has it.
    let inside = PathBuf::from(format!("/proc/{}/root{}", process.pid(), disk.display()));
    let cluster = world.standing(process, &inside.join("cluster"));
    let _worker = world.worker(&cluster, 1);
    let fleet = |args: &[&str]| {
        let (own, program) = args.split_at(args.iter().position(|arg| *arg == "--").unwrap_or(args.len()));
        world.run("fleet", &[own, &["--cluster", cluster.cluster()], program].concat())
    };
    fleet(&["submit", "--", "sh", "-c", "while true; do echo talk; sleep 0.1; done"]).expect(0);
    let state = || fleet(&["jobs", "--json"]).expect(0).stdout.concat();
    eventually("the job runs", || state().contains("\"running\""));
    let free = || {
        let found = nix::sys::statvfs::statvfs(&inside).unwrap();
        found.blocks_available() * found.fragment_size()
    };
    // Into the reserve, which ends at 24 MiB on so small a disk; below 16 nothing is written.
    fs::write(inside.join("filler"), vec![0; (free() - (21 << 20)) as usize]).unwrap();
    eventually("the coordinator notices", || fleet(&["status"]).stdout.concat().contains("only what frees"));
    let refused = fleet(&["submit", "--queue", "--", "true"]);
    assert_ne!(refused.code(), 0, "{}", refused.all());
    refused.says("fleet retention --size");
    fleet(&["cancel", "job-1", "--now"]).expect(0);
    eventually("the job ends", || state().contains("\"cancelled\""));
    fleet(&["drain", "node-1"]).expect(0);
    fleet(&["retention", "--size", "64MB", "--age", "1d"]).expect(2).says("64 MiB");
    fleet(&["retention", "--size", "100MB"]).expect(0);
    fleet(&["revoke", "node-1"]).expect(0);
    fs::remove_file(inside.join("filler")).unwrap();
    eventually("everything is taken again", || fleet(&["submit", "--queue", "--", "true"]).code() == 0);
}
