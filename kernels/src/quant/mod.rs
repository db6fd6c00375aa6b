//! Frozen weights of a few bits: packed codes with scales, in the layouts of bitsandbytes and HQQ, and products that widen them panel by
//! panel. Codes and scales are borrowed, so that they may lie in memory that processes share.
//!
//! | format | codes | scales |
//! |---|---|---|
//! | [`FourBit`] | NF4 or FP4, two to a byte | one for each block of the flat matrix, or these in 8 bits ([`Double`]) |
//! | [`Int8`] | a signed byte | one for each row |
//! | [`Hqq`] | 1, 2, 3, 4 or 8 bits | a scale and a zero for each group |
//!
//! A code stands for an f32, or for a number of a narrower type ([`Rounds`]), and products are computed with that: `gemm(x, w.t(), ...)` is `y = x W^T`, `gemm(dy, w, ...)` is
//! `dx = dy W`, and [`Sheet::pack`](crate::Sheet::pack) takes either side, too.

mod double;
mod four_bit;
mod hqq;
mod int8;
mod panels;
mod rounds;

pub use double::{Double, NESTED_BLOCK, Scales, double_quantise, dynamic_map};
pub use four_bit::{FourBit, FourBitMap, quantise_four_bit};
pub use hqq::{Hqq, HqqAxis, HqqBits, HqqGroups, quantise_hqq};
pub use int8::{INT8_STEP, Int8, quantise_int8};
pub use rounds::Rounds;

use crate::Element;
use crate::element::{load, store};
use crate::simd::{Vector, simd_fn};
use std::ops::Range;

/// A matrix `[rows, cols]` in few bits, or its transpose, or some of its rows.
#[derive(Clone, Copy, Debug)]
pub struct Quantised<'a> {
    codes: Codes<'a>,
    /// How many numbers lie before its first.
    start: usize,
    rows: usize,
    cols: usize,
    transposed: bool,
    rounds: Option<Rounds>,
}

/// What a [`Quantised`] matrix is made of.
#[derive(Clone, Copy, Debug)]
pub enum Codes<'a> {
    FourBit(FourBit<'a>),
    Int8(Int8<'a>),
    Hqq(Hqq<'a>),
}

impl<'a> Quantised<'a> {
    /// A whole matrix `[rows, cols]`, row-major.
    ///
    /// # Panics
    /// If codes or scales are not as many as that takes.
    pub fn new(codes: Codes<'a>, rows: usize, cols: usize) -> Quantised<'a> {
        match &codes {
            Codes::FourBit(four) => four.check(rows * cols),
            Codes::Int8(int8) => int8.check(rows, cols),
            Codes::Hqq(hqq) => hqq.check(rows * cols),
        }
        Quantised { codes, start: 0, rows, cols, transposed: false, rounds: None }
    }

    /// A code stands for a number of this type: what is computed with it is rounded to that, as whoever packed the matrix computes.
    pub fn rounded(self, rounds: Option<Rounds>) -> Quantised<'a> {
        Quantised { rounds, ..self }
    }

    /// What it is made of, for who widens it elsewhere.
    pub fn codes(&self) -> Codes<'a> {
        self.codes
    }

    /// Of which type the numbers are that its codes stand for, where that is not f32.
    pub fn rounds(&self) -> Option<Rounds> {
        self.rounds
    }

    /// The transpose of the same memory.
    pub fn t(self) -> Quantised<'a> {
        Quantised { transposed: !self.transposed, ..self }
    }

    /// Some rows of the matrix as it was packed (columns of its transpose): how threads share a product with a single row.
    pub fn slice(self, rows: Range<usize>) -> Quantised<'a> {
        assert!(rows.start <= rows.end && rows.end <= self.rows, "rows {rows:?} of {}", self.rows);
        Quantised { start: self.start + rows.start * self.cols, rows: rows.len(), ..self }
    }

    /// One number of the matrix as it was packed: what the formats mean, in the simplest words.
    pub fn number(&self, row: usize, col: usize) -> f32 {
        assert!(row < self.rows && col < self.cols);
        let at = self.start + row * self.cols + col;
        let number = match &self.codes {
            Codes::FourBit(four) => four.number(at),
            Codes::Int8(int8) => int8.number(at, self.cols),
            Codes::Hqq(hqq) => hqq.number(at, self.rounds),
        };
        self.rounds.map_or(number, |rounds| rounds.one(number))
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The numbers of the flat matrix from the `at`th on.
    #[inline(always)]
    fn decode<V: Vector>(&self, at: usize, to: &mut [f32]) {
        let at = self.start + at;
        match &self.codes {
            Codes::FourBit(four) => four.decode::<V>(at, to),
            Codes::Int8(int8) => int8.decode(at, self.cols, to),
            Codes::Hqq(hqq) => hqq.decode(at, self.rounds, to),
        }
        if let Some(rounds) = self.rounds {
            rounds.all(to);
        }
    }
}

/// Numbers that are widened at a time: they stay in the first cache.
const CHUNK: usize = 512;

simd_fn! {
    /// Rows of the matrix as it was packed, widened: `to: [rows, cols]`. bf16 is rounded once.
    pub fn dequantise<V, T: Element>(w: Quantised, rows: Range<usize>, to: &mut [T]) {
        let w = w.slice(rows);
        assert_eq!(to.len(), w.rows * w.cols, "dequantise: length of the result");
        let mut wide = [0.0f32; CHUNK];
        for (i, to) in to.chunks_mut(CHUNK).enumerate() {
            let wide = &mut wide[..to.len()];
            w.decode::<V>(i * CHUNK, wide);
            for (from, to) in wide.chunks(V::LANES).zip(to.chunks_mut(V::LANES)) {
                store(load::<V, f32>(from), to);
            }
        }
    }
}

#[cfg(test)]
mod tests;
