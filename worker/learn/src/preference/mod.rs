//! Training on preferences: of two answers to a prompt the chosen one shall become likelier than the rejected one, beside a reference (DPO) or without
//! one (ORPO). The loss of a pair hangs on log-probabilities of whole answers, so a step measures these first; what flows back is then that of a
//! weighted sum over tokens.

mod loss;
mod reference;

pub use reference::{REFERENCE_FILE, Reference, Share};

use crate::batch::{IGNORED, TokenBatch};
use crate::engine::Learner;
use crate::error::Result;
use crate::executor::{Tally, Which};
use crate::objective::{Measured, NextToken, Objective};
use fleet_collectives::Op;
use fleet_common::job::Dpo;
use fleet_data::Windows;
use loss::{Answer, Pair};

/// Items are pairs: the chosen answer behind its prompt, then the rejected one.
pub struct Preferences {
    pub dpo: Dpo,
    pub beside: Beside,
}

/// With what the model is compared.
pub enum Beside {
    /// The model without its adapter, which is asked in each step.
    Base,
    /// Another one, or as it was.
    Reference(Reference),
    /// Nothing.
    Nothing,
}

/// Which part of the data a batch is of.
#[derive(Clone, Copy)]
enum Part {
    Train,
    Validation,
}

/// Sums over pairs.
#[derive(Clone, Copy, Debug, Default)]
struct Sums {
    loss: f64,
    pairs: f64,
    /// Pairs whose chosen answer has the larger reward.
    right: f64,
    /// Of the chosen answers, and of the rejected ones.
    rewards: [f64; 2],
    /// The losses of answers, chosen and rejected.
    losses: [f64; 2],
    /// Of the chosen answers.
    tokens: f64,
}

impl Preferences {
    /// Measures all batches of all ranks: what each token of the answers counts, and the sums. A collective call.
    fn measure(
        &self,
        learner: &mut dyn Learner,
        batches: &[TokenBatch],
        part: Part,
    ) -> Result<(Vec<Vec<[f64; 2]>>, Sums)> {
        let model = learner.losses(batches, Which::Trained)?;
        let reference = match &self.beside {
            Beside::Base => learner.losses(batches, Which::Base)?,
            Beside::Reference(reference) => {
                let known = match part {
                    Part::Train => &reference.train,
                    Part::Validation => &reference.validation,
                };
                let of =
                    |batch: &TokenBatch| batch.items.iter().flat_map(|item| known[*item as usize]).collect();
                batches.iter().map(of).collect()
            }
            Beside::Nothing => model.iter().map(|losses| vec![0.0; losses.len()]).collect(),
        };
        let (mut counts, mut sums) = (Vec::new(), Sums::default());
        for ((batch, model), reference) in batches.iter().zip(&model).zip(&reference) {
            let tokens = tokens(batch);
            let answer =
                |at: usize| Answer { model: model[at], reference: reference[at], tokens: tokens[at] };
            let pair = |at: usize| Pair { chosen: answer(2 * at), rejected: answer(2 * at + 1) };
            counts.push((0..batch.items.len()).map(|at| self.add(&pair(at), &mut sums)).collect());
        }
        let mut numbers = sums.numbers();
        learner.gang().all_reduce_f64(&mut numbers, Op::Sum)?;
        Ok((counts, Sums::of(numbers)))
    }

    /// Adds a pair to the sums; tells what its tokens count.
    fn add(&self, pair: &Pair, sums: &mut Sums) -> [f64; 2] {
        let (loss, counts) = loss::of(&self.dpo, pair);
        let reward = |answer: Answer| match &self.beside {
            Beside::Nothing => -self.dpo.beta * answer.model / answer.tokens,
            _ => self.dpo.beta * (answer.reference - answer.model),
        };
        let rewards = [reward(pair.chosen), reward(pair.rejected)];
        sums.add(&Sums {
            loss,
            pairs: 1.0,
            right: f64::from(u8::from(rewards[0] > rewards[1])),
            rewards,
            losses: [pair.chosen.model, pair.rejected.model],
            tokens: pair.chosen.tokens,
        });
        counts
    }
}

/// Of each sequence how many targets it has, and one where it has none.
fn tokens(batch: &TokenBatch) -> Vec<f64> {
    let mut targets = &batch.targets[..];
    let of = |length| {
        let (its, others) = targets.split_at(length);
        targets = others;
        its.iter().filter(|target| **target != IGNORED).count().max(1) as f64
    };
    batch.view().sequence_lengths().map(of).collect()
}

impl Objective for Preferences {
    fn batch(&self, items: &Windows, indices: &mut dyn Iterator<Item = u64>) -> TokenBatch {
        NextToken.batch(items, indices)
    }

    fn weigh(&self, learner: &mut dyn Learner, batches: &mut [TokenBatch]) -> Result<Option<Measured>> {
        let (counts, sums) = self.measure(learner, batches, Part::Train)?;
        for (batch, counts) in batches.iter_mut().zip(counts) {
            let of_sequences = counts.iter().flatten().copied().chain(std::iter::repeat(0.0));
            let of_tokens = batch.view().sequence_lengths().zip(of_sequences);
            let weights = of_tokens.flat_map(|(length, count)| std::iter::repeat_n(count as f32, length));
            (batch.weights, batch.counts) = (Some(weights.collect()), Some(counts.len() as f64));
        }
        Ok(Some(sums.measured()))
    }

    fn evaluate(&self, learner: &mut dyn Learner, batches: &[TokenBatch]) -> Result<Measured> {
        let (_, sums) = self.measure(learner, batches, Part::Validation)?;
        Ok(sums.measured())
    }
}

impl Sums {
    fn numbers(&self) -> [f64; 8] {
        let Sums {
            loss,
            pairs,
            right,
            rewards: [chosen, rejected],
            losses: [of_chosen, of_rejected],
            tokens,
        } = *self;
        [loss, pairs, right, chosen, rejected, of_chosen, of_rejected, tokens]
    }

    fn of([loss, pairs, right, chosen, rejected, of_chosen, of_rejected, tokens]: [f64; 8]) -> Sums {
        Sums { loss, pairs, right, rewards: [chosen, rejected], losses: [of_chosen, of_rejected], tokens }
    }

    fn add(&mut self, other: &Sums) {
        let (one, two) = (self.numbers(), other.numbers());
        *self = Sums::of(std::array::from_fn(|n| one[n] + two[n]));
    }

    fn measured(&self) -> Measured {
        let pairs = self.pairs.max(1.0);
        let ([chosen, rejected], logps) =
            (self.rewards.map(|sum| sum / pairs), self.losses.map(|sum| -sum / pairs));
        Measured {
            loss: self.loss / pairs,
            tally: Tally { loss: self.losses[0], weight: self.tokens, tokens: self.tokens as u64, hits: 0 },
            metrics: vec![
                ("rewards/chosen", chosen),
                ("rewards/rejected", rejected),
                ("rewards/margins", chosen - rejected),
                ("rewards/accuracies", self.right / pairs),
                ("logps/chosen", logps[0]),
                ("logps/rejected", logps[1]),
            ],
        }
    }
}
