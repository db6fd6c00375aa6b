//! The real `fleet` where no cluster is needed: what it prints, what it refuses, and with which exit code.

#![allow(clippy::unwrap_used)] // helpers of tests

use serde_json::Value;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use tempfile::TempDir;

const FLEET: &str = env!("CARGO_BIN_EXE_fleet");

/// A directory of its own for state and job files, so that no cluster of this machine is found.
struct Place {
    dir: TempDir,
}

impl Place {
    fn new() -> Place {
        Place { dir: tempfile::tempdir().unwrap() }
    }

    fn file(&self, name: &str, text: &str) {
        std::fs::write(self.dir.path().join(name), text).unwrap();
    }

    fn command(&self, program: &Path, args: &[&str]) -> Command {
        let mut command = Command::new(program);
        command.args(args).current_dir(self.dir.path());
        command.env("XDG_STATE_HOME", self.dir.path().join("state"));
        command.env_remove("FLEET_CLUSTER").env_remove("FLEET_TOKEN").env_remove("FLEET_LOG");
        command
    }

    fn run(&self, args: &[&str]) -> Output {
        self.command(Path::new(FLEET), args).output().unwrap()
    }

    /// The exit code and the one line on stderr.
    fn refusal(&self, args: &[&str]) -> (i32, String) {
        let output = self.run(args);
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(stderr.lines().count(), 1, "{stderr}");
        (output.status.code().unwrap(), stderr.trim_end().to_owned())
    }
}

fn stdout(output: &Output) -> &str {
    std::str::from_utf8(&output.stdout).unwrap()
}

#[test]
fn config_prints_a_job_file_that_means_the_same() {
    let place = Place::new();
    place.file("job.yaml", "num_epochs: 3\ndata: {path: text.txt}\n");
    let toml = place.run(&["config", "job.yaml", "--set", "lr=2e-3"]);
    assert!(toml.status.success());
    assert!(
        stdout(&toml).contains("epochs = 3\n") && stdout(&toml).contains("learning_rate = 0.002\n"),
        "{}",
        stdout(&toml)
    );
    place.file("job.toml", stdout(&toml));
    assert_eq!(stdout(&place.run(&["config", "job.toml"])), stdout(&toml));

    let json = place.run(&["config", "job.yaml", "--json"]);
    let value: Value = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!(value["epochs"], 3);
    assert_eq!(stdout(&json).lines().count(), 1);
}

#[test]
fn bad_input_is_one_line_and_exit_code_2() {
    let place = Place::new();
    place.file("bad.toml", "learnig_rate = 1\n");
    place.file("two.toml", "devices = 2\n[data]\npath = \"x\"\n");
    let unknown = "error: bad.toml:1: unknown key `learnig_rate`; did you mean `learning_rate`?";
    for args in [&["launch", "bad.toml"], &["config", "bad.toml"], &["submit", "bad.toml"]] {
        assert_eq!(place.refusal(args), (2, unknown.to_owned()));
    }
    let cases: [(&[&str], &str); 6] = [
        (
            &["launch", "no.toml"],
            "error: cannot read the job file `no.toml`: No such file or directory (os error 2)",
        ),
        (
            &["launch", "-n", "4", "two.toml"],
            "error: `devices` asks for 2 ranks and -n for 4; leave one of them out",
        ),
        (&["launch", "-n", "65", "--", "true"], "error: 65 ranks: one machine runs 1 to 64"),
        (
            &["generate", "--model", "none", "--prompt", "x"],
            "error: --model none: there is no such model directory; check the path (a model of the Hugging Face hub is fetched before: `hf download NAME --local-dir DIR`)",
        ),
        (
            &["login", "127.0.0.1:7", "--token", "fleet_x"],
            "error: the token in --token is damaged: it does not have the form fleet_ROLE_ID_SECRET_FINGERPRINT; copy it whole, it begins with `fleet_`",
        ),
        (
            &["nodes", "--cluster", "nowhere"],
            "error: no cluster `nowhere` is known; give a coordinator's data directory, HOST:PORT, or a name given to `fleet login`",
        ),
    ];
    for (args, wanted) in cases {
        assert_eq!(place.refusal(args), (2, wanted.to_owned()), "{args:?}");
    }
    assert_eq!(place.run(&["launch"]).status.code(), Some(2));
    assert_eq!(place.run(&["launch", "two.toml", "--", "true"]).status.code(), Some(2));
}

#[test]
fn with_json_even_a_refused_launch_ends_with_a_summary() {
    let place = Place::new();
    place.file("bad.toml", "epochs = 0\n");
    let output = place.run(&["launch", "--json", "bad.toml"]);
    assert_eq!(output.status.code(), Some(2));
    let summary: Value = serde_json::from_str(stdout(&output).lines().last().unwrap()).unwrap();
    assert_eq!(
        (&summary["event"], &summary["status"], &summary["job"]),
        (&"summary".into(), &"failed".into(), &Value::Null)
    );
    assert_eq!(
        summary["error"]["message"],
        "bad.toml:1: `epochs` is 0; a whole number from 1 to 1000000 is wanted"
    );
    assert_eq!(summary["error"]["exit_code"], 2);
}

#[test]
fn without_a_cluster_the_exit_code_is_3() {
    let place = Place::new();
    let commands: [&[&str]; 6] =
        [&["status"], &["jobs"], &["nodes"], &["logs"], &["checkpoints", "ls"], &["top", "--once"]];
    for command in commands {
        let (code, line) = place.refusal(command);
        assert_eq!(code, 3);
        assert!(line.starts_with("error: no `fleet launch` runs on this machine"), "{line}");
    }
    let (code, line) = place.refusal(&["jobs", "--cluster", "./empty"]);
    assert_eq!(code, 3);
    assert!(line.contains("./empty has no endpoint.json"), "{line}");
}

#[test]
fn a_directory_that_is_called_like_a_login_does_not_take_its_place() {
    let place = Place::new();
    for dir in ["head", "data", "state/fleet/clusters/head"] {
        fleet_common::files::create_dir(&place.dir.path().join(dir)).unwrap();
    }
    place.file("state/fleet/clusters/head/cluster.json", "{\"addresses\": [\"127.0.0.1:1\"]}");
    let (_, line) = place.refusal(&["jobs", "--cluster", "head"]);
    assert!(line.contains("fleet/clusters/head has no client credential"), "{line}");
    for dir in ["./head", "data"] {
        let (code, line) = place.refusal(&["jobs", "--cluster", dir]);
        assert!(code == 3 && line.contains(&format!("{dir} has no endpoint.json")), "{line}");
    }
}

#[test]
fn a_missing_program_is_named_and_the_exit_code_is_4() {
    let place = Place::new();
    let alone = place.dir.path().join("fleet");
    std::fs::copy(FLEET, &alone).unwrap();
    place.file("job.toml", "[data]\npath = \"x\"\n");
    let output = place.command(&alone, &["launch", "job.toml"]).output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(4));
    assert!(stderr.starts_with("error: `coordinator` is not beside "), "{stderr}");
    assert!(!place.dir.path().join("state/fleet/launches").exists(), "nothing was started");
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let place = Place::new();
    place.file("job.toml", "[data]\npath = \"x\"\n");
    let mut child = place
        .command(Path::new(FLEET), &["config", "job.toml"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), output.stderr.len()), (Some(0), 0));
}
