//! Every family through the engine: twenty steps of training as PyTorch takes them, and what is written afterwards reads back.

#![allow(clippy::unwrap_used)] // helpers of tests

#[path = "../../../tests/parity/cases.rs"]
mod cases;

use cases::{cases, golden, hyper, targets};
use fleet_checkpoint::{CONFIG_FILE, MODEL_FILE, ModelDir};
use fleet_cpu::Batch;
use fleet_rank::engine::{AdamW, Engine, Votes};
use fleet_rank::model::Model;
use safetensors::tensor::{Dtype, TensorView};

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
        let mut engine = Engine::<f32>::open(&golden().join(&case.name), 1, Some(shape[2])).unwrap();
        let (losses, norms) = (case.f64("losses"), case.f64("grad_norms"));
        for (step, ids) in ids.chunks(shape[1] * shape[2]).enumerate() {
            let targets = targets(ids, shape[2]);
            let batch = Batch { ids, targets: &targets, seq: shape[2] };
            let count = (shape[1] * (shape[2] - 1)) as u64;
            let batches = [batch].into_iter();
            let lr = hyper("learning_rate");
            let report = engine.step(batches, count, &adamw, lr, step as u64 + 1, Votes::default()).unwrap();
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
        let model = Model::of_dir(&case.model);
        std::fs::write(dir.path().join(CONFIG_FILE), serde_json::to_vec(&model.config_json()).unwrap())
            .unwrap();
        let weights = engine.stored_weights();
        let views = weights.refs().into_iter().map(|tensor| {
            (tensor.name, TensorView::new(Dtype::F32, tensor.shape.to_vec(), tensor.data).unwrap())
        });
        safetensors::serialize_to_file(views, None, &dir.path().join(MODEL_FILE)).unwrap();
        let again = ModelDir::open(dir.path()).unwrap();
        assert_eq!(
            (&again.decoder, &again.layout),
            (&case.model.decoder, &case.model.layout),
            "{}",
            case.name
        );
        let mut flat = vec![0.0; again.layout.len];
        again.read(&mut flat);
        assert!(flat == engine.weights(), "{}: the weights are others", case.name);
    }
}

#[test]
fn weights_of_another_model_are_refused() {
    let mut engine = Engine::<f32>::open(&golden().join("gpt2"), 1, None).unwrap();
    let error = engine.load_weights(&golden().join("opt")).unwrap_err().to_string();
    assert!(error.contains("the weights of another model than the job's"), "{error}");
}
