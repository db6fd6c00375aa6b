//! What may stand on the right of a product, and how a product reads it.

use super::pack::pack;
use crate::element::load;
use crate::simd::Vector;
use crate::{Element, Matrix, Store};
use columns::Columns;
use std::ops::Range;

/// The right side of a product: a [`Matrix`] of numbers, or a [`Quantised`](crate::quant::Quantised) one.
pub trait Operand: Columns + Copy {}

impl<T: Element> Operand for Matrix<'_, T> {}

/// How a product reads its right side. Kept out of the public interface, which also closes `Operand` to other types.
pub(crate) mod columns {
    use super::*;

    pub trait Columns {
        /// Terms and columns.
        fn shape(&self) -> (usize, usize);
        /// Panics if it ends outside of its memory.
        fn check(&self);
        /// Whether the numbers of each column lie in one piece, so that [`Columns::narrow`] reads them in order.
        fn has_whole_columns(&self) -> bool;
        /// Copies a block into panels; see [`pack`].
        fn pack<V: Vector, const W: usize>(&self, terms: Range<usize>, columns: Range<usize>, to: &mut [f32]);
        /// A few rows times whole columns, as when generating token by token: reads this side once, in place and in order, as memory gives it
        /// fastest. The bits of a row do not hang on the others.
        fn narrow<V: Vector, A: Element, C: Element>(&self, a: Matrix<A>, mode: Store, c: &mut [&mut [C]]);
    }
}

impl<T: Element> Columns for Matrix<'_, T> {
    fn shape(&self) -> (usize, usize) {
        (self.rows, self.cols)
    }

    fn check(&self) {
        Matrix::check(self);
    }

    fn has_whole_columns(&self) -> bool {
        self.row_stride == 1
    }

    #[inline(always)]
    fn pack<V: Vector, const W: usize>(&self, terms: Range<usize>, columns: Range<usize>, to: &mut [f32]) {
        pack::<V, T, W>(self, terms, columns, to);
    }

    #[inline(always)]
    fn narrow<V: Vector, A: Element, C: Element>(&self, a: Matrix<A>, mode: Store, c: &mut [&mut [C]]) {
        for j in 0..self.cols {
            let column = &self.data[j * self.col_stride..][..self.rows];
            for (i, c) in c.iter_mut().enumerate() {
                let mut sums = [V::splat(0.0); SUMS];
                add_products(&a.data[i * a.row_stride..][..self.rows], column, &mut sums);
                write_sum(sums, mode, &mut c[j]);
            }
        }
    }
}

/// Sums that a narrow product has on the way: enough to hide the time that an addition takes.
pub(crate) const SUMS: usize = 4;

/// Adds the products of two pieces of equal length.
#[inline(always)]
pub(crate) fn add_products<V: Vector, A: Element, B: Element>(row: &[A], column: &[B], sums: &mut [V; SUMS]) {
    assert_eq!(row.len(), column.len());
    let k = row.len();
    let whole = k - k % (SUMS * V::LANES);
    for t in (0..whole).step_by(SUMS * V::LANES) {
        for (s, sum) in sums.iter_mut().enumerate() {
            let at = t + s * V::LANES;
            // SAFETY: both slices have `k` numbers, at least `SUMS` vectors from `t` on.
            let (x, w): (V, V) = unsafe { (A::load(row.as_ptr().add(at)), B::load(column.as_ptr().add(at))) };
            *sum = x.mul_add(w, *sum);
        }
    }
    for t in (whole..k).step_by(V::LANES) {
        sums[0] = load::<V, A>(&row[t..]).mul_add(load(&column[t..]), sums[0]);
    }
}

/// The result of a narrow product to its place.
#[inline(always)]
pub(crate) fn write_sum<V: Vector, C: Element>([s0, s1, s2, s3]: [V; SUMS], mode: Store, to: &mut C) {
    let before = if mode == Store::Add { to.to_f32() } else { 0.0 };
    *to = C::from_f32(before + s0.add(s1).add(s2.add(s3)).sum());
}
