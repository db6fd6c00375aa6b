//! Speed of every kernel on this machine: GB/s of memory touched, or GFLOP/s. Best of many repetitions, CPU time of one thread.
//! `cargo run -p fleet-kernels --example speed [FILTER]`. Shapes: the benchmark model, 4 sequences of 256 tokens.

#![allow(unsafe_code)] // the thread's clock

use fleet_kernels::*;
use std::hint::black_box;

const ROWS: usize = 1024;
const D: usize = 384;
const F: usize = 1024;
const VOCAB: usize = 4096;

/// Seconds that this thread has run: time in which other programs had the core does not count.
fn thread_seconds() -> f64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the kernel writes one timespec.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut now) };
    now.tv_sec as f64 + now.tv_nsec as f64 * 1e-9
}

/// Seconds of the fastest run.
fn best(mut run: impl FnMut()) -> f64 {
    let (start, mut best) = (thread_seconds(), f64::INFINITY);
    while thread_seconds() - start < 0.2 {
        let began = thread_seconds();
        run();
        best = best.min(thread_seconds() - began);
    }
    best
}

struct Report {
    filter: String,
}

impl Report {
    fn line(&self, name: &str, unit: &str, amount: f64, run: impl FnMut()) {
        if name.contains(&self.filter) {
            let seconds = best(run);
            println!("{name:<36} {:>9.1} us {:>8.1} {unit}", seconds * 1e6, amount / seconds / 1e9);
        }
    }
    fn bytes(&self, name: &str, bytes: usize, run: impl FnMut()) {
        self.line(name, "GB/s", bytes as f64, run);
    }
    fn flops(&self, name: &str, flops: usize, run: impl FnMut()) {
        self.line(name, "GFLOP/s", flops as f64, run);
    }
}

fn numbers<T: Element>(len: usize) -> Vec<T> {
    (0..len).map(|i| T::from_f32((i * 7919 % 2003) as f32 / 1000.0 - 1.0)).collect()
}

fn products<T: Element>(report: &Report, name: &str) {
    let mut scratch = Scratch::new();
    for (n, k) in [(1152, D), (D, D), (2 * F, D), (D, F), (VOCAB, D)] {
        let (x, w, dy) = (numbers::<T>(ROWS * k), numbers::<T>(n * k), numbers::<T>(ROWS * n));
        let (mut y, mut dx, mut dw) = (numbers::<T>(ROWS * n), numbers::<T>(ROWS * k), numbers::<f32>(n * k));
        let flops = 2 * ROWS * n * k;
        report.flops(&format!("{name} y=xW' {ROWS}x{k}x{n}"), flops, || {
            gemm(Matrix::new(&x, ROWS, k), Matrix::new(&w, n, k).t(), Store::Set, &mut y, &mut scratch)
        });
        report.flops(&format!("{name} dx=dyW {ROWS}x{n}x{k}"), flops, || {
            gemm(Matrix::new(&dy, ROWS, n), Matrix::new(&w, n, k), Store::Set, &mut dx, &mut scratch)
        });
        report.flops(&format!("{name} dW+=dy'x {n}x{ROWS}x{k}"), flops, || {
            gemm(Matrix::new(&dy, ROWS, n).t(), Matrix::new(&x, ROWS, k), Store::Add, &mut dw, &mut scratch)
        });
    }
}

fn attentions<T: Element>(report: &Report, name: &str) {
    let mut scratch = Scratch::new();
    for (batch, seq, heads, head_dim) in
        [(4, 256, 6, 64), (1, 1024, 6, 64), (4, 256, 6, 32), (4, 256, 3, 128)]
    {
        let shape = Heads { batch, seq, q_heads: heads, kv_heads: heads, head_dim };
        let qkv = numbers::<T>(shape.qkv_len());
        let (mut out, mut lse, mut dqkv) =
            (numbers::<T>(shape.out_len()), numbers(shape.lse_len()), numbers::<T>(shape.qkv_len()));
        let dout = numbers::<T>(shape.out_len());
        let flops = batch * heads * 2 * seq * (seq + 1) / 2 * head_dim; // of one causal product
        let title = |part: &str| format!("{name} {part} b{batch} s{seq} h{heads} hd{head_dim}");
        report.flops(&title("attention"), 2 * flops, || {
            attention(&qkv, &shape, &Sight::ALL, &mut out, &mut lse, &mut scratch)
        });
        report.flops(&title("backward"), 5 * flops, || {
            attention_backward(&qkv, &out, &lse, &dout, &shape, &Sight::ALL, &mut dqkv, &mut scratch)
        });
    }
}

/// Attention in bf16 at each level that multiplies pairs, beside AVX-512 in f32: runs in turn, and medians of them.
fn attention_levels(report: &Report) {
    let levels: Vec<Level> = [Level::Avx512, Level::Avx512Bf16, Level::Amx]
        .into_iter()
        .filter(|level| *level <= Level::best())
        .collect();
    let mut scratch = Scratch::new();
    for (batch, seq) in [(4, 256), (1, 2048)] {
        let shape = Heads { batch, seq, q_heads: 6, kv_heads: 6, head_dim: 64 };
        let (qkv, dout) = (numbers::<bf16>(shape.qkv_len()), numbers::<bf16>(shape.out_len()));
        let (mut out, mut lse, mut dqkv) = (dout.clone(), numbers(shape.lse_len()), qkv.clone());
        let products = batch * 6 * 2 * seq * (seq + 1) / 2 * 64; // operations of one causal product
        for (pass, amount) in [("forward", 2 * products), ("backward", 5 * products)] {
            let title = format!("bf16 {pass} b{batch} s{seq} h6 hd64");
            if !title.contains(&report.filter) {
                continue;
            }
            let mut times = vec![Vec::new(); levels.len()];
            for _ in 0..20 {
                for (level, times) in levels.iter().zip(&mut times) {
                    let began = thread_seconds();
                    level.limit(|| match pass {
                        "forward" => attention(&qkv, &shape, &Sight::ALL, &mut out, &mut lse, &mut scratch),
                        _ => attention_backward(
                            &qkv,
                            &out,
                            &lse,
                            &dout,
                            &shape,
                            &Sight::ALL,
                            &mut dqkv,
                            &mut scratch,
                        ),
                    });
                    times.push(thread_seconds() - began);
                }
            }
            let medians = times.iter_mut().map(|times| {
                times.sort_by(f64::total_cmp);
                times[times.len() / 2]
            });
            let medians: Vec<f64> = medians.collect();
            for (level, seconds) in levels.iter().zip(&medians) {
                let (nanos, rate) = (seconds * 1e9 / (batch * seq) as f64, amount as f64 / seconds / 1e9);
                let name = format!("{title} {level:?}");
                println!(
                    "{name:<48} {nanos:>9.0} ns/token {rate:>8.1} GFLOP/s {:>6.2} x",
                    medians[0] / seconds
                );
            }
        }
    }
}

fn main() {
    let report = Report { filter: std::env::args().nth(1).unwrap_or_default() };
    println!("level {:?}", Level::best());
    let n = ROWS * D;
    let (x, w) = (numbers::<f32>(n), numbers::<f32>(D));
    let (mut y, mut rstd, mut dx, mut dw) = (vec![0.0f32; n], vec![0.0; ROWS], vec![0.0; n], vec![0.0; D]);
    let mut y16 = vec![bf16::ZERO; n];
    report.bytes("rms_norm", 8 * n, || rms_norm(&x, &w, 1e-5, &mut y, &mut rstd));
    report.bytes("rms_norm to bf16", 6 * n, || rms_norm(&x, &w, 1e-5, &mut y16, &mut rstd));
    report.bytes("rms_norm_backward", 16 * n, || {
        rms_norm_backward(&y, &x, &w, &rstd, &mut dx, Store::Add, &mut dw)
    });

    let shape = Heads { batch: 4, seq: 256, q_heads: 6, kv_heads: 6, head_dim: 64 };
    let table = RopeTable::new(256, 64, 10_000.0);
    let mut qkv = numbers::<f32>(shape.qkv_len());
    report.bytes("rope", 8 * qkv.len() * 2 / 3, || rope(&mut qkv, &shape, &table, 0));
    let mut qkv16 = numbers::<bf16>(shape.qkv_len());
    report.bytes("rope bf16", 4 * qkv16.len() * 2 / 3, || rope(&mut qkv16, &shape, &table, 0));

    let mut gate_up = numbers::<f32>(ROWS * 2 * F);
    let mut h = vec![0.0f32; ROWS * F];
    report.bytes("gated", 12 * h.len(), || gated(&gate_up, F, Activation::Silu, &mut h));
    report
        .bytes("gated_backward", 24 * h.len(), || gated_backward(&mut gate_up, F, Activation::Silu, &mut h));

    let logits = numbers::<f32>(ROWS * VOCAB);
    let targets: Vec<i64> = (0..ROWS as i64).map(|r| r * 37 % VOCAB as i64).collect();
    let mut grad = logits.clone();
    report.bytes("cross_entropy", 8 * logits.len(), || {
        black_box(cross_entropy(&mut grad, &targets, None, 1.0));
    });
    report.bytes("cross_entropy_loss", 4 * logits.len(), || {
        black_box(cross_entropy_loss(&logits, &targets, None));
    });
    drop((logits, grad));

    let embeddings = numbers::<f32>(VOCAB * D);
    report.bytes("embedding", 8 * n, || embedding(&embeddings, D, &targets, &mut y));
    let mut dtable = embeddings.clone();
    report.bytes("embedding_backward", 12 * n, || embedding_backward(&y, D, &targets, &mut dtable));

    const P: usize = 14 << 20;
    let (mut p, g, mut m, mut v) = (numbers::<f32>(P), numbers::<f32>(P), vec![0.0; P], vec![0.0; P]);
    let mut copy = vec![bf16::ZERO; P];
    let step = AdamWStep {
        lr: 1e-3,
        beta1: 0.9,
        beta2: 0.95,
        eps: 1e-8,
        weight_decay: 0.1,
        step: 3,
        grad_scale: 1.0,
    };
    report.bytes("adamw 14.7M", 28 * P, || adamw(&step, &mut p, &g, &mut m, &mut v, None));
    report.bytes("adamw 14.7M with bf16 copy", 30 * P, || {
        adamw(&step, &mut p, &g, &mut m, &mut v, Some(&mut copy))
    });
    report.bytes("sum_squares 14.7M", 4 * P, || {
        black_box(sum_squares(&g));
    });
    report.bytes("sum_squares 390k", 4 * n, || {
        black_box(sum_squares(&g[..n]));
    });
    report.bytes("all_finite 14.7M", 4 * P, || {
        black_box(all_finite(&g));
    });
    report.bytes("add 14.7M", 12 * P, || add(&mut v, &g));
    report.bytes("convert f32 to bf16 14.7M", 6 * P, || convert(&g, &mut copy));
    report.bytes("convert bf16 to f32 14.7M", 6 * P, || convert(&copy, &mut v));
    report.bytes("copy (memcpy) 14.7M", 8 * P, || v.copy_from_slice(&g));
    drop((p, g, m, v, copy));

    let (x, w, mut y) = (numbers::<bf16>(F), numbers::<bf16>(F * F * 2), vec![bf16::ZERO; 2 * F]);
    let mut scratch = Scratch::new();
    report.bytes("bf16 product of one row", 2 * w.len(), || {
        gemm(Matrix::new(&x, 1, F), Matrix::new(&w, 2 * F, F).t(), Store::Set, &mut y, &mut scratch)
    });
    let (x, mut y) = (numbers::<bf16>(8 * F), vec![bf16::ZERO; 16 * F]);
    report.bytes("bf16 product of eight rows, each by itself", 2 * w.len(), || {
        let mut rows: Vec<&mut [bf16]> = y.chunks_exact_mut(2 * F).collect();
        gemm_by_row(Matrix::new(&x, 8, F), Matrix::new(&w, 2 * F, F).t(), Store::Set, &mut rows)
    });
    products::<f32>(&report, "f32");
    products::<bf16>(&report, "bf16");
    attentions::<f32>(&report, "f32");
    attentions::<bf16>(&report, "bf16");
    attention_levels(&report);
}
