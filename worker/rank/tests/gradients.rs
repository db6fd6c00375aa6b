//! The explicit forward and backward against the same model written with tch operations and differentiated by autograd.

#![allow(clippy::unwrap_used)] // a test may panic
#![allow(clippy::assign_op_pattern)] // in tch `+=` works in place, which autograd would refuse

use fleet_common::model::{Decoder, Layout, Object, Positions};
use fleet_cpu::{CpuExecutor, Network, Storage, workers};
use fleet_learn::model::{Model, init};
use fleet_learn::testing::{Whole, tiny_with, token_ids};
use fleet_learn::{Batch, Executor, neftune};
use half::bf16;
use serde_json::json;
use tch::{Kind, Tensor};

/// Loss (summed) and gradients by name, by autograd in fp64.
fn oracle(
    decoder: &Decoder,
    layout: &Layout,
    flat: &[f32],
    batch: Batch,
    scale: f64,
) -> (f64, Vec<Vec<f64>>) {
    let [h, heads, kv, hd] = [
        decoder.hidden_size,
        decoder.attention.heads,
        decoder.attention.kv_heads,
        decoder.attention.head_dim,
    ]
    .map(|n| n as i64);
    let Positions::Rotary(rotary) = &decoder.positions else { panic!("a Llama turns its heads") };
    let weights: Vec<Tensor> = layout
        .parameters
        .iter()
        .map(|p| {
            let shape: Vec<i64> = p.shape.iter().map(|n| *n as i64).collect();
            Tensor::from_slice(&flat[p.range.clone()])
                .to_kind(Kind::Double)
                .reshape(shape)
                .set_requires_grad(true)
        })
        .collect();
    let get = |name: &str| &weights[layout.parameters.iter().position(|p| p.name == name).unwrap()];
    let s = batch.seq as i64;
    let b = batch.ids.len() as i64 / s;
    let norm = |x: &Tensor, w: &Tensor| {
        x * (x.square().mean_dim(-1, true, Kind::Double) + decoder.norm.eps).rsqrt() * w
    };
    let frequency = (Tensor::arange_start_step(0, hd, 2, (Kind::Double, tch::Device::Cpu)) / hd as f64
        * -rotary.theta.ln())
    .exp();
    let angle = Tensor::arange(s, (Kind::Double, tch::Device::Cpu)).outer(&frequency);
    let angle = Tensor::cat(&[&angle, &angle], -1);
    let rotate = |x: &Tensor| {
        let half = hd / 2;
        let turned = Tensor::cat(&[-x.narrow(-1, half, half), x.narrow(-1, 0, half)], -1);
        x * angle.cos() + turned * angle.sin()
    };
    let mask = Tensor::full([s, s], f64::NEG_INFINITY, (Kind::Double, tch::Device::Cpu)).triu(1);

    let ids = Tensor::from_slice(batch.ids);
    let mut x = get("model.embed_tokens.weight").index_select(0, &ids).reshape([b, s, h]) + moved(batch, h);
    for layer in 0..decoder.layers {
        let get = |part: &str| get(&format!("model.layers.{layer}.{part}.weight"));
        let n = norm(&x, get("input_layernorm"));
        let split = |w: &Tensor, count: i64| n.matmul(&w.tr()).reshape([b, s, count, hd]).transpose(1, 2);
        let q = rotate(&split(get("self_attn.q_proj"), heads));
        let k = rotate(&split(get("self_attn.k_proj"), kv)).repeat_interleave_self_int(heads / kv, 1, None);
        let v = split(get("self_attn.v_proj"), kv).repeat_interleave_self_int(heads / kv, 1, None);
        let p = (q.matmul(&k.transpose(-1, -2)) / (hd as f64).sqrt() + &mask).softmax(-1, Kind::Double);
        let o = p.matmul(&v).transpose(1, 2).reshape([b, s, heads * hd]);
        x = x + o.matmul(&get("self_attn.o_proj").tr());
        let n = norm(&x, get("post_attention_layernorm"));
        let inner = n.matmul(&get("mlp.gate_proj").tr()).silu() * n.matmul(&get("mlp.up_proj").tr());
        x = x + inner.matmul(&get("mlp.down_proj").tr());
    }
    let n = norm(&x, get("model.norm.weight"));
    let head = if decoder.tied { "model.embed_tokens.weight" } else { "lm_head.weight" };
    let logits = n.matmul(&get(head).tr()).reshape([b * s, decoder.vocab_size as i64]);
    let targets = Tensor::from_slice(batch.targets);
    let loss = logits.cross_entropy_loss::<Tensor>(&targets, None, tch::Reduction::Sum, -100, 0.0);
    (&loss * scale).backward();
    let grads = weights.iter().map(|w| Vec::try_from(w.grad().reshape([-1])).unwrap()).collect();
    (loss.double_value(&[]), grads)
}

/// By what the embeddings of `h` numbers are moved, `[b, s, h]`.
fn moved(batch: Batch, h: i64) -> Tensor {
    let mut rows = vec![0.0f32; batch.ids.len() * h as usize];
    for (at, row) in rows.chunks_exact_mut(h as usize).enumerate() {
        let (sequence, token) = (at / batch.seq, at % batch.seq);
        let Some(noise) = batch.noise else { break };
        neftune::apply(noise[sequence], batch.neftune, (token, batch.seq), row);
    }
    Tensor::from_slice(&rows).to_kind(Kind::Double).reshape([-1, batch.seq as i64, h])
}

/// Relative distance of two vectors.
fn distance(got: &[f32], want: &[f64]) -> f64 {
    let norm = want.iter().map(|v| v * v).sum::<f64>().sqrt();
    got.iter().zip(want).map(|(g, w)| (f64::from(*g) - w).powi(2)).sum::<f64>().sqrt() / norm.max(1e-12)
}

fn check<E: Storage>(config: Object, threads: u32, tolerance: f64, neftune: f32) {
    let seq = 13;
    let ids = token_ids(3 * seq, 97, 1);
    let mut targets = token_ids(3 * seq, 97, 2);
    targets[5] = -100;
    targets[12] = -100;
    let batch =
        Batch { ids: &ids, targets: &targets, seq, noise: Some(&[7, 8, 9]), neftune, ..Default::default() };
    let model = Model::new(&config).unwrap();
    let decoder = model.decoder.clone();
    let layout = model.layout();
    let mut flat = vec![0.0; layout.len];
    for p in &layout.parameters {
        init::fill(p, 0..usize::MAX, 3, &mut flat, 0);
    }
    // Norm weights that are not all 1.
    for p in layout.parameters.iter().filter(|p| p.role.is_vector()) {
        flat[p.range.clone()].iter_mut().enumerate().for_each(|(i, w)| *w = 0.75 + (i % 7) as f32 / 8.0);
    }
    let mut whole = Whole::new(flat);
    let mut executor = CpuExecutor::<E>::new(
        Network::new(model.decoder.clone(), model.wiring(), 32),
        workers(threads).unwrap(),
    );
    executor.forward_backward(&mut whole, &batch, 0.5).unwrap();
    let loss = executor.take_loss().unwrap();

    let (want, grads) = oracle(&decoder, &layout, &whole.master, batch, 0.5);
    assert!((loss - want).abs() / want < tolerance, "loss {loss} {want}");
    for (p, want) in layout.parameters.iter().zip(&grads) {
        let off = distance(&whole.grads.numbers[p.range.clone()], want);
        assert!(off < tolerance, "{}: {off}", p.name);
    }
    assert_eq!(whole.done, (0..layout.units.len()).rev().collect::<Vec<_>>());

    // A second micro-batch adds; evaluation gives the same loss.
    whole.grads.fresh = false;
    executor.forward_backward(&mut whole, &batch, 0.5).unwrap();
    assert_eq!(executor.take_loss().unwrap(), loss);
    for (p, want) in layout.parameters.iter().zip(&grads) {
        let doubled: Vec<f64> = want.iter().map(|v| 2.0 * v).collect();
        let off = distance(&whole.grads.numbers[p.range.clone()], &doubled);
        assert!(off < tolerance, "{} twice: {off}", p.name);
    }
    let evaluated = executor.evaluate(&mut whole, &batch).unwrap();
    assert_eq!(evaluated.tokens, 37);
    assert_eq!((evaluated.loss - loss).abs() < 1e-3 * loss, neftune == 0.0, "{} {loss}", evaluated.loss);
}

#[test]
fn fp32_gradients_are_autograds() {
    for tied in [false, true] {
        for threads in [1, 2] {
            for neftune in [0.0, 20.0] {
                check::<f32>(tiny_with(json!({"tie_word_embeddings": tied})), threads, 2e-5, neftune);
            }
        }
    }
}

#[test]
fn bf16_gradients_are_autograds_within_bf16() {
    for tied in [false, true] {
        check::<bf16>(tiny_with(json!({"tie_word_embeddings": tied})), 1, 3e-2, 0.0);
    }
}
