//! Qwen 2 and 2.5: Llama with biases on queries, keys and values, and a window from some layer on.

use super::llama::{Defaults, like_llama, written};
use super::*;

pub const FAMILY: Family = Family {
    model_type: "qwen2",
    architecture: "Qwen2ForCausalLM",
    eos: None,
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
    if s.flag("use_sliding_window", false)? {
        let window = if s.names("sliding_window") { s.count("sliding_window")? } else { Some(4096) };
        let (first, layers) = (s.whole_or("max_window_layers", 28)?, decoder.layers);
        let listed = match s.get("layer_types") {
            None => None,
            Some(list) => Some(list.as_array().filter(|list| list.len() == layers).ok_or(format!(
                "layer_types is no list of {layers} kinds of attention, one for each of num_hidden_layers"
            ))?),
        };
        for (layer, slot) in decoder.attention.windows.iter_mut().enumerate() {
            let slides = match listed.and_then(|list| list.get(layer)?.as_str()) {
                Some(kind) => kind == "sliding_attention",
                None => layer >= first,
            };
            *slot = window.filter(|_| slides);
        }
    }
    Ok(decoder)
}

pub(super) fn windows_written(d: &Decoder, mut json: Object) -> Object {
    let windows = &d.attention.windows;
    let window = windows.iter().flatten().next();
    json.insert("use_sliding_window".into(), window.is_some().into());
    json.insert("sliding_window".into(), window.copied().into());
    let kind = |window: &Option<usize>| match window {
        Some(_) => "sliding_attention",
        None => "full_attention",
    };
    json.insert("layer_types".into(), windows.iter().map(kind).collect());
    let first = windows.iter().position(Option::is_some).unwrap_or(windows.len());
    json.insert("max_window_layers".into(), first.into());
    json
}
