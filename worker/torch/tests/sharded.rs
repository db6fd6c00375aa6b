//! The sharded path with one rank, on the CPU and, where there is one, on a CUDA device over NCCL; checkpoints go from one to the other.

#![allow(clippy::unwrap_used)] // helpers of tests

mod common;

use common::devices;
use fleet_checkpoint::{CONFIG_FILE, Claim, Disks, RunDir, Writer, diff};
use fleet_collectives::SharedHost;
use fleet_collectives::nccl::{Among, Loaded, NcclCollective};
use fleet_learn::model::Model;
use fleet_learn::testing::{tiny_with, token_ids};
use fleet_learn::{AdamW, Engine, Learner, Report, TokenBatch, Update, Votes};
use fleet_torch::{
    AloneTransport, Held, HostTransport, Keeping, NcclTransport, Numbers, Sharded, Solo, TorchExecutor,
    Transport,
};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tch::Device;

const SEQ: usize = 16;

fn model() -> Model {
    Model::new(&tiny_with(json!({"num_hidden_layers": 4, "intermediate_size": 45}))).unwrap()
}

/// `None`: without shards.
fn learner(device: Device, numbers: Numbers, held: Option<Held>) -> Box<dyn Learner> {
    learner_with(device, numbers, held, 0)
}

/// Of so many blocks the forward is computed a second time.
fn learner_with(device: Device, numbers: Numbers, held: Option<Held>, again: usize) -> Box<dyn Learner> {
    let model = model();
    let layout = model.layout();
    let executor =
        TorchExecutor::new(model.decoder.clone(), model.wiring(), device, numbers).computing_again(again);
    let Some(held) = held else {
        return Box::new(Engine::new(executor, Solo::new(layout, device, numbers, 1).unwrap()));
    };
    let gang: Box<dyn SharedHost> = Box::new(fleet_collectives::Solo::new(1));
    let transport: Box<dyn Transport> = match device {
        Device::Cuda(number) => {
            let library = Box::new(Loaded::open(number).unwrap());
            let nccl = NcclCollective::join(Ok(library), gang, Among::All, Duration::from_secs(60)).unwrap();
            Box::new(NcclTransport::new(nccl, device))
        }
        _ => Box::new(HostTransport::new(gang, device)),
    };
    let keeping = Keeping { held, numbers, device, offload: false };
    Box::new(Engine::new(executor, Sharded::new(layout, keeping, transport).unwrap()))
}

fn step(learner: &mut dyn Learner, step: u64) -> Report {
    let adamw = AdamW { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, max_grad_norm: 1.0 };
    let batches = [0, 1].map(|micro| TokenBatch {
        ids: token_ids(4 * SEQ, 97, 2 * step + micro),
        targets: token_ids(4 * SEQ, 97, 2 * step + micro + 40),
        seq: SEQ,
        ..Default::default()
    });
    learner.step(&batches, &Update { adamw, lr: 2e-3, step }, Votes::default()).unwrap()
}

fn close(a: Report, b: Report, tolerance: f64) -> bool {
    (a.loss / b.loss - 1.0).abs() < tolerance && (a.grad_norm / b.grad_norm - 1.0).abs() < tolerance
}

#[test]
fn one_rank_trains_alike_with_and_without_shards() {
    for device in devices() {
        for (numbers, tolerance) in
            [(Numbers::FP32, 1e-5), (Numbers::BF16_MIXED, 1e-3), (Numbers::BF16_TRUE, 1e-2)]
        {
            let train = |held| {
                let mut learner = learner(device, numbers, held);
                learner.fresh_weights(5).unwrap();
                (1..=10).map(|number| step(&mut *learner, number)).collect::<Vec<Report>>()
            };
            let alone = train(None);
            for held in [Held::DDP, Held::FSDP] {
                for (step, (found, wanted)) in train(Some(held)).into_iter().zip(&alone).enumerate() {
                    assert!(
                        close(found, *wanted, tolerance),
                        "{held:?} on {device:?} in {numbers:?}, step {step}: {found:?}, {wanted:?}"
                    );
                }
            }
        }
    }
}

#[test]
fn gradients_are_looked_at_where_they_lie() {
    for (device, held) in
        devices().into_iter().flat_map(|device| [None, Some(Held::FSDP)].map(|held| (device, held)))
    {
        let mut learner = learner(device, Numbers::FP32, held);
        // Weights of zeros: nothing flows anywhere.
        step(&mut *learner, 1);
        let line = learner.without_gradient().unwrap();
        let all = learner.layout().parameters.len();
        assert!(line.contains(&format!("{all} parameters: model.embed_tokens.weight, ")), "{line}");

        let mut learner = self::learner(device, Numbers::FP32, held);
        learner.fresh_weights(5).unwrap();
        step(&mut *learner, 1);
        assert_eq!(learner.without_gradient(), None);
        let targets = TokenBatch {
            ids: token_ids(SEQ, 97, 1),
            targets: token_ids(SEQ, 97, 2),
            // Two that count so much that their flow back is more than fp32 holds, while their losses cancel.
            weights: Some((0..SEQ).map(|at| [0.0, 1e36, 0.0, -1e36, 1e-6][at.min(4)]).collect()),
            seq: SEQ,
            ..Default::default()
        };
        let adamw = AdamW { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, max_grad_norm: 1.0 };
        let update = Update { adamw, lr: 2e-3, step: 2 };
        let error = learner.step(&[targets], &update, Votes::default()).unwrap_err().to_string();
        assert!(error.contains("became NaN or infinite at step 2"), "{error}");
    }
}

fn save(learner: &mut dyn Learner, dir: &Path, at: u64) -> PathBuf {
    std::fs::create_dir(dir).unwrap();
    let claim = Claim { dir, run: "r", resumed: None, overwrite: false, until: None, reads: &[] };
    let mut writer = Writer::begin(&RunDir::claim(&claim).unwrap(), at).unwrap();
    learner.snapshot(&Disks::one(1), None).unwrap().write(writer.part()).unwrap();
    writer.write_bytes(CONFIG_FILE, &serde_json::to_vec(&model().config_json()).unwrap()).unwrap();
    writer.finish(1.0).unwrap().path.into()
}

#[test]
fn a_checkpoint_of_the_cpu_goes_on_on_a_device_and_back() {
    let dir = tempfile::tempdir().unwrap();
    let load = |device, held, from: &Path| {
        let mut learner = learner(device, Numbers::FP32, held);
        learner.load_weights(from).unwrap();
        learner.load_optimizer(from).unwrap();
        learner
    };
    let mut cpu = learner(Device::Cpu, Numbers::FP32, None);
    cpu.fresh_weights(5).unwrap();
    for number in 1..=3 {
        step(&mut *cpu, number);
    }
    let saved = save(&mut *cpu, &dir.path().join("cpu"), 3);
    let wanted = [4, 5].map(|number| step(&mut *cpu, number));
    for (number, device) in devices().into_iter().enumerate() {
        for (name, held) in [("alone", None), ("sharded", Some(Held::FSDP))] {
            let place = |what: &str| dir.path().join(format!("{number}-{name}-{what}"));
            let mut other = load(device, held, &saved);
            assert_eq!(diff(&saved, &save(&mut *other, &place("same"), 3)).unwrap(), [], "to the last bit");
            let there = step(&mut *other, 4);
            assert!(close(there, wanted[0], 1e-4), "{name} on {device:?}: {there:?}, {:?}", wanted[0]);
            let mut back = load(Device::Cpu, None, &save(&mut *other, &place("next"), 4));
            let here = step(&mut *back, 5);
            assert!(
                close(here, wanted[1], 1e-4),
                "back from {name} on {device:?}: {here:?}, {:?}",
                wanted[1]
            );
        }
    }
}

#[test]
fn blocks_that_are_computed_again_give_the_same_bits() {
    for device in devices() {
        for numbers in [Numbers::FP32, Numbers::BF16_MIXED, Numbers::BF16_TRUE] {
            for held in [None, Some(Held::FSDP)] {
                let train = |again| {
                    let mut learner = learner_with(device, numbers, held, again);
                    learner.fresh_weights(5).unwrap();
                    (1..=4).map(|number| step(&mut *learner, number)).collect::<Vec<Report>>()
                };
                let wanted = train(0);
                for again in [1, 4] {
                    assert_eq!(train(again), wanted, "{again} blocks on {device:?} in {numbers:?}, {held:?}");
                }
            }
        }
    }
}

/// With a device that is another one than the host where there is one.
#[test]
fn an_optimizer_on_the_host_does_the_same() {
    let dir = tempfile::tempdir().unwrap();
    for (number, device) in devices().into_iter().enumerate() {
        for numbers in [Numbers::FP32, Numbers::BF16_MIXED, Numbers::BF16_TRUE] {
            let offloaded = |held| {
                let model = model();
                let layout = model.layout();
                let executor = TorchExecutor::new(model.decoder.clone(), model.wiring(), device, numbers);
                let keeping = Keeping { held, numbers, device, offload: true };
                let transport = AloneTransport::new(fleet_collectives::Solo::new(1), device);
                Engine::new(executor, Sharded::new(layout, keeping, Box::new(transport)).unwrap())
            };
            let tolerance = if numbers == Numbers::FP32 { 1e-5 } else { 1e-2 };
            let mut alone = learner(device, numbers, None);
            alone.fresh_weights(5).unwrap();
            let first: Vec<Report> = (1..=3).map(|number| step(&mut *alone, number)).collect();
            let place = |name: &str| dir.path().join(format!("{number}-{numbers:?}-{name}"));
            let saved = save(&mut *alone, &place("alone"), 3);
            let wanted = step(&mut *alone, 4);
            for held in [Held::DDP, Held::FSDP] {
                let mut learner = offloaded(held);
                learner.fresh_weights(5).unwrap();
                for (number, wanted) in (1..).zip(&first) {
                    let found = step(&mut learner, number);
                    assert!(close(found, *wanted, tolerance), "{held:?}, {numbers:?}: {found:?}, {wanted:?}");
                }
                let mut learner = offloaded(held);
                learner.load_weights(&saved).unwrap();
                learner.load_optimizer(&saved).unwrap();
                let again = save(&mut learner, &place(&format!("{held:?}")), 3);
                assert_eq!(diff(&saved, &again).unwrap(), [], "to the last bit");
                let found = step(&mut learner, 4);
                assert!(close(found, wanted, tolerance), "{held:?}, {numbers:?}: {found:?}, {wanted:?}");
            }
        }
    }
}
