//! Every family through the engine: twenty steps of training as PyTorch takes them, and what is written afterwards reads back.

#![allow(clippy::unwrap_used)] // helpers of tests

#[path = "../../../tests/parity/cases.rs"]
mod cases;

use cases::{cases, golden, hyper, targets};
use fleet_checkpoint::{CONFIG_FILE, Claim, Disks, ModelDir, RunDir, Writer};
use fleet_learn::model::Model;
use fleet_learn::{AdamW, Learner, TokenBatch, Update, Votes};
use fleet_rank::assemble::solo;
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
