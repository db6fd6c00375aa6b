//! What stands between the products of a feed-forward network: `y = activation(x)`, or `y = activation(gate) * up` with gate and up side by
//! side in each row: `gate_up: [rows, 2 f]`.

use crate::element::{load, store};
use crate::math::{erf, exp, sigmoid};
use crate::simd::{Vector, simd_fn};
use crate::{Activation, Element};

const SQRT_2_OVER_PI: f32 = 0.797_884_6;
const CUBE: f32 = 0.044_715;
/// 1 / sqrt(2 pi).
const DENSITY: f32 = 0.398_942_3;

/// The activation of `x`, and its slope there.
#[inline(always)]
fn value_and_slope<V: Vector>(activation: Activation, x: V) -> (V, V) {
    let one = V::splat(1.0);
    match activation {
        Activation::Silu => {
            let sig = sigmoid(x);
            let silu = x.mul(sig);
            // sig + silu * (1 - sig)
            (silu, silu.mul_add(one.sub(sig), sig))
        }
        Activation::Gelu => {
            let half = V::splat(0.5);
            let share = erf(x.mul(V::splat(std::f32::consts::FRAC_1_SQRT_2))).mul_add(half, half);
            let density = exp(x.mul(x).mul(V::splat(-0.5))).mul(V::splat(DENSITY));
            (x.mul(share), x.mul_add(density, share))
        }
        Activation::GeluTanh => {
            // (1 + tanh u) / 2 = sigmoid(2 u), u = sqrt(2 / pi) (x + CUBE x^3)
            let square = x.mul(x);
            let twice = square.mul_add(V::splat(CUBE), one).mul(x).mul(V::splat(2.0 * SQRT_2_OVER_PI));
            let share = sigmoid(twice);
            let slope = square.mul_add(V::splat(3.0 * CUBE), one).mul(V::splat(2.0 * SQRT_2_OVER_PI));
            (x.mul(share), x.mul(share).mul(one.sub(share)).mul_add(slope, share))
        }
        Activation::Relu => {
            // A NaN stays one. The slope at 0 is 0.
            (x.zero_where_less(V::splat(0.0), x), x.zero_where_less(V::splat(f32::MIN_POSITIVE), one))
        }
    }
}

fn check_gated(name: &str, gate_up: usize, f: usize, y: usize) {
    assert!(
        f > 0 && gate_up == 2 * y && y.is_multiple_of(f),
        "{name}: gate_up of {gate_up}, y of {y}, f {f}"
    );
}

simd_fn! {
    /// `y: [rows, f]` from `gate_up: [rows, 2 f]`. Relative error of f32 results of SiLU below 1e-6.
    pub fn gated<V, I: Element, O: Element>(gate_up: &[I], f: usize, activation: Activation, y: &mut [O]) {
        check_gated("gated", gate_up.len(), f, y.len());
        for (row, y) in gate_up.chunks_exact(2 * f).zip(y.chunks_exact_mut(f)) {
            let (gate, up) = row.split_at(f);
            for i in (0..f).step_by(V::LANES) {
                let (value, _) = value_and_slope::<V>(activation, load(&gate[i..]));
                store(value.mul(load(&up[i..])), &mut y[i..]);
            }
        }
    }
}

simd_fn! {
    /// `gate_up` becomes its gradient, and `dy`, the gradient of `y`, becomes `y` itself, so that the forward pass need not
    /// keep it for the gradient of the next product's weights.
    pub fn gated_backward<V, I: Element, G: Element>(gate_up: &mut [I], f: usize, activation: Activation, dy: &mut [G]) {
        check_gated("gated_backward", gate_up.len(), f, dy.len());
        for (row, dy) in gate_up.chunks_exact_mut(2 * f).zip(dy.chunks_exact_mut(f)) {
            let (gate, up) = row.split_at_mut(f);
            for i in (0..f).step_by(V::LANES) {
                let (u, dy_v): (V, V) = (load(&up[i..]), load(&dy[i..]));
                let (value, slope) = value_and_slope::<V>(activation, load(&gate[i..]));
                store(dy_v.mul(u).mul(slope), &mut gate[i..]);
                store(dy_v.mul(value), &mut up[i..]);
                store(value.mul(u), &mut dy[i..]);
            }
        }
    }
}

simd_fn! {
    /// `y = activation(x)`.
    pub fn activate<V, I: Element, O: Element>(x: &[I], activation: Activation, y: &mut [O]) {
        assert_eq!(x.len(), y.len(), "activate: lengths differ");
        for i in (0..x.len()).step_by(V::LANES) {
            let (value, _) = value_and_slope::<V>(activation, load(&x[i..]));
            store(value, &mut y[i..]);
        }
    }
}

simd_fn! {
    /// `x` becomes its gradient, and `dy`, the gradient of `y`, becomes `y` itself.
    pub fn activate_backward<V, I: Element, G: Element>(x: &mut [I], activation: Activation, dy: &mut [G]) {
        assert_eq!(x.len(), dy.len(), "activate_backward: lengths differ");
        for i in (0..x.len()).step_by(V::LANES) {
            let (value, slope) = value_and_slope::<V>(activation, load(&x[i..]));
            store(load::<V, G>(&dy[i..]).mul(slope), &mut x[i..]);
            store(value, &mut dy[i..]);
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

    const ALL: [Activation; 4] = [Activation::Silu, Activation::Gelu, Activation::GeluTanh, Activation::Relu];

    fn check_both<T: Element>(rows: usize, f: usize, seed: u64, relative: f32, absolute: f32) {
        for activation in ALL {
            let x: Vec<T> =
                numbers::<f32>(seed, rows * 2 * f).iter().map(|v| T::from_f32(v * 12.0)).collect();
            let (mut y, mut y_exact) = (vec![T::default(); rows * f], vec![T::default(); rows * f]);
            gated(&x, f, activation, &mut y);
            reference::gated(&x, f, activation, &mut y_exact);
            assert_close(&y, &y_exact, relative, absolute);
            let (mut dx, mut dx_exact) = (x.clone(), x.clone());
            let (mut dy, mut dy_exact) = (numbers::<T>(seed ^ 1, rows * f), numbers::<T>(seed ^ 1, rows * f));
            gated_backward(&mut dx, f, activation, &mut dy);
            reference::gated_backward(&mut dx_exact, f, activation, &mut dy_exact);
            assert_close(&dx, &dx_exact, relative, 4.0 * absolute);
            assert_close(&dy, &dy_exact, relative, absolute);

            let (mut y, mut y_exact) = (vec![T::default(); x.len()], vec![T::default(); x.len()]);
            activate(&x, activation, &mut y);
            reference::activate(&x, activation, &mut y_exact);
            assert_close(&y, &y_exact, relative, absolute);
            let (mut dx, mut dx_exact) = (x.clone(), x);
            let (mut dy, mut dy_exact) = (numbers::<T>(seed ^ 2, dx.len()), numbers::<T>(seed ^ 2, dx.len()));
            activate_backward(&mut dx, activation, &mut dy);
            reference::activate_backward(&mut dx_exact, activation, &mut dy_exact);
            assert_close(&dx, &dx_exact, relative, 4.0 * absolute);
            assert_close(&dy, &dy_exact, relative, absolute);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn equals_its_oracle(rows in 0usize..5, f in 1usize..70, seed: u64) {
            at_every_level(|| {
                check_both::<f32>(rows, f, seed, 2e-6, 4e-6);
                check_both::<bf16>(rows, f, seed, BF16_STEP, 4e-6);
            });
        }
    }

    #[test]
    fn values_are_those_of_pytorch_and_slopes_are_slopes() {
        // torch 2.11: silu, gelu, gelu(approximate="tanh"), relu of 1.5 and of -0.7
        let values = [
            (Activation::Silu, [1.226_361_7, -0.232_268_56]),
            (Activation::Gelu, [1.399_789_2, -0.169_374_56]),
            (Activation::GeluTanh, [1.399_571_6, -0.169_429_87]),
            (Activation::Relu, [1.5, 0.0]),
        ];
        at_every_level(|| {
            for (activation, want) in values {
                let mut y = [0.0f32; 2];
                activate(&[1.5f32, -0.7], activation, &mut y);
                assert!(
                    (y[0] - want[0]).abs() < 1e-5 && (y[1] - want[1]).abs() < 1e-5,
                    "{activation:?}: {y:?}"
                );
                for x in [-3.0f32, -0.4, 0.3, 2.0] {
                    let (mut slope, mut dy, mut ends) = ([x], [1.0f32], [0.0f32; 2]);
                    activate_backward(&mut slope, activation, &mut dy);
                    activate(&[x + 1e-2, x - 1e-2], activation, &mut ends);
                    let measured = (ends[0] - ends[1]) / 2e-2;
                    assert!(
                        (slope[0] - measured).abs() < 1e-3,
                        "{activation:?} at {x}: {} {measured}",
                        slope[0]
                    );
                }
            }
        });
    }
}
