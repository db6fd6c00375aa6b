//! A model that writes texts: its weights, its tokenizer, its chat templates.

use super::prompt::{Ask, Prompt};
use super::stop::StopStrings;
use super::{End, Generated, Settings, TextStream};
use crate::host_model::{Changes, HostModel};
use fleet_checkpoint::TOKENIZER_FILE;
use fleet_common::job::{Quantization, Tokenizer};
use fleet_common::model::{Decoder, Positions, Scaling};
use fleet_data::chat::{Template, Templates, TurnEnd};
use fleet_data::guarded;
use fleet_data::model_dir::{self, GivenTokenizer, SpecialTokens};
use fleet_kernels::all_finite;
use fleet_learn::{Error, Result};
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Of a text whose model sets no limit: its tokens' keys and values are kept.
const POSITIONS_MAX: usize = 1 << 20;

/// How a file of a chat template ends; other words are names.
const TEMPLATE_FILE: &str = ".jinja";

/// A model directory, and what may change it.
pub struct TextModel {
    dir: PathBuf,
    /// Its `tokenizer.json`.
    file: PathBuf,
    tokenizer: GivenTokenizer,
    host: HostModel,
    variants: Vec<Variant>,
    /// That of which the weights are.
    current: usize,
}

/// The model with the adapters that change it.
struct Variant {
    adapters: Changes,
    templates: Templates,
    /// Tokens that end a text.
    ends: Vec<u32>,
}

impl TextModel {
    /// The model in `dir`, changed by adapters one after the other. This is its first variant. Its matrices are in few bits where the files have them so,
    /// or where `quantization` says so.
    pub fn open(
        dir: &Path,
        adapters: &[PathBuf],
        quantization: Option<Quantization>,
        threads: u32,
    ) -> Result<TextModel> {
        let host = HostModel::packed(dir, quantization, threads, 1)?;
        let file = dir.join(TOKENIZER_FILE);
        let tokenizer = GivenTokenizer::open(&file, host.model.decoder.vocab_size as u32).map_err(input)?;
        let dir = dir.to_owned();
        let mut model = TextModel { dir, file, tokenizer, host, variants: Vec::new(), current: 0 };
        model.add(adapters)?;
        let nothing = model.host.adapters(&[])?;
        model.host.change(&nothing, &model.variants[0].adapters)?;
        Ok(model)
    }

    /// Another variant: the model with these adapters. Costs their memory alone. Its number, for `choose`.
    pub fn add(&mut self, adapters: &[PathBuf]) -> Result<usize> {
        let mut ends = model_dir::end_ids(&self.dir).map_err(input)?;
        ends.extend(self.tokenizer.eos_id());
        for adapter in adapters {
            let special = SpecialTokens::beside(&adapter.join(TOKENIZER_FILE)).map_err(input)?;
            ends.extend(special.eos.and_then(|end| self.tokenizer.tokenizer.token_to_id(&end)));
        }
        self.variants.push(Variant {
            adapters: self.host.adapters(adapters)?,
            templates: Templates::of_changed(&self.dir, adapters).map_err(input)?,
            ends,
        });
        Ok(self.variants.len() - 1)
    }

    /// From now on this variant is asked.
    pub fn choose(&mut self, variant: usize) -> Result<()> {
        if variant != self.current {
            let [from, to] = [self.current, variant].map(|at| &self.variants[at].adapters);
            self.host.change(from, to)?;
            self.current = variant;
        }
        Ok(())
    }

    /// The chat template of this name, of a `.jinja` file, or the variant's own; an adapter's counts before the model's.
    pub fn template(&self, variant: usize, wanted: Option<&str>) -> Result<Template> {
        let templates = &self.variants[variant].templates;
        match wanted {
            Some(file) if file.ends_with(TEMPLATE_FILE) => templates.of_file(Path::new(file)).map_err(input),
            name => templates.choose(name, false).map_err(input),
        }
    }

    pub fn tokenizer(&self) -> &GivenTokenizer {
        &self.tokenizer
    }

    /// The most tokens of prompt and text together.
    pub fn context(&self) -> usize {
        let decoder = &self.host.model.decoder;
        let made_for = decoder.max_positions;
        if is_stretched(decoder) { made_for.max(POSITIONS_MAX) } else { made_for }
    }

    /// What is asked in the tokens of the model, for which there is room.
    pub fn prompt(&self, ask: &Ask) -> Result<Prompt> {
        let file = Tokenizer::File(self.file.clone());
        let mut prompt = guarded(&file, || Ok(Prompt::of(ask, &self.tokenizer))).map_err(input).flatten()?;
        let model = &self.host.model;
        if prompt.ids.is_empty() {
            // A text begins where another one ended.
            prompt.ids.push(model.bos_token_id.or(model.eos_token_id).unwrap_or(0));
        }
        let vocab = model.decoder.vocab_size;
        if let Some(id) = prompt.ids.iter().find(|id| **id as usize >= vocab) {
            return Err(self.refuse(format!(
                "gives token {id}, but the model knows {vocab}; it belongs to another model"
            )));
        }
        let (len, context) = (prompt.ids.len(), self.context());
        if len >= context {
            return Err(Error::Input(format!(
                "the prompt has {len} tokens and the model takes {context}; shorten it"
            )));
        }
        Ok(prompt)
    }

    /// Writes what comes after a prompt; `emit` gets the text piece by piece, each whole UTF-8, and ends it by giving `false`.
    pub fn write(
        &mut self,
        prompt: &Prompt,
        settings: &Settings,
        emit: &mut dyn FnMut(&str) -> bool,
    ) -> Result<Generated> {
        let (context, made_for) = (self.context(), self.host.model.decoder.max_positions);
        let turn_end = match &prompt.end {
            Some(TurnEnd::Text(marker)) => Some(marker.as_str()),
            _ => None,
        };
        let of_stop = |stop: &str| if Some(stop) == turn_end { End::EndOfText } else { End::StopString };
        let ends_text = |id: u32| {
            self.variants[self.current].ends.contains(&id) || prompt.end == Some(TurnEnd::Token(id))
        };
        let file = self.file.display();
        let undecoded =
            |what: &str, e: tokenizers::Error| Error::Input(format!("{file}: cannot decode {what}: {e}"));
        let guard = Tokenizer::File(self.file.clone());
        let stream = guarded(&guard, || Ok(TextStream::new(&self.tokenizer.tokenizer, &prompt.ids)));
        let mut stream = stream.map_err(input)?.map_err(|e| undecoded("the prompt", e))?;
        let mut stops = StopStrings::new(settings.stop.iter().map(String::as_str).chain(turn_end));
        let mut cache = self.host.cache();
        let mut text = String::new();
        let mut new_tokens = 0;
        let began = Instant::now();
        let ids: Vec<i64> = prompt.ids.iter().copied().map(i64::from).collect();
        let mut logits =
            if settings.max_new_tokens > 0 { self.host.prefill(&ids, &mut cache)? } else { Vec::new() };
        let mut end = loop {
            if new_tokens == settings.max_new_tokens {
                break End::MaxNewTokens;
            }
            if !all_finite(&logits) {
                return Err(Error::Input(format!(
                    "{}: the model computes NaN or infinite logits for token {}; its weights cannot be used",
                    self.dir.display(),
                    cache.len() + 1
                )));
            }
            let id = settings.sampling.pick(&logits, new_tokens as u64) as u32;
            if ends_text(id) {
                break End::EndOfText;
            }
            new_tokens += 1;
            let piece = stream.push(id).map_err(|e| undecoded(&format!("token {id}"), e))?;
            let (piece, stop) = stops.push(&piece);
            text.push_str(&piece);
            if !emit(&piece) {
                break End::Unread;
            }
            if let Some(stop) = stop {
                break of_stop(stop);
            }
            if cache.len() == context {
                break End::Context;
            }
            if new_tokens < settings.max_new_tokens {
                logits = self.host.decode(i64::from(id), &mut cache)?;
            }
        };
        let rest = stream.finish().map_err(|e| undecoded("the end", e))?;
        let (rest, stop) = stops.finish(&rest);
        end = stop.map_or(end, of_stop);
        emit(&rest);
        text.push_str(&rest);
        let mut notes = prompt.notes.clone();
        if cache.len() > made_for {
            notes.push(format!("the text goes beyond the {made_for} positions that the model was made for"));
        }
        let tokens_per_s = new_tokens as f64 / began.elapsed().as_secs_f64().max(1e-9);
        Ok(Generated { text, prompt_tokens: ids.len(), new_tokens, end, tokens_per_s, notes })
    }

    /// Refuses tokens that the model does not take.
    pub fn check(&self, ids: &[u32]) -> Result<()> {
        let (len, context) = (ids.len(), self.context());
        if len == 0 || len > context {
            return Err(Error::Input(format!("{len} tokens are given, and the model takes 1 to {context}")));
        }
        let vocab = self.host.model.decoder.vocab_size;
        match ids.iter().find(|id| **id as usize >= vocab) {
            None => Ok(()),
            Some(id) => Err(Error::Input(format!("token {id} is beyond the model's vocabulary of {vocab}"))),
        }
    }

    /// `[t, v]` logits of the chosen variant for one sequence.
    pub fn logits(&mut self, ids: &[u32]) -> Result<Vec<f32>> {
        self.check(ids)?;
        let ids: Vec<i64> = ids.iter().copied().map(i64::from).collect();
        self.host.made_for(ids.len());
        self.host.logits(&ids, ids.len())
    }

    /// Both, for one question.
    pub fn answer(
        &mut self,
        ask: &Ask,
        settings: &Settings,
        emit: &mut dyn FnMut(&str) -> bool,
    ) -> Result<Generated> {
        let prompt = self.prompt(ask)?;
        self.write(&prompt, settings, emit)
    }

    fn refuse(&self, what: String) -> Error {
        Error::Input(format!("{}: {what}", self.file.display()))
    }
}

fn input(e: impl std::fmt::Display) -> Error {
    Error::Input(e.to_string())
}

/// Whether the positions are scaled for texts that are longer than those of the training; transformers then sets no limit.
fn is_stretched(decoder: &Decoder) -> bool {
    matches!(&decoder.positions, Positions::Rotary(rotary) if rotary.scaling != Scaling::Default)
}
