//! The same training under every strategy, on one host and on several: alone, with all gradients, and in shards.

#![allow(clippy::unwrap_used)] // a test may panic

mod accumulating;
mod hosts;
mod poison;
mod reached;

use fleet_checkpoint::{CONFIG_FILE, Claim, PartWriter, RunDir, Tensors, Writer, consolidate, diff, verify};
use fleet_collectives::{Gang, SharedHost};
use fleet_common::model::{Layout, Object};
use fleet_cpu::{CpuExecutor, Network, Storage, workers};
use fleet_learn::model::Model;
use fleet_learn::strategy::{Sharded, Shared, Solo};
use fleet_learn::testing::{tiny_config, tiny_with, token_ids};
use fleet_learn::{AdamW, Engine, Host, IGNORED, Learner, Report, TokenBatch, Update, Votes};
use fleet_rank::fits;
use half::bf16;
use hosts::seats;
use serde_json::json;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

const ADAMW: AdamW = AdamW { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, max_grad_norm: 1.0 };
const SEQ: usize = 12;
const SEQUENCES: usize = 8;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Solo,
    Shared,
    Fsdp,
    Hsdp,
}

/// All that take several ranks.
const OF_SEVERAL: [Kind; 3] = [Kind::Shared, Kind::Fsdp, Kind::Hsdp];

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

    /// Each rank has no more than its part of the weights.
    fn is_sharded_over_hosts(self) -> bool {
        self.kind == Kind::Fsdp && self.hosts.iter().any(|host| *host > 0)
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
    let executor = CpuExecutor::<E>::new(Network::new(model.decoder, layout.clone(), SEQ), workers.clone());
    match cut.kind {
        Kind::Solo => Engine::new(executor, Solo::<E>::new(layout, workers, 1).unwrap()),
        Kind::Shared => Engine::new(executor, Shared::<E>::new(layout, workers, gang()).unwrap()),
        Kind::Fsdp => Engine::new(executor, Sharded::<E>::fully(layout, workers, gang()).unwrap()),
        Kind::Hsdp => Engine::new(executor, Sharded::<E>::within_hosts(layout, workers, gang()).unwrap()),
    }
}

/// Some targets do not count and others count more, unevenly over the sequences: the ranks' shares of the loss differ.
fn global_batch(step: u64) -> TokenBatch {
    let ids = token_ids(SEQUENCES * SEQ, 97, step % 3);
    let mut targets = token_ids(SEQUENCES * SEQ, 97, step % 3 + 50);
    targets[..SEQ + 5].fill(IGNORED);
    let weights = (0..ids.len()).map(|at| if at % 5 == 0 { 2.0 } else { 1.0 }).collect();
    TokenBatch { ids, targets, weights: Some(weights), seq: SEQ }
}

fn run<E: Storage>(mut engine: Engine<Host<E>>, cut: Cut, rank: usize, steps: u64) -> Trained {
    engine.fresh_weights(5).unwrap();
    let reports = step(&mut engine, cut, rank, steps);
    let weights = engine.weights().unwrap().into_owned();
    (reports, weights)
}

fn step<E: Storage>(engine: &mut Engine<Host<E>>, cut: Cut, rank: usize, steps: u64) -> Vec<Report> {
    let size = SEQUENCES / cut.micro / cut.world() * SEQ;
    (1..=steps)
        .map(|step| {
            let whole = global_batch(step);
            let part = |micro: usize| {
                let at = micro * cut.world() + rank;
                let range = at * size..(at + 1) * size;
                TokenBatch {
                    ids: whole.ids[range.clone()].to_vec(),
                    targets: whole.targets[range.clone()].to_vec(),
                    weights: whole.weights.as_ref().map(|weights| weights[range].to_vec()),
                    seq: SEQ,
                }
            };
            let batches: Vec<TokenBatch> = (0..cut.micro).map(part).collect();
            let update = Update { adamw: ADAMW, lr: 3e-3, step };
            engine.step(&batches, &update, Votes { stop: rank == 1 && step == 4, time: false }).unwrap()
        })
        .collect()
}

/// A checkpoint in `dir` of what `from` has, or of a run of three steps.
fn save<E: Storage>(config: &Object, cut: Cut, dir: &Path, from: Option<&Path>) -> PathBuf {
    let claim = Claim { dir, run: "r", resumed: None, overwrite: false, until: None, reads: &[] };
    let run_dir = RunDir::claim(&claim).unwrap();
    let writers = cut.hosts.iter().filter(|host| **host == 0).count();
    let writer = Writer::begin(&run_dir, 3).unwrap().of("test", writers as u32);
    let ticket = writer.ticket();
    let lead = Mutex::new(Some(writer));
    let records = each(cut, |rank, seat| {
        let lead = if rank == 0 { lead.lock().unwrap().take() } else { None };
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
        if rank >= engine.writers() {
            engine.accompany_snapshot().unwrap();
            return None;
        }
        let mut snapshot = engine.snapshot(None).unwrap();
        match lead {
            Some(mut writer) => {
                snapshot.write(writer.part()).unwrap();
                let json = Model::new(config).unwrap().config_json();
                writer.write_bytes(CONFIG_FILE, &serde_json::to_vec(&json).unwrap()).unwrap();
                Some(writer.finish_together(1.0, &|| true).unwrap())
            }
            None => {
                let mut part = PartWriter::join(dir, 3, ticket, rank as u32);
                snapshot.write(&mut part).unwrap();
                part.hand_in().unwrap();
                None
            }
        }
    });
    let record = records[0].as_ref().unwrap();
    assert_eq!(record.flaw(), None);
    record.path.clone().into()
}

/// Under every pair of strategies, to the last bit, with what of the state is padding left out.
#[test]
fn what_n_ranks_save_m_ranks_load() {
    let transposed = json!({"model_type": "gpt2", "vocab_size": 97, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 64});
    let configs = [tiny_config(), transposed.as_object().cloned().unwrap()];
    let mut cuts = vec![ALONE];
    let cut = |kind, hosts| Cut { kind, hosts, micro: 1 };
    cuts.extend(ONE_HOST.map(|hosts| cut(Kind::Shared, hosts)));
    cuts.extend([&[0][..], &[0, 1], &[0, 0, 1], &[0, 1, 1, 1]].map(|hosts| cut(Kind::Fsdp, hosts)));
    cuts.extend([&[0, 0, 0][..], &[0, 0, 1, 1]].map(|hosts| cut(Kind::Hsdp, hosts)));
    for config in configs {
        let dir = tempfile::tempdir().unwrap();
        let place = |name: String| {
            let path = dir.path().join(name);
            std::fs::create_dir(&path).unwrap();
            path
        };
        for (n, saved) in cuts.iter().enumerate() {
            let from = save::<f32>(&config, *saved, &place(format!("{n}")), None);
            verify(&from).unwrap();
            let whole = dir.path().join(format!("{n}-whole"));
            consolidate(&from, &whole).unwrap();
            verify(&whole).unwrap();
            assert_eq!(diff(&from, &whole).unwrap(), [], "{saved:?}");
            let parameters = Model::new(&config).unwrap().layout().parameters.len();
            assert_eq!(Tensors::of_model(&from).unwrap().len(), parameters);
            assert_eq!(Tensors::of_optimizer(&from).unwrap().len(), 2 * parameters);
            for (m, loaded) in cuts.iter().enumerate() {
                let again = save::<f32>(&config, *loaded, &place(format!("{n}-{m}")), Some(&from));
                assert_eq!(diff(&from, &again).unwrap(), [], "{saved:?} to {loaded:?}");
            }
        }
    }
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
        let (alone, _) = train::<f32>(&config, ALONE, 20).remove(0);
        assert!(alone[19].loss < 0.8 * alone[0].loss, "it learns: {alone:?}");
        let several = [&[0, 0, 1, 1][..], &[0, 1], &[0, 1, 1, 1], &[0, 1, 2, 0]].map(|hosts| (hosts, 1));
        let cuts = [(ONE_HOST[0], 4), (ONE_HOST[0], 1), (ONE_HOST[1], 1), (ONE_HOST[3], 1), (ONE_HOST[1], 2)];
        let cuts: Vec<_> = cuts.into_iter().chain(several).chain([(&[0, 1][..], 2)]).collect();
        for (kind, (hosts, micro)) in
            OF_SEVERAL.iter().flat_map(|kind| cuts.iter().map(move |cut| (*kind, *cut)))
        {
            let (cut, world) = (Cut { kind, hosts, micro }, hosts.len());
            let ranks = train::<f32>(&config, cut, 20);
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
    let batch = TokenBatch { targets: vec![IGNORED; SEQ], ids: vec![1; SEQ], weights: None, seq: SEQ };
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
        fits::smallest(mine, Some(&mut *gang as &mut dyn Gang)).unwrap()
    });
    assert_eq!(found, [[23 << 30, 30 << 30]; 3]);
    assert_eq!(fits::smallest([1, 2], None).unwrap(), [1, 2]);
}
