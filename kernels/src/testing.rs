//! What the tests of kernels share: numbers from a seed, and comparison.

use crate::Element;

/// Uniform in -1..1, the same for the same seed.
pub fn numbers<T: Element>(seed: u64, len: usize) -> Vec<T> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        T::from_f32((state >> 40) as f32 / (1u64 << 23) as f32 - 1.0)
    };
    std::iter::repeat_with(next).take(len).collect()
}

/// Asserts |a - b| <= absolute + relative * |b| for each pair.
#[track_caller]
pub fn assert_close<T: Element>(fast: &[T], exact: &[T], relative: f32, absolute: f32) {
    assert_eq!(fast.len(), exact.len());
    for (i, (a, b)) in fast.iter().zip(exact).enumerate() {
        let (a, b) = (a.to_f32(), b.to_f32());
        assert!((a - b).abs() <= absolute + relative * b.abs(), "number {i}: {a} is not {b}");
    }
}

/// Relative step of bf16: results that are rounded to it may differ by one such step.
pub const BF16_STEP: f32 = 1.0 / 128.0;
