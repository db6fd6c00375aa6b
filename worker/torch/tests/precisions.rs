//! Training in 16 bits against PyTorch: a model in bf16, and fp16 products with a loss scale (golden files of tests/parity/generate.py).

#![allow(clippy::unwrap_used)] // helpers of tests

mod common;

use common::devices;
use fleet_checkpoint::{Dtype, LossScale, ModelDir, Tensors};
use fleet_learn::{AdamW, Engine, Learner, Report, TokenBatch, Update, Votes};
use fleet_torch::{Numbers, Solo, TorchExecutor};
use std::path::{Path, PathBuf};
use tch::Device;

const MODELS: [&str; 2] = ["gqa", "tied"];

/// In this clone, or where FLEET_GOLDEN (which names the families beside them) says.
fn golden() -> PathBuf {
    let here = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/parity/golden");
    std::env::var_os("FLEET_GOLDEN").map_or_else(here, |dir| Path::new(&dir).join(".."))
}

fn adamw() -> AdamW {
    let file = std::fs::read(golden().join("hyper.json")).unwrap();
    let json: serde_json::Value = serde_json::from_slice(&file).unwrap();
    let of = |key: &str| json[key].as_f64().unwrap();
    AdamW {
        beta1: of("beta1"),
        beta2: of("beta2"),
        eps: of("eps"),
        weight_decay: of("weight_decay"),
        max_grad_norm: of("max_grad_norm"),
    }
}

/// What PyTorch did.
struct Run {
    dir: PathBuf,
    tensors: Tensors,
}

impl Run {
    fn open(model: &str, kind: &str) -> Run {
        let dir = golden().join(model);
        let tensors = Tensors::open(&dir.join(format!("train_{kind}.safetensors"))).unwrap();
        Run { dir, tensors }
    }

    fn numbers(&self, name: &str) -> Vec<f64> {
        let tensor = self.tensors.get(name).unwrap();
        assert_eq!(tensor.dtype, Dtype::F64);
        tensor.data().unwrap().as_chunks::<8>().0.iter().map(|bytes| f64::from_le_bytes(*bytes)).collect()
    }

    fn learner(&self, device: Device, numbers: Numbers) -> Engine<fleet_torch::Tensors> {
        let model = ModelDir::open(&self.dir).unwrap();
        let executor = TorchExecutor::new(model.decoder.clone(), model.wiring(), device, numbers);
        Engine::new(executor, Solo::new(model.layout, device, numbers, 1).unwrap())
    }

    /// The same steps, each with the loss scale after it.
    fn train(&self, learner: &mut dyn Learner) -> Vec<(Report, Option<f64>)> {
        learner.load_weights(&self.dir).unwrap();
        let tensor = self.tensors.get("batches").unwrap();
        let [_, batch, seq] = tensor.shape[..] else { panic!("steps, batch, sequence") };
        let ids: Vec<i64> = tensor
            .data()
            .unwrap()
            .as_chunks::<8>()
            .0
            .iter()
            .map(|bytes| i64::from_le_bytes(*bytes))
            .collect();
        let steps = ids.chunks_exact(batch * seq).zip(self.numbers("learning_rates")).zip(1..);
        steps
            .map(|((tokens, lr), step)| {
                let batches = [TokenBatch::of_windows(tokens, seq)];
                let update = Update { adamw: adamw(), lr, step };
                let report = learner.step(&batches, &update, Votes::default()).unwrap();
                (report, learner.loss_scale().map(|scale| scale.scale))
            })
            .collect()
    }
}

fn close(got: f64, want: f64, tolerance: f64) -> bool {
    (got / want - 1.0).abs() < tolerance
}

#[test]
fn a_model_in_bf16_learns_as_pytorchs() {
    for device in devices() {
        for model in MODELS {
            let run = Run::open(model, "bf16_true");
            let (losses, norms) = (run.numbers("losses"), run.numbers("grad_norms"));
            let mut learner = run.learner(device, Numbers::BF16_TRUE);
            for (step, (report, _)) in run.train(&mut learner).into_iter().enumerate() {
                let what = format!(
                    "{model} on {device:?}, step {step}: {report:?}, {} {}",
                    losses[step], norms[step]
                );
                assert!(close(report.loss, losses[step], 1e-2), "{what}");
                assert!(close(report.grad_norm, norms[step], 5e-2), "{what}");
            }
        }
    }
}

#[test]
fn losses_in_fp16_are_scaled_as_by_pytorchs_grad_scaler() {
    for device in devices() {
        for model in MODELS {
            let run = Run::open(model, "fp16");
            let [losses, norms, scales] = ["losses", "grad_norms", "scales"].map(|name| run.numbers(name));
            let mut learner = run.learner(device, Numbers::FP16_MIXED).scaling_losses();
            learner.set_loss_scale(LossScale { scale: 2f64.powi(22), good_steps: 0, skipped: 0 });
            let mut skipped = 0;
            for (step, (report, scale)) in run.train(&mut learner).into_iter().enumerate() {
                let what = format!(
                    "{model} on {device:?}, step {step}: {report:?}, {} {}",
                    losses[step], norms[step]
                );
                assert_eq!(scale, Some(scales[step]), "{what}");
                assert_eq!(report.skipped, !norms[step].is_finite(), "{what}");
                assert!(close(report.loss, losses[step], 1e-2), "{what}");
                assert!(report.skipped || close(report.grad_norm, norms[step], 3e-2), "{what}");
                skipped += u64::from(report.skipped);
            }
            assert!((2..15).contains(&skipped), "{model}: {skipped} steps were skipped");
            assert_eq!(learner.loss_scale().unwrap().skipped, skipped);
        }
    }
}
