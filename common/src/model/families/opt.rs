//! OPT: learned positions from the third row on, LayerNorms, ReLU. The one of 350 million parameters has its norms last and a narrower embedding.

use super::*;
use crate::model::{Attention, Form, Init, Mlp, Norm, NormKind, Positions};
use serde_json::json;

pub const FAMILY: Family = Family {
    model_type: "opt",
    architecture: "OPTForCausalLM",
    names: Names {
        embedding: "model.decoder.embed_tokens",
        positions: "model.decoder.embed_positions",
        embedding_norm: "",
        project_in: "model.decoder.project_in",
        project_out: "model.decoder.project_out",
        layer: "model.decoder.layers.{}.",
        norm1: "self_attn_layer_norm",
        qkv: &["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        q_norm: "",
        k_norm: "",
        out: "self_attn.out_proj",
        norm2: "final_layer_norm",
        up: &["fc1"],
        down: "fc2",
        final_norm: "model.decoder.final_layer_norm",
        head: "lm_head",
    },
    stored: Stored::AsIs,
    qkv_by_head: false,
    prefix: "model.",
    eos: Some(2),
    splits: Splits::AsWritten,
    adds_end_of_text: false,
    lora: (&["q_proj", "v_proj", "k_proj", "out_proj", "fc1", "fc2"], 8),
    positions_key: "max_position_embeddings",
    aliases: &[],
    read,
    write,
    fill: as_read,
};

/// That of PyTorch's LayerNorm; OPT has no key for it.
const EPS: f64 = 1e-5;

fn read(s: &Settings) -> Result<Decoder, String> {
    let hidden_size = s.count_or("hidden_size", 768)?;
    let heads = s.count_or("num_attention_heads", 12)?;
    let layers = s.layers("num_hidden_layers")?.unwrap_or(12);
    whole_heads(("hidden_size", hidden_size), ("num_attention_heads", heads), 1)?;
    let first = s.flag("do_layer_norm_before", true)?;
    let bias = s.flag("enable_bias", true)?;
    Ok(Decoder {
        vocab_size: s.count_or("vocab_size", 50_272)?,
        hidden_size,
        embedding_size: s.count_or("word_embed_proj_dim", hidden_size)?,
        layers,
        max_positions: s.count_or("max_position_embeddings", 2048)?,
        positions: Positions::Learned { offset: 2 },
        norm: Norm {
            kind: NormKind::Layer,
            eps: EPS,
            affine: s.flag("layer_norm_elementwise_affine", true)?,
        },
        form: if first { Form::NormFirst } else { Form::NormLast },
        embedding_norm: false,
        final_norm: first && !s.flag("_remove_final_layer_norm", false)?,
        attention: Attention {
            heads,
            kv_heads: heads,
            head_dim: hidden_size / heads,
            qkv_bias: bias,
            out_bias: bias,
            qk_norm: false,
            windows: vec![None; layers],
        },
        mlp: Mlp {
            size: s.count_or("ffn_dim", 3072)?,
            activation: activation(s, "activation_function", "relu")?,
            gated: false,
            bias,
        },
        tied: s.flag("tie_word_embeddings", true)?,
        head_bias: false,
        init: Init { std: s.from_zero_or("init_std", 0.02)?, scale_residual: false },
    })
}

fn write(d: &Decoder) -> Object {
    object(json!({
        "vocab_size": d.vocab_size,
        "hidden_size": d.hidden_size,
        "word_embed_proj_dim": d.embedding_size,
        "ffn_dim": d.mlp.size,
        "num_hidden_layers": d.layers,
        "num_attention_heads": d.attention.heads,
        "max_position_embeddings": d.max_positions,
        "do_layer_norm_before": d.form == Form::NormFirst,
        "_remove_final_layer_norm": d.form == Form::NormFirst && !d.final_norm,
        "layer_norm_elementwise_affine": d.norm.affine,
        "enable_bias": d.mlp.bias,
        "activation_function": activation_name(d.mlp.activation),
        "tie_word_embeddings": d.tied,
        "init_std": d.init.std,
    }))
}
