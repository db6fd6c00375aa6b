//! `fleet-rank generate`: continues a text from a model directory.

mod prompt;
mod sampler;
mod text;

pub use prompt::{Ask, Message};
pub use sampler::Sampling;
pub use text::TextStream;

use crate::host_model::{HostModel, read_weights};
use fleet_checkpoint::TOKENIZER_FILE;
use fleet_common::job::Tokenizer;
use fleet_common::model::{Decoder, Positions, Scaling};
use fleet_data::guarded;
use fleet_data::model_dir::GivenTokenizer;
use fleet_kernels::all_finite;
use fleet_learn::model::Model;
use fleet_learn::{Error, Result};
use prompt::{Prompt, end_ids};
use std::path::{Path, PathBuf};
use std::time::Instant;

/// How to continue a text.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Settings {
    pub max_new_tokens: usize,
    pub sampling: Sampling,
    pub threads: u32,
}

/// Why a text ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum End {
    EndOfText,
    MaxNewTokens,
    /// The model was made for no more positions.
    Context,
}

/// What was generated.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Generated {
    pub prompt: String,
    pub text: String,
    pub prompt_tokens: usize,
    pub new_tokens: usize,
    pub end: End,
    pub tokens_per_s: f64,
    /// What the user should know.
    #[serde(skip)]
    pub notes: Vec<String>,
}

/// Of a text whose model sets no limit: its tokens' keys and values are kept.
const POSITIONS_MAX: usize = 1 << 20;

/// Whether the positions are scaled for texts that are longer than those of the training; transformers then sets no limit.
fn is_stretched(decoder: &Decoder) -> bool {
    matches!(&decoder.positions, Positions::Rotary(rotary) if rotary.scaling != Scaling::Default)
}

/// Continues a text, or answers a message, with the model of a directory and the adapters that change it; `emit` gets the text piece by piece, each whole UTF-8,
/// and ends the generation by giving `false`.
pub fn generate<'a>(
    (dir, adapters): (&Path, &[PathBuf]),
    ask: impl Into<Ask<'a>>,
    settings: &Settings,
    emit: &mut dyn FnMut(&str) -> bool,
) -> Result<Generated> {
    let Settings { max_new_tokens, sampling, threads } = settings;
    let ask = ask.into();
    let (given, weights) = read_weights(dir, adapters)?;
    let model = Model::of_dir(&given);
    let path = dir.join(TOKENIZER_FILE);
    let refuse = |what: String| Error::Input(format!("{}: {what}", path.display()));
    let vocab = model.decoder.vocab_size as u32;
    let opened = GivenTokenizer::open(&path, vocab).map_err(|e| Error::Input(e.to_string()))?;
    let mut ends = end_ids(dir, &opened)?;
    let file = Tokenizer::File(path.clone());
    let Prompt { mut ids, end, mut notes } = guarded(&file, || Ok(Prompt::of(&ask, dir, &opened)))??;
    ends.extend(end);
    if ids.is_empty() {
        // A text begins where another one ended.
        ids.push(model.bos_token_id.or(model.eos_token_id).unwrap_or(0));
    }
    if let Some(id) = ids.iter().find(|id| **id >= vocab) {
        return Err(refuse(format!(
            "gives token {id}, but the model knows {vocab}; it belongs to another model"
        )));
    }
    let made_for = model.decoder.max_positions;
    let context = if is_stretched(&model.decoder) { made_for.max(POSITIONS_MAX) } else { made_for };
    if ids.len() >= context {
        return Err(Error::Input(format!(
            "the prompt has {} tokens and the model takes {context}; shorten it",
            ids.len()
        )));
    }

    let prompt_tokens = ids.len();
    let mut host = HostModel::new(given, weights, *threads, prompt_tokens)?;
    let mut cache = host.cache();
    let mut stream = guarded(&file, || Ok(TextStream::new(&opened.tokenizer, &ids)))?
        .map_err(|e| refuse(format!("cannot decode the prompt: {e}")))?;
    let mut text = String::new();
    let mut new_tokens = 0;
    let began = Instant::now();
    let ids: Vec<i64> = ids.into_iter().map(i64::from).collect();
    let mut logits = if *max_new_tokens > 0 { host.prefill(&ids, &mut cache)? } else { Vec::new() };
    let end = loop {
        if new_tokens == *max_new_tokens {
            break End::MaxNewTokens;
        }
        if !all_finite(&logits) {
            return Err(Error::Input(format!(
                "{}: the model computes NaN or infinite logits for token {}; its weights cannot be used",
                dir.display(),
                cache.len() + 1
            )));
        }
        let id = sampling.pick(&logits, new_tokens as u64) as u32;
        if ends.contains(&id) {
            break End::EndOfText;
        }
        new_tokens += 1;
        let piece = stream.push(id).map_err(|e| refuse(format!("cannot decode token {id}: {e}")))?;
        text.push_str(&piece);
        if !emit(&piece) {
            break End::MaxNewTokens;
        }
        if cache.len() == context {
            break End::Context;
        }
        if new_tokens < *max_new_tokens {
            logits = host.decode(i64::from(id), &mut cache)?;
        }
    };
    if cache.len() > made_for {
        notes.push(format!("the text goes beyond the {made_for} positions that the model was made for"));
    }
    let rest = stream.finish().map_err(|e| refuse(format!("cannot decode: {e}")))?;
    emit(&rest);
    text.push_str(&rest);
    let tokens_per_s = new_tokens as f64 / began.elapsed().as_secs_f64().max(1e-9);
    let prompt = match ask {
        Ask::Text(text) => text,
        Ask::Message(message) => message.text,
    };
    Ok(Generated { prompt: prompt.to_owned(), text, prompt_tokens, new_tokens, end, tokens_per_s, notes })
}
