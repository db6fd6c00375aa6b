//! What jobs are called and what they say is shown on terminals, and never obeyed by them.

#![allow(clippy::unwrap_used)] // in a test an unwrap is an assertion

use fleet_tests::{Finished, Running, World, eventually};
use std::os::unix::fs::symlink;

/// Turns the direction of writing. Control characters are taken out of names.
const NASTY: &str = "na\u{202e}me";
/// Sets the title and moves the cursor; the second by the one-character form of the same introducer.
const SCRIPT: &str = r#"printf 'before\033]0;owned\007after\302\233A\n'; exit 3"#;

/// Whether a terminal would do anything but show this.
fn acts(text: &str) -> bool {
    text.chars().any(|c| c == '\u{202e}' || c.is_control() && !"\r\n\t".contains(c))
}

#[test]
fn escapes_of_a_job_reach_no_terminal_and_every_file() {
    let world = World::new();
    let cluster = world.coordinator(&world.path("cluster"), "127.0.0.1:0");
    let _worker = world.worker(&cluster, 1);
    symlink("/bin/sh", world.path(NASTY)).unwrap();
    let program = world.path(NASTY).display().to_string();
    let at = ["--cluster", cluster.cluster()];
    world
        .run("fleet", &[&["submit", "-n", "1"], &at[..], &["--", &program, "-c", SCRIPT]].concat())
        .expect(0);
    let run = |args: &[&str]| world.run("fleet", &[args, &at].concat());
    eventually("the job has ended", || run(&["jobs"]).stdout.concat().contains("failed"));
    // As somebody at a terminal sees it.
    let seen = |args: &[&str]| -> Finished {
        let mut command = world.enter(std::process::Command::new("python3"));
        command.args(["-c", "import pty, sys; sys.exit(pty.spawn(sys.argv[1:]) >> 8)"]);
        command.arg(fleet_tests::program("fleet")).args(args).args(at);
        Running::start(command).finish().expect(0)
    };
    let full = ["logs", "job-1", "--full"];
    for args in
        [&["jobs"][..], &["status"], &["status", "job-1"], &["events"], &["top", "--once"], &["logs"], &full]
    {
        let shown = seen(args).stdout.join("\n");
        assert!(!acts(&shown), "{args:?} shows {shown:?}");
    }
    assert!(seen(&["jobs"]).stdout.concat().contains(r"na\u{202e}me"), "it is shown all the same");
    assert!(seen(&["status", "job-1"]).stdout.concat().contains(r"before\x1b]0;owned\x07after\u{9b}A"));
    assert!(seen(&["logs", "job-1"]).stdout.concat().contains(r"before\x1b]0;owned\x07after\u{9b}A"));
    assert!(!acts(&seen(&["jobs", "--json"]).stdout.join("\n")));
    // A file gets what the job has written, a table stays a table.
    assert!(run(&["logs", "job-1"]).stdout.concat().contains("before\u{1b}]0;owned\u{7}after\u{9b}A"));
    assert!(
        run(&["logs", "job-1", "--full"]).stdout.concat().contains("before\u{1b}]0;owned\u{7}after\u{9b}A")
    );
    assert!(!acts(&run(&["jobs"]).stdout.join("\n")));
    let json = run(&["jobs", "--json"]).stdout.concat();
    let jobs: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(jobs[0]["name"], NASTY);
    // Errors name things too.
    let error = world.run("fleet", &["jobs", "--cluster", NASTY]).expect(2);
    assert!(!acts(&error.stderr) && error.stderr.contains(r"na\u{202e}me"), "{}", error.all());
}
