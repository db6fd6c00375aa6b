//! Causal softmax of a tile of scores, forward and backward, in place. Row `r` of the tile sees columns `0..=r + offset`;
//! what lies above that is never read, and set to 0.

use crate::Element;
use crate::element::{load, load_filled, store};
use crate::math::exp;
use crate::simd::{Vector, simd_fn};

/// The largest of `x * scale`, and the logarithm of the sum of `e^(x * scale - largest)`: apart, so that neither is lost in
/// the other. The logarithm is NaN if there is a NaN or +inf, or nothing but -inf.
#[inline(always)]
pub(crate) fn log_sum_exp<V: Vector, T: Element>(x: &[T], scale: f32) -> (f32, f64) {
    let scale_v = V::splat(scale);
    let mut max = V::splat(f32::NEG_INFINITY);
    for i in (0..x.len()).step_by(V::LANES) {
        max = max.max(load_filled::<V, T>(&x[i..], f32::NEG_INFINITY));
    }
    let max = max.max_lane() * scale;
    let shift = V::splat(-max);
    let mut sum = V::splat(0.0);
    for i in (0..x.len()).step_by(V::LANES) {
        let v: V = load_filled(&x[i..], f32::NEG_INFINITY);
        sum = sum.add(exp(v.mul_add(scale_v, shift)));
    }
    (max, f64::from(sum.sum()).ln())
}

simd_fn! {
    /// `scores: [rows, cols]` becomes `softmax(scores * scale)` over what each row sees. `scale` is positive.
    pub fn causal_softmax<V, T: Element>(scores: &mut [T], cols: usize, scale: f32, offset: usize) {
        assert!(cols > 0 && scores.len().is_multiple_of(cols), "causal_softmax: {} numbers in rows of {cols}", scores.len());
        for (r, row) in scores.chunks_exact_mut(cols).enumerate() {
            let (seen, hidden) = row.split_at_mut((r + offset + 1).min(cols));
            let (max, log) = log_sum_exp::<V, T>(seen, scale);
            let (max, log) = (V::splat(-max), V::splat(log as f32));
            for i in (0..seen.len()).step_by(V::LANES) {
                let v: V = load(&seen[i..]);
                store(exp(v.mul_add(V::splat(scale), max).sub(log)), &mut seen[i..]);
            }
            hidden.fill(T::default());
        }
    }
}

simd_fn! {
    /// `dp: [rows, cols]`, the gradient of the probabilities `p`, becomes that of the scores:
    /// `p * (dp - sum(p * dp)) * scale`.
    pub fn causal_softmax_backward<V, P: Element, T: Element>(p: &[P], dp: &mut [T], cols: usize, scale: f32, offset: usize) {
        assert!(cols > 0 && dp.len().is_multiple_of(cols), "causal_softmax_backward: {} numbers in rows of {cols}", dp.len());
        assert_eq!(p.len(), dp.len(), "causal_softmax_backward: lengths differ");
        for (r, (p, dp)) in p.chunks_exact(cols).zip(dp.chunks_exact_mut(cols)).enumerate() {
            let (dp, hidden) = dp.split_at_mut((r + offset + 1).min(cols));
            let p = &p[..dp.len()];
            let mut dots = V::splat(0.0);
            for i in (0..dp.len()).step_by(V::LANES) {
                dots = load::<V, P>(&p[i..]).mul_add(load(&dp[i..]), dots);
            }
            let dot = V::splat(dots.sum());
            for i in (0..dp.len()).step_by(V::LANES) {
                let (p, g): (V, V) = (load(&p[i..]), load(&dp[i..]));
                store(p.mul(g.sub(dot)).mul(V::splat(scale)), &mut dp[i..]);
            }
            hidden.fill(T::default());
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

    fn check<T: Element>(rows: usize, cols: usize, offset: usize, seed: u64, relative: f32, absolute: f32) {
        let scores: Vec<T> = numbers::<f32>(seed, rows * cols).iter().map(|v| T::from_f32(v * 9.0)).collect();
        let (mut p, mut p_exact) = (scores.clone(), scores);
        causal_softmax(&mut p, cols, 0.7, offset);
        reference::causal_softmax(&mut p_exact, cols, 0.7, offset);
        assert_close(&p, &p_exact, relative, absolute);
        let (mut dp, mut dp_exact) =
            (numbers::<T>(seed ^ 1, rows * cols), numbers::<T>(seed ^ 1, rows * cols));
        causal_softmax_backward(&p, &mut dp, cols, 0.7, offset);
        reference::causal_softmax_backward(&p, &mut dp_exact, cols, 0.7, offset);
        assert_close(&dp, &dp_exact, relative, absolute);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn equals_its_oracle(rows in 1usize..40, cols in 1usize..70, offset in 0usize..20, seed: u64) {
            at_every_level(|| {
                check::<f32>(rows, cols, offset, seed, 3e-6, 1e-7);
                check::<bf16>(rows, cols, offset, seed, BF16_STEP, 1e-6);
            });
        }
    }

    #[test]
    fn huge_scores_neither_overflow_nor_vanish() {
        at_every_level(|| {
            let mut row = [1e30, 1e30, -1e30, f32::NEG_INFINITY, 7.0];
            causal_softmax(&mut row, 5, 1.0, 3);
            assert_close(&row, &[0.5, 0.5, 0.0, 0.0, 0.0], 1e-6, 0.0);
            let mut nan = [0.0, f32::NAN, 1.0];
            causal_softmax(&mut nan, 3, 1.0, 2);
            assert!(nan.iter().all(|v| v.is_nan()), "a NaN is not hidden: {nan:?}");
        });
    }
}
