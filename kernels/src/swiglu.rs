//! SwiGLU: `y = silu(gate) * up`, with gate and up side by side in each row: `gate_up: [rows, 2 f]`.

use crate::Element;
use crate::element::{load, store};
use crate::math::sigmoid;
use crate::simd::simd_fn;

fn check(name: &str, gate_up: usize, f: usize, y: usize) {
    assert!(
        f > 0 && gate_up == 2 * y && y.is_multiple_of(f),
        "{name}: gate_up of {gate_up}, y of {y}, f {f}"
    );
}

simd_fn! {
    /// `y: [rows, f]` from `gate_up: [rows, 2 f]`. Relative error of f32 results below 1e-6.
    pub fn swiglu<V, I: Element, O: Element>(gate_up: &[I], f: usize, y: &mut [O]) {
        check("swiglu", gate_up.len(), f, y.len());
        for (row, y) in gate_up.chunks_exact(2 * f).zip(y.chunks_exact_mut(f)) {
            let (gate, up) = row.split_at(f);
            for i in (0..f).step_by(V::LANES) {
                let g: V = load(&gate[i..]);
                store(g.mul(sigmoid(g)).mul(load(&up[i..])), &mut y[i..]);
            }
        }
    }
}

simd_fn! {
    /// `gate_up` becomes its gradient, and `dy`, the gradient of `y`, becomes `y` itself, so that the forward pass need not
    /// keep it for the gradient of the next product's weights.
    pub fn swiglu_backward<V, I: Element, G: Element>(gate_up: &mut [I], f: usize, dy: &mut [G]) {
        check("swiglu_backward", gate_up.len(), f, dy.len());
        for (row, dy) in gate_up.chunks_exact_mut(2 * f).zip(dy.chunks_exact_mut(f)) {
            let (gate, up) = row.split_at_mut(f);
            for i in (0..f).step_by(V::LANES) {
                let (g, u, dy_v): (V, V, V) = (load(&gate[i..]), load(&up[i..]), load(&dy[i..]));
                let sig = sigmoid(g);
                let silu = g.mul(sig);
                // silu' = sig + silu * (1 - sig)
                let slope = silu.mul_add(V::splat(1.0).sub(sig), sig);
                store(dy_v.mul(u).mul(slope), &mut gate[i..]);
                store(dy_v.mul(silu), &mut up[i..]);
                store(silu.mul(u), &mut dy[i..]);
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

    fn check_both<T: Element>(rows: usize, f: usize, seed: u64, relative: f32, absolute: f32) {
        let x: Vec<T> = numbers::<f32>(seed, rows * 2 * f).iter().map(|v| T::from_f32(v * 12.0)).collect();
        let (mut y, mut y_exact) = (vec![T::default(); rows * f], vec![T::default(); rows * f]);
        swiglu(&x, f, &mut y);
        reference::swiglu(&x, f, &mut y_exact);
        assert_close(&y, &y_exact, relative, 0.0);
        let (mut dx, mut dx_exact) = (x.clone(), x);
        let (mut dy, mut dy_exact) = (numbers::<T>(seed ^ 1, rows * f), numbers::<T>(seed ^ 1, rows * f));
        swiglu_backward(&mut dx, f, &mut dy);
        reference::swiglu_backward(&mut dx_exact, f, &mut dy_exact);
        assert_close(&dx, &dx_exact, relative, absolute);
        assert_close(&dy, &dy_exact, relative, 0.0);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn equals_its_oracle(rows in 0usize..5, f in 1usize..70, seed: u64) {
            at_every_level(|| {
                check_both::<f32>(rows, f, seed, 1e-6, 4e-6);
                check_both::<bf16>(rows, f, seed, BF16_STEP, 4e-6);
            });
        }
    }
}
