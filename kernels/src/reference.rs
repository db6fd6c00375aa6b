//! The oracle: every kernel as the simplest loops that say what it computes. Slow on purpose, never called in training.
//! Signatures are those of the fast kernels; their documentation is there.

use crate::{
    Activation, AdamWStep, Element, Heads, IGNORED, Matrix, RopeTable, RowStats, Scratch, Sight, Store,
};
use half::bf16;

fn sigmoid(x: f32) -> f64 {
    1.0 / (1.0 + (-f64::from(x)).exp())
}

fn put(out: &mut f32, value: f32, store: Store) {
    match store {
        Store::Set => *out = value,
        Store::Add => *out += value,
    }
}

pub fn rms_norm<Y: Element>(x: &[f32], w: &[f32], eps: f32, y: &mut [Y], rstd: &mut [f32]) {
    let d = w.len();
    for r in 0..rstd.len() {
        let row = &x[r * d..][..d];
        let mean = row.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / d as f64;
        rstd[r] = (1.0 / (mean + f64::from(eps)).sqrt()) as f32;
        for i in 0..d {
            y[r * d + i] = Y::from_f32(row[i] * rstd[r] * w[i]);
        }
    }
}

pub fn rms_norm_backward<G: Element>(
    dy: &[G],
    x: &[f32],
    w: &[f32],
    rstd: &[f32],
    dx: &mut [f32],
    store: Store,
    dw: &mut [f32],
) {
    let d = w.len();
    for r in 0..rstd.len() {
        let at = |i: usize| (f64::from(dy[r * d + i].to_f32()), f64::from(x[r * d + i]), f64::from(w[i]));
        let s = f64::from(rstd[r]);
        let dot: f64 = (0..d).map(at).map(|(g, x, w)| g * w * x).sum::<f64>() * s / d as f64;
        for i in 0..d {
            let (g, x, w) = at(i);
            put(&mut dx[r * d + i], (s * (g * w - x * s * dot)) as f32, store);
            dw[i] += (g * x * s) as f32;
        }
    }
}

fn rotate<T: Element>(row: &mut [T], cos: &[f32], sin: &[f32], sign: f32) {
    let half = cos.len();
    for i in 0..half {
        let (a, b) = (row[i].to_f32(), row[i + half].to_f32());
        row[i] = T::from_f32(a * cos[i] - sign * b * sin[i]);
        row[i + half] = T::from_f32(b * cos[i] + sign * a * sin[i]);
    }
}

fn rope_signed<T: Element>(qkv: &mut [T], shape: &Heads, table: &RopeTable, position: usize, sign: f32) {
    for (t, token) in qkv.chunks_exact_mut(shape.qkv_width()).enumerate() {
        let (cos, sin) = table.row(position + t % shape.seq);
        for head in token.chunks_exact_mut(shape.head_dim).take(shape.q_heads + shape.kv_heads) {
            rotate(head, cos, sin, sign);
        }
    }
}

pub fn rope<T: Element>(qkv: &mut [T], shape: &Heads, table: &RopeTable, position: usize) {
    rope_signed(qkv, shape, table, position, 1.0);
}

pub fn rope_backward<T: Element>(dqkv: &mut [T], shape: &Heads, table: &RopeTable, position: usize) {
    rope_signed(dqkv, shape, table, position, -1.0);
}

/// The error function: its series, and far from 0 the continued fraction of what it lacks to 1.
fn erf(x: f64) -> f64 {
    let size = x.abs();
    if size > 2.5 {
        let fraction = (1..=80).rev().fold(size, |below, n| size + f64::from(n) / 2.0 / below);
        return x.signum() * (1.0 - (-size * size).exp() / std::f64::consts::PI.sqrt() / fraction);
    }
    let (mut term, mut sum) = (x, x);
    for n in 1..100 {
        term *= -x * x / f64::from(n);
        sum += term / f64::from(2 * n + 1);
    }
    2.0 / std::f64::consts::PI.sqrt() * sum
}

/// The activation of `x`, and its slope there.
fn value_and_slope(activation: Activation, x: f32) -> (f64, f64) {
    use std::f64::consts::{FRAC_1_SQRT_2, FRAC_2_PI, PI};
    let (sig, x) = (sigmoid(x), f64::from(x));
    match activation {
        Activation::Silu => (x * sig, sig * (1.0 + x * (1.0 - sig))),
        Activation::Gelu => {
            let share = 0.5 * (1.0 + erf(x * FRAC_1_SQRT_2));
            (x * share, share + x * (-0.5 * x * x).exp() / (2.0 * PI).sqrt())
        }
        Activation::GeluTanh => {
            let tanh = (FRAC_2_PI.sqrt() * (x + 0.044715 * x * x * x)).tanh();
            let slope = FRAC_2_PI.sqrt() * (1.0 + 3.0 * 0.044715 * x * x);
            (0.5 * x * (1.0 + tanh), 0.5 * (1.0 + tanh) + 0.5 * x * (1.0 - tanh * tanh) * slope)
        }
        Activation::Relu if x > 0.0 => (x, 1.0),
        Activation::Relu => (0.0, 0.0),
    }
}

pub fn gated<I: Element, O: Element>(gate_up: &[I], f: usize, activation: Activation, y: &mut [O]) {
    for (row, y) in gate_up.chunks_exact(2 * f).zip(y.chunks_exact_mut(f)) {
        for i in 0..f {
            let (value, _) = value_and_slope(activation, row[i].to_f32());
            y[i] = O::from_f32((value * f64::from(row[f + i].to_f32())) as f32);
        }
    }
}

pub fn gated_backward<I: Element, G: Element>(
    gate_up: &mut [I],
    f: usize,
    activation: Activation,
    dy: &mut [G],
) {
    for (row, dy) in gate_up.chunks_exact_mut(2 * f).zip(dy.chunks_exact_mut(f)) {
        for i in 0..f {
            let (value, slope) = value_and_slope(activation, row[i].to_f32());
            let (up, g) = (f64::from(row[f + i].to_f32()), f64::from(dy[i].to_f32()));
            row[i] = I::from_f32((g * up * slope) as f32);
            row[f + i] = I::from_f32((g * value) as f32);
            dy[i] = G::from_f32((value * up) as f32);
        }
    }
}

pub fn activate<I: Element, O: Element>(x: &[I], activation: Activation, y: &mut [O]) {
    x.iter().zip(y).for_each(|(x, y)| *y = O::from_f32(value_and_slope(activation, x.to_f32()).0 as f32));
}

pub fn activate_backward<I: Element, G: Element>(x: &mut [I], activation: Activation, dy: &mut [G]) {
    for (x, dy) in x.iter_mut().zip(dy) {
        let (value, slope) = value_and_slope(activation, x.to_f32());
        *x = I::from_f32((f64::from(dy.to_f32()) * slope) as f32);
        *dy = G::from_f32(value as f32);
    }
}

pub fn layer_norm<Y: Element>(
    x: &[f32],
    w: &[f32],
    b: &[f32],
    eps: f32,
    y: &mut [Y],
    stats: &mut [RowStats],
) {
    let d = w.len();
    for (r, stats) in stats.iter_mut().enumerate() {
        let row = &x[r * d..][..d];
        let mean = row.iter().map(|v| f64::from(*v)).sum::<f64>() / d as f64;
        let var = row.iter().map(|v| (f64::from(*v) - mean).powi(2)).sum::<f64>() / d as f64;
        let rstd = 1.0 / (var + f64::from(eps)).sqrt();
        *stats = [mean as f32, rstd as f32];
        for i in 0..d {
            y[r * d + i] =
                Y::from_f32(((f64::from(row[i]) - mean) * rstd * f64::from(w[i]) + f64::from(b[i])) as f32);
        }
    }
}

#[allow(clippy::too_many_arguments)]
pub fn layer_norm_backward<G: Element>(
    dy: &[G],
    x: &[f32],
    w: &[f32],
    stats: &[RowStats],
    dx: &mut [f32],
    store: Store,
    dw: &mut [f32],
    db: &mut [f32],
) {
    let d = w.len();
    for (r, [mean, rstd]) in stats.iter().enumerate() {
        let s = f64::from(*rstd);
        let normed = |i: usize| (f64::from(x[r * d + i]) - f64::from(*mean)) * s;
        let g = |i: usize| f64::from(dy[r * d + i].to_f32());
        let gw = |i: usize| g(i) * f64::from(w[i]);
        let mean_gw = (0..d).map(gw).sum::<f64>() / d as f64;
        let dot = (0..d).map(|i| gw(i) * normed(i)).sum::<f64>() / d as f64;
        for i in 0..d {
            put(&mut dx[r * d + i], (s * (gw(i) - mean_gw - normed(i) * dot)) as f32, store);
            dw[i] += (g(i) * normed(i)) as f32;
            db[i] += g(i) as f32;
        }
    }
}

pub fn add_rows<T: Element>(x: &mut [T], b: &[f32]) {
    x.iter_mut().enumerate().for_each(|(at, x)| *x = T::from_f32(x.to_f32() + b[at % b.len()]));
}

pub fn scale_columns<X: Element, Y: Element>(x: &[X], factors: &[f32], y: &mut [Y]) {
    let d = factors.len();
    y.iter_mut().zip(x).enumerate().for_each(|(at, (y, x))| *y = Y::from_f32(factors[at % d] * x.to_f32()));
}

pub fn add_scaled_columns<X: Element, Y: Element>(x: &[X], factors: &[f32], y: &mut [Y]) {
    let mut scaled = vec![0.0f32; x.len()];
    scale_columns(x, factors, &mut scaled);
    y.iter_mut().zip(scaled).for_each(|(y, x)| *y = Y::from_f32(y.to_f32() + x));
}

pub fn sum_products<X: Element, Y: Element>(x: &[X], y: &[Y], sums: &mut [f32]) {
    let d = sums.len();
    x.iter().zip(y).enumerate().for_each(|(at, (x, y))| sums[at % d] += x.to_f32() * y.to_f32());
}

pub fn sum_rows<T: Element>(x: &[T], sums: &mut [f32]) {
    let d = sums.len();
    x.iter().enumerate().for_each(|(at, x)| sums[at % d] += x.to_f32());
}

fn log_sum_exp<L: Element>(row: &[L]) -> f64 {
    let max = row.iter().map(|v| v.to_f32()).fold(f32::NEG_INFINITY, f32::max);
    f64::from(max) + row.iter().map(|v| f64::from(v.to_f32() - max).exp()).sum::<f64>().ln()
}

pub fn cross_entropy_loss<L: Element>(logits: &[L], targets: &[i64], weights: Option<&[f32]>) -> f64 {
    let vocab = logits.len() / targets.len().max(1);
    let rows =
        logits.chunks_exact(vocab.max(1)).zip(targets).enumerate().filter(|(_, (_, t))| **t != IGNORED);
    let weight = |row: usize| weights.map_or(1.0, |weights| f64::from(weights[row]));
    rows.map(|(at, (row, t))| weight(at) * (log_sum_exp(row) - f64::from(row[*t as usize].to_f32()))).sum()
}

pub fn cross_entropy<L: Element>(
    logits: &mut [L],
    targets: &[i64],
    weights: Option<&[f32]>,
    scale: f32,
) -> f64 {
    let loss = cross_entropy_loss(logits, targets, weights);
    let vocab = logits.len() / targets.len().max(1);
    for (at, (row, target)) in logits.chunks_exact_mut(vocab.max(1)).zip(targets).enumerate() {
        let lse = log_sum_exp(row);
        let scale = f64::from(scale) * weights.map_or(1.0, |weights| f64::from(weights[at]));
        for (i, value) in row.iter_mut().enumerate() {
            let p = (f64::from(value.to_f32()) - lse).exp() - if i as i64 == *target { 1.0 } else { 0.0 };
            *value = L::from_f32(if *target == IGNORED { 0.0 } else { (p * scale) as f32 });
        }
    }
    loss
}

pub fn embedding<T: Element, O: Element>(table: &[T], d: usize, ids: &[i64], out: &mut [O]) {
    for (id, row) in ids.iter().zip(out.chunks_exact_mut(d)) {
        for (i, out) in row.iter_mut().enumerate() {
            *out = O::from_f32(table[*id as usize * d + i].to_f32());
        }
    }
}

pub fn embedding_backward<G: Element>(dout: &[G], d: usize, ids: &[i64], dtable: &mut [f32]) {
    for (id, row) in ids.iter().zip(dout.chunks_exact(d)) {
        for (i, g) in row.iter().enumerate() {
            dtable[*id as usize * d + i] += g.to_f32();
        }
    }
}

pub fn adamw(
    step: &AdamWStep,
    p: &mut [f32],
    g: &[f32],
    m: &mut [f32],
    v: &mut [f32],
    mut copy: Option<&mut [bf16]>,
) {
    let correction1 = 1.0 - step.beta1.powf(step.step as f64);
    let correction2 = 1.0 - step.beta2.powf(step.step as f64);
    for i in 0..p.len() {
        let g = f64::from(g[i] * step.grad_scale);
        let decayed = f64::from(p[i]) * (1.0 - step.lr * step.weight_decay);
        let m_new = step.beta1 * f64::from(m[i]) + (1.0 - step.beta1) * g;
        let v_new = step.beta2 * f64::from(v[i]) + (1.0 - step.beta2) * g * g;
        let denominator = v_new.sqrt() / correction2.sqrt() + step.eps;
        p[i] = (decayed - step.lr / correction1 * m_new / denominator) as f32;
        m[i] = m_new as f32;
        v[i] = v_new as f32;
        if let Some(copy) = copy.as_deref_mut() {
            copy[i] = bf16::from_f32(p[i]);
        }
    }
}

pub fn sum_squares<T: Element>(x: &[T]) -> f64 {
    x.iter().map(|v| f64::from(v.to_f32()).powi(2)).sum()
}

pub fn add<T: Element>(x: &mut [f32], y: &[T]) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y.to_f32());
}

pub fn convert<I: Element, O: Element>(x: &[I], y: &mut [O]) {
    x.iter().zip(y).for_each(|(x, y)| *y = O::from_f32(x.to_f32()));
}

pub fn all_finite<T: Element>(x: &[T]) -> bool {
    x.iter().all(|v| v.to_f32().is_finite())
}

pub fn max_abs<T: Element>(x: &[T]) -> f32 {
    let worst = x.iter().map(|v| v.to_f32().abs()).fold(0.0, f32::max);
    if x.iter().any(|v| v.to_f32().is_nan()) { f32::NAN } else { worst }
}

pub fn gemm<A: Element, B: Element, C: Element>(
    a: Matrix<A>,
    b: Matrix<B>,
    store: Store,
    c: &mut [C],
    _scratch: &mut Scratch,
) {
    for i in 0..a.rows {
        for j in 0..b.cols {
            let at = |k: usize| {
                f64::from(a.data[i * a.row_stride + k * a.col_stride].to_f32())
                    * f64::from(b.data[k * b.row_stride + j * b.col_stride].to_f32())
            };
            let dot = (0..a.cols).map(at).sum::<f64>();
            let out = &mut c[i * b.cols + j];
            let before = if store == Store::Add { f64::from(out.to_f32()) } else { 0.0 };
            *out = C::from_f32((before + dot) as f32);
        }
    }
}

pub fn attention<T: Element, O: Element>(
    qkv: &[T],
    shape: &Heads,
    sight: &Sight,
    out: &mut [O],
    lse: &mut [f32],
    _scratch: &mut Scratch,
) {
    let a = Attention { qkv, shape, sight };
    for (head, row, t) in a.rows() {
        let (weights, log_sum) = a.weights(head, row, t);
        lse[a.lse_at(head, t, row)] = log_sum as f32;
        for i in 0..shape.head_dim {
            let value: f64 = (0..=row).map(|j| weights[j] * a.v(head, t - row + j, i)).sum();
            out[t * shape.out_width() + head * shape.head_dim + i] = O::from_f32(value as f32);
        }
    }
}

#[allow(clippy::too_many_arguments)]
pub fn attention_backward<T: Element, O: Element, G: Element>(
    qkv: &[T],
    out: &[O],
    lse: &[f32],
    dout: &[O],
    shape: &Heads,
    sight: &Sight,
    dqkv: &mut [G],
    _scratch: &mut Scratch,
) {
    let _ = (out, lse);
    let a = Attention { qkv, shape, sight };
    let (hd, width) = (shape.head_dim, shape.qkv_width());
    let scale = 1.0 / (hd as f64).sqrt();
    let mut grad = vec![0.0f64; qkv.len()];
    for (head, row, t) in a.rows() {
        let (weights, _) = a.weights(head, row, t);
        let g: Vec<f64> =
            (0..hd).map(|i| f64::from(dout[t * shape.out_width() + head * hd + i].to_f32())).collect();
        let dp: Vec<f64> =
            (0..=row).map(|j| (0..hd).map(|i| g[i] * a.v(head, t - row + j, i)).sum()).collect();
        let dot: f64 = weights.iter().zip(&dp).map(|(w, g)| w * g).sum();
        for j in 0..=row {
            let (u, ds) = (t - row + j, weights[j] * (dp[j] - dot) * scale);
            for i in 0..hd {
                grad[t * width + head * hd + i] += ds * a.k(head, u, i);
                grad[u * width + a.k_col(head) + i] += ds * a.q(head, t, i);
                grad[u * width + a.v_col(head) + i] += weights[j] * g[i];
            }
        }
    }
    dqkv.iter_mut().zip(grad).for_each(|(out, g)| *out = G::from_f32(g as f32));
}

/// What a slope takes from the score of a key that is so far away.
fn slanted(sight: &Sight, head: usize, distance: usize) -> f64 {
    distance as f64 * f64::from(sight.slope(head))
}

/// Reads the fused buffer by name.
struct Attention<'a, T> {
    qkv: &'a [T],
    shape: &'a Heads,
    sight: &'a Sight<'a>,
}

impl<T: Element> Attention<'_, T> {
    /// Every (head, position in its sequence, token).
    fn rows(&self) -> impl Iterator<Item = (usize, usize, usize)> + use<'_, T> {
        let tokens = self.shape.batch * self.shape.seq;
        (0..self.shape.q_heads).flat_map(move |head| (0..tokens).map(move |t| (head, t % self.shape.seq, t)))
    }
    fn k_col(&self, head: usize) -> usize {
        (self.shape.q_heads + head / (self.shape.q_heads / self.shape.kv_heads)) * self.shape.head_dim
    }
    fn v_col(&self, head: usize) -> usize {
        self.k_col(head) + self.shape.kv_heads * self.shape.head_dim
    }
    fn at(&self, t: usize, col: usize) -> f64 {
        f64::from(self.qkv[t * self.shape.qkv_width() + col].to_f32())
    }
    fn q(&self, head: usize, t: usize, i: usize) -> f64 {
        self.at(t, head * self.shape.head_dim + i)
    }
    fn k(&self, head: usize, t: usize, i: usize) -> f64 {
        self.at(t, self.k_col(head) + i)
    }
    fn v(&self, head: usize, t: usize, i: usize) -> f64 {
        self.at(t, self.v_col(head) + i)
    }
    fn lse_at(&self, head: usize, t: usize, row: usize) -> usize {
        (t / self.shape.seq * self.shape.q_heads + head) * self.shape.seq + row
    }
    /// Probabilities of the keys that row `row` sees, and their log-sum-exp.
    fn weights(&self, head: usize, row: usize, t: usize) -> (Vec<f64>, f64) {
        let hd = self.shape.head_dim;
        let scale = 1.0 / (hd as f64).sqrt();
        let score =
            |j: usize| (0..hd).map(|i| self.q(head, t, i) * self.k(head, t - row + j, i)).sum::<f64>();
        let seen = |j: usize| match j < self.sight.first(row) {
            true => f64::NEG_INFINITY,
            false => score(j) * scale - slanted(self.sight, head, row - j),
        };
        let scores: Vec<f64> = (0..=row).map(seen).collect();
        let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = scores.iter().map(|v| (v - max).exp()).sum();
        (scores.iter().map(|v| (v - max).exp() / sum).collect(), max + sum.ln())
    }
}

#[allow(clippy::too_many_arguments)]
pub fn attention_decode<T: Element>(
    q: &[T],
    k_cache: &[T],
    v_cache: &[T],
    len: usize,
    shape: &Heads,
    sight: &Sight,
    out: &mut [T],
    _scratch: &mut Scratch,
) {
    let (hd, group) = (shape.head_dim, shape.q_heads / shape.kv_heads);
    let width = shape.kv_heads * hd;
    for head in 0..shape.q_heads {
        let col = head / group * hd;
        let dot = |t: usize| {
            let terms =
                (0..hd).map(|i| f64::from(q[head * hd + i].to_f32() * k_cache[t * width + col + i].to_f32()));
            let score = terms.sum::<f64>() / (hd as f64).sqrt();
            if t < sight.first(len - 1) {
                f64::NEG_INFINITY
            } else {
                score - slanted(sight, head, len - 1 - t)
            }
        };
        let scores: Vec<f64> = (0..len).map(dot).collect();
        let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = scores.iter().map(|s| (s - max).exp()).sum();
        for i in 0..hd {
            let value = (0..len)
                .map(|t| (scores[t] - max).exp() / sum * f64::from(v_cache[t * width + col + i].to_f32()));
            out[head * hd + i] = T::from_f32(value.sum::<f64>() as f32);
        }
    }
}
