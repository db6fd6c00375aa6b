//! Every family against transformers: logits, loss, every gradient, a training run (tests/parity/families.py made the files).

#![allow(clippy::unwrap_used)] // helpers of tests

use fleet_checkpoint::{ModelDir, Tensors};
use fleet_torch::{AdamW, Executor, Memory, Numbers, Optimizer};
use std::path::{Path, PathBuf};
use tch::{Device, Kind, Tensor};

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/parity/golden/families")
}

struct Case {
    name: String,
    model: ModelDir,
    expected: Tensors,
}

fn cases() -> Vec<Case> {
    let mut dirs: Vec<PathBuf> =
        std::fs::read_dir(golden()).unwrap().map(|e| e.unwrap().path()).filter(|p| p.is_dir()).collect();
    dirs.sort();
    assert!(dirs.len() >= 14, "the golden files were not found");
    dirs.into_iter()
        .map(|dir| Case {
            name: dir.file_name().unwrap().to_string_lossy().into_owned(),
            model: ModelDir::open(&dir).unwrap_or_else(|e| panic!("{e}")),
            expected: Tensors::open(&dir.join("expected.safetensors")).unwrap(),
        })
        .collect()
}

impl Case {
    fn ids(&self, name: &str) -> Tensor {
        let tensor = self.expected.get(name).unwrap();
        let ids: Vec<i64> =
            tensor.data.chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap())).collect();
        let shape: Vec<i64> = tensor.shape.iter().map(|n| *n as i64).collect();
        Tensor::from_slice(&ids).view(shape.as_slice())
    }

    fn f32(&self, name: &str) -> Vec<f32> {
        let tensor = self.expected.get(name).unwrap_or_else(|| panic!("{name}"));
        tensor.data.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
    }

    fn f64(&self, name: &str) -> Vec<f64> {
        let tensor = self.expected.get(name).unwrap();
        tensor.data.chunks_exact(8).map(|b| f64::from_le_bytes(b.try_into().unwrap())).collect()
    }

    fn executor(&self, device: Device, numbers: Numbers) -> (Executor, Memory) {
        let model = &self.model;
        let executor = Executor::new(model.decoder.clone(), model.layout.clone(), device, numbers);
        let mut memory = Memory::new(&executor.network, true).unwrap();
        let mut flat = vec![0.0; model.layout.len];
        model.read(&mut flat);
        memory.set(&flat).unwrap();
        (executor, memory)
    }
}

/// What each token is to predict: the next one of its sequence.
fn targets(ids: &Tensor) -> Tensor {
    let (batch, len) = (ids.size()[0], ids.size()[1]);
    let last = Tensor::full([batch, 1], -100, (Kind::Int64, ids.device()));
    Tensor::cat(&[ids.narrow(1, 1, len - 1), last], 1)
}

fn count(ids: &Tensor) -> f64 {
    (ids.size()[0] * (ids.size()[1] - 1)) as f64
}

fn floats(tensor: &Tensor) -> Vec<f32> {
    Vec::<f32>::try_from(&tensor.to_device(Device::Cpu).to_kind(Kind::Float).contiguous().view([-1])).unwrap()
}

fn number(tensor: &Tensor) -> f64 {
    f64::try_from(tensor).unwrap()
}

fn largest(x: &[f32]) -> f32 {
    x.iter().fold(0f32, |most, x| most.max(x.abs()))
}

/// The largest difference, against the largest number, which is taken for at least `floor`.
fn apart(a: &[f32], b: &[f32], floor: f32) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).fold(0f32, |most, (a, b)| most.max((a - b).abs())) / largest(b).max(floor)
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
            let ids = case.ids("ids").to_device(device);
            let want = case.f32("logits");
            for (numbers, tolerance) in [(Numbers::FP32, 1e-5), (Numbers::BF16_MIXED, 3e-2)] {
                let (mut executor, mut memory) = case.executor(device, numbers);
                let logits = executor.logits(&memory, &ids).unwrap();
                let far = apart(&floats(&logits), &want, 1e-6);
                assert!(far < tolerance, "{} on {device:?} in {numbers:?}: logits {far}", case.name);
                let loss = executor
                    .forward_backward(&mut memory, (&ids, &targets(&ids)), 1.0, true, &mut |_, _| Ok(()))
                    .unwrap();
                let loss = number(&loss) / count(&ids);
                let want = case.f64("loss")[0];
                assert!((loss - want).abs() < f64::from(tolerance), "{}: loss {loss}, {want}", case.name);
            }
        }
    }
}

#[test]
fn every_gradient_is_that_of_transformers() {
    for device in devices() {
        for case in cases() {
            let (mut executor, mut memory) = case.executor(device, Numbers::FP32);
            let ids = case.ids("ids").to_device(device);
            let half = |at: i64| ids.narrow(0, at, 1);
            let mut units = Vec::new();
            // In two micro-batches: the first sets, the second adds.
            for (micro, ids) in [half(0), half(1)].into_iter().enumerate() {
                let _ = executor
                    .forward_backward(
                        &mut memory,
                        (&ids, &targets(&ids)),
                        1.0 / (2.0 * count(&ids)),
                        micro == 0,
                        &mut |unit, _| {
                            units.push(unit);
                            Ok(())
                        },
                    )
                    .unwrap();
            }
            let last = case.model.layout.units.len() - 1;
            assert_eq!(units, (0..=last).rev().cycle().take(2 * (last + 1)).collect::<Vec<_>>());
            let flat = floats(&memory.grads);
            let wanted = case.model.in_flat(&|name| case.expected.get(&format!("grad.{name}")));
            for p in &case.model.layout.parameters {
                // That of a key's bias is none but for rounding: scores move together.
                let floor = 1e-3 * largest(&wanted);
                let far = apart(&flat[p.range.clone()], &wanted[p.range.clone()], floor);
                assert!(far < 2e-4, "{} on {device:?}: gradient of {} is {far} away", case.name, p.name);
            }
        }
    }
}

#[test]
fn twenty_steps_of_training_are_those_of_pytorch() {
    let hyper: serde_json::Value =
        serde_json::from_slice(&std::fs::read(golden().join("hyper.json")).unwrap()).unwrap();
    let h = |key: &str| hyper[key].as_f64().unwrap();
    let adamw = AdamW {
        beta1: h("beta1"),
        beta2: h("beta2"),
        eps: h("eps"),
        weight_decay: h("weight_decay"),
        max_grad_norm: h("max_grad_norm"),
    };
    for device in devices() {
        for case in cases() {
            let (mut executor, mut memory) = case.executor(device, Numbers::FP32);
            let mut optimizer = Optimizer::new(&executor.network).unwrap();
            let batches = case.ids("batches").to_device(device);
            let (losses, norms) = (case.f64("losses"), case.f64("grad_norms"));
            for step in 0..losses.len() {
                let ids = batches.select(0, step as i64);
                let loss = executor
                    .forward_backward(
                        &mut memory,
                        (&ids, &targets(&ids)),
                        1.0 / count(&ids),
                        true,
                        &mut |_, _| Ok(()),
                    )
                    .unwrap();
                let norm = optimizer.step(&mut memory, &adamw, h("learning_rate"), step as u64 + 1).unwrap();
                let (loss, norm) = (number(&loss) / count(&ids), number(&norm));
                let close = |a: f64, b: f64, tolerance: f64| (a - b).abs() < tolerance * b.abs().max(1.0);
                assert!(
                    close(loss, losses[step], 1e-4),
                    "{} step {step}: loss {loss}, {}",
                    case.name,
                    losses[step]
                );
                assert!(
                    close(norm, norms[step], 1e-3),
                    "{} step {step}: norm {norm}, {}",
                    case.name,
                    norms[step]
                );
            }
        }
    }
}
