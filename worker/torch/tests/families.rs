//! Every family against transformers: logits, loss, every gradient, a training run.

#![allow(clippy::unwrap_used)] // helpers of tests

#[path = "../../../tests/parity/cases.rs"]
mod cases;
mod common;

use cases::{Case, apart, cases, hits, hyper, targets};
use common::devices;
use fleet_learn::strategy::{Micro, Slot, Strategy};
use fleet_learn::{AdamW, Engine, Executor, Learner, TokenBatch, UnitWeights, Update, Votes};
use fleet_torch::{Numbers, Solo, TorchExecutor};
use tch::{Device, Kind, Tensor};

fn parts(case: &Case, device: Device, numbers: Numbers) -> (TorchExecutor, Solo) {
    let model = &case.model;
    let executor = TorchExecutor::new(model.decoder.clone(), model.wiring(), device, numbers);
    let described = executor.describe();
    assert!(device == Device::Cpu || described.contains("with fused kernels"), "{described}");
    let mut solo = Solo::new(model.layout.clone(), device, numbers, 1).unwrap();
    let weights = case.weights();
    let mut read = |range: std::ops::Range<usize>, out: &mut [f32]| {
        out.copy_from_slice(&weights[range]);
        Ok(())
    };
    solo.fill(Slot::Weights, &mut read).unwrap();
    (executor, solo)
}

fn batch(ids: &[i64], seq: usize) -> TokenBatch {
    TokenBatch { ids: ids.to_vec(), targets: targets(ids, seq), seq, ..Default::default() }
}

fn floats(tensor: &Tensor) -> Vec<f32> {
    Vec::<f32>::try_from(&tensor.to_device(Device::Cpu).to_kind(Kind::Float).contiguous().view([-1])).unwrap()
}

fn number(tensor: &Tensor) -> f64 {
    f64::try_from(tensor).unwrap()
}

#[test]
fn logits_and_loss_are_those_of_transformers_in_both_precisions() {
    for device in devices() {
        for case in cases() {
            let (ids, shape) = case.ids("ids");
            let batch = batch(&ids, shape[1]);
            for (numbers, tolerance) in [(Numbers::FP32, 1e-5), (Numbers::BF16_MIXED, 2e-2)] {
                let (mut executor, mut solo) = parts(&case, device, numbers);
                let ids = Tensor::from_slice(&ids).view([-1, shape[1] as i64]).to_device(device);
                let logits = executor.logits(UnitWeights::weights(&solo), &ids).unwrap();
                let far = apart(&floats(&logits), &case.f32("logits"), 1e-6);
                assert!(far < tolerance, "{} on {device:?} in {numbers:?}: logits {far}", case.name);
                let tally = executor.evaluate(&mut solo, &batch.view()).unwrap();
                if numbers == Numbers::FP32 {
                    assert_eq!(tally.hits, hits(&floats(&logits), &batch.targets), "{}", case.name);
                }
                let micro = Micro { first: true, last: true };
                executor.forward_backward(solo.units(micro), &batch.view(), 1.0).unwrap();
                let loss = number(&executor.take_loss().unwrap());
                assert!((loss - tally.loss).abs() < 1e-3 * loss, "{}: {loss} {}", case.name, tally.loss);
                let (loss, want) = (tally.mean(), case.f64("loss")[0]);
                assert!((loss - want).abs() < f64::from(tolerance), "{}: loss {loss}, {want}", case.name);
            }
        }
    }
}

#[test]
fn every_gradient_is_that_of_transformers() {
    for device in devices() {
        for case in cases() {
            let (mut executor, mut solo) = parts(&case, device, Numbers::FP32);
            let (ids, shape) = case.ids("ids");
            let count = ids.chunks(shape[1]).len();
            // In micro-batches: the first sets, the others add.
            for (number, ids) in ids.chunks(shape[1]).enumerate() {
                let batch = batch(ids, shape[1]);
                let micro = Micro { first: number == 0, last: number + 1 == count };
                let scale = 0.5 / (shape[1] - 1) as f32;
                executor.forward_backward(solo.units(micro), &batch.view(), scale).unwrap();
            }
            let (_, grads) = solo.units(Micro { first: true, last: true }).numbers();
            case.check_gradients(&floats(grads.numbers.flat), 1e-4);
        }
    }
}

#[test]
fn twenty_steps_of_training_are_those_of_pytorch() {
    let adamw = AdamW {
        beta1: hyper("beta1"),
        beta2: hyper("beta2"),
        eps: hyper("eps"),
        weight_decay: hyper("weight_decay"),
        max_grad_norm: hyper("max_grad_norm"),
    };
    let lr = hyper("learning_rate");
    for device in devices() {
        for case in cases() {
            let (executor, solo) = parts(&case, device, Numbers::FP32);
            let mut engine = Engine::new(executor, solo);
            let (ids, shape) = case.ids("batches");
            let (losses, norms) = (case.f64("losses"), case.f64("grad_norms"));
            for (step, ids) in ids.chunks(shape[1] * shape[2]).enumerate() {
                let update = Update { adamw, lr, step: step as u64 + 1 };
                let report = engine.step(&[batch(ids, shape[2])], &update, Votes::default()).unwrap();
                let (loss, norm) = (report.loss, report.grad_norm);
                let close = |a: f64, b: f64, tolerance: f64| (a - b).abs() < tolerance * b.abs().max(1.0);
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
        }
    }
}
