//! Functions of one vector that the CPU has no instruction for.

use crate::simd::Vector;

const LN2_HIGH: f32 = 0.693_359_4; // few enough bits that n * LN2_HIGH is exact
const LN2_LOW: f32 = -2.121_944_4e-4;
/// Below this, e^x is not a normal number.
const EXP_MIN: f32 = -87.336_54;
/// Above this, 2^n would overflow.
const EXP_MAX: f32 = 88.376_26;

/// e^x with a relative error below 2e-7; 0 below -87.34 (also for -inf), 2.4e38 above 88.37 (also for inf); NaN stays.
#[inline(always)]
pub fn exp<V: Vector>(x: V) -> V {
    let within = V::splat(EXP_MAX).min(V::splat(EXP_MIN).max(x));
    let n = within.mul(V::splat(std::f32::consts::LOG2_E)).round();
    let r = n.mul_add(V::splat(-LN2_LOW), n.mul_add(V::splat(-LN2_HIGH), within));
    // e^r = 1 + r + r^2 p(r) for |r| <= ln(2) / 2, coefficients of least relative error.
    let mut p = V::splat(1.987_569_1e-4);
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 5.0e-1] {
        p = p.mul_add(r, V::splat(c));
    }
    let e = p.mul_add(r.mul(r), r.add(V::splat(1.0)));
    x.zero_where_less(V::splat(EXP_MIN), e.mul(n.exp2_whole()))
}

/// 2^x for x <= 127 with a relative error below 3e-7; 0 below -126.5 (also for -inf); NaN stays. Half the work of [`exp`].
#[inline(always)]
pub fn exp2<V: Vector>(x: V) -> V {
    let within = V::splat(-127.0).max(x);
    let n = within.round();
    let r = within.sub(n);
    // 2^r for |r| <= 1/2, coefficients of least relative error.
    let mut p = V::splat(1.327_647_2e-3);
    for c in [9.675_541e-3, 5.550_713e-2, 2.402_212e-1, 6.931_469_4e-1, 1.0] {
        p = p.mul_add(r, V::splat(c));
    }
    p.mul(n.exp2_whole())
}

/// 1 / (1 + e^-x), relative error below 4e-7 where it is above 1e-37.
#[inline(always)]
pub fn sigmoid<V: Vector>(x: V) -> V {
    let one = V::splat(1.0);
    one.div(one.add(exp(V::splat(0.0).sub(x))))
}

/// The error function, absolute error below 2e-7 (Abramowitz and Stegun, 7.1.26).
#[inline(always)]
pub fn erf<V: Vector>(x: V) -> V {
    let (zero, one) = (V::splat(0.0), V::splat(1.0));
    let size = x.max(zero.sub(x));
    let t = one.div(size.mul_add(V::splat(0.327_591_1), one));
    let mut p = V::splat(1.061_405_4);
    for c in [-1.453_152, 1.421_413_7, -0.284_496_74, 0.254_829_6] {
        p = p.mul_add(t, V::splat(c));
    }
    let positive = one.sub(p.mul(t).mul(exp(zero.sub(size.mul(size)))));
    // With the sign of x: its positive half less its negative one.
    x.zero_where_less(zero, positive).sub(zero.sub(x).zero_where_less(V::splat(f32::MIN_POSITIVE), positive))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::element::{load, store};
    use crate::simd::{at_every_level, simd_fn};

    simd_fn! {
        fn exp_all<V>(x: &[f32], y: &mut [f32]) {
            for (x, y) in x.chunks(V::LANES).zip(y.chunks_mut(V::LANES)) {
                store(exp::<V>(load(x)), y);
            }
        }
    }
    simd_fn! {
        fn exp2_all<V>(x: &[f32], y: &mut [f32]) {
            for (x, y) in x.chunks(V::LANES).zip(y.chunks_mut(V::LANES)) {
                store(exp2::<V>(load(x)), y);
            }
        }
    }
    simd_fn! {
        fn sigmoid_all<V>(x: &[f32], y: &mut [f32]) {
            for (x, y) in x.chunks(V::LANES).zip(y.chunks_mut(V::LANES)) {
                store(sigmoid::<V>(load(x)), y);
            }
        }
    }

    #[test]
    fn exp_and_sigmoid_keep_their_error() {
        let x: Vec<f32> = (0..2_000_000).map(|i| -87.3 + i as f32 * (175.6 / 2_000_000.0)).collect();
        at_every_level(|| {
            let mut y = vec![0.0; x.len()];
            exp_all(&x, &mut y);
            let error = |y: f32, exact: f64| ((f64::from(y) - exact) / exact).abs();
            let worst = x.iter().zip(&y).map(|(x, y)| error(*y, f64::from(*x).exp())).fold(0.0, f64::max);
            assert!(worst < 2e-7, "exp is off by {worst:e}");
            sigmoid_all(&x, &mut y);
            let exact = |x: f32| 1.0 / (1.0 + (-f64::from(x)).exp());
            let worst = x.iter().zip(&y).map(|(x, y)| error(*y, exact(*x))).fold(0.0, f64::max);
            assert!(worst < 4e-7, "sigmoid is off by {worst:e}");
        });
    }

    #[test]
    fn exp2_keeps_its_error() {
        let x: Vec<f32> = (0..2_000_000).map(|i| -126.0 + i as f32 * (253.0 / 2_000_000.0)).collect();
        at_every_level(|| {
            let mut y = vec![0.0; x.len()];
            exp2_all(&x, &mut y);
            let error = |y: f32, exact: f64| ((f64::from(y) - exact) / exact).abs();
            let worst = x.iter().zip(&y).map(|(x, y)| error(*y, f64::from(*x).exp2())).fold(0.0, f64::max);
            assert!(worst < 3e-7, "exp2 is off by {worst:e}");
            let mut ends = [1.0; 4];
            exp2_all(&[f32::NEG_INFINITY, -127.0, -1e30, f32::NAN], &mut ends);
            assert!(ends[..3] == [0.0; 3] && ends[3].is_nan(), "{ends:?}");
        });
    }

    #[test]
    fn exp_at_the_ends() {
        at_every_level(|| {
            let mut y = [1.0; 5];
            exp_all(&[f32::NEG_INFINITY, -1e30, 0.0, f32::INFINITY, f32::NAN], &mut y);
            assert_eq!(y[..3], [0.0, 0.0, 1.0]);
            assert!(y[3] > 2e38 && y[4].is_nan());
        });
    }
}
