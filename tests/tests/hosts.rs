//! Training on several nodes, each with a network of its own.
//!
//! Skipped, with the reason printed, where network namespaces are not allowed.

#![allow(clippy::unwrap_used)] // in a test an unwrap is an assertion

use fleet_common::ids::JobId;
use fleet_common::protocol::{JobState, JobView, Reply, Request};
use fleet_tests::{Client, Coordinators, Network, TinyJob, World, eventually};

fn ended(client: &mut Client, job: JobId) -> JobView {
    let mut last = None;
    eventually("the job ends", || {
        if let Ok(Reply::Job(view)) = client.query(Request::Job(job)) {
            last = view.state.is_final().then_some(*view);
        }
        last.is_some()
    });
    last.unwrap()
}

#[test]
fn a_job_on_two_nodes_trains_as_on_one() {
    let world = World::new();
    // A coordinator and two nodes.
    let Some(network) = Network::new(3) else { return };
    let coordinators = Coordinators::on(&world, &network, 1);
    let _nodes = [coordinators.worker(1, 4), coordinators.worker(2, 2)];
    let jobs = [("1", "on-one", ""), ("2", "on-two", ""), ("2", "over-quic", "transport = \"quic\"")];
    let losses = jobs.map(|(nodes, run_name, more)| {
        let job = world.job(&TinyJob { run_name, more, ..TinyJob::default() }).display().to_string();
        let submitted = coordinators.ask(&["submit", "-n", "4", "--nodes", nodes, &job]);
        let id: JobId = submitted["job"].as_str().unwrap().parse().unwrap();
        let view = ended(&mut coordinators.any_client(), id);
        assert_eq!(view.state, JobState::Succeeded, "{nodes} nodes: {:?}", view.error);
        view.loss.unwrap()
    });
    assert!((losses[0] / losses[1] - 1.0).abs() < 1e-4, "{losses:?}");
    assert_eq!(losses[1], losses[2], "what carries the bytes changes none");
}

#[test]
fn nodes_that_disagree_are_refused_with_both_numbers() {
    let world = World::new();
    let job = world.job(&TinyJob { more: "num_nodes = 2", ..TinyJob::default() }).display().to_string();
    for args in [["--nodes", "3"], ["-n", "3"]] {
        let refused =
            world.run("fleet", &["submit", "--cluster", "nowhere:1", args[0], args[1], &job]).expect(2);
        let all = refused.all();
        assert!(all.contains('2') && all.contains('3') && all.contains("nodes"), "{all}");
    }
    let launched = world.run("fleet", &["launch", &job]).expect(2);
    assert!(launched.all().contains("`num_nodes` is 2") && launched.all().contains("fleet submit"));
}
