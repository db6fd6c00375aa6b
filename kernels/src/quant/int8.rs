//! Rows of signed bytes, as bitsandbytes' `int8_vectorwise_quant` makes them (LLM.int8(), arXiv:2208.07339).

use crate::Element;
use crate::simd::simd_fn;

/// Codes of a row-major matrix; a code stands for `code * scales[row] / 127`.
#[derive(Clone, Copy, Debug)]
pub struct Int8<'a> {
    pub codes: &'a [i8],
    /// The largest amount of each row.
    pub scales: &'a [f32],
}

/// By which bitsandbytes multiplies instead of dividing by 127.
pub const INT8_STEP: f32 = 7.874_016e-3;

impl Int8<'_> {
    pub(super) fn check(&self, rows: usize, cols: usize) {
        assert_eq!(self.codes.len(), rows * cols, "codes of {rows} x {cols} numbers");
        assert_eq!(self.scales.len(), rows, "scales of {rows} rows");
    }

    pub(super) fn number(&self, at: usize, cols: usize) -> f32 {
        f32::from(self.codes[at]) * self.scales[at / cols] * INT8_STEP
    }

    #[inline(always)]
    pub(super) fn decode(&self, at: usize, cols: usize, to: &mut [f32]) {
        let (mut at, mut to) = (at, to);
        while !to.is_empty() {
            let left = cols - at % cols;
            let (piece, rest) = to.split_at_mut(left.min(to.len()));
            let scale = self.scales[at / cols];
            for (to, code) in piece.iter_mut().zip(&self.codes[at..]) {
                *to = f32::from(*code) * scale * INT8_STEP;
            }
            at += left;
            to = rest;
        }
    }
}

/// Codes of `x: [rows, cols]`, and the largest amount of each row, bit for bit as bitsandbytes 0.50 has them on the CPU: ties go to the even
/// code, a row whose scale has no inverse gets zeros. All of `x` are finite. `Linear8bitLt` rounds weights to fp16 first.
pub fn quantise_int8<T: Element>(x: &[T], cols: usize, codes: &mut [i8], scales: &mut [f32]) {
    assert_eq!(codes.len(), x.len(), "quantise: codes");
    assert_eq!(x.len(), scales.len() * cols, "quantise: scales");
    let mut row = vec![0.0f32; cols];
    for ((x, codes), scale) in x.chunks(cols.max(1)).zip(codes.chunks_mut(cols.max(1))).zip(scales) {
        crate::convert(x, &mut row);
        *scale = row.iter().fold(0.0, |largest, v| v.abs().max(largest));
        let factor = 1.0 / *scale * 127.0;
        match factor.is_finite() {
            true => round(&row, factor, codes),
            false => codes.fill(0),
        }
    }
}

simd_fn! {
    fn round<V>(x: &[f32], factor: f32, to: &mut [i8]) {
        for (x, to) in x.iter().zip(to) {
            *to = (x * factor).round_ties_even() as i8;
        }
    }
}
