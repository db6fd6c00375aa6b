//! Every family against transformers: logits, loss, every gradient, a training run.

#![allow(clippy::unwrap_used)] // helpers of tests

#[path = "../../../tests/parity/cases.rs"]
mod cases;

use cases::{Case, apart, cases, hits, hyper, targets};
use fleet_torch::{AdamW, Executor, Memory, Numbers, Optimizer};
use tch::{Device, Kind, Tensor};

fn executor(case: &Case, device: Device, numbers: Numbers) -> (Executor, Memory) {
    let model = &case.model;
    let executor = Executor::new(model.decoder.clone(), model.layout.clone(), device, numbers);
    let mut memory = Memory::new(&executor.network, true).unwrap();
    memory.set(&case.weights()).unwrap();
    (executor, memory)
}

/// `[b, s]` ids and targets.
struct Batch {
    ids: Tensor,
    targets: Tensor,
    /// Targets that count.
    count: f64,
}

fn batch(ids: &[i64], seq: usize, device: Device) -> Batch {
    let of = |ids: &[i64]| Tensor::from_slice(ids).view([-1, seq as i64]).to_device(device);
    let count = (ids.len() / seq * (seq - 1)) as f64;
    Batch { ids: of(ids), targets: of(&targets(ids, seq)), count }
}

fn floats(tensor: &Tensor) -> Vec<f32> {
    Vec::<f32>::try_from(&tensor.to_device(Device::Cpu).to_kind(Kind::Float).contiguous().view([-1])).unwrap()
}

fn number(tensor: &Tensor) -> f64 {
    f64::try_from(tensor).unwrap()
}

/// CUDA as well where there is one.
fn devices() -> Vec<Device> {
    match fleet_torch::device::cuda_devices() {
        Ok(_) => vec![Device::Cpu, Device::Cuda(0)],
        Err(why) => {
            eprintln!("SKIPPED on CUDA: {why}");
            vec![Device::Cpu]
        }
    }
}

#[test]
fn logits_and_loss_are_those_of_transformers_in_both_precisions() {
    for device in devices() {
        for case in cases() {
            let (ids, shape) = case.ids("ids");
            let batch = batch(&ids, shape[1], device);
            for (numbers, tolerance) in [(Numbers::FP32, 1e-5), (Numbers::BF16_MIXED, 2e-2)] {
                let (mut executor, mut memory) = executor(&case, device, numbers);
                let logits = executor.logits(&memory, &batch.ids).unwrap();
                let far = apart(&floats(&logits), &case.f32("logits"), 1e-6);
                assert!(far < tolerance, "{} on {device:?} in {numbers:?}: logits {far}", case.name);
                let both = (&batch.ids, &batch.targets);
                let score = executor.score(&memory, both).unwrap();
                if numbers == Numbers::FP32 {
                    assert_eq!(score.1, hits(&floats(&logits), &targets(&ids, shape[1])), "{}", case.name);
                }
                let loss =
                    executor.forward_backward(&mut memory, both, 1.0, true, &mut |_, _| Ok(())).unwrap();
                let (loss, want) = (number(&loss) / batch.count, case.f64("loss")[0]);
                assert!((loss - want).abs() < f64::from(tolerance), "{}: loss {loss}, {want}", case.name);
                assert!((score.0 / batch.count - loss).abs() < 1e-5, "{}: {score:?}, {loss}", case.name);
            }
        }
    }
}

#[test]
fn every_gradient_is_that_of_transformers() {
    for device in devices() {
        for case in cases() {
            let (mut executor, mut memory) = executor(&case, device, Numbers::FP32);
            let (ids, shape) = case.ids("ids");
            let mut units = Vec::new();
            // In two micro-batches: the first sets, the second adds.
            for (micro, ids) in ids.chunks(shape[1]).enumerate() {
                let batch = batch(ids, shape[1], device);
                let both = (&batch.ids, &batch.targets);
                let _ = executor
                    .forward_backward(&mut memory, both, 0.5 / batch.count, micro == 0, &mut |unit, _| {
                        units.push(unit);
                        Ok(())
                    })
                    .unwrap();
            }
            let last = case.model.layout.units.len() - 1;
            assert_eq!(units, (0..=last).rev().cycle().take(2 * (last + 1)).collect::<Vec<_>>());
            case.check_gradients(&floats(&memory.grads), 1e-4);
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
            let (mut executor, mut memory) = executor(&case, device, Numbers::FP32);
            let mut optimizer = Optimizer::new(&executor.network).unwrap();
            let (ids, shape) = case.ids("batches");
            let (losses, norms) = (case.f64("losses"), case.f64("grad_norms"));
            for (step, ids) in ids.chunks(shape[1] * shape[2]).enumerate() {
                let batch = batch(ids, shape[2], device);
                let both = (&batch.ids, &batch.targets);
                let loss = executor
                    .forward_backward(&mut memory, both, 1.0 / batch.count, true, &mut |_, _| Ok(()))
                    .unwrap();
                let norm = optimizer.step(&mut memory, &adamw, lr, step as u64 + 1).unwrap();
                let (loss, norm) = (number(&loss) / batch.count, number(&norm));
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
