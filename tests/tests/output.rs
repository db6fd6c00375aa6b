//! What a program prints, under `fleet launch` and on a cluster: nothing of it is cut, lost, or held back.

#![allow(clippy::unwrap_used)] // in a test an unwrap is an assertion

use fleet_tests::{Finished, World, eventually};
use std::fs::{self, File};
use std::io::Read;
use std::process::{Command, Output, Stdio};

/// A progress bar of more than 4 KiB that an error writes over, a line of 5,014 bytes, and a code of its own.
const BAR: &str = r#"n=0; while [ $n -lt 150 ]; do n=$((n + 1)); printf '\r%4d%%|##########          | %d/150 [00:01<00:00]' $n $n >&2; done
printf '\rFATAL: out of disk\n' >&2
printf '%05000d accuracy 0.97\n' 0
exit 5"#;

/// Runs `fleet launch -n RANKS -- sh -c SCRIPT` with its output as bytes.
fn launch(world: &World, ranks: &str, script: &str) -> Output {
    let mut command = world.command("fleet");
    command.args(["launch", "-n", ranks, "--", "sh", "-c", script]).output().unwrap()
}

fn line_of(count: usize) -> String {
    format!("{}accuracy 0.97", "0".repeat(count - 13))
}

#[test]
fn what_a_progress_bar_hides_is_shown_and_reported() {
    let world = World::new();
    let done = launch(&world, "1", BAR);
    let (stdout, stderr) = (String::from_utf8(done.stdout).unwrap(), String::from_utf8(done.stderr).unwrap());
    assert_eq!(done.status.code(), Some(5), "{stderr}");
    assert_eq!(stdout, format!("{} accuracy 0.97\n", "0".repeat(5000)));
    assert!(stderr.contains("\r 150%|") && stderr.contains("\rFATAL: out of disk\n"), "{stderr}");
    assert!(stderr.contains("  | FATAL: out of disk\n"), "the report has it, too: {stderr}");
    let done = world.run("fleet", &["launch", "-n", "1", "--json", "--", "sh", "-c", BAR]).expect(5);
    let logs = done.events("log");
    let said: Vec<&str> = logs.iter().filter_map(|log| log["line"].as_str()).collect();
    assert!(said.contains(&"FATAL: out of disk") && said.len() == 2, "{said:?}");
    assert!(said.iter().any(|line| line.len() == 5014), "{said:?}");
    assert!(done.summary()["error"]["last_lines"].to_string().contains("FATAL: out of disk"));
    let last_events: Vec<_> = done.json().iter().rev().take(2).map(|line| line["event"].clone()).collect();
    assert_eq!(last_events, ["summary", "finished"], "all output comes before");
}

#[test]
fn one_rank_is_heard_byte_for_byte() {
    let world = World::new();
    let mut bytes: Vec<u8> = (0..=255).cycle().take(3_000_000).collect();
    bytes.extend(vec![b'x'; 1_500_000]); // a long line, and no newline at its end
    world.write("bytes", &bytes);
    let done = launch(&world, "1", "cat bytes; cat bytes >&2");
    assert!(done.status.success());
    assert!(done.stdout == bytes, "stdout: {} bytes of {}", done.stdout.len(), bytes.len());
    assert!(done.stderr == bytes, "stderr: {} bytes of {}", done.stderr.len(), bytes.len());
}

#[test]
fn a_talkative_program_waits_for_who_reads_and_loses_nothing() {
    let world = World::new();
    let done = launch(&world, "1", "i=0; while [ $i -lt 20 ]; do i=$((i + 1)); seq 100000; done");
    assert!(done.status.success());
    let expected: String = (1..=100_000).map(|n| format!("{n}\n")).collect::<String>().repeat(20);
    assert!(done.stdout == expected.as_bytes(), "{} bytes of {}", done.stdout.len(), expected.len());
}

/// Larger than a cluster's own files, smaller than what a worker keeps of a rank's output in one.
const FILE_LIMIT: &str = "ulimit -f 8192"; // blocks of 512 bytes

#[test]
fn a_limit_of_files_costs_the_copy_of_an_output_and_ends_a_program_as_in_a_shell() {
    let world = World::new();
    let fleet = fleet_tests::program("fleet").display().to_string();
    let limited = |script: &str| {
        let launch = format!("{FILE_LIMIT}; exec {fleet} launch -n 1 -- sh -c '{script}'");
        world.enter(Command::new("sh")).args(["-c", &launch]).output().unwrap()
    };
    let done = limited("seq 1000000");
    let expected: String = (1..=1_000_000).map(|n| format!("{n}\n")).collect();
    assert!(
        done.stdout == expected.as_bytes(),
        "{} bytes of {}: {}",
        done.stdout.len(),
        expected.len(),
        String::from_utf8_lossy(&done.stderr)
    );
    assert_eq!(done.status.code(), Some(0));
    let done = limited("exec dd if=/dev/zero of=large bs=65536 count=100");
    assert_eq!(done.status.code(), Some(128 + 25), "{}", String::from_utf8_lossy(&done.stderr));
    world.is_empty_soon();
}

#[test]
fn stdout_and_stderr_that_end_in_one_place_stay_in_order() {
    let world = World::new();
    let path = world.path("both");
    let (both, again) = (File::create(&path).unwrap(), File::options().append(true).open(&path).unwrap());
    let script = "i=0; while [ $i -lt 300 ]; do i=$((i + 1)); echo out $i; echo err $i >&2; done";
    let mut command = world.command("fleet");
    command
        .args(["launch", "-n", "1", "--", "sh", "-c", script])
        .stdout(again)
        .stderr(both.try_clone().unwrap());
    assert!(command.status().unwrap().success());
    let expected: String = (1..=300).map(|n| format!("out {n}\nerr {n}\n")).collect();
    assert_eq!(fs::read_to_string(&path).unwrap(), expected);
}

#[test]
fn several_ranks_are_told_apart_line_by_line() {
    let world = World::new();
    let done = launch(&world, "3", "seq 1000; printf 'the end of %s' $RANK");
    assert!(done.status.success());
    let stdout = String::from_utf8(done.stdout).unwrap();
    let mut lines: Vec<&str> = stdout.lines().collect();
    for rank in 0..3 {
        let begin = format!("[rank {rank}] ");
        let said: Vec<&str> = lines.iter().filter_map(|line| line.strip_prefix(&begin)).collect();
        assert_eq!(said.len(), 1001, "rank {rank}");
        assert!(said[..1000].iter().enumerate().all(|(n, line)| *line == (n + 1).to_string()));
        assert_eq!(said[1000], format!("the end of {rank}"));
        lines.retain(|line| !line.starts_with(&begin));
    }
    assert_eq!(lines, Vec::<&str>::new());
}

#[test]
fn a_reader_that_goes_away_ends_the_printing_and_not_the_program() {
    let world = World::new();
    let fleet = fleet_tests::program("fleet").display().to_string();
    let script = format!("{fleet} launch -n 1 -- sh -c 'seq 1000000; echo done > done' | head -n 1");
    let mut command = world.enter(Command::new("sh"));
    let done = command.args(["-c", &script]).output().unwrap();
    assert_eq!(done.stdout, b"1\n");
    assert_eq!(fs::read_to_string(world.path("done")).unwrap(), "done\n");
    world.is_empty_soon();
}

#[test]
fn a_program_whose_reader_goes_away_ends_as_in_a_shell() {
    let world = World::new();
    let fleet = fleet_tests::program("fleet").display().to_string();
    for ranks in ["1", "2"] {
        let script = format!("{{ {fleet} launch -n {ranks} -- yes; echo $? > code; }} | head -n 1");
        let mut command = world.enter(Command::new("sh"));
        let done = command.args(["-c", &script]).output().unwrap();
        assert_eq!(String::from_utf8_lossy(&done.stderr), "");
        assert_eq!(fs::read_to_string(world.path("code")).unwrap(), "141\n");
        world.is_empty_soon();
    }
}

#[test]
fn a_program_whose_errors_nobody_reads_any_more_ends_as_in_a_shell() {
    let world = World::new();
    let mut command = world.command("fleet");
    let script = "while echo more >&2; do sleep 0.01; done; echo on > on";
    command
        .args(["launch", "-n", "1", "--", "sh", "-c", script])
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    let mut launch = command.spawn().unwrap();
    let mut begin = [0; 5];
    launch.stderr.take().unwrap().read_exact(&mut begin).unwrap(); // closed with that
    assert_eq!(&begin, b"more\n");
    let mut code = None;
    eventually("it ends", || {
        code = launch.try_wait().unwrap();
        code.is_some()
    });
    assert_eq!(code.unwrap().code(), Some(128 + 13));
    assert!(!world.path("on").exists());
    world.is_empty_soon();
}

#[test]
fn who_follows_a_silent_job_ends_when_nobody_reads() {
    let world = World::new();
    let cluster = world.coordinator(&world.path("cluster"), "127.0.0.1:0");
    let _worker = world.worker(&cluster, 1);
    let at = cluster.cluster();
    let submit = ["submit", "-n", "1", "--cluster", at, "--", "sh", "-c", "echo one; exec sleep 1000"];
    world.run("fleet", &submit).expect(0);
    let fleet = fleet_tests::program("fleet").display().to_string();
    let script = format!("{fleet} logs job-1 --follow --cluster {at} | head -n 1");
    let done = world.enter(Command::new("sh")).args(["-c", &script]).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&done.stdout), "[rank 0] one\n");
    let jobs = world.run("fleet", &["jobs", "--cluster", at]).expect(0);
    assert!(jobs.stdout.concat().contains("running"), "{}", jobs.all());
}

#[test]
fn a_cluster_shows_long_lines_whole_and_what_a_bar_hides() {
    let world = World::new();
    let cluster = world.coordinator(&world.path("cluster"), "127.0.0.1:0");
    let _worker = world.worker(&cluster, 1);
    let at = ["--cluster", cluster.cluster()];
    let fleet = |args: &[&str]| -> Finished { world.run("fleet", &[args, &at].concat()) };
    world.write("long", format!("{}\n{}\n", line_of(1_000_000), line_of(5_014)));
    let script = format!("cat long; {BAR}");
    let submit = [&["submit", "-n", "1"], &at[..], &["--", "sh", "-c", &script]].concat();
    world.run("fleet", &submit).expect(0);
    eventually("the job has ended", || fleet(&["jobs"]).stdout.concat().contains("failed"));
    let logs = fleet(&["logs", "job-1"]).expect(0).stdout;
    for line in [line_of(1_000_000), line_of(5_014), format!("{} accuracy 0.97", "0".repeat(5000))] {
        assert!(
            logs.iter().any(|said| *said == format!("[rank 0] {line}")),
            "no line of {} bytes",
            line.len()
        );
    }
    assert!(
        logs.iter().any(|said| said.ends_with("FATAL: out of disk") && said.len() < 60),
        "{:?}",
        logs.last()
    );
    let status = fleet(&["status", "job-1"]).expect(0);
    assert!(status.stdout.iter().any(|line| line == "  | FATAL: out of disk"), "{}", status.all());
}
