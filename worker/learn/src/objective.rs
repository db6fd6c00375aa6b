//! What a run is trained for: which tokens of its items are to be predicted, and how much each of them counts. The loss of a step is the
//! weighted sum over all ranks and micro-batches, divided by what all targets of the step count together.

use crate::batch::{IGNORED, TokenBatch};
use crate::engine::Learner;
use crate::error::Result;
use crate::executor::Tally;
use fleet_collectives::Gang;
use fleet_data::{Item, Windows};

pub trait Objective {
    /// The items with these numbers, as the model takes them. `noise` is of each sequence a number that no other one of the data has.
    fn batch(&self, items: &Windows, indices: &mut dyn Iterator<Item = u64>) -> TokenBatch;

    /// Readies a step of these batches, of which it says what they count together: who weighs their targets, where what these count hangs on the
    /// model as it is. A collective call.
    fn weighing<'a>(
        &'a self,
        _learner: &mut dyn Learner,
        _batches: &mut [TokenBatch],
    ) -> Result<Option<Box<dyn Weighing + 'a>>> {
        Ok(None)
    }

    /// Of the batches of all ranks. A collective call.
    fn evaluate(&self, learner: &mut dyn Learner, batches: &[TokenBatch]) -> Result<Measured> {
        let tally = learner.evaluate(batches)?;
        let accuracy = tally.hits as f64 / tally.tokens.max(1) as f64;
        Ok(Measured { loss: tally.mean(), tally, metrics: vec![("mean_token_accuracy", accuracy)] })
    }
}

/// Weighs the targets of a step's batches, as soon as their losses are known.
pub trait Weighing: Send {
    /// For the summed losses of the sequences of batch `number`, `[b]`: what each of their targets counts, `[b]`. A batch that is asked for again
    /// counts once.
    fn weigh(&mut self, number: usize, losses: &[f64]) -> Vec<f64>;
    /// What was found of the batches of all ranks, after the step. A collective call.
    fn measured(&self, gang: &mut dyn Gang) -> Result<Measured>;
}

/// What was found of batches of all ranks.
#[derive(Clone, Debug)]
pub struct Measured {
    /// The mean of what is trained for.
    pub loss: f64,
    /// Of the tokens that are predicted.
    pub tally: Tally,
    /// What else was found, by TRL's names.
    pub metrics: Vec<(&'static str, f64)>,
}

/// Sequences of one item at most, for numbers that are of one sequence.
const SEQUENCES_MAX: u64 = 1 << 20;

/// Every token that is learnt is predicted from those before it in its sequence, and all count the same: training from scratch on windows of
/// text, and supervised fine-tuning (SFT) on rows.
pub struct NextToken;

impl Objective for NextToken {
    fn batch(&self, items: &Windows, indices: &mut dyn Iterator<Item = u64>) -> TokenBatch {
        let (mut item, mut noise, mut numbers) = (Item::default(), Vec::new(), Vec::new());
        for index in indices {
            numbers.push(index);
            let before = item.lengths.len();
            items.append(index, &mut item);
            let sequences = (item.lengths.len() - before) as u64;
            noise.extend((0..sequences).map(|number| index * SEQUENCES_MAX + number));
        }
        TokenBatch { items: numbers, ..next_tokens(&item, noise) }
    }
}

fn next_tokens(item: &Item, noise: Vec<u64>) -> TokenBatch {
    let first = item.lengths.first().copied();
    let equal = first.filter(|first| *first > 1 && item.lengths.iter().all(|length| length == first));
    if let Some(window) = equal.filter(|_| item.learnt.iter().all(|learnt| *learnt)) {
        return TokenBatch { noise: Some(noise), ..TokenBatch::of_windows(&item.ids, window) };
    }
    let (mut at, mut sequences, mut of_sequences) = (0, Vec::new(), Vec::new());
    for (length, noise) in item.lengths.iter().zip(noise) {
        let (ids, learnt) = (&item.ids[at..at + length], &item.learnt[at..at + length]);
        at += length;
        let targets = ids.iter().zip(learnt).skip(1);
        let targets: Vec<i64> = targets.map(|(id, learnt)| if *learnt { *id } else { IGNORED }).collect();
        if !targets.is_empty() {
            sequences.push((&ids[..targets.len()], targets));
            of_sequences.push(noise);
        }
    }
    if sequences.is_empty() {
        return TokenBatch::nothing();
    }
    let batch = TokenBatch::of_sequences(sequences.iter().map(|(ids, targets)| (*ids, &targets[..])));
    TokenBatch { noise: Some(of_sequences), ..batch }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_learnt_is_read_and_not_predicted() {
        let item = Item {
            lengths: vec![4, 1, 2],
            ids: vec![1, 2, 3, 4, 5, 6, 7],
            learnt: vec![false, false, true, true, true, true, false],
        };
        let batch = next_tokens(&item, vec![8, 9, 10]);
        assert_eq!(batch.ids, [1, 2, 3, 6]);
        assert_eq!(batch.targets, [IGNORED, 3, 4, IGNORED]);
        assert_eq!((batch.lengths, batch.noise), (Some(vec![3, 1]), Some(vec![8, 10])));
        let short = Item { lengths: vec![1], ids: vec![1], learnt: vec![true] };
        assert_eq!(next_tokens(&short, vec![0]), TokenBatch::nothing());
    }

    #[test]
    fn windows_are_a_rectangle() {
        let item = Item { lengths: vec![2, 2], ids: vec![1, 2, 3, 4], learnt: vec![true; 4] };
        let batch = next_tokens(&item, vec![0, 1]);
        assert_eq!((batch.ids, batch.targets, batch.seq, batch.lengths), (vec![1, 3], vec![2, 4], 1, None));
    }
}
