//! Every family through the engine: twenty steps of training as PyTorch takes them, and what is written afterwards reads back.

#![allow(clippy::unwrap_used)] // helpers of tests

#[path = "../../../tests/parity/cases.rs"]
mod cases;

use cases::{cases, golden, hyper, targets};
use fleet_checkpoint::{CONFIG_FILE, Claim, Disks, ModelDir, RunDir, Writer};
use fleet_common::job::{self, Precision};
use fleet_learn::model::Model;
use fleet_learn::{AdamW, Learner, TokenBatch, Update, Votes};
use fleet_rank::assemble::{Threads, alone, solo};
use std::path::Path;

#[test]
fn training_is_pytorchs_and_what_is_written_reads_back() {
    let adamw = AdamW {
        beta1: hyper("beta1"),
        beta2: hyper("beta2"),
        eps: hyper("eps"),
        weight_decay: hyper("weight_decay"),
        max_grad_norm: hyper("max_grad_norm"),
    };
    for case in cases() {
        let (ids, shape) = case.ids("batches");
        let model = Model::of_dir(&case.model);
        let mut engine = solo::<f32>(&model, 1, shape[2]).unwrap();
        engine.load_weights(&golden().join(&case.name)).unwrap();
        let (losses, norms) = (case.f64("losses"), case.f64("grad_norms"));
        for (step, ids) in ids.chunks(shape[1] * shape[2]).enumerate() {
            let targets = targets(ids, shape[2]);
            let batch = TokenBatch { ids: ids.to_vec(), targets, seq: shape[2], ..Default::default() };
            let update = Update { adamw, lr: hyper("learning_rate"), step: step as u64 + 1 };
            let report = engine.step(&[batch], &update, Votes::default()).unwrap();
            let close = |a: f64, b: f64, tolerance: f64| (a - b).abs() < tolerance * b.abs().max(1.0);
            let (loss, norm) = (report.loss, report.grad_norm);
            assert!(
                close(loss, losses[step], 1e-4),
                "{} step {step}: loss {loss}, {}",
                case.name,
                losses[step]
            );
            assert!(
                close(norm, norms[step], 1e-4),
                "{} step {step}: norm {norm}, {}",
                case.name,
                norms[step]
            );
        }

        let dir = tempfile::tempdir().unwrap();
        let claim =
            Claim { dir: dir.path(), run: "r", resumed: None, overwrite: false, until: None, reads: &[] };
        let run_dir = RunDir::claim(&claim).unwrap();
        let mut writer = Writer::begin(&run_dir, 20).unwrap();
        engine.snapshot(&Disks::one(1), None).unwrap().write(writer.part()).unwrap();
        writer.write_bytes(CONFIG_FILE, &serde_json::to_vec(&model.config_json()).unwrap()).unwrap();
        let record = writer.finish(1.0).unwrap();
        let written = Path::new(&record.path);
        let again = ModelDir::open(written).unwrap();
        assert_eq!(
            (&again.decoder, &again.layout),
            (&case.model.decoder, &case.model.layout),
            "{}",
            case.name
        );
        let mut flat = vec![0.0; again.layout.len];
        again.read(&mut flat).unwrap();
        assert!(flat[..] == engine.weights().unwrap()[..], "{}: the weights are others", case.name);
        let mut other = solo::<f32>(&Model::of_dir(&again), 1, shape[2]).unwrap();
        other.load_weights(written).unwrap();
        other.load_optimizer(written).unwrap();
        let batch = [TokenBatch::of_windows(&ids[..shape[2]], shape[2])];
        let update = Update { adamw, lr: hyper("learning_rate"), step: 21 };
        let next = |engine: &mut dyn Learner| engine.step(&batch, &update, Votes::default()).unwrap();
        assert_eq!(next(&mut engine), next(&mut other), "{}", case.name);
        assert!(
            engine.weights().unwrap() == other.weights().unwrap(),
            "{}: the optimizer is another",
            case.name
        );
    }
}

#[test]
fn weights_of_another_model_are_refused() {
    let mut engine = solo::<f32>(&Model::read(&golden().join("gpt2")).unwrap(), 1, 8).unwrap();
    let error = engine.load_weights(&golden().join("opt")).unwrap_err().to_string();
    assert!(error.contains("the weights of another model than the job's"), "{error}");
}

/// A batch of sequences of different lengths, and what is computed with each alone.
#[test]
fn sequences_of_different_lengths_are_as_each_alone() {
    let lengths = [5, 1, 12, 3, 7, 2];
    for case in cases() {
        let (ids, _) = case.ids("batches");
        let model = Model::of_dir(&case.model);
        let mut at = 0;
        let sequences: Vec<(Vec<i64>, Vec<i64>)> = lengths
            .iter()
            .map(|length| {
                at += length;
                let ids = &ids[at - length..at];
                // The last target is there, so that a wrong order is seen.
                let targets = ids[1..].iter().chain([&ids[0]]).copied().collect();
                (ids.to_vec(), targets)
            })
            .collect();
        let all = TokenBatch::of_sequences(sequences.iter().map(|(ids, targets)| (&ids[..], &targets[..])));
        let each: Vec<TokenBatch> = sequences
            .iter()
            .map(|(ids, targets)| TokenBatch {
                seq: ids.len(),
                ids: ids.clone(),
                targets: targets.clone(),
                ..Default::default()
            })
            .collect();
        let adamw = AdamW { beta1: 0.9, beta2: 0.99, eps: 1e-8, weight_decay: 0.0, max_grad_norm: 0.0 };
        let update = Update { adamw, lr: 1e-2, step: 1 };
        for executor in [job::Executor::Cpu, job::Executor::Torch] {
            for count in [1, 2] {
                let made = || {
                    let threads = Threads { count, again: 0 };
                    let mut learner = alone(executor, Precision::Fp32, &model, threads, 32).unwrap();
                    learner.load_weights(&golden().join(&case.name)).unwrap();
                    learner
                };
                let (mut one, mut several) = (made(), made());
                let (a, b) =
                    (one.evaluate(std::slice::from_ref(&all)).unwrap(), several.evaluate(&each).unwrap());
                assert!(
                    (a.loss - b.loss).abs() < 1e-4 && a.tokens == b.tokens,
                    "{} {executor:?}: {a:?} {b:?}",
                    case.name
                );
                let a = one.step(std::slice::from_ref(&all), &update, Votes::default()).unwrap();
                let b = several.step(&each, &update, Votes::default()).unwrap();
                let off = (a.grad_norm - b.grad_norm).abs() / b.grad_norm;
                assert!(
                    off < 1e-4 && (a.loss - b.loss).abs() < 1e-5,
                    "{} {executor:?}: {a:?} {b:?}",
                    case.name
                );
            }
        }
    }
}
