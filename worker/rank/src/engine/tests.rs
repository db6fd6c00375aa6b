use super::*;
use crate::testing::{tiny_config, tiny_with, token_ids};
use fleet_collectives::{Segment, ShmCollective, Solo};
use fleet_common::model::Object;
use serde_json::json;
use std::os::fd::AsRawFd;

const ADAMW: AdamW = AdamW { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, max_grad_norm: 1.0 };
const SEQ: usize = 12;
const SEQUENCES: usize = 8;

/// Trains `steps` on `world` ranks (threads of this process) with the global batch cut into `micro` micro-batches; gives each rank's
/// reports and weights.
fn train<E: Storage>(
    config: &Object,
    world: usize,
    micro: usize,
    steps: u64,
) -> Vec<(Vec<Report>, Vec<f32>)> {
    let segment = Segment::create(world, 1).unwrap();
    std::thread::scope(|scope| {
        let ranks: Vec<_> = (0..world)
            .map(|rank| {
                let segment = &segment;
                scope.spawn(move || {
                    let collective: Box<dyn Collective> = match world {
                        1 => Box::new(Solo::new(1)),
                        _ => {
                            Box::new(ShmCollective::attach(segment.fd().as_raw_fd(), rank, world, 1).unwrap())
                        }
                    };
                    run::<E>(config, collective, micro, steps)
                })
            })
            .collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

fn run<E: Storage>(
    config: &Object,
    collective: Box<dyn Collective>,
    micro: usize,
    steps: u64,
) -> (Vec<Report>, Vec<f32>) {
    let (rank, world) = (collective.rank(), collective.world_size());
    let mut engine =
        Engine::<E>::new(Model::new(config).unwrap().network(SEQ), Workers::new(1).unwrap(), collective)
            .unwrap();
    engine.fresh_weights(5).unwrap();
    let size = SEQUENCES / micro / world * SEQ;
    let reports = (1..=steps)
        .map(|step| {
            let ids = token_ids(SEQUENCES * SEQ, 97, step % 3);
            let targets = token_ids(SEQUENCES * SEQ, 97, step % 3 + 50);
            let batches: Vec<Batch> = (0..micro)
                .map(|m| {
                    let at = (m * world + rank) * size;
                    Batch { ids: &ids[at..at + size], targets: &targets[at..at + size], seq: SEQ }
                })
                .collect();
            let tokens = (SEQUENCES * SEQ) as u64;
            engine
                .step(
                    batches.into_iter(),
                    tokens,
                    &ADAMW,
                    3e-3,
                    step,
                    Votes { stop: rank == 1 && step == 4, time: false },
                )
                .unwrap()
        })
        .collect();
    (reports, engine.weights().to_vec())
}

fn same_curve(a: &[Report], b: &[Report], tolerance: f64) {
    for (step, (a, b)) in a.iter().zip(b).enumerate() {
        assert!((a.loss / b.loss - 1.0).abs() < tolerance, "loss of step {step}: {} {}", a.loss, b.loss);
        assert!(
            (a.grad_norm / b.grad_norm - 1.0).abs() < tolerance,
            "norm of step {step}: {} {}",
            a.grad_norm,
            b.grad_norm
        );
    }
}

#[test]
fn any_number_of_ranks_and_micro_batches_trains_the_same_model() {
    for tied in [false, true] {
        let config = tiny_with(json!({"tie_word_embeddings": tied}));
        let single = train::<f32>(&config, 1, 1, 20).remove(0);
        assert!(single.0[19].loss < 0.8 * single.0[0].loss, "it learns: {:?}", single.0);
        for (world, micro) in [(1, 4), (2, 1), (4, 1), (2, 2)] {
            let ranks = train::<f32>(&config, world, micro, 20);
            for (reports, weights) in &ranks {
                same_curve(reports, &single.0, 1e-4);
                assert_eq!(weights, &ranks[0].1, "every rank has the same weights");
                let stops: Vec<bool> = reports.iter().map(|r| r.votes.stop).collect();
                assert_eq!(stops.iter().any(|s| *s), world > 1);
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
fn bf16_ranks_train_like_one() {
    let single = train::<bf16>(&tiny_config(), 1, 1, 20).remove(0);
    let fp32 = train::<f32>(&tiny_config(), 1, 1, 20).remove(0);
    same_curve(&single.0, &fp32.0, 5e-2);
    for (reports, _) in train::<bf16>(&tiny_config(), 2, 1, 20) {
        same_curve(&reports, &single.0, 2e-2);
    }
}

#[test]
fn the_same_run_gives_the_same_bits() {
    let once = train::<f32>(&tiny_config(), 2, 2, 6);
    let twice = train::<f32>(&tiny_config(), 2, 2, 6);
    assert_eq!(once[0].1, twice[0].1);
    assert_eq!(once[0].0, twice[1].0);
}
