//! Mistral: Llama with a window over the last tokens.

use super::llama::{Defaults, like_llama, written};
use super::*;

pub const FAMILY: Family =
    Family { model_type: "mistral", architecture: "MistralForCausalLM", read, write, ..super::llama::FAMILY };

/// The window of transformers' MistralConfig where a file has no such key; a null there means none.
const WINDOW: usize = 4096;

fn read(s: &Settings) -> Result<Decoder, String> {
    let defaults = Defaults { kv_heads: Some(8), head_dim: None, max_positions: 4096 * 32 };
    let mut decoder = like_llama(s, defaults)?;
    let window = if s.names("sliding_window") { s.count("sliding_window")? } else { Some(WINDOW) };
    decoder.attention.windows.fill(window);
    Ok(decoder)
}

fn write(d: &Decoder) -> Object {
    let mut json = written(d);
    json.insert("sliding_window".into(), d.attention.windows[0].into());
    json
}
