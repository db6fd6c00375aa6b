//! A rendered conversation as tokens.

use super::{Conversation, Ending, Rendered, Template};
use crate::model_dir::GivenTokenizer;
use crate::{DataError, Encoded};
use time::OffsetDateTime;

/// Tokens, and for each whether the assistant wrote it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tokens {
    pub encoded: Encoded,
    pub assistant: Vec<bool>,
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
        Ok(Tokens { encoded: Encoded::bare(encoding.get_ids().to_vec()), assistant })
    }
}

impl Template {
    /// The special token that the template writes behind an answer: with it a turn ends, whatever the model's settings say.
    pub fn end_of_turn(&self, given: &GivenTokenizer, now: OffsetDateTime) -> Option<u32> {
        const ANSWER: &str = "ok";
        let mut conversation = Conversation::ask(None, ANSWER);
        let answer = serde_json::json!({"role": "assistant", "content": ANSWER});
        conversation.messages_mut().extend(answer.as_object().cloned());
        let text = self.attempt(&conversation, Ending::Complete, now).ok()?.text;
        let behind = &text[text.rfind(ANSWER)? + ANSWER.len()..];
        let id = *given.tokenizer.encode(behind.trim_start(), false).ok()?.get_ids().first()?;
        let token = given.tokenizer.id_to_token(id)?;
        given.tokenizer.get_added_vocabulary().is_special_token(&token).then_some(id)
    }
}
