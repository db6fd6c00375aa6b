//! Steps of ranks that share a global batch, whichever executor and strategy they have.

use fleet_learn::testing::token_ids;
use fleet_learn::{AdamW, IGNORED, Learner, Report, TokenBatch, Update, Votes};

pub const ADAMW: AdamW = AdamW { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, max_grad_norm: 1.0 };
pub const SEQ: usize = 12;

/// A rank's share of a step.
#[derive(Clone, Copy, Debug)]
pub struct Share {
    pub rank: usize,
    pub world: usize,
    pub micro_batches: usize,
    /// Of the global batch.
    pub sequences: usize,
}

/// Some targets do not count and others count more, unevenly over the sequences: the ranks' shares of the loss differ.
pub fn global_batch(sequences: usize, step: u64) -> TokenBatch {
    let ids = token_ids(sequences * SEQ, 97, step % 3);
    let mut targets = token_ids(sequences * SEQ, 97, step % 3 + 50);
    targets[..SEQ + 5].fill(IGNORED);
    let weights = (0..ids.len()).map(|at| if at % 5 == 0 { 2.0 } else { 1.0 }).collect();
    TokenBatch { ids, targets, weights: Some(weights), seq: SEQ, ..Default::default() }
}

/// The first steps of a run. Rank 1 asks for a stop in the fourth.
pub fn train(learner: &mut dyn Learner, share: Share, lr: f64, steps: u64) -> Vec<Report> {
    let Share { rank, world, micro_batches, sequences } = share;
    let size = sequences / micro_batches / world * SEQ;
    let part = |whole: &TokenBatch, micro: usize| {
        let at = micro * world + rank;
        let range = at * size..(at + 1) * size;
        TokenBatch {
            ids: whole.ids[range.clone()].to_vec(),
            targets: whole.targets[range.clone()].to_vec(),
            weights: whole.weights.as_ref().map(|weights| weights[range].to_vec()),
            seq: SEQ,
            ..Default::default()
        }
    };
    let step = |step: u64| {
        let whole = global_batch(sequences, step);
        let batches: Vec<TokenBatch> = (0..micro_batches).map(|micro| part(&whole, micro)).collect();
        let votes = Votes { stop: rank == 1 && step == 4, time: false };
        learner.step(&batches, &Update { adamw: ADAMW, lr, step }, votes).unwrap()
    };
    (1..=steps).map(step).collect()
}
