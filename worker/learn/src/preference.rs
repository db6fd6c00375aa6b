//! Training on preferences (DPO): of two answers to a prompt the chosen one shall become likelier than the rejected one, beside a reference, which
//! is the model without its adapter. The loss of a pair hangs on log-probabilities of whole answers, so a step measures these first; what
//! flows back is then that of a weighted sum over tokens.

use crate::batch::TokenBatch;
use crate::engine::Learner;
use crate::error::Result;
use crate::executor::{Tally, Which};
use crate::objective::{Measured, NextToken, Objective};
use fleet_collectives::Op;
use fleet_common::job::{Dpo, PreferenceLoss};
use fleet_data::Windows;

/// Items are pairs: the chosen answer behind its prompt, then the rejected one.
pub struct Preferences(pub Dpo);

/// Sums over pairs.
#[derive(Clone, Copy, Debug, Default)]
struct Sums {
    loss: f64,
    pairs: f64,
    /// Pairs whose chosen answer has the larger reward.
    right: f64,
    /// Of the chosen answers, and of the rejected ones.
    rewards: [f64; 2],
    /// Minus the log-probability of the chosen answers, and their tokens.
    chosen: f64,
    tokens: f64,
}

/// A pair's losses, each of the model and of the reference: minus the log-probability of the answer.
#[derive(Clone, Copy, Debug)]
struct Pair {
    chosen: [f64; 2],
    rejected: [f64; 2],
    /// Of both answers.
    tokens: [f64; 2],
}

impl Preferences {
    /// Loss, and what the loss of each answer's tokens counts, chosen and rejected.
    fn of(&self, pair: &Pair) -> (f64, [f64; 2]) {
        let Dpo { beta, loss_type, label_smoothing: wrong } = self.0;
        let per = match loss_type {
            PreferenceLoss::Ipo => pair.tokens,
            _ => [1.0; 2],
        };
        let ratio = |[model, reference]: [f64; 2], per: f64| (reference - model) / per;
        let h = ratio(pair.chosen, per[0]) - ratio(pair.rejected, per[1]);
        // The loss, and how it grows with `h`.
        let (loss, slope) = match loss_type {
            PreferenceLoss::Sigmoid => (
                (1.0 - wrong) * softplus(-beta * h) + wrong * softplus(beta * h),
                beta * (wrong * sigmoid(beta * h) - (1.0 - wrong) * sigmoid(-beta * h)),
            ),
            PreferenceLoss::Robust => {
                let whole = 1.0 - 2.0 * wrong;
                (
                    ((1.0 - wrong) * softplus(-beta * h) - wrong * softplus(beta * h)) / whole,
                    beta * (-(1.0 - wrong) * sigmoid(-beta * h) - wrong * sigmoid(beta * h)) / whole,
                )
            }
            PreferenceLoss::Hinge => {
                let left = 1.0 - beta * h;
                (left.max(0.0), if left > 0.0 { -beta } else { 0.0 })
            }
            PreferenceLoss::Ipo => {
                let off = h - 1.0 / (2.0 * beta);
                (off * off, 2.0 * off)
            }
        };
        (loss, [-slope / per[0], slope / per[1]])
    }

    /// The pairs of a batch, and their sums.
    fn measure(&self, batch: &TokenBatch, model: &[f64], reference: &[f64]) -> (Vec<[f64; 2]>, Sums) {
        let (view, mut at) = (batch.view(), 0);
        let pairs = self.pairs(batch);
        let equal = vec![view.seq; view.sequences()];
        let lengths = view.lengths.unwrap_or(&equal);
        let (mut weights, mut sums) = (Vec::new(), Sums::default());
        for pair in 0..pairs {
            let mut tokens = [0.0; 2];
            for (number, tokens) in tokens.iter_mut().enumerate() {
                let length = lengths[2 * pair + number];
                let targets = &view.targets[at..at + length];
                *tokens = targets.iter().filter(|target| **target != crate::batch::IGNORED).count() as f64;
                at += length;
            }
            let both = |number: usize| [model[2 * pair + number], reference[2 * pair + number]];
            let pair =
                Pair { chosen: both(0), rejected: both(1), tokens: tokens.map(|count| count.max(1.0)) };
            let (loss, counts) = self.of(&pair);
            let reward = |[model, reference]: [f64; 2]| self.0.beta * (reference - model);
            let rewards = [reward(pair.chosen), reward(pair.rejected)];
            sums.loss += loss;
            sums.pairs += 1.0;
            sums.right += f64::from(u8::from(rewards[0] > rewards[1]));
            sums.rewards = [sums.rewards[0] + rewards[0], sums.rewards[1] + rewards[1]];
            sums.chosen += pair.chosen[0];
            sums.tokens += tokens[0];
            weights.push(counts);
        }
        (weights, sums)
    }

    /// A sequence that fills a batch up is of no pair.
    fn pairs(&self, batch: &TokenBatch) -> usize {
        batch.view().sequences() / 2
    }

    /// Measures all batches of all ranks. A collective call.
    fn all(&self, learner: &mut dyn Learner, batches: &[TokenBatch]) -> Result<(Vec<Vec<[f64; 2]>>, Sums)> {
        let model = learner.losses(batches, Which::Trained)?;
        let reference = learner.losses(batches, Which::Base)?;
        let (mut weights, mut all) = (Vec::new(), Sums::default());
        for ((batch, model), reference) in batches.iter().zip(&model).zip(&reference) {
            let (of_batch, sums) = self.measure(batch, model, reference);
            weights.push(of_batch);
            all.add(&sums);
        }
        let mut numbers = all.numbers();
        learner.gang().all_reduce_f64(&mut numbers, Op::Sum)?;
        Ok((weights, Sums::of(numbers)))
    }
}

impl Objective for Preferences {
    fn batch(&self, items: &Windows, indices: &mut dyn Iterator<Item = u64>) -> TokenBatch {
        NextToken.batch(items, indices)
    }

    fn weigh(&self, learner: &mut dyn Learner, batches: &mut [TokenBatch]) -> Result<Option<Measured>> {
        let (weights, sums) = self.all(learner, batches)?;
        for (batch, weights) in batches.iter_mut().zip(weights) {
            let pairs = self.pairs(batch);
            let (seq, sequences) = (batch.seq, batch.view().sequences());
            let lengths = batch.lengths.clone().unwrap_or_else(|| vec![seq; sequences]);
            let mut all = Vec::with_capacity(batch.ids.len());
            for (number, length) in lengths.iter().enumerate() {
                let weight = if number < 2 * pairs { weights[number / 2][number % 2] } else { 0.0 };
                all.resize(all.len() + length, weight as f32);
            }
            (batch.weights, batch.counts) = (Some(all), Some(pairs as f64));
        }
        Ok(Some(sums.measured()))
    }

    fn evaluate(&self, learner: &mut dyn Learner, batches: &[TokenBatch]) -> Result<Measured> {
        let (_, sums) = self.all(learner, batches)?;
        Ok(sums.measured())
    }
}

impl Sums {
    fn numbers(&self) -> [f64; 7] {
        let Sums { loss, pairs, right, rewards: [chosen, rejected], chosen: of_chosen, tokens } = *self;
        [loss, pairs, right, chosen, rejected, of_chosen, tokens]
    }

    fn of([loss, pairs, right, chosen, rejected, of_chosen, tokens]: [f64; 7]) -> Sums {
        Sums { loss, pairs, right, rewards: [chosen, rejected], chosen: of_chosen, tokens }
    }

    fn add(&mut self, other: &Sums) {
        let (one, two) = (self.numbers(), other.numbers());
        *self = Sums::of(std::array::from_fn(|n| one[n] + two[n]));
    }

    fn measured(&self) -> Measured {
        let pairs = self.pairs.max(1.0);
        let [chosen, rejected] = self.rewards.map(|sum| sum / pairs);
        Measured {
            loss: self.loss / pairs,
            tally: Tally {
                loss: self.chosen,
                weight: self.tokens,
                tokens: self.tokens as u64,
                hits: self.right as u64,
            },
            line: Some(format!(
                "rewards: chosen {chosen:.4}, rejected {rejected:.4}, margin {:.4}, accuracy {:.1} % of {} pairs",
                chosen - rejected,
                100.0 * self.right / pairs,
                self.pairs
            )),
        }
    }
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// `ln(1 + e^x)`.
fn softplus(x: f64) -> f64 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn preferences(loss_type: PreferenceLoss, label_smoothing: f64) -> Preferences {
        Preferences(Dpo { beta: 0.1, loss_type, label_smoothing })
    }

    const PAIR: Pair = Pair { chosen: [10.0, 12.0], rejected: [20.0, 17.0], tokens: [4.0, 5.0] };

    #[test]
    fn losses_are_those_of_trl() {
        // Log-ratios 2 and -3, so that the logits are 5; IPO's are 2/4 + 3/5. TRL 1.16's formulas in double precision.
        for (kind, smoothing, wanted) in [
            (PreferenceLoss::Sigmoid, 0.0, 0.474_076_984_18),
            (PreferenceLoss::Sigmoid, 0.1, 0.524_076_984_18),
            (PreferenceLoss::Hinge, 0.0, 0.5),
            (PreferenceLoss::Ipo, 0.0, 15.21),
            (PreferenceLoss::Robust, 0.1, 0.411_576_984_18),
        ] {
            let (loss, _) = preferences(kind, smoothing).of(&PAIR);
            assert!((loss - wanted).abs() < 1e-9, "{kind:?} {smoothing}: {loss}");
        }
        // Its sign: a model that is no better than its reference has the loss ln 2, and a better one less.
        let even = Pair { chosen: [3.0; 2], rejected: [5.0; 2], tokens: [1.0; 2] };
        let (loss, counts) = preferences(PreferenceLoss::Sigmoid, 0.0).of(&even);
        assert!((loss - std::f64::consts::LN_2).abs() < 1e-12 && counts[0] > 0.0 && counts[1] < 0.0);
    }

    #[test]
    fn what_tokens_count_is_how_the_loss_grows_with_theirs() {
        for kind in
            [PreferenceLoss::Sigmoid, PreferenceLoss::Hinge, PreferenceLoss::Ipo, PreferenceLoss::Robust]
        {
            let smoothing =
                if matches!(kind, PreferenceLoss::Sigmoid | PreferenceLoss::Robust) { 0.2 } else { 0.0 };
            let preferences = preferences(kind, smoothing);
            let (_, counts) = preferences.of(&PAIR);
            let step = 1e-6;
            let at = |chosen: f64, rejected: f64| {
                let pair = Pair {
                    chosen: [10.0 + chosen, 12.0],
                    rejected: [20.0 + rejected, 17.0],
                    tokens: [4.0, 5.0],
                };
                preferences.of(&pair).0
            };
            let chosen = (at(step, 0.0) - at(-step, 0.0)) / (2.0 * step);
            let rejected = (at(0.0, step) - at(0.0, -step)) / (2.0 * step);
            assert!((counts[0] - chosen).abs() < 1e-6 && (counts[1] - rejected).abs() < 1e-6, "{kind:?}");
        }
    }
}
