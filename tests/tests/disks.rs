//! Accidents of coordinators' disks, by the real programs: files that are gone, older copies, bad blocks, restores that were cut off, and
//! backups of a coordinator that is behind.

#![allow(clippy::unwrap_used)] // in a test an unwrap is an assertion

use fleet_common::ids::JobId;
use fleet_common::protocol::{Reply, Request};
use fleet_tests::{Client, Finished, Running, Standing, World, eventually, http};
use nix::sys::signal::Signal;
use serde_json::Value;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

const ANY: &str = "127.0.0.1:0";

fn submit(world: &World, cluster: &Standing, argument: &str) {
    let mut command = world.command("fleet");
    command.args(["submit", "-n", "1", "--queue", "--", "true", argument]);
    command.env("FLEET_CLUSTER", cluster.cluster());
    Running::start(command).finish().expect(0);
}

fn jobs(world: &World, cluster: &Standing) -> usize {
    let done = world.run("fleet", &["jobs", "--json", "--cluster", cluster.cluster()]).expect(0);
    let listed: Value = serde_json::from_str(&done.stdout.concat()).unwrap();
    listed.as_array().unwrap().len()
}

/// What is said where a coordinator is expected and cannot start.
fn refused(world: &World, data_dir: &str) -> Finished {
    let args = ["start", "--expect-existing", "--listen", ANY, "--http", ANY, "--data-dir", data_dir];
    world.run("coordinator", &args).expect(4)
}

fn copy(from: &Path, to: &Path) {
    assert!(Command::new("cp").arg("-r").arg(from).arg(to).status().unwrap().success());
}

fn files(dir: &Path, kind: &str) -> Vec<PathBuf> {
    let all = fs::read_dir(dir).unwrap().map(|file| file.unwrap().path());
    let mut found: Vec<_> = all.filter(|path| path.extension().is_some_and(|found| found == kind)).collect();
    found.sort();
    found
}

#[test]
fn a_coordinator_that_lost_a_part_of_its_log_does_not_serve_an_older_state() {
    type Loss = fn(raft: &Path, older: &Path);
    let losses: [(&str, Loss); 5] = [
        ("log file damaged", |raft, _| {
            let log = files(raft, "log").pop().unwrap();
            let mut bytes = fs::read(&log).unwrap();
            let middle = bytes.len() / 2;
            bytes[middle] ^= 1;
            fs::write(&log, bytes).unwrap();
        }),
        ("log files gone", |raft, _| files(raft, "log").iter().for_each(|log| fs::remove_file(log).unwrap())),
        ("newest log file cut", |raft, _| {
            let log = fs::OpenOptions::new().write(true).open(files(raft, "log").last().unwrap()).unwrap();
            log.set_len(log.metadata().unwrap().len() / 2).unwrap();
        }),
        ("emptied", |raft, _| {
            fs::remove_dir_all(raft).unwrap();
            fs::create_dir(raft).unwrap();
        }),
        ("older copy", |raft, older| {
            fs::remove_dir_all(raft).unwrap();
            copy(older, raft);
        }),
    ];
    for (what, lose) in losses {
        let world = World::new();
        let (data, older) = (world.path("cluster"), world.path("older"));
        let cluster = world.coordinator(&data, ANY);
        submit(&world, &cluster, "one");
        copy(&data.join("raft"), &older);
        submit(&world, &cluster, "two");
        // Killed: nothing is lost by that.
        drop(cluster);
        let cluster = world.restart_coordinator(&data);
        assert_eq!(jobs(&world, &cluster), 2);
        submit(&world, &cluster, "three");
        drop(cluster);
        lose(&data.join("raft"), &older);
        for _ in 0..2 {
            let said = refused(&world, "cluster").all();
            assert!(said.contains("restore a backup"), "{what}: {said}");
        }
        world.run("coordinator", &["backup", "--data-dir", "cluster", "--out", "saved"]).expect(4);
        if what == "log file damaged" {
            let salvage = ["backup", "--data-dir", "cluster", "--out", "saved", "--salvage"];
            world.run("coordinator", &salvage).expect(0).says("left out: log after");
        }
        if what == "older copy" {
            let salvage = ["backup", "--data-dir", "cluster", "--out", "saved", "--salvage"];
            world.run("coordinator", &salvage).expect(0).says("left out: log after");
            world.run("coordinator", &["restore", "saved", "--data-dir", "again"]).expect(0).says("left out");
            let again = world.coordinator(&world.path("again"), ANY);
            assert_eq!(jobs(&world, &again), 1, "what was left");
        }
    }
}

#[test]
fn a_restore_that_was_killed_is_recognised_and_done_again() {
    let world = World::new();
    let cluster = world.coordinator(&world.path("cluster"), ANY);
    submit(&world, &cluster, "one");
    world.run("coordinator", &["backup", "--data-dir", "cluster", "--out", "saved"]).expect(0);
    drop(cluster);
    // Reads the backup twice, and the second time not to the end.
    let pipe = world.path("pipe");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let saved = fs::read(world.path("saved")).unwrap();
    let restoring = world.start("coordinator", &["restore", "pipe", "--data-dir", "restored"]);
    fs::OpenOptions::new().write(true).open(&pipe).unwrap().write_all(&saved).unwrap();
    let mut again = fs::OpenOptions::new().write(true).open(&pipe).unwrap();
    again.write_all(&saved[..saved.len() / 2]).unwrap();
    eventually("it has begun", || world.path("restored/restoring/raft").exists());
    restoring.signal(Signal::SIGKILL);
    restoring.finish();
    drop(again);

    refused(&world, "restored").says("`coordinator restore` was interrupted in restored");
    let start = ["start", "--listen", ANY, "--http", ANY, "--data-dir", "restored"];
    world.run("coordinator", &start).expect(4).says("run it again there");
    fs::write(world.path("restored/mine"), "kept").unwrap();
    world.run("coordinator", &["restore", "saved", "--data-dir", "restored"]).expect(0);
    assert!(!world.path("restored/restoring").exists() && world.path("restored/mine").exists());
    let restored = world.coordinator(&world.path("restored"), ANY);
    assert_eq!(jobs(&world, &restored), 1);
}

/// Spoils a byte of a job's work in a sorted file of the history. Rows come to be there when a coordinator is started again.
fn spoil(data_dir: &Path, content: &str) {
    let mut spoilt = 0;
    for file in files(&data_dir.join("raft"), "sst") {
        let mut bytes = fs::read(&file).unwrap();
        let has = |wanted: &[u8]| bytes.windows(wanted.len()).position(|window| window == wanted);
        // The raft log has the work as well, in files of another family.
        if let (Some(at), Some(_)) = (has(content.as_bytes()), has(b"nameworks")) {
            bytes[at] ^= 1;
            fs::write(&file, bytes).unwrap();
            spoilt += 1;
        }
    }
    assert!(spoilt > 0, "{content} is in no sorted file of {}", data_dir.display());
}

/// Starts a coordinator so often that RocksDB merges the files of its history, and by that comes upon what is damaged in them. (Until the
/// log is cut, a start writes its rows anew, so that nobody would read the damaged ones.)
const STARTS: usize = 6;

/// The body of an answer.
fn get(cluster: &Standing, path: &str) -> String {
    let answer = http::get(&cluster.endpoint.http, path).unwrap();
    answer.split_once("\r\n\r\n").unwrap().1.to_owned()
}

/// Asks this coordinator, and no other one, for what is in its own history.
fn stale(cluster: &Standing, login: &Path, job: u64) -> Result<Reply, String> {
    let mut client = Client::new(&login.join("client"), vec![cluster.endpoint.quic.clone()]);
    client.patience = Duration::from_millis(1);
    client.stale(Request::Job(JobId(job)))
}

/// The work of a job that is large enough to have blocks of its own.
fn argument(mark: &str) -> String {
    format!("{mark} ").repeat(1_000)
}

#[test]
fn one_bad_block_in_the_history_of_a_lone_coordinator_costs_its_rows_and_nothing_else() {
    let world = World::new();
    let data = world.path("cluster");
    let cluster = world.coordinator(&data, ANY);
    for mark in ["first", "second", "third"] {
        submit(&world, &cluster, &argument(mark));
    }
    drop(cluster);
    drop(world.restart_coordinator(&data));
    spoil(&data, "second second second");
    for _ in 0..STARTS {
        let cluster = world.restart_coordinator(&data);
        submit(&world, &cluster, "small");
    }
    let mut cluster = world.restart_coordinator(&data);
    eventually("it is told", || {
        submit(&world, &cluster, "small");
        get(&cluster, "/healthz").contains("degraded: rows of works cannot be read")
    });
    assert!(get(&cluster, "/metrics").contains("\nfleet_history_damaged_tables 1\n"));
    cluster.process.until_it_says("the history is damaged: rows of works cannot be read");
    submit(&world, &cluster, "last");
    cluster.process.must_live();
    assert_eq!(cluster.process.complaints().matches("the history is damaged").count(), 1, "told once");
    let recorded = jobs(&world, &cluster);

    let backup = ["backup", "--data-dir", "cluster", "--out", "saved"];
    world.run("coordinator", &backup).expect(4).says("give --salvage");
    let salvage = [&backup[..], &["--salvage"]].concat();
    world.run("coordinator", &salvage).expect(0).says("damaged and left out: works between 1 and 3");
    drop(cluster);
    let restore = ["restore", "saved", "--data-dir", "restored"];
    world.run("coordinator", &restore).expect(0).says("damaged and left out: works between 1 and 3");
    let restored = world.coordinator(&world.path("restored"), ANY);
    assert_eq!(jobs(&world, &restored), recorded);
    for job in [1, 3, 4] {
        assert!(matches!(stale(&restored, &world.path("restored"), job), Ok(Reply::Job(_))), "{job}");
    }
    assert_eq!(get(&restored, "/healthz").trim(), "ok");
}

#[test]
fn a_bad_block_is_mended_from_another_coordinator_and_a_newcomer_gets_all() {
    let world = World::new();
    let mut all = world.three_coordinators();
    for mark in ["first", "second", "third"] {
        submit(&world, &all[0], &argument(mark));
    }
    let dirs: Vec<PathBuf> = all.iter().map(|standing| standing.data_dir.clone()).collect();
    let login = dirs[0].clone();
    let has_all = |one: &Standing| matches!(stale(one, &login, 3), Ok(Reply::Job(_)));
    eventually("all of them have all jobs", || all.iter().all(has_all));
    drop(std::mem::take(&mut all));
    let restarted = || {
        let all: Vec<Standing> = dirs.iter().map(|dir| world.restart_coordinator(dir)).collect();
        eventually("somebody leads", || {
            all.iter().any(|standing| get(standing, "/metrics").contains("\nfleet_raft_is_leader 1\n"))
        });
        all
    };
    drop(restarted());
    // Each misses another row, so each needs the others.
    for (dir, mark) in dirs.iter().zip(["first first first", "second second second", "third third third"]) {
        spoil(dir, mark);
    }
    for start in 0.. {
        all = restarted();
        submit(&world, &all[0], "small");
        if start >= STARTS {
            break;
        }
        all.clear();
    }
    // Whole backups, which read every row.
    let is_whole = |dir: &PathBuf| {
        let args = ["backup", "--data-dir", dir.to_str().unwrap(), "--out", "saved"];
        world.run("coordinator", &args).code() == 0
    };
    let mut submits = 0..300;
    eventually("all of them are mended", || {
        // What is written leads to compactions, which find what is damaged.
        submits.next().into_iter().for_each(|_| submit(&world, &all[0], "small"));
        all.iter().all(|standing| get(standing, "/healthz").trim() == "ok") && dirs.iter().all(is_whole)
    });
    let fourth = world.join_coordinator(&all[0], &world.path("coordinator-4"), &[]);
    eventually("the newcomer votes", || {
        let views = world.coordinators(&all[0]);
        views.iter().any(|view| view["replica"] == "replica-4" && view["voter"] == true)
    });
    for job in 1..=3 {
        eventually("the newcomer has it", || matches!(stale(&fourth, &login, job), Ok(Reply::Job(_))));
    }
    all.iter_mut().for_each(|standing| standing.process.must_live());
}

#[test]
fn a_backup_of_a_coordinator_that_is_behind_is_refused() {
    let world = World::new();
    let mut all = world.three_coordinators();
    submit(&world, &all[0], "one");
    let behind = all.remove(2);
    let data = behind.data_dir.clone();
    eventually("it has its login", || data.join("client/identity.json").exists());
    drop(behind);
    submit(&world, &all[0], "two");
    let backup = ["backup", "--data-dir", "coordinator-3", "--out", "saved"];
    let said = world.run("coordinator", &backup).expect(4).says("this coordinator is behind by");
    assert!(said.contains("from another coordinator") && !world.path("saved").exists(), "{said}");
    let allowed = [&backup[..], &["--allow-behind"]].concat();
    world.run("coordinator", &allowed).expect(0).says("warning: this coordinator is behind");
    // Running, it catches up, and its backup is whole.
    let third = world.restart_coordinator(&data);
    let said = world.run("coordinator", &backup).expect(0).all();
    assert!(!said.contains("warning"), "{said}");
    drop((all, third));
    world.run("coordinator", &backup).expect(0).says("is not known");
}
