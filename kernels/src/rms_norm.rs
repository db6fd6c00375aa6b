//! RMSNorm: `y = x * rstd * w` with `rstd = 1 / sqrt(mean(x^2) + eps)` for each row. Statistics and sums are f32.

use crate::element::{load, store};
use crate::simd::{Vector, simd_fn};
use crate::{Element, Store};

fn check(name: &str, w: &[f32], rstd: &[f32], lengths: &[usize]) {
    let len = w.len() * rstd.len();
    assert!(
        !w.is_empty() && lengths.iter().all(|l| *l == len),
        "{name}: {} rows of {}, slices of {lengths:?}",
        rstd.len(),
        w.len()
    );
}

/// Normalises one row and returns its `rstd`.
#[inline(always)]
fn norm_row<V: Vector, Y: Element>(x: &[f32], w: &[f32], eps: f32, y: &mut [Y]) -> f32 {
    let mut squares = V::splat(0.0);
    for i in (0..x.len()).step_by(V::LANES) {
        let v: V = load(&x[i..]);
        squares = v.mul_add(v, squares);
    }
    let rstd = 1.0 / (squares.sum() / x.len() as f32 + eps).sqrt();
    for i in (0..x.len()).step_by(V::LANES) {
        let v: V = load(&x[i..]);
        store(v.mul(V::splat(rstd)).mul(load(&w[i..])), &mut y[i..]);
    }
    rstd
}

simd_fn! {
    /// `x, y: [rows, d]`, `w: [d]`, `rstd: [rows]` is saved for the backward pass.
    pub fn rms_norm<V, Y: Element>(x: &[f32], w: &[f32], eps: f32, y: &mut [Y], rstd: &mut [f32]) {
        check("rms_norm", w, rstd, &[x.len(), y.len()]);
        let d = w.len();
        for ((x, y), rstd) in x.chunks_exact(d).zip(y.chunks_exact_mut(d)).zip(rstd) {
            *rstd = norm_row::<V, Y>(x, w, eps, y);
        }
    }
}

simd_fn! {
    /// `dx` (set or added to) from `dy`, and `dw += sum over rows`. `x`, `rstd`: what the forward pass read and saved.
    pub fn rms_norm_backward<V, G: Element>(
        dy: &[G], x: &[f32], w: &[f32], rstd: &[f32], dx: &mut [f32], mode: Store, dw: &mut [f32],
    ) {
        check("rms_norm_backward", w, rstd, &[dy.len(), x.len(), dx.len()]);
        assert_eq!(w.len(), dw.len(), "rms_norm_backward: dw");
        let d = w.len();
        let rows = dy.chunks_exact(d).zip(x.chunks_exact(d)).zip(dx.chunks_exact_mut(d)).zip(rstd);
        for (((dy, x), dx), rstd) in rows {
            let mut dots = V::splat(0.0);
            for i in (0..d).step_by(V::LANES) {
                let gw = load::<V, G>(&dy[i..]).mul(load(&w[i..]));
                dots = gw.mul_add(load(&x[i..]), dots);
            }
            let dot = dots.sum();
            let (scale, pull) = (V::splat(*rstd), V::splat(-dot * rstd * rstd * rstd / d as f32));
            for i in (0..d).step_by(V::LANES) {
                let (g, v): (V, V) = (load(&dy[i..]), load(&x[i..]));
                let gs = g.mul(scale);
                let grad = v.mul_add(pull, gs.mul(load(&w[i..])));
                let before = if mode == Store::Add { load(&dx[i..]) } else { V::splat(0.0) };
                store(grad.add(before), &mut dx[i..]);
                store(gs.mul_add(v, load(&dw[i..])), &mut dw[i..]);
            }
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

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn equals_its_oracle(rows in 0usize..6, d in 1usize..150, seed: u64) {
            at_every_level(|| {
                let x = numbers::<f32>(seed, rows * d);
                let w = numbers::<f32>(seed ^ 2, d);
                let (mut y, mut rstd) = (vec![0.0f32; rows * d], vec![0.0; rows]);
                let (mut y_exact, mut rstd_exact) = (y.clone(), rstd.clone());
                rms_norm(&x, &w, 1e-5, &mut y, &mut rstd);
                reference::rms_norm(&x, &w, 1e-5, &mut y_exact, &mut rstd_exact);
                assert_close(&rstd, &rstd_exact, 1e-6, 0.0);
                assert_close(&y, &y_exact, 1e-6, 0.0);

                let (mut y, mut y_exact) = (vec![bf16::ZERO; rows * d], vec![bf16::ZERO; rows * d]);
                rms_norm(&x, &w, 1e-5, &mut y, &mut rstd);
                reference::rms_norm(&x, &w, 1e-5, &mut y_exact, &mut rstd_exact);
                assert_close(&y, &y_exact, BF16_STEP, 0.0);

                for mode in [Store::Set, Store::Add] {
                    let dy = numbers::<f32>(seed ^ 3, rows * d);
                    let (mut dx, mut dw) = (x.clone(), w.clone());
                    let (mut dx_exact, mut dw_exact) = (x.clone(), w.clone());
                    rms_norm_backward(&dy, &x, &w, &rstd, &mut dx, mode, &mut dw);
                    reference::rms_norm_backward(&dy, &x, &w, &rstd, &mut dx_exact, mode, &mut dw_exact);
                    let size = rstd.iter().copied().fold(1.0, f32::max);
                    assert_close(&dx, &dx_exact, 1e-5, 2e-6 * size);
                    assert_close(&dw, &dw_exact, 1e-5, 2e-6 * size);
                }
            });
        }
    }

    #[test]
    fn backward_is_the_slope_of_forward() {
        let (d, w) = (24, numbers::<f32>(1, 24));
        let (x, dy) = (numbers::<f32>(2, d), numbers::<f32>(3, d));
        let loss = |x: &[f32]| {
            let (mut y, mut rstd) = (vec![0.0f32; d], [0.0]);
            rms_norm(x, &w, 1e-5, &mut y, &mut rstd);
            (y.iter().zip(&dy).map(|(y, g)| f64::from(y * g)).sum::<f64>(), rstd)
        };
        let (mut dx, mut dw) = (vec![0.0; d], vec![0.0; d]);
        rms_norm_backward(&dy, &x, &w, &loss(&x).1, &mut dx, Store::Set, &mut dw);
        for i in 0..d {
            let at = |by: f32| {
                let mut x = x.clone();
                x[i] += by;
                loss(&x).0
            };
            let slope = (at(1e-2) - at(-1e-2)) / 2e-2;
            assert!((f64::from(dx[i]) - slope).abs() < 2e-3, "dx[{i}] is {}, the slope {slope}", dx[i]);
        }
    }
}
