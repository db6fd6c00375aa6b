//! LayerNorm: `y = (x - mean) * rstd * w + b` with `rstd = 1 / sqrt(var + eps)` for each row. Statistics and sums are f32.

use crate::element::{load, store};
use crate::simd::{Vector, simd_fn};
use crate::{Element, Store};

/// Mean and `rstd` of a row, side by side.
pub type RowStats = [f32; 2];

fn check(name: &str, w: &[f32], stats: &[RowStats], lengths: &[usize]) {
    let len = w.len() * stats.len();
    assert!(
        !w.is_empty() && lengths.iter().all(|l| *l == len),
        "{name}: {} rows of {}, slices of {lengths:?}",
        stats.len(),
        w.len()
    );
}

#[inline(always)]
fn statistics<V: Vector>(x: &[f32], eps: f32) -> RowStats {
    let d = x.len() as f32;
    let mut sum = V::splat(0.0);
    for i in (0..x.len()).step_by(V::LANES) {
        sum = sum.add(load(&x[i..]));
    }
    let mean = sum.sum() / d;
    let mut squares = V::splat(0.0);
    let whole = x.len() / V::LANES * V::LANES;
    for i in (0..whole).step_by(V::LANES) {
        let v = load::<V, f32>(&x[i..]).sub(V::splat(mean));
        squares = v.mul_add(v, squares);
    }
    // Lanes past the end would count as far from the mean.
    let rest: f32 = x[whole..].iter().map(|v| (v - mean) * (v - mean)).sum();
    [mean, 1.0 / ((squares.sum() + rest) / d + eps).sqrt()]
}

simd_fn! {
    /// `x, y: [rows, d]`, `w, b: [d]`, `stats: [rows]` is saved for the backward pass.
    pub fn layer_norm<V, Y: Element>(x: &[f32], w: &[f32], b: &[f32], eps: f32, y: &mut [Y], stats: &mut [RowStats]) {
        check("layer_norm", w, stats, &[x.len(), y.len()]);
        assert_eq!(w.len(), b.len(), "layer_norm: b");
        let d = w.len();
        for ((x, y), stats) in x.chunks_exact(d).zip(y.chunks_exact_mut(d)).zip(stats) {
            *stats = statistics::<V>(x, eps);
            let (mean, rstd) = (V::splat(stats[0]), V::splat(stats[1]));
            for i in (0..d).step_by(V::LANES) {
                let normed = load::<V, f32>(&x[i..]).sub(mean).mul(rstd);
                store(normed.mul_add(load(&w[i..]), load(&b[i..])), &mut y[i..]);
            }
        }
    }
}

simd_fn! {
    /// `dx` (set or added to) from `dy`; `dw` and `db` get the sums over rows added. `x`, `stats`: what the forward pass read and saved.
    pub fn layer_norm_backward<V, G: Element>(
        dy: &[G], x: &[f32], w: &[f32], stats: &[RowStats], dx: &mut [f32], mode: Store, dw: &mut [f32], db: &mut [f32],
    ) {
        check("layer_norm_backward", w, stats, &[dy.len(), x.len(), dx.len()]);
        assert!(w.len() == dw.len() && w.len() == db.len(), "layer_norm_backward: dw or db");
        let d = w.len();
        let rows = dy.chunks_exact(d).zip(x.chunks_exact(d)).zip(dx.chunks_exact_mut(d)).zip(stats);
        for (((dy, x), dx), [mean, rstd]) in rows {
            let (mean, rstd) = (V::splat(*mean), V::splat(*rstd));
            let (mut sum, mut dots) = (V::splat(0.0), V::splat(0.0));
            for i in (0..d).step_by(V::LANES) {
                // Past the end the weight is 0, and with it what is summed.
                let gw = load::<V, G>(&dy[i..]).mul(load(&w[i..]));
                sum = sum.add(gw);
                dots = gw.mul_add(load::<V, f32>(&x[i..]).sub(mean).mul(rstd), dots);
            }
            let scale = 1.0 / d as f32;
            let (sum, dot) = (V::splat(sum.sum() * scale), V::splat(dots.sum() * scale));
            for i in (0..d).step_by(V::LANES) {
                let g: V = load(&dy[i..]);
                let normed = load::<V, f32>(&x[i..]).sub(mean).mul(rstd);
                let grad = g.mul(load(&w[i..])).sub(sum).sub(normed.mul(dot)).mul(rstd);
                let before = if mode == Store::Add { load(&dx[i..]) } else { V::splat(0.0) };
                store(grad.add(before), &mut dx[i..]);
                store(g.mul_add(normed, load(&dw[i..])), &mut dw[i..]);
                store(g.add(load(&db[i..])), &mut db[i..]);
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
        fn equals_its_oracle(rows in 0usize..6, d in 2usize..150, seed: u64) {
            at_every_level(|| {
                let x: Vec<f32> = numbers::<f32>(seed, rows * d).iter().map(|v| v + 3.0).collect();
                let (w, b) = (numbers::<f32>(seed ^ 2, d), numbers::<f32>(seed ^ 4, d));
                let (mut y, mut stats) = (vec![0.0f32; rows * d], vec![[0.0; 2]; rows]);
                let (mut y_exact, mut exact) = (y.clone(), stats.clone());
                layer_norm(&x, &w, &b, 1e-5, &mut y, &mut stats);
                reference::layer_norm(&x, &w, &b, 1e-5, &mut y_exact, &mut exact);
                assert_close(stats.as_flattened(), exact.as_flattened(), 2e-5, 1e-6);
                let size = stats.iter().map(|s| s[1]).fold(1.0, f32::max);
                assert_close(&y, &y_exact, 1e-5, 2e-6 * size);
                let (mut y, mut y_exact) = (vec![bf16::ZERO; rows * d], vec![bf16::ZERO; rows * d]);
                layer_norm(&x, &w, &b, 1e-5, &mut y, &mut stats);
                reference::layer_norm(&x, &w, &b, 1e-5, &mut y_exact, &mut exact);
                assert_close(&y, &y_exact, BF16_STEP, 1e-5 * size);

                for mode in [Store::Set, Store::Add] {
                    let dy = numbers::<f32>(seed ^ 3, rows * d);
                    let (mut dx, mut dw, mut db) = (x.clone(), w.clone(), b.clone());
                    let (mut dx_exact, mut dw_exact, mut db_exact) = (x.clone(), w.clone(), b.clone());
                    layer_norm_backward(&dy, &x, &w, &exact, &mut dx, mode, &mut dw, &mut db);
                    reference::layer_norm_backward(&dy, &x, &w, &exact, &mut dx_exact, mode, &mut dw_exact, &mut db_exact);
                    assert_close(&dx, &dx_exact, 1e-5, 5e-6 * size);
                    assert_close(&dw, &dw_exact, 1e-5, 5e-6 * size);
                    assert_close(&db, &db_exact, 1e-5, 5e-6);
                }
            });
        }
    }
}
