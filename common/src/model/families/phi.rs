//! Phi 1, 1.5 and 2: attention and feed-forward network side by side after one LayerNorm, a part of each head turned, biases everywhere.

use super::*;
use crate::model::{Attention, Form, Init, Mlp, Norm, NormKind, Positions, Rotary};
use serde_json::json;

pub const FAMILY: Family = Family {
    model_type: "phi",
    architecture: "PhiForCausalLM",
    names: Names {
        q_norm: "self_attn.q_layernorm",
        k_norm: "self_attn.k_layernorm",
        out: "self_attn.dense",
        up: &["mlp.fc1"],
        down: "mlp.fc2",
        final_norm: "model.final_layernorm",
        ..Names::LLAMA
    },
    stored: Stored::AsIs,
    qkv_by_head: false,
    prefix: "model.",
    eos: Some(2),
    splits: Splits::AsWritten,
    adds_end_of_text: false,
    lora: (&["q_proj", "v_proj", "dense"], 8),
    positions_key: "max_position_embeddings",
    aliases: &[],
    read,
    write,
    fill: as_read,
};

fn read(s: &Settings) -> Result<Decoder, String> {
    let hidden_size = s.count_or("hidden_size", 2048)?;
    let heads = s.count_or("num_attention_heads", 32)?;
    let layers = s.layers("num_hidden_layers")?.unwrap_or(24);
    let max_positions = s.count_or("max_position_embeddings", 2048)?;
    let head_dim = s.count_or("head_dim", (hidden_size / heads).max(1))?;
    Ok(Decoder {
        vocab_size: s.count_or("vocab_size", 51_200)?,
        hidden_size,
        embedding_size: hidden_size,
        layers,
        max_positions,
        positions: Positions::Rotary(Rotary::read(s, head_dim, max_positions, 0.5)?),
        norm: Norm { kind: NormKind::Layer, eps: s.from_zero_or("layer_norm_eps", 1e-5)?, affine: true },
        form: Form::Parallel,
        embedding_norm: false,
        final_norm: true,
        attention: Attention {
            heads,
            kv_heads: s.count_or("num_key_value_heads", heads)?,
            head_dim,
            qkv_bias: true,
            out_bias: true,
            qk_norm: s.flag("qk_layernorm", false)?,
            windows: vec![None; layers],
        },
        mlp: Mlp {
            size: s.count_or("intermediate_size", 8192)?,
            activation: activation(s, "hidden_act", "gelu_new")?,
            gated: false,
            bias: true,
        },
        tied: s.flag("tie_word_embeddings", false)?,
        head_bias: true,
        init: Init { std: s.from_zero_or("initializer_range", 0.02)?, scale_residual: false },
    })
}

fn write(d: &Decoder) -> Object {
    let Positions::Rotary(rotary) = &d.positions else { unreachable!("phi turns its heads") };
    object(json!({
        "vocab_size": d.vocab_size,
        "hidden_size": d.hidden_size,
        "intermediate_size": d.mlp.size,
        "num_hidden_layers": d.layers,
        "num_attention_heads": d.attention.heads,
        "num_key_value_heads": d.attention.kv_heads,
        "max_position_embeddings": d.max_positions,
        "layer_norm_eps": d.norm.eps,
        "rope_theta": rotary.theta,
        "partial_rotary_factor": rotary.share(d.attention.head_dim),
        "rope_parameters": rotary.write(d.attention.head_dim),
        "qk_layernorm": d.attention.qk_norm,
        "hidden_act": activation_name(d.mlp.activation),
        "tie_word_embeddings": d.tied,
        "initializer_range": d.init.std,
    }))
}
