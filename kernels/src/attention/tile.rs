//! The padded f32 matrices that both passes work on, how they are filled, and products of them. Every row count is a
//! multiple of the register tile's rows and every column count of its columns, so that no product has an edge.

use crate::Element;
use crate::element::{load, store as store_vector};
use crate::gemm::micro::{Rows, micro};
use crate::gemm::pack::pack;
use crate::simd::Vector;
use crate::{Heads, Matrix, Store};

/// Padding of columns and keys that fits every level: tiles have 16 or 32 columns, and 6 or 12 rows.
pub const PAD_COLS: usize = 32;

/// Sizes of one head's matrices.
#[derive(Clone, Copy)]
pub struct Sizes {
    pub seq: usize,
    pub head_dim: usize,
    /// Row length of matrices of `head_dim` columns.
    pub hd: usize,
    /// Row length of matrices with a column for each key, and row count of those with a row for each key.
    pub keys: usize,
}

impl Sizes {
    pub fn new(shape: &Heads) -> Sizes {
        let keys = shape.seq.next_multiple_of(PAD_COLS) + PAD_COLS;
        Sizes {
            seq: shape.seq,
            head_dim: shape.head_dim,
            hd: shape.head_dim.next_multiple_of(PAD_COLS),
            keys,
        }
    }
}

/// Where a head lies in a buffer of tokens: its first number, and the distance between tokens.
#[derive(Clone, Copy)]
pub struct Place {
    pub start: usize,
    pub stride: usize,
}

impl Place {
    /// Head `column` (counted over q, k and v heads) of sequence `b` in the fused buffer.
    pub fn fused(shape: &Heads, b: usize, column: usize) -> Place {
        Place {
            start: b * shape.seq * shape.qkv_width() + column * shape.head_dim,
            stride: shape.qkv_width(),
        }
    }
    /// Head `head` of sequence `b` in the output.
    pub fn out(shape: &Heads, b: usize, head: usize) -> Place {
        Place { start: b * shape.seq * shape.out_width() + head * shape.head_dim, stride: shape.out_width() }
    }
    pub fn range(&self, token: usize, len: usize) -> std::ops::Range<usize> {
        let at = self.start + token * self.stride;
        at..at + len
    }
}

/// Rows `first..` of a head as a matrix `[rows, hd]`, as many as there are; the rest is 0.
#[inline(always)]
pub fn rows<V: Vector, T: Element>(from: &[T], place: Place, sizes: &Sizes, first: usize, to: &mut [f32]) {
    for (n, row) in to.chunks_exact_mut(sizes.hd).enumerate() {
        let (values, rest) = row.split_at_mut(sizes.head_dim);
        rest.fill(0.0);
        if first + n >= sizes.seq {
            values.fill(0.0);
            continue;
        }
        let source = &from[place.range(first + n, sizes.head_dim)];
        for i in (0..sizes.head_dim).step_by(V::LANES) {
            store_vector(load::<V, T>(&source[i..]), &mut values[i..]);
        }
    }
}

/// Panels of the transpose of a head's rows: `NR` keys side by side for each number of the head, panel after panel. What stands there for
/// keys past the end is not said: no query that counts sees them.
#[inline(always)]
pub fn transposed<V: Vector, T: Element, const NR: usize>(
    from: &[T],
    place: Place,
    sizes: &Sizes,
    to: &mut [f32],
) {
    let data = &from[place.start..];
    let (rows, cols) = (sizes.head_dim, sizes.seq);
    let matrix = Matrix { data, rows, cols, row_stride: 1, col_stride: place.stride };
    pack::<V, T, NR>(&matrix, 0..rows, 0..cols, to);
}

/// A left operand: row `r`, term `k` is `data[start + r * row + k * term]`.
#[derive(Clone, Copy)]
pub struct Left<'a> {
    pub data: &'a [f32],
    pub start: usize,
    pub row: usize,
    pub term: usize,
}

/// A right operand: term `k`, column `j` is `data[start + k * term + j / width * panel + j % width]`, for tiles of `width`.
#[derive(Clone, Copy)]
pub struct Right<'a> {
    pub data: &'a [f32],
    pub start: usize,
    pub term: usize,
    pub panel: usize,
}

/// `MR` rows of `c` (row length `c_row`, first row at the start of `c`): columns `0..cols` set to, or increased by, `a * b`
/// over `k` terms. `cols` is a multiple of two vectors.
#[inline(always)]
pub fn product<V: Vector, const MR: usize>(
    k: usize,
    a: Left,
    b: Right,
    cols: usize,
    mode: Store,
    c: &mut [f32],
    c_row: usize,
) {
    let width = 2 * V::LANES;
    if k == 0 || cols == 0 {
        return;
    }
    let panels = cols / width;
    assert!(a.start + (MR - 1) * a.row + (k - 1) * a.term < a.data.len(), "product: left operand");
    assert!(
        b.start + (panels - 1) * b.panel + (k - 1) * b.term + width <= b.data.len(),
        "product: right operand"
    );
    assert!((MR - 1) * c_row + cols <= c.len(), "product: result");
    for p in 0..panels {
        // SAFETY: the assertions above bound the last number of each operand.
        let tile = unsafe {
            let rows = Rows { at: a.data.as_ptr().add(a.start), row: a.row, term: a.term };
            micro::<V, MR>(k, rows, b.data.as_ptr().add(b.start + p * b.panel), b.term)
        };
        for (r, row) in tile.into_iter().enumerate() {
            let to = &mut c[r * c_row + p * width..][..width];
            for (value, to) in row.into_iter().zip(to.chunks_exact_mut(V::LANES)) {
                let value = if mode == Store::Add { value.add(load(to)) } else { value };
                store_vector(value, to);
            }
        }
    }
}
