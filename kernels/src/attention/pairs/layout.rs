//! How heads lie in words, and how they come there.

use super::{Pairs, SIDE, STEP};
use crate::attention::tile::Place;
use crate::element::{load, store};
use crate::simd::{Eight, Vector};
use crate::{Heads, bf16};
use std::ops::Range;

/// Sizes of one head's operands.
#[derive(Clone, Copy)]
pub struct Sizes {
    pub seq: usize,
    pub head_dim: usize,
    /// `head_dim`, padded.
    pub hd: usize,
    /// Blocks of `SIDE` tokens in a sequence; the last may be padded.
    pub blocks: usize,
}

impl Sizes {
    pub fn new(shape: &Heads) -> Sizes {
        let (hd, blocks) = (shape.head_dim.next_multiple_of(SIDE), shape.seq.div_ceil(SIDE));
        Sizes { seq: shape.seq, head_dim: shape.head_dim, hd, blocks }
    }
    /// Words of a token.
    pub fn words(&self) -> usize {
        self.hd / 2
    }
    /// Words of all tokens.
    pub fn all(&self) -> usize {
        self.blocks * SIDE * self.words()
    }
    /// Panels as wide as a head.
    pub fn panels(&self) -> Range<usize> {
        0..self.hd / SIDE
    }
}

/// Cuts the next `len` numbers off.
pub fn cut<'a>(memory: &mut &'a mut [f32], len: usize) -> &'a mut [f32] {
    memory.split_off_mut(..len).expect("the kernel's `memory` counts all of its rooms")
}

/// Cuts the next `len` words off.
pub fn cut_words<'a>(memory: &mut &'a mut [f32], len: usize) -> &'a mut [u32] {
    let numbers = cut(memory, len);
    // SAFETY: f32 and u32 have the same size and alignment, and every pattern of bits is a value of either.
    unsafe { std::slice::from_raw_parts_mut(numbers.as_mut_ptr().cast(), numbers.len()) }
}

fn halves(words: &mut [u32]) -> &mut [bf16] {
    // SAFETY: a u32 has the room of two bf16 and more than their alignment, and every pattern of bits is a value of
    // either. The first number is in the low half: x86 is little-endian.
    unsafe { std::slice::from_raw_parts_mut(words.as_mut_ptr().cast(), 2 * words.len()) }
}

/// Tokens `first..` of a head as rows of words, as many as there are; the rest is 0.
#[inline(always)]
pub fn rows(from: &[bf16], place: Place, s: &Sizes, first: usize, to: &mut [u32]) {
    for (n, row) in halves(to).chunks_exact_mut(s.hd).enumerate() {
        let (values, rest) = row.split_at_mut(s.head_dim);
        rest.fill(bf16::ZERO);
        match first + n < s.seq {
            true => copy(&from[place.range(first + n, s.head_dim)], values),
            false => values.fill(bf16::ZERO),
        }
    }
}

/// Copies a few numbers without a call.
#[inline(always)]
fn copy(from: &[bf16], to: &mut [bf16]) {
    let (from, from_rest) = from.as_chunks::<SIDE>();
    let (to, to_rest) = to.as_chunks_mut::<SIDE>();
    for (from, to) in from.iter().zip(to) {
        *to = *from;
    }
    for (from, to) in from_rest.iter().zip(to_rest) {
        *to = *from;
    }
}

/// What [`turn`] moves as it is: four bytes of any pattern.
pub trait Word: Copy {}
impl Word for u32 {}
impl Word for f32 {}

/// The transpose of a matrix: rows of `row` words become columns of rows of `to_row`. Both are multiples of 8.
#[inline(always)]
pub fn turn<P: Pairs, W: Word>(_: &P, from: &[W], row: usize, to: &mut [W], to_row: usize) {
    assert!(row.is_multiple_of(8) && to_row.is_multiple_of(8), "turn: {row} x {to_row}");
    assert!(from.len() >= row * to_row && to.len() >= row * to_row, "turn: lengths");
    turn_eights::<<P::V as Vector>::Eight, W>(from, row, to, to_row);
}

#[inline(always)]
fn turn_eights<V: Eight, W: Word>(from: &[W], row: usize, to: &mut [W], to_row: usize) {
    for r in (0..to_row).step_by(8) {
        for w in (0..row).step_by(8) {
            // SAFETY: `turn` asserted that both hold `row * to_row` words, and `r + 8 <= to_row`, `w + 8 <= row`. Words
            // pass through the vectors as they are.
            unsafe {
                let mut block = [V::splat(0.0); 8];
                for (i, values) in block.iter_mut().enumerate() {
                    *values = V::load(from.as_ptr().add((r + i) * row + w).cast());
                }
                for (i, values) in V::transpose(block).into_iter().enumerate() {
                    values.store(to.as_mut_ptr().add((w + i) * to_row + r).cast());
                }
            }
        }
    }
}

/// Two rows of words become one of pairs above each other: word i has number i of each.
#[inline(always)]
pub fn zip_rows(low: &[u32], high: &[u32], to: &mut [u32]) {
    for ((low, high), to) in low.iter().zip(high).zip(to.chunks_exact_mut(2)) {
        to[0] = low & 0xffff | high << 16;
        to[1] = low >> 16 | high & 0xffff_0000;
    }
}

/// All tokens of a head as right operands: `columns`, a panel for each block of tokens, whose columns they are; `terms`, a
/// panel for each `SIDE` numbers of the head, whose terms they are.
#[inline(always)]
pub fn pack<P: Pairs>(
    pairs: &P,
    from: &[bf16],
    place: Place,
    s: &Sizes,
    block: &mut [u32],
    mut columns: Option<&mut [u32]>,
    mut terms: Option<&mut [u32]>,
) {
    let words = s.words();
    for j in 0..s.blocks {
        rows(from, place, s, j * SIDE, block);
        if let Some(columns) = columns.as_deref_mut() {
            turn(pairs, block, words, &mut columns[j * words * SIDE..][..words * SIDE], SIDE);
        }
        if let Some(terms) = terms.as_deref_mut() {
            for c in s.panels() {
                let panel = &mut terms[(c * s.blocks + j) * STEP * SIDE..][..STEP * SIDE];
                for (rows, to) in block.chunks_exact(2 * words).zip(panel.chunks_exact_mut(SIDE)) {
                    let (low, high) = rows.split_at(words);
                    zip_rows(&low[c * STEP..][..STEP], &high[c * STEP..][..STEP], to);
                }
            }
        }
    }
}

/// A token's numbers times `factor`, rounded.
#[inline(always)]
pub fn write<V: Vector>(row: &[f32], factor: f32, to: &mut [bf16]) {
    for i in (0..to.len()).step_by(V::LANES) {
        store(load::<V, f32>(&row[i..to.len()]).mul(V::splat(factor)), &mut to[i..]);
    }
}
