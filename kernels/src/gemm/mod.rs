//! Matrix products of any strides and formats, accumulated in f32. Blocks of both operands are copied (widened to f32) into
//! panels that fit the caches, and a tile in registers runs over them; see BLIS for the scheme.

pub(crate) mod micro;
mod pack;

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

simd_fn! {
    /// A few rows times a transposed matrix, as when generating token by token: reads `b` once, in place.
    fn narrow<V, A: Element, B: Element, C: Element>(a: Matrix<A>, b: Matrix<B>, mode: Store, c: &mut [C]) {
        let (n, k) = (b.cols, b.rows);
        for j in 0..n {
            let column = &b.data[j * b.col_stride..][..k];
            for i in 0..a.rows {
                let row = &a.data[i * a.row_stride..][..k];
                let mut sums = (V::splat(0.0), V::splat(0.0));
                for t in (0..k).step_by(2 * V::LANES) {
                    let middle = k.min(t + V::LANES);
                    sums.0 = load::<V, A>(&row[t..]).mul_add(load(&column[t..]), sums.0);
                    sums.1 = load::<V, A>(&row[middle..]).mul_add(load(&column[middle..]), sums.1);
                }
                let before = if mode == Store::Add { c[i * n + j].to_f32() } else { 0.0 };
                c[i * n + j] = C::from_f32(before + sums.0.add(sums.1).sum());
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
            12 => blocked_with::<V, A, B, C, 12>(a, b, mode, c, packed),
            _ => blocked_with::<V, A, B, C, 6>(a, b, mode, c, packed),
        }
    }
}

#[inline(always)]
fn blocked_with<V: Vector, A: Element, B: Element, C: Element, const MR: usize>(
    a: Matrix<A>,
    b: Matrix<B>,
    mode: Store,
    c: &mut [C],
    packed: &mut [f32],
) {
    let (m, n, k) = (a.rows, b.cols, a.cols);
    let nr = tile_cols(V::LANES);
    let (a_panels, b_panels) = packed.split_at_mut(PACKED_A);
    let kc = k.div_ceil(k.div_ceil(KC)); // blocks of equal size
    let a_columns = a.t();
    for j0 in (0..n).step_by(NC) {
        let j1 = n.min(j0 + NC);
        for k0 in (0..k).step_by(kc) {
            let terms = k0..k.min(k0 + kc);
            let len = terms.len();
            let mode = if k0 > 0 { Store::Add } else { mode };
            pack::<V, B>(&b, terms.clone(), j0..j1, nr, b_panels);
            for i0 in (0..m).step_by(MC) {
                let i1 = m.min(i0 + MC);
                pack::<V, A>(&a_columns, terms.clone(), i0..i1, MR, a_panels);
                for (jp, j) in (j0..j1).step_by(nr).enumerate() {
                    let b_panel = &b_panels[jp * len * nr..][..len * nr];
                    for (ip, i) in (i0..i1).step_by(MR).enumerate() {
                        let a_panel = &a_panels[ip * len * MR..][..len * MR];
                        // SAFETY: the panels hold `len` terms of MR rows and of nr columns.
                        let tile = unsafe {
                            micro::<V, MR>(
                                len,
                                Rows { at: a_panel.as_ptr(), row: 1, term: MR },
                                b_panel.as_ptr(),
                                nr,
                            )
                        };
                        let cols = nr.min(j1 - j);
                        for (r, row) in tile.into_iter().enumerate().take(i1 - i) {
                            write::<V, C>(row, mode, &mut c[(i + r) * n + j..][..cols]);
                        }
                    }
                }
            }
        }
    }
}

/// One row of a tile to its place, of which there may be less than two vectors.
#[inline(always)]
fn write<V: Vector, C: Element>(row: [V; 2], mode: Store, to: &mut [C]) {
    let (first, second) = to.split_at_mut(V::LANES.min(to.len()));
    for (value, to) in row.into_iter().zip([first, second]) {
        let before = if mode == Store::Add { load(to) } else { V::splat(0.0) };
        store_vector(value.add(before), to);
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
