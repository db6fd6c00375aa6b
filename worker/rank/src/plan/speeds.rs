//! How fast this machine computes a model's units: measured, by all ranks of a node at once. What it is busy with otherwise counts, as it will in
//! the run.

use crate::assemble::{self, Threads};
use fleet_common::job::{Executor, Job, Precision};
use fleet_common::model::Decoder;
use fleet_kernels as kernels;
use fleet_learn::model::Model;
use fleet_learn::{AdamW, Error, Phase, Result, TokenBatch, Update, Votes};
use std::time::{Duration, Instant};

/// Blocks of the model that is measured.
const BLOCKS: usize = 2;
/// Steps that are timed, after one that is not: so many at least, and more until it has taken so long. Where a step takes longer than
/// `LONG`, the first one has to do.
const STEPS_MIN: usize = 3;
const STEPS_MAX: usize = 15;
const ENOUGH: Duration = Duration::from_millis(1500);
const LONG: Duration = Duration::from_secs(10);
/// Tokens of a micro-batch that is timed: what longer ones take follows from it by their floating-point operations.
const TOKENS: usize = 1 << 12;
/// Numbers with which the optimizer and the sum of gradients are timed.
const SAMPLE: usize = 1 << 21;

/// What the ranks of one node do.
pub(super) struct Run<'a> {
    pub job: &'a Job,
    pub model: Model,
    pub ranks: usize,
    /// Of each.
    pub threads: u32,
}

/// Seconds, with all ranks at work.
pub(super) struct Speeds {
    /// Of one block and one micro-batch.
    pub forward: f64,
    pub backward: f64,
    /// Forward and backward of everything else.
    pub edges: f64,
    /// Of the optimizer, for each number.
    pub update: f64,
    /// Of adding up gradients, for each number.
    pub add: f64,
}

impl Run<'_> {
    pub fn speeds(&self, executor: Executor, precision: Precision) -> Result<Speeds> {
        let [update, add] = self.per_number()?;
        let [forward, backward, edges] = self.units(executor, precision)?;
        Ok(Speeds { forward, backward, edges, update, add })
    }

    /// Seconds of a block's forward, of its backward, and of all other units, for the micro-batches of the job.
    fn units(&self, executor: Executor, precision: Precision) -> Result<[f64; 3]> {
        let seq = self.job.max_seq_len as usize - 1;
        let all = self.job.batch_size as usize;
        // Threads share sequences out.
        let batch = all.min((TOKENS / seq).max(self.threads as usize));
        let timed = seq.min(TOKENS);
        let [forward, backward, edges] = self.units_of(executor, precision, batch, timed)?;
        let times = seq as f64 / timed as f64 * all as f64 / batch as f64;
        let of_blocks =
            times * block_flops(&self.model.decoder, seq) / block_flops(&self.model.decoder, timed);
        Ok([forward * of_blocks, backward * of_blocks, edges * times])
    }

    fn units_of(
        &self,
        executor: Executor,
        precision: Precision,
        batch: usize,
        seq: usize,
    ) -> Result<[f64; 3]> {
        let mut model = self.model.clone();
        let blocks = model.decoder.layers.min(BLOCKS);
        model.decoder.layers = blocks;
        model.decoder.attention.windows.truncate(blocks);
        let again = self.job.activation_checkpointing.of(blocks);
        let vocab = model.decoder.vocab_size as i64;
        let tokens = seq * batch;
        let ids: Vec<i64> = (0..=tokens as i64).map(|i| (i * i + 7 * i) % vocab).collect();
        self.at_once(|| {
            let threads = Threads { count: self.threads, again };
            let mut engine = assemble::alone(executor, precision, &model, threads, seq)?;
            engine.fresh_weights(0)?;
            let batch = [TokenBatch {
                ids: ids[..tokens].to_vec(),
                targets: ids[1..].to_vec(),
                seq,
                ..Default::default()
            }];
            let adamw = AdamW::from(&self.job.optimizer);
            let watch = engine.watch().clone();
            timed(|step| {
                watch.begin_trace();
                engine.step(&batch, &Update { adamw, lr: 1e-5, step }, Votes::default())?;
                watch.switch(Phase::Other);
                let mut parts = [0.0; 3];
                for (doing, seconds) in watch.take_trace() {
                    let is_block = doing.unit.is_some_and(|unit| (1..=blocks).contains(&unit));
                    match doing.phase {
                        Phase::Forward if is_block => parts[0] += seconds / blocks as f64,
                        Phase::Backward if is_block => parts[1] += seconds / blocks as f64,
                        Phase::Forward | Phase::Backward => parts[2] += seconds,
                        _ => {}
                    }
                }
                Ok(parts)
            })
        })
    }

    /// Seconds for each number of an optimizer's step, and of adding gradients up.
    fn per_number(&self) -> Result<[f64; 2]> {
        let adamw = kernels::AdamWStep {
            lr: 1e-3,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            weight_decay: 0.1,
            step: 1,
            grad_scale: 1.0,
        };
        let [update, add] = self.at_once(|| {
            let [mut p, mut g, mut m, mut v] = std::array::from_fn(|_| vec![0.5; SAMPLE]);
            timed(|_| {
                let began = Instant::now();
                kernels::adamw(&adamw, &mut p, &g, &mut m, &mut v, None);
                let updated = Instant::now();
                kernels::add(&mut g, m.as_slice());
                let times = [updated - began, updated.elapsed()];
                Ok(times.map(|time| time.as_secs_f64() / SAMPLE as f64))
            })
        })?;
        Ok([update / f64::from(self.threads), add])
    }

    /// The longest times of all ranks, which work at once; where there are more than cores, of as many as these keep busy, which the
    /// others take turns with.
    fn at_once<const N: usize>(&self, work: impl Fn() -> Result<[f64; N]> + Sync) -> Result<[f64; N]> {
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
        let together = self.ranks.min((cores / self.threads as usize).max(1));
        let longest = std::thread::scope(|scope| {
            let ranks: Vec<_> = (0..together).map(|_| scope.spawn(&work)).collect();
            ranks.into_iter().try_fold([0.0; N], |longest, rank| {
                let times = rank.join().map_err(|_| Error::Job("a rank of the plan panicked".into()))??;
                Ok::<_, Error>(std::array::from_fn(|at| f64::max(longest[at], times[at])))
            })
        })?;
        Ok(longest.map(|time| time * self.ranks as f64 / together as f64))
    }
}

/// Floating-point operations of one block for each token of a sequence of `seq`.
fn block_flops(decoder: &Decoder, seq: usize) -> f64 {
    let of = |layers| Decoder { layers, ..decoder.clone() }.flops_per_token(seq);
    of(1) - of(0)
}

/// The medians of what several steps, counted from 1, tell.
fn timed<const N: usize>(mut step: impl FnMut(u64) -> Result<[f64; N]>) -> Result<[f64; N]> {
    let began = Instant::now();
    let first = step(1)?;
    if began.elapsed() > LONG {
        return Ok(first);
    }
    let began = Instant::now();
    let mut all = Vec::new();
    while all.len() < STEPS_MIN || all.len() < STEPS_MAX && began.elapsed() < ENOUGH {
        all.push(step(all.len() as u64 + 2)?);
    }
    Ok(std::array::from_fn(|at| median(all.iter().map(|times| times[at]).collect())))
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attention_makes_tokens_of_longer_sequences_cost_more() {
        let config = serde_json::json!({
            "model_type": "llama", "vocab_size": 300, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
            "rope_theta": 1e4, "tie_word_embeddings": true,
        });
        let model = Model::new(config.as_object().expect("an object")).expect("a model");
        let of = |seq| block_flops(&model.decoder, seq);
        let (short, long) = (of(1), of(1_000_001));
        assert!((long - short - 6.0 * 64.0 * 1e6).abs() < 1.0, "{short} {long}");
    }
}
