//! `config.json`: the Llama that it describes, and how one is written. A null says what a missing key says, as in transformers.

use crate::error::{Error, Result};
use fleet_checkpoint::CONFIG_FILE;
use fleet_common::job::LlamaConfig;
use fleet_data::model_dir::{Object, read_object, token_ids, whole, without_nulls};
use serde_json::{Value, json};
use std::path::Path;

const ROPE_PARAMETERS: &str = "rope_parameters";
const EOS: &str = "eos_token_id";

/// `config.json` of a model directory, as it stands there.
pub fn read_config(dir: &Path) -> Result<Object> {
    if !dir.is_dir() {
        return Err(Error::Input(format!(
            "{}: there is no such model directory; check the path",
            dir.display()
        )));
    }
    let path = dir.join(CONFIG_FILE);
    let config = read_object(&path).map_err(|e| Error::Input(e.to_string()))?;
    config.ok_or_else(|| {
        Error::Input(format!(
            "{}: there is no such file; a model directory holds config.json, model.safetensors and tokenizer.json",
            path.display()
        ))
    })
}

/// The model that a Hugging Face `config.json` describes, or why fleet cannot train it.
pub fn parse_config(json: &Object) -> std::result::Result<LlamaConfig, String> {
    let json = without_nulls(json.clone());
    match json.get("model_type").and_then(Value::as_str) {
        Some("llama") => {}
        Some(other) => return Err(format!("model_type is `{other}`; fleet runs `llama` models")),
        None => return Err("has no model_type; fleet runs `llama` models".into()),
    }
    let is_set = |key: &&str| json.get(*key).is_some_and(|value| value != false);
    if let Some(key) = ["attention_bias", "mlp_bias"].into_iter().find(is_set) {
        return Err(format!("{key} is set; fleet runs Llama without biases"));
    }
    if json.contains_key("quantization_config") {
        return Err("quantization_config is set; fleet reads weights that are not quantized".into());
    }
    if json.get("hidden_act").and_then(Value::as_str).is_some_and(|act| act != "silu") {
        return Err("hidden_act is not `silu`".into());
    }
    let whole = |key: &str, default: Option<u32>| -> std::result::Result<u32, String> {
        match json.get(key) {
            None => default.ok_or(format!("lacks {key}")),
            Some(value) => whole(value)
                .filter(|number| *number > 0)
                .ok_or(format!("{key} is {value}, not a positive whole number")),
        }
    };
    let hidden_size = whole("hidden_size", None)?;
    let heads = whole("num_attention_heads", None)?;
    let config = LlamaConfig {
        vocab_size: whole("vocab_size", None)?,
        hidden_size,
        intermediate_size: whole("intermediate_size", None)?,
        num_hidden_layers: whole("num_hidden_layers", None)?,
        num_attention_heads: heads,
        num_key_value_heads: whole("num_key_value_heads", Some(heads))?,
        head_dim: whole("head_dim", Some((hidden_size / heads).max(1)))?,
        max_position_embeddings: whole("max_position_embeddings", Some(2048))?,
        rms_norm_eps: real(&json, "rms_norm_eps", |x| x > 0.0)?.unwrap_or(1e-6),
        rope_theta: rope_theta(&json)?,
        tie_word_embeddings: json.get("tie_word_embeddings").and_then(Value::as_bool).unwrap_or(false),
        initializer_range: real(&json, "initializer_range", |x| x >= 0.0)?.unwrap_or(0.02),
        bos_token_id: token_ids(&json, "bos_token_id").first().copied(),
        eos_token_id: token_ids(&json, EOS).first().copied(),
    };
    check_config(&config)?;
    Ok(config)
}

/// Transformers 5 writes the base of the rotary embeddings into `rope_parameters`, older versions beside `rope_scaling`. Both are read, in
/// the order of transformers 5: what stands in an object with parameters counts more, and `rope_scaling` is that object where it is given.
fn rope_theta(json: &Object) -> std::result::Result<f64, String> {
    let object = |key: &str| json.get(key).and_then(Value::as_object).filter(|object| !object.is_empty());
    let none = Object::new();
    let rope = object("rope_scaling").or(object(ROPE_PARAMETERS)).unwrap_or(&none);
    match rope.get("rope_type").or_else(|| rope.get("type")).and_then(Value::as_str) {
        Some("default") | None => {}
        Some(kind) => return Err(format!("rotary scaling `{kind}` is not supported; only `default` is")),
    }
    let positive = |x| x > 0.0;
    let partial = |object: &Object| real(object, "partial_rotary_factor", positive);
    if partial(rope)?.or(partial(json)?).is_some_and(|share| share != 1.0) {
        return Err("partial_rotary_factor is not 1; fleet rotates whole heads".into());
    }
    let theta = real(rope, "rope_theta", positive)?;
    Ok(theta.or(real(json, "rope_theta", positive)?).unwrap_or(10_000.0))
}

fn real(json: &Object, key: &str, fits: impl Fn(f64) -> bool) -> std::result::Result<Option<f64>, String> {
    let Some(value) = json.get(key) else { return Ok(None) };
    value.as_f64().filter(|x| fits(*x)).map(Some).ok_or(format!("{key} is {value}, not a positive number"))
}

/// What the engine relies on.
pub fn check_config(c: &LlamaConfig) -> std::result::Result<(), String> {
    if !c.num_attention_heads.is_multiple_of(c.num_key_value_heads) {
        return Err(format!(
            "num_attention_heads ({}) is not a multiple of num_key_value_heads ({})",
            c.num_attention_heads, c.num_key_value_heads
        ));
    }
    if !c.head_dim.is_multiple_of(2) {
        return Err(format!("head_dim ({}) is odd; rotary embeddings need pairs", c.head_dim));
    }
    Ok(())
}

/// `config.json` of a model as fleet writes its weights, in float32. `before` is the file that the model came with: what fleet does not
/// know of it stays, and so do its other end tokens.
pub fn config_json(config: &LlamaConfig, before: &Object) -> Object {
    let llama = json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": false,
        "mlp_bias": false,
    });
    let mut json = before.clone();
    for (key, value) in llama.as_object().into_iter().flatten() {
        json.entry(key.clone()).or_insert_with(|| value.clone());
    }
    // Old and new name of the same; every version of transformers reads the old one.
    for key in ["dtype", "torch_dtype"] {
        if key == "torch_dtype" || json.contains_key(key) {
            json.insert(key.into(), "float32".into());
        }
    }
    let fields = serde_json::to_value(config).expect("a config is plain data");
    for (key, value) in fields.as_object().into_iter().flatten() {
        match key.as_str() {
            EOS => json.insert(key.clone(), with_end(before, config.eos_token_id)),
            "bos_token_id" if !before.is_empty() => None, // even where it is not there, which means 1
            _ => json.insert(key.clone(), value.clone()),
        };
    }
    if let Some(Value::Object(rope)) = json.get_mut(ROPE_PARAMETERS) {
        rope.insert("rope_theta".into(), config.rope_theta.into());
    }
    json
}

/// The ends of a text that `before` names, and `end`, as `config.json` and `generation_config.json` have them.
pub fn with_end(before: &Object, end: Option<u32>) -> Value {
    let mut ends = token_ids(before, EOS);
    ends.extend(end.filter(|end| !ends.contains(end)));
    match ends.as_slice() {
        [] => Value::Null,
        [end] => json!(end),
        ends => json!(ends),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::tiny_config;

    fn object(value: Value) -> Object {
        value.as_object().unwrap().clone()
    }

    fn tiny(more: Value) -> Object {
        let mut json = object(json!({
            "model_type": "llama", "vocab_size": 8, "hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 3,
        }));
        json.extend(object(more));
        json
    }

    #[test]
    fn a_config_reads_back_as_it_was_written() {
        let config = LlamaConfig { initializer_range: 0.0, eos_token_id: Some(3), ..tiny_config() };
        assert_eq!(parse_config(&config_json(&config, &Object::new())).unwrap(), config);
    }

    #[test]
    fn defaults_are_hugging_faces() {
        let config = parse_config(&tiny(json!({"eos_token_id": [7, 8]}))).unwrap();
        assert_eq!((config.num_key_value_heads, config.head_dim, config.eos_token_id), (3, 4, Some(7)));
        assert_eq!((config.rope_theta, config.rms_norm_eps, config.tie_word_embeddings), (1e4, 1e-6, false));
    }

    #[test]
    fn a_null_is_what_a_missing_key_is() {
        let keys = [
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
            "rms_norm_eps",
            "rope_theta",
            "rope_scaling",
            "rope_parameters",
            "tie_word_embeddings",
            "initializer_range",
            "bos_token_id",
            "eos_token_id",
            "attention_bias",
            "mlp_bias",
            "hidden_act",
            "quantization_config",
            "partial_rotary_factor",
        ];
        let nulls: Object = keys.iter().map(|key| (key.to_string(), Value::Null)).collect();
        assert_eq!(parse_config(&tiny(nulls.into())).unwrap(), parse_config(&tiny(json!({}))).unwrap());
        assert!(parse_config(&tiny(json!({"hidden_size": null}))).unwrap_err().contains("lacks hidden_size"));
    }

    #[test]
    fn the_rotary_base_is_found_wherever_transformers_wrote_it() {
        let theta = |more: Value| parse_config(&tiny(more)).map(|config| config.rope_theta);
        let new = json!({"rope_type": "default", "rope_theta": 5e5});
        for given in [
            json!({"rope_theta": 5e5}),
            json!({"rope_theta": 500_000, "rope_scaling": null}),
            json!({"rope_parameters": new}),
            json!({"rope_parameters": new, "rope_theta": null, "rope_scaling": null}),
            json!({"rope_parameters": new, "rope_theta": 1e4}),
            json!({"rope_parameters": null, "rope_theta": 5e5, "rope_scaling": {"type": "default"}}),
            json!({"rope_parameters": {"rope_type": null, "rope_theta": null}, "rope_theta": 5e5}),
        ] {
            assert_eq!(theta(given.clone()), Ok(5e5), "{given}");
        }
        for (given, why) in [
            (
                json!({"rope_parameters": null, "rope_scaling": {"rope_type": "llama3", "factor": 8}}),
                "`llama3`",
            ),
            (json!({"rope_scaling": null, "rope_parameters": {"type": "linear", "factor": 2}}), "`linear`"),
            (json!({"rope_parameters": {"rope_type": null, "type": "yarn"}}), "`yarn`"),
            (json!({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}), "whole heads"),
            (json!({"rope_theta": -1}), "rope_theta is -1"),
        ] {
            assert!(theta(given.clone()).unwrap_err().contains(why), "{given}");
        }
    }

    #[test]
    fn whole_numbers_may_be_written_as_floats() {
        let config =
            parse_config(&tiny(json!({"max_position_embeddings": 4096.0, "vocab_size": 1e3}))).unwrap();
        assert_eq!((config.max_position_embeddings, config.vocab_size), (4096, 1000));
        assert!(parse_config(&tiny(json!({"vocab_size": 8.5}))).unwrap_err().contains("vocab_size is 8.5"));
    }

    #[test]
    fn what_fleet_cannot_run_is_named() {
        let with = |more: Value| parse_config(&tiny(more)).unwrap_err();
        assert!(with(json!({"model_type": "gpt2"})).contains("gpt2"));
        assert!(with(json!({"attention_bias": true})).contains("attention_bias"));
        assert!(with(json!({"hidden_size": -1})).contains("hidden_size"));
        assert!(with(json!({"num_key_value_heads": 2})).contains("multiple"));
        assert!(with(json!({"quantization_config": {"bits": 4}})).contains("quantized"));
    }

    #[test]
    fn what_a_model_came_with_stays_in_its_config() {
        let before = tiny(json!({
            "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", "eos_token_id": [7, 6], "bos_token_id": 1, "pad_token_id": 5,
            "use_cache": true, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "head_dim": null, "my_key": {"a": null},
        }));
        let config = LlamaConfig { eos_token_id: Some(2), ..parse_config(&before).unwrap() };
        let after = config_json(&config, &before);
        for (key, value) in [
            ("eos_token_id", json!([7, 6, 2])),
            ("bos_token_id", json!(1)),
            ("pad_token_id", json!(5)),
            ("dtype", json!("float32")),
            ("torch_dtype", json!("float32")),
            ("head_dim", json!(4)),
            ("rope_theta", json!(5e5)),
            ("rope_parameters", json!({"rope_type": "default", "rope_theta": 5e5})),
            ("my_key", json!({"a": null})),
            ("use_cache", json!(true)),
        ] {
            assert_eq!(after[key], value, "{key}");
        }
        assert_eq!(config_json(&config, &after), after, "once is enough");
        let plain = config_json(&LlamaConfig { bos_token_id: Some(3), ..config }, &Object::new());
        assert_eq!((&plain["eos_token_id"], &plain["bos_token_id"]), (&json!(2), &json!(3)));
        assert!(!plain.contains_key("dtype"));
    }
}
