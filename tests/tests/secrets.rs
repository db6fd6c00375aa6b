//! What docs/security.md says of files and environments, by the real programs: nobody else on the machine can read what fleet keeps, and
//! what a user did not mean to pass on goes nowhere.

#![allow(clippy::unwrap_used)] // in a test an unwrap is an assertion

use fleet_tests::{Finished, Running, Standing, World, eventually, program};
use nix::sys::signal::Signal;
use serde_json::Value;
use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

const ANY: &str = "127.0.0.1:0";
/// Users that have nothing here.
const NOBODY: &str = "65534";
const STRANGER: &str = "54321";

/// Everything below a directory, itself included, and nothing behind links.
fn all_below(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let below = entries.flat_map(|entry| match entry.file_type() {
        Ok(kind) if kind.is_dir() => all_below(&entry.path()),
        _ => vec![entry.path()],
    });
    std::iter::once(dir.to_owned()).chain(below).collect()
}

fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).unwrap().permissions().mode() & 0o777
}

/// Those that others could open, with their modes.
fn open_to_others(dirs: &[PathBuf]) -> Vec<String> {
    let found = dirs.iter().flat_map(|dir| all_below(dir));
    let open = found.filter_map(|path| {
        let mode = fs::symlink_metadata(&path).ok()?.permissions().mode();
        (mode & 0o077 != 0).then(|| format!("{} {:o}", path.display(), mode & 0o7777))
    });
    open.collect()
}

/// Files below these directories with this text in them.
fn with_text(dirs: &[PathBuf], text: &str) -> Vec<PathBuf> {
    let has = |path: &PathBuf| {
        let bytes = fs::read(path).unwrap_or_default();
        bytes.windows(text.len()).any(|window| window == text.as_bytes())
    };
    dirs.iter().flat_map(|dir| all_below(dir)).filter(|path| path.is_file() && has(path)).collect()
}

/// The same command with the umask that most users have.
fn with_common_umask(world: &World, name: &str, args: &[&str]) -> Command {
    let mut command = world.enter(Command::new("sh"));
    command.args(["-c", "umask 022; exec \"$@\"", "sh"]).arg(program(name)).args(args);
    command
}

fn fleet(world: &World, cluster: &Standing, args: &[&str]) -> Finished {
    let mut command = world.command("fleet");
    command.args(args).env("FLEET_CLUSTER", cluster.cluster());
    Running::start(command).finish()
}

fn ask(world: &World, cluster: &Standing, args: &[&str]) -> Value {
    let done = fleet(world, cluster, &[args, &["--json"]].concat()).expect(0);
    serde_json::from_str(&done.stdout.concat()).unwrap_or_else(|error| panic!("{error}: {}", done.all()))
}

fn http(cluster: &Standing, path: &str) -> String {
    let mut stream = TcpStream::connect(&cluster.endpoint.http).unwrap();
    let host = &cluster.endpoint.http;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

/// Whether commands can be run as somebody else here; prints why not.
fn can_be_others() -> bool {
    let done = Command::new("setpriv").args(["--reuid", NOBODY, "--clear-groups", "true"]).output();
    let can = done.is_ok_and(|done| done.status.success());
    if !can {
        eprintln!("skipped: only root can try what another user could do");
    }
    can
}

#[test]
fn at_no_time_is_a_file_open_to_others_and_what_a_job_writes_is_as_its_user_wants_it() {
    let world = World::new();
    let dirs: Vec<PathBuf> =
        ["cluster", "node", "home/.local/state/fleet", "launched"].map(|dir| world.path(dir)).into();
    let done = AtomicBool::new(false);
    let seen = std::thread::scope(|scope| {
        let watcher = scope.spawn(|| {
            let mut seen = Vec::new();
            while !done.load(Ordering::Relaxed) {
                seen.extend(open_to_others(&dirs));
            }
            seen.extend(open_to_others(&dirs));
            seen
        });
        let finished = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| use_it_all(&world)));
        done.store(true, Ordering::Relaxed);
        let seen = watcher.join().unwrap();
        finished.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        seen
    });
    assert_eq!(seen, Vec::<String>::new());
    assert!(dirs.iter().all(|dir| all_below(dir).len() > 3), "there was something to look at");
    assert_eq!((mode(&world.path("result")), mode(&world.path("made"))), (0o644, 0o755));
    assert_eq!(mode(&world.path("out/checkpoints")), 0o755);
}

/// A coordinator, a worker, a login, jobs, a backup and a launch.
fn use_it_all(world: &World) {
    let start = with_common_umask(
        world,
        "coordinator",
        &["start", "--data-dir", "cluster", "--listen", ANY, "--http", ANY],
    );
    let cluster = world.standing(Running::start(start), &world.path("cluster"));
    let token = |name: &str| cluster.data_dir.join("tokens").join(name).display().to_string();
    let at = &cluster.endpoint.quic;
    let mut worker = Running::start(with_common_umask(
        world,
        "worker",
        &[
            "join",
            at,
            "--device",
            "cpu",
            "--slots",
            "1",
            "--token-file",
            &token("worker.token"),
            "--data-dir",
            "node",
        ],
    ));
    worker.until("registration", |line| line["node"].is_string());
    let run = |args: &[&str]| Running::start(with_common_umask(world, "fleet", args)).finish().expect(0);
    run(&["login", at, "--token-file", &token("client.token"), "--name", "ann"]);
    let script = "mkdir made && echo x > result";
    run(&["submit", "--wait", "--cluster", "ann", "--env", "A=b", "--", "sh", "-c", script]);
    run(&["nodes", "--cluster", cluster.cluster()]);
    let job = world.job(&fleet_tests::TinyJob::default()).display().to_string();
    run(&["launch", "-n", "1", "--data-dir", "launched", &job]);
}

#[test]
fn what_an_older_version_left_open_is_closed_and_told() {
    let world = World::new();
    let cluster = world.coordinator(&world.path("cluster"), ANY);
    let worker = world.worker(&cluster, 1);
    let token = cluster.data_dir.join("tokens/client.token").display().to_string();
    let login = ["login", &cluster.endpoint.quic, "--token-file", &token, "--name", "ann"];
    world.run("fleet", &login).expect(0);
    worker.signal(Signal::SIGKILL);
    let (quic, data) = (cluster.endpoint.quic.clone(), cluster.data_dir.clone());
    drop(cluster);
    let dirs: Vec<PathBuf> = ["cluster", "node", "home/.local/state/fleet"].map(|dir| world.path(dir)).into();
    for path in dirs.iter().flat_map(|dir| all_below(dir)) {
        fs::set_permissions(&path, fs::Permissions::from_mode(mode(&path) | 0o055)).unwrap();
    }
    let mut command = world.command("coordinator");
    command.args(["start", "--expect-existing", "--data-dir", "cluster"]);
    let cluster = world.standing(Running::start(command), &data);
    assert_eq!(cluster.endpoint.quic, quic);
    cluster.process.until_it_says("were open to other users of this machine; closed now");
    let mut command = world.command("worker");
    command.args(["join", &quic, "--device", "cpu", "--slots", "1", "--data-dir", "node"]);
    let mut worker = Running::start(command);
    worker.until("registration", |line| line["node"].is_string());
    worker.until_it_says("were open to other users of this machine; closed now");
    let asked = ["nodes", "--cluster", "ann"];
    world.run("fleet", &asked).expect(0).says("were open to other users of this machine; closed now");
    assert_eq!(open_to_others(&dirs), Vec::<String>::new());
    assert_eq!(world.run("fleet", &asked).expect(0).stderr, "");
}

#[test]
fn another_user_can_neither_hold_a_lock_nor_read_nor_own_a_data_directory() {
    if !can_be_others() {
        return;
    }
    let world = World::new();
    // The way there is open; what fleet made is not.
    fs::set_permissions(world.path(""), fs::Permissions::from_mode(0o755)).unwrap();
    let cluster = world.coordinator(&world.path("cluster"), ANY);
    let _worker = world.worker(&cluster, 1);
    let submit = ["submit", "-n", "1", "--queue", "--", "true"];
    fleet(&world, &cluster, &submit).expect(0);
    let as_nobody = |command: &[&str]| {
        let mut all = Command::new("setpriv");
        all.args(["--reuid", NOBODY, "--clear-groups"]).args(command);
        all.output().unwrap()
    };
    let files = ["cluster/lock", "node/lock", "cluster/tokens/client.token"];
    for file in files.map(|file| world.path(file).display().to_string()) {
        assert!(Path::new(&file).exists(), "{file}");
        assert!(!as_nobody(&["cat", &file]).status.success(), "{file}");
        assert!(!as_nobody(&["flock", "-n", &file, "true"]).status.success(), "{file}");
    }
    let foreign = world.path("foreign");
    fs::create_dir(&foreign).unwrap();
    std::os::unix::fs::chown(&foreign, Some(65_534), None).unwrap();
    for (name, args) in [
        ("coordinator", ["start", "--listen", ANY, "--http", ANY, "--data-dir", "foreign"].as_slice()),
        ("worker", &["join", &cluster.endpoint.quic, "--data-dir", "foreign"]),
    ] {
        let said = world.run(name, args).expect(4).says("error: ");
        assert!(said.contains("foreign belongs to uid 65534, and this runs as uid 0"), "{said}");
    }
    assert_eq!(all_below(&foreign).len(), 1, "nothing was begun");
}

#[test]
fn a_submitted_program_gets_what_was_given_and_nothing_else_and_no_value_is_kept_or_shown() {
    let world = World::new();
    let cluster = world.coordinator(&world.path("cluster"), ANY);
    let file = world.write("secrets.env", "# of the job\nFROM_FILE=in-the-file-5521\n");
    let submit = |queue: &[&str], script: &str| {
        let mut command = world.command("fleet");
        command.env("FLEET_CLUSTER", cluster.cluster());
        command
            .env("AWS_SECRET_ACCESS_KEY", "not-meant-8841")
            .env("FROM_HERE", "from-here-7313")
            .env("LC_TEST", "open");
        command.args(["submit", "-n", "1"]).args(queue);
        command.args(["--env", "FROM_HERE", "--env", "GIVEN=given-1177", "--env-file"]).arg(&file);
        command.args(["--", "sh", "-c", script]);
        Running::start(command).finish().expect(0)
    };
    let right = "[ \"$FROM_HERE $GIVEN $FROM_FILE $LC_TEST\" = 'from-here-7313 given-1177 in-the-file-5521 open' ] \
                 && [ -z \"$AWS_SECRET_ACCESS_KEY\" ] && [ -n \"$HOME\" ] && [ -n \"$PATH\" ] && [ $WORLD_SIZE = 1 ]";
    // The values are in no argument, which are no secrets. It waits, so that the cluster must keep them.
    world.write("right.sh", right);
    submit(&["--queue"], ". ./right.sh");
    let given = ["from-here-7313", "given-1177", "in-the-file-5521"];
    let shown = |cluster: &Standing| {
        let mut shown = String::new();
        for args in [
            &["status", "job-1"][..],
            &["status"],
            &["jobs"],
            &["events"],
            &["runs", "ls"],
            &["secrets", "ls", "job-1"],
        ] {
            shown += &fleet(&world, cluster, args).all();
            shown += &fleet(&world, cluster, &[args, &["--json"]].concat()).all();
        }
        for path in ["cluster", "nodes", "jobs", "jobs/job-1", "runs", "events"] {
            shown += &http(cluster, &format!("/api/v1/{path}"));
        }
        shown + &http(cluster, "/metrics")
    };
    let nothing_of_it = |cluster: &Standing| {
        let shown = shown(cluster);
        for secret in given.iter().chain(&["not-meant-8841"]) {
            assert!(!shown.contains(secret), "{secret}: {shown}");
        }
        assert!(shown.contains("FROM_HERE"), "names are shown: {shown}");
    };
    nothing_of_it(&cluster);
    let token = cluster.data_dir.join("tokens/client.token").display().to_string();
    world.run("fleet", &["login", &cluster.endpoint.quic, "--token-file", &token, "--name", "ann"]).expect(0);
    let refused = world.run("fleet", &["secrets", "ls", "job-1", "--values", "--cluster", "ann"]).expect(2);
    refused.says("may see the names of secrets and not their values");
    let admin = fleet(&world, &cluster, &["secrets", "ls", "job-1", "--values"]).expect(0);
    assert!(given.iter().all(|secret| admin.stdout.concat().contains(secret)), "an operator sees them");
    world.run("coordinator", &["backup", "--data-dir", "cluster", "--out", "saved"]).expect(0);
    let everywhere: Vec<PathBuf> = ["cluster", "node", "home", "saved"].map(|name| world.path(name)).into();
    for secret in given {
        assert!(
            !with_text(&everywhere[..1], secret).is_empty(),
            "the log has it, or this looks in the wrong place"
        );
        assert_eq!(with_text(&everywhere[1..], secret), Vec::<PathBuf>::new(), "{secret}");
    }
    assert_eq!(with_text(&everywhere, "not-meant-8841"), Vec::<PathBuf>::new());

    let worker = world.worker(&cluster, 1);
    let state =
        |cluster: &Standing| ask(&world, cluster, &["status", "job-1"])["state"].as_str().unwrap().to_owned();
    eventually("the job has ended", || ["succeeded", "failed"].contains(&state(&cluster).as_str()));
    assert_eq!(state(&cluster), "succeeded", "{}", fleet(&world, &cluster, &["status", "job-1"]).all());
    nothing_of_it(&cluster);
    for secret in given.iter().chain(&["not-meant-8841"]) {
        assert_eq!(with_text(&everywhere[1..], secret), Vec::<PathBuf>::new(), "{secret}");
    }
    drop((worker, cluster));

    // In the cluster of the backup the job waits for its secrets, and blocks nobody.
    world.run("coordinator", &["restore", "saved", "--data-dir", "restored"]).expect(0);
    let restored = world.coordinator(&world.path("restored"), ANY);
    fs::rename(world.path("node"), world.path("node-before")).unwrap();
    let _worker = world.worker(&restored, 1);
    fleet(&world, &restored, &["submit", "--wait", "--", "true"]).expect(0);
    let waits = fleet(&world, &restored, &["status", "job-1"]).expect(0).stdout.concat();
    assert!(
        waits.contains("waits for secrets that are not kept any more (FROM_FILE, FROM_HERE, GIVEN)"),
        "{waits}"
    );
    let give = ["secrets", "give", "job-1", "--env", "GIVEN=given-1177", "--env-file", "secrets.env"];
    fleet(&world, &restored, &give).expect(0);
    assert_eq!(state(&restored), "queued", "one is missing");
    fleet(&world, &restored, &["secrets", "give", "job-1", "--env", "FROM_HERE=from-here-7313"]).expect(0);
    eventually("the job has ended", || ["succeeded", "failed"].contains(&state(&restored).as_str()));
    assert_eq!(state(&restored), "succeeded");
}

#[test]
fn removed_secrets_are_not_there_for_the_next_start() {
    let world = World::new();
    let cluster = world.coordinator(&world.path("cluster"), ANY);
    let submit =
        ["submit", "-n", "1", "--queue", "--env", "KEY=one-2210", "--", "sh", "-c", "[ $KEY = two-2210 ]"];
    fleet(&world, &cluster, &submit).expect(0);
    fleet(&world, &cluster, &["secrets", "remove", "job-1"]).expect(0);
    let names = ask(&world, &cluster, &["secrets", "ls", "job-1"]);
    let key = names.as_array().unwrap().iter().find(|variable| variable["name"] == "KEY").unwrap();
    assert_eq!((&key["kind"], &key["value"]), (&"removed".into(), &Value::Null));
    world.run("coordinator", &["backup", "--data-dir", "cluster", "--out", "saved"]).expect(0);
    assert!(with_text(&[world.path("saved")], "one-2210").is_empty());
    let wrong = fleet(&world, &cluster, &["secrets", "give", "job-1", "--env", "KEYS=x"]).expect(2);
    wrong.says("job-1 has no secret of that name; it has KEY");
    fleet(&world, &cluster, &["secrets", "give", "job-1", "--env", "KEY=two-2210"]).expect(0);
    let _worker = world.worker(&cluster, 1);
    let state = || ask(&world, &cluster, &["status", "job-1"])["state"].clone();
    eventually("the job has ended", || state() == "succeeded" || state() == "failed");
    assert_eq!(state(), "succeeded");
}

#[test]
fn a_launch_runs_programs_in_the_callers_environment_and_none_of_it_is_kept() {
    let world = World::new();
    let mut command = world.command("fleet");
    command.env("AWS_SECRET_ACCESS_KEY", "of-the-caller-3391");
    let script = "[ $AWS_SECRET_ACCESS_KEY = of-the-caller-3391 ]";
    command.args(["launch", "-n", "1", "--data-dir", "kept", "--", "sh", "-c", script]);
    let done = Running::start(command).finish();
    assert_eq!(done.code(), 0, "{}", done.all());
    // The script itself is in the log, which is where the text may be: as an argument and not as a variable.
    let kept = with_text(&[world.path("kept")], "AWS_SECRET_ACCESS_KEY");
    assert!(!kept.is_empty(), "the arguments are kept");
    let mut command = world.command("fleet");
    command.env("AWS_SECRET_ACCESS_KEY", "of-the-caller-3391");
    command.args(["launch", "-n", "1", "--data-dir", "silent", "--", "true"]);
    Running::start(command).finish().expect(0);
    let kept = with_text(&[world.path("silent"), world.path("home")], "of-the-caller-3391");
    assert_eq!(kept, Vec::<PathBuf>::new());
}

#[test]
fn a_token_is_written_where_only_its_owner_reads_it_or_not_made() {
    let world = World::new();
    let cluster = world.coordinator(&world.path("cluster"), ANY);
    let create = |out: &Path| {
        let out = out.display().to_string();
        fleet(&world, &cluster, &["token", "create", "--role", "client", "--out", &out])
    };
    let tokens = || ask(&world, &cluster, &["token", "ls"]).as_array().unwrap().len();
    let (file, before) = (world.path("client.token"), tokens());
    fs::write(&file, "old").unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap();
    let said = create(&file).expect(0).all();
    let token = fs::read_to_string(&file).unwrap();
    assert!(mode(&file) == 0o600 && token.starts_with("fleet_client_"), "{token}");
    assert!(!said.contains(token.trim()), "it is not shown as well");
    let login = ["login", &cluster.endpoint.quic, "--token-file", "client.token", "--name", "ann"];
    world.run("fleet", &login).expect(0);
    // It was used up.
    assert_eq!(tokens(), before);
    symlink(&file, world.path("link")).unwrap();
    nix::unistd::mkfifo(&world.path("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    for (out, why) in [
        (Path::new("/dev/null"), "is not a regular file"),
        (&world.path("link"), "is not a regular file"),
        (&world.path("pipe"), "is not a regular file"),
        (&world.path("home"), "is not a regular file"),
        (&world.path("absent/token"), "No such file or directory"),
    ] {
        create(out).expect(2).says(why);
    }
    assert_eq!(tokens(), before, "none was made that could not be kept");
}

#[test]
fn a_backup_replaces_files_and_nothing_else() {
    let world = World::new();
    let _cluster = world.coordinator(&world.path("cluster"), ANY);
    nix::unistd::mkfifo(&world.path("device"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    world.write("target", "mine");
    symlink(world.path("target"), world.path("link")).unwrap();
    for out in ["device", "link", "home"] {
        let backup = world.run("coordinator", &["backup", "--data-dir", "cluster", "--out", out]);
        backup.expect(2).says(&format!("{out} is not a regular file, and nothing else is replaced"));
    }
    assert!(
        fs::symlink_metadata(world.path("device")).unwrap().mode() & 0o170_000 == 0o010_000,
        "still a pipe"
    );
    assert_eq!(fs::read(world.path("target")).unwrap(), b"mine");
    let own = ["backup", "--data-dir", "cluster", "--out", "cluster/raft.mark"];
    world.run("coordinator", &own).expect(2).says("cluster/raft.mark is a file of the coordinator itself");
    assert!(fs::metadata(world.path("cluster/raft.mark")).unwrap().len() <= 8_192, "still a mark");
    let left: Vec<_> =
        fs::read_dir(world.path("")).unwrap().flatten().map(|entry| entry.file_name()).collect();
    assert!(!left.iter().any(|name| name.to_string_lossy().ends_with(".tmp")), "{left:?}");
}

#[test]
fn without_a_home_nothing_is_kept_where_anybody_could_have_put_it() {
    if !can_be_others() {
        return;
    }
    let world = World::new();
    fs::set_permissions(world.path(""), fs::Permissions::from_mode(0o777)).unwrap();
    let temporary = world.path("tmp");
    fs::create_dir(&temporary).unwrap();
    fs::set_permissions(&temporary, fs::Permissions::from_mode(0o1777)).unwrap();
    // Where only the one who runs this may look, as in a home, others cannot run programs.
    let bin = world.path("bin");
    fs::create_dir(&bin).unwrap();
    for name in ["fleet", "worker"] {
        fs::copy(program(name), bin.join(name)).unwrap();
    }
    let run = |name: &str, state: Option<&Path>, args: &[&str]| {
        let mut command = world.enter(Command::new("setpriv"));
        command.args(["--reuid", STRANGER, "--clear-groups"]).arg(bin.join(name)).args(args);
        command.env_remove("HOME").env("TMPDIR", &temporary);
        if let Some(state) = state {
            command.env("XDG_STATE_HOME", state);
        }
        Running::start(command).finish()
    };
    run("fleet", None, &["nodes"]).expect(4).says("set HOME or XDG_STATE_HOME to a directory of this user");
    let login = ["login", "127.0.0.1:1", "--token", "x"];
    assert_ne!(run("fleet", None, &login).code(), 0);
    run("worker", None, &["join", "127.0.0.1:1"]).expect(2).says("set HOME or XDG_DATA_HOME");
    assert_eq!(all_below(&temporary).len(), 1);
    // With a place of its own it works.
    run("fleet", Some(&world.path("state")), &["nodes"]).expect(3).says("no `fleet launch` runs");
}
