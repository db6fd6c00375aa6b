//! The forward pass, block of queries by block of queries. Keys come in chunks: the maximum and the sum of a row's
//! exponentials go on from chunk to chunk, and what was mixed is scaled down where a later chunk has a larger score.

use super::layout::{Sizes, cut, cut_words, pack, rows, write};
use super::view::{View, hide};
use super::{Block, Kernel, Left, Pairs, SIDE, STEP, product};
use crate::attention::tile::Place;
use crate::element::load;
use crate::math::exp2;
use crate::simd::Vector;
use crate::{Heads, Sight, Store, bf16};
use std::f32::consts::LN_2;

/// Blocks of keys in one chunk: scores of a block of queries stay in the second cache. More than one, so that every query
/// sees a key of the first chunk, whatever its window.
const CHUNK: usize = 16;
/// From a row of scores to the next: no multiple of a page, whose lines would share a few places of the cache.
const SCORES_ROW: usize = CHUNK * SIDE + 16;
/// The same for rows of probabilities, in words.
const WEIGHTS_ROW: usize = CHUNK * STEP + 16;

/// Reads and writes what [`attention`](crate::attention()) does.
pub struct Forward<'a> {
    pub qkv: &'a [bf16],
    pub shape: &'a Heads,
    pub sight: &'a Sight<'a>,
    pub out: &'a mut [bf16],
    pub lse: &'a mut [f32],
    /// Of `memory(shape)` numbers.
    pub memory: &'a mut [f32],
}

/// What stands in scratch.
struct Rooms<'a> {
    /// Keys as columns, values as terms.
    keys: &'a mut [u32],
    values: &'a mut [u32],
    /// A block of tokens.
    tokens: &'a mut [u32],
    scores: &'a mut [f32],
    weights: &'a mut [u32],
    /// `[SIDE, hd]`: sums of values by weights.
    mixed: &'a mut [f32],
}

impl Forward<'_> {
    pub fn memory(shape: &Heads) -> usize {
        let s = Sizes::new(shape);
        2 * s.all() + SIDE * (s.words() + SCORES_ROW + WEIGHTS_ROW + s.hd)
    }
}

impl Kernel for Forward<'_> {
    #[inline(always)]
    fn run<P: Pairs>(self, pairs: &P) {
        let Forward { qkv, shape, sight, out, lse, mut memory } = self;
        let s = Sizes::new(shape);
        let m = &mut memory;
        let mut rooms = Rooms {
            keys: cut_words(m, s.all()),
            values: cut_words(m, s.all()),
            tokens: cut_words(m, SIDE * s.words()),
            scores: cut(m, SIDE * SCORES_ROW),
            weights: cut_words(m, SIDE * WEIGHTS_ROW),
            mixed: cut(m, SIDE * s.hd),
        };
        let group = shape.q_heads / shape.kv_heads;
        for b in 0..shape.batch {
            for kv in 0..shape.kv_heads {
                let (key, value) = (shape.q_heads + kv, shape.q_heads + shape.kv_heads + kv);
                let place = |column| Place::fused(shape, b, column);
                pack(pairs, qkv, place(key), &s, rooms.tokens, Some(rooms.keys), None);
                pack(pairs, qkv, place(value), &s, rooms.tokens, None, Some(rooms.values));
                for head in kv * group..(kv + 1) * group {
                    let lse = &mut lse[(b * shape.q_heads + head) * s.seq..][..s.seq];
                    let view = View::new(shape, sight, head);
                    let out_place = Place::out(shape, b, head);
                    for i in 0..s.blocks {
                        rows(qkv, place(head), &s, i * SIDE, rooms.tokens);
                        let state = queries(pairs, &s, i, &view, &mut rooms);
                        for n in 0..SIDE.min(s.seq - i * SIDE) {
                            let to = &mut out[out_place.range(i * SIDE + n, s.head_dim)];
                            write::<P::V>(&rooms.mixed[n * s.hd..], 1.0 / state.sum[n], to);
                            lse[i * SIDE + n] = state.max[n] * LN_2 + state.sum[n].ln();
                        }
                    }
                }
            }
        }
    }
}

/// Of each row: the largest score so far (a power of 2), and the sum of 2 to the power of what scores lack to it.
struct State {
    max: [f32; SIDE],
    sum: [f32; SIDE],
}

/// `mixed` for block `i` of queries, still to be divided by the sums.
#[inline(always)]
fn queries<P: Pairs>(pairs: &P, s: &Sizes, i: usize, view: &View, rooms: &mut Rooms) -> State {
    let words = s.words();
    let mut state = State { max: [f32::NEG_INFINITY; SIDE], sum: [0.0; SIDE] };
    let seen = view.blocks(i);
    for begin in seen.clone().step_by(CHUNK) {
        let chunk = begin..seen.end.min(begin + CHUNK);
        for j in chunk.clone() {
            let (a, b) = (Left { words: rooms.tokens, row: words }, &rooms.keys[j * words * SIDE..]);
            let c = Block { numbers: &mut rooms.scores[(j - begin) * SIDE..], row: SCORES_ROW };
            product(pairs, words, a, b, Store::Set, c);
        }
        let keys = chunk.start * SIDE..chunk.end * SIDE;
        let first = begin == seen.start;
        for n in 0..SIDE {
            let row = &mut rooms.scores[n * SCORES_ROW..][..keys.len()];
            hide(row, keys.clone(), i * SIDE + n, view);
            let weights = &mut rooms.weights[n * WEIGHTS_ROW..][..keys.len() / 2];
            let before = state.max[n];
            let max = before.max(largest::<P::V>(row) * view.unit());
            let sum = exponentials(pairs, row, view.unit(), max, weights);
            let kept = (before - max).exp2(); // 0 in the first chunk
            (state.max[n], state.sum[n]) = (max, state.sum[n] * kept + sum);
            if !first && kept != 1.0 {
                rooms.mixed[n * s.hd..][..s.hd].iter_mut().for_each(|sum| *sum *= kept);
            }
        }
        let mode = if first { Store::Set } else { Store::Add };
        for c in s.panels() {
            let a = Left { words: rooms.weights, row: WEIGHTS_ROW };
            let b = &rooms.values[(c * s.blocks + begin) * STEP * SIDE..];
            let to = Block { numbers: &mut rooms.mixed[c * SIDE..], row: s.hd };
            product(pairs, chunk.len() * STEP, a, b, mode, to);
        }
    }
    state
}

#[inline(always)]
fn largest<V: Vector>(row: &[f32]) -> f32 {
    let mut max = [V::splat(f32::NEG_INFINITY); 2];
    for scores in row.chunks_exact(2 * V::LANES) {
        let (low, high) = scores.split_at(V::LANES);
        max = [max[0].max(load(low)), max[1].max(load(high))];
    }
    max[0].max(max[1]).max_lane()
}

/// `weights = 2^(unit * row - max)`, rounded; returns the sum of what they were before.
#[inline(always)]
fn exponentials<P: Pairs>(pairs: &P, row: &[f32], unit: f32, max: f32, weights: &mut [u32]) -> f32 {
    let lanes = P::V::LANES;
    let (unit, shift) = (P::V::splat(unit), P::V::splat(-max));
    let mut sum = [P::V::splat(0.0); 2];
    for (scores, weights) in row.chunks_exact(2 * lanes).zip(weights.chunks_exact_mut(lanes)) {
        let (low, high) = scores.split_at(lanes);
        let low = exp2(load::<P::V, f32>(low).mul_add(unit, shift));
        let high = exp2(load::<P::V, f32>(high).mul_add(unit, shift));
        sum = [sum[0].add(low), sum[1].add(high)];
        // SAFETY: the slice has a word for each lane.
        unsafe { pairs.join(low, high, weights.as_mut_ptr()) };
    }
    sum[0].add(sum[1]).sum()
}
