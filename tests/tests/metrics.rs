//! Metrics of a cluster that trains: every one that is defined is there, in both formats, with a value that makes sense.

#![allow(clippy::unwrap_used)] // in a test an unwrap is an assertion

use fleet_common::metrics::{At, Definition, Kind, coordinator, worker};
use fleet_tests::http::{Answer, ask_as};
use fleet_tests::{Running, Standing, TinyJob, World, eventually};
use serde_json::Value;
use std::collections::BTreeMap;

const TEXT: &str = "text/plain; version=0.0.4";
const OPEN: &str = "application/openmetrics-text; version=1.0.0";

/// Samples, each under its name with its labels.
type Samples = BTreeMap<String, f64>;

fn get(at: &str, path: &str, accept: &str) -> Answer {
    ask_as(at, path, accept).unwrap()
}

fn scrape(at: &str, accept: &str) -> Samples {
    let answer = get(at, "/metrics", accept);
    assert_eq!(answer.status, 200, "{answer:?}");
    let kind = format!("content-type: {accept}; charset=utf-8").to_lowercase();
    assert!(answer.head.to_lowercase().contains(&kind), "{}", answer.head);
    assert_eq!(answer.body.ends_with("# EOF\n"), accept == OPEN);
    let samples = answer.body.lines().filter(|line| !line.starts_with('#'));
    let sample = |line: &str| {
        let (name, value) = line.rsplit_once(' ').unwrap();
        (name.to_owned(), value.parse().unwrap_or_else(|_| panic!("{line}")))
    };
    let all: Vec<(String, f64)> = samples.map(sample).collect();
    let samples: Samples = all.iter().cloned().collect();
    assert_eq!(samples.len(), all.len(), "a sample is there twice");
    samples
}

/// Whether there is any sample of this metric.
fn has(samples: &Samples, definition: &Definition) -> bool {
    let name = match definition.kind {
        Kind::Histogram { .. } => format!("{}_count", definition.name),
        Kind::Gauge | Kind::Counter => definition.name.to_owned(),
    };
    samples.keys().any(|sample| sample.split('{').next() == Some(&name))
}

fn missing(samples: &Samples, definitions: &[&'static Definition]) -> Vec<&'static str> {
    let missing = definitions.iter().filter(|definition| !has(samples, definition));
    missing.map(|definition| definition.name).collect()
}

fn worker(world: &World, cluster: &Standing) -> (Running, String) {
    let mut command = world.command("worker");
    command.args(["join", &cluster.endpoint.quic, "--device", "cpu", "--slots", "2", "--http", "0"]);
    command.arg("--token-file").arg(cluster.data_dir.join("tokens/worker.token"));
    command.arg("--data-dir").arg(world.path("node"));
    let mut worker = Running::start(command);
    let said = worker.until("registration", |line| line["node"].is_string());
    (worker, said["http"].as_str().unwrap().to_owned())
}

fn submit(world: &World, cluster: &Standing, args: &[&str]) -> String {
    let all = [&["submit", "--json", "--cluster", cluster.cluster()], args].concat();
    let done = world.run("fleet", &all).expect(0);
    let submitted: Value = serde_json::from_str(&done.stdout.concat()).unwrap();
    submitted["job"].as_str().unwrap().to_owned()
}

#[test]
fn every_metric_is_there_while_a_job_trains() {
    let world = World::new();
    let cluster = world.coordinator(&world.path("cluster"), "127.0.0.1:0");
    let (_worker, at_worker) = worker(&world, &cluster);
    let at = cluster.endpoint.http.as_str();
    let file = world.job(&TinyJob { max_steps: 100_000, save_steps: 20, ..TinyJob::default() });
    let job = submit(&world, &cluster, &["-n", "2", file.to_str().unwrap(), "--set", "eval_steps=20"]);
    let waits = submit(&world, &cluster, &["-n", "2", "--", "true"]);
    assert_eq!((job.as_str(), waits.as_str()), ("job-1", "job-2"));

    // None has a graphics card here, and there is one coordinator.
    let cannot = ["fleet_raft_member_lag_entries", "fleet_rank_device_bytes"];
    let wanted = |all: &[&'static Definition]| -> Vec<&'static Definition> {
        let can = all.iter().filter(|definition| !cannot.contains(&definition.name));
        can.filter(|definition| !definition.name.starts_with("fleet_gpu_")).copied().collect()
    };
    let (of_coordinator, of_worker) = (wanted(coordinator::ALL), wanted(worker::ALL));
    let mut left = Vec::new();
    let mut pages = Vec::new();
    eventually("all metrics", || {
        pages = vec![scrape(at, TEXT), scrape(&at_worker, TEXT)];
        left = [missing(&pages[0], &of_coordinator), missing(&pages[1], &of_worker)].concat();
        if !left.is_empty() {
            eprintln!("missing yet: {left:?}");
        }
        left.is_empty()
    });
    let (coordinator, worker) = (&pages[0], &pages[1]);
    for (sample, least, most) in [
        ("fleet_raft_is_leader", 1.0, 1.0),
        ("fleet_raft_has_leader", 1.0, 1.0),
        ("fleet_raft_members{role=\"voter\"}", 1.0, 1.0),
        ("fleet_raft_members_reachable", 1.0, 1.0),
        ("fleet_raft_leader_changes_total", 0.0, 3.0),
        ("fleet_raft_proposals_total", 5.0, 1e6),
        ("fleet_raft_fsync_seconds_count", 5.0, 1e6),
        ("fleet_commit_seconds_count", 2.0, 100.0),
        ("fleet_requests_total{request=\"submit\",result=\"done\"}", 2.0, 2.0),
        ("fleet_nodes_connected", 1.0, 1.0),
        ("fleet_slots", 2.0, 2.0),
        ("fleet_slots_used", 2.0, 2.0),
        ("fleet_agents", 1.0, 1.0),
        ("fleet_quic_connections{kind=\"worker\"}", 1.0, 4.0),
        ("fleet_jobs{state=\"running\"}", 1.0, 1.0),
        ("fleet_jobs{state=\"queued\"}", 1.0, 1.0),
        ("fleet_queue_wait_seconds_count", 1.0, 1.0),
        ("fleet_queue_oldest_seconds", 0.0, 1e3),
        ("fleet_job_step{job=\"job-1\"}", 20.0, 1e5),
        ("fleet_job_total_steps{job=\"job-1\"}", 1e5, 1e5),
        ("fleet_job_loss{job=\"job-1\"}", 0.01, 20.0),
        ("fleet_job_eval_loss{job=\"job-1\"}", 0.01, 20.0),
        ("fleet_job_learning_rate{job=\"job-1\"}", 1e-6, 1e-3),
        ("fleet_job_tokens_per_second{job=\"job-1\"}", 1.0, 1e9),
        ("fleet_job_step_seconds{job=\"job-1\",part=\"forward\"}", 1e-9, 100.0),
        ("fleet_job_stalled{job=\"job-1\"}", 0.0, 1.0),
        ("fleet_job_ranks{job=\"job-2\"}", 2.0, 2.0),
        ("fleet_job_restarts_total{job=\"job-1\"}", 0.0, 0.0),
        ("fleet_checkpoints_recorded_total", 1.0, 1e4),
    ] {
        let value = coordinator[sample];
        assert!((least..=most).contains(&value), "{sample} is {value}");
    }
    for name in ["last_step", "started", "last_checkpoint"] {
        let at = coordinator[&format!("fleet_job_{name}_timestamp_seconds{{job=\"job-1\"}}")];
        assert!((1.7e9..1e11).contains(&at), "{name}: {at}");
    }
    assert!(!coordinator.contains_key("fleet_job_step{job=\"job-2\"}"), "it has not started");
    for (sample, least, most) in [
        ("fleet_worker_connected", 1.0, 1.0),
        ("fleet_worker_reconnects_total", 0.0, 0.0),
        ("fleet_worker_slots", 2.0, 2.0),
        ("fleet_worker_ranks", 2.0, 2.0),
        ("fleet_rank_step{job=\"job-1\",rank=\"0\"}", 20.0, 1e5),
        ("fleet_rank_step{job=\"job-1\",rank=\"1\"}", 20.0, 1e5),
        ("fleet_rank_resident_bytes{job=\"job-1\",rank=\"1\"}", 1e6, 1e11),
        ("fleet_rank_proportional_bytes{job=\"job-1\",rank=\"1\"}", 1e6, 1e11),
        ("fleet_rank_cpu_seconds_total{job=\"job-1\",rank=\"0\"}", 0.01, 1e5),
        ("fleet_rank_collective_bytes_total{job=\"job-1\",rank=\"0\"}", 1e5, 1e13),
        ("fleet_rank_collective_seconds_total{job=\"job-1\",rank=\"1\"}", 1e-6, 1e5),
        ("fleet_worker_job_loss{job=\"job-1\"}", 0.01, 20.0),
        ("fleet_worker_checkpoint_bytes_total", 1e5, 1e12),
        ("fleet_machine_cpus", 1.0, 1e4),
    ] {
        let value = worker[sample];
        assert!((least..=most).contains(&value), "{sample} is {value}");
    }

    for (at, definitions) in [(at, of_coordinator), (at_worker.as_str(), of_worker)] {
        let open = scrape(at, OPEN);
        assert_eq!(missing(&open, &definitions), Vec::<&str>::new());
        let said = get(at, "/metrics", OPEN).body;
        for definition in definitions.iter().filter(|definition| definition.at != At::Leader) {
            assert_eq!(said.matches(&format!("# TYPE {} ", definition.family())).count(), 1, "{said}");
        }
        let unknown = get(at, "/metrics", "application/x-unknown");
        assert!(unknown.head.contains("text/plain; version=0.0.4"), "{}", unknown.head);
    }
    world.run("fleet", &["cancel", "job-1", "--now", "--cluster", cluster.cluster()]).expect(0);
    eventually("their ends are counted", || {
        let now = scrape(at, TEXT);
        let ended = |outcome: &str| now[&format!("fleet_jobs_ended_total{{outcome=\"{outcome}\"}}")];
        ended("cancelled") == 1.0
            && ended("succeeded") == 1.0
            && !now.keys().any(|name| name.contains("job-1"))
    });
}

#[test]
fn prometheus_finds_all_that_can_be_scraped() {
    let world = World::new();
    let all = world.three_coordinators();
    let (_worker, at_worker) = worker(&world, &all[0]);
    let silent = world.path("silent");
    let mut command = world.command("worker");
    command.args(["join", &all[0].endpoint.quic, "--device", "cpu", "--token-file"]);
    command.arg(all[0].data_dir.join("tokens/worker.token")).arg("--data-dir").arg(silent);
    let mut silent = Running::start(command);
    silent.until("registration", |line| line["node"].is_string());
    let found = |asked: &Standing, kind: &str| -> Vec<(String, Value)> {
        let answer = get(&asked.endpoint.http, &format!("/api/v1/targets/{kind}"), "application/json");
        assert!(answer.head.to_lowercase().contains("content-type: application/json"), "{}", answer.head);
        let list = answer.json();
        let target = |one: &Value| (one["targets"][0].as_str().unwrap().to_owned(), one["labels"].clone());
        list.as_array().unwrap().iter().map(target).collect()
    };
    for asked in &all {
        eventually("the coordinators", || found(asked, "coordinators").len() == 3);
        let coordinators = found(asked, "coordinators");
        for (one, (target, labels)) in all.iter().zip(&coordinators) {
            assert_eq!(target, &one.endpoint.http);
            assert_eq!(labels["coordinator"], one.endpoint.replica.to_string());
        }
        eventually("the worker", || found(asked, "workers").len() == 1);
        let workers = found(asked, "workers");
        assert_eq!((&workers[0].0, &workers[0].1["node"]), (&at_worker, &Value::from("node-1")));
    }
    for (path, status) in [("/healthz", 200), ("/metrics", 200), ("/", 404)] {
        assert_eq!(get(&at_worker, path, "*/*").status, status, "{path}");
    }
}
