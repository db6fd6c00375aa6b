//! Copies a block of a matrix into panels that the tile reads in order, widened to f32 and padded with zeros.

use crate::simd::Vector;
use crate::{Element, Matrix};
use std::ops::Range;

/// Panels of `width` columns: number (term k, column j) of panel p goes to `to[p * k * width + k * width + j]`. `lines` are
/// the columns (of B, or rows of A given transposed), `terms` the range of k.
#[inline(always)]
pub fn pack<V: Vector, T: Element>(
    from: &Matrix<T>,
    terms: Range<usize>,
    lines: Range<usize>,
    width: usize,
    to: &mut [f32],
) {
    let k = terms.len();
    for (p, panel) in to.chunks_exact_mut(k * width).take(lines.len().div_ceil(width)).enumerate() {
        let first = lines.start + p * width;
        let count = width.min(lines.end - first);
        if count < width {
            panel.fill(0.0);
        }
        let start = terms.start * from.row_stride + first * from.col_stride;
        if from.col_stride == 1 {
            for (t, out) in panel.chunks_exact_mut(width).enumerate() {
                let source = &from.data[start + t * from.row_stride..][..count];
                for (out, value) in out.iter_mut().zip(source) {
                    *out = value.to_f32();
                }
            }
        } else {
            interleave(from, start, count, k, width, panel);
        }
    }
}

/// The transposing case: lines are far apart, terms near each other. Eight terms of all lines at a time, so that what is
/// written stays in the first cache.
#[inline(always)]
fn interleave<T: Element>(
    from: &Matrix<T>,
    start: usize,
    count: usize,
    k: usize,
    width: usize,
    panel: &mut [f32],
) {
    const TERMS: usize = 16;
    if from.row_stride != 1 {
        for j in 0..count {
            for t in 0..k {
                panel[t * width + j] = from.data[start + t * from.row_stride + j * from.col_stride].to_f32();
            }
        }
        return;
    }
    for (n, block) in panel.chunks_mut(TERMS * width).enumerate() {
        let terms = block.len() / width;
        for j in 0..count {
            let line = &from.data[start + n * TERMS + j * from.col_stride..][..terms];
            for (out, value) in block.iter_mut().skip(j).step_by(width).zip(line) {
                *out = value.to_f32();
            }
        }
    }
}
