//! Cross-entropy of logits `[rows, V]` with one target per row, loss and gradient in one visit. Rows whose target is
//! [`IGNORED`] have no loss and a zero gradient. The loss is a sum in which each row counts what its weight says, or one: `scale` carries
//! the mean over the global batch.

use crate::element::{load, load_filled, store};
use crate::math::exp;
use crate::simd::{Vector, simd_fn};
use crate::{Element, IGNORED};

/// Columns, after checking that lengths fit and targets exist.
fn vocabulary(logits: usize, targets: &[i64]) -> usize {
    if targets.is_empty() {
        assert_eq!(logits, 0, "cross_entropy: logits without targets");
        return 1;
    }
    assert!(
        logits > 0 && logits.is_multiple_of(targets.len()),
        "cross_entropy: {logits} logits, {} targets",
        targets.len()
    );
    let vocab = logits / targets.len();
    let bad = targets.iter().find(|t| **t != IGNORED && !(0..vocab as i64).contains(*t));
    assert!(bad.is_none(), "cross_entropy: target {bad:?} of {vocab}");
    vocab
}

/// What each target counts.
fn weights_of(targets: &[i64], weights: Option<&[f32]>) -> impl Iterator<Item = f32> {
    assert!(
        weights.is_none_or(|weights| weights.len() == targets.len()),
        "cross_entropy: a weight for each target"
    );
    (0..targets.len()).map(move |row| weights.map_or(1.0, |weights| weights[row]))
}

/// What a row's loss and gradient are made of.
struct Row {
    max: f32,
    log: f64,
    at_target: f32,
}

impl Row {
    #[inline(always)]
    fn new<V: Vector, L: Element>(logits: &[L], target: i64) -> Row {
        let (max, log) = log_sum_exp::<V, L>(logits);
        Row { max, log, at_target: logits[target as usize].to_f32() }
    }
    /// Logarithm of the target's probability.
    #[inline(always)]
    fn log_probability(&self) -> f64 {
        f64::from(self.at_target - self.max) - self.log
    }
    /// Probability times `scale`: the gradient of all logits but the target's.
    #[inline(always)]
    fn gradient<V: Vector>(&self, logit: V, scale: f32) -> V {
        exp(logit.sub(V::splat(self.max)).sub(V::splat(self.log as f32))).mul(V::splat(scale))
    }
    #[inline(always)]
    fn gradient_of_target<G: Element>(&self, scale: f32) -> G {
        G::from_f32((self.log_probability().exp_m1() * f64::from(scale)) as f32)
    }
}

/// The largest of `x`, and the logarithm of the sum of `e^(x - largest)`: apart, so that neither is lost in the other. The
/// logarithm is NaN if there is a NaN or +inf, or nothing but -inf.
#[inline(always)]
fn log_sum_exp<V: Vector, T: Element>(x: &[T]) -> (f32, f64) {
    let mut max = V::splat(f32::NEG_INFINITY);
    for i in (0..x.len()).step_by(V::LANES) {
        max = max.max(load_filled::<V, T>(&x[i..], f32::NEG_INFINITY));
    }
    let max = max.max_lane();
    let shift = V::splat(-max);
    let mut sum = V::splat(0.0);
    for i in (0..x.len()).step_by(V::LANES) {
        let v: V = load_filled(&x[i..], f32::NEG_INFINITY);
        sum = sum.add(exp(v.add(shift)));
    }
    (max, f64::from(sum.sum()).ln())
}

simd_fn! {
    /// Sum of the losses, without a gradient.
    pub fn cross_entropy_loss<V, L: Element>(logits: &[L], targets: &[i64], weights: Option<&[f32]>) -> f64 {
        let vocab = vocabulary(logits.len(), targets);
        let mut loss = 0.0;
        let rows = logits.chunks_exact(vocab).zip(targets);
        for ((row, target), weight) in rows.zip(weights_of(targets, weights)) {
            if *target != IGNORED {
                loss -= f64::from(weight) * Row::new::<V, L>(row, *target).log_probability();
            }
        }
        loss
    }
}

simd_fn! {
    /// Sum of the losses; the logits become their gradient times `scale`.
    pub fn cross_entropy<V, L: Element>(logits: &mut [L], targets: &[i64], weights: Option<&[f32]>, scale: f32) -> f64 {
        let vocab = vocabulary(logits.len(), targets);
        let mut loss = 0.0;
        let rows = logits.chunks_exact_mut(vocab).zip(targets);
        for ((row, target), weight) in rows.zip(weights_of(targets, weights)) {
            if *target == IGNORED {
                row.fill(L::default());
                continue;
            }
            let this = Row::new::<V, L>(row, *target);
            loss -= f64::from(weight) * this.log_probability();
            let scale = weight * scale;
            for i in (0..vocab).step_by(V::LANES) {
                let v: V = load(&row[i..]);
                store(this.gradient(v, scale), &mut row[i..]);
            }
            row[*target as usize] = this.gradient_of_target(scale);
        }
        loss
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference;
    use crate::simd::at_every_level;
    use crate::testing::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn equals_its_oracle(rows in 0usize..6, vocab in 1usize..200, seed: u64) {
            let pick = |r: usize| (seed.rotate_left(7 * r as u32) % (vocab as u64 + 1)) as i64;
            let targets: Vec<i64> =
                (0..rows).map(pick).map(|t| if t == vocab as i64 { IGNORED } else { t }).collect();
            at_every_level(|| {
                let logits: Vec<f32> = numbers::<f32>(seed, rows * vocab).iter().map(|v| v * 20.0).collect();
                let weights: Vec<f32> = (0..rows).map(|r| r as f32 * 0.5).collect();
                for weights in [None, Some(&weights[..])] {
                    let (mut grad, mut exact) = (logits.clone(), logits.clone());
                    let loss = cross_entropy(&mut grad, &targets, weights, 0.25);
                    let loss_exact = reference::cross_entropy(&mut exact, &targets, weights, 0.25);
                    assert!((loss - loss_exact).abs() <= 1e-6 * loss_exact + 1e-5, "{loss} is not {loss_exact}");
                    assert_close(&grad, &exact, 5e-6, 1e-6); // where p is near 1, p - 1 has an absolute error
                    assert_eq!(cross_entropy_loss(&logits, &targets, weights), loss);
                }
            });
        }
    }

    #[test]
    fn extreme_logits_give_finite_losses_and_nan_shows() {
        at_every_level(|| {
            let mut row = [1e30, -1e30, 0.0, f32::NEG_INFINITY];
            assert_eq!(cross_entropy(&mut row, &[0], None, 1.0), 0.0);
            assert_eq!(row, [0.0; 4]);
            let mut row = [0.0, f32::NAN];
            assert!(cross_entropy(&mut row, &[0], None, 1.0).is_nan());
        });
    }

    #[test]
    #[should_panic(expected = "target Some(3) of 3")]
    fn a_target_outside_the_vocabulary_is_refused() {
        cross_entropy(&mut [0.0; 3], &[3], None, 1.0);
    }
}
