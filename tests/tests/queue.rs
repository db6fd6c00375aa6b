//! The queue with real processes: gangs over several nodes, drained nodes, and why a job waits.

#![allow(clippy::unwrap_used)] // in a test an unwrap is an assertion

use fleet_tests::{Finished, Running, Standing, TinyJob, World, eventually};
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
    assert!(
        reason.starts_with("waits for more nodes") && reason.contains(&format!("node {from} is drained")),
        "{reason}"
    );
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

/// Step and exact loss of each step that the job's history has, in its order.
fn curve(finished: &Finished) -> Vec<(u64, u64)> {
    finished.losses().into_iter().map(|(step, loss)| (step, loss.to_bits())).collect()
}

#[test]
fn a_training_job_that_a_drain_moves_goes_on_from_its_checkpoint_without_a_trace() {
    let world = World::new();
    let (cluster, _workers) = cluster(&world, &[("left", 2), ("right", 2)]);
    // Long enough that the drain comes in the middle.
    let tiny = TinyJob { max_steps: 400, ..TinyJob::default() };
    let file = world.job(&tiny).display().to_string();
    let submitted = |out: &str| {
        let out = format!("output_dir={out}");
        let args = ["submit", "-n", "2", &file, "--json", "--set", &out];
        fleet(&world, &cluster, &args)["job"].as_str().unwrap().to_owned()
    };
    let job = submitted("moved");
    let running =
        until(&world, &cluster, &job, "some steps are done", |job| job["step"].as_u64() >= Some(20));
    let from = running["parts"][0]["name"].as_str().unwrap().to_owned();
    fleet(&world, &cluster, &["drain", &from, "--now", "--json"]);
    let again = until(&world, &cluster, &job, "it runs elsewhere", |job| {
        job["generation"] == 2 && job["state"] == "running"
    });
    assert_ne!(again["parts"][0]["name"], from.as_str());
    let checkpoint = &again["checkpoint"]["step"];
    assert!(checkpoint.as_u64() >= Some(20) && checkpoint.as_u64() < Some(400), "{again}");
    until(&world, &cluster, &job, "it is done", |job| job["state"] == "succeeded");
    let logs =
        |job: &str| world.run("fleet", &["--cluster", cluster.cluster(), "logs", job, "--json"]).expect(0);
    let moved = logs(&job);
    let starts: Vec<_> = moved
        .json()
        .iter()
        .filter(|line| line["event"] == "started")
        .map(|line| line["step"].clone())
        .collect();
    assert_eq!(starts, [Value::from(0), checkpoint.clone()]);

    fleet(&world, &cluster, &["undrain", &from, "--json"]);
    let undisturbed = submitted("undisturbed");
    until(&world, &cluster, &undisturbed, "it is done", |job| job["state"] == "succeeded");
    let (moved, undisturbed) = (curve(&moved), curve(&logs(&undisturbed)));
    assert_eq!(moved.iter().map(|(step, _)| *step).collect::<Vec<_>>(), (1..=400).collect::<Vec<_>>());
    assert_eq!(moved, undisturbed, "bit for bit");
}

#[test]
fn a_drain_waits_for_what_runs_and_drained_nodes_count_for_what_could_run() {
    let world = World::new();
    let (cluster, _workers) = cluster(&world, &[("left", 1), ("right", 1)]);
    let go = world.path("go");
    let script = format!("echo runs; until test -e {}; do sleep 0.05; done", go.display());
    let submitted = fleet(&world, &cluster, &["submit", "--json", "--", "sh", "-c", &script]);
    let job = submitted["job"].as_str().unwrap().to_owned();
    let running = until(&world, &cluster, &job, "the job runs", |job| job["state"] == "running");
    for node in ["left", "right"] {
        fleet(&world, &cluster, &["drain", node, "--json"]);
    }
    // What is drained could be taken back: two ranks may wait, three could never run.
    let cluster_args = ["--cluster", cluster.cluster()];
    let three = ["submit", "-n", "3", "--", "true"];
    world
        .run("fleet", &[&cluster_args[..], &three].concat())
        .expect(2)
        .says("all 2 nodes together have 2 slots");
    let two = fleet(&world, &cluster, &["submit", "-n", "2", "--json", "--", "true"]);
    let waits = status(&world, &cluster, two["job"].as_str().unwrap());
    let reason = waits["reason"].as_str().unwrap();
    assert!(
        reason.contains("nodes left and right are drained (`fleet undrain` takes them back)"),
        "{reason}"
    );
    let still = status(&world, &cluster, &job);
    assert_eq!((&still["state"], &still["parts"]), (&running["state"], &running["parts"]));
    world.write("go", "");
    let done = until(&world, &cluster, &job, "it is done", |job| job["state"] == "succeeded");
    assert_eq!(done["generation"], 1);
}

#[test]
fn a_job_has_only_the_time_that_it_asked_for() {
    let world = World::new();
    let (cluster, _workers) = cluster(&world, &[("only", 1)]);
    let job = endless(&world, &cluster, &["--max-time", "1s"]);
    let ended = until(&world, &cluster, &job, "its time is over", |job| job["state"] == "failed");
    assert!(ended["error"]["message"].as_str().unwrap().contains("maximum time of 1 s"), "{ended}");
}
