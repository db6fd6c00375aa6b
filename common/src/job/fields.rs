//! The names: every setting with all its spellings, those of other tools that belong to later versions, and the flat view of a
//! job file in which each setting has one name and one value.

use super::elsewhere;
use super::error::JobFileError;
use super::suggest::nearest;
use super::value::{Kind, Place, Value};
use crate::model::Family;
use std::collections::BTreeMap;
use std::sync::LazyLock;

/// Tables of a job file; their keys are named `table.key`.
const TABLES: [&str; 13] = [
    "model",
    "model.rope_parameters",
    "model.rope_scaling",
    "adapter",
    "dpo",
    "tokenizer",
    "data",
    "data.clean",
    "data.fields",
    "optimizer",
    "checkpoint",
    "eval",
    "early_stopping",
];

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
    &["activation_checkpointing", "gradient_checkpointing"],
    &["neftune_noise_alpha"],
    &["reshard_after_forward"],
    &["offload_optimizer"],
    &["transport"],
    &["transport_encryption"],
    &["max_seq_len", "max_seq_length"],
    &["epochs", "num_train_epochs", "num_epochs"],
    &["max_steps"],
    &["logging_steps"],
    &["log_to_db"],
    &["max_time_s"],
    &["threads_per_rank"],
    &["trace"],

    &["vocab_size", "model.vocab_size", "tokenizer.vocab_size"],
    &["model.path"],
    &["model.model_type"],
    &["model.architectures"],
    &["model.bos_token_id"],
    &["model.eos_token_id"],
    &["model.attention_dropout"],
    &["model.hidden_dropout"],
    &["model.attn_pdrop"],
    &["model.embd_pdrop"],
    &["model.resid_pdrop"],
    &["model.dropout"],
    &["model.rope_theta", "model.rope_parameters.rope_theta", "model.rope_scaling.rope_theta"],
    &["model.partial_rotary_factor", "model.rope_parameters.partial_rotary_factor", "model.rope_scaling.partial_rotary_factor"],
    &["model.rope_parameters.rope_type", "model.rope_parameters.type", "model.rope_scaling.rope_type", "model.rope_scaling.type"],
    &["model.rope_parameters.factor", "model.rope_scaling.factor"],
    &["model.rope_parameters.original_max_position_embeddings", "model.rope_scaling.original_max_position_embeddings"],
    &["model.rope_parameters.low_freq_factor", "model.rope_scaling.low_freq_factor"],
    &["model.rope_parameters.high_freq_factor", "model.rope_scaling.high_freq_factor"],
    &["model.rope_parameters.attention_factor", "model.rope_scaling.attention_factor"],
    &["model.rope_parameters.mscale", "model.rope_scaling.mscale"],
    &["model.rope_parameters.mscale_all_dim", "model.rope_scaling.mscale_all_dim"],
    &["model.rope_parameters.beta_fast", "model.rope_scaling.beta_fast"],
    &["model.rope_parameters.beta_slow", "model.rope_scaling.beta_slow"],
    &["model.rope_parameters.truncate", "model.rope_scaling.truncate"],

    &["quantization", "bnb_4bit_quant_type"],
    &["adapter.type", "peft_type", "adapter.peft_type", "adapter.method"],
    &["adapter.r", "lora_r", "lora_rank", "r", "adapter.lora_r", "adapter.rank"],
    &["adapter.alpha", "lora_alpha", "adapter.lora_alpha"],
    &["adapter.use_rslora", "use_rslora"],
    &["adapter.use_dora", "use_dora"],
    &["adapter.rank_pattern", "rank_pattern"],
    &["adapter.alpha_pattern", "alpha_pattern"],
    &["adapter.dropout", "lora_dropout", "adapter.lora_dropout"],
    &["adapter.target_modules", "target_modules", "lora_target_modules", "lora_target"],
    &["adapter.exclude_modules", "exclude_modules"],
    &["adapter.layers_to_transform", "layers_to_transform"],
    &["adapter.modules_to_save", "modules_to_save", "lora_modules_to_save"],
    &["adapter.bias", "bias"],
    &["adapter.loraplus_lr_ratio", "loraplus_lr_ratio"],
    &["adapter.init", "init_lora_weights", "adapter.init_lora_weights"],
    &["adapter.path", "adapter_path", "adapter_name_or_path"],
    &["adapter.task_type", "task_type"],

    &["dpo.beta", "beta"],
    &["dpo.loss_type"],
    &["dpo.label_smoothing", "label_smoothing"],
    &["dpo.ref_model", "ref_model"],
    &["dpo.precompute_ref_log_probs", "precompute_ref_log_probs"],

    &["tokenizer.path"],

    &["data.path", "data.paths"],
    &["data.include"],
    &["data.exclude"],
    &["data.text_field"],
    &["data.validation_fraction"],
    &["data.clean.remove_html", "data.remove_html"],
    &["data.clean.normalize_whitespace", "data.normalize_whitespace"],
    &["data.clean.min_chars", "data.min_chars"],
    &["data.clean.near_duplicates", "data.near_duplicates"],
    &["data.weights", "data.weight"],
    &["data.format", "data.formatting", "data.type"],
    &["data.loss_on", "loss_on"],
    &["data.completion_only_loss", "completion_only_loss", "assistant_only_loss", "data.assistant_only_loss"],
    &["data.train_on_inputs", "train_on_inputs", "train_on_prompt", "data.train_on_prompt"],
    &["data.chat_template", "chat_template", "chat_template_path", "data.chat_template_path"],
    &["data.packing", "packing", "sample_packing", "data.sample_packing"],
    &["data.drop_last", "drop_last", "dataloader_drop_last", "data.dataloader_drop_last"],
    &["data.bad_rows", "bad_rows"],
    &["data.fields.messages", "data.field_messages"],
    &["data.fields.role", "data.message_field_role"],
    &["data.fields.content", "data.message_field_content"],
    &["data.fields.prompt", "data.field_prompt"],
    &["data.fields.completion", "data.field_completion"],
    &["data.fields.instruction", "data.field_instruction"],
    &["data.fields.input", "data.field_input"],
    &["data.fields.output", "data.field_output"],
    &["data.fields.system", "data.field_system"],
    &["data.fields.history", "data.field_history"],
    &["data.fields.tools", "data.field_tools"],
    &["data.fields.chosen", "data.field_chosen"],
    &["data.fields.rejected", "data.field_rejected"],

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
    &["checkpoint.keep_best", "keep_best", "load_best_model_at_end"],

    &["eval.eval_steps", "eval_steps"],
    &["eval.batch_size", "per_device_eval_batch_size", "eval.per_device_eval_batch_size"],
    &["eval.max_eval_examples", "max_eval_examples"],
    &["eval.split"],

    &["early_stopping.patience", "early_stopping_patience"],
    &["early_stopping.min_delta", "early_stopping_threshold", "early_stopping_min_delta"],
    &["early_stopping.metric", "metric_for_best_model", "early_stopping.monitor"],
];

/// What describes a new model beside these: `model.KEY` for every key of every family, which have one spelling.
static DESCRIPTIONS: LazyLock<Vec<(&'static Family, Vec<String>)>> = LazyLock::new(|| {
    let named = |family: &'static Family| {
        (family, family.keys().into_iter().map(|key| format!("{DESCRIPTION}{key}")).collect())
    };
    Family::all().map(named).collect()
});

/// What a name begins with that describes a new model.
const DESCRIPTION: &str = "model.";
/// The directory of one that is there.
const PATH: &str = "model.path";

/// Keys of `[model]` that say nothing of its shape, or that every family has.
const OF_ANY_MODEL: [&str; 6] = [
    "vocab_size",
    PATH,
    "model.model_type",
    "model.architectures",
    "model.bos_token_id",
    "model.eos_token_id",
];

/// Shares of what is dropped in training, as the families call them; fleet drops nothing.
pub(super) const DROPOUTS: [&str; 6] = [
    "model.attention_dropout",
    "model.hidden_dropout",
    "model.attn_pdrop",
    "model.embd_pdrop",
    "model.resid_pdrop",
    "model.dropout",
];

/// Every key that a job file may have, in all spellings; a key in a table as `table.key`.
pub fn keys() -> impl Iterator<Item = &'static str> {
    let described = DESCRIPTIONS.iter().flat_map(|(_, names)| names).map(String::as_str);
    SETTINGS.iter().copied().flatten().copied().chain(described)
}

const ADAPTERS: &str =
    "write an `[adapter]` with `type` = \"lora\", `r`, `alpha`, `dropout`, `target_modules`";
const PACKED: &str = "write `quantization` = \"nf4\" or \"int8\", which quantises the model as it is read";
const EXPORT: &str = "it writes Hugging Face safetensors with every checkpoint; other formats come later";
const TIERS: &str = "checks in tiers come later; take the key out";
const MODELS: &str = "describe a new one in [model], or give a Hugging Face directory as `model.path`";
const DATASETS: &str = "give text files or folders as `data.path`; evaluation uses the part that `data.validation_fraction` holds out";
const HISTORY: &str = "the history of runs is kept in the cluster; take the key out";
const BACKENDS: &str = "write `device` and `precision` instead";
const CURRICULUM: &str = "topics in turn come later";

/// Settings that this version does not know yet, and what to do instead. A table is refused as a whole.
#[rustfmt::skip]
const LATER: &[(&str, &str)] = &[
    ("model_file", MODELS), ("gist_id", MODELS), ("gist_revision", MODELS), ("model_name", MODELS),
    ("dataset_name", DATASETS), ("dataset_id", DATASETS), ("eval.dataset_id", DATASETS),
    ("lora", ADAPTERS), ("peft_config", ADAPTERS), ("use_peft", ADAPTERS),
    ("load_in_8bit", PACKED), ("load_in_4bit", PACKED),
    ("export", EXPORT), ("export_bundle", EXPORT), ("export_formats", EXPORT), ("export_dir", EXPORT),
    ("run_health_checks", EXPORT),
    ("tier", TIERS), ("modality", TIERS), ("baseline_run_id", TIERS), ("reference_profile_id", TIERS),
    ("db_path", HISTORY), ("sweep_id", HISTORY), ("sweep_params", HISTORY),
    ("backend", BACKENDS), ("backend_type", BACKENDS),
    ("curriculum", CURRICULUM),
];

/// A job file in which every setting has its first name. Nulls are left out: they mean "not given".
pub(super) struct Fields {
    /// First name -> the spelling used, and the value.
    given: BTreeMap<&'static str, (String, Value)>,
    file: Place,
    /// What `model.model_type` says that a new model is.
    pub family: &'static Family,
}

impl Fields {
    /// Takes the file's top-level table and, over it, the values of `--set`, the last one winning.
    pub fn new(
        file: &str,
        table: Vec<(String, Value)>,
        set: Vec<(String, Value)>,
    ) -> Result<Self, JobFileError> {
        let (mut flat, mut sets) = (Vec::new(), Vec::new());
        flatten("", table, &mut flat)?;
        flatten("", set, &mut sets)?;
        let family = family(flat.iter().chain(&sets))?;
        let is_path = |(key, value): &(String, Value)| key == PATH && !matches!(value.kind, Kind::Null);
        let described = (!flat.iter().chain(&sets).any(is_path)).then_some(family);
        let mut fields = Fields { given: BTreeMap::new(), file: file.into(), family };
        for (key, value) in flat {
            // a null of a file for other tools (`baseline_run_id`) switches something off that is not there
            let is_others = || later(&key).is_some() || elsewhere::instead(&key).is_some();
            if matches!(value.kind, Kind::Null) && is_others() {
                continue;
            }
            let name = known(&key, &value, described)?;
            // of a model's shape a null may say what nothing else does
            if matches!(value.kind, Kind::Null) && SETTINGS.iter().any(|names| names[0] == name) {
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
            let name = known(&key, &value, described)?;
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
        self.text_that(name, wanted, |text| !text.trim().is_empty())
    }

    /// Text that fits. A number or a word such as `on` was perhaps meant as text.
    pub fn text_that(
        &self,
        name: &'static str,
        wanted: &str,
        fits: impl Fn(&str) -> bool,
    ) -> Result<Option<String>, JobFileError> {
        let is_bare = |(_, value): &(String, Value)| {
            matches!(value.kind, Kind::Int(_) | Kind::Float(_) | Kind::Bool(_))
        };
        let quotes = if self.given.get(name).is_some_and(is_bare) { " in quotes" } else { "" };
        let wanted = format!("{wanted}{quotes}");
        self.get(name, &wanted, |v| v.text().filter(|text| fits(text)).map(str::to_owned))
    }

    pub fn texts(&self, name: &'static str, wanted: &str) -> Result<Option<Vec<String>>, JobFileError> {
        self.get(name, wanted, Value::texts)
    }

    /// One of the words; the second of each pair is what it means.
    pub fn word<T: Clone>(&self, name: &'static str, words: &[(&str, T)]) -> Result<Option<T>, JobFileError> {
        self.word_of(name, words, &[], |_| true)
    }

    /// As `word`, where some are known only to be refused later, with a better reason: what `is_possible` is what an error offers.
    pub fn word_of<T: Clone>(
        &self,
        name: &'static str,
        words: &[(&str, T)],
        understood: &[(&str, T)],
        is_possible: impl Fn(&T) -> bool,
    ) -> Result<Option<T>, JobFileError> {
        let offered = words.iter().filter(|(_, meaning)| is_possible(meaning));
        let list: Vec<_> = offered.map(|(word, _)| format!("{word:?}")).collect();
        let wanted = format!("one of {}", list.join(", "));
        self.get(name, &wanted, |v| {
            let number = v.int().map(|n| n.to_string());
            let given = v.text().map(str::to_ascii_lowercase).or(number)?.replace('_', "-");
            words
                .iter()
                .chain(understood)
                .find(|(word, _)| word.replace('_', "-") == given)
                .map(|(_, meaning)| meaning.clone())
        })
    }

    pub fn is_given(&self, name: &'static str) -> bool {
        self.given.contains_key(name)
    }

    /// The spelling that the file uses for a setting, else its first name.
    pub fn spelling(&self, name: &'static str) -> &str {
        self.given.get(name).map_or(name, |(spelling, _)| spelling)
    }

    /// All that is given and would be decided by `model.path`.
    pub fn of_new_model(&self) -> Vec<&'static str> {
        let of_model = |name: &&str| OF_ANY_MODEL.contains(name) || name.starts_with(DESCRIPTION);
        self.given.keys().copied().filter(|name| *name != PATH && of_model(name)).collect()
    }

    /// What is given of the description of a new model: the key of its configuration, with a dot where that is in an object, and the name.
    pub fn description(&self) -> impl Iterator<Item = (&'static str, &'static str, &Value)> {
        let described = self.given.iter().filter(|(name, _)| is_description(name));
        described.map(|(name, (_, value))| (&name[DESCRIPTION.len()..], *name, value))
    }

    /// What the description of a new model comes to is refused: at the first key that the reason names, else at the first there is.
    pub fn refuse_description(&self, why: &str) -> JobFileError {
        let names =
            |key: &str| why.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').any(|word| word == key);
        let last = |key: &'static str| key.rsplit('.').next().unwrap_or(key);
        let mut given: Vec<_> = self.description().map(|(key, name, _)| (!names(last(key)), name)).collect();
        given.sort_by_key(|(unnamed, _)| *unnamed);
        let given: Vec<_> = given.into_iter().map(|(_, name)| name).collect();
        self.refuse(&given, format!("the model that `[model]` describes cannot be: {why}"))
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
            Value { kind: Kind::Table(inner), place, .. } if key == "adapter" && inner.is_empty() => {
                let message =
                    "`adapter` says nothing; `type` = \"lora\" in it takes every default".to_owned();
                return Err(JobFileError::Refused { place, message });
            }
            Value { kind: Kind::Table(inner), .. } if TABLES.contains(&key.as_str()) => {
                flatten(&key, inner, flat)?
            }
            Value { kind: Kind::Text(kind), place, typed } if key == "adapter" => {
                flat.push(("adapter.type".into(), Value { kind: Kind::Text(kind), place, typed }));
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
        "model.rope_parameters" | "model.rope_scaling" => "{ rope_type = \"linear\", factor = 2 }",
        "dpo" => "{ beta = 0.1 }",
        "adapter" => "{ type = \"lora\", r = 16 }",
        "tokenizer" => "{ path = \"tokenizer.json\" }",
        "data" => "{ path = \"FILE\" }",
        "data.clean" => "{ remove_html = true }",
        "data.fields" => "{ prompt = \"question\" }",
        "optimizer" => "{ learning_rate = 5e-4 }",
        "checkpoint" => "{ save_steps = 250 }",
        "early_stopping" => "{ patience = 5 }",
        _ => "{ eval_steps = 100 }",
    }
}

/// Of a new model, whatever of it is given; the last one says.
fn family<'a>(given: impl Iterator<Item = &'a (String, Value)>) -> Result<&'static Family, JobFileError> {
    let Some((key, value)) = given.filter(|(key, _)| key == "model.model_type").last() else {
        return Ok(Family::DEFAULT);
    };
    if matches!(value.kind, Kind::Null) {
        return Ok(Family::DEFAULT);
    }
    value.text().and_then(Family::find).ok_or_else(|| JobFileError::Value {
        place: value.place.clone(),
        key: key.clone(),
        given: value.describe(),
        wanted: format!("one of {}", Family::list()),
    })
}

/// The first name of a setting, in a job whose model is a new one of this family, or one that is there.
fn known(key: &str, value: &Value, family: Option<&Family>) -> Result<&'static str, JobFileError> {
    let setting = SETTINGS.iter().find(|names| names.contains(&key)).map(|names| names[0]);
    let described = || DESCRIPTIONS.iter().flat_map(|(_, names)| names).find(|name| *name == key);
    let name = setting.or_else(|| described().map(String::as_str));
    let (place, key) = (value.place.clone(), key.to_owned());
    let Some(name) = name else {
        if let Some(instead) = later(&key) {
            return Err(JobFileError::Later { place, key, instead: instead.to_owned() });
        }
        let fits = |name: &&str| !is_description(name) || family.is_some_and(|family| has(family, name));
        // What it names of a model must be this family's word for it.
        let is_apt = |instead: &&str| instead.split('`').skip(1).step_by(2).all(|name| fits(&name));
        if let Some(instead) = elsewhere::instead(&key).filter(is_apt) {
            return Err(JobFileError::Elsewhere { place, key, instead: instead.to_owned() });
        }
        // What stretches a rotary embedding has names that mean much else elsewhere.
        let means_rope = key.contains("rope");
        let of_family =
            keys().filter(fits).filter(|name| means_rope || !name.starts_with("model.rope_")).chain(TABLES);
        let suggestion = nearest(&key, of_family);
        if let Some((of_others, instead)) = elsewhere::misspelt(&key).filter(|_| suggestion.is_none()) {
            let message = format!("unknown key `{key}`; if `{of_others}` of other tools is meant: {instead}");
            return Err(JobFileError::Refused { place, message });
        }
        return Err(JobFileError::UnknownKey { place, key, suggestion: suggestion.map(str::to_owned) });
    };
    let Some(family) = family.filter(|family| is_description(name) && !has(family, name)) else {
        return Ok(name);
    };
    let others: Vec<_> = Family::all().filter(|other| has(other, name)).map(|f| f.model_type).collect();
    let own: Vec<_> = described_by(family).iter().map(|name| &name[DESCRIPTION.len()..]).collect();
    let message = format!(
        "`{key}` is a key of {}, and the model is of `model.model_type` = {:?}, which has {}",
        others.join(", "),
        family.model_type,
        own.join(", ")
    );
    Err(JobFileError::Refused { place, message })
}

/// Whether a setting describes a new model, in the words of some family.
fn is_description(name: &str) -> bool {
    name.starts_with(DESCRIPTION) && !OF_ANY_MODEL.contains(&name) && !DROPOUTS.contains(&name)
}

/// Whether the family has the key, or the object that it is in.
fn has(family: &Family, name: &str) -> bool {
    let is =
        |known: &str| name.strip_prefix(known).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'));
    described_by(family).iter().any(|known| is(known))
}

fn described_by(family: &Family) -> &'static [String] {
    let found = DESCRIPTIONS.iter().find(|(known, _)| known.model_type == family.model_type);
    found.map_or(&[], |(_, names)| names)
}

/// What to do instead of a setting that belongs to a later version. `export.formats` from `--set` belongs to the table `export`.
fn later(key: &str) -> Option<&'static str> {
    let within =
        |table: &str| key.strip_prefix(table).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'));
    LATER.iter().find(|(name, _)| within(name)).map(|(_, instead)| *instead)
}
