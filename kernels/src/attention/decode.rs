//! Attention of one new token over a cache of keys and values: reads each once.

use crate::element::{load, load_filled, store};
use crate::math::exp;
use crate::simd::{Vector, simd_fn};
use crate::{Element, Heads, Scratch, Sight};

/// `out: [h * hd]` for the query `q: [h * hd]` over the first `len` tokens of `k_cache, v_cache: [tokens, kv * hd]`, its own
/// among them, keys with the rotary embedding. Of `shape` only the heads count.
#[allow(clippy::too_many_arguments)]
pub fn attention_decode<T: Element>(
    q: &[T],
    k_cache: &[T],
    v_cache: &[T],
    len: usize,
    shape: &Heads,
    sight: &Sight,
    out: &mut [T],
    scratch: &mut Scratch,
) {
    let width = shape.kv_heads * shape.head_dim;
    assert!(
        len > 0 && k_cache.len() >= len * width && v_cache.len() >= len * width,
        "attention_decode: cache"
    );
    assert!(q.len() == shape.out_width() && out.len() == q.len(), "attention_decode: length of q or out");
    let first = sight.first(len - 1);
    let (k_cache, v_cache) = (&k_cache[first * width..], &v_cache[first * width..]);
    run(q, k_cache, v_cache, len - first, shape, sight, out, scratch.take(len + shape.head_dim));
}

simd_fn! {
    fn run<V, T: Element>(
        q: &[T], k_cache: &[T], v_cache: &[T], len: usize, shape: &Heads, sight: &Sight, out: &mut [T], memory: &mut [f32],
    ) {
        let (hd, group, width) = (shape.head_dim, shape.q_heads / shape.kv_heads, shape.kv_heads * shape.head_dim);
        let scale = 1.0 / (hd as f32).sqrt();
        let (scores, sum) = memory[..len + hd].split_at_mut(len);
        for (head, (q, out)) in q.chunks_exact(hd).zip(out.chunks_exact_mut(hd)).enumerate() {
            let column = head / group * hd;
            let (mut max, slope) = (f32::NEG_INFINITY, sight.slope(head));
            for (t, score) in scores.iter_mut().enumerate() {
                let key = &k_cache[t * width + column..][..hd];
                let mut dot = V::splat(0.0);
                for i in (0..hd).step_by(V::LANES) {
                    dot = load::<V, T>(&q[i..]).mul_add(load(&key[i..]), dot);
                }
                *score = dot.sum() * scale - (len - 1 - t) as f32 * slope;
                max = max.max(*score);
            }
            let total = exponentials::<V>(scores, max);
            sum.fill(0.0);
            for (t, weight) in scores.iter().enumerate() {
                let value = &v_cache[t * width + column..][..hd];
                let weight = V::splat(weight / total);
                for i in (0..hd).step_by(V::LANES) {
                    let more = load::<V, T>(&value[i..]).mul_add(weight, load(&sum[i..]));
                    store(more, &mut sum[i..]);
                }
            }
            for i in (0..hd).step_by(V::LANES) {
                store(load::<V, f32>(&sum[i..]), &mut out[i..]);
            }
        }
    }
}

/// Scores become `e^(score - max)`; returns their sum.
#[inline(always)]
fn exponentials<V: Vector>(scores: &mut [f32], max: f32) -> f32 {
    let mut total = V::splat(0.0);
    for i in (0..scores.len()).step_by(V::LANES) {
        let e = exp(load_filled::<V, f32>(&scores[i..], f32::NEG_INFINITY).sub(V::splat(max)));
        total = total.add(e);
        store(e, &mut scores[i..]);
    }
    total.sum()
}
