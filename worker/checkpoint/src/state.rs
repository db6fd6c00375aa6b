//! `trainer_state.json`: where a run stands and what it was made of, so that another one is not continued by mistake.

use crate::{CheckpointError, STATE_FILE};
use fleet_common::job::{LlamaConfig, Precision};
use serde::{Deserialize, Serialize};
use std::path::Path;

/// A trainer's state is a number of steps and the parameters of pure functions; no generator state, no shuffled list.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainerState {
    /// Optimizer steps done.
    pub step: u64,
    /// The cursor: epochs finished, and steps done of the one after.
    pub epoch: u64,
    pub epoch_step: u64,
    /// Where the learning-rate schedule ends, in optimizer steps.
    pub total_steps: u64,
    pub tokens_seen: u64,
    /// Training loss of the last step, in nats.
    pub loss: f64,
    /// Of the last evaluation, in nats.
    pub eval_loss: Option<f64>,

    pub seed: u64,
    /// Windows of one optimizer step, of all ranks and micro-batches.
    pub global_batch: u64,
    /// Windows of the training part.
    pub train_windows: u64,
    /// Names the token cache: data, tokenizer, window length and cleaning.
    pub cache_hash: String,
    pub tokenizer_sha256: String,
    pub model: LlamaConfig,

    pub precision: Precision,
    pub world_size: u32,
    /// Windows per rank and micro-batch.
    pub batch_size: u32,
    pub accumulate_grad_batches: u32,
    pub threads_per_rank: u32,
}

impl TrainerState {
    pub fn read(checkpoint: &Path) -> Result<TrainerState, CheckpointError> {
        let path = checkpoint.join(STATE_FILE);
        let bytes = std::fs::read(&path).map_err(|e| CheckpointError::read(&path, e))?;
        serde_json::from_slice(&bytes)
            .map_err(|e| CheckpointError::damaged(checkpoint, format!("{STATE_FILE} cannot be read: {e}")))
    }

    /// Whether a job that would start as `job` may continue from this state. Refuses what would silently train something else;
    /// returns a note for each difference that only costs the last bits.
    pub fn check_compatible(&self, job: &TrainerState) -> Result<Vec<String>, CheckpointError> {
        let refuse = |text: String| Err(CheckpointError::Incompatible(text));
        if let Some(difference) = model_difference(&self.model, &job.model) {
            return refuse(format!("{difference}; give the job the model of the checkpoint"));
        }
        if self.tokenizer_sha256 != job.tokenizer_sha256 {
            return refuse("it was trained with another tokenizer; use the checkpoint's tokenizer.json".into());
        }
        if self.cache_hash != job.cache_hash {
            return refuse(format!(
                "its data were others (files, cleaning, max_seq_len or validation share; cache {} and now {}); restore them, or \
                 start a new run from its weights with [model] pretrained",
                short(&self.cache_hash),
                short(&job.cache_hash)
            ));
        }
        let fixed = [
            ("seed", self.seed, job.seed),
            ("windows of training data", self.train_windows, job.train_windows),
            ("sequences per optimizer step", self.global_batch, job.global_batch),
        ];
        for (what, was, is) in fixed {
            if was != is {
                let cure = match what {
                    "sequences per optimizer step" => "choose ranks x batch_size x accumulate_grad_batches to give the same",
                    _ => "the order of the data hangs on it; restore it",
                };
                return refuse(format!("its {what} were {was} and the job's are {is}; {cure}"));
            }
        }
        if self.step > job.total_steps {
            return refuse(format!(
                "it has done {} steps and the job ends after {}; raise epochs or max_steps",
                self.step, job.total_steps
            ));
        }
        let mut notes = Vec::new();
        let mut note = |what: &str, was: String, is: String| {
            if was != is {
                notes.push(format!("the checkpoint was written with {what} {was}, this job has {is}: not bit for bit the same"));
            }
        };
        note("precision", format!("{:?}", self.precision), format!("{:?}", job.precision));
        note("ranks", self.world_size.to_string(), job.world_size.to_string());
        note("batch_size", self.batch_size.to_string(), job.batch_size.to_string());
        note("threads per rank", self.threads_per_rank.to_string(), job.threads_per_rank.to_string());
        note("total steps", self.total_steps.to_string(), job.total_steps.to_string());
        Ok(notes)
    }
}

/// The first field in which two models differ so that weights do not fit or mean something else.
fn model_difference(was: &LlamaConfig, is: &LlamaConfig) -> Option<String> {
    let fields = |model: &LlamaConfig| serde_json::to_value(model).expect("a model is plain data");
    let (was, is) = (fields(was), fields(is));
    let free = ["initializer_range", "bos_token_id", "eos_token_id", "max_position_embeddings"];
    was.as_object()?
        .iter()
        .find(|(name, value)| !free.contains(&name.as_str()) && is.get(name.as_str()) != Some(*value))
        .map(|(name, value)| format!("its model has {name} = {value} and the job's {}", is[name.as_str()]))
}

fn short(hash: &str) -> &str {
    hash.get(..12).unwrap_or(hash)
}
