//! Training on several nodes, each with a network of its own.
//!
//! Skipped, with the reason printed, where network namespaces are not allowed.

#![allow(clippy::unwrap_used)] // in a test an unwrap is an assertion

use fleet_common::ids::JobId;
use fleet_common::protocol::{JobState, JobView, Reply, Request};
use fleet_tests::fine_tuning::{are_close, instructions, job, pairs, sets, with_a_base};
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
fn a_job_on_two_nodes_trains_as_on_one_under_every_strategy() {
    let world = World::new();
    // A coordinator and two nodes.
    let Some(network) = Network::new(3) else { return };
    let coordinators = Coordinators::on(&world, &network, 1);
    let _nodes = [coordinators.worker(1, 4), coordinators.worker(2, 2)];
    let loss = |nodes: &str, run_name: &'static str, more: &'static str| {
        let job = world.job(&TinyJob { run_name, more, ..TinyJob::default() }).display().to_string();
        let submitted = coordinators.ask(&["submit", "-n", "4", "--nodes", nodes, &job]);
        let id: JobId = submitted["job"].as_str().unwrap().parse().unwrap();
        let view = ended(&mut coordinators.any_client(), id);
        assert_eq!(view.state, JobState::Succeeded, "{run_name}: {:?}", view.error);
        view.loss.unwrap()
    };
    let one = loss("1", "one-node", "");
    let strategies = [
        ("ddp", "strategy = \"ddp\""),
        ("fsdp", "strategy = \"fsdp\""),
        ("fsdp-bf16", "strategy = \"fsdp\"\nprecision = \"bf16-mixed\""),
        ("over-quic", "transport = \"quic\""),
        ("hsdp", "strategy = \"hsdp\""),
        ("torch", "executor = \"torch\"\nstrategy = \"fsdp\""),
        ("torch-ddp", "executor = \"torch\"\nstrategy = \"ddp\""),
        ("torch-hsdp", "executor = \"torch\"\nstrategy = \"hsdp\""),
        ("torch-bf16", "executor = \"torch\"\nstrategy = \"fsdp\"\nprecision = \"bf16-mixed\""),
    ];
    for (name, more) in strategies {
        let (two, tolerance) = (loss("2", name, more), if name.contains("bf16") { 1e-2 } else { 1e-4 });
        assert!((one / two - 1.0).abs() < tolerance, "{name}: {one} on one node, {two} on two");
    }
}

/// Of rows and of pairs, beside a model in four bits that lies once on each node.
#[test]
fn an_adapter_on_two_nodes_learns_as_on_one() {
    let (world, base) = with_a_base();
    world.write("rows.json", instructions(120));
    world.write("pairs.json", pairs(120));
    let Some(network) = Network::new(3) else { return };
    let coordinators = Coordinators::on(&world, &network, 1);
    let _nodes = [coordinators.worker(1, 4), coordinators.worker(2, 2)];
    let cluster = coordinators.data_dir(0).display().to_string();
    let losses = |nodes: &str, name: &str, more: &[&str]| {
        let file = job(&world, &base, name);
        let usual = ["adapter.r=4", "lr=5e-3", "batch_size=1", "max_steps=10", "quantization=nf4"];
        let args = ["submit", "-n", "4", "--nodes", nodes, &file, "--wait", "--json", "--cluster", &cluster];
        world.run("fleet", &[&args, &sets(&[&usual, more])[..]].concat()).expect(0).losses()
    };
    let sft = ["task_name=sft", "data.path=rows.json", "data.packing=true", "max_seq_len=384"];
    let dpo = ["task_name=dpo", "data.path=pairs.json", "max_seq_len=128"];
    for (task, of, strategies) in
        [("sft", &sft[..], &["ddp", "fsdp", "hsdp"][..]), ("dpo", &dpo, &["ddp", "fsdp"])]
    {
        let one = losses("1", task, of);
        assert!(one.len() == 10 && one[9].1 < one[0].1, "{task}: {one:?}");
        for strategy in strategies {
            let (name, with) = (format!("{task}-{strategy}"), format!("strategy={strategy}"));
            are_close(&one, &losses("2", &name, &[of, &[&with]].concat()), 2e-4, &name);
        }
    }
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
