//! One text as it is written: from a token's logits to the token, its piece of the text, and whether the text ends there. Computes nothing.

use super::prompt::Prompt;
use super::stop::StopStrings;
use super::{End, Generated, Said, Settings, TextStream};
use fleet_checkpoint::TOKENIZER_FILE;
use fleet_common::job::Tokenizer;
use fleet_data::chat::TurnEnd;
use fleet_data::guarded;
use fleet_data::model_dir::GivenTokenizer;
use fleet_kernels::all_finite;
use fleet_learn::{Error, Result};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// How texts are written.
#[derive(Clone, Copy)]
pub struct Manner<'a> {
    pub settings: &'a Settings,
    /// Of the model.
    pub dir: &'a Path,
    pub tokenizer: &'a GivenTokenizer,
    /// Tokens that end a text.
    pub ends: &'a [u32],
    /// The most tokens that the model takes.
    pub context: usize,
    /// Positions that it was made for.
    pub made_for: usize,
}

pub struct Writing<'a> {
    manner: Manner<'a>,
    prompt: &'a Prompt,
    stream: TextStream<'a>,
    stops: StopStrings<'a>,
    text: String,
    new_tokens: usize,
    /// Tokens that the model has read.
    read: usize,
    began: Instant,
}

impl<'a> Writing<'a> {
    pub fn begin(manner: Manner<'a>, prompt: &'a Prompt) -> Result<Writing<'a>> {
        let guard = Tokenizer::File(manner.file());
        let stream = guarded(&guard, || Ok(TextStream::new(&manner.tokenizer.tokenizer, &prompt.ids)));
        let stream = stream.map_err(|e| Error::Input(e.to_string()))?;
        Ok(Writing {
            stream: stream.map_err(|e| manner.undecoded("the prompt", &e))?,
            stops: StopStrings::new(manner.settings.stop.iter().map(String::as_str).chain(turn_end(prompt))),
            text: String::new(),
            new_tokens: 0,
            read: prompt.ids.len(),
            began: Instant::now(),
            manner,
            prompt,
        })
    }

    /// The token after the `read` that the model has read, by its logits; its piece is said. Or why the text ends.
    pub fn next(
        &mut self,
        logits: &[f32],
        read: usize,
        say: &mut dyn FnMut(Said) -> bool,
    ) -> Result<ControlFlow<End, u32>> {
        let Manner { settings, dir, ends, context, .. } = self.manner;
        self.read = read;
        if !all_finite(logits) {
            return Err(Error::Input(format!(
                "{}: the model computes NaN or infinite logits for token {}; its weights cannot be used",
                dir.display(),
                read + 1
            )));
        }
        let id = settings.sampling.pick(logits, self.new_tokens as u64) as u32;
        if ends.contains(&id) || self.prompt.end == Some(TurnEnd::Token(id)) {
            return Ok(ControlFlow::Break(End::EndOfText));
        }
        self.new_tokens += 1;
        let piece = self.stream.push(id).map_err(|e| self.manner.undecoded(&format!("token {id}"), &e))?;
        let (piece, stop) = self.stops.push(&piece);
        self.text.push_str(&piece);
        Ok(ControlFlow::Break(match (say(Said::Piece(&piece)), stop) {
            (false, _) => End::Unread,
            (true, Some(stop)) => end_of(stop, self.prompt),
            (true, None) if read == context => End::Context,
            (true, None) if self.new_tokens == settings.max_new_tokens => End::MaxNewTokens,
            (true, None) => return Ok(ControlFlow::Continue(id)),
        }))
    }

    /// The text, whose rest is said.
    pub fn end(mut self, end: End, say: &mut dyn FnMut(Said) -> bool) -> Result<Generated> {
        let rest = self.stream.finish().map_err(|e| self.manner.undecoded("the end", &e))?;
        let (rest, stop) = self.stops.finish(&rest);
        say(Said::Piece(&rest));
        self.text.push_str(&rest);
        let mut notes = self.prompt.notes.clone();
        let made_for = self.manner.made_for;
        if self.read > made_for {
            notes.push(format!("the text goes beyond the {made_for} positions that the model was made for"));
        }
        Ok(Generated {
            text: self.text,
            prompt_tokens: self.prompt.ids.len(),
            new_tokens: self.new_tokens,
            end: stop.map_or(end, |stop| end_of(stop, self.prompt)),
            tokens_per_s: self.new_tokens as f64 / self.began.elapsed().as_secs_f64().max(1e-9),
            notes,
        })
    }
}

impl Manner<'_> {
    fn file(&self) -> PathBuf {
        self.dir.join(TOKENIZER_FILE)
    }

    fn undecoded(&self, what: &str, e: &tokenizers::Error) -> Error {
        Error::Input(format!("{}: cannot decode {what}: {e}", self.file().display()))
    }
}

/// The string with which an answer ends, where that is no token.
fn turn_end(prompt: &Prompt) -> Option<&str> {
    match &prompt.end {
        Some(TurnEnd::Text(marker)) => Some(marker),
        _ => None,
    }
}

fn end_of(stop: &str, prompt: &Prompt) -> End {
    if turn_end(prompt) == Some(stop) { End::EndOfText } else { End::StopString }
}
