//! `trainer_state.json`: where a run stands and what it was made of, so that another one is not continued by mistake.

use crate::{CheckpointError, STATE_FILE};
use fleet_common::job::{Dpo, Optimizer, Precision, Quantization};
use fleet_common::model::{Family, Object};
use serde::{Deserialize, Serialize};
use serde_json::Value;
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
    /// Windows that those have taken, where not all of them took `global_batch`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub epoch_windows: Option<u64>,
    /// Where the learning-rate schedule ends, in optimizer steps.
    pub total_steps: u64,
    pub tokens_seen: u64,
    /// Training loss of the last step, in nats. NaN is `null` in JSON, which has no such number.
    #[serde(deserialize_with = "number_or_null")]
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
    /// What describes the model, in the words of its `config.json`.
    pub model: Object,

    pub precision: Precision,
    pub world_size: u32,
    /// Windows per rank and micro-batch.
    pub batch_size: u32,
    pub accumulate_grad_batches: u32,
    pub threads_per_rank: u32,
    /// What computed the steps, in words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub computed_by: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub optimizer: Option<Optimizer>,
    /// Where products are in fp16.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss_scale: Option<LossScale>,
    /// What describes the adapter that is trained beside the model, in the words of its `adapter_config.json`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adapter: Option<Object>,
    /// How the matrices of that model were kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quantization: Option<Quantization>,
    /// Of the weights of that model, in hex.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base_sha256: Option<String>,
    /// Of the evaluations, where the run keeps the best checkpoint.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub best: Option<Best>,
    /// Where the run ends when it gets no better.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub patience: Option<Patience>,
    /// Of a run that learns preferences.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dpo: Option<Dpo>,
    /// Where embeddings are moved at random in training.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub neftune_noise_alpha: Option<f64>,
}

/// The best loss so far.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Best {
    /// After so many steps it was found.
    pub step: u64,
    /// NaN where none was a number.
    #[serde(deserialize_with = "number_or_null")]
    pub loss: f64,
}

/// How long a run has got no better.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Patience {
    /// From which others have to differ by enough.
    pub best: Best,
    /// At worse losses since then.
    pub looks_since: u32,
}

/// By how much losses are scaled so that their gradients are numbers in fp16.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LossScale {
    pub scale: f64,
    /// Steps with numbers since it was changed.
    pub good_steps: u64,
    /// Steps of the run that had none and changed nothing.
    pub skipped: u64,
}

impl TrainerState {
    pub fn read(checkpoint: &Path) -> Result<TrainerState, CheckpointError> {
        let path = checkpoint.join(STATE_FILE);
        let bytes = std::fs::read(&path).map_err(|e| CheckpointError::read(&path, e))?;
        serde_json::from_slice(&bytes)
            .map_err(|e| CheckpointError::damaged(checkpoint, format!("{STATE_FILE} cannot be read: {e}")))
    }

    /// Windows that the steps of the epoch after `epoch` have taken.
    pub fn windows_taken(&self) -> u64 {
        self.epoch_windows.unwrap_or_else(|| self.epoch_step.saturating_mul(self.global_batch))
    }

    /// Whether a job that would start as `job` may continue from this state. Refuses what would silently train something else;
    /// returns a note for each difference that only costs the last bits. `trained`: the job's tokenizer is made of its data.
    pub fn check_compatible(
        &self,
        job: &TrainerState,
        trained: bool,
    ) -> Result<Vec<String>, CheckpointError> {
        let refuse = |text: String| Err(CheckpointError::Incompatible(text));
        if let Some(difference) = model_difference(&self.model, &job.model) {
            return refuse(format!("{difference}; give the job the model of the checkpoint"));
        }
        match (&self.adapter, &job.adapter) {
            (Some(_), None) => {
                return refuse(
                    "it is of an adapter, and the job trains the whole model; give the job its [adapter]"
                        .into(),
                );
            }
            (None, Some(_)) => {
                return refuse("it is of a whole model, and the job trains an adapter; start a new run with model.path set to it".into());
            }
            (Some(was), Some(is)) => {
                let differing = WHAT_AN_ADAPTER_IS.into_iter().find(|key| was.get(*key) != is.get(*key));
                if let Some(key) = differing {
                    let word = |adapter: &Object| adapter.get(key).cloned().unwrap_or_default();
                    return refuse(format!(
                        "its adapter has {key} = {} and the job's {}; restore it, or begin a new run, under another run_name: with adapter.path set to the checkpoint and \
                         nothing else of what an adapter is, to go on with this one, or with a new one beside a model that has this one in it (fleet adapter merge)",
                        word(was),
                        word(is)
                    ));
                }
            }
            (None, None) => {}
        }
        if let (Some(was), Some(is)) = (&self.base_sha256, &job.base_sha256)
            && was != is
        {
            return refuse(format!(
                "its base was another model than the one in model.path now (weights {} and now {}); restore it",
                short(was),
                short(is)
            ));
        }
        if self.tokenizer_sha256 != job.tokenizer_sha256 && !trained {
            return refuse(
                "it was trained with another tokenizer; use the checkpoint's tokenizer.json".into(),
            );
        }
        if (&self.cache_hash, &self.tokenizer_sha256) != (&job.cache_hash, &job.tokenizer_sha256) {
            return refuse(format!(
                "its data were others ({}; cache {} and now {}); restore them, or start a new run from its weights: {} set to it, \
                 under another run_name",
                match trained {
                    true =>
                        "files, cleaning, data.text_field, max_seq_len or data.validation_fraction: the tokenizer is made of them",
                    false =>
                        "files, cleaning, how rows are read, data.text_field, data.packing, max_seq_len or data.validation_fraction",
                },
                short(&self.cache_hash),
                short(&job.cache_hash),
                if self.adapter.is_some() { "adapter.path" } else { "model.path" }
            ));
        }
        let fixed = [
            ("seed", self.seed, job.seed, "the order of the data hangs on it; restore it"),
            ("number of training windows", self.train_windows, job.train_windows, "restore the data"),
        ];
        for (what, was, is, cure) in fixed {
            if was != is {
                return refuse(format!("its {what} was {was} and the job's is {is}; {cure}"));
            }
        }
        if self.step > job.total_steps {
            return refuse(format!(
                "it has done {} steps, more than this job's epochs or max_steps are; raise them",
                self.step
            ));
        }
        let mut notes: Vec<String> = self.precision_note(job.precision).into_iter().collect();
        if self.global_batch != job.global_batch {
            notes.push(format!(
                "the checkpoint's steps took {} sequences each, those of this job take {}: it goes on behind the sequences that were taken, \
                 and ends after {} steps in all",
                self.global_batch, job.global_batch, job.total_steps
            ));
        }
        let mut note = |what: &str, was: String, is: String| {
            if was != is {
                notes.push(format!("the checkpoint was written with {what} {was}, this job has {is}: not bit for bit the same"));
            }
        };
        note("ranks", self.world_size.to_string(), job.world_size.to_string());
        note("batch_size", self.batch_size.to_string(), job.batch_size.to_string());
        note("threads per rank", self.threads_per_rank.to_string(), job.threads_per_rank.to_string());
        note("total steps", self.total_steps.to_string(), job.total_steps.to_string());
        if let (Some(was), Some(is)) = (&self.computed_by, &job.computed_by) {
            note("steps computed by", was.clone(), is.clone());
        }
        let dropout = |state: &TrainerState| {
            state.adapter.as_ref().and_then(|adapter| adapter.get("lora_dropout").cloned())
        };
        if let (Some(was), Some(is)) = (dropout(self), dropout(job))
            && was != is
        {
            notes.push(format!("from here on adapter.dropout is {is}, and was {was}"));
        }
        if self.neftune_noise_alpha != job.neftune_noise_alpha {
            let word = |alpha: Option<f64>| alpha.map_or("left out".to_owned(), |alpha| alpha.to_string());
            let (is, was) = (word(job.neftune_noise_alpha), word(self.neftune_noise_alpha));
            notes.push(format!("from here on neftune_noise_alpha is {is}, and was {was}"));
        }
        if self.quantization != job.quantization {
            let word = |quantization: Option<Quantization>| quantization.map_or("none", Quantization::name);
            let (is, was) = (word(job.quantization), word(self.quantization));
            notes.push(format!("from here on quantization is {is}, and was {was}: the model beside the adapter computes something else"));
        }
        match (&self.dpo, &job.dpo) {
            (Some(_), None) => notes.push("from here on rows are learnt as instructions, and were as preferences".into()),
            (None, Some(_)) => notes.push("from here on preferences are learnt, and instructions or texts were".into()),
            (Some(was), Some(is)) if was.ref_model != is.ref_model => notes.push(
                "dpo.ref_model is another one now and is not read: with what the model is compared stands in the checkpoint; begin a new run for another".into(),
            ),
            _ => {}
        }
        notes.extend(changed("dpo", &self.dpo, &job.dpo, &["ref_model", "precompute_ref_log_probs"]));
        notes.extend(changed("optimizer", &self.optimizer, &job.optimizer, &[]));
        Ok(notes)
    }

    /// Whether its losses are of the same kind as those of `job`.
    pub fn has_losses_of(&self, job: &TrainerState) -> bool {
        let kind = |state: &TrainerState| {
            state.dpo.as_ref().map(|dpo| (dpo.beta, dpo.loss_type, dpo.label_smoothing))
        };
        kind(self) == kind(job)
    }

    /// What a job of another precision makes of the checkpoint's numbers.
    fn precision_note(&self, job: Precision) -> Option<String> {
        let what = match (self.precision, job) {
            (was, is) if was == is => return None,
            (Precision::Bf16True, _) => "weights and moments are widened from bf16 to fp32 as they are read",
            (_, Precision::Bf16True) => "weights and moments are rounded from fp32 to bf16 as they are read",
            _ => "not bit for bit the same",
        };
        let (was, is) = (word(self.precision), word(job));
        Some(format!("the checkpoint was written with precision {was}, this job has {is}: {what}"))
    }
}

/// As a job file has it.
fn word(precision: Precision) -> String {
    serde_json::to_value(precision).ok().and_then(|word| word.as_str().map(str::to_owned)).unwrap_or_default()
}

/// Of each setting of a table that is another one from here on, but of those in `silent`.
fn changed<T: Serialize>(table: &str, was: &Option<T>, is: &Option<T>, silent: &[&str]) -> Vec<String> {
    let settings = |table: &Option<T>| match serde_json::to_value(table) {
        Ok(Value::Object(settings)) => settings,
        _ => Object::new(),
    };
    let (was, is) = (settings(was), settings(is));
    let changed = was.iter().filter(|(key, _)| !silent.contains(&key.as_str()));
    let changed = changed.filter_map(|(key, was)| Some((key, was, is.get(key).filter(|is| *is != was)?)));
    let word = |value: &Value| if value.is_null() { "left out".to_owned() } else { value.to_string() };
    changed
        .map(|(key, was, is)| format!("from here on {table}.{key} is {}, and was {}", word(is), word(was)))
        .collect()
}

fn number_or_null<'de, D: serde::Deserializer<'de>>(from: D) -> Result<f64, D::Error> {
    Ok(Option::<f64>::deserialize(from)?.unwrap_or(f64::NAN))
}

/// Keys of an `adapter_config.json` that say which numbers there are, and what they mean.
const WHAT_AN_ADAPTER_IS: [&str; 9] = [
    "peft_type",
    "r",
    "lora_alpha",
    "use_rslora",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "modules_to_save",
    "bias",
];

/// The first key in which two models differ so that weights do not fit or mean something else.
fn model_difference(was: &Object, is: &Object) -> Option<String> {
    let (was, is) = (described(was), described(is));
    let free = ["initializer_range", "init_std", "max_position_embeddings", "bos_token_id", "eos_token_id"];
    let family = "model_type".to_owned();
    let keys =
        [&family].into_iter().chain(is.keys()).chain(was.keys()).filter(|key| !free.contains(&key.as_str()));
    let value = |object: &Object, key: &str| object.get(key).cloned().unwrap_or_default();
    let mut differing = keys.filter(|key| was.get(*key) != is.get(*key));
    differing
        .next()
        .map(|key| format!("its model has {key} = {} and the job's {}", value(&was, key), value(&is, key)))
}

/// All that describes a model, also what its configuration leaves to be understood. Older states are of Llamas, and do not say so.
fn described(model: &Object) -> Object {
    let mut model = model.clone();
    model.entry("model_type").or_insert_with(|| "llama".into());
    match Family::of_config(&model) {
        Ok((family, decoder)) => {
            let mut all = (family.write)(&decoder);
            all.insert("model_type".into(), family.model_type.into());
            all
        }
        Err(_) => model,
    }
}

fn short(hash: &str) -> &str {
    hash.get(..12).unwrap_or(hash)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state() -> TrainerState {
        let model = r#"{"vocab_size":300,"hidden_size":8,"intermediate_size":16,"num_hidden_layers":1,"num_attention_heads":2,
            "num_key_value_heads":1,"head_dim":4,"max_position_embeddings":32,"rms_norm_eps":1e-5,"rope_theta":10000.0,
            "tie_word_embeddings":true,"initializer_range":0.02,"bos_token_id":null,"eos_token_id":0}"#;
        TrainerState {
            step: 10,
            epoch: 1,
            epoch_step: 2,
            epoch_windows: None,
            total_steps: 40,
            tokens_seen: 1000,
            loss: 3.25,
            eval_loss: None,
            seed: 1,
            global_batch: 8,
            train_windows: 64,
            cache_hash: "0123456789abcdef".into(),
            tokenizer_sha256: "ff".into(),
            model: serde_json::from_str(model).unwrap(),
            precision: Precision::Fp32,
            world_size: 4,
            batch_size: 2,
            accumulate_grad_batches: 1,
            threads_per_rank: 1,
            computed_by: None,
            optimizer: None,
            loss_scale: None,
            adapter: None,
            quantization: None,
            base_sha256: None,
            best: None,
            patience: None,
            dpo: None,
            neftune_noise_alpha: None,
        }
    }

    /// As checkpoints on users' disks have it.
    #[test]
    fn the_layout_on_disk_never_changes() {
        let written = serde_json::to_value(state()).unwrap();
        let names: Vec<&str> = written.as_object().unwrap().keys().map(String::as_str).collect();
        let expected = "step epoch epoch_step total_steps tokens_seen loss eval_loss seed global_batch train_windows cache_hash \
                        tokenizer_sha256 model precision world_size batch_size accumulate_grad_batches threads_per_rank";
        assert_eq!(names, expected.split_whitespace().collect::<Vec<_>>());
        assert_eq!(written["precision"], "32");
        let scale = LossScale { scale: 1024.0, good_steps: 7, skipped: 6 };
        let scaled = TrainerState { loss_scale: Some(scale), ..state() };
        let written = serde_json::to_value(&scaled).unwrap();
        assert_eq!(
            written["loss_scale"],
            serde_json::json!({"scale": 1024.0, "good_steps": 7, "skipped": 6})
        );
        assert_eq!(serde_json::from_value::<TrainerState>(written).unwrap(), scaled);
    }

    fn refusal(change: impl Fn(&mut TrainerState)) -> String {
        let mut job = state();
        change(&mut job);
        state().check_compatible(&job, false).unwrap_err().to_string()
    }

    #[test]
    fn another_model_tokenizer_or_order_is_refused_by_name() {
        assert!(
            refusal(|j| drop(j.model.insert("hidden_size".into(), 16.into())))
                .contains("hidden_size = 8 and the job's 16")
        );
        assert!(
            refusal(|j| drop(j.model.insert("tie_word_embeddings".into(), false.into())))
                .contains("tie_word_embeddings")
        );
        assert!(refusal(|j| j.tokenizer_sha256 = "ee".into()).contains("another tokenizer"));
        assert!(
            refusal(|j| j.cache_hash = "fedcba9876543210".into())
                .contains("cache 0123456789ab and now fedcba987654")
        );
        assert!(refusal(|j| j.seed = 2).contains("its seed was 1 and the job's is 2"));
        assert!(refusal(|j| j.train_windows = 63).contains("restore the data"));
        assert!(refusal(|j| j.total_steps = 9).contains("has done 10 steps, more than"));
    }

    #[test]
    fn an_adapter_of_another_rank_is_refused_with_what_can_be_done() {
        let with = |r: u32| {
            let adapter = [("r".to_owned(), r.into())].into_iter().collect();
            TrainerState { adapter: Some(adapter), ..state() }
        };
        let said = with(8).check_compatible(&with(16), false).unwrap_err().to_string();
        for what in [
            "r = 8 and the job's 16",
            "restore it",
            "nothing else of what an adapter is",
            "fleet adapter merge",
        ] {
            assert!(said.contains(what), "{said}");
        }
        assert!(with(8).check_compatible(&with(8), false).is_ok());
    }

    #[test]
    fn a_tokenizer_that_is_made_of_the_data_is_no_cause_of_its_own() {
        let job = TrainerState { tokenizer_sha256: "ee".into(), cache_hash: "fedc".into(), ..state() };
        let said = |trained| state().check_compatible(&job, trained).unwrap_err().to_string();
        assert!(
            said(true).contains("its data were others") && said(true).contains("validation_fraction"),
            "{}",
            said(true)
        );
        assert!(!said(true).contains("another tokenizer") && said(false).contains("another tokenizer"));
    }

    #[test]
    fn what_only_costs_the_last_bits_is_noted() {
        assert_eq!(state().check_compatible(&state(), false).unwrap(), [] as [String; 0]);
        let mut job = state();
        (job.world_size, job.batch_size) = (2, 4);
        job.model.remove("eos_token_id");
        job.model.insert("rope_parameters".into(), serde_json::json!({"rope_theta": 1e4})); // as it is written today
        let notes = state().check_compatible(&job, false).unwrap();
        assert_eq!(notes.len(), 2);
        assert!(notes[0].contains("ranks 4, this job has 2"), "{notes:?}");
    }

    #[test]
    fn another_executor_and_another_learning_rate_are_noted_where_the_checkpoint_tells_them() {
        let optimizer = Optimizer {
            learning_rate: 5e-4,
            schedule: fleet_common::job::Schedule::Cosine,
            warmup_steps: None,
            min_lr_ratio: 0.0,
            weight_decay: 0.01,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            max_grad_norm: 1.0,
        };
        let is = Optimizer { learning_rate: 1e-3, warmup_steps: Some(5), ..optimizer.clone() };
        let of = |by: &str, optimizer| TrainerState {
            computed_by: Some(by.into()),
            optimizer: Some(optimizer),
            ..state()
        };
        let notes =
            of("cpu", optimizer.clone()).check_compatible(&of("torch on cpu", is.clone()), false).unwrap();
        assert_eq!(notes.len(), 3, "{notes:?}");
        assert!(
            notes[0].contains("computed by cpu, this job has torch on cpu: not bit for bit"),
            "{notes:?}"
        );
        assert_eq!(notes[1], "from here on optimizer.learning_rate is 0.001, and was 0.0005");
        assert_eq!(notes[2], "from here on optimizer.warmup_steps is 5, and was left out");
        assert_eq!(state().check_compatible(&of("cpu", is), false).unwrap(), [] as [String; 0]);
    }

    #[test]
    fn batches_of_another_size_are_told_and_the_place_in_the_data_counts_sequences() {
        let job = TrainerState { global_batch: 12, total_steps: 31, ..state() };
        let notes = state().check_compatible(&job, false).unwrap();
        assert!(notes[0].contains("took 8 sequences each, those of this job take 12"), "{notes:?}");
        assert_eq!((state().windows_taken(), job.windows_taken()), (16, 24));
        assert_eq!(TrainerState { epoch_windows: Some(28), ..job }.windows_taken(), 28);
    }

    #[test]
    fn a_state_reads_back_and_a_loss_that_is_no_number_does_not_spoil_it() {
        let dir = tempfile::tempdir().unwrap();
        for loss in [3.25, f64::NAN, f64::INFINITY] {
            let state = TrainerState { loss, ..state() };
            std::fs::write(dir.path().join(STATE_FILE), serde_json::to_vec(&state).unwrap()).unwrap();
            let back = TrainerState::read(dir.path()).unwrap();
            assert_eq!(back.loss.to_bits(), if loss.is_finite() { loss } else { f64::NAN }.to_bits());
            assert_eq!(TrainerState { loss: 0.0, ..back }, TrainerState { loss: 0.0, ..state });
        }
    }
}
