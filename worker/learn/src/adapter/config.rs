//! `adapter_config.json`, as PEFT writes it.

use super::targets::linear_names;
use crate::error::{Error, Result};
use crate::model::Model;
use fleet_common::job::{self, Init};
use fleet_common::model::{Object, Stored, parse_object};
use regex::Regex;
use serde::Serialize;
use serde_json::{Value, json};
use std::path::Path;

pub const ADAPTER_CONFIG: &str = "adapter_config.json";

/// Settings that change what an adapter computes, each with the values under which fleet computes it.
#[rustfmt::skip]
const ONLY: [(&str, &[&str]); 8] = [
    // Others begin with another base than the model's files have.
    ("init_lora_weights", &["null", "true", "false", "\"gaussian\"", "\"orthogonal\"", "\"eva\""]),
    ("lora_bias", &["false"]), ("layer_replication", &["null", "[]"]), ("trainable_token_indices", &["null", "[]", "{}"]),
    ("target_parameters", &["null", "[]"]), ("use_qalora", &["false"]), ("alora_invocation_tokens", &["null", "[]"]), ("arrow_config", &["null"]),
];

/// How much of its two matrices an adapter adds to the modules that it changes.
#[derive(Clone, Debug)]
pub struct AdapterConfig {
    /// As it came, or is written.
    pub json: Object,
    /// Share of the inputs that the first matrices do not see in a step.
    pub dropout: f64,
    /// Over the root of the rank, not over the rank.
    use_rslora: bool,
    pub use_dora: bool,
    lora_alpha: f64,
    r: usize,
    /// For modules whose name ends so, from a dot on; the first that fits counts.
    alpha_pattern: Vec<(Regex, f64)>,
    rank_pattern: Vec<(Regex, f64)>,
}

impl AdapterConfig {
    pub fn read(dir: &Path) -> Result<AdapterConfig> {
        let path = dir.join(ADAPTER_CONFIG);
        let refuse = |what: String| Error::Input(format!("{}: {what}", path.display()));
        let bytes = std::fs::read(&path).map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound => {
                refuse("there is no such file; an adapter is a directory as PEFT writes it, with adapter_config.json and adapter_model.safetensors".into())
            }
            _ => refuse(format!("cannot be read: {e}")),
        })?;
        let config = parse_object(&bytes).map_err(|e| refuse(format!("is not a JSON object ({e})")))?;
        AdapterConfig::of(&config).map_err(refuse)
    }

    /// Of an adapter that a job begins.
    pub fn of_job(adapter: &job::Adapter, model: &Model, base: &Path) -> Result<AdapterConfig> {
        let some = |names: &[String]| if names.is_empty() { Value::Null } else { json!(names) };
        let modules = |targets: &job::Targets| match targets {
            job::Targets::AllLinear => json!(linear_names(model)),
            job::Targets::Names(names) => json!(names),
            job::Targets::Pattern(pattern) => json!(pattern),
        };
        let layers = &adapter.layers_to_transform;
        let config = json!({
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "inference_mode": true,
            "r": adapter.rank(model.family),
            "lora_alpha": adapter.alpha(model.family),
            "lora_dropout": adapter.dropout(),
            "use_rslora": adapter.use_rslora,
            "use_dora": adapter.use_dora,
            "target_modules": modules(&adapter.targets(model.family)),
            "exclude_modules": adapter.exclude_modules.as_ref().map(modules),
            "layers_to_transform": if layers.is_empty() { Value::Null } else { json!(layers) },
            "layers_pattern": null,
            "modules_to_save": some(&adapter.modules_to_save),
            "bias": adapter.bias,
            "fan_in_fan_out": model.layout().parameters.iter().any(|p| p.stored == Stored::Transposed),
            "init_lora_weights": match adapter.init {
                Init::Default => json!(true),
                Init::Gaussian => json!("gaussian"),
            },
            "rank_pattern": entries(&adapter.rank_pattern),
            "alpha_pattern": entries(&adapter.alpha_pattern),
            "revision": null,
        });
        let Value::Object(config) = config else { unreachable!("it is written as an object") };
        AdapterConfig::of(&config).map_err(|what| Error::Input(format!("adapter: {what}")))
    }

    fn of(config: &Object) -> std::result::Result<AdapterConfig, String> {
        match config.get("peft_type").and_then(Value::as_str) {
            Some("LORA") => {}
            Some(other) => {
                return Err(format!("peft_type is {other:?}; fleet reads adapters of the type \"LORA\""));
            }
            None => return Err("peft_type is missing; fleet reads adapters of the type \"LORA\"".into()),
        }
        for (key, fine) in ONLY {
            if let Some(value) = config.get(key).filter(|value| !fine.contains(&value.to_string().as_str())) {
                return Err(format!(
                    "{key} is {value}, which is not in this version of fleet; merge the adapter with PEFT"
                ));
            }
        }
        let flag = |key: &str| match config.get(key) {
            None | Some(Value::Null) => Ok(false),
            Some(value) => {
                value.as_bool().ok_or_else(|| format!("{key} is {value}; true or false is wanted"))
            }
        };
        let number = |key: &str| match config.get(key).map(|value| (value, value.as_f64())) {
            Some((_, Some(number))) if number.is_finite() => Ok(number),
            Some((value, _)) => Err(format!("{key} is {value}; a number is wanted")),
            None => Err(format!("{key} is missing")),
        };
        let r = number("r")?;
        if r < 1.0 || r.fract() != 0.0 || r > f64::from(u32::MAX) {
            return Err(format!("r is {}; a whole number of at least 1 is wanted", config["r"]));
        }
        let dropout = match config.get("lora_dropout") {
            None | Some(Value::Null) => 0.0,
            Some(_) => number("lora_dropout")?,
        };
        if !(0.0..=1.0).contains(&dropout) {
            return Err("lora_dropout must be between 0 and 1".into());
        }
        Ok(AdapterConfig {
            json: config.clone(),
            dropout,
            use_rslora: flag("use_rslora")?,
            use_dora: flag("use_dora")?,
            lora_alpha: number("lora_alpha")?,
            r: r as usize,
            alpha_pattern: patterns(config, "alpha_pattern")?,
            rank_pattern: patterns(config, "rank_pattern")?,
        })
    }

    /// Rank of the matrices of a module, such as `model.layers.0.self_attn.q_proj`.
    pub fn rank(&self, module: &str) -> usize {
        first(&self.rank_pattern, module).map_or(self.r, |rank| rank as usize)
    }

    /// Of all modules that there may be.
    pub(super) fn largest_rank(&self) -> usize {
        self.rank_pattern.iter().map(|(_, rank)| *rank as usize).fold(self.r, usize::max)
    }

    /// By how much what the two matrices give is multiplied before it is added.
    pub fn scale(&self, module: &str) -> f64 {
        let alpha = first(&self.alpha_pattern, module).unwrap_or(self.lora_alpha);
        let rank = self.rank(module) as f64;
        alpha / if self.use_rslora { rank.sqrt() } else { rank }
    }
}

fn entries<T: Serialize>(pattern: &[(String, T)]) -> Object {
    pattern.iter().map(|(key, number)| (key.clone(), json!(number))).collect()
}

/// As PEFT matches it: against the end of a module's name, from a dot on.
pub(super) fn pattern(pattern: &str) -> Option<Regex> {
    Regex::new(&format!(r"^(?:.*\.)?(?:{pattern})$")).ok()
}

fn first(patterns: &[(Regex, f64)], module: &str) -> Option<f64> {
    patterns.iter().find(|(pattern, _)| pattern.is_match(module)).map(|(_, number)| *number)
}

fn patterns(config: &Object, key: &str) -> std::result::Result<Vec<(Regex, f64)>, String> {
    let given = match config.get(key) {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::Object(given)) => given,
        Some(value) => return Err(format!("{key} is {value}; an object is wanted")),
    };
    let read = |(pattern, value): (&String, &Value)| {
        let number = value.as_f64().filter(|number| number.is_finite() && *number > 0.0);
        let number =
            number.ok_or_else(|| format!("{key}: {pattern:?} is {value}; a number above 0 is wanted"))?;
        let regex = self::pattern(pattern);
        Ok((
            regex.ok_or_else(|| {
                format!("{key}: {pattern:?} is no pattern that fleet reads; write the modules out")
            })?,
            number,
        ))
    };
    given.iter().map(read).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // in a test an unwrap is an assertion
mod tests {
    use super::*;
    use serde_json::json;

    fn of(more: Value) -> std::result::Result<AdapterConfig, String> {
        let mut config =
            json!({"peft_type": "LORA", "r": 8, "lora_alpha": 16, "unknown_key": [1], "lora_bias": false});
        config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        AdapterConfig::of(config.as_object().unwrap())
    }

    #[test]
    fn ranks_and_scales_follow_patterns_and_the_kind_of_scaling() {
        let plain = of(json!({})).unwrap();
        assert_eq!((plain.rank("a.q_proj"), plain.scale("a.q_proj")), (8, 2.0));
        let patterned = of(json!({
            "use_rslora": true, "rank_pattern": {"layers.1.q_proj": 4, "q_proj": 16}, "alpha_pattern": {"v_proj|q_proj": 32},
        }))
        .unwrap();
        assert_eq!(
            (patterned.rank("model.layers.1.q_proj"), patterned.rank("model.layers.0.q_proj")),
            (4, 16)
        );
        assert_eq!(patterned.rank("model.layers.0.eq_proj"), 8, "from a dot on");
        assert_eq!(
            (patterned.scale("model.layers.1.q_proj"), patterned.scale("o_proj")),
            (16.0, 16.0 / 8f64.sqrt())
        );
    }

    #[test]
    fn what_cannot_be_is_refused_by_its_key() {
        for (more, wanted) in [
            (json!({"peft_type": "IA3"}), "peft_type is \"IA3\""),
            (json!({"r": 0}), "r is 0; a whole number of at least 1"),
            (json!({"r": 2.5}), "r is 2.5"),
            (json!({"lora_alpha": "x"}), "lora_alpha is \"x\""),
            (json!({"lora_bias": true}), "lora_bias is true"),
            (json!({"init_lora_weights": "pissa_niter_4"}), "init_lora_weights is \"pissa_niter_4\""),
            (json!({"layer_replication": [[0, 4]]}), "layer_replication is [[0,4]]"),
            (json!({"use_dora": 1}), "use_dora is 1"),
            (json!({"rank_pattern": {"a": 0}}), "rank_pattern: \"a\" is 0"),
            (json!({"alpha_pattern": {"(?!x)": 1}}), "alpha_pattern: \"(?!x)\" is no pattern"),
        ] {
            let error = of(more).unwrap_err();
            assert!(error.contains(wanted), "{error}");
        }
    }
}
