//! A coordinator, workers and clients that are started one by one.

#![allow(clippy::unwrap_used)] // in a test an unwrap is an assertion

use fleet_common::codec::{read_frame, write_frame};
use fleet_common::ids::{ClientId, JobId};
use fleet_common::net::{self, Identity, JoinToken};
use fleet_common::protocol::{
    ClientFrame, Feature, NewExport, NewProfile, Program, Reply, Request, RunKey, SubmitJob, Wish, Work,
};
use fleet_tests::{Client, Running, Standing, TinyJob, World, eventually, program};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};

const ANY: &str = "127.0.0.1:0";

/// The answer of `fleet COMMAND --json` as one value.
fn ask(world: &World, cluster: &Standing, args: &[&str]) -> Value {
    let done = world.run("fleet", &[args, &["--json", "--cluster", cluster.cluster()]].concat()).expect(0);
    serde_json::from_str(&done.stdout.concat()).unwrap_or_else(|error| panic!("{error}: {}", done.all()))
}

fn submit(world: &World, cluster: &Standing, name: &str) -> Running {
    let job = world.job(&TinyJob::default()).display().to_string();
    let name = format!("run_name={name}");
    world.start(
        "fleet",
        &["submit", &job, "--queue", "--json", "--cluster", cluster.cluster(), "--set", &name],
    )
}

#[test]
fn no_acknowledged_job_is_lost_when_the_coordinator_is_killed_in_the_middle() {
    let world = World::new();
    let data = world.path("cluster");
    let mut cluster = world.coordinator(&data, ANY);
    let listen = cluster.endpoint.quic.clone();
    let mut acknowledged = BTreeMap::new();
    for round in 0..3 {
        let names: Vec<String> = (0..5).map(|number| format!("r{round}-{number}")).collect();
        let mut submits: Vec<Running> = names.iter().map(|name| submit(&world, &cluster, name)).collect();
        // Killed when some have their answer and others are under way.
        for submit in &mut submits[..round] {
            submit.line();
        }
        drop(cluster);
        cluster = world.coordinator(&data, &listen);
        for (submit, name) in submits.into_iter().zip(names) {
            let done = submit.finish().expect(0);
            acknowledged.insert(done.json()[0]["job"].as_str().unwrap().to_owned(), name);
        }
    }
    assert_eq!(acknowledged.len(), 15, "two submits got the same job");
    let jobs = ask(&world, &cluster, &["jobs"]);
    let listed: BTreeMap<String, String> = jobs
        .as_array()
        .unwrap()
        .iter()
        .map(|job| (job["job"].as_str().unwrap().to_owned(), job["name"].as_str().unwrap().to_owned()))
        .collect();
    assert_eq!(listed, acknowledged);
    assert!(jobs[0]["reason"].as_str().unwrap_or_default().len() > 10, "why it waits: {}", jobs[0]);
}

#[test]
fn a_request_that_is_sent_again_is_one_job_even_after_a_restart() {
    let world = World::new();
    let data = world.path("cluster");
    let cluster = world.coordinator(&data, ANY);
    let work = Work::Program(Program { argv: vec!["true".into()], working_dir: "/".into(), env: Vec::new() });
    let request =
        Request::Submit(SubmitJob { world_size: 1, work, wish: Wish { queue: true, ..Wish::default() } });
    let frame = ClientFrame::change(ClientId(77), 1, request);
    let first = send(&cluster, &frame);
    assert!(matches!(first, Reply::Submitted { .. }), "{first:?}");
    assert_eq!(send(&cluster, &frame), first);
    let listen = cluster.endpoint.quic.clone();
    drop(cluster);
    let cluster = world.coordinator(&data, &listen);
    assert_eq!(send(&cluster, &frame), first);
    let next = send(&cluster, &ClientFrame { seq: 2, ..frame });
    assert!(matches!(next, Reply::Submitted { .. }) && next != first, "{next:?}");
    assert_eq!(ask(&world, &cluster, &["jobs"]).as_array().map(Vec::len), Some(2));
}

/// One request on a connection of its own.
fn send(cluster: &Standing, frame: &ClientFrame) -> Reply {
    let identity = Identity::load(&cluster.data_dir.join("client")).unwrap().unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let connection = net::connect(std::slice::from_ref(&cluster.endpoint.quic), &identity).await.unwrap();
        let (mut up, mut down) = connection.open_bi().await.unwrap();
        write_frame(&mut up, frame).await.unwrap();
        read_frame(&mut down).await.unwrap().unwrap()
    })
}

#[test]
fn everything_that_was_recorded_is_shown_by_the_program() {
    let world = World::new();
    let cluster = world.coordinator(&world.path("cluster"), ANY);
    let _worker = world.worker(&cluster, 1);
    let job = world.job(&TinyJob { save_steps: 10, ..TinyJob::default() }).display().to_string();
    world.run("fleet", &["submit", &job, "--wait", "--cluster", cluster.cluster()]).expect(0);
    let mut client = Client::new(&cluster.data_dir.join("client"), vec![cluster.endpoint.quic.clone()]);
    let export = NewExport {
        job: JobId(1),
        step: 20,
        format: "onnx".into(),
        path: "/m.onnx".into(),
        bytes: 9,
        sha256: "ef".repeat(32),
    };
    let feature = Feature {
        name: "length".into(),
        samples: 10,
        mean: 1.0,
        std_dev: 0.5,
        edges: vec![0.0, 1.0, 2.0],
        counts: vec![4, 6],
    };
    let profile = NewProfile { run: RunKey::Job(JobId(1)), name: "p".into(), features: vec![feature] };
    client.change(Request::RecordExport(export)).unwrap();
    client.change(Request::RecordProfile(profile)).unwrap();
    client.change(Request::StartRun { name: "sweep".into() }).unwrap();

    for how in [&[][..], &["--stale"]] {
        let ask = |args: &[&str]| ask(&world, &cluster, &[how, args].concat());
        let status = ask(&["status"]);
        assert_eq!(status["leader"]["id"], "replica-1", "{status}");
        assert_eq!(status["leader"]["address"], cluster.endpoint.quic.as_str(), "{status}");
        assert_eq!(
            (&status["nodes"][0]["node"], &status["jobs"][0]["job"]),
            (&"node-1".into(), &"job-1".into())
        );
        let top = ask(&["top"]);
        assert_eq!(
            (&top["nodes"][0]["node"], &top["jobs"][0]["step"]),
            (&"node-1".into(), &20.into()),
            "{top}"
        );
        let events = ask(&["events"]);
        assert!(events[0]["why"].as_str().unwrap().starts_with("job-1 starts with 1 rank"), "{events}");
        let checkpoint = ask(&["checkpoints", "show", "job-1", "20"]);
        let shards = checkpoint["shards"].as_array().unwrap();
        assert!(
            checkpoint["step"] == 20 && shards[0]["sha256"].as_str().unwrap().len() == 64,
            "{checkpoint}"
        );
        let (exports, profiles, runs) =
            (ask(&["exports", "ls"]), ask(&["profiles", "ls"]), ask(&["runs", "ls"]));
        assert_eq!((&exports[0]["job"], &exports[0]["step"]), (&"job-1".into(), &20.into()), "{exports}");
        assert_eq!(ask(&["exports", "show", "export-1"])["manifest_sha256"], checkpoint["manifest_sha256"]);
        assert_eq!(profiles[0]["name"], "p", "{profiles}");
        assert_eq!(
            ask(&["profiles", "show", "profile-1"])["features"][0]["counts"],
            serde_json::json!([4, 6])
        );
        assert!(runs.as_array().unwrap().iter().any(|run| run["name"] == "sweep"), "{runs}");
        assert_eq!(ask(&["runs", "show", "run-1"])["name"], "sweep");
    }
}

#[test]
fn a_job_that_is_submitted_runs_on_a_worker_and_is_seen_by_every_command() {
    let world = World::new();
    let cluster = world.coordinator(&world.path("cluster"), ANY);
    let worker = world.worker(&cluster, 2);
    let job = world.job(&TinyJob { save_steps: 10, ..TinyJob::default() }).display().to_string();
    let args = ["submit", "-n", "2", &job, "--wait", "--json", "--cluster", cluster.cluster()];
    let done = world.run("fleet", &args).expect(0);
    assert_eq!(done.losses().len(), 20);
    assert_eq!(done.summary()["status"], "succeeded");
    let jobs = ask(&world, &cluster, &["jobs"]);
    assert_eq!((&jobs[0]["state"], &jobs[0]["step"]), (&"succeeded".into(), &20.into()), "{jobs}");
    let checkpoints = ask(&world, &cluster, &["checkpoints", "ls"]);
    assert_eq!(checkpoints.as_array().map(Vec::len), Some(2), "{checkpoints}");
    let logs = world.run("fleet", &["logs", "job-1", "--json", "--cluster", cluster.cluster()]).expect(0);
    assert_eq!(logs.losses(), done.losses(), "the history is what was watched");
    for full in [&[][..], &["--full"]] {
        let args = [&["logs", "job-1", "--rank", "2", "--cluster", cluster.cluster()], full].concat();
        world.run("fleet", &args).expect(2).says("job-1 has no rank 2: its ranks are 0 to 1");
    }
    // A node keeps its name and certificate: no token is needed again.
    drop(worker);
    let mut again = world.command("worker");
    again
        .args(["join", &cluster.endpoint.quic, "--device", "cpu", "--slots", "2"])
        .arg("--data-dir")
        .arg(world.path("node"));
    let mut again = Running::start(again);
    assert_eq!(again.until("registration", |line| line["node"].is_string())["node"], "node-1");
    assert_eq!(ask(&world, &cluster, &["nodes"]).as_array().map(Vec::len), Some(1));
}

#[test]
fn a_client_logs_in_with_a_token_that_only_clients_may_use() {
    let world = World::new();
    let cluster = world.coordinator(&world.path("cluster"), ANY);
    let addr = &cluster.endpoint.quic;
    let token = |name: &str| cluster.data_dir.join("tokens").join(name).display().to_string();
    let done = world
        .run("fleet", &["login", addr, "--token-file", &token("worker.token"), "--name", "here"])
        .expect(2);
    done.says("not for a client");
    world.run("fleet", &["login", addr, "--token-file", &token("client.token"), "--name", "here"]).expect(0);
    world.run("fleet", &["jobs", "--cluster", "here"]).expect(0);
    let key = world.path("home/.local/state/fleet/clusters/here/key.pem");
    assert_eq!(
        std::os::unix::fs::PermissionsExt::mode(&fs::metadata(key).unwrap().permissions()) & 0o777,
        0o600
    );
}

#[test]
fn tokens_that_are_damaged_unknown_or_of_another_cluster() {
    let world = World::new();
    let cluster = world.coordinator(&world.path("cluster"), ANY);
    let good: JoinToken =
        fs::read_to_string(cluster.data_dir.join("tokens/worker.token")).unwrap().trim().parse().unwrap();
    let join = |token: &str| {
        let mut command = world.command("worker");
        command.args(["join", &cluster.endpoint.quic, "--token", token, "--slots", "1"]);
        command.arg("--data-dir").arg(world.path("node"));
        Running::start(command).finish().expect(2)
    };
    join("fleet_worker_12").says("the token in --token is damaged");
    let wrong = JoinToken { secret: "0".repeat(64), ..good.clone() };
    join(&wrong.to_string()).says("this token is not known here");
    let other = JoinToken { ca_fingerprint: "ab".repeat(32), ..good };
    let done = join(&other.to_string());
    done.says("the token is of another cluster");
    assert!(
        !done.all().contains(&other.secret) || done.what.contains(&other.secret),
        "the secret was printed"
    );
    assert!(!world.path("node/identity").exists());
    assert_eq!(ask(&world, &cluster, &["nodes"]), Value::Array(Vec::new()));
}

#[test]
fn who_comes_back_to_another_cluster_at_its_address_is_told_so_and_what_to_do() {
    let world = World::new();
    let first = world.coordinator(&world.path("first"), ANY);
    let address = first.endpoint.quic.clone();
    let (node, client) = (world.path("node").display().to_string(), world.path("client.token"));
    fs::copy(first.data_dir.join("tokens/client.token"), &client).unwrap();
    let client = client.display().to_string();
    world.run("fleet", &["login", &address, "--name", "it", "--token-file", &client]).expect(0);
    let worker = world.worker(&first, 1);
    let old = first.endpoint.cluster_id.clone();
    drop(first);
    let mut command = world.command("coordinator");
    command.args(["start", "--listen", &address, "--member-listen", ANY, "--http", ANY]);
    command.arg("--data-dir").arg(world.path("second"));
    let second = world.standing(Running::start(command), &world.path("second"));
    let new = second.endpoint.cluster_id.clone();
    let belongs = format!("this address belongs to another cluster, {new}, and this side to {old}");
    worker.until_it_says(&belongs);
    let cure = format!(
        "with a token from there and another --data-dir, or set this one aside (mv {node} {node}.old)"
    );
    worker.until_it_says(&cure);
    let said = worker.complaints();
    assert_eq!(said.matches("belongs to another cluster").count(), 1, "once: {said}");
    drop(worker);
    let token = second.data_dir.join("tokens/worker.token").display().to_string();
    let join = ["join", &address, "--token-file", &token, "--data-dir", &node];
    let done = world.run("worker", &join).expect(2);
    assert!(done.says("error: ").contains(&belongs) && done.stderr.contains(&cure), "{}", done.all());
    let done = world.run("fleet", &["nodes", "--cluster", "it"]).expect(2);
    let cure = format!("log in again: `fleet login {address} --name it --token-file FILE`");
    assert!(done.says(&belongs).contains(&cure), "{}", done.all());
    // The way out leads out.
    fs::rename(world.path("node"), world.path("node.old")).unwrap();
    let _worker = world.worker(&second, 1);
    let client = second.data_dir.join("tokens/client.token").display().to_string();
    world.run("fleet", &["login", &address, "--name", "it", "--token-file", &client]).expect(0);
    world.run("fleet", &["nodes", "--cluster", "it"]).expect(0);
}

#[test]
fn ports_that_are_in_use_and_a_directory_that_is() {
    let world = World::new();
    let (udp, tcp) = (UdpSocket::bind(ANY).unwrap(), TcpListener::bind(ANY).unwrap());
    let (quic, http) = (udp.local_addr().unwrap().to_string(), tcp.local_addr().unwrap().to_string());
    let start = |data: &Path, listen: &str, http: &str| {
        let mut command = world.command("coordinator");
        command.arg("start").arg("--data-dir").arg(data).args(["--listen", listen, "--http", http]);
        Running::start(command).finish().expect(4)
    };
    start(&world.path("one"), &quic, ANY).says(&quic);
    start(&world.path("two"), ANY, &http).says(&http);
    let running = world.coordinator(&world.path("three"), ANY);
    start(&world.path("three"), ANY, ANY).says("another coordinator runs on");
    drop(running);
}

#[test]
fn a_data_directory_of_another_kind_is_named_and_nothing_is_written_there() {
    let world = World::new();
    let cluster = world.coordinator(&world.path("cluster"), ANY);
    let worker = world.worker(&cluster, 1);
    let (quic, token) = (cluster.endpoint.quic.clone(), world.token(&cluster, &["--role", "coordinator"]));
    fs::create_dir_all(world.path("out/checkpoints/run/step-00000010")).unwrap();
    let backup = world.path("saved").display().to_string();
    world.run("coordinator", &["backup", "--data-dir", "cluster", "--out", &backup]).expect(0);
    let names = |dir: &str| {
        let entries = fs::read_dir(world.path(dir)).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.collect::<std::collections::BTreeSet<_>>()
    };
    let refused = |program: &str, args: &[&str], dir: &str, is: &str| {
        let before = names(dir);
        let done = world.run(program, &[args, &["--data-dir", dir]].concat()).expect(2);
        let said = done.says("error: ");
        assert!(said.contains(&format!("{dir} is {is}; give --data-dir another")), "{said}");
        assert_eq!(names(dir), before);
    };
    let (start, join) = (["start", "--listen", ANY, "--http", ANY], ["join", &quic, "--token", &token]);
    let launch = ["launch", "-n", "1", "--data-dir", "node", "--", "true"];
    let each = || {
        refused("worker", &["join", &quic], "cluster", "the data directory of a coordinator");
        for args in [&start[..], &join, &["restore", &backup]] {
            refused("coordinator", args, "node", "the data directory of a worker");
        }
        let launched = world.run("fleet", &launch).expect(2);
        assert!(launched.all().contains("node is the data directory of a worker"), "{}", launched.all());
    };
    each();
    drop((cluster, worker));
    each();
    refused("worker", &["join", &quic], "out", "a directory of checkpoints");
    refused("coordinator", &start, "out/checkpoints/run", "a directory of checkpoints");
}

#[test]
fn a_coordinator_that_is_not_there() {
    let world = World::new();
    let data = world.path("cluster");
    let cluster = world.coordinator(&data, ANY);
    let addr = cluster.endpoint.quic.clone();
    let worker =
        ["join", &addr, "--slots", "1", "--token-file", "cluster/tokens/worker.token", "--data-dir", "node"];
    drop(cluster);
    let done = world.run("fleet", &["jobs", "--cluster", data.to_str().unwrap()]).expect(3);
    done.says(&format!("{addr}: no answer within 1 s"));
    world.run("fleet", &["jobs"]).expect(3).says("no `fleet launch` runs on this machine");
    world
        .run("fleet", &["jobs", "--cluster", "nowhere/at/all"])
        .expect(3)
        .says("no coordinator has listened there");
    world.run("worker", &worker).expect(3).says(&addr);
}

#[test]
fn http_shows_and_never_changes_anything() {
    let world = World::new();
    let cluster = world.coordinator(&world.path("cluster"), ANY);
    let http = cluster.endpoint.http.as_str();
    let request = |method: &str, path: &str, host: &str| {
        let mut stream = TcpStream::connect(http).unwrap();
        write!(stream, "{method} {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    };
    let status = |answer: &str| answer.split(' ').nth(1).map(str::to_owned).unwrap_or_default();
    assert_eq!(status(&request("GET", "/healthz", http)), "200");
    let metrics = request("GET", "/metrics", http);
    assert!(metrics.contains("# TYPE fleet_"), "{metrics}");
    submit(&world, &cluster, "seen").finish().expect(0);
    for path in [
        "/api/v1/nodes",
        "/api/v1/jobs",
        "/api/v1/jobs/1",
        "/api/v1/checkpoints",
        "/api/v1/events",
        "/api/v1/runs/job-1/points",
        "/api/v1/exports",
        "/api/v1/profiles",
    ] {
        let answer = request("GET", path, http);
        assert_eq!(status(&answer), "200", "{path}: {answer}");
        let body = answer.split_once("\r\n\r\n").unwrap().1;
        assert!(serde_json::from_str::<Value>(body).is_ok(), "{path}: {body}");
    }
    assert!(request("GET", "/api/v1/jobs", http).contains("seen"));
    assert_eq!(status(&request("POST", "/api/v1/jobs", http)), "405");
    assert_eq!(status(&request("GET", "/nothing", http)), "404");
    // A page of another site that resolves to this machine.
    assert!(status(&request("GET", "/api/v1/jobs", "evil.example:80")).starts_with('4'));
}

#[test]
fn who_follows_a_quiet_job_outlives_a_coordinator() {
    let world = World::new();
    let dir = world.path("cluster");
    let cluster = world.coordinator(&dir, ANY);
    let _worker = world.worker(&cluster, 1);
    let at = cluster.cluster().to_owned();
    let script = "echo begun; until [ -e go ]; do sleep 0.5; done; echo the end";
    world.run("fleet", &["submit", "-n", "1", "--cluster", &at, "--", "sh", "-c", script]).expect(0);
    let mut logs = world.start("fleet", &["logs", "job-1", "--follow", "--cluster", &at]);
    while !logs.line().is_some_and(|line| line.contains("begun")) {}
    // Longer than anything is tried again, counted from the last that is told: of the memory, after five seconds.
    std::thread::sleep(std::time::Duration::from_secs(17));
    drop(cluster);
    let _again = world.restart_coordinator(&dir);
    world.write("go", "");
    let done = logs.finish().expect(0);
    assert!(done.stdout.iter().any(|line| line == "[rank 0] the end"), "{}", done.all());
}

#[test]
fn who_follows_a_job_is_told_how_it_ended_and_ends_so() {
    let world = World::new();
    let cluster = world.coordinator(&world.path("cluster"), ANY);
    let _worker = world.worker(&cluster, 1);
    let at = ["--cluster", cluster.cluster()];
    let run = |args: &[&str]| world.run("fleet", &[&at[..], args].concat());
    let ends = [
        ("exit 0", 0, "job-1 succeeded: done"),
        ("exit 3", 1, "job-2 failed: "),
        ("sleep 1000", 1, "job-3 cancelled: "),
    ];
    for (number, (script, code, last)) in (1..).zip(ends) {
        run(&["submit", "-n", "1", "--", "sh", "-c", script]).expect(0);
        let job = format!("job-{number}");
        let following = world.start("fleet", &[&at[..], &["logs", &job, "--follow"]].concat());
        if script.starts_with("sleep") {
            run(&["cancel", &job, "--now"]).expect(0);
        }
        let done = following.finish().expect(code);
        assert!(done.stderr.lines().last().is_some_and(|line| line.starts_with(last)), "{}", done.all());
    }
}

#[test]
fn a_coordinator_on_a_full_disk_refuses_changes_and_recovers() {
    let world = World::new();
    let disk = world.path("disk");
    fs::create_dir(&disk).unwrap();
    let coordinator = program("coordinator").display().to_string();
    let args = [&coordinator, "start", "--data-dir", "disk/cluster", "--listen", ANY, "--http", ANY];
    let Some(command) = world.on_a_disk_of("96M", &disk, "exec \"$@\"", &args) else { return };
    let process = Running::start(command);
    // The mount is seen through the process that has it.
    let inside = PathBuf::from(format!("/proc/{}/root{}", process.pid(), disk.display()));
    let cluster = world.standing(process, &inside.join("cluster"));
    submit(&world, &cluster, "before").finish().expect(0);
    let free = || {
        let found = nix::sys::statvfs::statvfs(&inside).unwrap();
        found.blocks_available() * found.fragment_size()
    };
    fs::write(inside.join("filler"), vec![0; (free() - (6 << 20)) as usize]).unwrap();
    eventually("the coordinator notices", || ask(&world, &cluster, &["status"]).to_string().contains("disk"));
    let refused = submit(&world, &cluster, "during").finish();
    assert_ne!(refused.code(), 0, "{}", refused.all());
    refused.says("disk");
    fs::remove_file(inside.join("filler")).unwrap();
    eventually("the coordinator writes again", || submit(&world, &cluster, "after").finish().code() == 0);
    let jobs = ask(&world, &cluster, &["jobs"]).to_string();
    assert!(jobs.contains("before") && jobs.contains("after") && !jobs.contains("during"), "{jobs}");
}
