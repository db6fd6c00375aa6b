//! Copies a block of a matrix into panels that the tile reads in order, widened to f32.

use crate::element::{load, store};
use crate::simd::{Eight, Vector};
use crate::{Element, Matrix};
use std::ops::Range;

/// Panels of `W` lines: the number of term k and line j of panel p goes to `to[p * k * W + k * W + j]`. `lines` are the columns (of B, or
/// rows of A given transposed), `terms` the range of k. What stands in a panel for lines past the end is not said: nobody looks at what
/// comes of it.
#[inline(always)]
pub fn pack<V: Vector, T: Element, const W: usize>(
    from: &Matrix<T>,
    terms: Range<usize>,
    lines: Range<usize>,
    to: &mut [f32],
) {
    let len = terms.len() * W;
    if from.col_stride == 1 {
        for (first, panels) in lines.clone().step_by(SIDE_BY_SIDE * W).zip(to.chunks_mut(SIDE_BY_SIDE * len))
        {
            let lines = first..lines.end.min(first + SIDE_BY_SIDE * W);
            copy::<V::Eight, T, W>(from, terms.clone(), lines, panels);
        }
        return;
    }
    for (first, panel) in lines.clone().step_by(W).zip(to.chunks_exact_mut(len)) {
        let lines = first..lines.end.min(first + W);
        match from.row_stride {
            1 => turn::<V::Eight, T, W>(from, terms.clone(), lines, panel),
            _ => pick::<T, W>(from, terms.clone(), lines, panel),
        }
    }
}

/// Writes what term `t` has for up to eight lines from line `group` of the panel on. Narrow panels take whole vectors, whose end the next
/// term overwrites.
#[inline(always)]
fn put<V: Eight, const W: usize>(values: V, t: usize, group: usize, panel: &mut [f32]) {
    let to = &mut panel[t * W + group..];
    store(values, if W < 8 { to } else { &mut to[..8.min(W - group)] });
}

/// Panels that are written at the same time where a term's numbers for all of them lie in one piece.
pub(crate) const SIDE_BY_SIDE: usize = 4;

/// Lines that lie side by side, of up to so many panels.
#[inline(always)]
fn copy<V: Eight, T: Element, const W: usize>(
    from: &Matrix<T>,
    terms: Range<usize>,
    lines: Range<usize>,
    panels: &mut [f32],
) {
    let (k, count) = (terms.len(), lines.len().div_ceil(W));
    for (t, term) in terms.enumerate() {
        let source = &from.data[term * from.row_stride + lines.start..];
        for (p, panel) in panels.chunks_exact_mut(k * W).take(count).enumerate() {
            // Reads beyond the lines where there is something: it goes where nobody looks.
            for group in (0..W).step_by(8) {
                put::<V, W>(load::<V, T>(source.get(p * W + group..).unwrap_or_default()), t, group, panel);
            }
        }
    }
}

/// Lines of which each lies in one piece. Those that are missing are the last one again.
#[inline(always)]
pub(crate) fn turn<V: Eight, T: Element, const W: usize>(
    from: &Matrix<T>,
    terms: Range<usize>,
    lines: Range<usize>,
    panel: &mut [f32],
) {
    let k = terms.len();
    let whole = k - k % 8;
    for group in (0..W).step_by(8) {
        let rows: [&[T]; 8] = std::array::from_fn(|j| {
            let line = (lines.start + group + j).min(lines.end - 1);
            &from.data[line * from.col_stride..][terms.clone()]
        });
        for t in (0..whole).step_by(8) {
            // A loop: closures are not always compiled for the level.
            let mut block = [V::splat(0.0); 8];
            for (values, row) in block.iter_mut().zip(&rows) {
                // SAFETY: each row has `k` numbers, at least eight from `t` on.
                *values = unsafe { T::load(row.as_ptr().add(t)) };
            }
            for (i, values) in V::transpose(block).into_iter().enumerate() {
                put::<V, W>(values, t + i, group, panel);
            }
        }
        let mut block = [V::splat(0.0); 8];
        for (values, row) in block.iter_mut().zip(&rows) {
            *values = load(&row[whole..]);
        }
        for (values, t) in V::transpose(block).into_iter().zip(whole..k) {
            put::<V, W>(values, t, group, panel);
        }
    }
}

/// Lines and terms of which neither lie side by side.
#[inline(always)]
fn pick<T: Element, const W: usize>(
    from: &Matrix<T>,
    terms: Range<usize>,
    lines: Range<usize>,
    panel: &mut [f32],
) {
    for (term, to) in terms.zip(panel.chunks_exact_mut(W)) {
        for (line, to) in lines.clone().zip(to) {
            *to = from.data[term * from.row_stride + line * from.col_stride].to_f32();
        }
    }
}
