//! Model directories as Hugging Face writes them: `config.json` and the weights. Every refusal names the file and the cure.

use super::layout::{Layout, Parameter};
use crate::error::{Error, Result};
use crate::shim::buffers::{as_bytes, from_bytes};
use fleet_checkpoint::{CONFIG_FILE, Dtype, TensorRef, TensorSlice, Tensors};
use fleet_common::job::LlamaConfig;
use half::{bf16, f16};
use serde_json::{Map, Value, json};
use std::ops::Range;
use std::path::Path;

/// Reads `config.json` of a model directory.
pub fn read_config(dir: &Path) -> Result<LlamaConfig> {
    let path = dir.join(CONFIG_FILE);
    let refuse = |what: String| Error::Input(format!("{}: {what}", path.display()));
    if !dir.is_dir() {
        return Err(Error::Input(format!(
            "{}: there is no such model directory; check the path",
            dir.display()
        )));
    }
    let text = std::fs::read_to_string(&path).map_err(|e| {
        refuse(format!(
            "cannot be read ({e}); a model directory holds config.json, model.safetensors and tokenizer.json"
        ))
    })?;
    let json: Map<String, Value> = serde_json::from_str(&text)
        .map_err(|e| refuse(format!("is not a JSON object ({e}); restore the file")))?;
    parse_config(&json).map_err(refuse)
}

/// The model that a Hugging Face `config.json` describes, or why fleet cannot train it.
pub fn parse_config(json: &Map<String, Value>) -> std::result::Result<LlamaConfig, String> {
    let is_set = |key: &str| json.get(key).is_some_and(|v| !v.is_null() && v != false);
    match json.get("model_type").and_then(Value::as_str) {
        Some("llama") => {}
        Some(other) => return Err(format!("model_type is `{other}`; fleet runs `llama` models")),
        None => return Err("has no model_type; fleet runs `llama` models".into()),
    }
    if let Some(key) = ["attention_bias", "mlp_bias"].into_iter().find(|key| is_set(key)) {
        return Err(format!("{key} is set; fleet runs Llama without biases"));
    }
    if json.get("hidden_act").and_then(Value::as_str).is_some_and(|act| act != "silu") {
        return Err("hidden_act is not `silu`".into());
    }
    let rope = json.get("rope_parameters").or_else(|| json.get("rope_scaling")).and_then(Value::as_object);
    if let Some(kind) =
        rope.and_then(|r| r.get("rope_type").or_else(|| r.get("type"))).and_then(Value::as_str)
        && kind != "default"
    {
        return Err(format!("rotary scaling `{kind}` is not supported; only `default` is"));
    }
    let whole = |key: &str, default: Option<u32>| -> std::result::Result<u32, String> {
        match json.get(key).filter(|v| !v.is_null()) {
            None => default.ok_or(format!("lacks {key}")),
            Some(value) => value
                .as_u64()
                .and_then(|v| u32::try_from(v).ok())
                .filter(|v| *v > 0)
                .ok_or(format!("{key} is {value}, not a positive whole number")),
        }
    };
    let real = |key: &str, default: f64| -> std::result::Result<f64, String> {
        match json.get(key).or_else(|| rope.and_then(|r| r.get(key))).filter(|v| !v.is_null()) {
            None => Ok(default),
            Some(value) => {
                value.as_f64().filter(|v| *v > 0.0).ok_or(format!("{key} is {value}, not a positive number"))
            }
        }
    };
    // Some models name several end tokens; the first one counts.
    let token = |key: &str| {
        json.get(key)
            .and_then(|v| v.as_array().and_then(|a| a.first()).unwrap_or(v).as_u64())
            .map(|v| v as u32)
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
        rms_norm_eps: real("rms_norm_eps", 1e-6)?,
        rope_theta: real("rope_theta", 10_000.0)?,
        tie_word_embeddings: json.get("tie_word_embeddings").and_then(Value::as_bool).unwrap_or(false),
        initializer_range: real("initializer_range", 0.02)?,
        bos_token_id: token("bos_token_id"),
        eos_token_id: token("eos_token_id"),
    };
    check_config(&config)?;
    Ok(config)
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

/// `config.json` as Hugging Face's LlamaConfig reads it.
pub fn config_json(config: &LlamaConfig) -> Vec<u8> {
    let mut json = json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "float32",
        "hidden_act": "silu",
        "attention_bias": false,
        "mlp_bias": false,
    });
    let fields = serde_json::to_value(config).expect("a config is plain data");
    if let (Some(json), Value::Object(fields)) = (json.as_object_mut(), fields) {
        json.extend(fields);
    }
    serde_json::to_vec_pretty(&json).expect("a config is plain data")
}

/// Finds every parameter in `tensors` and checks its shape and type, before anything is copied.
pub fn check_weights(tensors: &Tensors, layout: &Layout, dir: &Path) -> Result<()> {
    let refuse = |what: String| Error::Input(format!("{}: {what}", dir.display()));
    for p in &layout.parameters {
        let Some(tensor) = tensors.get(&p.name) else {
            return Err(refuse(format!(
                "the weights lack {}; they do not belong to this config.json",
                p.name
            )));
        };
        if tensor.shape != p.shape {
            return Err(refuse(format!(
                "{} is {:?}, config.json asks for {:?}",
                p.name, tensor.shape, p.shape
            )));
        }
        if !matches!(tensor.dtype, Dtype::F32 | Dtype::BF16 | Dtype::F16) {
            return Err(refuse(format!("{} is {:?}; fleet reads F32, BF16 and F16", p.name, tensor.dtype)));
        }
    }
    Ok(())
}

/// Copies the part of `parameter` that lies in `range` (of the flat buffer) from `tensor`. `out` begins at the flat element `out_start`.
pub fn copy_part(
    parameter: &Parameter,
    tensor: TensorSlice,
    range: Range<usize>,
    out: &mut [f32],
    out_start: usize,
) {
    let (begin, end) = (range.start.max(parameter.range.start), range.end.min(parameter.range.end));
    if begin >= end {
        return;
    }
    let out = &mut out[begin - out_start..end - out_start];
    let size = if tensor.dtype == Dtype::F32 { 4 } else { 2 };
    let at = begin - parameter.range.start;
    let bytes = &tensor.data[at * size..(at + out.len()) * size];
    match tensor.dtype {
        Dtype::F32 => match from_bytes::<f32>(bytes) {
            Some(values) => out.copy_from_slice(values),
            None => {
                for (to, from) in out.iter_mut().zip(bytes.chunks_exact(4)) {
                    *to = f32::from_le_bytes([from[0], from[1], from[2], from[3]]);
                }
            }
        },
        Dtype::BF16 => {
            for (to, from) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                *to = bf16::from_le_bytes([from[0], from[1]]).to_f32();
            }
        }
        _ => {
            for (to, from) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                *to = f16::from_le_bytes([from[0], from[1]]).to_f32();
            }
        }
    }
}

/// Every parameter of the flat buffer `flat`, for writing.
pub fn tensor_refs<'a>(layout: &'a Layout, flat: &'a [f32]) -> Vec<TensorRef<'a>> {
    layout
        .parameters
        .iter()
        .map(|p| TensorRef {
            name: &p.name,
            dtype: Dtype::F32,
            shape: &p.shape,
            data: as_bytes(&flat[p.range.clone()]),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::tiny_config;

    fn object(value: Value) -> Map<String, Value> {
        value.as_object().unwrap().clone()
    }

    #[test]
    fn a_config_reads_back_as_it_was_written() {
        let config = tiny_config();
        let json: Value = serde_json::from_slice(&config_json(&config)).unwrap();
        assert_eq!(parse_config(&object(json)).unwrap(), config);
    }

    #[test]
    fn defaults_are_hugging_faces() {
        let config = parse_config(&object(json!({
            "model_type": "llama", "vocab_size": 8, "hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 3, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "eos_token_id": [7, 8],
        })))
        .unwrap();
        assert_eq!((config.num_key_value_heads, config.head_dim, config.eos_token_id), (3, 4, Some(7)));
        assert_eq!((config.rope_theta, config.rms_norm_eps, config.tie_word_embeddings), (5e5, 1e-6, false));
    }

    #[test]
    fn what_fleet_cannot_run_is_named() {
        let base = object(serde_json::from_slice(&config_json(&tiny_config())).unwrap());
        let with = |key: &str, value: Value| {
            let mut json = base.clone();
            json.insert(key.into(), value);
            parse_config(&json).unwrap_err()
        };
        assert!(with("model_type", json!("gpt2")).contains("gpt2"));
        assert!(with("rope_scaling", json!({"rope_type": "llama3"})).contains("llama3"));
        assert!(with("attention_bias", json!(true)).contains("attention_bias"));
        assert!(with("hidden_size", json!(-1)).contains("hidden_size"));
        assert!(with("num_key_value_heads", json!(3)).contains("multiple"));
    }
}
