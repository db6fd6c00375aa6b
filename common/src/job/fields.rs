//! The names: every setting with all its spellings, those of other tools that belong to later versions, and the flat view of a
//! job file in which each setting has one name and one value.

use super::elsewhere;
use super::error::JobFileError;
use super::suggest::nearest;
use super::value::{Kind, Place, Value};
use std::collections::BTreeMap;

/// Tables of a job file; their keys are named `table.key`.
const TABLES: [&str; 7] = ["model", "tokenizer", "data", "data.clean", "optimizer", "checkpoint", "eval"];

/// Each setting: the name under which the parser asks for it, then its other spellings, which PyTorch Lightning, Hugging Face and older
/// tools use. A dotted name is a key in a table.
#[rustfmt::skip]
pub(super) const SETTINGS: &[&[&str]] = &[
    &["task_name"],
    &["run_name"],
    &["output_dir"],
    &["seed"],
    &["strategy"],
    &["devices"],
    &["num_nodes"],
    &["device"],
    &["use_gpu"],
    &["executor"],
    &["precision", "dtype"],
    &["use_amp"],
    &["batch_size", "per_device_train_batch_size", "per_device_batch_size"],
    &["accumulate_grad_batches", "gradient_accumulation_steps"],
    &["max_seq_len", "max_seq_length"],
    &["epochs", "num_train_epochs", "num_epochs"],
    &["max_steps"],
    &["logging_steps"],
    &["log_to_db"],
    &["max_time_s"],
    &["threads_per_rank"],

    &["vocab_size", "model.vocab_size", "tokenizer.vocab_size"],
    &["model.path"],
    &["model.hidden_size"],
    &["model.intermediate_size"],
    &["model.num_hidden_layers"],
    &["model.num_attention_heads"],
    &["model.num_key_value_heads"],
    &["model.head_dim"],
    &["model.max_position_embeddings"],
    &["model.rms_norm_eps"],
    &["model.rope_theta"],
    &["model.tie_word_embeddings"],
    &["model.initializer_range"],
    &["model.bos_token_id"],
    &["model.eos_token_id"],
    &["model.model_type"],
    &["model.architectures"],
    &["model.hidden_act"],
    &["model.attention_bias"],
    &["model.mlp_bias"],
    &["model.attention_dropout"],
    &["model.rope_scaling"],

    &["tokenizer.path"],

    &["data.path", "data.paths"],
    &["data.include"],
    &["data.exclude"],
    &["data.text_field"],
    &["data.validation_fraction"],
    &["data.clean.remove_html", "data.remove_html"],
    &["data.clean.normalize_whitespace", "data.normalize_whitespace"],
    &["data.clean.min_chars", "data.min_chars"],

    &["optimizer.learning_rate", "learning_rate", "lr", "optimizer.lr"],
    &["optimizer.schedule", "lr_scheduler_type", "optimizer.lr_scheduler_type"],
    &["optimizer.warmup_steps", "warmup_steps"],
    &["optimizer.min_lr_ratio", "min_lr_ratio"],
    &["optimizer.weight_decay", "weight_decay"],
    &["optimizer.beta1", "adam_beta1", "optimizer.adam_beta1"],
    &["optimizer.beta2", "adam_beta2", "optimizer.adam_beta2"],
    &["optimizer.eps", "adam_epsilon", "optimizer.adam_epsilon"],
    &["optimizer.max_grad_norm", "max_grad_norm"],

    &["checkpoint.save_steps", "save_steps"],
    &["checkpoint.save_total_limit", "save_total_limit"],
    &["checkpoint.resume", "resume_from_checkpoint", "checkpoint.resume_from_checkpoint"],
    &["checkpoint.overwrite", "overwrite", "overwrite_output_dir"],

    &["eval.eval_steps", "eval_steps"],
    &["eval.batch_size", "per_device_eval_batch_size", "eval.per_device_eval_batch_size"],
    &["eval.max_eval_examples", "max_eval_examples"],
    &["eval.split"],
];

/// Every key that a job file may have, in all spellings; a key in a table as `table.key`.
pub fn keys() -> impl Iterator<Item = &'static str> {
    SETTINGS.iter().copied().flatten().copied()
}

const ADAPTERS: &str = "it trains all weights; adapters (LoRA) come later";
const EXPORT: &str = "it writes Hugging Face safetensors with every checkpoint; other formats come later";
const TIERS: &str = "checks in tiers come later; take the key out";
const MODELS: &str = "describe a Llama in [model], or give a Hugging Face directory as `model.path`";
const DATASETS: &str = "give text files or folders as `data.path`; evaluation uses the part that `data.validation_fraction` holds out";
const HISTORY: &str = "the history of runs is kept in the cluster; take the key out";
const BACKENDS: &str = "write `device` and `precision` instead";
const PREFERENCES: &str = "training on preferences comes later";

/// Settings that this version does not know yet, and what to do instead. A table is refused as a whole.
#[rustfmt::skip]
const LATER: &[(&str, &str)] = &[
    ("model_file", MODELS), ("gist_id", MODELS), ("gist_revision", MODELS), ("model_name", MODELS),
    ("dataset_name", DATASETS), ("dataset_id", DATASETS), ("eval.dataset_id", DATASETS),
    ("lora", ADAPTERS), ("lora_r", ADAPTERS), ("lora_rank", ADAPTERS), ("r", ADAPTERS), ("lora_alpha", ADAPTERS), ("lora_dropout", ADAPTERS),
    ("target_modules", ADAPTERS), ("adapter", ADAPTERS), ("peft_config", ADAPTERS), ("use_peft", ADAPTERS),
    ("load_in_8bit", ADAPTERS), ("load_in_4bit", ADAPTERS), ("bias", ADAPTERS), ("task_type", ADAPTERS), ("adapter_path", ADAPTERS),
    ("export", EXPORT), ("export_bundle", EXPORT), ("export_formats", EXPORT), ("export_dir", EXPORT),
    ("quantization", EXPORT), ("run_health_checks", EXPORT),
    ("tier", TIERS), ("modality", TIERS), ("baseline_run_id", TIERS), ("reference_profile_id", TIERS),
    ("db_path", HISTORY), ("sweep_id", HISTORY), ("sweep_params", HISTORY),
    ("backend", BACKENDS), ("backend_type", BACKENDS),
    ("beta", PREFERENCES), ("dpo", PREFERENCES), ("curriculum", PREFERENCES),
];

/// A job file in which every setting has its first name. Nulls are left out: they mean "not given".
pub(super) struct Fields {
    /// First name -> the spelling used, and the value.
    given: BTreeMap<&'static str, (String, Value)>,
    file: Place,
}

impl Fields {
    /// Takes the file's top-level table and, over it, the values of `--set`, the last one winning.
    pub fn new(
        file: &str,
        table: Vec<(String, Value)>,
        sets: Vec<(String, Value)>,
    ) -> Result<Self, JobFileError> {
        let mut fields = Fields { given: BTreeMap::new(), file: file.into() };
        let mut flat = Vec::new();
        flatten("", table, &mut flat)?;
        for (key, value) in flat {
            // a null of a file for other tools (`baseline_run_id`) switches something off that is not there
            let is_others = || later(&key).is_some() || elsewhere::instead(&key).is_some();
            if matches!(value.kind, Kind::Null) && is_others() {
                continue;
            }
            let name = known(&key, &value)?;
            if matches!(value.kind, Kind::Null) {
                continue;
            }
            match fields.given.get(name) {
                Some((other, old)) if !old.same(&value) => {
                    return Err(JobFileError::Aliases {
                        place: value.place.clone(),
                        given: value.describe(),
                        other: other.clone(),
                        other_place: old.place.clone(),
                        other_given: old.describe(),
                        key,
                    });
                }
                Some(_) => {}
                None => {
                    fields.given.insert(name, (key, value));
                }
            }
        }
        for (key, value) in sets {
            let name = known(&key, &value)?;
            fields.given.insert(name, (key, value));
        }
        Ok(fields)
    }

    /// The setting as `read` understands it; `None` when it is not given. `wanted` says what is right, for the error.
    pub fn get<T>(
        &self,
        name: &'static str,
        wanted: &str,
        read: impl FnOnce(&Value) -> Option<T>,
    ) -> Result<Option<T>, JobFileError> {
        debug_assert!(SETTINGS.iter().any(|names| names[0] == name), "{name} is not in SETTINGS");
        let Some((spelling, value)) = self.given.get(name) else { return Ok(None) };
        read(value).map(Some).ok_or_else(|| JobFileError::Value {
            place: value.place.clone(),
            key: spelling.clone(),
            given: value.describe(),
            wanted: wanted.to_owned(),
        })
    }

    /// A whole number from `min` to `max`.
    pub fn int(&self, name: &'static str, min: u64, max: u64) -> Result<Option<u64>, JobFileError> {
        let wanted = format!("a whole number from {min} to {max}");
        self.get(name, &wanted, |v| {
            v.int().and_then(|n| u64::try_from(n).ok()).filter(|n| (min..=max).contains(n))
        })
    }

    /// As `int`, for fields of 32 bits.
    pub fn int32(&self, name: &'static str, min: u32, max: u32) -> Result<Option<u32>, JobFileError> {
        Ok(self.int(name, min.into(), max.into())?.map(|n| u32::try_from(n).unwrap_or(max)))
    }

    pub fn float(
        &self,
        name: &'static str,
        wanted: &str,
        fits: impl Fn(f64) -> bool,
    ) -> Result<Option<f64>, JobFileError> {
        self.get(name, wanted, |v| v.float().filter(|x| fits(*x)))
    }

    pub fn flag(&self, name: &'static str) -> Result<Option<bool>, JobFileError> {
        self.get(name, "true or false", Value::bool)
    }

    /// Text that is not empty.
    pub fn text(&self, name: &'static str, wanted: &str) -> Result<Option<String>, JobFileError> {
        self.get(name, wanted, |v| v.text().filter(|t| !t.trim().is_empty()).map(str::to_owned))
    }

    pub fn texts(&self, name: &'static str, wanted: &str) -> Result<Option<Vec<String>>, JobFileError> {
        self.get(name, wanted, Value::texts)
    }

    /// One of the words; the second of each pair is what it means.
    pub fn word<T: Clone>(&self, name: &'static str, words: &[(&str, T)]) -> Result<Option<T>, JobFileError> {
        self.word_of(name, words, |_| true)
    }

    /// As `word`, where some are known only to be refused later, with a better reason: what `is_possible` is what an error offers.
    pub fn word_of<T: Clone>(
        &self,
        name: &'static str,
        words: &[(&str, T)],
        is_possible: impl Fn(&T) -> bool,
    ) -> Result<Option<T>, JobFileError> {
        let offered = words.iter().filter(|(_, meaning)| is_possible(meaning));
        let list: Vec<_> = offered.map(|(word, _)| format!("{word:?}")).collect();
        let wanted = format!("one of {}", list.join(", "));
        self.get(name, &wanted, |v| {
            let number = v.int().map(|n| n.to_string());
            let given = v.text().map(str::to_ascii_lowercase).or(number)?;
            words.iter().find(|(word, _)| *word == given).map(|(_, meaning)| meaning.clone())
        })
    }

    /// The spelling that the file uses for a setting, else its first name.
    pub fn spelling(&self, name: &'static str) -> &str {
        self.given.get(name).map_or(name, |(spelling, _)| spelling)
    }

    pub fn is_given(&self, name: &'static str) -> bool {
        self.given.contains_key(name)
    }

    /// The first given setting of those whose name begins with `prefix`.
    pub fn first_with(&self, prefix: &str) -> Option<&'static str> {
        self.given.keys().copied().find(|name| name.starts_with(prefix))
    }

    /// An error about a combination, at the first of `names` that is given.
    pub fn refuse(&self, names: &[&'static str], message: String) -> JobFileError {
        let place =
            names.iter().find_map(|name| self.given.get(name)).map_or(&self.file, |(_, value)| &value.place);
        JobFileError::Refused { place: place.clone(), message }
    }

    pub fn missing(&self, name: &str, cure: &str) -> JobFileError {
        JobFileError::Missing { file: self.file.clone(), key: name.to_owned(), cure: cure.to_owned() }
    }
}

/// Tables dissolved into dotted names.
fn flatten(
    prefix: &str,
    table: Vec<(String, Value)>,
    flat: &mut Vec<(String, Value)>,
) -> Result<(), JobFileError> {
    for (key, value) in table {
        let key = if prefix.is_empty() { key } else { format!("{prefix}.{key}") };
        match value {
            Value { kind: Kind::Table(inner), .. } if TABLES.contains(&key.as_str()) => {
                flatten(&key, inner, flat)?
            }
            // a YAML table whose keys are all commented out
            Value { kind: Kind::Null, .. } if TABLES.contains(&key.as_str()) => {}
            value if TABLES.contains(&key.as_str()) => {
                return Err(JobFileError::Value {
                    place: value.place.clone(),
                    given: value.describe(),
                    wanted: format!("a table such as {}", example(&key)),
                    key,
                });
            }
            value => flat.push((key, value)),
        }
    }
    Ok(())
}

fn example(table: &str) -> &'static str {
    match table {
        "model" => "{ hidden_size = 256 } or { path = \"DIR\" }",
        "tokenizer" => "{ path = \"tokenizer.json\" }",
        "data" => "{ path = \"FILE\" }",
        "data.clean" => "{ remove_html = true }",
        "optimizer" => "{ learning_rate = 5e-4 }",
        "checkpoint" => "{ save_steps = 250 }",
        _ => "{ eval_steps = 100 }",
    }
}

/// The first name of a setting.
fn known(key: &str, value: &Value) -> Result<&'static str, JobFileError> {
    if let Some(names) = SETTINGS.iter().find(|names| names.contains(&key)) {
        return Ok(names[0]);
    }
    let (place, key) = (value.place.clone(), key.to_owned());
    if let Some(instead) = later(&key) {
        return Err(JobFileError::Later { place, key, instead: instead.to_owned() });
    }
    if let Some(instead) = elsewhere::instead(&key) {
        return Err(JobFileError::Elsewhere { place, key, instead: instead.to_owned() });
    }
    let suggestion = nearest(&key, keys()).map(str::to_owned);
    Err(JobFileError::UnknownKey { place, key, suggestion })
}

/// What to do instead of a setting that belongs to a later version. `export.formats` from `--set` belongs to the table `export`.
fn later(key: &str) -> Option<&'static str> {
    let within =
        |table: &str| key.strip_prefix(table).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'));
    LATER.iter().find(|(name, _)| within(name)).map(|(_, instead)| *instead)
}
