//! The torch executor on several ranks: the same training as that of one rank of the CPU executor, and the same checkpoints.

#![allow(clippy::unwrap_used)] // a test may panic

mod adapters;
#[path = "../batches/mod.rs"]
mod batches;
#[path = "../gang/mod.rs"]
mod gang;
#[path = "../strategies/hosts.rs"]
mod hosts;
mod precisions;

use batches::{ADAMW, SEQ, Share};
use fleet_checkpoint::{
    CONFIG_FILE, Claim, Disks, PartWriter, RunDir, Tensors as Files, Writer, diff, verify,
};
use fleet_collectives::SharedHost;
use fleet_common::events::Outcome;
use fleet_common::job::{self, Job};
use fleet_common::model::Object;
use fleet_cpu::{CpuExecutor, workers};
use fleet_learn::model::Model;
use fleet_learn::strategy::{Shared, Solo};
use fleet_learn::testing::{tiny_config, tiny_with};
use fleet_learn::{Engine, Learner, Report, TokenBatch, Update, Votes};
use fleet_torch::{Held, HostTransport, Keeping, Numbers, Sharded, Tensors, TorchExecutor};
use serde_json::json;
use std::path::{Path, PathBuf};
use tch::Device;

const SEQUENCES: usize = 24;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Cpu,
    CpuShared,
    Alone,
    Ranks(Held),
    /// As on a device whose memory is not the host's.
    Copying(Held),
    /// The first half of the ranks on one host, the others on another.
    OnTwoHosts(Held),
    /// The same, and each host has a model.
    Hsdp,
    /// As `Hsdp` on devices whose memory is not the host's.
    HsdpCopying,
}

/// How a global batch is cut.
#[derive(Clone, Copy, Debug)]
struct Cut {
    kind: Kind,
    world: usize,
    micro: usize,
}

const CPU: Cut = Cut { kind: Kind::Cpu, world: 1, micro: 1 };
const DDP: Kind = Kind::Ranks(Held::DDP);
const FSDP: Kind = Kind::Ranks(Held::FSDP);
const FSDP_KEEPING_WEIGHTS: Kind = Kind::Ranks(Held::FSDP_KEEPING_WEIGHTS);

fn learner(config: &Object, kind: Kind, numbers: Numbers, gang: Box<dyn SharedHost>) -> Box<dyn Learner> {
    let model = Model::new(config).unwrap();
    let (layout, workers) = (model.layout(), workers(1).unwrap());
    let cpu = || {
        let network = fleet_cpu::Network::new(model.decoder.clone(), model.wiring(), SEQ);
        CpuExecutor::<f32>::new(network, workers.clone())
    };
    let torch = || TorchExecutor::new(model.decoder.clone(), model.wiring(), Device::Cpu, numbers);
    let scaled = |engine: Engine<Tensors>| -> Box<dyn Learner> {
        Box::new(if numbers == Numbers::FP16_MIXED { engine.scaling_losses() } else { engine })
    };
    let sharded = |held, transport: HostTransport| {
        let keeping = Keeping { held, numbers, device: Device::Cpu, offload: false };
        let strategy = Sharded::new(layout.clone(), keeping, Box::new(transport));
        scaled(Engine::new(torch(), strategy.unwrap()))
    };
    let host = |gang: Box<dyn SharedHost>| HostTransport::new(gang, Device::Cpu);
    match kind {
        Kind::Cpu => Box::new(Engine::new(cpu(), Solo::<f32>::new(layout, workers.clone(), 1).unwrap())),
        Kind::CpuShared => {
            Box::new(Engine::new(cpu(), Shared::<f32>::new(layout, workers.clone(), gang).unwrap()))
        }
        Kind::Alone => {
            let strategy = fleet_torch::Solo::new(layout.clone(), Device::Cpu, numbers, 1).unwrap();
            scaled(Engine::new(torch(), strategy))
        }
        Kind::Ranks(held) | Kind::OnTwoHosts(held) => sharded(held, host(gang)),
        Kind::Copying(held) => sharded(held, host(gang).copying()),
        Kind::Hsdp => sharded(Held::FSDP, host(gang).within_hosts()),
        Kind::HsdpCopying => sharded(Held::FSDP, host(gang).within_hosts().copying()),
    }
}

/// Of each rank.
fn hosts(cut: Cut) -> Vec<usize> {
    let is_on_two = matches!(cut.kind, Kind::OnTwoHosts(_) | Kind::Hsdp | Kind::HsdpCopying);
    (0..cut.world).map(|rank| if is_on_two { 2 * rank / cut.world } else { 0 }).collect()
}

/// What each rank gives, on ranks that are threads of this process.
fn ranks<T: Send>(
    config: &Object,
    cut: Cut,
    numbers: Numbers,
    run: impl Fn(usize, &mut dyn Learner) -> T + Sync,
) -> Vec<T> {
    let hosts = hosts(cut);
    std::thread::scope(|scope| {
        let run = &run;
        let ranks: Vec<_> = (hosts::seats(&hosts).into_iter().enumerate())
            .map(|(rank, seat)| {
                scope.spawn(move || {
                    tch::set_num_threads(1);
                    run(rank, &mut *learner(config, cut.kind, numbers, seat.take()))
                })
            })
            .collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

fn global_batch(step: u64) -> TokenBatch {
    batches::global_batch(SEQUENCES, step)
}

fn steps(learner: &mut dyn Learner, cut: Cut, rank: usize, steps: u64) -> Vec<Report> {
    let share = Share { rank, world: cut.world, micro_batches: cut.micro, sequences: SEQUENCES };
    batches::train(learner, share, 2e-3, steps)
}

/// The reports of each rank.
fn train(config: &Object, cut: Cut, numbers: Numbers, count: u64) -> Vec<Vec<Report>> {
    ranks(config, cut, numbers, |rank, learner| {
        learner.fresh_weights(5).unwrap();
        steps(learner, cut, rank, count)
    })
}

/// Where each host has a model, each has a disk of its own, and the first one writes.
fn disks(cut: Cut) -> Disks {
    let hosts: Vec<u32> = hosts(cut).into_iter().map(|host| host as u32).collect();
    match cut.kind {
        Kind::Hsdp => Disks::new(hosts, &[0, 1], ["a", "b"].map(str::to_owned).to_vec()),
        _ => Disks::one(cut.world),
    }
}

/// A checkpoint in `dir` of what `from` has, or of a run of so many steps.
fn save(config: &Object, cut: Cut, dir: &Path, from: Result<&Path, u64>) -> PathBuf {
    save_in(Numbers::FP32, config, cut, dir, from)
}

/// The same in another precision.
fn save_in(numbers: Numbers, config: &Object, cut: Cut, dir: &Path, from: Result<&Path, u64>) -> PathBuf {
    std::fs::create_dir(dir).unwrap();
    let claim = Claim { dir, run: "r", resumed: None, overwrite: false, until: None, reads: &[] };
    let run_dir = RunDir::claim(&claim).unwrap();
    let disks = disks(cut);
    let writers = if cut.kind == Kind::Hsdp { disks.together() } else { cut.world };
    let writer = Writer::begin(&run_dir, 3).unwrap().of("test", writers as u32);
    let ticket = writer.ticket();
    let lead = std::sync::Mutex::new(Some(writer));
    let records = ranks(config, cut, numbers, |rank, learner| {
        match from {
            Ok(from) => {
                learner.load_weights(from).unwrap();
                learner.load_optimizer(from).unwrap();
            }
            Err(count) => {
                learner.fresh_weights(5).unwrap();
                steps(learner, cut, rank, count);
            }
        }
        assert_eq!(learner.writers(&disks), writers, "{cut:?}");
        if rank >= writers {
            return None;
        }
        let mut snapshot = learner.snapshot(&disks, None).unwrap();
        if rank > 0 {
            let mut part = PartWriter::join(dir, 3, ticket, rank as u32);
            snapshot.write(&mut part).unwrap();
            part.hand_in().unwrap();
            return None;
        }
        let mut writer = lead.lock().unwrap().take().unwrap();
        snapshot.write(writer.part()).unwrap();
        let json = Model::new(config).unwrap().config_json();
        writer.write_bytes(CONFIG_FILE, &serde_json::to_vec(&json).unwrap()).unwrap();
        Some(writer.finish_together(1.0, &|| true).unwrap())
    });
    PathBuf::from(&records[0].as_ref().unwrap().path)
}

fn transposed() -> Object {
    let sizes = json!({"model_type": "gpt2", "vocab_size": 97, "n_embd": 24, "n_layer": 3, "n_head": 4, "n_positions": 64});
    sizes.as_object().cloned().unwrap()
}

fn close(reports: &[Report], wanted: &[Report], tolerance: f64, what: &str) {
    for (step, (a, b)) in reports.iter().zip(wanted).enumerate() {
        let apart = ((a.loss / b.loss - 1.0).abs(), (a.grad_norm / b.grad_norm - 1.0).abs());
        assert!(apart.0 < tolerance && apart.1 < 10.0 * tolerance, "{what}, step {step}: {a:?}, {b:?}");
    }
}

#[test]
fn fifty_losses_are_those_of_one_rank_on_the_cpu() {
    let blocks = tiny_with(json!({"num_hidden_layers": 5, "intermediate_size": 45}));
    for config in [blocks, tiny_with(json!({"tie_word_embeddings": true})), transposed()] {
        let wanted = train(&config, CPU, Numbers::FP32, 50).remove(0);
        assert!(wanted[49].loss < 0.8 * wanted[0].loss, "it learns");
        close(
            &train(&config, Cut { kind: Kind::Alone, ..CPU }, Numbers::FP32, 50)[0],
            &wanted,
            1e-4,
            "alone",
        );
        for (world, micro) in [(1, 2), (2, 3), (3, 1), (4, 2)] {
            let over_hosts = [Kind::OnTwoHosts(Held::DDP), Kind::OnTwoHosts(Held::FSDP), Kind::Hsdp];
            for kind in [DDP, FSDP, FSDP_KEEPING_WEIGHTS]
                .into_iter()
                .chain(over_hosts.into_iter().filter(|_| world > 1))
            {
                let cut = Cut { kind, world, micro };
                let all = train(&config, cut, Numbers::FP32, 50);
                for reports in &all {
                    assert_eq!(reports, &all[0], "{cut:?}: every rank knows the same");
                    close(reports, &wanted, 1e-4, &format!("{cut:?}"));
                }
                assert_eq!(
                    all[0][3].votes.stop,
                    world > 1,
                    "all learn of a stop in the step in which one was asked"
                );
            }
        }
    }
}

#[test]
fn the_first_gradients_are_those_of_one_rank_on_the_cpu() {
    for (number, config) in [tiny_config(), transposed()].into_iter().enumerate() {
        let dir = tempfile::tempdir().unwrap();
        let moments = |cut: Cut| -> Vec<f32> {
            let name = format!("{number}-{:?}-{}-{}", cut.kind, cut.world, cut.micro);
            let at = save(&config, cut, &dir.path().join(name), Err(1));
            let tensors = Files::of_optimizer(&at).unwrap();
            let layout = Model::new(&config).unwrap().layout();
            let of = |name: &str| tensors.get(&format!("{name}.exp_avg")).unwrap().data().unwrap();
            let bytes: Vec<u8> = layout.parameters.iter().flat_map(|p| of(&p.name)).collect();
            bytes.as_chunks::<4>().0.iter().map(|four| f32::from_le_bytes(*four)).collect()
        };
        // The mean of one step's gradients is they, times a tenth.
        let wanted = moments(CPU);
        let largest = wanted.iter().fold(0.0f32, |most, x| most.max(x.abs()));
        for kind in [DDP, FSDP] {
            for (world, micro) in [(1, 1), (2, 2), (3, 1), (4, 1)] {
                let found = moments(Cut { kind, world, micro });
                let apart = found.iter().zip(&wanted).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                assert!(apart < 1e-5 * largest, "{kind:?} {world} {micro}: {apart} of {largest}");
            }
        }
    }
}

#[test]
fn a_world_size_gives_the_same_bits_whether_memory_is_shared_or_copied() {
    for held in [Held::DDP, Held::FSDP, Held::FSDP_KEEPING_WEIGHTS] {
        let cut = Cut { kind: Kind::Ranks(held), world: 3, micro: 2 };
        let once = train(&tiny_config(), cut, Numbers::FP32, 8);
        assert_eq!(once, train(&tiny_config(), cut, Numbers::FP32, 8));
        assert_eq!(once, train(&tiny_config(), Cut { kind: Kind::Copying(held), ..cut }, Numbers::FP32, 8));
    }
    for world in [3, 4] {
        let cut = Cut { kind: Kind::Hsdp, world, micro: 3 };
        let once = train(&tiny_config(), cut, Numbers::FP32, 8);
        assert_eq!(once, train(&tiny_config(), cut, Numbers::FP32, 8));
        assert_eq!(once, train(&tiny_config(), Cut { kind: Kind::HsdpCopying, ..cut }, Numbers::FP32, 8));
    }
}

#[test]
fn ranks_in_16_bits_train_like_one() {
    let tied = tiny_with(json!({"tie_word_embeddings": true}));
    for (config, numbers) in [
        (tiny_config(), Numbers::BF16_MIXED),
        (tied, Numbers::BF16_MIXED),
        (transposed(), Numbers::FP16_MIXED),
    ] {
        let alone = train(&config, Cut { kind: Kind::Alone, ..CPU }, numbers, 20).remove(0);
        for (kind, world) in
            [(DDP, 2), (FSDP, 3), (FSDP_KEEPING_WEIGHTS, 2), (Kind::Copying(Held::FSDP), 2), (Kind::Hsdp, 4)]
        {
            let all = train(&config, Cut { kind, world, micro: 1 }, numbers, 20);
            close(&all[0], &alone, 2e-2, &format!("{kind:?} in {numbers:?}"));
            assert_eq!(all[0], all[world - 1], "every rank knows the same");
        }
    }
}

/// What a rank reads are the numbers that one rank alone reads: of the products rounded, of tables, norms and biases exact.
#[test]
fn the_first_loss_in_16_bits_is_that_of_one_rank_to_the_last_digits() {
    for numbers in [Numbers::BF16_MIXED, Numbers::FP16_MIXED] {
        for config in [tiny_config(), tiny_with(json!({"tie_word_embeddings": true})), transposed()] {
            let alone = train(&config, Cut { kind: Kind::Alone, ..CPU }, numbers, 1).remove(0)[0].loss;
            for kind in [DDP, FSDP, Kind::OnTwoHosts(Held::FSDP), Kind::Hsdp] {
                let found = train(&config, Cut { kind, world: 2, micro: 1 }, numbers, 1).remove(0)[0].loss;
                assert!((found / alone - 1.0).abs() < 1e-6, "{kind:?} in {numbers:?}: {found}, {alone}");
            }
        }
    }
}

/// Between executors and strategies, to the last bit, with what of the state is padding left out.
#[test]
fn what_n_ranks_save_m_ranks_load() {
    for (config, worlds) in [(tiny_config(), &[1, 2, 3, 4][..]), (transposed(), &[3])] {
        let mut cuts =
            vec![CPU, Cut { kind: Kind::CpuShared, world: 3, micro: 1 }, Cut { kind: Kind::Alone, ..CPU }];
        let several = |kind| worlds.iter().map(move |world| Cut { kind, world: *world, micro: 1 });
        cuts.extend([DDP, FSDP].into_iter().flat_map(several));
        cuts.extend([Kind::OnTwoHosts(Held::FSDP), Kind::Hsdp].map(|kind| Cut { kind, world: 3, micro: 1 }));
        let dir = tempfile::tempdir().unwrap();
        let parameters = Model::new(&config).unwrap().layout().parameters.len();
        for (n, saved) in cuts.iter().enumerate() {
            let from = save(&config, *saved, &dir.path().join(format!("{n}")), Err(3));
            verify(&from).unwrap();
            assert_eq!(Files::of_model(&from).unwrap().len(), parameters);
            assert_eq!(Files::of_optimizer(&from).unwrap().len(), 2 * parameters);
            for (m, loaded) in cuts.iter().enumerate() {
                let again = save(&config, *loaded, &dir.path().join(format!("{n}-{m}")), Ok(&from));
                assert_eq!(diff(&from, &again).unwrap(), [], "{saved:?} to {loaded:?}");
            }
        }
    }
}

/// With evaluations of which the ranks have uneven shares, and a resume with other ranks, another strategy and another executor.
#[test]
fn a_run_goes_on_under_another_strategy_and_executor() {
    let dir = tempfile::tempdir().unwrap();
    let base = gang::job(dir.path());
    let of = |name: &str, executor, strategy, world: u32| Job {
        run_name: name.into(),
        executor,
        strategy,
        batch_size: 12 / world,
        ..base.clone()
    };
    let wanted = gang::launch(&of("cpu", job::Executor::Cpu, job::Strategy::Auto, 1), 1, None, None);
    let near = |found: &[f64], wanted: &[f64]| {
        let same = found.iter().zip(wanted).all(|(a, b)| (a / b - 1.0).abs() < 1e-4);
        assert!(found.len() == wanted.len() && same, "{found:?}, {wanted:?}");
    };
    let evaluations = |ended: &gang::Ended| ended.evaluations().iter().map(|e| e.1).collect::<Vec<f64>>();
    for (strategy, name, other) in
        [(job::Strategy::Fsdp, "fsdp", job::Strategy::Ddp), (job::Strategy::Auto, "ddp", job::Strategy::Fsdp)]
    {
        let whole = gang::launch(&of(name, job::Executor::Torch, strategy, 3), 3, None, None);
        let done = |outcome: &_| matches!(outcome, Ok(Outcome::Succeeded { steps: 12, .. }));
        assert!(whole.outcomes.iter().all(done), "{:?}", whole.outcomes);
        near(&whole.losses(), &wanted.losses());
        near(&evaluations(&whole), &evaluations(&wanted));
        let half = whole.checkpoints().remove(0);
        let manifest = verify(Path::new(&half.path)).unwrap();
        assert_eq!((manifest.world_size, manifest.strategy.as_str(), half.step), (3, name, 6));
        for (number, executor) in [job::Executor::Torch, job::Executor::Cpu].into_iter().enumerate() {
            let rest = of(&format!("{name}-{number}"), executor, other, 2);
            let rest = gang::launch(&rest, 2, Some(&half.path), None);
            near(&rest.losses(), &wanted.losses()[6..]);
        }
    }
}
