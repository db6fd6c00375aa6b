//! Every family against transformers: logits, loss, every gradient, greedy tokens with the cache.

#![allow(clippy::unwrap_used)] // helpers of tests

#[path = "../../../tests/parity/cases.rs"]
mod cases;

use cases::{Case, apart, cases, hits, targets};
use fleet_cpu::{Cache, CpuExecutor, Network, Storage, workers};
use fleet_learn::testing::Whole;
use fleet_learn::{Batch, Executor};
use half::bf16;

fn executor<E: Storage>(case: &Case, positions: usize, threads: u32) -> CpuExecutor<E> {
    let network = Network::new(case.model.decoder.clone(), case.model.wiring(), positions);
    CpuExecutor::new(network, workers(threads).unwrap())
}

fn check_forward<E: Storage>(case: &Case, threads: u32, tolerance: f32) {
    let (ids, shape) = case.ids("ids");
    let mut model = Whole::new(case.weights());
    let mut executor = executor::<E>(case, shape[1], threads);
    let logits = executor.logits(model.flat(), &ids, shape[1]).unwrap();
    let far = apart(&logits, &case.f32("logits"), 1e-6);
    assert!(far < tolerance, "{} in {}: logits {far}", case.name, E::NAME);
    let targets = targets(&ids, shape[1]);
    let batch = Batch { ids: &ids, targets: &targets, seq: shape[1], ..Default::default() };
    let tally = executor.evaluate(&mut model, &batch).unwrap();
    assert_eq!((tally.tokens, tally.weight), (batch.tokens(), batch.weight()));
    if !E::IS_BF16 {
        assert_eq!(tally.hits, hits(&logits, &targets), "{}", case.name);
    }
    let (loss, want) = (tally.mean(), case.f64("loss")[0]);
    assert!((loss - want).abs() < f64::from(tolerance), "{}: loss {loss}, {want}", case.name);
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
        for threads in [1, 2] {
            let mut executor = executor::<f32>(&case, shape[1], threads);
            let mut model = Whole::new(case.weights());
            for ids in ids.chunks(shape[1]) {
                let targets = targets(ids, shape[1]);
                let batch = Batch { ids, targets: &targets, seq: shape[1], ..Default::default() };
                let scale = 0.5 / (shape[1] - 1) as f32;
                executor.forward_backward(&mut model, &batch, scale).unwrap();
                model.grads.fresh = false;
            }
            case.check_gradients(&model.grads.numbers, 1e-4);
            let units = 0..executor.layout().units.len();
            let order: Vec<usize> = units.clone().rev().chain(units.rev()).collect();
            assert_eq!(model.done, order);
        }
    }
}

#[test]
fn blocks_that_are_computed_again_give_the_same_gradients() {
    for case in cases() {
        let (ids, shape) = case.ids("ids");
        let ids = &ids[..shape[1]];
        let targets = targets(ids, shape[1]);
        let batch = Batch { ids, targets: &targets, seq: shape[1], ..Default::default() };
        let gradients = |again| {
            let mut executor = executor::<f32>(&case, shape[1], 2).computing_again(again);
            let mut model = Whole::new(case.weights());
            executor.forward_backward(&mut model, &batch, 0.5).unwrap();
            // What no parameter has is no number.
            let bits: Vec<u32> = model.grads.numbers.into_iter().map(f32::to_bits).collect();
            (executor.take_loss().unwrap(), bits)
        };
        let kept = gradients(0);
        for again in 1..=case.model.decoder.layers + 1 {
            assert!(gradients(again) == kept, "{} with {again} blocks", case.name);
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
        let model = Whole::new(case.weights());
        let mut executor = executor::<f32>(&case, 64, 1);
        let mut cache = Cache::new(executor.network());
        let likeliest = |logits: &[f32]| {
            let best = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
            best.unwrap().0 as i64
        };
        let mut logits = executor.prefill(model.flat(), &greedy[..8], &mut cache).unwrap();
        for want in &greedy[8..] {
            assert_eq!(likeliest(&logits), *want, "{} after {} tokens", case.name, cache.len());
            logits = executor.decode(model.flat(), &[*want], &mut [&mut cache]).unwrap();
        }
    }
}

#[test]
fn weights_in_half_the_bytes_give_the_same_token() {
    for case in cases() {
        let compact: Vec<bf16> = case.weights().iter().map(|x| bf16::from_f32(*x)).collect();
        let model = Whole::new(compact.iter().map(|x| x.to_f32()).collect());
        let (ids, _) = case.ids("greedy");
        let decoded = |compact: Option<&[bf16]>, threads| {
            let mut executor = executor::<f32>(&case, 8, threads);
            let mut cache = Cache::new(executor.network());
            executor.prefill(model.flat(), &ids[..8], &mut cache).unwrap();
            executor.decode(model.flat().with_compact(compact), &ids[8..9], &mut [&mut cache]).unwrap()
        };
        let plain = decoded(None, 1);
        for threads in [1, 2] {
            let far = apart(&decoded(Some(&compact), threads), &plain, 1e-6);
            assert!(far < 1e-6, "{} by {threads} threads: {far}", case.name);
        }
    }
}
