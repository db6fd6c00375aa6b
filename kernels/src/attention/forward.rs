//! The forward pass of one head after the other.

use super::tile::{Left, Place, Right, Sizes, product, rows, transposed};
use super::{QUERIES, slant};
use crate::element::{load, load_filled, store};
use crate::gemm::micro::{tile_cols, tile_rows};
use crate::math::exp;
use crate::simd::{Vector, simd_fn};
use crate::{Element, Heads, Sight, Store};

/// Numbers of scratch.
pub fn memory(shape: &Heads) -> usize {
    let s = Sizes::new(shape);
    2 * s.keys * s.hd + 2 * QUERIES * s.hd + QUERIES * s.keys
}

simd_fn! {
    pub fn run<V, T: Element, O: Element>(
        qkv: &[T], shape: &Heads, sight: &Sight, out: &mut [O], lse: &mut [f32], memory: &mut [f32],
    ) {
        match const { tile_rows(V::LANES) } {
            12 => heads::<V, T, O, 12, 32>(qkv, shape, sight, out, lse, memory),
            _ => heads::<V, T, O, 6, 16>(qkv, shape, sight, out, lse, memory),
        }
    }
}

#[inline(always)]
fn heads<V: Vector, T: Element, O: Element, const MR: usize, const NR: usize>(
    qkv: &[T],
    shape: &Heads,
    sight: &Sight,
    out: &mut [O],
    lse: &mut [f32],
    memory: &mut [f32],
) {
    let s = Sizes::new(shape);
    let (keys_t, memory) = memory.split_at_mut(s.keys * s.hd);
    let (values, memory) = memory.split_at_mut(s.keys * s.hd);
    let (queries, memory) = memory.split_at_mut(QUERIES * s.hd);
    let (mixed, scores) = memory.split_at_mut(QUERIES * s.hd);
    let group = shape.q_heads / shape.kv_heads;
    for b in 0..shape.batch {
        for kv in 0..shape.kv_heads {
            let value_column = shape.q_heads + shape.kv_heads + kv;
            transposed::<V, T, NR>(qkv, Place::fused(shape, b, shape.q_heads + kv), &s, keys_t);
            rows::<V, T>(qkv, Place::fused(shape, b, value_column), &s, 0, values);
            for head in kv * group..(kv + 1) * group {
                let lse = &mut lse[(b * shape.q_heads + head) * s.seq..][..s.seq];
                for first in (0..s.seq).step_by(QUERIES) {
                    let count = QUERIES.min(s.seq - first);
                    let padded = count.next_multiple_of(MR);
                    let place = Place::fused(shape, b, head);
                    rows::<V, T>(qkv, place, &s, first, &mut queries[..padded * s.hd]);
                    let lse = &mut lse[first..first + count];
                    let seen = Seen { sight, slope: sight.slope(head) };
                    tile::<V, MR>(&s, first, padded, seen, queries, keys_t, values, scores, mixed, lse);
                    let place = Place::out(shape, b, head);
                    for (n, row) in mixed.chunks_exact(s.hd).take(count).enumerate() {
                        let to = &mut out[place.range(first + n, s.head_dim)];
                        for i in (0..s.head_dim).step_by(V::LANES) {
                            store(load::<V, f32>(&row[i..s.head_dim]), &mut to[i..]);
                        }
                    }
                }
            }
        }
    }
}

/// What one head sees.
#[derive(Clone, Copy)]
struct Seen<'a> {
    sight: &'a Sight<'a>,
    slope: f32,
}

/// Query rows `first..` of one head: `mixed: [rows, hd]` and their log-sum-exp.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
fn tile<V: Vector, const MR: usize>(
    s: &Sizes,
    first: usize,
    padded: usize,
    head: Seen,
    queries: &[f32],
    keys_t: &[f32],
    values: &[f32],
    scores: &mut [f32],
    mixed: &mut [f32],
    lse: &mut [f32],
) {
    let width = tile_cols(V::LANES);
    let scale = 1.0 / (s.head_dim as f32).sqrt();
    for r in (0..padded).step_by(MR) {
        let seen = first + r + MR; // keys that the last of these rows sees
        let left = Left { data: queries, start: r * s.hd, row: s.hd, term: 1 };
        let right = Right { data: keys_t, start: 0, term: width, panel: width * s.head_dim };
        let cols = seen.next_multiple_of(width);
        product::<V, MR>(s.head_dim, left, right, cols, Store::Set, &mut scores[r * s.keys..], s.keys);
        for n in r..r + MR {
            let row = &mut scores[n * s.keys..][..s.keys];
            let position = first + n;
            let begin = head.sight.first(position);
            row[..begin.min(seen)].fill(0.0);
            // Rows past the end of a sequence may see nothing.
            let begin = begin.min(position);
            slant(&mut row[begin..=position], begin, position, head.slope, scale);
            let log = softmax_row::<V>(&mut row[begin..], position + 1 - begin, seen - begin, scale);
            if let Some(lse) = lse.get_mut(n) {
                *lse = log;
            }
        }
        let left = Left { data: scores, start: r * s.keys, row: s.keys, term: 1 };
        let right = Right { data: values, start: 0, term: s.hd, panel: width };
        product::<V, MR>(seen.min(s.keys), left, right, s.hd, Store::Set, &mut mixed[r * s.hd..], s.hd);
    }
}

/// The first `visible` scores become probabilities, the others up to `end` 0. Returns the log-sum-exp of the scaled scores.
#[inline(always)]
fn softmax_row<V: Vector>(row: &mut [f32], visible: usize, end: usize, scale: f32) -> f32 {
    let (seen, hidden) = row[..end].split_at_mut(visible);
    let mut max = V::splat(f32::NEG_INFINITY);
    for i in (0..seen.len()).step_by(V::LANES) {
        max = max.max(load_filled::<V, f32>(&seen[i..], f32::NEG_INFINITY));
    }
    let max = max.max_lane() * scale;
    let mut sum = V::splat(0.0);
    for i in (0..seen.len()).step_by(V::LANES) {
        let v: V = load_filled(&seen[i..], f32::NEG_INFINITY);
        let e = exp(v.mul_add(V::splat(scale), V::splat(-max)));
        sum = sum.add(e);
        store(e, &mut seen[i..]);
    }
    let sum = sum.sum();
    let inverse = V::splat(1.0 / sum);
    for i in (0..seen.len()).step_by(V::LANES) {
        store(load::<V, f32>(&seen[i..]).mul(inverse), &mut seen[i..]);
    }
    hidden.fill(0.0);
    max + sum.ln()
}
