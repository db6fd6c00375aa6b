//! AdamW over flat buffers, as PyTorch's fused kernel computes it, in one pass over memory.

use crate::element::{load, store};
use crate::simd::{Vector, simd_fn};
use crate::{AdamWStep, Element};
use half::bf16;

/// The step's numbers as the loop wants them.
struct Factors<V> {
    grad: V,
    keep: V,
    beta1_rest: V,
    beta2: V,
    beta2_rest: V,
    correction: V,
    eps: V,
    minus_rate: V,
}

impl<V: Vector> Factors<V> {
    #[inline(always)]
    fn new(step: &AdamWStep) -> Factors<V> {
        let correction1 = 1.0 - step.beta1.powf(step.step as f64);
        let correction2 = 1.0 - step.beta2.powf(step.step as f64);
        Factors {
            grad: V::splat(step.grad_scale),
            keep: V::splat((1.0 - step.lr * step.weight_decay) as f32),
            beta1_rest: V::splat((1.0 - step.beta1) as f32),
            beta2: V::splat(step.beta2 as f32),
            beta2_rest: V::splat((1.0 - step.beta2) as f32),
            correction: V::splat((1.0 / correction2.sqrt()) as f32),
            eps: V::splat(step.eps as f32),
            minus_rate: V::splat((-step.lr / correction1) as f32),
        }
    }

    /// Updates up to one vector at the start of each slice and returns the new parameters.
    #[inline(always)]
    fn update<S: Element, G: Element>(&self, p: &mut [S], g: &[G], m: &mut [S], v: &mut [S]) -> V {
        let g = load::<V, G>(g).mul(self.grad);
        let m_old: V = load(m);
        let m_new = g.sub(m_old).mul_add(self.beta1_rest, m_old);
        let v_new = g.mul(g).mul_add(self.beta2_rest, load::<V, S>(v).mul(self.beta2));
        let denominator = v_new.sqrt().mul_add(self.correction, self.eps);
        let p_new = m_new.div(denominator).mul_add(self.minus_rate, load::<V, S>(p).mul(self.keep));
        store(m_new, m);
        store(v_new, v);
        store(p_new, p);
        p_new
    }
}

simd_fn! {
    /// One step over parameters `p`, gradients `g` and the moments `m` and `v`, all of one length; `copy` receives the new
    /// parameters as bf16. Numbers in 16 bits are computed in fp32 and rounded once. Ranges with another weight decay are other calls.
    pub fn adamw<V, S: Element, G: Element>(step: &AdamWStep, p: &mut [S], g: &[G], m: &mut [S], v: &mut [S], copy: Option<&mut [bf16]>) {
        let len = p.len();
        assert!(step.step > 0, "adamw: steps count from 1");
        assert!(g.len() == len && m.len() == len && v.len() == len, "adamw: lengths differ");
        let factors = Factors::<V>::new(step);
        match copy {
            Some(copy) => {
                assert_eq!(copy.len(), len, "adamw: length of the copy");
                for i in (0..len).step_by(V::LANES) {
                    let p = factors.update(&mut p[i..], &g[i..], &mut m[i..], &mut v[i..]);
                    store(p, &mut copy[i..]);
                }
            }
            None => {
                for i in (0..len).step_by(V::LANES) {
                    factors.update(&mut p[i..], &g[i..], &mut m[i..], &mut v[i..]);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference;
    use crate::simd::at_every_level;
    use crate::testing::*;
    use proptest::prelude::*;

    const STEP: AdamWStep = AdamWStep {
        lr: 3e-3,
        beta1: 0.9,
        beta2: 0.95,
        eps: 1e-8,
        weight_decay: 0.1,
        step: 1,
        grad_scale: 0.5,
    };

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn equals_its_oracle(len in 0usize..100, seed: u64, decay: bool) {
            at_every_level(|| {
                let mut fast = [numbers::<f32>(seed, len), vec![0.0; len], vec![0.0; len]];
                let mut exact = fast.clone();
                let mut copy = vec![bf16::ZERO; len];
                for step in 1..6 {
                    let g = numbers::<f32>(seed ^ step, len);
                    let now = AdamWStep { step, weight_decay: if decay { 0.1 } else { 0.0 }, ..STEP };
                    let [p, m, v] = &mut fast;
                    adamw(&now, p, &g, m, v, (step % 2 == 1).then_some(&mut copy));
                    let [p, m, v] = &mut exact;
                    reference::adamw(&now, p, &g, m, v, None);
                }
                (0..3).for_each(|i| assert_close(&fast[i], &exact[i], 1e-5, 1e-6));
                for (p, copy) in fast[0].iter().zip(&copy) {
                    assert_eq!(bf16::from_f32(*p), *copy);
                }
            });
        }
    }

    #[test]
    fn numbers_in_16_bits_are_computed_in_fp32_and_rounded_once() {
        at_every_level(|| {
            let round = |x: &[f32]| x.iter().map(|x| bf16::from_f32(*x)).collect::<Vec<bf16>>();
            let wide = |x: &[bf16]| x.iter().map(|x| x.to_f32()).collect::<Vec<f32>>();
            let mut narrow = [1, 2, 3].map(|seed| round(&numbers::<f32>(seed, 37)));
            narrow[2].iter_mut().for_each(|v| *v = bf16::from_f32(v.to_f32().abs()));
            let g = round(&numbers::<f32>(4, 37));
            let mut exact = narrow.each_ref().map(|x| wide(x));
            let now = AdamWStep { step: 3, ..STEP };
            let [p, m, v] = &mut exact;
            adamw(&now, p, &wide(&g), m, v, None);
            let [p, m, v] = &mut narrow;
            adamw(&now, p, &g, m, v, None);
            assert_eq!(narrow, exact.map(|x| round(&x)));
        });
    }

    #[test]
    fn equals_pytorch() {
        // torch 2.11: p = [0.5, -1], three steps of AdamW(lr=0.01, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1) with the
        // gradients [0.1, -0.2], [0.3, 0.1], [-0.2, 0.05].
        let (mut p, mut m, mut v) = ([0.5, -1.0], [0.0; 2], [0.0; 2]);
        for (step, g) in [(1, [0.1, -0.2]), (2, [0.3, 0.1]), (3, [-0.2, 0.05])] {
            let now = AdamWStep { lr: 0.01, beta2: 0.999, grad_scale: 1.0, step, ..STEP };
            adamw(&now, &mut p, &g, &mut m, &mut v, None);
        }
        assert_close(&p, &[0.476_773_86, -0.983_748_5], 1e-6, 0.0);
    }
}
