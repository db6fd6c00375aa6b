//! Training on preferences from the command line: beside a model, beside an adapter, and of whole models.

#![allow(clippy::unwrap_used)] // in a test an unwrap is an assertion

use fleet_tests::fine_tuning::{self, are_close, checkpoint, job, pairs, whole_and_resumed, with_a_base};
use fleet_tests::{Finished, Running, World};
use std::f64::consts::LN_2;
use std::fs;
use std::path::Path;

const DPO: &[&str] =
    &["task_name=dpo", "data.path=pairs.json", "max_seq_len=128", "max_steps=20", "eval_steps=10"];
const ADAPTER: &[&str] = &["adapter.r=4", "adapter.dropout=0.1", "lr=5e-3"];

fn launch(world: &World, ranks: &str, base: &Path, name: &str, sets: &[&[&str]]) -> Running {
    world.write("pairs.json", pairs(120));
    let file = job(world, base, name);
    let batch = format!("batch_size={}", 4 / ranks.parse::<usize>().unwrap());
    fine_tuning::launch(world, ranks, &file, &[DPO, &[&batch], &sets.concat()])
}

/// A metric of the last event that has it.
fn last(done: &Finished, name: &str) -> f64 {
    let found = done.events("metrics").iter().rev().find_map(|event| event["values"][name].as_f64());
    found.unwrap_or_else(|| panic!("no {name}: {}", done.all()))
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
        ("4", "ddp", &["strategy=ddp"][..]),
        ("4", "fsdp", &["strategy=fsdp"]),
        ("2", "accumulated", &["accumulate_grad_batches=2", "batch_size=1", "strategy=fsdp"]),
        // Asked once instead of in every step.
        ("2", "asked", &["dpo.precompute_ref_log_probs=true"]),
    ] {
        are_close(&one.losses(), &launch(ranks, name, more).losses(), 2e-4, name);
    }
}

/// Its reference is the model as it begins, which no checkpoint has any more.
#[test]
fn a_whole_model_that_learns_preferences_is_resumed_bit_for_bit() {
    let (world, base) = with_a_base();
    let whole = ["lr=2e-3", "strategy=fsdp"];
    let [one, resumed] =
        whole_and_resumed(&world, |name, more| launch(&world, "2", &base, name, &[&whole, more]));
    learns(&one);
    // The same with libtorch's operations.
    let torch = launch(&world, "1", &base, "torch", &[&whole[..1], &["executor=torch"]]).finish().expect(0);
    are_close(&one.losses(), &torch.losses(), 2e-4, "torch");

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
