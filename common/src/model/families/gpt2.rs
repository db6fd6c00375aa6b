//! GPT-2: learned positions, LayerNorms, matrices stored `[in, out]`.

use super::*;
use crate::model::{Attention, Form, Init, Mlp, Norm, NormKind, Positions};
use serde_json::json;

pub const FAMILY: Family = Family {
    model_type: "gpt2",
    architecture: "GPT2LMHeadModel",
    names: Names {
        embedding: "transformer.wte",
        positions: "transformer.wpe",
        embedding_norm: "",
        project_in: "",
        project_out: "",
        layer: "transformer.h.{}.",
        norm1: "ln_1",
        qkv: &["attn.c_attn"],
        q_norm: "",
        k_norm: "",
        out: "attn.c_proj",
        norm2: "ln_2",
        up: &["mlp.c_fc"],
        down: "mlp.c_proj",
        final_norm: "transformer.ln_f",
        head: "lm_head",
    },
    stored: Stored::Transposed,
    qkv_by_head: false,
    prefix: "transformer.",
    eos: Some(50_256),
    splits: Splits::AsWritten,
    adds_end_of_text: false,
    lora: (&["c_attn", "c_proj"], 12),
    positions_key: "n_positions",
    aliases: &[
        ("hidden_size", "n_embd"),
        ("max_position_embeddings", "n_positions"),
        ("num_attention_heads", "n_head"),
        ("num_hidden_layers", "n_layer"),
    ],
    read,
    write,
    fill: as_read,
};

fn read(s: &Settings) -> Result<Decoder, String> {
    s.only("scale_attn_weights", true)?;
    s.only("scale_attn_by_inverse_layer_idx", false)?;
    s.only("add_cross_attention", false)?;
    let hidden_size = s.count_or("n_embd", 768)?;
    let heads = s.count_or("n_head", 12)?;
    let layers = s.layers("n_layer")?.unwrap_or(12);
    whole_heads(("n_embd", hidden_size), ("n_head", heads), 1)?;
    Ok(Decoder {
        vocab_size: s.count_or("vocab_size", 50_257)?,
        hidden_size,
        embedding_size: hidden_size,
        layers,
        max_positions: s.count_or("n_positions", 1024)?,
        positions: Positions::Learned { offset: 0 },
        norm: Norm { kind: NormKind::Layer, eps: s.from_zero_or("layer_norm_epsilon", 1e-5)?, affine: true },
        form: Form::NormFirst,
        embedding_norm: false,
        final_norm: true,
        attention: Attention {
            heads,
            kv_heads: heads,
            head_dim: hidden_size / heads,
            qkv_bias: true,
            out_bias: true,
            qk_norm: false,
            windows: vec![None; layers],
        },
        mlp: Mlp {
            size: s.count_or("n_inner", 4 * hidden_size)?,
            activation: activation(s, "activation_function", "gelu_new")?,
            gated: false,
            bias: true,
        },
        tied: s.flag("tie_word_embeddings", true)?,
        head_bias: false,
        init: Init { std: s.from_zero_or("initializer_range", 0.02)?, scale_residual: true },
    })
}

fn write(d: &Decoder) -> Object {
    object(json!({
        "vocab_size": d.vocab_size,
        "n_embd": d.hidden_size,
        "n_inner": d.mlp.size,
        "n_layer": d.layers,
        "n_head": d.attention.heads,
        "n_positions": d.max_positions,
        "layer_norm_epsilon": d.norm.eps,
        "activation_function": activation_name(d.mlp.activation),
        "tie_word_embeddings": d.tied,
        "initializer_range": d.init.std,
    }))
}
