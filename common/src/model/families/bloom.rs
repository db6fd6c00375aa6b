//! BLOOM: ALiBi, a norm after the embedding, one matrix for queries, keys and values that is ordered by head.

use super::*;
use crate::model::{Attention, Form, Init, Mlp, Norm, NormKind, Positions};
use serde_json::json;

pub const FAMILY: Family = Family {
    model_type: "bloom",
    architecture: "BloomForCausalLM",
    names: Names {
        embedding: "transformer.word_embeddings",
        positions: "",
        embedding_norm: "transformer.word_embeddings_layernorm",
        project_in: "",
        project_out: "",
        layer: "transformer.h.{}.",
        norm1: "input_layernorm",
        qkv: &["self_attention.query_key_value"],
        q_norm: "",
        k_norm: "",
        out: "self_attention.dense",
        norm2: "post_attention_layernorm",
        up: &["mlp.dense_h_to_4h"],
        down: "mlp.dense_4h_to_h",
        final_norm: "transformer.ln_f",
        head: "lm_head",
    },
    stored: Stored::AsIs,
    qkv_by_head: true,
    prefix: "transformer.",
    eos: Some(2),
    splits: Splits::AsWritten,
    adds_end_of_text: false,
    lora: (&["query_key_value", "dense"], 8),
    positions_key: "seq_length",
    aliases: &[
        ("n_embed", "hidden_size"),
        ("num_attention_heads", "n_head"),
        ("num_hidden_layers", "n_layer"),
    ],
    read,
    write,
    fill: as_read,
};

/// BLOOM names no longest sequence; it was trained on this many tokens.
const POSITIONS: usize = 2048;

fn read(s: &Settings) -> Result<Decoder, String> {
    s.only("apply_residual_connection_post_layernorm", false)?;
    // Together they cut products in pieces, which changes what is computed; either alone changes nothing.
    if s.flag("slow_but_exact", false)? && s.count_or("pretraining_tp", 1)? > 1 {
        return Err("slow_but_exact is true and pretraining_tp above 1; fleet does not compute that".into());
    }
    let hidden_size = s.count_or("hidden_size", 64)?;
    let heads = s.count_or("n_head", 8)?;
    let layers = s.layers("n_layer")?.unwrap_or(2);
    whole_heads(("hidden_size", hidden_size), ("n_head", heads), 1)?;
    Ok(Decoder {
        vocab_size: s.count_or("vocab_size", 250_880)?,
        hidden_size,
        embedding_size: hidden_size,
        layers,
        max_positions: s.count_or("seq_length", POSITIONS)?,
        positions: Positions::Alibi,
        norm: Norm { kind: NormKind::Layer, eps: s.from_zero_or("layer_norm_epsilon", 1e-5)?, affine: true },
        form: Form::NormFirst,
        embedding_norm: true,
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
        mlp: Mlp { size: 4 * hidden_size, activation: Activation::GeluTanh, gated: false, bias: true },
        tied: s.flag("tie_word_embeddings", true)?,
        head_bias: false,
        init: Init { std: s.from_zero_or("initializer_range", 0.02)?, scale_residual: false },
    })
}

fn write(d: &Decoder) -> Object {
    object(json!({
        "vocab_size": d.vocab_size,
        "hidden_size": d.hidden_size,
        "n_layer": d.layers,
        "n_head": d.attention.heads,
        "seq_length": d.max_positions,
        "layer_norm_epsilon": d.norm.eps,
        "tie_word_embeddings": d.tied,
        "initializer_range": d.init.std,
    }))
}
