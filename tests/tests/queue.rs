//! The queue with real processes: gangs over several nodes, drained nodes, and why a job waits.

#![allow(clippy::unwrap_used)] // in a test an unwrap is an assertion

use fleet_tests::{Running, Standing, World, eventually};
use serde_json::Value;

const ANY: &str = "127.0.0.1:0";

/// A cluster with nodes of these names and slots.
fn cluster(world: &World, nodes: &[(&str, u32)]) -> (Standing, Vec<Running>) {
    let cluster = world.coordinator(&world.path("cluster"), ANY);
    let workers = nodes.iter().map(|(name, slots)| {
        let mut command = world.command("worker");
        command.args(["join", &cluster.endpoint.quic, "--device", "cpu", "--slots", &slots.to_string()]);
        command.args(["--name", name, "--labels", &format!("box={name},kind=test")]);
        command.arg("--token-file").arg(cluster.data_dir.join("tokens/worker.token"));
        command.arg("--data-dir").arg(world.path(name));
        let mut worker = Running::start(command);
        worker.until("registration", |line| line["node"].is_string());
        worker
    });
    let workers = workers.collect();
    (cluster, workers)
}

fn fleet(world: &World, cluster: &Standing, args: &[&str]) -> Value {
    let done = world.run("fleet", &[&["--cluster", cluster.cluster()], args].concat()).expect(0);
    serde_json::from_str(&done.stdout.concat()).unwrap_or_else(|error| panic!("{error}: {}", done.all()))
}

/// A job of one rank that runs until it is stopped.
fn endless(world: &World, cluster: &Standing, args: &[&str]) -> String {
    let program = ["--", "sh", "-c", "echo runs; exec sleep 1000"];
    let submitted = fleet(world, cluster, &[&["submit", "--json"], args, &program].concat());
    submitted["job"].as_str().unwrap().to_owned()
}

fn status(world: &World, cluster: &Standing, job: &str) -> Value {
    fleet(world, cluster, &["status", job, "--json"])
}

fn until(world: &World, cluster: &Standing, job: &str, what: &str, is: impl Fn(&Value) -> bool) -> Value {
    let mut seen = Value::Null;
    eventually(what, || {
        seen = status(world, cluster, job);
        is(&seen)
    });
    seen
}

#[test]
fn a_program_on_two_nodes_finds_all_its_ranks_and_one_place_to_meet() {
    let world = World::new();
    let (cluster, _workers) = cluster(&world, &[("left", 2), ("right", 2)]);
    let say = "echo $RANK/$WORLD_SIZE $LOCAL_RANK/$LOCAL_WORLD_SIZE $GROUP_RANK/$GROUP_WORLD_SIZE $MASTER_ADDR:$MASTER_PORT";
    let args = [
        "submit",
        "-n",
        "4",
        "--nodes",
        "2",
        "--wait",
        "--cluster",
        cluster.cluster(),
        "--",
        "sh",
        "-c",
        say,
    ];
    let done = world.run("fleet", &args).expect(0);
    let mut lines: Vec<&str> =
        done.stdout.iter().map(|line| line.trim()).filter(|line| line.contains("rank ")).collect();
    lines.sort_unstable();
    let wanted = [(0, 0, 0), (1, 1, 0), (2, 0, 1), (3, 1, 1)]
        .map(|(rank, local, group)| format!("[rank {rank}] {rank}/4 {local}/2 {group}/2 127.0.0.1:29501"));
    assert_eq!(lines, wanted, "{}", done.all());
    let refused =
        world.run("fleet", &["submit", "-n", "5", "--cluster", cluster.cluster(), "--", "true"]).expect(2);
    refused.says("all 2 nodes together have 4 slots");
}

#[test]
fn the_failure_of_one_rank_ends_the_gang_on_every_node() {
    let world = World::new();
    let (cluster, _workers) = cluster(&world, &[("left", 1), ("right", 1)]);
    let script = "test $RANK = 1 && exit 7; exec sleep 1000";
    let args = ["submit", "-n", "2", "--wait", "--cluster", cluster.cluster(), "--", "sh", "-c", script];
    let done = world.run("fleet", &args).expect(1);
    done.says("rank 1 on right ended with exit code 7");
}

#[test]
fn a_drained_node_s_job_starts_again_elsewhere_and_a_job_that_waits_says_why() {
    let world = World::new();
    let (cluster, _workers) = cluster(&world, &[("left", 1), ("right", 1)]);
    let first = endless(&world, &cluster, &[]);
    let running = until(&world, &cluster, &first, "the job runs", |job| job["state"] == "running");
    let place = |job: &Value| job["parts"][0]["name"].as_str().unwrap_or_default().to_owned();
    let (from, to) = if place(&running) == "left" { ("left", "right") } else { ("right", "left") };
    fleet(&world, &cluster, &["drain", from, "--now", "--json"]);
    let again = until(&world, &cluster, &first, "it runs elsewhere", |job| {
        job["state"] == "running" && job["generation"] == 2
    });
    assert_eq!(place(&again), to);

    let wish = format!("box={from}");
    let second = endless(&world, &cluster, &["--labels", &wish]);
    let waits = status(&world, &cluster, &second);
    let reason = waits["reason"].as_str().unwrap();
    assert!(reason.starts_with("waits for more nodes") && reason.ends_with("1 node is drained"), "{reason}");
    fleet(&world, &cluster, &["undrain", from, "--json"]);
    until(&world, &cluster, &second, "the second job runs", |job| job["state"] == "running");
    let events = fleet(&world, &cluster, &["events", "--json"]);
    let told =
        events.as_array().unwrap().iter().filter(|event| event["why"].as_str().unwrap().starts_with(&first));
    assert_eq!(told.count(), 2, "{events}");
    for job in [first, second] {
        fleet(&world, &cluster, &["cancel", &job, "--now", "--json"]);
    }
}

#[test]
fn a_job_has_only_the_time_that_it_asked_for() {
    let world = World::new();
    let (cluster, _workers) = cluster(&world, &[("only", 1)]);
    let job = endless(&world, &cluster, &["--max-time", "1s"]);
    let ended = until(&world, &cluster, &job, "its time is over", |job| job["state"] == "failed");
    assert!(ended["error"]["message"].as_str().unwrap().contains("maximum time of 1 s"), "{ended}");
}
