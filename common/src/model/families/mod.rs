//! The families of models, one file each: how their `config.json` spells a decoder, and what their tensors are called.

mod bloom;
mod gpt2;
mod llama;
mod mistral;
mod opt;
mod phi;
mod qwen2;
mod qwen3;

use super::{Activation, Decoder, Object, Settings, Stored};

/// A kind of model in the words of transformers.
#[derive(Debug)]
pub struct Family {
    pub model_type: &'static str,
    /// The class that transformers loads it with.
    pub architecture: &'static str,
    pub names: Names,
    /// How its files have the matrices of its blocks.
    pub stored: Stored,
    /// One matrix for queries, keys and values is ordered by head.
    pub qkv_by_head: bool,
    /// What stands before the names of the decoder's tensors; some files leave it out.
    pub prefix: &'static str,
    /// The token that ends a text where a configuration has no `eos_token_id`.
    pub eos: Option<u32>,
    /// What its configuration calls the longest sequence.
    pub positions_key: &'static str,
    pub read: fn(&Settings) -> Result<Decoder, String>,
    /// The keys that describe a decoder, so that `read` gives the same one.
    pub write: fn(&Decoder) -> Object,
    /// Puts in what somebody who wants a new model, for sequences of so many tokens, need not say, where that is not what `read` takes for it.
    pub fill: fn(&mut Object, usize) -> Result<(), String>,
}

/// What tensors are called, without `.weight` and `.bias`.
#[derive(Debug)]
pub struct Names {
    pub embedding: &'static str,
    pub positions: &'static str,
    pub embedding_norm: &'static str,
    pub project_in: &'static str,
    pub project_out: &'static str,
    /// What stands before the names of a block's tensors; `{}` is its number, from 0.
    pub layer: &'static str,
    /// Before the attention.
    pub norm1: &'static str,
    /// One name, or queries, keys and values.
    pub qkv: &'static [&'static str],
    pub q_norm: &'static str,
    pub k_norm: &'static str,
    pub out: &'static str,
    /// Before the feed-forward network.
    pub norm2: &'static str,
    /// Gate and up, or up alone.
    pub up: &'static [&'static str],
    pub down: &'static str,
    pub final_norm: &'static str,
    pub head: &'static str,
}

impl Names {
    /// Those of Llama, which most others have taken over.
    const LLAMA: Names = Names {
        embedding: "model.embed_tokens",
        positions: "",
        embedding_norm: "",
        project_in: "",
        project_out: "",
        layer: "model.layers.{}.",
        norm1: "input_layernorm",
        qkv: &["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        q_norm: "self_attn.q_norm",
        k_norm: "self_attn.k_norm",
        out: "self_attn.o_proj",
        norm2: "post_attention_layernorm",
        up: &["mlp.gate_proj", "mlp.up_proj"],
        down: "mlp.down_proj",
        final_norm: "model.norm",
        head: "lm_head",
    };
}

const FAMILIES: [&Family; 8] = [
    &llama::FAMILY,
    &mistral::FAMILY,
    &qwen2::FAMILY,
    &qwen3::FAMILY,
    &phi::FAMILY,
    &gpt2::FAMILY,
    &opt::FAMILY,
    &bloom::FAMILY,
];

impl Family {
    /// The one of this `model_type`.
    pub fn find(model_type: &str) -> Option<&'static Family> {
        FAMILIES.into_iter().find(|family| family.model_type == model_type)
    }

    /// What a new model is of where nobody says.
    pub const DEFAULT: &'static Family = FAMILIES[0];

    pub fn all() -> impl Iterator<Item = &'static Family> {
        FAMILIES.into_iter()
    }

    /// What there is, for messages.
    pub fn list() -> String {
        FAMILIES.map(|family| family.model_type).join(", ")
    }

    /// The keys that describe a model of it.
    pub fn keys(&self) -> Vec<String> {
        let mut config = object(serde_json::json!({"vocab_size": 1}));
        let decoder = (self.fill)(&mut config, 1).and_then(|()| self.decoder(&config));
        let decoder =
            decoder.expect("a test holds that every family describes a model of which nothing was said");
        (self.write)(&decoder).into_iter().map(|(key, _)| key).collect()
    }

    /// The decoder that a `config.json` describes, or why fleet cannot run it.
    pub fn of_config(config: &Object) -> Result<(&'static Family, Decoder), String> {
        let settings = Settings::new(config);
        let Some(model_type) = settings.text("model_type")? else {
            return Err(format!("has no model_type; fleet runs {}", Family::list()));
        };
        let family = Family::find(model_type)
            .ok_or_else(|| format!("model_type is `{model_type}`; fleet runs {}", Family::list()))?;
        if settings.get("quantization_config").is_some() {
            return Err("quantization_config is set; fleet reads weights that are not quantized".into());
        }
        Ok((family, family.decoder(config)?))
    }

    /// The decoder that the configuration of a model of this family describes.
    pub fn decoder(&self, config: &Object) -> Result<Decoder, String> {
        let decoder = (self.read)(&Settings::new(config))?;
        decoder.check()?;
        Ok(decoder)
    }

    pub(super) fn stored_qkv(&self, heads: usize) -> Stored {
        if self.qkv_by_head { Stored::ByHead { heads } } else { self.stored }
    }
}

/// An activation by transformers' name.
fn activation(settings: &Settings, key: &str, default: &str) -> Result<Activation, String> {
    match settings.text(key)?.unwrap_or(default) {
        "silu" | "swish" => Ok(Activation::Silu),
        "gelu" => Ok(Activation::Gelu),
        "gelu_new" | "gelu_pytorch_tanh" | "gelu_fast" => Ok(Activation::GeluTanh),
        "relu" => Ok(Activation::Relu),
        other => Err(format!("{key} is `{other}`; fleet computes silu, gelu, gelu_new and relu")),
    }
}

fn activation_name(activation: Activation) -> &'static str {
    match activation {
        Activation::Silu => "silu",
        Activation::Gelu => "gelu",
        Activation::GeluTanh => "gelu_new",
        Activation::Relu => "relu",
    }
}

/// What `read` takes for a key that is not there is what a new model has.
fn as_read(_: &mut Object, _: usize) -> Result<(), String> {
    Ok(())
}

/// The hidden size is a whole number of heads.
fn whole_heads((size_key, size): (&str, usize), (heads_key, heads): (&str, usize)) -> Result<(), String> {
    if size.is_multiple_of(heads) {
        return Ok(());
    }
    let below = size / heads * heads;
    let near = if below == 0 { heads.to_string() } else { format!("{below} or {}", below + heads) };
    Err(format!(
        "{size_key} ({size}) is not a multiple of {heads_key} ({heads}); set {size_key} to {near}, or {heads_key} to a divisor of {size}"
    ))
}

fn object(json: serde_json::Value) -> Object {
    match json {
        serde_json::Value::Object(object) => object,
        other => unreachable!("{other} is written as an object"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Layout, Positions, Scaling};
    use serde_json::{Value, json};

    fn tiny(more: Value) -> Object {
        let mut json = object(json!({
            "model_type": "llama", "vocab_size": 8, "hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 3,
        }));
        json.extend(object(more));
        json
    }

    fn read(more: Value) -> Result<Decoder, String> {
        Family::of_config(&tiny(more)).map(|(_, decoder)| decoder)
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
            "attention_bias",
            "mlp_bias",
            "hidden_act",
            "quantization_config",
            "partial_rotary_factor",
        ];
        let nulls: Object = keys.iter().map(|key| (key.to_string(), Value::Null)).collect();
        assert_eq!(read(nulls.into()), read(json!({})));
        assert!(read(json!({"hidden_size": null})).unwrap_err().contains("lacks hidden_size"));
    }

    #[test]
    fn the_rotary_base_is_found_wherever_transformers_wrote_it() {
        let theta = |more: Value| match read(more).unwrap().positions {
            Positions::Rotary(rotary) => (rotary.theta, rotary.scaling),
            other => panic!("{other:?}"),
        };
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
            assert_eq!(theta(given.clone()), (5e5, Scaling::Default), "{given}");
        }
        assert_eq!(theta(json!({})), (1e4, Scaling::Default));
    }

    #[test]
    fn what_is_not_computed_is_refused_by_its_key() {
        for (more, why) in [
            (json!({"model_type": "gemma"}), "model_type is `gemma`; fleet runs llama, mistral"),
            (json!({"model_type": null}), "has no model_type"),
            (json!({"quantization_config": {"bits": 4}}), "quantization_config is set"),
            (json!({"hidden_act": "mish"}), "hidden_act is `mish`"),
            (json!({"hidden_act": 5}), "hidden_act is 5, not a text"),
            (
                json!({"rope_scaling": {"rope_type": "longrope"}}),
                "rope_type is `longrope`; fleet computes default",
            ),
            (json!({"rope_scaling": {"rope_type": "linear"}}), "`linear` lacks its factor"),
            (json!({"rope_parameters": "oops"}), "rope_parameters is \"oops\", not an object"),
            (json!({"rope_parameters": {"partial_rotary_factor": 0.5}}), "turn whole heads"),
            (json!({"rope_theta": -1}), "rope_theta is -1"),
            (json!({"vocab_size": 8.5}), "vocab_size is 8.5"),
            (json!({"num_key_value_heads": 2}), "not a multiple of num_key_value_heads (2)"),
            (json!({"head_dim": 5}), "turn 5 of head_dim = 5"),
            (json!({"num_hidden_layers": 1_000_000}), "fleet takes at most 4096"),
            (json!({"hidden_size": -1}), "hidden_size is -1, not a positive whole number"),
            (
                json!({"hidden_size": 1 << 29, "intermediate_size": 1 << 29}),
                "parameters; fleet takes at most",
            ),
            (json!({"rms_norm_eps": "small"}), "rms_norm_eps is \"small\""),
        ] {
            let error = read(more.clone()).unwrap_err();
            assert!(error.contains(why), "{more}: {error}");
        }
    }

    #[test]
    fn units_cover_the_buffer_and_groups_lie_side_by_side() {
        for tied in [false, true] {
            let (family, decoder) = Family::of_config(&tiny(json!({"tie_word_embeddings": tied}))).unwrap();
            let layout = Layout::new(&decoder, family);
            let mut next = 0;
            for unit in &layout.units {
                assert_eq!(unit.start, next);
                next = unit.end;
            }
            assert_eq!(next, layout.len);
            assert_eq!(layout.blocks[0].qkv.weight.len(), 3 * 12 * 12);
            assert_eq!(layout.blocks[0].up.weight.len(), 2 * 16 * 12);
            assert_eq!(layout.head.weight == layout.embedding, tied);
            let heads = if tied { 1 } else { 2 };
            assert_eq!(layout.count(), heads * 8 * 12 + 4 * 12 * 12 + 3 * 16 * 12 + 3 * 12);
        }
    }
}
