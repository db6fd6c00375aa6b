//! `fleet-rank bench`: times optimizer steps of one rank on made-up data, without agent and data.

use fleet_cpu::Storage;
use fleet_learn::model::Model;
use fleet_learn::{AdamW, Learner, Result, TokenBatch, Update, Votes};
use fleet_rank::assemble::solo;
use half::bf16;
use serde_json::json;
use std::time::Instant;

/// The defaults are the model that bench/README.md measures.
#[derive(clap::Args)]
pub struct BenchArgs {
    #[arg(long, default_value_t = 384)]
    hidden: u32,
    #[arg(long, default_value_t = 6)]
    layers: u32,
    #[arg(long, default_value_t = 6)]
    heads: u32,
    #[arg(long, default_value_t = 1024)]
    ffn: u32,
    #[arg(long, default_value_t = 4096)]
    vocab: u32,
    #[arg(long, default_value_t = 256)]
    seq: usize,
    #[arg(long, default_value_t = 4)]
    batch: usize,
    #[arg(long, default_value_t = 1)]
    threads: u32,
    #[arg(long, default_value_t = 10)]
    steps: u64,
    #[arg(long)]
    bf16: bool,
}

pub fn run(args: &BenchArgs) -> Result<()> {
    if args.bf16 { time::<bf16>(args) } else { time::<f32>(args) }
}

fn time<E: Storage>(args: &BenchArgs) -> Result<()> {
    let began = Instant::now();
    let config = json!({
        "model_type": "llama", "vocab_size": args.vocab, "hidden_size": args.hidden, "intermediate_size": args.ffn,
        "num_hidden_layers": args.layers, "num_attention_heads": args.heads, "max_position_embeddings": args.seq,
        "rms_norm_eps": 1e-5,
    });
    let config = config.as_object().cloned().unwrap_or_default();
    let mut engine = solo::<E>(&Model::new(&config)?, args.threads, args.seq)?;
    engine.fresh_weights(0)?;
    let adamw = AdamW { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, max_grad_norm: 1.0 };
    let t = args.seq * args.batch;
    let ids: Vec<i64> = (0..=t as i64).map(|i| (i * i + 7 * i) % i64::from(args.vocab)).collect();
    let batch =
        TokenBatch { ids: ids[..t].to_vec(), targets: ids[1..].to_vec(), weights: None, seq: args.seq };
    let batches = [batch];
    let mut times = Vec::new();
    for step in 1..=args.steps {
        let start = Instant::now();
        let report = engine.step(&batches, &Update { adamw, lr: 1e-4, step }, Votes::default())?;
        times.push(start.elapsed().as_secs_f64());
        if step == 1 {
            println!("first step done after {:.3} s, loss {:.3}", began.elapsed().as_secs_f64(), report.loss);
        }
    }
    times.sort_by(f64::total_cmp);
    let median = times[times.len() / 2];
    println!(
        "{} ({}), {} parameters: {:.1} ms per step, {:.0} tokens/s, best {:.0}; peak RSS {} MiB",
        E::NAME,
        engine.describe(),
        engine.layout().count(),
        median * 1e3,
        t as f64 / median,
        t as f64 / times[0],
        peak_rss_mib().unwrap_or(0)
    );
    Ok(())
}

fn peak_rss_mib() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? / 1024)
}
