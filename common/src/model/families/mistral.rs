//! Mistral: Llama with a window over the last tokens, in all layers or in those that `layer_types` names, as Ministral has it.

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
    decoder.attention.windows = windows::read(s, decoder.layers, window, "sliding_window is null", |_| true)?;
    Ok(decoder)
}

fn write(d: &Decoder) -> Object {
    let (mut json, windows) = (written(d), &d.attention.windows);
    windows::write(&mut json, windows);
    if windows.iter().all(|window| *window == windows[0]) {
        json.remove("layer_types"); // older versions of transformers do not know it here, newer ones load another class for it
    }
    json
}
