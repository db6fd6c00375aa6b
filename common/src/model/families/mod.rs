//! The families of models, one file each: how their `config.json` spells a decoder, and what their tensors are called.

mod bloom;
mod gpt2;
mod llama;
mod mistral;
mod opt;
mod phi;
mod qwen2;
mod qwen3;
mod windows;

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
    /// How transformers 5 splits texts for its models.
    pub splits: Splits,
    /// The tokenizer class that transformers 5 takes for its models adds `<|endoftext|>` where no token for padding or the unknown is named.
    pub adds_end_of_text: bool,
    /// What its configuration calls the longest sequence.
    pub positions_key: &'static str,
    /// Names that count before those that `read` looks for, where both stand there: `attribute_map` in transformers' configuration classes.
    pub aliases: &'static [(&'static str, &'static str)],
    pub read: fn(&Settings) -> Result<Decoder, String>,
    /// The keys that describe a decoder, so that `read` gives the same one.
    pub write: fn(&Decoder) -> Object,
    /// Puts in what somebody who wants a new model, for sequences of so many tokens, need not say, where that is not what `read` takes for it.
    pub fill: fn(&mut Object, usize) -> Result<(), String>,
}

/// How a tokenizer splits a text into words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Splits {
    /// As its `tokenizer.json` says.
    AsWritten,
    /// Into letters that are composed, and digits one by one: what a byte-level `tokenizer.json` says of that is not looked at.
    ByDigit,
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
        let mut config = config.clone();
        self.resolve(&mut config);
        let settings = Settings::new(&config);
        settings.only("is_causal", true)?;
        if settings.object("per_layer_config")?.is_some() {
            return Err("per_layer_config is set; fleet computes all layers alike".into());
        }
        let decoder = (self.read)(&settings)?;
        windows::listed(&settings, decoder.layers)?; // what transformers refuses, also of a family without windows
        decoder.check()?;
        Ok(decoder)
    }

    /// Puts what stands under an alias where `read` and every version of transformers look for it.
    pub fn resolve(&self, config: &mut Object) {
        for (alias, name) in self.aliases {
            if let Some(value) = config.remove(*alias).filter(|value| !value.is_null()) {
                config.insert((*name).into(), value);
            }
        }
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
        other => Err(format!(
            "{key} is `{other}`; fleet computes silu (swish), gelu, gelu_new (gelu_pytorch_tanh, gelu_fast) and relu"
        )),
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

/// The hidden size is a whole number of heads. Proposed are sizes that give each a multiple of `elements`.
fn whole_heads(
    (size_key, size): (&str, usize),
    (heads_key, heads): (&str, usize),
    elements: usize,
) -> Result<(), String> {
    if size.is_multiple_of(heads) {
        return Ok(());
    }
    let step = heads.saturating_mul(elements);
    let below = size / step * step;
    let near =
        if below == 0 { step.to_string() } else { format!("{below} or {}", below.saturating_add(step)) };
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
    use crate::model::{Positions, Rotary, Scaling, Wiring};
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
            (json!({"is_causal": false}), "is_causal is false"),
            (json!({"per_layer_config": {"0": {"rms_norm_eps": 1e-3}}}), "per_layer_config is set"),
            (
                json!({"model_type": "bloom", "slow_but_exact": true, "pretraining_tp": 2, "hidden_size": 8}),
                "slow_but_exact is true and pretraining_tp above 1",
            ),
            (json!({"model_type": "opt", "do_layer_norm_before": null}), "do_layer_norm_before is null"),
            (json!({"model_type": "gpt2", "scale_attn_weights": null}), "scale_attn_weights is null"),
            (
                json!({
                    "original_max_position_embeddings": 16,
                    "rope_scaling": {"rope_type": "yarn", "factor": 2, "original_max_position_embeddings": 32},
                }),
                "original_max_position_embeddings is 16, and 32 in rope_scaling",
            ),
            (json!({"layer_types": []}), "layer_types has 0 entries, and the model 1 layers"),
            (json!({"layer_types": "full_attention"}), "not a list of texts"),
            (json!({"layer_types": [null]}), "layer_types has null; fleet computes full_attention"),
            (
                json!({"model_type": "mistral", "layer_types": ["chunked_attention"]}),
                "layer_types has \"chunked_attention\"",
            ),
            (
                json!({"model_type": "mistral", "layer_types": ["sliding_attention"], "sliding_window": null}),
                "sliding_window is null: there is no window",
            ),
            (
                json!({"model_type": "qwen2", "layer_types": ["sliding_attention"], "num_key_value_heads": 3}),
                "use_sliding_window is false",
            ),
        ] {
            let error = read(more.clone()).unwrap_err();
            assert!(error.contains(why), "{more}: {error}");
        }
    }

    /// As both versions of transformers read them.
    #[test]
    fn standard_names_count_before_those_of_the_family() {
        let sizes = |model_type: &str, more: Value| {
            let mut json = object(json!({"model_type": model_type, "vocab_size": 8}));
            json.extend(object(more));
            let (_, d) = Family::of_config(&json).unwrap();
            (d.hidden_size, d.layers, d.attention.heads, d.max_positions)
        };
        let native = json!({"n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 16});
        let standard = json!({"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 16});
        assert_eq!(sizes("gpt2", native.clone()), (24, 2, 4, 16));
        assert_eq!(sizes("gpt2", standard), (24, 2, 4, 16));
        let mut both = native;
        both["num_attention_heads"] = 6.into();
        both["num_hidden_layers"] = Value::Null;
        assert_eq!(sizes("gpt2", both), (24, 2, 6, 16));
        let both = json!({"hidden_size": 64, "n_embed": 48, "n_layer": 2, "num_hidden_layers": 1, "n_head": 4, "num_attention_heads": 6});
        assert_eq!(sizes("bloom", both), (48, 1, 6, 2048));
        assert_eq!(
            sizes("bloom", json!({"hidden_size": 64, "n_embed": null, "n_head": 4})),
            (64, 2, 4, 2048)
        );
    }

    /// Both versions of transformers take as many as heads for a null, and the class's own number where the key is not there.
    #[test]
    fn a_null_of_heads_of_keys_is_as_many_as_heads() {
        let heads = |more: Value| {
            let mut json =
                object(json!({"model_type": "qwen2", "num_attention_heads": 64, "hidden_size": 128}));
            json.extend(object(more));
            read(json.into()).unwrap().attention.kv_heads
        };
        assert_eq!((heads(json!({"num_key_value_heads": null})), heads(json!({}))), (64, 32));
    }

    #[test]
    fn zeros_that_mean_something_are_taken() {
        let yarn = |more: Value| {
            let mut rope = json!({"rope_type": "yarn", "factor": 2, "original_max_position_embeddings": 32});
            rope.as_object_mut().unwrap().extend(object(more));
            read(json!({"rope_scaling": rope})).unwrap().positions
        };
        let zeros = json!({"mscale": 0, "mscale_all_dim": 0.0, "beta_fast": 0, "beta_slow": 0});
        assert_eq!(yarn(zeros), yarn(json!({})));
        assert_eq!(read(json!({"rms_norm_eps": 0.0})).unwrap().norm.eps, 0.0);
    }

    /// What transformers 5.17 computes for the same files.
    #[test]
    fn windows_are_where_layer_types_says() {
        const SLIDING: &str = "sliding_attention";
        const FULL: &str = "full_attention";
        let windows = |model_type: &str, more: Value| {
            let mut json = tiny(json!({
                "model_type": model_type, "num_hidden_layers": 2, "num_key_value_heads": 3, "head_dim": 4, "sliding_window": 3,
            }));
            json.extend(object(more));
            let (family, decoder) = Family::of_config(&json).unwrap();
            let mut written = (family.write)(&decoder);
            written.insert("model_type".into(), model_type.into());
            assert_eq!(Family::of_config(&written).unwrap().1, decoder);
            (decoder.attention.windows, written.get("layer_types").cloned())
        };
        let mixed = json!([SLIDING, FULL]);
        assert_eq!(windows("mistral", json!({})), (vec![Some(3); 2], None));
        assert_eq!(windows("mistral", json!({"layer_types": null})).0, [Some(3); 2]);
        assert_eq!(
            windows("mistral", json!({"layer_types": mixed})),
            (vec![Some(3), None], Some(mixed.clone()))
        );
        assert_eq!(windows("mistral", json!({"layer_types": [FULL, FULL]})).0, [None; 2]);
        for family in ["qwen2", "qwen3"] {
            let used = |more: Value| {
                let mut keys = json!({"use_sliding_window": true, "max_window_layers": 1});
                keys.as_object_mut().unwrap().extend(object(more));
                windows(family, keys).0
            };
            assert_eq!(used(json!({})), [None, Some(3)], "{family}");
            assert_eq!(used(json!({"layer_types": mixed})), [Some(3), None], "{family}");
            assert_eq!(windows(family, json!({"layer_types": [FULL, FULL]})).0, [None; 2]);
        }
        assert_eq!(windows("llama", json!({"layer_types": mixed})).0, [None; 2]);
    }

    /// Transformers warns and goes on: what is longer than `low_freq_factor` allows is stretched, the rest is not.
    #[test]
    fn llama3_with_its_factors_the_wrong_way_round_has_no_middle() {
        let of = |low: f64, high: f64| {
            let rope = json!({"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": low, "high_freq_factor": high,
                "original_max_position_embeddings": 64});
            let decoder = read(json!({"head_dim": 32, "rope_parameters": rope})).unwrap();
            let Positions::Rotary(rotary) = decoder.positions else { panic!() };
            let plain = Rotary { scaling: Scaling::Default, ..rotary.clone() }.frequencies(9);
            rotary.frequencies(9).iter().zip(plain).map(|(f, plain)| f / plain).collect::<Vec<f64>>()
        };
        let (right, wrong) = (of(1.0, 4.0), of(4.0, 1.0));
        assert!(right.iter().any(|share| (0.13..0.99).contains(share)), "{right:?}");
        // Waves of 6.3, 11, 20 and more tokens; from 64 / 4 on they are stretched.
        assert_eq!(wrong[..3], [1.0, 1.0, 0.125], "{wrong:?}");
        assert!(wrong[2..].iter().all(|share| *share == 0.125));
    }

    #[test]
    fn units_cover_the_buffer_and_groups_lie_side_by_side() {
        for tied in [false, true] {
            let (family, decoder) = Family::of_config(&tiny(json!({"tie_word_embeddings": tied}))).unwrap();
            let wiring = Wiring::new(&decoder, family);
            let layout = &wiring.layout;
            let mut next = 0;
            for unit in &layout.units {
                assert_eq!(unit.start, next);
                next = unit.end;
            }
            assert_eq!(next, layout.len);
            assert_eq!(wiring.blocks[0].qkv.weight.len(), 3 * 12 * 12);
            assert_eq!(wiring.blocks[0].up.weight.len(), 2 * 16 * 12);
            assert_eq!((wiring.head.weight == wiring.embedding, layout.is_tied()), (tied, tied));
            let heads = if tied { 1 } else { 2 };
            assert_eq!(layout.count(), heads * 8 * 12 + 4 * 12 * 12 + 3 * 16 * 12 + 3 * 12);
        }
    }
}
