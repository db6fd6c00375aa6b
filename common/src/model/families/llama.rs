//! Llama 1 to 3, and those that took over its shape.

use super::*;
use crate::model::{Attention, Form, Init, Mlp, Norm, NormKind, Positions, Rotary};
use serde_json::{Value, json};

pub const FAMILY: Family = Family {
    model_type: "llama",
    architecture: "LlamaForCausalLM",
    names: Names::LLAMA,
    stored: Stored::AsIs,
    qkv_by_head: false,
    prefix: "model.",
    eos: Some(2),
    splits: Splits::AsWritten,
    adds_end_of_text: false,
    lora: (&["q_proj", "v_proj", "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], 16),
    positions_key: "max_position_embeddings",
    aliases: &[],
    read,
    write,
    fill,
};

fn read(s: &Settings) -> Result<Decoder, String> {
    let bias = s.flag("attention_bias", false)?;
    let mut decoder = like_llama(s, Defaults { kv_heads: None, head_dim: None, max_positions: 2048 })?;
    (decoder.attention.qkv_bias, decoder.attention.out_bias) = (bias, bias);
    decoder.mlp.bias = s.flag("mlp_bias", false)?;
    Ok(decoder)
}

fn write(d: &Decoder) -> Object {
    let mut json = written(d);
    json.insert("attention_bias".into(), d.attention.qkv_bias.into());
    json.insert("mlp_bias".into(), d.mlp.bias.into());
    json
}

/// A new model is small: heads of 64 numbers, as many for keys as for queries, and as long as its sequences. Transformers' own sizes are those
/// of models that no single machine trains.
fn fill(config: &mut Object, positions: usize) -> Result<(), String> {
    let said = Settings::new(config);
    let hidden = said.count_or("hidden_size", 256)?;
    let usual = if hidden.is_multiple_of(64) { hidden / 64 } else { 4 };
    let heads = said.count_or("num_attention_heads", usual)?;
    whole_heads(("hidden_size", hidden), ("num_attention_heads", heads), 2)?;
    for (key, usual) in [
        ("hidden_size", hidden),
        // two thirds of four times the size, as Llama has it, up to a multiple of 64
        ("intermediate_size", (hidden * 8 / 3).next_multiple_of(64)),
        ("num_hidden_layers", 4),
        ("num_attention_heads", heads),
        ("num_key_value_heads", heads),
        ("head_dim", hidden / heads),
        ("max_position_embeddings", positions),
    ] {
        if config.get(key).is_none_or(Value::is_null) {
            config.insert(key.into(), usual.into());
        }
    }
    Ok(())
}

/// What the families of Llama's shape take for a key that is not there.
pub(super) struct Defaults {
    /// As many as heads where there is none.
    pub kv_heads: Option<usize>,
    /// The hidden size over the heads where there is none.
    pub head_dim: Option<usize>,
    pub max_positions: usize,
}

/// RMS norms, rotary embeddings, a gated network; no biases, no windows.
pub(super) fn like_llama(s: &Settings, defaults: Defaults) -> Result<Decoder, String> {
    let hidden_size = s.needed("hidden_size")?;
    let heads = s.needed("num_attention_heads")?;
    let layers = s.layers("num_hidden_layers")?.ok_or("lacks num_hidden_layers")?;
    let max_positions = s.count_or("max_position_embeddings", defaults.max_positions)?;
    let head_dim = s.count_or("head_dim", defaults.head_dim.unwrap_or((hidden_size / heads).max(1)))?;
    // A null says as many as heads, also where a missing key says something else.
    let kv_heads = defaults.kv_heads.filter(|_| !s.names("num_key_value_heads")).unwrap_or(heads);
    let rotary = Rotary::read(s, head_dim, max_positions, 1.0)?;
    if rotary.width < head_dim {
        return Err("partial_rotary_factor is not 1; models of this family turn whole heads".into());
    }
    Ok(Decoder {
        vocab_size: s.needed("vocab_size")?,
        hidden_size,
        embedding_size: hidden_size,
        layers,
        max_positions,
        positions: Positions::Rotary(rotary),
        norm: Norm { kind: NormKind::Rms, eps: s.from_zero_or("rms_norm_eps", 1e-6)?, affine: true },
        form: Form::NormFirst,
        embedding_norm: false,
        final_norm: true,
        attention: Attention {
            heads,
            kv_heads: s.count_or("num_key_value_heads", kv_heads)?,
            head_dim,
            qkv_bias: false,
            out_bias: false,
            qk_norm: false,
            windows: vec![None; layers],
        },
        mlp: Mlp {
            size: s.needed("intermediate_size")?,
            activation: activation(s, "hidden_act", "silu")?,
            gated: true,
            bias: false,
        },
        tied: s.flag("tie_word_embeddings", false)?,
        head_bias: false,
        init: Init { std: s.from_zero_or("initializer_range", 0.02)?, scale_residual: false },
    })
}

pub(super) fn written(d: &Decoder) -> Object {
    let Positions::Rotary(rotary) = &d.positions else {
        unreachable!("families of this shape turn their heads")
    };
    object(json!({
        "vocab_size": d.vocab_size,
        "hidden_size": d.hidden_size,
        "intermediate_size": d.mlp.size,
        "num_hidden_layers": d.layers,
        "num_attention_heads": d.attention.heads,
        "num_key_value_heads": d.attention.kv_heads,
        "head_dim": d.attention.head_dim,
        "max_position_embeddings": d.max_positions,
        "rms_norm_eps": d.norm.eps,
        "rope_theta": rotary.theta,
        "rope_parameters": rotary.write(d.attention.head_dim),
        "hidden_act": activation_name(d.mlp.activation),
        "tie_word_embeddings": d.tied,
        "initializer_range": d.init.std,
    }))
}
