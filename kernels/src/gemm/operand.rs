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
            let mut sums = [[V::splat(0.0); SUMS]; ROWS];
            for (rows, c) in c.chunks_mut(ROWS).enumerate() {
                sums[..c.len()].fill([V::splat(0.0); SUMS]);
                let a = Matrix { data: &a.data[rows * ROWS * a.row_stride..], rows: c.len(), ..a };
                add_all_products(a, 0, column, &mut sums);
                for (sums, c) in sums.into_iter().zip(c) {
                    write_sum(sums, mode, &mut c[j]);
                }
            }
        }
    }
}

/// Sums that a narrow product has on the way: enough to hide the time that an addition takes.
pub(crate) const SUMS: usize = 4;

/// Rows whose sums a narrow product has at once.
pub(crate) const ROWS: usize = 8;

/// Adds the products of a piece of a column with the same terms, from `first` on, of at most `ROWS` rows. Several rows share what is read of the
/// column, as many as registers hold the sums of; the sums of each are those of one alone.
#[inline(always)]
pub(crate) fn add_all_products<V: Vector, A: Element, B: Element>(
    a: Matrix<A>,
    first: usize,
    column: &[B],
    sums: &mut [[V; SUMS]; ROWS],
) {
    let row = |i: usize| &a.data[i * a.row_stride + first..][..column.len()];
    let mut i = 0;
    while i < a.rows {
        match a.rows - i {
            4.. if V::LANES == 16 => {
                add_products([row(i), row(i + 1), row(i + 2), row(i + 3)], column, &mut sums[i..]);
                i += 4;
            }
            2.. => {
                add_products([row(i), row(i + 1)], column, &mut sums[i..]);
                i += 2;
            }
            _ => {
                add_products([row(i)], column, &mut sums[i..]);
                i += 1;
            }
        }
    }
}

/// Adds the products of a piece of a column with pieces of equal length.
#[inline(always)]
fn add_products<V: Vector, A: Element, B: Element, const R: usize>(
    rows: [&[A]; R],
    column: &[B],
    to: &mut [[V; SUMS]],
) {
    let k = column.len();
    assert!(rows.iter().all(|row| row.len() == k));
    let whole = k - k % (SUMS * V::LANES);
    let mut sums: [[V; SUMS]; R] = std::array::from_fn(|r| to[r]);
    for t in (0..whole).step_by(SUMS * V::LANES) {
        for s in 0..SUMS {
            let at = t + s * V::LANES;
            // SAFETY: all slices have `k` numbers, at least `SUMS` vectors from `t` on.
            let w: V = unsafe { B::load(column.as_ptr().add(at)) };
            for (row, sums) in rows.iter().zip(&mut sums) {
                // SAFETY: as above.
                let x: V = unsafe { A::load(row.as_ptr().add(at)) };
                sums[s] = x.mul_add(w, sums[s]);
            }
        }
    }
    for t in (whole..k).step_by(V::LANES) {
        let w: V = load(&column[t..]);
        for (row, sums) in rows.iter().zip(&mut sums) {
            sums[0] = load::<V, A>(&row[t..]).mul_add(w, sums[0]);
        }
    }
    to[..R].copy_from_slice(&sums);
}

/// The result of a narrow product to its place.
#[inline(always)]
pub(crate) fn write_sum<V: Vector, C: Element>([s0, s1, s2, s3]: [V; SUMS], mode: Store, to: &mut C) {
    let before = if mode == Store::Add { to.to_f32() } else { 0.0 };
    *to = C::from_f32(before + s0.add(s1).add(s2.add(s3)).sum());
}
