//! The end of an epoch of rows: what fills no step makes a smaller one, on any number of ranks.

#![allow(clippy::unwrap_used)] // a test may panic

mod gang;

use fleet_common::events::Outcome;
use fleet_common::job::{Executor, Job, parse_toml};
use serde_json::{Value, json};
use std::fs;
use std::path::Path;

const ROWS: usize = 13;

/// Thirteen rows of several lengths, of which a step takes four: one is left at the end of each epoch.
fn job(dir: &Path, world: u32, row: fn(usize) -> Value, more: &str) -> Job {
    let rows: Vec<Value> = (0..ROWS).map(row).collect();
    fs::write(dir.join("rows.json"), json!(rows).to_string()).unwrap();
    let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/parity/golden/foreign/byte_level");
    let micro = 4 / world;
    let text = format!(
        r#"
        run_name = "run"
        output_dir = "out"
        epochs = 2
        batch_size = 1
        accumulate_grad_batches = {micro}
        max_seq_len = 64
        logging_steps = 1
        threads_per_rank = 1
        eval_steps = 0
        executor = "cpu"
        {more}
        model = {{ path = "{}" }}
        optimizer = {{ lr = 1e-3 }}
        checkpoint = {{ save_steps = 3, save_total_limit = 9 }}
        [data]
        path = "rows.json"
        chat_template = "none"
        validation_fraction = 0
        "#,
        base.display()
    );
    parse_toml(&text, dir).map_err(|e| e.to_string()).unwrap().0
}

fn answer(at: usize) -> Value {
    json!({"prompt": format!("river {at}:"), "completion": " it runs and runs".repeat(1 + at % 3)})
}

fn pair(at: usize) -> Value {
    json!({"prompt": format!("river {at}:"), "chosen": " it runs".repeat(1 + at % 3), "rejected": " no"})
}

fn losses(job: &Job, world: u32) -> Vec<f64> {
    let done = gang::launch(job, world, None, None);
    for outcome in &done.outcomes {
        assert!(matches!(outcome, Ok(Outcome::Succeeded { .. })), "{outcome:?}");
    }
    done.losses()
}

#[test]
fn the_rest_of_an_epoch_is_learnt_alike_by_any_number_of_ranks() {
    let adapter = "adapter = { r = 4, dropout = 0.1 }";
    for (row, task, more) in [
        (answer as fn(usize) -> Value, "sft", ""),
        (answer, "sft", adapter),
        (pair, "dpo", adapter),
        (pair, "dpo", ""),
    ] {
        let mut one = Vec::new();
        for (world, strategy) in [(1, "ddp"), (2, "fsdp"), (4, "ddp"), (4, "fsdp")] {
            let dir = tempfile::tempdir().unwrap();
            let more = format!("task_name = \"{task}\"\nstrategy = \"{strategy}\"\n{more}");
            let found = losses(&job(dir.path(), world, row, &more), world);
            assert_eq!(found.len(), 2 * ROWS.div_ceil(4), "{task} on {world}");
            one = if one.is_empty() { found.clone() } else { one };
            let near = |(a, b): (&f64, &f64)| (a - b).abs() < 1e-4 * a.abs().max(0.1);
            assert!(one.iter().zip(&found).all(near), "{task}, {world} of {strategy}: {one:?} and {found:?}");
        }
    }
}

#[test]
fn a_run_goes_on_from_the_middle_of_an_epoch_bit_for_bit() {
    for packing in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let more = format!("task_name = \"sft\"\npacking = {packing}");
        let job = job(dir.path(), 2, answer, &more);
        let whole = gang::launch(&job, 2, None, None);
        let steps = whole.losses().len();
        assert!(if packing { (2..8).contains(&steps) } else { steps == 8 }, "{steps}");
        let first = whole.checkpoints().into_iter().next().unwrap();
        let moved = first.path.replace("step-0000000", "kept-");
        fs::rename(&first.path, &moved).unwrap();
        let rest = gang::launch(&job, 2, Some(&moved), None);
        assert_eq!(rest.losses(), whole.losses()[first.step as usize..], "{:?}", rest.outcomes);
    }
}

#[test]
fn a_job_may_leave_the_rest_out() {
    let dir = tempfile::tempdir().unwrap();
    let job = job(dir.path(), 1, answer, "task_name = \"sft\"\ndrop_last = true");
    assert_eq!(losses(&job, 1).len(), 2 * (ROWS / 4));
}

/// Which pairs are computed together changes the last bits, and nothing else does: alone in their batches they have the same reference, whenever it
/// is asked.
#[test]
fn a_reference_that_is_asked_before_is_the_one_that_is_asked_in_each_step() {
    for (batch, precision, off) in [(1, "32", 0.0), (1, "bf16-mixed", 0.0), (2, "32", 1e-6)] {
        let [before, in_steps] = [true, false].map(|asked| {
            let dir = tempfile::tempdir().unwrap();
            let more = format!(
                "task_name = \"dpo\"\ndpo = {{ precompute_ref_log_probs = {asked} }}\nprecision = \"{precision}\"\nadapter = {{ r = 4 }}"
            );
            let job = Job {
                executor: Executor::Torch,
                batch_size: batch,
                accumulate_grad_batches: 4 / batch,
                ..job(dir.path(), 1, pair, &more)
            };
            losses(&job, 1)
        });
        let near = |(a, b): (&f64, &f64)| (a - b).abs() <= off;
        assert!(before.iter().zip(&in_steps).all(near), "{batch}, {precision}: {before:?} and {in_steps:?}");
    }
}
