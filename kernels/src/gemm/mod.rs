//! Matrix products of any strides and formats, accumulated in f32. Blocks of both operands are copied (widened to f32) into
//! panels that fit the caches, and a tile in registers runs over them; see BLIS for the scheme.

pub(crate) mod micro;
pub(crate) mod operand;
pub(crate) mod pack;
mod sheet;

pub use operand::Operand;
pub use sheet::{Sheet, sheets};

use crate::element::{load, store as store_vector};
use crate::simd::{Vector, simd_fn};
use crate::{Element, Matrix, Scratch, Store};
use micro::{Rows, micro, tile_cols, tile_rows};
use pack::pack;
use sheet::SHEET;
use std::ops::Range;

/// Terms of one block: a panel of B (`KC` x 16 numbers) stays in the first cache, 32 KiB.
const KC: usize = 384;
/// Rows of one block of A: `MC` x `KC` numbers stay in the second cache, 512 KiB. A multiple of every tile's rows.
const MC: usize = 192;
/// Numbers of a block of A in panels.
const A_PANELS: usize = MC * KC;

/// `c = a * b` or `c += a * b`, with `a: [m, k]`, `b: [k, n]` of any strides (see [`Matrix::t`]) and `c: [m, n]` dense.
/// bf16 results are rounded once. Several threads share [`sheets`] instead.
pub fn gemm<A: Element, B: Operand, C: Element>(
    a: Matrix<A>,
    b: B,
    mode: Store,
    c: &mut [C],
    scratch: &mut Scratch,
) {
    a.check();
    b.check();
    let (terms, columns) = b.shape();
    assert_eq!(a.cols, terms, "gemm: {} x {} times {terms} x {columns}", a.rows, a.cols);
    assert_eq!(c.len(), a.rows * columns, "gemm: length of c");
    if c.is_empty() {
        return;
    }
    if a.cols == 0 {
        if mode == Store::Set {
            c.fill(C::default());
        }
        return;
    }
    if a.rows <= NARROW && a.col_stride == 1 && b.has_whole_columns() {
        return narrow(a, b, mode, &mut c.chunks_exact_mut(columns).collect::<Vec<_>>());
    }
    // Sums of several blocks must not be rounded in between.
    let wide = if size_of::<C>() < size_of::<f32>() && Sheet::sums_in_c(a.cols) { c.len() } else { 0 };
    let (packed, rest) = scratch.take(SHEET + A_PANELS + wide).split_at_mut(SHEET);
    let (a_panels, wide) = rest.split_at_mut(A_PANELS);
    if wide.is_empty() {
        sheets(terms, columns).for_each(|sheet| {
            sheet.pack(b, 0, packed);
            multiply(&sheet, a, packed, mode, c, a_panels);
        });
        return;
    }
    if mode == Store::Add {
        crate::convert(c, wide);
    }
    sheets(terms, columns).for_each(|sheet| {
        sheet.pack(b, 0, packed);
        multiply(&sheet, a, packed, mode, wide, a_panels);
    });
    crate::convert(wide, c);
}

/// Up to this many rows, copying `b` would cost more than the product.
const NARROW: usize = 3;

/// The product of each row by itself, `c[i] = a[i] * b` or `c[i] += a[i] * b`, with rows of `a` and columns of `b` that lie in one piece each: a row's
/// bits are the same however many others there are, and `b` is read once for all of them. For a few rows, as when several texts are generated
/// token by token.
pub fn gemm_by_row<A: Element, B: Operand, C: Element>(a: Matrix<A>, b: B, mode: Store, c: &mut [&mut [C]]) {
    a.check();
    b.check();
    let (terms, columns) = b.shape();
    assert_eq!(a.cols, terms, "gemm_by_row: {} x {} times {terms} x {columns}", a.rows, a.cols);
    assert!(a.col_stride == 1 && b.has_whole_columns(), "gemm_by_row: in one piece");
    assert!(c.len() == a.rows && c.iter().all(|row| row.len() == columns), "gemm_by_row: length of c");
    narrow(a, b, mode, c);
}

simd_fn! {
    fn narrow<V, A: Element, B: Operand, C: Element>(a: Matrix<A>, b: B, mode: Store, c: &mut [&mut [C]]) {
        b.narrow::<V, A, C>(a, mode, c);
    }
}

simd_fn! {
    fn multiply<V, A: Element, C: Element>(sheet: &Sheet, a: Matrix<A>, packed: &[f32], mode: Store, c: &mut [C], a_panels: &mut [f32]) {
        match const { tile_rows(V::LANES) } {
            12 => multiply_with::<V, A, C, 12, 32>(sheet, a, packed, mode, c, a_panels),
            _ => multiply_with::<V, A, C, 6, 16>(sheet, a, packed, mode, c, a_panels),
        }
    }
}

#[inline(always)]
fn multiply_with<V: Vector, A: Element, C: Element, const MR: usize, const NR: usize>(
    sheet: &Sheet,
    a: Matrix<A>,
    packed: &[f32],
    mode: Store,
    c: &mut [C],
    a_panels: &mut [f32],
) {
    let (m, n) = (a.rows, sheet.of.1);
    assert!(MR == tile_rows(V::LANES) && NR == tile_cols(V::LANES));
    let a_columns = a.t();
    let Range { start: j0, end: j1 } = sheet.columns;
    for terms in sheet.blocks() {
        let (len, before) = (terms.len(), (terms.start - sheet.terms.start) * NR);
        let mode = if terms.start > 0 { Store::Add } else { mode };
        for i0 in (0..m).step_by(MC) {
            let i1 = m.min(i0 + MC);
            pack::<V, A, MR>(&a_columns, terms.clone(), i0..i1, a_panels);
            for (jp, j) in (j0..j1).step_by(NR).enumerate() {
                let b_panel = &packed[jp * sheet.terms.len() * NR + before..][..len * NR];
                for (ip, i) in (i0..i1).step_by(MR).enumerate() {
                    let cols = NR.min(j1 - j);
                    for r in 0..MR.min(i1 - i) {
                        V::prefetch(c[(i + r) * n + j..].as_ptr().cast());
                    }
                    let a_panel = &a_panels[ip * len * MR..][..len * MR];
                    let rows_of_a = Rows { at: a_panel.as_ptr(), row: 1, term: MR };
                    // SAFETY: the panels hold `len` terms of MR rows and of NR columns.
                    let tile = unsafe { micro::<V, MR>(len, rows_of_a, b_panel.as_ptr(), NR) };
                    let (rows, first) = (MR.min(i1 - i), i * n + j);
                    match (rows, cols) == (MR, NR) {
                        true => write_whole(tile, mode, &mut c[first..], n),
                        false => write_part(&tile[..rows], mode, &mut c[first..], n, cols),
                    }
                }
            }
        }
    }
}

/// A tile to its place, the rows `stride` apart.
#[inline(always)]
fn write_whole<V: Vector, C: Element, const MR: usize>(
    tile: [[V; 2]; MR],
    mode: Store,
    to: &mut [C],
    stride: usize,
) {
    for (r, row) in tile.into_iter().enumerate() {
        let to = &mut to[r * stride..][..2 * V::LANES];
        for (value, to) in row.into_iter().zip(to.chunks_exact_mut(V::LANES)) {
            store_vector(if mode == Store::Add { value.add(load(to)) } else { value }, to);
        }
    }
}

/// As much of a tile as there is place for.
#[inline(always)]
fn write_part<V: Vector, C: Element>(tile: &[[V; 2]], mode: Store, to: &mut [C], stride: usize, cols: usize) {
    for (r, row) in tile.iter().enumerate() {
        for (value, to) in row.iter().zip(to[r * stride..][..cols].chunks_mut(V::LANES)) {
            store_vector(if mode == Store::Add { value.add(load(to)) } else { *value }, to);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::at_every_level;
    use crate::testing::*;
    use crate::{bf16, reference};
    use proptest::prelude::*;

    fn check<A: Element, B: Element, C: Element>(
        (m, n, k): (usize, usize, usize),
        (ta, tb): (bool, bool),
        mode: Store,
        seed: u64,
        tolerance: f32,
    ) {
        let (a, b) = (numbers::<A>(seed, m * k), numbers::<B>(seed ^ 1, k * n));
        let a = if ta { Matrix::new(&a, k, m).t() } else { Matrix::new(&a, m, k) };
        let b = if tb { Matrix::new(&b, n, k).t() } else { Matrix::new(&b, k, n) };
        let (mut c, mut exact) = (numbers::<C>(seed ^ 2, m * n), numbers::<C>(seed ^ 2, m * n));
        gemm(a, b, mode, &mut c, &mut Scratch::new());
        reference::gemm(a, b, mode, &mut exact, &mut Scratch::new());
        assert_close(&c, &exact, tolerance, 2e-7 * (k as f32 + 4.0));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        #[test]
        fn equals_its_oracle(m in 0usize..40, n in 0usize..70, k in 0usize..50, ta: bool, tb: bool, add: bool, seed: u64) {
            let mode = if add { Store::Add } else { Store::Set };
            at_every_level(|| {
                check::<f32, f32, f32>((m, n, k), (ta, tb), mode, seed, 1e-6);
                check::<bf16, bf16, f32>((m, n, k), (ta, tb), mode, seed, 1e-6);
                check::<bf16, bf16, bf16>((m, n, k), (ta, tb), mode, seed, BF16_STEP);
                check::<f32, bf16, bf16>((m, n, k), (ta, tb), mode, seed, BF16_STEP);
            });
        }
    }

    /// As threads share it.
    fn in_parts(m: usize, n: usize, k: usize, threads: usize) {
        let (a, b) = (numbers::<f32>(1, m * k), numbers::<bf16>(2, k * n));
        let (mut c, mut whole) = (numbers::<f32>(3, m * n), numbers::<f32>(3, m * n));
        let (a, b) = (Matrix::new(&a, m, k), Matrix::new(&b, n, k).t());
        gemm(a, b, Store::Add, &mut whole, &mut Scratch::new());
        for sheet in sheets(k, n) {
            let mut packed = vec![f32::NAN; sheet.packed_len()];
            let share = sheet.share(threads);
            packed.chunks_mut(share).enumerate().for_each(|(i, to)| sheet.pack(b, i * share, to));
            let rows = m.div_ceil(threads);
            for (c, a) in c.chunks_mut(rows * n).zip(a.data.chunks(rows * k)) {
                let a = Matrix::new(a, a.len() / k, k);
                sheet.multiply(a, &packed, Store::Add, c, &mut Scratch::new());
            }
        }
        assert_eq!(c, whole, "{m} x {n} x {k} by {threads} threads");
    }

    fn check_rows<A: Element, B: Element, C: Element>(m: usize, n: usize, k: usize, seed: u64) {
        let (a, b) = (numbers::<A>(seed, m * k), numbers::<B>(seed ^ 1, k * n));
        let (a, b) = (Matrix::new(&a, m, k), Matrix::new(&b, n, k).t());
        let mut together = numbers::<C>(seed ^ 2, m * n);
        let mut alone = together.clone();
        gemm_by_row(a, b, Store::Add, &mut together.chunks_exact_mut(n).collect::<Vec<_>>());
        for (row, c) in a.data.chunks_exact(k).zip(alone.chunks_exact_mut(n)) {
            gemm(Matrix::new(row, 1, k), b, Store::Add, c, &mut Scratch::new());
        }
        assert!(together == alone, "{m} x {n} x {k}");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        #[test]
        fn a_row_is_the_same_among_others(m in 1usize..20, n in 1usize..40, k in 1usize..90, seed: u64) {
            at_every_level(|| {
                check_rows::<f32, f32, f32>(m, n, k, seed);
                check_rows::<f32, bf16, f32>(m, n, k, seed);
                check_rows::<bf16, bf16, bf16>(m, n, k, seed);
            });
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        #[test]
        fn threads_compute_the_same(m in NARROW + 1..40, n in 1usize..200, k in 1usize..90, threads in 1usize..6) {
            at_every_level(|| in_parts(m, n, k, threads));
        }
    }

    #[test]
    fn several_sheets_in_both_directions() {
        at_every_level(|| in_parts(9, sheet::NC + 19, KC + 5, 3));
        at_every_level(|| in_parts(5, sheet::NC / 2, 2 * KC + 9, 2));
    }

    #[test]
    fn several_blocks_in_every_direction() {
        at_every_level(|| {
            check::<f32, f32, f32>((MC + 7, 33, 2 * KC + 5), (false, true), Store::Add, 1, 1e-6);
            check::<bf16, bf16, bf16>((5, sheet::NC + 19, KC + 1), (true, false), Store::Add, 2, BF16_STEP);
        });
    }
}
