//! Training on preferences from the command line: beside a model, beside an adapter, and of whole models.

#![allow(clippy::unwrap_used)] // in a test an unwrap is an assertion

use fleet_tests::fine_tuning::{checkpoint, job, with_a_base};
use fleet_tests::{Finished, Running, World};
use serde_json::json;
use std::f64::consts::LN_2;
use std::fs;
use std::path::Path;

const DPO: &[&str] =
    &["task_name=dpo", "data.path=pairs.json", "max_seq_len=128", "max_steps=20", "eval_steps=10"];
const ADAPTER: &[&str] = &["adapter.r=4", "adapter.dropout=0.1", "lr=5e-3"];

/// Pairs of which a rule says the better answer.
fn pairs(count: usize) -> String {
    let words = ["harbour", "winter", "lantern", "river", "stone", "morning", "letters"];
    let row = |n: usize| {
        let (one, two) = (words[n % 7], words[n / 7 % 7]);
        json!({"prompt": format!("{one} {two}:"), "chosen": format!(" {one} {one}"), "rejected": format!(" the of {two}")})
    };
    serde_json::to_string(&(0..count).map(row).collect::<Vec<_>>()).unwrap()
}

fn launch(world: &World, ranks: &str, base: &Path, name: &str, sets: &[&[&str]]) -> Running {
    world.write("pairs.json", pairs(120));
    let file = job(world, base, name);
    let batch = format!("batch_size={}", 4 / ranks.parse::<usize>().unwrap());
    let all: Vec<&str> = [DPO, &[&batch], &sets.concat()].concat();
    let sets: Vec<&str> = all.into_iter().flat_map(|set| ["--set", set]).collect();
    world.start("fleet", &[&["launch", "-n", ranks, "--json", &file], &sets[..]].concat())
}

/// A metric of the last event that has it.
fn last(done: &Finished, name: &str) -> f64 {
    let found = done.events("metrics").iter().rev().find_map(|event| event["values"][name].as_f64());
    found.unwrap_or_else(|| panic!("no {name}: {}", done.all()))
}

fn are_close(one: &Finished, other: &Finished, what: &str) {
    let (one, other) = (one.losses(), other.losses());
    assert_eq!(one.len(), other.len(), "{what}");
    for (a, b) in one.iter().zip(other) {
        assert!((a.1 - b.1).abs() <= 2e-4 * a.1.max(0.1), "{what}, step {}: {} and {}", a.0, a.1, b.1);
    }
}

/// The model is its own reference as it begins, and learns.
fn learns(done: &Finished) {
    let losses = done.losses();
    assert!((losses[0].1 - LN_2).abs() < 1e-6, "{losses:?}");
    assert!(losses[19].1 < 0.6, "{losses:?}");
    assert!(
        last(done, "eval_rewards/accuracies") > 0.8 && last(done, "rewards/margins") > 0.0,
        "{}",
        done.all()
    );
}

#[test]
fn preferences_are_learnt_alike_on_any_number_of_ranks() {
    let (world, base) = with_a_base();
    let launch = |ranks, name, more| launch(&world, ranks, &base, name, &[ADAPTER, more]).finish().expect(0);
    let one = launch("1", "one", &[]);
    learns(&one);
    for (ranks, name, more) in [
        ("2", "ddp", &["strategy=ddp"][..]),
        ("2", "fsdp", &["accumulate_grad_batches=2", "batch_size=1", "strategy=fsdp"]),
        // Asked once instead of in every step.
        ("2", "asked", &["dpo.precompute_ref_log_probs=true"]),
    ] {
        are_close(&one, &launch(ranks, name, more), name);
    }
}

/// Its reference is the model as it begins, which no checkpoint has any more.
#[test]
fn a_whole_model_that_learns_preferences_is_resumed_bit_for_bit() {
    let (world, base) = with_a_base();
    let whole = ["lr=2e-3", "strategy=fsdp"];
    let one = launch(&world, "2", &base, "whole", &[&whole]).finish().expect(0);
    learns(&one);
    let mut killed = launch(&world, "2", &base, "killed", &[&whole]);
    killed.until("checkpoint", |line| line["event"] == "checkpoint" && line["path"].is_string());
    world.strike_all();
    killed.finish().expect(128 + 9);
    world.is_empty_soon();
    let resume = ["resume_from_checkpoint=latest"];
    let resumed = launch(&world, "2", &base, "killed", &[&whole, &resume]).finish().expect(0);
    let (losses, all) = (resumed.losses(), one.losses());
    assert_eq!(losses, all[losses[0].0 as usize - 1..]);
    // The same with libtorch's operations.
    are_close(
        &one,
        &launch(&world, "1", &base, "torch", &[&whole[..1], &["executor=torch"]]).finish().expect(0),
        "torch",
    );

    // What it was compared with is gone.
    let reference = checkpoint(&resumed).join("reference_logps.safetensors");
    assert!(reference.exists());
    let no_reference = ["lr=2e-3", "dpo.loss_type=orpo"];
    let odds = launch(&world, "2", &base, "odds", &[&no_reference]).finish().expect(0);
    assert!(odds.losses()[19].1 < 0.8 * odds.losses()[0].1, "{:?}", odds.losses());
    let went_on = format!("resume_from_checkpoint={}", checkpoint(&odds).display());
    let more = [&went_on, "max_steps=40"];
    let refused = launch(&world, "2", &base, "odds", &[&whole[..1], &more]).finish().expect(2);
    assert!(refused.all().contains("has no reference_logps.safetensors"), "{}", refused.all());
}

/// After a first training the adapter as it is then is the reference, and not the model without it.
#[test]
fn an_adapter_that_goes_on_is_compared_with_itself_as_it_was() {
    let (world, base) = with_a_base();
    let first = launch(&world, "1", &base, "first", &[ADAPTER]).finish().expect(0);
    let path = format!("adapter.path={}", checkpoint(&first).display());
    let more = [&path, "lr=5e-3", "dpo.beta=0.3"];
    let second = launch(&world, "2", &base, "second", &[&more]).finish().expect(0);
    let losses = second.losses();
    assert!((losses[0].1 - LN_2).abs() < 1e-5 && losses[19].1 < LN_2, "{losses:?}");
    let files = fs::read_dir(checkpoint(&second)).unwrap().map(|file| file.unwrap().file_name());
    assert!(files.into_iter().any(|name| name == "reference_logps.safetensors"));
}
