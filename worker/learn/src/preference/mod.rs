//! Training on preferences: of two answers to a prompt the chosen one shall become likelier than the rejected one, beside a reference (DPO) or without
//! one (ORPO). The loss of a pair hangs on log-probabilities of whole answers, which are known after the forward; what flows back is then that of a weighted
//! sum over tokens.

mod loss;
mod reference;

pub use reference::{REFERENCE_FILE, Reference, Share};

use crate::batch::{IGNORED, TokenBatch};
use crate::engine::Learner;
use crate::error::Result;
use crate::executor::{Tally, Which};
use crate::objective::{Measured, NextToken, Objective, Weighing};
use fleet_collectives::{Gang, Op};
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

/// Of the answers of a batch, chosen and rejected ones in turn, without the model that is trained.
struct Known {
    /// How many each has, and one where it has none.
    tokens: Vec<f64>,
    /// Their losses by the reference; perhaps more behind them.
    reference: Vec<f64>,
}

impl Known {
    fn of(batch: &TokenBatch, reference: Vec<f64>) -> Known {
        let mut tokens = tokens(batch);
        tokens.truncate(2 * batch.items.len());
        Known { tokens, reference }
    }
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
    /// What is known of each batch without the model. A collective call.
    fn known(&self, learner: &mut dyn Learner, batches: &[TokenBatch], part: Part) -> Result<Vec<Known>> {
        let measured = match (&self.beside, part) {
            (Beside::Base, _) => {
                let losses = learner.losses(batches, Which::Base)?;
                return Ok(batches
                    .iter()
                    .zip(losses)
                    .map(|(batch, losses)| Known::of(batch, losses))
                    .collect());
            }
            (Beside::Nothing, _) => None,
            (Beside::Reference(reference), Part::Train) => Some(&reference.train),
            (Beside::Reference(reference), Part::Validation) => Some(&reference.validation),
        };
        let of = |item: &u64| measured.map_or([0.0; 2], |measured| measured[*item as usize]);
        let known = |batch: &TokenBatch| Known::of(batch, batch.items.iter().flat_map(of).collect());
        Ok(batches.iter().map(known).collect())
    }

    /// Of the pairs of a batch, whose sequences have the losses `model`: what each target of a sequence counts, and the sums.
    fn weigh(&self, known: &Known, model: &[f64]) -> (Vec<f64>, Sums) {
        let (mut sums, mut counts) = (Sums::default(), vec![0.0; model.len()]);
        let answer =
            |at: usize| Answer { model: model[at], reference: known.reference[at], tokens: known.tokens[at] };
        for (pair, counts) in counts.chunks_exact_mut(2).take(known.tokens.len() / 2).enumerate() {
            let pair = Pair { chosen: answer(2 * pair), rejected: answer(2 * pair + 1) };
            counts.copy_from_slice(&self.add(&pair, &mut sums));
        }
        (counts, sums)
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

    fn weighing<'a>(
        &'a self,
        learner: &mut dyn Learner,
        batches: &mut [TokenBatch],
    ) -> Result<Option<Box<dyn Weighing + 'a>>> {
        let known = self.known(learner, batches, Part::Train)?;
        batches.iter_mut().for_each(|batch| batch.counts = Some(batch.items.len() as f64));
        let sums = vec![Sums::default(); known.len()];
        Ok(Some(Box::new(Weighed { preferences: self, known, sums })))
    }

    fn evaluate(&self, learner: &mut dyn Learner, batches: &[TokenBatch]) -> Result<Measured> {
        let model = learner.losses(batches, Which::Trained)?;
        let known = self.known(learner, batches, Part::Validation)?;
        let sums = known.iter().zip(&model).map(|(known, model)| self.weigh(known, model).1);
        Sums::of_all(sums, learner.gang())
    }
}

/// The batches of a step.
struct Weighed<'a> {
    preferences: &'a Preferences,
    known: Vec<Known>,
    /// Of the batches that were weighed.
    sums: Vec<Sums>,
}

impl Weighing for Weighed<'_> {
    fn weigh(&mut self, number: usize, losses: &[f64]) -> Vec<f64> {
        let (counts, sums) = self.preferences.weigh(&self.known[number], losses);
        self.sums[number] = sums;
        counts
    }

    fn measured(&self, gang: &mut dyn Gang) -> Result<Measured> {
        Sums::of_all(self.sums.iter().copied(), gang)
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

    /// A collective call.
    fn of_all(parts: impl Iterator<Item = Sums>, gang: &mut dyn Gang) -> Result<Measured> {
        let mut sums = Sums::default();
        parts.for_each(|part| sums.add(&part));
        let mut numbers = sums.numbers();
        gang.all_reduce_f64(&mut numbers, Op::Sum)?;
        Ok(Sums::of(numbers).measured())
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
