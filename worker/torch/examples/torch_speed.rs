//! Training steps of a Llama on made-up data: tokens/s, and as a share of what the machine's largest product reaches.
//!
//!     torch_speed MODEL BATCH SEQ STEPS NUMBERS DEVICE     (124m | 1b | tiny; bf16 | bf16-stream | bf16-true | fp16 | fp32; cuda | cpu)

#![allow(clippy::unwrap_used, clippy::expect_used)] // an example ends at the first error

use fleet_common::model::{Family, Wiring};
use fleet_learn::{AdamW, Engine, Learner, TokenBatch, Update, Votes};
use fleet_torch::{Numbers, Solo, TorchExecutor, device};
use serde_json::json;
use std::time::Instant;
use tch::{Device, Kind, Tensor};

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [model, batch, seq, steps, numbers, place] = &args[..] else { panic!("see the head of the source") };
    let [batch, seq, steps] = [batch, seq, steps].map(|n| n.parse::<i64>().unwrap());
    let device = match place.as_str() {
        "cuda" => device::cuda_devices().map(|_| Device::Cuda(0)).unwrap(),
        _ => Device::Cpu,
    };
    let numbers = match numbers.as_str() {
        "bf16" => Numbers::BF16_MIXED,
        "bf16-stream" => Numbers { residual: Kind::BFloat16, ..Numbers::BF16_MIXED },
        "bf16-true" => Numbers::BF16_TRUE,
        "fp16" => Numbers::FP16_MIXED,
        _ => Numbers::FP32,
    };
    let shape = |h: u32, f: u32, layers: u32, heads: u32, kv: u32, vocab: u32, tied: bool| {
        json!({"model_type": "llama", "hidden_size": h, "intermediate_size": f, "num_hidden_layers": layers, "num_attention_heads": heads,
               "num_key_value_heads": kv, "vocab_size": vocab, "tie_word_embeddings": tied, "max_position_embeddings": 4096})
    };
    let config = match model.as_str() {
        "124m" => shape(768, 2048, 12, 12, 12, 50_304, true),
        "1b" => shape(2048, 5632, 22, 32, 4, 32_000, false),
        _ => shape(64, 128, 2, 4, 2, 256, false),
    };
    let (family, decoder) = Family::of_config(config.as_object().unwrap()).unwrap();
    let wiring = Wiring::new(&decoder, family);
    let layout = &wiring.layout;
    let (parameters, flops) = (layout.count(), decoder.flops_per_token(seq as usize));
    let vocab = decoder.vocab_size as i64;
    let solo = Solo::new(layout.clone(), device, numbers, 0).unwrap();
    let mut engine = Engine::new(TorchExecutor::new(decoder, wiring, device, numbers), solo);
    engine.fresh_weights(0).unwrap();
    let adamw = AdamW { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, max_grad_norm: 1.0 };
    let ids: Vec<i64> = (0..=batch * seq).map(|i| (i * i % 65_537 + 7 * i) % vocab).collect();
    let (inputs, targets) = (ids[..ids.len() - 1].to_vec(), ids[1..].to_vec());
    let batches = [TokenBatch { ids: inputs, targets, seq: seq as usize, ..Default::default() }];
    let wait = || {
        if let Device::Cuda(n) = device {
            tch::Cuda::synchronize(n as i64)
        }
    };

    println!("{}", engine.describe());
    let began = Instant::now();
    let mut timed = Instant::now();
    let mut last = f64::NAN;
    const WARM: i64 = 5;
    for step in 0..WARM + steps {
        if step == WARM {
            timed = Instant::now();
        }
        let update = Update { adamw, lr: 1e-4, step: step as u64 + 1 };
        last = engine.step(&batches, &update, Votes::default()).unwrap().loss;
        if step == 0 {
            println!("first step after {:.2} s, loss {last:.4}", began.elapsed().as_secs_f64());
        }
    }
    let per_step = timed.elapsed().as_secs_f64() / steps as f64;
    let peak = product_rate(numbers.products, device, &wait);
    let rate = batch as f64 * seq as f64 / per_step;
    println!(
        "fleet {model} {numbers:?} batch {batch} x {seq}: {rate:.0} tokens/s, {:.1} ms a step, {:.1}% of {:.0} TFLOP/s, {:.1} M parameters, loss {last:.4}",
        per_step * 1e3,
        100.0 * rate * flops / peak,
        peak / 1e12,
        parameters as f64 / 1e6,
    );
}

/// Operations per second of a large product.
fn product_rate(kind: Kind, device: Device, wait: &dyn Fn()) -> f64 {
    let n = if device == Device::Cpu { 1024 } else { 8192 };
    let a = Tensor::randn([n, n], (Kind::Float, device)).to_kind(kind);
    let out = a.matmul(&a);
    let (mut best, rounds) = (f64::MAX, 5);
    for _ in 0..3 {
        wait();
        let at = Instant::now();
        for _ in 0..rounds {
            let _ = a.matmul_out(&out, &a);
        }
        wait();
        best = best.min(at.elapsed().as_secs_f64() / f64::from(rounds));
    }
    2.0 * (n as f64).powi(3) / best
}
