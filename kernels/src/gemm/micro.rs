//! The heart of every product: a tile of `MR` rows by two vectors, held in registers while `k` terms are added to it.

use crate::simd::Vector;

/// Rows of the tile for each vector: as many accumulators as its registers hold beside two of B and one of A.
pub const fn tile_rows(lanes: usize) -> usize {
    match lanes {
        16 => 12,
        _ => 6,
    }
}

/// Columns of the tile.
pub const fn tile_cols(lanes: usize) -> usize {
    2 * lanes
}

/// A strided matrix operand of [`micro`]: where term `k` of row (or column vector) lies.
#[derive(Clone, Copy)]
pub struct Rows {
    pub at: *const f32,
    /// From one row to the next.
    pub row: usize,
    /// From one term to the next.
    pub term: usize,
}

/// `sum over k of a[r][k] * b[k][..]` for `MR` rows; `b` has two vectors for each term, `b_term` numbers apart.
///
/// # Safety
/// `MR` rows of `k` terms are readable through `a`, and `k` times two vectors through `b`.
#[inline(always)]
pub unsafe fn micro<V: Vector, const MR: usize>(
    k: usize,
    a: Rows,
    b: *const f32,
    b_term: usize,
) -> [[V; 2]; MR] {
    let mut tile = [[V::splat(0.0); 2]; MR];
    let (mut a_at, mut b_at) = (a.at, b);
    for _ in 0..k {
        // SAFETY: the caller's promise; wrapping, because the pointers move past the end after the last term.
        unsafe {
            let (b0, b1) = (V::load(b_at), V::load(b_at.add(V::LANES)));
            for (r, row) in tile.iter_mut().enumerate() {
                let value = V::splat(*a_at.add(r * a.row));
                row[0] = value.mul_add(b0, row[0]);
                row[1] = value.mul_add(b1, row[1]);
            }
        }
        a_at = a_at.wrapping_add(a.term);
        b_at = b_at.wrapping_add(b_term);
    }
    tile
}
