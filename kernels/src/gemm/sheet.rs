//! Several threads compute one product: they copy a sheet of B together, then each multiplies rows of A by it.

use super::micro::tile_cols;
use super::operand::Operand;
use super::{A_PANELS, KC, multiply};
use crate::simd::{Level, level, simd_fn};
use crate::{Element, Matrix, Scratch, Store};
use std::ops::Range;

/// Most numbers of a sheet: they stay in the third cache.
pub(super) const SHEET: usize = NC * KC;
/// Most columns of a sheet. A multiple of every tile's columns.
pub(super) const NC: usize = 2048;

/// A part of B, `[terms, columns]`, of which a copy fits the caches.
#[derive(Clone, Debug)]
pub struct Sheet {
    /// Of all of B.
    pub(super) of: (usize, usize),
    pub(super) terms: Range<usize>,
    pub(super) columns: Range<usize>,
}

/// B of `terms` by `columns` numbers, in the order in which sheets are to be multiplied.
pub fn sheets(terms: usize, columns: usize) -> impl Iterator<Item = Sheet> {
    let width = panel_width();
    (0..columns).step_by(NC).flat_map(move |first| {
        let range = first..columns.min(first + NC);
        let block = block(terms);
        let deep = SHEET / (range.len().next_multiple_of(width) * block) * block;
        (0..terms).step_by(deep).map(move |term| Sheet {
            of: (terms, columns),
            terms: term..terms.min(term + deep),
            columns: range.clone(),
        })
    })
}

/// Terms of which sums are kept in registers: blocks of equal size.
fn block(terms: usize) -> usize {
    terms.div_ceil(terms.div_ceil(KC))
}

/// Columns of a panel at this CPU's level.
fn panel_width() -> usize {
    tile_cols(if level() >= Level::Avx512 { 16 } else { 8 })
}

impl Sheet {
    /// Numbers of its copy.
    pub fn packed_len(&self) -> usize {
        self.columns.len().next_multiple_of(panel_width()) * self.terms.len()
    }

    /// How many numbers of the copy each of `threads` makes: whole panels.
    pub fn share(&self, threads: usize) -> usize {
        self.columns.len().div_ceil(panel_width()).div_ceil(threads) * panel_width() * self.terms.len()
    }

    /// Makes a part of the copy of `b`, the numbers from `at` on, which is a multiple of a `share`.
    pub fn pack<B: Operand>(&self, b: B, at: usize, to: &mut [f32]) {
        b.check();
        assert_eq!(b.shape(), self.of, "gemm: the shape of b");
        let first = self.columns.start + at / self.terms.len();
        let columns = to.len() / self.terms.len();
        pack_columns(b, self.terms.clone(), first..self.columns.end.min(first + columns), to);
    }

    /// Whether sums of so many terms are added up in C, which then has to be fp32 if they are not to be rounded in between.
    pub fn sums_in_c(terms: usize) -> bool {
        terms > KC
    }

    /// Its share of `c = a * b` or `c += a * b` with some rows of `a` and `c`, and B as `pack` has copied it.
    pub fn multiply<A: Element, C: Element>(
        &self,
        a: Matrix<A>,
        packed: &[f32],
        mode: Store,
        c: &mut [C],
        scratch: &mut Scratch,
    ) {
        a.check();
        assert_eq!(a.cols, self.of.0, "gemm: columns of a and rows of b");
        assert_eq!(c.len(), a.rows * self.of.1, "gemm: length of c");
        multiply(self, a, packed, mode, c, scratch.take(A_PANELS));
    }

    pub(super) fn blocks(&self) -> impl Iterator<Item = Range<usize>> {
        let (block, end) = (block(self.of.0), self.terms.end);
        self.terms.clone().step_by(block).map(move |term| term..end.min(term + block))
    }
}

simd_fn! {
    fn pack_columns<V, B: Operand>(b: B, terms: Range<usize>, columns: Range<usize>, to: &mut [f32]) {
        match const { tile_cols(V::LANES) } {
            32 => b.pack::<V, 32>(terms, columns, to),
            _ => b.pack::<V, 16>(terms, columns, to),
        }
    }
}
