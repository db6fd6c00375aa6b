//! Fine-tuning beside the trainers of TRL (tests/parity/trainers.py made the files): the same rows, the same adapter, twenty steps.

#![allow(clippy::unwrap_used)] // helpers of tests

use fleet_common::job::{self, Job, Precision};
use fleet_data::{DataFiles, TokenCache};
use fleet_learn::model::Model;
use fleet_learn::preference::{Beside, Preferences, REFERENCE_FILE, Reference, Share};
use fleet_learn::trainer::learning_rate;
use fleet_learn::{AdamW, Learner, NextToken, Objective, TokenBatch, Update, Votes, Weighing, Which};
use fleet_rank::assemble::{Threads, alone};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

const STEPS: u64 = 20;

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/parity/golden")
}

fn expected() -> Value {
    serde_json::from_slice(&std::fs::read(golden().join("trl/expected.json")).unwrap()).unwrap()
}

/// What the trainers had, as a job: rows of the case in a directory of its own.
fn job_of(case: &Value, rows: &Value, dir: &Path) -> Job {
    std::fs::write(dir.join("rows.json"), rows.to_string()).unwrap();
    let is_packed = case["job"]["packing"] == true;
    let mut file = json!({
        "task_name": if case.get("dpo").is_some() { "dpo" } else { "sft" },
        "model": {"path": golden().join("foreign/byte_level")},
        "adapter": {"path": golden().join("trl/adapter"), "dropout": 0.0},
        "data": {"path": "rows.json", "chat_template": if case["rows"] == "messages" { "chatml" } else { "none" }, "validation_fraction": 0},
        "output_dir": "out",
        "max_seq_len": case["max_length"].as_u64().unwrap_or(4096),
        "batch_size": if is_packed { 1 } else { 2 },
        "accumulate_grad_batches": 2,
        "max_steps": STEPS,
        "optimizer": {"learning_rate": 5e-3, "schedule": "cosine", "warmup_steps": 3, "weight_decay": 0.01, "beta2": 0.999, "max_grad_norm": 1.0},
    });
    for (key, value) in case["job"].as_object().into_iter().flatten() {
        file["data"][key] = value.clone();
    }
    if let Some(dpo) = case.get("dpo") {
        file["dpo"] = dpo.clone();
    }
    let path = dir.join("job.json");
    std::fs::write(&path, file.to_string()).unwrap();
    job::load(&path, &[], dir).unwrap_or_else(|e| panic!("{e}\n{file}")).0
}

/// A run of a case, without a trainer.
struct Run {
    job: Job,
    cache: TokenCache,
    learner: Box<dyn Learner>,
    objective: Box<dyn Objective>,
    /// The items that were taken.
    taken: u64,
    step: u64,
    /// How far embeddings are moved.
    neftune: f32,
    _dir: tempfile::TempDir,
}

impl Run {
    fn new(executor: job::Executor, case: &Value, rows: &Value, is_measured: bool) -> Run {
        let dir = tempfile::tempdir().unwrap();
        let job = job_of(case, &rows[case["rows"].as_str().unwrap()], dir.path());
        let files = DataFiles::find(&job, &|_| {}).unwrap();
        let (cache, _) = TokenCache::build_or_open(&job, &files, &|_| {}).unwrap();
        let model = Model::of_job(&job).unwrap();
        let threads = Threads { count: 2, again: 0 };
        let mut learner = alone(executor, Precision::Fp32, &model, threads, 4096).unwrap();
        // It changes nothing as it begins.
        learner.load_weights(&golden().join("trl/adapter")).unwrap();
        let beside = if is_measured {
            let share = Share { rank: 0, world: 1, batch_size: 3 };
            let mut told = Vec::new();
            let tell = &mut |done, of| {
                told.push((done, of));
                true
            };
            let reference =
                Reference::measure(&mut *learner, Which::Trained, &cache, &share, tell).unwrap().unwrap();
            assert_eq!(told.last(), Some(&(cache.train().len(), cache.train().len())));
            std::fs::write(dir.path().join(REFERENCE_FILE), reference.to_bytes()).unwrap();
            assert_eq!(Reference::read(dir.path(), &cache).unwrap(), Some(reference.clone()));
            Beside::Reference(reference)
        } else {
            Beside::Base
        };
        let objective: Box<dyn Objective> = match job.dpo.clone() {
            None => Box::new(NextToken),
            Some(dpo) => Box::new(Preferences { dpo, beside }),
        };
        Run { job, cache, learner, objective, taken: 0, step: 0, neftune: 0.0, _dir: dir }
    }

    /// The next step, of so many micro-batches of so many items: what is known of it by TRL's names.
    fn step(&mut self, micro_batches: u64, items: u64) -> Vec<(&'static str, f64)> {
        let mut batch = || {
            let mut numbers = self.taken..self.taken + items;
            self.taken += items;
            let batch = self.objective.batch(self.cache.train(), &mut numbers);
            TokenBatch { neftune: self.neftune, ..batch }.filled()
        };
        let mut batches: Vec<TokenBatch> = (0..micro_batches).map(|_| batch()).collect();
        let mut weighing = self.objective.weighing(&mut *self.learner, &mut batches).unwrap();
        let lr = learning_rate(&self.job.optimizer, self.step, STEPS);
        self.step += 1;
        let update = Update { adamw: AdamW::from(&self.job.optimizer), lr, step: self.step };
        let weigh = weighing.as_deref_mut().map(|weighing| weighing as &mut dyn Weighing);
        let report = self.learner.weighed_step(&batches, weigh, &update, Votes::default()).unwrap();
        let measured = weighing.map(|weighing| weighing.measured(self.learner.gang()).unwrap());
        let (loss, more) = measured.map_or((report.loss, Vec::new()), |of| (of.loss, of.metrics));
        [("learning_rate", lr), ("loss", loss), ("grad_norm", report.grad_norm)]
            .into_iter()
            .chain(more)
            .collect()
    }
}

#[test]
fn twenty_steps_are_those_of_trl() {
    let expected = expected();
    let cases = expected["cases"].as_object().unwrap();
    assert_eq!(cases.len(), 8);
    for (name, case) in cases {
        let executors = [job::Executor::Cpu, job::Executor::Torch];
        for (executor, is_measured) in executors.into_iter().flat_map(|one| [(one, false), (one, true)]) {
            if is_measured && name != "dpo_sigmoid" {
                continue;
            }
            let mut run = Run::new(executor, case, &expected["rows"], is_measured);
            let (micro_batches, items) =
                (u64::from(run.job.accumulate_grad_batches), u64::from(run.job.batch_size));
            for step in 0..STEPS {
                let found = run.step(micro_batches, items);
                assert_eq!(found.len(), if run.job.dpo.is_some() { 9 } else { 3 });
                for (key, is) in found {
                    let wanted = case[key][step as usize].as_f64().unwrap();
                    let off = (is - wanted).abs() / wanted.abs().max(1.0);
                    assert!(
                        off < 1e-4,
                        "{name} by {executor:?}, step {step}: {key} is {is}, of TRL {wanted}"
                    );
                }
            }
        }
    }
}

/// Rows of different lengths count by their tokens, and pairs each the same, however they are divided.
#[test]
fn eight_at_once_are_eight_one_after_the_other() {
    let expected = expected();
    for (name, executor) in [
        ("sft_answers", job::Executor::Cpu),
        ("sft_completions", job::Executor::Cpu),
        ("dpo_sigmoid", job::Executor::Cpu),
        ("dpo_sigmoid", job::Executor::Torch),
    ] {
        let case = &expected["cases"][name];
        let mut first = Vec::new();
        for neftune in [0.0, 10.0] {
            let run = || Run { neftune, ..Run::new(executor, case, &expected["rows"], false) };
            let mut runs = [(1, 8), (8, 1), (2, 4)].map(|how| (how, run()));
            for step in 0..5 {
                let found =
                    runs.each_mut().map(|((micro_batches, items), run)| run.step(*micro_batches, *items));
                for ((key, is), (_, wanted)) in found[1..].iter().flatten().zip(found[0].iter().cycle()) {
                    assert!(
                        (is - wanted).abs() < 1e-5 * wanted.abs().max(1.0),
                        "{name}: {key} {is} {wanted}"
                    );
                }
                if step == 0 {
                    first.push(found[0].iter().find(|(key, _)| *key == "grad_norm").unwrap().1);
                }
            }
        }
        assert!((first[0] - first[1]).abs() > 1e-4 * first[0], "{name}: noise moves something: {first:?}");
    }
}
