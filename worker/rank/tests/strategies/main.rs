//! The same training under every strategy, on one host and on several: alone, with all gradients, and in shards.

#![allow(clippy::unwrap_used)] // a test may panic

mod accumulating;
#[path = "../batches/mod.rs"]
mod batches;
mod hosts;
mod poison;
mod reached;

use batches::{ADAMW, SEQ, Share};
use fleet_checkpoint::{
    CONFIG_FILE, Claim, Disks, PartWriter, RunDir, Tensors, Ticket, Writer, consolidate, diff, verify,
};
use fleet_collectives::{Gang, SharedHost};
use fleet_common::model::{Layout, Object};
use fleet_cpu::{CpuExecutor, Network, Storage, workers};
use fleet_learn::model::Model;
use fleet_learn::strategy::{Resident, Sharded, Shared, Solo};
use fleet_learn::testing::{tiny_config, tiny_with, token_ids};
use fleet_learn::{Engine, Host, IGNORED, Learner, Report, TokenBatch, Update, Votes};
use fleet_rank::fits;
use half::bf16;
use hosts::seats;
use serde_json::json;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

const SEQUENCES: usize = 8;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Solo,
    Shared,
    Fsdp,
    /// Weights that are collected stay for the step.
    FsdpKeepingWeights,
    Hsdp,
}

/// All that take several ranks.
const OF_SEVERAL: [Kind; 4] = [Kind::Shared, Kind::Fsdp, Kind::FsdpKeepingWeights, Kind::Hsdp];

/// One to four ranks.
const ONE_HOST: [&[usize]; 4] = [&[0], &[0; 2], &[0; 3], &[0; 4]];

/// How a global batch is cut.
#[derive(Clone, Copy, Debug)]
struct Cut {
    kind: Kind,
    /// Of each rank.
    hosts: &'static [usize],
    micro: usize,
}

impl Cut {
    fn world(self) -> usize {
        self.hosts.len()
    }

    fn resident(self) -> Resident {
        Resident::of(self.kind != Kind::FsdpKeepingWeights)
    }

    /// Each rank has no more than its part of the weights.
    fn is_sharded_over_hosts(self) -> bool {
        matches!(self.kind, Kind::Fsdp | Kind::FsdpKeepingWeights) && self.hosts.iter().any(|host| *host > 0)
    }
}

const ALONE: Cut = Cut { kind: Kind::Solo, hosts: &[0], micro: 1 };

/// What each rank reported, and the weights afterwards.
type Trained = (Vec<Report>, Vec<f32>);

/// A thread of this process for each rank.
fn each<T: Send>(cut: Cut, rank: impl Fn(usize, hosts::Seat) -> T + Sync) -> Vec<T> {
    std::thread::scope(|scope| {
        let rank = &rank;
        let seats = seats(cut.hosts).into_iter().enumerate();
        let ranks: Vec<_> = seats.map(|(number, seat)| scope.spawn(move || rank(number, seat))).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

/// Trains `steps`.
fn train<E: Storage>(config: &Object, cut: Cut, steps: u64) -> Vec<Trained> {
    each(cut, |rank, seat| run(engine::<E>(config, cut, || seat.take()), cut, rank, steps))
}

fn engine<E: Storage>(
    config: &Object,
    cut: Cut,
    gang: impl FnOnce() -> Box<dyn SharedHost>,
) -> Engine<Host<E>> {
    let model = Model::new(config).unwrap();
    let (layout, workers) = (model.layout(), workers(1).unwrap());
    let executor =
        CpuExecutor::<E>::new(Network::new(model.decoder.clone(), model.wiring(), SEQ), workers.clone());
    match cut.kind {
        Kind::Solo => Engine::new(executor, Solo::<E>::new(layout, workers, 1).unwrap()),
        Kind::Shared => Engine::new(executor, Shared::<E>::new(layout, workers, gang()).unwrap()),
        Kind::Fsdp | Kind::FsdpKeepingWeights => {
            Engine::new(executor, Sharded::<E>::fully(layout, workers, gang(), cut.resident()).unwrap())
        }
        Kind::Hsdp => Engine::new(executor, Sharded::<E>::within_hosts(layout, workers, gang()).unwrap()),
    }
}

fn run<E: Storage>(mut engine: Engine<Host<E>>, cut: Cut, rank: usize, steps: u64) -> Trained {
    engine.fresh_weights(5).unwrap();
    let reports = step(&mut engine, cut, rank, steps);
    let weights = engine.weights().unwrap().into_owned();
    (reports, weights)
}

fn step<E: Storage>(engine: &mut Engine<Host<E>>, cut: Cut, rank: usize, steps: u64) -> Vec<Report> {
    let share = Share { rank, world: cut.world(), micro_batches: cut.micro, sequences: SEQUENCES };
    batches::train(engine, share, 3e-3, steps)
}

/// Which disks the hosts of a cut write to.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Files {
    Shared,
    Apart,
}

fn disks(cut: Cut, files: Files) -> Disks {
    let hosts: Vec<u32> = cut.hosts.iter().map(|host| *host as u32).collect();
    let count = hosts.iter().max().map_or(0, |last| last + 1);
    let seen: Vec<u32> = (0..count).map(|host| if files == Files::Apart { host } else { 0 }).collect();
    Disks::new(hosts, &seen, (0..count).map(|host| format!("host-{host}")).collect())
}

/// A checkpoint in `dir` of what `from` has, or of a run of three steps. What was written to several disks is brought together.
fn save<E: Storage>(config: &Object, cut: Cut, files: Files, dir: &Path, from: Option<&Path>) -> PathBuf {
    let disks = disks(cut, files);
    let writers = if cut.is_sharded_over_hosts() { cut.world() } else { disks.together() };
    let place = |disk: usize| dir.join(format!("disk-{disk}"));
    let claim = |disk: usize| {
        let dir = place(disk);
        let claim = Claim { dir: &dir, run: "r", resumed: None, overwrite: false, until: None, reads: &[] };
        RunDir::claim(&claim).unwrap()
    };
    let run_dirs: Vec<RunDir> = (0..disks.written(writers)).map(claim).collect();
    let begin = |(disk, run_dir): (usize, &RunDir)| {
        let writer = Writer::begin(run_dir, 3).unwrap().of("test", writers as u32);
        writer.among(disks.clone(), disk)
    };
    let begun: Vec<Writer> = run_dirs.iter().enumerate().map(begin).collect();
    let tickets: Vec<Ticket> = begun.iter().map(Writer::ticket).collect();
    let begun: Vec<_> = begun.into_iter().map(|writer| Mutex::new(Some(writer))).collect();
    let written = each(cut, |rank, seat| {
        let mut engine = engine::<E>(config, cut, || seat.take());
        match from {
            Some(from) => {
                engine.load_weights(from).unwrap();
                engine.load_optimizer(from).unwrap();
            }
            None => {
                engine.fresh_weights(5).unwrap();
                step(&mut engine, cut, rank, 3);
            }
        }
        assert_eq!(engine.writers(&disks), writers, "{cut:?} {files:?}");
        if rank >= writers {
            return None;
        }
        let mut snapshot = engine.snapshot(&disks, None).unwrap();
        let disk = disks.of_rank(rank);
        if disks.lead(disk) != rank {
            let mut part = PartWriter::join(&place(disk), 3, tickets[disk], rank as u32);
            snapshot.write(&mut part).unwrap();
            part.hand_in().unwrap();
            return None;
        }
        let mut writer = begun[disk].lock().unwrap().take().unwrap();
        snapshot.write(writer.part()).unwrap();
        if rank == 0 {
            let json = Model::new(config).unwrap().config_json();
            writer.write_bytes(CONFIG_FILE, &serde_json::to_vec(&json).unwrap()).unwrap();
        }
        writer.collect(&|| true).unwrap();
        Some(writer)
    });
    let mut writers: Vec<Writer> = written.into_iter().flatten().collect();
    let handed: Vec<Vec<u8>> = writers.iter().map(Writer::handed).collect();
    for (disk, writer) in writers.iter_mut().enumerate() {
        let others = handed.iter().enumerate().filter(|(other, _)| *other != disk);
        others.for_each(|(other, handed)| writer.take_in(other, handed).unwrap());
        writer.prepare(1.0).unwrap();
    }
    let records: Vec<_> = writers.into_iter().map(|writer| writer.publish().unwrap()).collect();
    assert!(records.iter().all(|record| record.flaw().is_none()));
    assert!(records.iter().all(|record| record.manifest_sha256 == records[0].manifest_sha256));
    let first = PathBuf::from(&records[0].path);
    let parameters = Model::new(config).unwrap().layout().parameters.len();
    assert_eq!(Tensors::of_model(&first).unwrap().len(), parameters, "rank 0's host has a whole model");
    for record in &records[1..] {
        for entry in std::fs::read_dir(&record.path).unwrap().flatten() {
            std::fs::copy(entry.path(), first.join(entry.file_name())).unwrap();
        }
    }
    first
}

/// Under every pair of strategies, to the last bit, with what of the state is padding left out.
#[test]
fn what_n_ranks_save_m_ranks_load() {
    let transposed = json!({"model_type": "gpt2", "vocab_size": 97, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 64});
    let configs = [tiny_config(), transposed.as_object().cloned().unwrap()];
    let cut = |kind, hosts| Cut { kind, hosts, micro: 1 };
    let mut cuts = vec![(ALONE, Files::Shared)];
    cuts.extend(ONE_HOST.map(|hosts| (cut(Kind::Shared, hosts), Files::Shared)));
    let several: [(Kind, &[usize], Files); 7] = [
        (Kind::Shared, &[0, 0, 1], Files::Apart),
        (Kind::Fsdp, &[0, 1], Files::Shared),
        (Kind::Fsdp, &[0, 1], Files::Apart),
        (Kind::Fsdp, &[0, 0, 1], Files::Apart),
        (Kind::Fsdp, &[0, 1, 1, 1], Files::Shared),
        (Kind::Hsdp, &[0, 0, 1, 1], Files::Shared),
        (Kind::Hsdp, &[0, 0, 1, 1], Files::Apart),
    ];
    cuts.extend(several.map(|(kind, hosts, files)| (cut(kind, hosts), files)));
    cuts.extend([&[0][..], &[0, 0, 0]].map(|hosts| (cut(Kind::Fsdp, hosts), Files::Shared)));
    for config in configs {
        let dir = tempfile::tempdir().unwrap();
        let place = |name: String| {
            let path = dir.path().join(name);
            std::fs::create_dir(&path).unwrap();
            path
        };
        for (n, (saved, files)) in cuts.iter().enumerate() {
            let from = save::<f32>(&config, *saved, *files, &place(format!("{n}")), None);
            verify(&from).unwrap();
            let whole = dir.path().join(format!("{n}-whole"));
            consolidate(&from, &whole).unwrap();
            verify(&whole).unwrap();
            assert_eq!(diff(&from, &whole).unwrap(), [], "{saved:?} {files:?}");
            let parameters = Model::new(&config).unwrap().layout().parameters.len();
            assert_eq!(Tensors::of_optimizer(&from).unwrap().len(), 2 * parameters);
            for (m, (loaded, to)) in cuts.iter().enumerate() {
                let again = save::<f32>(&config, *loaded, *to, &place(format!("{n}-{m}")), Some(&from));
                assert_eq!(diff(&from, &again).unwrap(), [], "{saved:?} {files:?} to {loaded:?} {to:?}");
            }
        }
    }
}

/// As above, with masters beside what products read, which are collected otherwise.
#[test]
fn what_ranks_of_two_hosts_save_under_bf16_is_what_they_load() {
    let dir = tempfile::tempdir().unwrap();
    let over_hosts = Cut { kind: Kind::Fsdp, hosts: &[0, 0, 1], micro: 1 };
    let place = |name: &str| {
        let path = dir.path().join(name);
        std::fs::create_dir(&path).unwrap();
        path
    };
    let from = save::<bf16>(&tiny_config(), over_hosts, Files::Apart, &place("a"), None);
    let alone = save::<bf16>(&tiny_config(), ALONE, Files::Shared, &place("b"), Some(&from));
    let again = save::<bf16>(&tiny_config(), over_hosts, Files::Apart, &place("c"), Some(&alone));
    assert_eq!((diff(&from, &alone).unwrap(), diff(&from, &again).unwrap()), (vec![], vec![]));
}

/// A save takes nothing from the steps after it.
#[test]
fn training_goes_on_after_a_save_as_without_it() {
    let cut = Cut { kind: Kind::Fsdp, hosts: &[0, 0, 1], micro: 1 };
    let disks = disks(cut, Files::Apart);
    let losses = |saves: bool| {
        each(cut, |rank, seat| {
            let mut engine = engine::<f32>(&tiny_config(), cut, || seat.take());
            engine.fresh_weights(5).unwrap();
            let mut reports = step(&mut engine, cut, rank, 2);
            if saves {
                engine.snapshot(&disks, None).unwrap();
            }
            reports.extend(step(&mut engine, cut, rank, 3));
            reports
        })
    };
    assert_eq!(losses(false), losses(true));
}

fn same_curve(a: &[Report], b: &[Report], tolerance: f64, what: Cut) {
    for (step, (a, b)) in a.iter().zip(b).enumerate() {
        let close = |a: f64, b: f64| (a / b - 1.0).abs() < tolerance;
        assert!(close(a.loss, b.loss), "{what:?} loss of step {step}: {} {}", a.loss, b.loss);
        assert!(
            close(a.grad_norm, b.grad_norm),
            "{what:?} norm of step {step}: {} {}",
            a.grad_norm,
            b.grad_norm
        );
    }
}

#[test]
fn every_strategy_and_cut_trains_the_same_model() {
    for tied in [false, true] {
        let config = tiny_with(json!({"tie_word_embeddings": tied}));
        let (alone, _) = train::<f32>(&config, ALONE, 50).remove(0);
        assert!(alone[49].loss < 0.8 * alone[0].loss, "it learns: {alone:?}");
        let several = [&[0, 0, 1, 1][..], &[0, 1], &[0, 1, 1, 1], &[0, 1, 2, 0]].map(|hosts| (hosts, 1));
        let cuts = [(ONE_HOST[0], 4), (ONE_HOST[0], 1), (ONE_HOST[1], 1), (ONE_HOST[3], 1), (ONE_HOST[1], 2)];
        let cuts: Vec<_> = cuts.into_iter().chain(several).chain([(&[0, 1][..], 2)]).collect();
        for (kind, (hosts, micro)) in
            OF_SEVERAL.iter().flat_map(|kind| cuts.iter().map(move |cut| (*kind, *cut)))
        {
            let (cut, world) = (Cut { kind, hosts, micro }, hosts.len());
            let ranks = train::<f32>(&config, cut, 50);
            for (reports, weights) in &ranks {
                same_curve(reports, &alone, 1e-4, cut);
                assert_eq!(reports, &ranks[0].0, "{cut:?}: every rank knows the same");
                if !cut.is_sharded_over_hosts() {
                    assert_eq!(weights, &ranks[0].1, "{cut:?}: every rank has the same weights");
                }
                let stops: Vec<bool> = reports.iter().map(|r| r.votes.stop).collect();
                assert_eq!(stops.iter().filter(|s| **s).count(), usize::from(world > 1));
                assert_eq!(
                    stops[3],
                    world > 1,
                    "all ranks learn of a stop in the step in which one was asked"
                );
            }
        }
    }
}

#[test]
fn one_rank_has_the_same_bits_under_every_strategy() {
    let (alone, weights) = train::<f32>(&tiny_config(), ALONE, 6).remove(0);
    for kind in OF_SEVERAL {
        let (reports, others) = train::<f32>(&tiny_config(), Cut { kind, ..ALONE }, 6).remove(0);
        assert_eq!(
            reports.iter().map(|r| r.loss).collect::<Vec<_>>(),
            alone.iter().map(|r| r.loss).collect::<Vec<_>>()
        );
        assert!(others == weights, "{kind:?}");
    }
}

#[test]
fn bf16_ranks_train_like_one() {
    let (alone, _) = train::<bf16>(&tiny_config(), ALONE, 20).remove(0);
    let (fp32, _) = train::<f32>(&tiny_config(), ALONE, 20).remove(0);
    same_curve(&alone, &fp32, 5e-2, ALONE);
    let hosts = [&[0, 0][..], &[0, 1]];
    for (kind, hosts) in OF_SEVERAL.into_iter().flat_map(|kind| hosts.map(|hosts| (kind, hosts))) {
        let cut = Cut { kind, hosts, micro: 1 };
        for (reports, _) in train::<bf16>(&tiny_config(), cut, 20) {
            same_curve(&reports, &alone, 2e-2, cut);
        }
    }
}

#[test]
fn the_same_run_gives_the_same_bits() {
    let hosts = [&[0, 0, 0][..], &[0, 0, 1]];
    for (kind, hosts) in OF_SEVERAL.into_iter().flat_map(|kind| hosts.map(|hosts| (kind, hosts))) {
        let cut = Cut { kind, hosts, micro: 2 };
        let once = train::<f32>(&tiny_config(), cut, 6);
        let twice = train::<f32>(&tiny_config(), cut, 6);
        assert_eq!(once[0].1, twice[0].1);
        assert_eq!(once[0].0, twice[1].0);
    }
}

#[test]
fn a_step_in_which_nothing_counts_is_refused() {
    let mut engine = engine::<f32>(&tiny_config(), ALONE, || unreachable!("alone"));
    engine.fresh_weights(1).unwrap();
    let batch = TokenBatch { targets: vec![IGNORED; SEQ], ids: vec![1; SEQ], seq: SEQ, ..Default::default() };
    let update = Update { adamw: ADAMW, lr: 1e-3, step: 7 };
    let error = engine.step(&[batch], &update, Votes::default()).unwrap_err().to_string();
    assert!(error.contains("step 7"), "{error}");
}

#[test]
fn ranks_whose_machines_differ_go_by_the_smallest() {
    let cut = Cut { kind: Kind::Shared, hosts: &[0, 0, 1], micro: 1 };
    let found = each(cut, |rank, seat| {
        let mut gang = seat.take();
        let mine = [[24 << 30, usize::MAX], [23 << 30, 30 << 30], [64 << 30, 64 << 30]][rank];
        fits::worst(mine, 7 - rank, Some(&mut *gang as &mut dyn Gang)).unwrap()
    });
    assert_eq!(found, [[23 << 30, 30 << 30, 7]; 3]);
    assert_eq!(fits::worst([1, 2], 3, None).unwrap(), [1, 2, 3]);
}
