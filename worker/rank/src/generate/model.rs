//! A model that writes texts: its weights, its tokenizer, its chat templates.

use super::prompt::{Ask, Prompt};
use super::writing::{Manner, Writing};
use super::{End, Generated, Said, Settings};
use crate::host_model::{Changes, HostModel};
use fleet_checkpoint::TOKENIZER_FILE;
use fleet_common::job::{Quantization, Tokenizer};
use fleet_common::model::{Decoder, Positions, Scaling};
use fleet_cpu::Cache;
use fleet_data::chat::{Template, Templates};
use fleet_data::guarded;
use fleet_data::model_dir::{self, GivenTokenizer, SpecialTokens};
use fleet_learn::{Error, Result};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

/// Of a text whose model sets no limit: its tokens' keys and values are kept.
const POSITIONS_MAX: usize = 1 << 20;

/// How a file of a chat template ends; other words are names.
const TEMPLATE_FILE: &str = ".jinja";

/// A model directory, and what may change it.
pub struct TextModel {
    dir: PathBuf,
    tokenizer: GivenTokenizer,
    host: HostModel,
    variants: Vec<Variant>,
    /// That of which the weights are.
    current: usize,
}

/// A text that is being written.
struct Open<'a> {
    number: usize,
    writing: Writing<'a>,
    cache: Cache<f32>,
    /// The token that the model reads next.
    next: i64,
}

impl Open<'_> {
    /// Takes the logits of the next token. Why the text ends, if it does.
    fn read(&mut self, logits: &[f32], say: &mut dyn FnMut(usize, Said) -> bool) -> Result<Option<End>> {
        let next = self.writing.next(logits, self.cache.len(), &mut |said| say(self.number, said))?;
        Ok(match next {
            ControlFlow::Continue(id) => {
                self.next = i64::from(id);
                None
            }
            ControlFlow::Break(end) => Some(end),
        })
    }

    /// Whether more texts are wanted.
    fn close(self, end: End, say: &mut dyn FnMut(usize, Said) -> bool) -> Result<bool> {
        let whole = self.writing.end(end, &mut |said| say(self.number, said))?;
        Ok(say(self.number, Said::Whole(whole)))
    }
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
        let vocab = host.model.decoder.vocab_size as u32;
        let tokenizer = GivenTokenizer::open(&dir.join(TOKENIZER_FILE), vocab).map_err(input)?;
        let dir = dir.to_owned();
        let mut model = TextModel { dir, tokenizer, host, variants: Vec::new(), current: 0 };
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

    /// What is asked in the tokens of the model. Whether it has room for them is asked by `check_room`.
    pub fn prompt(&self, ask: &Ask) -> Result<Prompt> {
        let file = Tokenizer::File(self.dir.join(TOKENIZER_FILE));
        let mut prompt = guarded(&file, || Ok(Prompt::of(ask, &self.tokenizer))).map_err(input).flatten()?;
        let model = &self.host.model;
        if prompt.ids.is_empty() {
            // A text begins where another one ended.
            prompt.ids.push(model.bos_token_id.or(model.eos_token_id).unwrap_or(0));
        }
        let vocab = model.decoder.vocab_size;
        if let Some(id) = prompt.ids.iter().find(|id| **id as usize >= vocab) {
            return Err(self.refuse(format!(
                "gives token {id}, but the model knows {vocab}; put the model's own tokenizer.json there, or make the model larger with transformers: \
                 resize_token_embeddings"
            )));
        }
        Ok(prompt)
    }

    /// Refuses a prompt that leaves no room for a token.
    pub fn check_room(&self, prompt: &Prompt) -> Result<()> {
        let (len, context) = (prompt.ids.len(), self.context());
        match len < context {
            true => Ok(()),
            false => Err(Error::Input(format!(
                "the prompt has {len} tokens and the model takes {context}; shorten it"
            ))),
        }
    }

    /// Writes what comes after each prompt, `at_once` of them at a time: the weights are read once for all of these. Each text is that which the prompt
    /// has alone. `say` gets the texts, by their numbers, piece by piece; `false` for a piece ends its text, for a whole text all of them.
    pub fn write_all(
        &mut self,
        prompts: &[Prompt],
        settings: &Settings,
        at_once: usize,
        say: &mut dyn FnMut(usize, Said) -> bool,
    ) -> Result<()> {
        let context = self.context();
        let TextModel { dir, tokenizer, host, variants, current } = self;
        let decoder = &host.model.decoder;
        // There one table of angles serves texts of one length only.
        let turned_by_length =
            matches!(&decoder.positions, Positions::Rotary(rotary) if rotary.is_turned_by_length());
        let at_once = if turned_by_length { 1 } else { at_once.max(1) };
        let (ends, made_for) = (&variants[*current].ends[..], decoder.max_positions);
        let manner = Manner { settings, dir, tokenizer, ends, context, made_for };
        let mut waiting = prompts.iter().enumerate();
        let mut open: Vec<Open> = Vec::new();
        loop {
            while open.len() < at_once
                && let Some((number, prompt)) = waiting.next()
            {
                let writing = Writing::begin(manner, prompt)?;
                let mut text = Open { number, writing, cache: host.cache(), next: 0 };
                let end = match settings.max_new_tokens {
                    0 => Some(End::MaxNewTokens),
                    _ => {
                        let ids: Vec<i64> = prompt.ids.iter().copied().map(i64::from).collect();
                        let logits = host.prefill(&ids, &mut text.cache)?;
                        text.read(&logits, say)?
                    }
                };
                match end {
                    None => open.push(text),
                    Some(end) if !text.close(end, say)? => return Ok(()),
                    Some(_) => {}
                }
            }
            if open.is_empty() {
                return Ok(());
            }
            let ids: Vec<i64> = open.iter().map(|text| text.next).collect();
            let logits =
                host.decode(&ids, &mut open.iter_mut().map(|text| &mut text.cache).collect::<Vec<_>>())?;
            let all = std::mem::take(&mut open);
            let vocab = logits.len() / ids.len();
            for (mut text, logits) in all.into_iter().zip(logits.chunks_exact(vocab)) {
                match text.read(logits, say)? {
                    None => open.push(text),
                    Some(end) if !text.close(end, say)? => return Ok(()),
                    Some(_) => {}
                }
            }
        }
    }

    /// Writes what comes after one prompt; `emit` gets the text piece by piece, each whole UTF-8, and ends it by giving `false`.
    pub fn write(
        &mut self,
        prompt: &Prompt,
        settings: &Settings,
        emit: &mut dyn FnMut(&str) -> bool,
    ) -> Result<Generated> {
        let mut generated = None;
        self.write_all(std::slice::from_ref(prompt), settings, 1, &mut |_, said| match said {
            Said::Piece(piece) => emit(piece),
            Said::Whole(text) => {
                generated = Some(text);
                true
            }
        })?;
        Ok(generated.expect("each text ends, or there is an error"))
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

    /// Writes the answer to one question.
    pub fn answer(
        &mut self,
        ask: &Ask,
        settings: &Settings,
        emit: &mut dyn FnMut(&str) -> bool,
    ) -> Result<Generated> {
        let prompt = self.prompt(ask)?;
        self.check_room(&prompt)?;
        self.write(&prompt, settings, emit)
    }

    fn refuse(&self, what: String) -> Error {
        Error::Input(format!("{}: {what}", self.dir.join(TOKENIZER_FILE).display()))
    }
}

fn input(e: impl std::fmt::Display) -> Error {
    Error::Input(e.to_string())
}

/// Whether the positions are scaled for texts that are longer than those of the training; transformers then sets no limit.
fn is_stretched(decoder: &Decoder) -> bool {
    matches!(&decoder.positions, Positions::Rotary(rotary) if rotary.scaling != Scaling::Default)
}
