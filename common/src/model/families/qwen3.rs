//! Qwen 3: Qwen 2 without biases, with a norm over each head's queries and keys.

use super::llama::written;
use super::qwen2::{like_qwen, windows_written};
use super::*;

pub const FAMILY: Family =
    Family { model_type: "qwen3", architecture: "Qwen3ForCausalLM", eos: None, read, write, ..super::llama::FAMILY };

fn read(s: &Settings) -> Result<Decoder, String> {
    let bias = s.flag("attention_bias", false)?;
    let mut decoder = like_qwen(s, Some(128))?;
    let attention = &mut decoder.attention;
    (attention.qkv_bias, attention.out_bias, attention.qk_norm) = (bias, bias, true);
    Ok(decoder)
}

fn write(d: &Decoder) -> Object {
    let mut json = windows_written(d, written(d));
    json.insert("attention_bias".into(), d.attention.qkv_bias.into());
    json
}
