//! A rendered conversation as tokens.

use super::Rendered;
use crate::model_dir::GivenTokenizer;
use crate::{DataError, Encoded};
use tokenizers::Encoding;

/// Tokens, and for each whether the assistant wrote it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tokens {
    pub encoded: Encoded,
    pub assistant: Vec<bool>,
    /// Each turn of the assistant begins with a token, as it does where the model is asked.
    pub is_joined: bool,
}

impl Rendered {
    /// The template has written the special tokens, so none is put around the text. A token is the assistant's where any of its bytes is.
    pub fn tokens(&self, given: &GivenTokenizer) -> Result<Tokens, DataError> {
        let encoding = given.tokenizer.encode(self.text.as_str(), false).map_err(|e| {
            DataError::Vocabulary(format!("the tokenizer cannot encode the conversation: {e}"))
        })?;
        let mut spans = self.assistant.as_slice();
        let mut is_inside = |(start, end): &(usize, usize)| {
            while spans.first().is_some_and(|span| span.end <= *start) {
                spans = &spans[1..];
            }
            spans.first().is_some_and(|span| span.start < *end)
        };
        let assistant = encoding.get_offsets().iter().map(&mut is_inside).collect();
        let mut turns = self.assistant.iter().filter(|span| !span.is_empty());
        let is_joined = turns.all(|span| self.is_boundary(span.start, &encoding, given));
        Ok(Tokens { encoded: Encoded::bare(encoding.get_ids().to_vec()), assistant, is_joined })
    }

    /// Whether a token begins at this byte.
    fn is_boundary(&self, at: usize, encoding: &Encoding, given: &GivenTokenizer) -> bool {
        let offsets = encoding.get_offsets();
        let next = offsets.partition_point(|(_, end)| *end <= at);
        let before = next.checked_sub(1).map_or(0, |last| offsets[last].1);
        match offsets.get(next) {
            Some((start, _)) if *start < at => false,
            _ if before == at => true,
            // Of some tokenizers the places of tokens leave spaces out, whose tokens they may be or not.
            _ => given
                .tokenizer
                .encode(&self.text[..at], false)
                .is_ok_and(|alone| encoding.get_ids().starts_with(alone.get_ids())),
        }
    }
}
