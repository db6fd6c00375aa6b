//! Quantised matrices as the right side of a product: widened piece by piece on their way into its panels.

use super::{CHUNK, Quantised};
use crate::gemm::operand::{Operand, ROWS, SUMS, add_all_products, columns::Columns, write_sum};
use crate::gemm::pack::{SIDE_BY_SIDE, turn};
use crate::simd::Vector;
use crate::{Element, Matrix, Store};
use std::ops::Range;

impl Operand for Quantised<'_> {}

impl Columns for Quantised<'_> {
    fn shape(&self) -> (usize, usize) {
        if self.transposed { (self.cols, self.rows) } else { (self.rows, self.cols) }
    }

    /// `Quantised::new` has checked it.
    fn check(&self) {}

    fn has_whole_columns(&self) -> bool {
        self.transposed
    }

    #[inline(always)]
    fn pack<V: Vector, const W: usize>(&self, terms: Range<usize>, columns: Range<usize>, to: &mut [f32]) {
        match self.transposed {
            true => turned::<V, W>(self, terms, columns, to),
            false => copied::<V, W>(self, terms, columns, to),
        }
    }

    #[inline(always)]
    fn narrow<V: Vector, A: Element, C: Element>(&self, a: Matrix<A>, mode: Store, c: &mut [&mut [C]]) {
        let (k, n) = self.shape();
        let mut wide = [0.0f32; CHUNK];
        for (rows, c) in c.chunks_mut(ROWS).enumerate() {
            let a = Matrix { data: &a.data[rows * ROWS * a.row_stride..], rows: c.len(), ..a };
            for j in 0..n {
                let mut sums = [[V::splat(0.0); SUMS]; ROWS];
                for first in (0..k).step_by(CHUNK) {
                    let wide = &mut wide[..CHUNK.min(k - first)];
                    self.decode::<V>(j * k + first, wide);
                    add_all_products(a, first, wide, &mut sums);
                }
                for (sums, c) in sums.into_iter().zip(&mut *c) {
                    write_sum(sums, mode, &mut c[j]);
                }
            }
        }
    }
}

/// Terms that are widened at a time for the lines of a panel: a block of the usual size.
const TERMS: usize = 64;
/// Lines of the widest panel.
const LINES: usize = 32;

/// Panels whose lines are rows of the packed matrix.
#[inline(always)]
fn turned<V: Vector, const W: usize>(
    w: &Quantised,
    terms: Range<usize>,
    lines: Range<usize>,
    to: &mut [f32],
) {
    let mut wide = [0.0f32; LINES * TERMS];
    for (first, panel) in lines.clone().step_by(W).zip(to.chunks_exact_mut(terms.len() * W)) {
        let count = W.min(lines.end - first);
        for (term, panel) in terms.clone().step_by(TERMS).zip(panel.chunks_mut(TERMS * W)) {
            let len = panel.len() / W;
            for (line, wide) in wide.chunks_exact_mut(TERMS).enumerate().take(count) {
                w.decode::<V>((first + line) * w.cols + term, &mut wide[..len]);
            }
            let block =
                Matrix { data: &wide[..], rows: TERMS, cols: count, row_stride: 1, col_stride: TERMS };
            turn::<V::Eight, f32, W>(&block, 0..len, 0..count, panel);
        }
    }
}

/// Panels whose terms are rows of the packed matrix, several at a time so that its bytes are read in longer pieces.
#[inline(always)]
fn copied<V: Vector, const W: usize>(
    w: &Quantised,
    terms: Range<usize>,
    lines: Range<usize>,
    to: &mut [f32],
) {
    let len = terms.len() * W;
    for (first, panels) in lines.clone().step_by(SIDE_BY_SIDE * W).zip(to.chunks_mut(SIDE_BY_SIDE * len)) {
        for (t, term) in terms.clone().enumerate() {
            let columns = (first..lines.end).step_by(W);
            for (column, panel) in columns.zip(panels.chunks_exact_mut(len)) {
                let count = W.min(lines.end - column);
                w.decode::<V>(term * w.cols + column, &mut panel[t * W..][..count]);
            }
        }
    }
}
