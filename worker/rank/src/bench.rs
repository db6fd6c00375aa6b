//! `fleet-rank bench`: times optimizer steps of one rank on made-up data, without agent and data, and says what share of the speed of the
//! model's largest product they reach.

use fleet_cpu::product::Out;
use fleet_cpu::{Products, Storage, workers};
use fleet_learn::model::Model;
use fleet_learn::{AdamW, Learner, Result, TokenBatch, Update, Votes};
use fleet_rank::assemble::solo;
use half::bf16;
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
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
    /// Of keys and values; as many as `heads` where it is not given.
    #[arg(long)]
    kv_heads: Option<u32>,
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
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..))]
    steps: u64,
    #[arg(long)]
    bf16: bool,
    /// Print one JSON object at the end.
    #[arg(long)]
    json: bool,
}

pub fn run(args: &BenchArgs) -> Result<()> {
    if args.bf16 { time::<bf16>(args) } else { time::<f32>(args) }
}

fn time<E: Storage>(args: &BenchArgs) -> Result<()> {
    let began = Instant::now();
    let config = json!({
        "model_type": "llama", "vocab_size": args.vocab, "hidden_size": args.hidden, "intermediate_size": args.ffn,
        "num_hidden_layers": args.layers, "num_attention_heads": args.heads,
        "num_key_value_heads": args.kv_heads.unwrap_or(args.heads), "max_position_embeddings": args.seq,
        "rms_norm_eps": 1e-5,
    });
    let config = config.as_object().cloned().unwrap_or_default();
    let model = Model::new(&config)?;
    let mut engine = solo::<E>(&model, args.threads, args.seq)?;
    engine.fresh_weights(0)?;
    let adamw = AdamW { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, max_grad_norm: 1.0 };
    let t = args.seq * args.batch;
    let ids: Vec<i64> = (0..=t as i64).map(|i| (i * i + 7 * i) % i64::from(args.vocab)).collect();
    let batch = TokenBatch {
        ids: ids[..t].to_vec(),
        targets: ids[1..].to_vec(),
        seq: args.seq,
        ..Default::default()
    };
    let batches = [batch];
    let mut product = Largest::<E>::new(args)?;
    let (mut steps, mut products) = (Times::default(), Times::default());
    for step in 1..=args.steps {
        let report =
            steps.of(|| engine.step(&batches, &Update { adamw, lr: 1e-4, step }, Votes::default()))?;
        // In between, so that both meet the same machine.
        products.of(|| product.compute());
        if step == 1 && !args.json {
            println!("first step done after {:.3} s, loss {:.3}", began.elapsed().as_secs_f64(), report.loss);
        }
    }
    let (step, product_time) = (steps.median(), products.median());
    let (done, reached) =
        (model.decoder.flops_per_token(args.seq) * t as f64, product.flops() * Largest::<E>::TURNS as f64);
    let share = |step: f64, product: f64| done / step / (reached / product);
    let threads = f64::from(args.threads);
    let (gflops, of) = (done / step.cpu * threads / 1e9, reached / product_time.cpu * threads / 1e9);
    let (by_cpu, by_clock) = (share(step.cpu, product_time.cpu), share(step.clock, product_time.clock));
    let (rss, tokens_per_s) = (peak_rss_mib().unwrap_or(0), t as f64 / step.clock);
    if args.json {
        let line = serde_json::json!({
            "tokens_per_s": tokens_per_s, "gflops": gflops, "product_gflops": of, "share": by_cpu, "share_by_clock": by_clock,
            "rss_mib": rss,
        });
        println!("{line}");
        return Ok(());
    }
    println!(
        "{} ({}), {} parameters: {:.1} ms per step, {tokens_per_s:.0} tokens/s, best {:.0}; peak RSS {rss} MiB",
        E::NAME,
        engine.describe(),
        engine.layout().count(),
        step.clock * 1e3,
        t as f64 / steps.best(),
    );
    let (rows, inputs, outputs) = product.shape;
    println!(
        "{gflops:.1} of the {of:.1} GFLOP/s of its largest product ({rows} x {inputs} x {outputs}): {:.0} % by CPU time, {:.0} % by the clock",
        by_cpu * 100.0,
        by_clock * 100.0
    );
    Ok(())
}

/// The largest product of a model: the head's, or that of the feed-forward network.
struct Largest<E> {
    products: Products,
    x: Vec<E>,
    w: Vec<E>,
    out: Vec<E>,
    /// Tokens, inputs, outputs.
    shape: (usize, usize, usize),
}

impl<E: Storage> Largest<E> {
    /// So often in a row is it computed: once is short.
    const TURNS: usize = 3;
    /// Most numbers of its output.
    const OUT_MAX: usize = 1 << 23;

    fn new(args: &BenchArgs) -> Result<Largest<E>> {
        let (inputs, outputs) = (args.hidden as usize, args.vocab.max(2 * args.ffn) as usize);
        let rows = (args.seq * args.batch).min(Self::OUT_MAX / outputs);
        let numbers =
            |len: usize| (0..len).map(|i| E::from_f32((i * 7919 % 2003) as f32 / 1000.0 - 1.0)).collect();
        Ok(Largest {
            products: Products::new(workers(args.threads)?),
            x: numbers(rows * inputs),
            w: numbers(outputs * inputs),
            out: numbers(rows * outputs),
            shape: (rows, inputs, outputs),
        })
    }

    fn compute(&mut self) {
        for _ in 0..Self::TURNS {
            self.products.forward(&self.x, &self.w, Out::Store(&mut self.out), self.shape);
        }
    }

    fn flops(&self) -> f64 {
        2.0 * self.shape.0 as f64 * self.shape.1 as f64 * self.shape.2 as f64
    }
}

/// Seconds by the clock, and those that the process had a core, of all threads together.
#[derive(Clone, Copy)]
struct Time {
    clock: f64,
    cpu: f64,
}

#[derive(Default)]
struct Times(Vec<Time>);

impl Times {
    fn of<T>(&mut self, work: impl FnOnce() -> T) -> T {
        let (start, cpu) = (Instant::now(), cpu_seconds());
        let result = work();
        self.0.push(Time { clock: start.elapsed().as_secs_f64(), cpu: cpu_seconds() - cpu });
        result
    }

    fn sorted(&self, pick: impl Fn(&Time) -> f64) -> Vec<f64> {
        let mut times: Vec<f64> = self.0.iter().map(pick).collect();
        times.sort_by(f64::total_cmp);
        times
    }

    fn median(&self) -> Time {
        let middle = self.0.len() / 2;
        Time { clock: self.sorted(|time| time.clock)[middle], cpu: self.sorted(|time| time.cpu)[middle] }
    }

    fn best(&self) -> f64 {
        self.sorted(|time| time.clock)[0]
    }
}

fn cpu_seconds() -> f64 {
    let used = getrusage(UsageWho::RUSAGE_SELF).expect("a process may ask for its own usage");
    (used.user_time() + used.system_time()).num_microseconds() as f64 / 1e6
}

fn peak_rss_mib() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? / 1024)
}
