//! The backward pass. For a tile of query rows: probabilities `p` again from the scores and the saved log-sum-exp,
//! `dp = dout v'`, `ds = p (dp - sum(dout * out)) scale`; then `dq = ds k`, `dk += ds' q`, `dv += p' dout`.

use super::tile::{Left, Place, Right, Sizes, product, rows, transposed};
use super::{QUERIES, slant};
use crate::element::{load, store};
use crate::gemm::micro::{tile_cols, tile_rows};
use crate::math::exp;
use crate::simd::{Vector, simd_fn};
use crate::{Element, Heads, Sight, Store};

/// Numbers of scratch.
pub fn memory(shape: &Heads) -> usize {
    let s = Sizes::new(shape);
    5 * s.keys * s.hd + 3 * QUERIES * s.hd + 2 * QUERIES * s.keys + 2 * QUERIES
}

simd_fn! {
    pub fn run<V, T: Element, O: Element, G: Element>(
        qkv: &[T], out: &[O], lse: &[f32], dout: &[O], shape: &Heads, sight: &Sight, dqkv: &mut [G], memory: &mut [f32],
    ) {
        match const { tile_rows(V::LANES) } {
            12 => heads::<V, T, O, G, 12, 32>(qkv, out, lse, dout, shape, sight, dqkv, memory),
            _ => heads::<V, T, O, G, 6, 16>(qkv, out, lse, dout, shape, sight, dqkv, memory),
        }
    }
}

/// Keys and values of one head, and the sums of their gradients.
struct KeyValue<'a> {
    /// `[keys, hd]`.
    keys: &'a mut [f32],
    /// Panels of the transposes.
    keys_t: &'a mut [f32],
    values_t: &'a mut [f32],
    /// `[keys, hd]`.
    dkeys: &'a mut [f32],
    dvalues: &'a mut [f32],
}

/// What belongs to a tile of query rows.
struct Queries<'a> {
    /// `[rows, hd]`.
    q: &'a mut [f32],
    dout: &'a mut [f32],
    dq: &'a mut [f32],
    /// `[rows, keys]`.
    p: &'a mut [f32],
    ds: &'a mut [f32],
    /// `[rows]`: log-sum-exp, and `sum(dout * out)`.
    lse: &'a mut [f32],
    dot: &'a mut [f32],
}

/// Cuts the next `len` numbers off.
#[inline(always)]
fn cut<'a>(memory: &mut &'a mut [f32], len: usize) -> &'a mut [f32] {
    let (part, rest) = std::mem::take(memory).split_at_mut(len);
    *memory = rest;
    part
}

#[inline(always)]
#[allow(clippy::too_many_arguments)]
fn heads<V: Vector, T: Element, O: Element, G: Element, const MR: usize, const NR: usize>(
    qkv: &[T],
    out: &[O],
    lse: &[f32],
    dout: &[O],
    shape: &Heads,
    sight: &Sight,
    dqkv: &mut [G],
    mut memory: &mut [f32],
) {
    let s = Sizes::new(shape);
    let (per_key, per_query) = (s.keys * s.hd, QUERIES * s.hd);
    let m = &mut memory;
    let mut kv = KeyValue {
        keys: cut(m, per_key),
        keys_t: cut(m, per_key),
        values_t: cut(m, per_key),
        dkeys: cut(m, per_key),
        dvalues: cut(m, per_key),
    };
    let mut queries = Queries {
        q: cut(m, per_query),
        dout: cut(m, per_query),
        dq: cut(m, per_query),
        p: cut(m, QUERIES * s.keys),
        ds: cut(m, QUERIES * s.keys),
        lse: cut(m, QUERIES),
        dot: cut(m, QUERIES),
    };
    let group = shape.q_heads / shape.kv_heads;
    for b in 0..shape.batch {
        for kv_head in 0..shape.kv_heads {
            let key_place = Place::fused(shape, b, shape.q_heads + kv_head);
            let value_place = Place::fused(shape, b, shape.q_heads + shape.kv_heads + kv_head);
            rows::<V, T>(qkv, key_place, &s, 0, kv.keys);
            transposed::<V, T, NR>(qkv, key_place, &s, kv.keys_t);
            transposed::<V, T, NR>(qkv, value_place, &s, kv.values_t);
            kv.dkeys.fill(0.0);
            kv.dvalues.fill(0.0);
            for head in kv_head * group..(kv_head + 1) * group {
                let place = Place::fused(shape, b, head);
                let out_place = Place::out(shape, b, head);
                let lse = &lse[(b * shape.q_heads + head) * s.seq..][..s.seq];
                for first in (0..s.seq).step_by(QUERIES) {
                    let count = QUERIES.min(s.seq - first);
                    let padded = count.next_multiple_of(MR);
                    rows::<V, T>(qkv, place, &s, first, &mut queries.q[..padded * s.hd]);
                    rows::<V, O>(dout, out_place, &s, first, &mut queries.dout[..padded * s.hd]);
                    queries.lse[..count].copy_from_slice(&lse[first..first + count]);
                    for n in 0..count {
                        let (g, o) =
                            (out_place.range(first + n, s.head_dim), out_place.range(first + n, s.head_dim));
                        queries.dot[n] = dot::<V, O>(&dout[g], &out[o]);
                    }
                    tile::<V, MR>(&s, first, count, (sight, sight.slope(head)), &mut queries, &mut kv);
                    write::<V, G>(queries.dq, first, count, &s, place, dqkv);
                }
            }
            write::<V, G>(kv.dkeys, 0, s.seq, &s, key_place, dqkv);
            write::<V, G>(kv.dvalues, 0, s.seq, &s, value_place, dqkv);
        }
    }
}

#[inline(always)]
pub(super) fn dot<V: Vector, O: Element>(a: &[O], b: &[O]) -> f32 {
    let mut sum = V::splat(0.0);
    for i in (0..a.len()).step_by(V::LANES) {
        sum = load::<V, O>(&a[i..]).mul_add(load(&b[i..]), sum);
    }
    sum.sum()
}

/// `count` rows of `[rows, hd]` into a head's place.
#[inline(always)]
fn write<V: Vector, G: Element>(
    from: &[f32],
    first: usize,
    count: usize,
    s: &Sizes,
    place: Place,
    to: &mut [G],
) {
    for (n, row) in from.chunks_exact(s.hd).take(count).enumerate() {
        let to = &mut to[place.range(first + n, s.head_dim)];
        for i in (0..s.head_dim).step_by(V::LANES) {
            store(load::<V, f32>(&row[i..s.head_dim]), &mut to[i..]);
        }
    }
}

/// `count` query rows from `first` on: sets their `dq` and adds to `dkeys` and `dvalues`.
#[inline(always)]
fn tile<V: Vector, const MR: usize>(
    s: &Sizes,
    first: usize,
    count: usize,
    (sight, slope): (&Sight, f32),
    t: &mut Queries,
    kv: &mut KeyValue,
) {
    let width = tile_cols(V::LANES);
    let scale = 1.0 / (s.head_dim as f32).sqrt();
    let padded = count.next_multiple_of(MR);
    let end = first + padded; // no row of the tile sees a key from here on
    let read_end = end.next_multiple_of(MR); // the products over keys read whole tiles
    for r in (0..padded).step_by(MR) {
        let seen = first + r + MR;
        let cols = seen.next_multiple_of(width);
        let of = |data| Left { data, start: r * s.hd, row: s.hd, term: 1 };
        let panels = |data| Right { data, start: 0, term: width, panel: width * s.head_dim };
        let at = r * s.keys;
        product::<V, MR>(s.head_dim, of(t.q), panels(kv.keys_t), cols, Store::Set, &mut t.p[at..], s.keys);
        product::<V, MR>(
            s.head_dim,
            of(t.dout),
            panels(kv.values_t),
            cols,
            Store::Set,
            &mut t.ds[at..],
            s.keys,
        );
        for n in r..r + MR {
            let (p, ds) = (&mut t.p[n * s.keys..][..read_end], &mut t.ds[n * s.keys..][..read_end]);
            let visible = if n < count { first + n + 1 } else { 0 };
            let begin = sight.first(first + n).min(visible);
            slant(&mut p[begin..visible], begin, first + n, slope, scale);
            p[..begin].fill(0.0);
            ds[..begin].fill(0.0);
            let (shift, dot) = (V::splat(-t.lse[n]), V::splat(t.dot[n]));
            for i in (begin..visible).step_by(V::LANES) {
                let score: V = load(&p[i..visible]);
                let probability = exp(score.mul_add(V::splat(scale), shift));
                let grad = load::<V, f32>(&ds[i..visible]).sub(dot).mul(probability).mul(V::splat(scale));
                store(probability, &mut p[i..visible]);
                store(grad, &mut ds[i..visible]);
            }
            p[visible..].fill(0.0);
            ds[visible..].fill(0.0);
        }
        let left = Left { data: t.ds, start: at, row: s.keys, term: 1 };
        let right = Right { data: kv.keys, start: 0, term: s.hd, panel: width };
        product::<V, MR>(seen, left, right, s.hd, Store::Set, &mut t.dq[r * s.hd..], s.hd);
    }
    for key in (0..end).step_by(MR) {
        // Rows before the first key of this tile see none of its keys.
        let skip = key.saturating_sub(first);
        let of = |data| Left { data, start: skip * s.keys + key, row: 1, term: s.keys };
        let rows = |data| Right { data, start: skip * s.hd, term: s.hd, panel: width };
        let at = key * s.hd;
        product::<V, MR>(padded - skip, of(t.ds), rows(t.q), s.hd, Store::Add, &mut kv.dkeys[at..], s.hd);
        product::<V, MR>(padded - skip, of(t.p), rows(t.dout), s.hd, Store::Add, &mut kv.dvalues[at..], s.hd);
    }
}
