//! How long, how fast and in which steps is trained.

use crate::LoraConfig;
use fleet_common::job::{Dpo, EarlyStopping, Schedule};
use serde_json::{Map, Value};
use std::path::PathBuf;

/// Settings of a run. `AdamW` updates, in the rhythm of `schedule`.
///
/// ```
/// use fleet_tune::TrainingConfig;
///
/// let mut config = TrainingConfig::default();
/// assert_eq!(config.effective_batch_size(), 8);
/// config.optimize_for_dataset_size(100);
/// assert_eq!((config.num_train_epochs, config.max_steps), (3, 50));
/// config.set("data.packing", true); // any key of a job file
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct TrainingConfig {
    /// Where checkpoints, token caches and saved adapters lie.
    pub output_dir: PathBuf,
    /// Of the run, whose files are called so, with a number where that is taken; `None`: what it learns.
    pub run_name: Option<String>,
    /// Passes over the data, where `max_steps` is 0.
    pub num_train_epochs: u32,
    /// Sequences that are computed at once.
    pub per_device_train_batch_size: u32,
    /// So many times in each step.
    pub gradient_accumulation_steps: u32,
    /// The highest.
    pub learning_rate: f64,
    /// Cosine, linear or constant, behind a warm-up.
    pub schedule: Schedule,
    /// Optimizer steps; above 0 it wins over epochs.
    pub max_steps: u64,
    /// Steps in which the rate rises from 0; where there are more than the run has, a tenth of that. `None`: 50, and at most a tenth of the run.
    pub warmup_steps: Option<u64>,
    /// A step is told every so many.
    pub logging_steps: u64,
    /// A checkpoint is written every so many steps, and at the end.
    pub save_steps: u64,
    /// So many newest checkpoints stay.
    pub save_total_limit: u32,
    /// Tokens of a sequence. What is longer is cut, or, of plain text, goes on in the next.
    pub max_seq_len: u32,
    /// Share of the data that is held out and evaluated, before the first step and at the end.
    pub validation_fraction: f64,
    /// Ends the run when it gets no better.
    pub early_stopping: Option<EarlyStopping>,
    /// Further keys of a job file, which `set` sets.
    pub further: Map<String, Value>,
}

impl Default for TrainingConfig {
    fn default() -> TrainingConfig {
        TrainingConfig {
            output_dir: "./fine_tuned_model".into(),
            run_name: None,
            num_train_epochs: 1,
            per_device_train_batch_size: 1,
            gradient_accumulation_steps: 8,
            learning_rate: 2e-4,
            schedule: Schedule::Cosine,
            max_steps: 500,
            warmup_steps: Some(50),
            logging_steps: 10,
            save_steps: 250,
            save_total_limit: 2,
            max_seq_len: 256,
            validation_fraction: 0.05,
            early_stopping: None,
            further: Map::new(),
        }
    }
}

impl TrainingConfig {
    /// Sequences of an optimizer step.
    pub fn effective_batch_size(&self) -> u64 {
        u64::from(self.per_device_train_batch_size) * u64::from(self.gradient_accumulation_steps)
    }

    /// More passes over few rows, fewer steps over many; from 1,000 to 10,000 rows nothing changes.
    pub fn optimize_for_dataset_size(&mut self, rows: u64) {
        let (epochs, steps) = match rows {
            ..1_000 => (3, (rows / 2).min(500)),
            10_001.. => (1, (rows / 10).min(2000)),
            _ => return,
        };
        (self.num_train_epochs, self.max_steps) = (epochs, steps.max(1));
    }

    /// Sets a key of a job file, such as `quantization` or `adapter.use_dora`, that has no field here. Keys and values are looked at when the
    /// trainer begins.
    pub fn set(&mut self, key: &str, value: impl Into<Value>) -> &mut TrainingConfig {
        self.further.insert(key.to_owned(), value.into());
        self
    }
}

/// Of a trainer of texts and rows.
#[derive(Clone, Debug, PartialEq)]
pub struct SftConfig {
    pub training: TrainingConfig,
    pub lora: LoraConfig,
}

impl Default for SftConfig {
    /// Three epochs of steps of four rows.
    fn default() -> SftConfig {
        let training = TrainingConfig {
            learning_rate: 3e-4,
            num_train_epochs: 3,
            max_steps: 0,
            per_device_train_batch_size: 4,
            gradient_accumulation_steps: 1,
            warmup_steps: None,
            ..TrainingConfig::default()
        };
        SftConfig { training, lora: LoraConfig::default() }
    }
}

/// Of a trainer of preferences.
#[derive(Clone, Debug, PartialEq)]
pub struct DpoConfig {
    pub training: TrainingConfig,
    pub lora: LoraConfig,
    pub dpo: Dpo,
}

impl Default for DpoConfig {
    /// A hundred steps of two pairs; a rate that suits a long run. The adapter sees all of its inputs, so that it begins as its reference is.
    fn default() -> DpoConfig {
        let training = TrainingConfig {
            learning_rate: 5e-7,
            max_steps: 100,
            per_device_train_batch_size: 2,
            gradient_accumulation_steps: 1,
            warmup_steps: None,
            validation_fraction: 0.1,
            ..TrainingConfig::default()
        };
        let lora = LoraConfig { lora_dropout: 0.0, ..LoraConfig::default() };
        DpoConfig { training, lora, dpo: Dpo::default() }
    }
}

impl DpoConfig {
    /// The smallest adapter that there is, of rank 1. Its reference is the model without it.
    pub fn rank_1() -> DpoConfig {
        let usual = DpoConfig::default();
        DpoConfig { lora: LoraConfig { r: 1, lora_alpha: 2.0, ..usual.lora.clone() }, ..usual }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_nobody_says_is_known() {
        let usual = TrainingConfig::default();
        assert_eq!(usual.output_dir, PathBuf::from("./fine_tuned_model"));
        assert_eq!((usual.num_train_epochs, usual.max_steps, usual.warmup_steps), (1, 500, Some(50)));
        assert_eq!((usual.per_device_train_batch_size, usual.gradient_accumulation_steps), (1, 8));
        assert_eq!((usual.learning_rate, usual.effective_batch_size()), (2e-4, 8));
        assert_eq!((usual.logging_steps, usual.save_steps, usual.save_total_limit), (10, 250, 2));
        assert_eq!(usual.validation_fraction, 0.05);

        let SftConfig { training: sft, lora } = SftConfig::default();
        assert_eq!((sft.learning_rate, sft.num_train_epochs, sft.max_steps), (3e-4, 3, 0));
        assert_eq!((sft.per_device_train_batch_size, lora.r, lora.lora_alpha), (4, 8, 16.0));

        let DpoConfig { training: pairs, dpo, lora } = DpoConfig::default();
        assert_eq!((pairs.learning_rate, pairs.max_steps, pairs.per_device_train_batch_size), (5e-7, 100, 2));
        assert_eq!((dpo.beta, lora.lora_dropout, DpoConfig::rank_1().lora.r), (0.1, 0.0, 1));
    }

    #[test]
    fn the_length_of_a_run_follows_the_rows() {
        let of = |rows| {
            let mut config = TrainingConfig::default();
            config.optimize_for_dataset_size(rows);
            (config.num_train_epochs, config.max_steps)
        };
        assert_eq!([of(0), of(1), of(999)], [(3, 1), (3, 1), (3, 499)]);
        assert_eq!([of(1_000), of(10_000)], [(1, 500), (1, 500)]);
        assert_eq!([of(10_001), of(1_000_000)], [(1, 1000), (1, 2000)]);
    }
}
