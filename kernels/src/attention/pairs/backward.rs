//! The backward pass, a few blocks of queries at a time. For each block of keys that they see: scores and `dp = dout v'`,
//! probabilities `p` from the saved log-sum-exp, `ds = p (dp - sum(dout * out))`; then `dk' += q' ds`, `dv' += dout' p`
//! and, for a chunk of such blocks, `dq += ds k`. The sums for keys and values are transposed once at a head's end, and
//! `dq` and `dk` scaled where they are written.

use super::layout::{Sizes, cut, cut_words, pack, rows, turn, write, zip_rows};
use super::view::{View, hide};
use super::{Block, Kernel, Left, Pairs, SIDE, STEP, product};
use crate::attention::backward::dot;
use crate::attention::tile::Place;
use crate::element::load;
use crate::math::exp2;
use crate::simd::Vector;
use crate::{Heads, Sight, Store, bf16};
use std::f32::consts::LOG2_E;
use std::ops::Range;

/// Blocks of queries that share the sums of keys and values while these are at hand.
const TILE: usize = 2;
/// Blocks of keys whose `ds` are multiplied by keys at once.
const CHUNK: usize = 16;
/// From a row of `ds` to the next, in words: no multiple of a page, whose lines would share a few places of the cache.
const DS_ROW: usize = CHUNK * STEP + 16;

/// Reads and writes what [`attention_backward`](crate::attention_backward) does.
pub struct Backward<'a> {
    pub qkv: &'a [bf16],
    pub out: &'a [bf16],
    pub lse: &'a [f32],
    pub dout: &'a [bf16],
    pub shape: &'a Heads,
    pub sight: &'a Sight<'a>,
    pub dqkv: &'a mut [bf16],
    /// Of `memory(shape)` numbers.
    pub memory: &'a mut [f32],
}

/// Keys and values of one head, and the sums of their gradients.
struct KeyValue<'a> {
    keys: &'a mut [u32],
    keys_as_terms: &'a mut [u32],
    values: &'a mut [u32],
    /// For each block of keys `[hd, SIDE]`.
    dkeys: &'a mut [f32],
    dvalues: &'a mut [f32],
}

/// What belongs to a tile of queries.
struct Queries<'a> {
    /// Rows of words.
    q: &'a mut [u32],
    dout: &'a mut [u32],
    /// Their transposes: rows of `TILE * STEP` words.
    q_t: &'a mut [u32],
    dout_t: &'a mut [u32],
    /// Scores of one block, and `dp`.
    scores: &'a mut [f32],
    dp: &'a mut [f32],
    /// Panels of one block of keys, whose terms are the tile's queries.
    p: &'a mut [u32],
    ds: &'a mut [u32],
    /// `ds` of a chunk as rows.
    ds_rows: &'a mut [u32],
    /// `[rows, hd]`.
    dq: &'a mut [f32],
    /// Log-sum-exp as a power of 2, infinite for rows past the end, which so see nothing; and `sum(dout * out)`.
    lse: [f32; TILE * SIDE],
    dot: [f32; TILE * SIDE],
}

impl Backward<'_> {
    pub fn memory(shape: &Heads) -> usize {
        let s = Sizes::new(shape);
        let of_queries = 5 * TILE * SIDE * s.words() + TILE * SIDE * (DS_ROW + s.hd);
        7 * s.all() + of_queries + 2 * SIDE * SIDE + 2 * TILE * STEP * SIDE
    }
}

impl Kernel for Backward<'_> {
    #[inline(always)]
    fn run<P: Pairs>(self, pairs: &P) {
        let Backward { qkv, out, lse, dout, shape, sight, dqkv, mut memory } = self;
        let s = Sizes::new(shape);
        let (m, per_tile) = (&mut memory, TILE * SIDE * s.words());
        let mut kv = KeyValue {
            keys: cut_words(m, s.all()),
            keys_as_terms: cut_words(m, s.all()),
            values: cut_words(m, s.all()),
            dkeys: cut(m, 2 * s.all()),
            dvalues: cut(m, 2 * s.all()),
        };
        let mut t = Queries {
            q: cut_words(m, per_tile),
            dout: cut_words(m, per_tile),
            q_t: cut_words(m, per_tile),
            dout_t: cut_words(m, per_tile),
            scores: cut(m, SIDE * SIDE),
            dp: cut(m, SIDE * SIDE),
            p: cut_words(m, TILE * STEP * SIDE),
            ds: cut_words(m, TILE * STEP * SIDE),
            ds_rows: cut_words(m, TILE * SIDE * DS_ROW),
            dq: cut(m, TILE * SIDE * s.hd),
            lse: [0.0; TILE * SIDE],
            dot: [0.0; TILE * SIDE],
        };
        let room = cut_words(m, per_tile);
        let group = shape.q_heads / shape.kv_heads;
        for b in 0..shape.batch {
            for kv_head in 0..shape.kv_heads {
                let key_place = Place::fused(shape, b, shape.q_heads + kv_head);
                let value_place = Place::fused(shape, b, shape.q_heads + shape.kv_heads + kv_head);
                let block = &mut room[..SIDE * s.words()];
                pack(pairs, qkv, key_place, &s, block, Some(kv.keys), Some(kv.keys_as_terms));
                pack(pairs, qkv, value_place, &s, block, Some(kv.values), None);
                kv.dkeys.fill(0.0);
                kv.dvalues.fill(0.0);
                let scale = View::new(shape, sight, 0).scale;
                for head in kv_head * group..(kv_head + 1) * group {
                    let (place, out_place) = (Place::fused(shape, b, head), Place::out(shape, b, head));
                    let lse = &lse[(b * shape.q_heads + head) * s.seq..][..s.seq];
                    let view = View::new(shape, sight, head);
                    for i in (0..s.blocks).step_by(TILE) {
                        let first = i * SIDE;
                        let count = (s.seq - first).min(TILE * SIDE);
                        rows(qkv, place, &s, first, t.q);
                        rows(dout, out_place, &s, first, t.dout);
                        turn_tile(pairs, &s, t.q, room, t.q_t);
                        turn_tile(pairs, &s, t.dout, room, t.dout_t);
                        t.lse.fill(f32::INFINITY);
                        for n in 0..count {
                            let token = out_place.range(first + n, s.head_dim);
                            t.lse[n] = lse[first + n] * LOG2_E;
                            t.dot[n] = dot::<P::V, bf16>(&dout[token.clone()], &out[token]);
                        }
                        tile(pairs, &s, i..s.blocks.min(i + TILE), &view, &mut t, &mut kv);
                        for (n, row) in t.dq.chunks_exact(s.hd).take(count).enumerate() {
                            write::<P::V>(row, scale, &mut dqkv[place.range(first + n, s.head_dim)]);
                        }
                    }
                }
                write_turned(pairs, &s, kv.dkeys, scale, t.dq, key_place, dqkv);
                write_turned(pairs, &s, kv.dvalues, 1.0, t.dq, value_place, dqkv);
            }
        }
    }
}

/// The blocks `tile` of queries: sets their `dq` and adds to `dkeys` and `dvalues`.
#[inline(always)]
fn tile<P: Pairs>(pairs: &P, s: &Sizes, tile: Range<usize>, view: &View, t: &mut Queries, kv: &mut KeyValue) {
    let words = s.words();
    let seen = view.blocks(tile.start).start..tile.end;
    for begin in seen.clone().step_by(CHUNK) {
        let chunk = begin..seen.end.min(begin + CHUNK);
        for j in chunk.clone() {
            let first = tile.start.max(j);
            let seers = (first..tile.end).take_while(|i| view.blocks(*i).contains(&j)).count();
            for i in first..first + seers {
                let at = i - tile.start;
                let (rows, panel) = (at * SIDE * words, j * words * SIDE);
                let a = Left { words: &t.q[rows..], row: words };
                let to = Block { numbers: &mut *t.scores, row: SIDE };
                product(pairs, words, a, &kv.keys[panel..], Store::Set, to);
                let a = Left { words: &t.dout[rows..], row: words };
                let to = Block { numbers: &mut *t.dp, row: SIDE };
                product(pairs, words, a, &kv.values[panel..], Store::Set, to);
                if !view.plain(i, j) {
                    for (n, row) in t.scores.chunks_exact_mut(SIDE).enumerate() {
                        hide(row, j * SIDE..(j + 1) * SIDE, i * SIDE + n, view);
                    }
                }
                gradients(pairs, view.unit(), at, j - begin, t);
            }
            let (at, terms) = ((first - tile.start) * STEP, seers * STEP);
            for c in s.panels() {
                let (rows, sums) = (c * SIDE * TILE * STEP + at, (j * s.hd + c * SIDE) * SIDE);
                let a = Left { words: &t.q_t[rows..], row: TILE * STEP };
                let to = Block { numbers: &mut kv.dkeys[sums..], row: SIDE };
                product(pairs, terms, a, &t.ds[at * SIDE..], Store::Add, to);
                let a = Left { words: &t.dout_t[rows..], row: TILE * STEP };
                let to = Block { numbers: &mut kv.dvalues[sums..], row: SIDE };
                product(pairs, terms, a, &t.p[at * SIDE..], Store::Add, to);
            }
        }
        for i in tile.clone() {
            let own = view.blocks(i);
            let keys = own.start.max(chunk.start)..own.end.min(chunk.end);
            if keys.is_empty() {
                continue;
            }
            let row = (i - tile.start) * SIDE;
            let a = Left { words: &t.ds_rows[row * DS_ROW + (keys.start - begin) * STEP..], row: DS_ROW };
            let mode = if keys.start == own.start { Store::Set } else { Store::Add };
            for c in s.panels() {
                let b = &kv.keys_as_terms[(c * s.blocks + keys.start) * STEP * SIDE..];
                let to = Block { numbers: &mut t.dq[row * s.hd + c * SIDE..], row: s.hd };
                product(pairs, keys.len() * STEP, a, b, mode, to);
            }
        }
    }
}

/// `p` and `ds` of a block of scores, whose queries are block `at` of the tile, and whose keys are block `key` of the chunk.
#[inline(always)]
fn gradients<P: Pairs>(pairs: &P, unit: f32, at: usize, key: usize, t: &mut Queries) {
    let lanes = P::V::LANES;
    let unit = P::V::splat(unit);
    let panel = at * STEP * SIDE..(at + 1) * STEP * SIDE;
    let panels = t.p[panel.clone()].chunks_exact_mut(SIDE).zip(t.ds[panel].chunks_exact_mut(SIDE));
    let ds_rows = t.ds_rows[at * SIDE * DS_ROW..].chunks_exact_mut(2 * DS_ROW);
    let blocks = t.scores.chunks_exact(2 * SIDE).zip(t.dp.chunks_exact(2 * SIDE));
    for (pair, (((p, ds), ds_rows), (scores, dp))) in panels.zip(ds_rows).zip(blocks).enumerate() {
        let n = at * SIDE + 2 * pair;
        let shifts = [P::V::splat(-t.lse[n]), P::V::splat(-t.lse[n + 1])];
        let dots = [P::V::splat(t.dot[n]), P::V::splat(t.dot[n + 1])];
        let rows = ds_rows.split_at_mut(DS_ROW);
        let rows = [&mut rows.0[key * STEP..][..STEP], &mut rows.1[key * STEP..][..STEP]];
        for k in (0..SIDE).step_by(2 * lanes) {
            let mut probabilities = [[P::V::splat(0.0); 2]; 2];
            let mut grads = probabilities;
            for r in 0..2 {
                for half in 0..2 {
                    let from = r * SIDE + k + half * lanes;
                    let score = load::<P::V, f32>(&scores[from..from + lanes]);
                    let probability = exp2(score.mul_add(unit, shifts[r]));
                    let dp = load::<P::V, f32>(&dp[from..from + lanes]);
                    probabilities[r][half] = probability;
                    grads[r][half] = dp.sub(dots[r]).mul(probability);
                }
            }
            for half in 0..2 {
                let words = k + half * lanes..k + (half + 1) * lanes;
                let (p, ds) = (&mut p[words.clone()], &mut ds[words]);
                // SAFETY: each slice has a word for each lane.
                unsafe {
                    pairs.zip(probabilities[0][half], probabilities[1][half], p.as_mut_ptr());
                    pairs.zip(grads[0][half], grads[1][half], ds.as_mut_ptr());
                }
            }
            for r in 0..2 {
                let words = &mut rows[r][k / 2..k / 2 + lanes];
                // SAFETY: the slice has a word for each lane.
                unsafe { pairs.join(grads[r][0], grads[r][1], words.as_mut_ptr()) };
            }
        }
    }
}

/// The transpose of a tile's rows of words: `[hd, TILE * STEP]` words with the queries as terms.
#[inline(always)]
fn turn_tile<P: Pairs>(pairs: &P, s: &Sizes, rows: &[u32], room: &mut [u32], to: &mut [u32]) {
    for (rows, to) in rows.chunks_exact(2 * s.words()).zip(room.chunks_exact_mut(s.hd)) {
        let (low, high) = rows.split_at(s.words());
        zip_rows(low, high, to);
    }
    turn(pairs, room, s.hd, to, TILE * STEP);
}

/// Sums of all keys (or values), which lie transposed, times `factor` into a head's place.
#[inline(always)]
fn write_turned<P: Pairs>(
    pairs: &P,
    s: &Sizes,
    sums: &[f32],
    factor: f32,
    room: &mut [f32],
    place: Place,
    to: &mut [bf16],
) {
    for (j, sums) in sums.chunks_exact(s.hd * SIDE).enumerate() {
        turn(pairs, sums, SIDE, room, s.hd);
        for (n, row) in room.chunks_exact(s.hd).take((s.seq - j * SIDE).min(SIDE)).enumerate() {
            write::<P::V>(row, factor, &mut to[place.range(j * SIDE + n, s.head_dim)]);
        }
    }
}
