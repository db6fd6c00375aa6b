//! Every family against transformers: logits, loss, every gradient, greedy tokens with the cache.

#![allow(clippy::unwrap_used)] // helpers of tests

#[path = "../../../tests/parity/cases.rs"]
mod cases;

use cases::{Case, apart, cases, hits, targets};
use fleet_cpu::{Batch, Cache, Network, Products, Sink, Storage, Weights, Workers, Workspace};
use half::bf16;
use std::convert::Infallible;
use std::ops::Range;

/// Gradients in a plain vector.
struct VecSink {
    grads: Vec<f32>,
    fresh: bool,
    done: Vec<Range<usize>>,
}

impl Sink for VecSink {
    type Error = Infallible;
    fn range(&mut self, range: Range<usize>) -> &mut [f32] {
        &mut self.grads[range]
    }
    fn fresh(&self) -> bool {
        self.fresh
    }
    fn unit_done(&mut self, unit: &Range<usize>) -> Result<(), Infallible> {
        self.done.push(unit.clone());
        Ok(())
    }
}

fn network(case: &Case, positions: usize) -> Network {
    Network::new(case.model.decoder.clone(), case.model.layout.clone(), positions)
}

fn check_forward<E: Storage>(case: &Case, threads: u32, tolerance: f32) {
    let (ids, shape) = case.ids("ids");
    let master = case.weights();
    let copy: Vec<bf16> = master.iter().map(|x| bf16::from_f32(*x)).collect();
    let weights = Weights::<E>::new(&master, &copy);
    let network = network(case, shape[1]);
    let mut products = Products::new(Workers::new(threads).unwrap());
    let mut work = Workspace::new();
    let logits = network.logits(weights, &ids, shape[1], &mut products, &mut work);
    let far = apart(&logits, &case.f32("logits"), 1e-6);
    assert!(far < tolerance, "{} in {}: logits {far}", case.name, E::NAME);
    let targets = targets(&ids, shape[1]);
    let batch = Batch { ids: &ids, targets: &targets, seq: shape[1] };
    let loss = network.loss(weights, batch, &mut products, &mut work);
    let (loss, want) = (loss.sum / loss.tokens as f64, case.f64("loss")[0]);
    assert!((loss - want).abs() < f64::from(tolerance), "{}: loss {loss}, {want}", case.name);
    let score = network.score(weights, batch, &mut products, &mut work);
    assert_eq!(score.loss, network.loss(weights, batch, &mut products, &mut work), "{}", case.name);
    if !E::IS_BF16 {
        assert_eq!(score.hits, hits(&logits, &targets), "{}", case.name);
    }
}

#[test]
fn logits_and_loss_are_those_of_transformers_in_both_precisions() {
    for case in cases() {
        for threads in [1, 2] {
            check_forward::<f32>(&case, threads, 1e-5);
        }
        check_forward::<bf16>(&case, 1, 2e-2);
    }
}

#[test]
fn every_gradient_is_that_of_transformers() {
    for case in cases() {
        let (ids, shape) = case.ids("ids");
        let master = case.weights();
        let network = network(&case, shape[1]);
        for threads in [1, 2] {
            let mut products = Products::new(Workers::new(threads).unwrap());
            let mut work = Workspace::new();
            // What is there is overwritten by the first micro-batch.
            let mut sink = VecSink { grads: vec![7.0; master.len()], fresh: true, done: Vec::new() };
            for ids in ids.chunks(shape[1]) {
                let targets = targets(ids, shape[1]);
                let batch = Batch { ids, targets: &targets, seq: shape[1] };
                let scale = 0.5 / (shape[1] - 1) as f32;
                let weights = Weights::<f32>::new(&master, &[]);
                let Ok(_) =
                    network.forward_backward(weights, batch, scale, &mut products, &mut work, &mut sink);
                sink.fresh = false;
            }
            case.check_gradients(&sink.grads, 1e-4);
            let units = &network.layout.units;
            let order: Vec<_> = units.iter().rev().chain(units.iter().rev()).cloned().collect();
            assert_eq!(sink.done, order);
        }
    }
}

#[test]
fn greedy_tokens_come_one_by_one_as_from_whole_sequences() {
    for case in cases() {
        // Transformers' dynamic embeddings turn all of a sequence anew when it grows, which a cache of turned keys cannot follow.
        if case.name == "llama_dynamic" {
            continue;
        }
        let (greedy, _) = case.ids("greedy");
        let master = case.weights();
        let network = network(&case, 64);
        let mut products = Products::new(Workers::new(1).unwrap());
        let (mut work, mut cache) = (Workspace::new(), Cache::new(&network));
        let weights = Weights::<f32>::new(&master, &[]);
        let likeliest = |logits: &[f32]| {
            let best = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
            best.unwrap().0 as i64
        };
        let mut logits = network.prefill(weights, &greedy[..8], &mut cache, &mut products, &mut work);
        for want in &greedy[8..] {
            assert_eq!(likeliest(&logits), *want, "{} after {} tokens", case.name, cache.len());
            logits = network.decode(weights, *want, &mut cache, &mut products, &mut work);
        }
    }
}
