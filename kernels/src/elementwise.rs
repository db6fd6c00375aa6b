//! Kernels over flat buffers, one number at a time, and reductions of them. The loops are plain: the compiler vectorises
//! them for each level, and every reduction has a fixed number of lanes, so its bits are the same at every level.

use crate::Element;
use crate::simd::simd_fn;

/// Lanes of the reductions.
const LANES: usize = 16;

simd_fn! {
    /// `x += y`.
    pub fn add<V, X: Element, T: Element>(x: &mut [X], y: &[T]) {
        assert_eq!(x.len(), y.len(), "add: lengths differ");
        for (x, y) in x.iter_mut().zip(y) {
            *x = X::from_f32(x.to_f32() + y.to_f32());
        }
    }
}

simd_fn! {
    /// `x: [rows, d] += b: [d]` in every row.
    pub fn add_rows<V, T: Element>(x: &mut [T], b: &[f32]) {
        assert!(!b.is_empty() && x.len().is_multiple_of(b.len()), "add_rows: {} numbers, rows of {}", x.len(), b.len());
        for row in x.chunks_exact_mut(b.len()) {
            for (x, b) in row.iter_mut().zip(b) {
                *x = T::from_f32(x.to_f32() + b);
            }
        }
    }
}

simd_fn! {
    /// `y: [rows, d]` becomes `x`, each of its columns times one of `factors: [d]`.
    pub fn scale_columns<V, X: Element, Y: Element>(x: &[X], factors: &[f32], y: &mut [Y]) {
        fit_columns(x.len(), factors.len(), y.len());
        for (x, y) in x.chunks_exact(factors.len()).zip(y.chunks_exact_mut(factors.len())) {
            for ((x, factor), y) in x.iter().zip(factors).zip(y) {
                *y = Y::from_f32(factor * x.to_f32());
            }
        }
    }
}

simd_fn! {
    /// `y: [rows, d]` gets `x`, each of its columns times one of `factors: [d]`, added.
    pub fn add_scaled_columns<V, X: Element, Y: Element>(x: &[X], factors: &[f32], y: &mut [Y]) {
        fit_columns(x.len(), factors.len(), y.len());
        for (x, y) in x.chunks_exact(factors.len()).zip(y.chunks_exact_mut(factors.len())) {
            for ((x, factor), y) in x.iter().zip(factors).zip(y) {
                *y = Y::from_f32(y.to_f32() + factor * x.to_f32());
            }
        }
    }
}

simd_fn! {
    /// `sums: [d]` gets, of each column of `x` and `y: [rows, d]`, the sum of the products added.
    pub fn sum_products<V, X: Element, Y: Element>(x: &[X], y: &[Y], sums: &mut [f32]) {
        fit_columns(x.len(), sums.len(), y.len());
        for (x, y) in x.chunks_exact(sums.len()).zip(y.chunks_exact(sums.len())) {
            for ((x, y), sum) in x.iter().zip(y).zip(sums.iter_mut()) {
                *sum += x.to_f32() * y.to_f32();
            }
        }
    }
}

fn fit_columns(x: usize, columns: usize, y: usize) {
    assert!(columns > 0 && x.is_multiple_of(columns) && x == y, "{x} and {y} numbers, rows of {columns}");
}

simd_fn! {
    /// `sums: [d]` gets the sum over the rows of `x: [rows, d]` added.
    pub fn sum_rows<V, T: Element>(x: &[T], sums: &mut [f32]) {
        assert!(!sums.is_empty() && x.len().is_multiple_of(sums.len()), "sum_rows: {} numbers, rows of {}", x.len(), sums.len());
        for row in x.chunks_exact(sums.len()) {
            for (x, sum) in row.iter().zip(sums.iter_mut()) {
                *sum += x.to_f32();
            }
        }
    }
}

simd_fn! {
    /// `y = x` in the format of `y`.
    pub fn convert<V, I: Element, O: Element>(x: &[I], y: &mut [O]) {
        assert_eq!(x.len(), y.len(), "convert: lengths differ");
        for (x, y) in x.iter().zip(y) {
            *y = O::from_f32(x.to_f32());
        }
    }
}

simd_fn! {
    /// Sum of squares in f64. The same bits on every machine; for a sum that does not depend on how a buffer is divided,
    /// add the sums of fixed parts of it in a fixed order.
    pub fn sum_squares<V, T: Element>(x: &[T]) -> f64 {
        let mut lanes = [0.0f64; LANES];
        let chunks = x.chunks_exact(LANES);
        let rest = chunks.remainder();
        for chunk in chunks {
            for (lane, value) in lanes.iter_mut().zip(chunk) {
                let value = f64::from(value.to_f32());
                *lane += value * value;
            }
        }
        for (lane, value) in lanes.iter_mut().zip(rest) {
            *lane += f64::from(value.to_f32()).powi(2);
        }
        lanes.iter().sum()
    }
}

simd_fn! {
    /// Largest magnitude; NaN if there is any NaN; 0 for nothing.
    fn max_abs<V, T: Element>(x: &[T]) -> f32 {
        // Magnitudes of floats are ordered as their bits are, infinity after all numbers and NaN after infinity.
        let mut lanes = [0u32; LANES];
        let chunks = x.chunks_exact(LANES);
        let rest = chunks.remainder();
        for chunk in chunks {
            for (lane, value) in lanes.iter_mut().zip(chunk) {
                *lane = (*lane).max(value.to_f32().to_bits() & 0x7fff_ffff);
            }
        }
        for (lane, value) in lanes.iter_mut().zip(rest) {
            *lane = (*lane).max(value.to_f32().to_bits() & 0x7fff_ffff);
        }
        f32::from_bits(lanes.into_iter().fold(0, u32::max))
    }
}

/// Whether there is neither NaN nor infinity.
pub fn all_finite<T: Element>(x: &[T]) -> bool {
    max_abs(x).is_finite()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::at_every_level;
    use crate::testing::*;
    use crate::{bf16, reference};
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn equal_their_oracles(len in 0usize..300, seed: u64) {
            at_every_level(|| {
                let (x, y, z) = (numbers::<f32>(seed, len), numbers::<f32>(seed ^ 1, len), numbers::<bf16>(seed ^ 2, len));
                let (mut fast, mut exact) = (x.clone(), x.clone());
                add(&mut fast, &y);
                add(&mut fast, &z);
                reference::add(&mut exact, &y);
                reference::add(&mut exact, &z);
                assert_eq!(fast, exact);
                let (mut fast, mut exact) = (vec![bf16::ZERO; len], vec![bf16::ZERO; len]);
                convert(&x, &mut fast);
                reference::convert(&x, &mut exact);
                assert_eq!(fast, exact);
                let (mut fast, mut exact) = (vec![0.0f32; len], vec![0.0f32; len]);
                convert(&z, &mut fast);
                reference::convert(&z, &mut exact);
                assert_eq!(fast, exact);
                let (sum, exact) = (sum_squares(&x), reference::sum_squares(&x));
                assert!((sum - exact).abs() <= 1e-13 * exact, "{sum} is not {exact}");
                assert_eq!((max_abs(&x), max_abs(&z)), (reference::max_abs(&x), reference::max_abs(&z)));
            });
        }
    }

    #[test]
    fn rows_are_added_to_and_summed() {
        at_every_level(|| {
            let (b, x) = (numbers::<f32>(1, 13), numbers::<f32>(2, 39));
            let (mut fast, mut exact) = (x.clone(), x.clone());
            add_rows(&mut fast, &b);
            reference::add_rows(&mut exact, &b);
            assert_eq!(fast, exact);
            let (mut fast, mut exact) = (b.clone(), b.clone());
            sum_rows(&x, &mut fast);
            reference::sum_rows(&x, &mut exact);
            assert_close(&fast, &exact, 1e-6, 1e-6);
        });
    }

    #[test]
    fn columns_are_scaled_and_their_products_summed() {
        at_every_level(|| {
            let (factors, x, y) = (numbers::<f32>(1, 13), numbers::<bf16>(2, 39), numbers::<f32>(3, 39));
            let (mut fast, mut exact) = (y.clone(), y.clone());
            scale_columns(&x, &factors, &mut fast);
            reference::scale_columns(&x, &factors, &mut exact);
            assert_eq!(fast, exact);
            add_scaled_columns(&y, &factors, &mut fast);
            reference::add_scaled_columns(&y, &factors, &mut exact);
            assert_close(&fast, &exact, 1e-6, 1e-6);
            let (mut fast, mut exact) = (factors.clone(), factors);
            sum_products(&x, &y, &mut fast);
            reference::sum_products(&x, &y, &mut exact);
            assert_close(&fast, &exact, 1e-6, 1e-6);
        });
    }

    #[test]
    fn the_sum_of_squares_is_the_same_at_every_level() {
        let x = numbers::<f32>(5, 10_007);
        let best = sum_squares(&x);
        at_every_level(|| assert_eq!(sum_squares(&x).to_bits(), best.to_bits()));
    }

    #[test]
    fn one_bad_number_is_found_wherever_it_is() {
        at_every_level(|| {
            for at in 0..70 {
                let mut x = numbers::<f32>(at as u64, 70);
                assert!(all_finite(&x));
                x[at] = f32::NEG_INFINITY;
                assert!(!all_finite(&x) && max_abs(&x) == f32::INFINITY);
                x[at] = -f32::NAN;
                assert!(!all_finite(&x) && max_abs(&x).is_nan());
            }
        });
    }
}
