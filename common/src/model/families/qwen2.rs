//! Qwen 2 and 2.5: Llama with biases on queries, keys and values, and a window from some layer on.

use super::llama::{Defaults, like_llama, written};
use super::*;

pub const FAMILY: Family = Family {
    model_type: "qwen2",
    architecture: "Qwen2ForCausalLM",
    eos: None,
    splits: Splits::ByDigit,
    adds_end_of_text: true,
    read,
    write,
    ..super::llama::FAMILY
};

fn read(s: &Settings) -> Result<Decoder, String> {
    let mut decoder = like_qwen(s, None)?;
    decoder.attention.qkv_bias = true;
    Ok(decoder)
}

fn write(d: &Decoder) -> Object {
    windows_written(d, written(d))
}

pub(super) fn like_qwen(s: &Settings, head_dim: Option<usize>) -> Result<Decoder, String> {
    let mut decoder = like_llama(s, Defaults { kv_heads: Some(32), head_dim, max_positions: 32_768 })?;
    let window = match s.flag("use_sliding_window", false)? {
        true if s.names("sliding_window") => s.count("sliding_window")?,
        true => Some(4096),
        false => None,
    };
    let first = s.whole_or("max_window_layers", 28)?;
    let off = "use_sliding_window is false or sliding_window null";
    decoder.attention.windows = windows::read(s, decoder.layers, window, off, |layer| layer >= first)?;
    Ok(decoder)
}

pub(super) fn windows_written(d: &Decoder, mut json: Object) -> Object {
    let windows = &d.attention.windows;
    windows::write(&mut json, windows);
    json.insert("use_sliding_window".into(), windows.iter().any(Option::is_some).into());
    let first = windows.iter().position(Option::is_some).unwrap_or(windows.len());
    json.insert("max_window_layers".into(), first.into());
    json
}
