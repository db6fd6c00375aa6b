//! What kernels are told besides slices: shapes, tables, constants of a step, and scratch memory. No arithmetic of theirs.

use crate::Element;

/// A target that contributes neither loss nor gradient, as in PyTorch and Hugging Face.
pub const IGNORED: i64 = -100;

/// Whether a kernel overwrites its output or adds to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Store {
    Set,
    Add,
}

/// Shape of an attention. Its fused buffer `qkv` is `[b, s, (h + 2 kv) * hd]`: in each token's row first all query heads,
/// then all key heads, then all value heads. Query head `i` reads key/value head `i / (h / kv)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heads {
    pub batch: usize,
    pub seq: usize,
    pub q_heads: usize,
    /// Divides `q_heads`.
    pub kv_heads: usize,
    /// Even.
    pub head_dim: usize,
}

impl Heads {
    /// Numbers in one token's row of the fused buffer.
    pub fn qkv_width(&self) -> usize {
        (self.q_heads + 2 * self.kv_heads) * self.head_dim
    }
    /// Numbers in one token's row of the attention's output.
    pub fn out_width(&self) -> usize {
        self.q_heads * self.head_dim
    }
    /// Numbers in the fused buffer.
    pub fn qkv_len(&self) -> usize {
        self.batch * self.seq * self.qkv_width()
    }
    /// Numbers in the attention's output `[b, s, h * hd]`.
    pub fn out_len(&self) -> usize {
        self.batch * self.seq * self.out_width()
    }
    /// Numbers in the saved log-sum-exp `[b, h, s]`.
    pub fn lse_len(&self) -> usize {
        self.batch * self.q_heads * self.seq
    }
}

/// Which keys a query sees besides being causal, and what is added to its scores.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sight<'a> {
    /// How many of the last tokens a token sees, itself included; all of them where there is no number.
    pub window: Option<usize>,
    /// For each query head, what is subtracted from scaled scores per token of distance (ALiBi); nothing where there is none.
    pub slopes: &'a [f32],
}

impl Sight<'_> {
    /// Sees all tokens before it.
    pub const ALL: Sight<'static> = Sight { window: None, slopes: &[] };

    /// The first key that the query at `position` sees.
    pub(crate) fn first(&self, position: usize) -> usize {
        self.window.map_or(0, |window| (position + 1).saturating_sub(window))
    }

    pub(crate) fn slope(&self, head: usize) -> f32 {
        self.slopes.get(head).copied().unwrap_or(0.0)
    }
}

/// What stands between the products of a feed-forward network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x / (1 + e^-x)`.
    Silu,
    /// `x / 2 (1 + erf(x / sqrt 2))`.
    Gelu,
    /// The same with a hyperbolic tangent in place of the error function, as GPT-2 has it.
    GeluTanh,
    Relu,
}

/// Cosines and sines of the rotary embedding, `[positions, hd / 2]`, rounded to f32 where Hugging Face rounds.
#[derive(Clone, Debug)]
pub struct RopeTable {
    pub(crate) cos: Vec<f32>,
    pub(crate) sin: Vec<f32>,
    pub(crate) half: usize,
}

impl RopeTable {
    /// For a head of `head_dim` numbers that is turned as a whole, with the frequencies of the first Llama.
    pub fn new(positions: usize, head_dim: usize, theta: f64) -> RopeTable {
        assert!(head_dim.is_multiple_of(2), "head size {head_dim} is odd");
        let exponent = |pair: usize| f64::from(2.0 * pair as f32 / head_dim as f32);
        let frequencies: Vec<f64> = (0..head_dim / 2).map(|pair| 1.0 / theta.powf(exponent(pair))).collect();
        RopeTable::from_frequencies(positions, &frequencies, 1.0)
    }

    /// Turns the first `2 * frequencies.len()` numbers of a head, each pair by its frequency times the position. `amplitude` multiplies
    /// sines and cosines.
    pub fn from_frequencies(positions: usize, frequencies: &[f64], amplitude: f64) -> RopeTable {
        let half = frequencies.len();
        let room = || Vec::with_capacity(positions * half);
        let mut table = RopeTable { cos: room(), sin: room(), half };
        (0..positions).for_each(|_| table.push(frequencies, amplitude));
        table
    }

    /// Adds the next position, with frequencies of its own.
    pub fn push(&mut self, frequencies: &[f64], amplitude: f64) {
        let position = self.positions() as f32;
        let angles = frequencies.iter().map(|f| f64::from(position * *f as f32));
        for (cos, sin) in angles.map(|angle| (angle.cos() * amplitude, angle.sin() * amplitude)) {
            self.cos.push(cos as f32);
            self.sin.push(sin as f32);
        }
    }

    /// Number of positions in the table.
    pub fn positions(&self) -> usize {
        self.cos.len() / self.half.max(1)
    }

    pub(crate) fn row(&self, position: usize) -> (&[f32], &[f32]) {
        let range = position * self.half..(position + 1) * self.half;
        (&self.cos[range.clone()], &self.sin[range])
    }
}

/// One optimizer step of AdamW as PyTorch defines it: decoupled weight decay, bias correction by `step`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWStep {
    pub lr: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    /// 0 for a range that does not decay.
    pub weight_decay: f64,
    /// Counts from 1.
    pub step: u64,
    /// Every gradient is multiplied by this first (clipping, and the mean over what was summed).
    pub grad_scale: f32,
}

/// A matrix in memory, with any strides: `element(r, c) = data[r * row_stride + c * col_stride]`.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a, T> {
    pub data: &'a [T],
    pub rows: usize,
    pub cols: usize,
    pub row_stride: usize,
    pub col_stride: usize,
}

impl<'a, T: Element> Matrix<'a, T> {
    /// A dense row-major matrix.
    pub fn new(data: &'a [T], rows: usize, cols: usize) -> Self {
        assert_eq!(data.len(), rows * cols, "a {rows} x {cols} matrix has {} numbers", data.len());
        Matrix { data, rows, cols, row_stride: cols, col_stride: 1 }
    }
    /// The transpose of the same memory.
    pub fn t(self) -> Self {
        Matrix {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            ..self
        }
    }
    pub(crate) fn check(&self) {
        if self.rows > 0 && self.cols > 0 {
            let last = (self.rows - 1) * self.row_stride + (self.cols - 1) * self.col_stride;
            assert!(last < self.data.len(), "matrix {} x {} ends outside its memory", self.rows, self.cols);
        }
    }
}

/// Memory that a kernel needs while it runs, kept by the caller between calls. It grows to the largest need and stays.
#[derive(Debug, Default)]
pub struct Scratch {
    buffer: Vec<f32>,
}

/// Scratch starts on a cache line.
const ALIGN: usize = 64 / size_of::<f32>();

impl Scratch {
    pub fn new() -> Scratch {
        Scratch::default()
    }
    /// `len` numbers of unspecified value, aligned to 64 bytes.
    pub(crate) fn take(&mut self, len: usize) -> &mut [f32] {
        if self.buffer.len() < len + ALIGN {
            self.buffer = vec![0.0; len + ALIGN];
        }
        let skip = self.buffer.as_ptr().align_offset(64).min(ALIGN);
        &mut self.buffer[skip..skip + len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scratch_is_aligned_and_grows() {
        let mut scratch = Scratch::new();
        for len in [1, 100, 10, 5000] {
            let part = scratch.take(len);
            assert_eq!((part.len(), part.as_ptr() as usize % 64), (len, 0));
        }
    }
}
