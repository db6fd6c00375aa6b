//! Matrix products of any strides and formats, accumulated in f32. Blocks of both operands are copied (widened to f32) into
//! panels that fit the caches, and a tile in registers runs over them; see BLIS for the scheme.

pub(crate) mod micro;
pub(crate) mod pack;

use crate::element::{load, store as store_vector};
use crate::simd::{Vector, simd_fn};
use crate::{Element, Matrix, Scratch, Store};
use micro::{Rows, micro, tile_cols, tile_rows};
use pack::pack;

/// Terms of one block: a panel of B (`KC` x 16 numbers) stays in the first cache, 32 KiB.
const KC: usize = 384;
/// Rows of one block of A: `MC` x `KC` numbers stay in the second cache, 512 KiB. A multiple of every tile's rows.
const MC: usize = 192;
/// Columns of one block of B: `KC` x `NC` numbers stay in the third cache. A multiple of every tile's columns.
const NC: usize = 2048;

/// `c = a * b` or `c += a * b`, with `a: [m, k]`, `b: [k, n]` of any strides (see [`Matrix::t`]) and `c: [m, n]` dense.
/// bf16 results are rounded once. For several threads, split the rows of `a` and `c`.
pub fn gemm<A: Element, B: Element, C: Element>(
    a: Matrix<A>,
    b: Matrix<B>,
    mode: Store,
    c: &mut [C],
    scratch: &mut Scratch,
) {
    a.check();
    b.check();
    assert_eq!(a.cols, b.rows, "gemm: {} x {} times {} x {}", a.rows, a.cols, b.rows, b.cols);
    assert_eq!(c.len(), a.rows * b.cols, "gemm: length of c");
    if c.is_empty() {
        return;
    }
    if a.cols == 0 {
        if mode == Store::Set {
            c.fill(C::default());
        }
        return;
    }
    if a.rows <= NARROW && a.col_stride == 1 && b.row_stride == 1 {
        return narrow(a, b, mode, c);
    }
    let blocks = a.cols.div_ceil(KC);
    let packed = PACKED_A + PACKED_B;
    if size_of::<C>() == size_of::<f32>() || blocks == 1 {
        blocked(a, b, mode, c, scratch.take(packed));
        return;
    }
    // Sums of several blocks must not be rounded in between.
    let (packed, wide) = scratch.take(packed + c.len()).split_at_mut(packed);
    if mode == Store::Add {
        crate::convert(c, wide);
    }
    blocked(a, b, mode, wide, packed);
    crate::convert(wide, c);
}

/// Up to this many rows, copying `b` would cost more than the product.
const NARROW: usize = 3;

/// Columns that [`narrow`] takes together: as many sums as hide the time that an addition takes.
const TOGETHER: usize = 4;

simd_fn! {
    /// A few rows times a transposed matrix, as when generating token by token: reads `b` once, in place.
    fn narrow<V, A: Element, B: Element, C: Element>(a: Matrix<A>, b: Matrix<B>, mode: Store, c: &mut [C]) {
        let (n, k) = (b.cols, b.rows);
        let step = 2 * V::LANES;
        for first in (0..n).step_by(TOGETHER) {
            // Columns past the end are the last one again.
            let columns: [&[B]; TOGETHER] =
                std::array::from_fn(|j| &b.data[(first + j).min(n - 1) * b.col_stride..][..k]);
            for i in 0..a.rows {
                let row = &a.data[i * a.row_stride..][..k];
                let mut sums = [[V::splat(0.0); 2]; TOGETHER];
                for t in (0..k - k % step).step_by(step) {
                    // SAFETY: all of these slices have `k` numbers, at least two vectors from `t` on.
                    unsafe {
                        let at = row.as_ptr().add(t);
                        let x = [A::load::<V>(at), A::load::<V>(at.add(V::LANES))];
                        for (sums, column) in sums.iter_mut().zip(columns) {
                            let at = column.as_ptr().add(t);
                            sums[0] = x[0].mul_add(B::load(at), sums[0]);
                            sums[1] = x[1].mul_add(B::load(at.add(V::LANES)), sums[1]);
                        }
                    }
                }
                for t in (k - k % step..k).step_by(V::LANES) {
                    let x: V = load(&row[t..]);
                    for (sums, column) in sums.iter_mut().zip(columns) {
                        sums[0] = x.mul_add(load(&column[t..]), sums[0]);
                    }
                }
                for (sums, to) in sums.into_iter().zip(&mut c[i * n + first..][..TOGETHER.min(n - first)]) {
                    let before = if mode == Store::Add { to.to_f32() } else { 0.0 };
                    *to = C::from_f32(before + sums[0].add(sums[1]).sum());
                }
            }
        }
    }
}

const PACKED_A: usize = MC * KC;
const PACKED_B: usize = NC * KC;

simd_fn! {
    fn blocked<V, A: Element, B: Element, C: Element>(
        a: Matrix<A>, b: Matrix<B>, mode: Store, c: &mut [C], packed: &mut [f32],
    ) {
        match const { tile_rows(V::LANES) } {
            12 => blocked_with::<V, A, B, C, 12, 32>(a, b, mode, c, packed),
            _ => blocked_with::<V, A, B, C, 6, 16>(a, b, mode, c, packed),
        }
    }
}

#[inline(always)]
fn blocked_with<V: Vector, A: Element, B: Element, C: Element, const MR: usize, const NR: usize>(
    a: Matrix<A>,
    b: Matrix<B>,
    mode: Store,
    c: &mut [C],
    packed: &mut [f32],
) {
    let (m, n, k) = (a.rows, b.cols, a.cols);
    assert!(MR == tile_rows(V::LANES) && NR == tile_cols(V::LANES));
    let (a_panels, b_panels) = packed.split_at_mut(PACKED_A);
    let kc = k.div_ceil(k.div_ceil(KC)); // blocks of equal size
    let a_columns = a.t();
    for j0 in (0..n).step_by(NC) {
        let j1 = n.min(j0 + NC);
        for k0 in (0..k).step_by(kc) {
            let terms = k0..k.min(k0 + kc);
            let len = terms.len();
            let mode = if k0 > 0 { Store::Add } else { mode };
            pack::<V, B, NR>(&b, terms.clone(), j0..j1, b_panels);
            for i0 in (0..m).step_by(MC) {
                let i1 = m.min(i0 + MC);
                pack::<V, A, MR>(&a_columns, terms.clone(), i0..i1, a_panels);
                for (jp, j) in (j0..j1).step_by(NR).enumerate() {
                    let b_panel = &b_panels[jp * len * NR..][..len * NR];
                    for (ip, i) in (i0..i1).step_by(MR).enumerate() {
                        let cols = NR.min(j1 - j);
                        for r in 0..MR.min(i1 - i) {
                            V::prefetch(c[(i + r) * n + j..].as_ptr().cast());
                        }
                        let a_panel = &a_panels[ip * len * MR..][..len * MR];
                        // SAFETY: the panels hold `len` terms of MR rows and of NR columns.
                        let tile = unsafe {
                            micro::<V, MR>(
                                len,
                                Rows { at: a_panel.as_ptr(), row: 1, term: MR },
                                b_panel.as_ptr(),
                                NR,
                            )
                        };
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

    #[test]
    fn several_blocks_in_every_direction() {
        at_every_level(|| {
            check::<f32, f32, f32>((MC + 7, 33, 2 * KC + 5), (false, true), Store::Add, 1, 1e-6);
            check::<bf16, bf16, bf16>((5, NC + 19, KC + 1), (true, false), Store::Add, 2, BF16_STEP);
        });
    }
}
