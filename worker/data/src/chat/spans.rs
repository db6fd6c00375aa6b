//! Where the assistant speaks, for a template that does not say it: from the text of all that is said before, with the beginning of an
//! answer, to the text with the answer. Both have to be beginnings of the whole; where a template writes earlier messages otherwise once
//! there are later ones, nothing is guessed.

use super::{ChatError, Conversation, Ending, Rendered, Template};
use time::OffsetDateTime;

const CURE: &str = "choose a template with generation blocks ({% generation %} ... {% endgeneration %} around what the assistant writes)";

impl Template {
    /// A whole conversation to learn from, with the assistant's parts: by the template's generation blocks, or by rendering beginnings of
    /// the conversation. A part ends with what the template writes behind an answer.
    pub fn render_marked(
        &self,
        conversation: &Conversation,
        now: OffsetDateTime,
    ) -> Result<Rendered, ChatError> {
        let mut rendered = self.render(conversation, Ending::Complete, now)?;
        if let Some(line) = self.misplaced() {
            return Err(ChatError::new(MISPLACED, CURE).of_template(self.name(), Some(line)));
        }
        if self.marks_assistant() {
            return Ok(rendered);
        }
        for index in (0..conversation.len()).filter(|index| conversation.role(*index) == "assistant") {
            let at = |error: ChatError| error.at_message(index, "assistant");
            let beginning = |len: usize, ending| {
                let text = self.attempt(&conversation.prefix(len), ending, now).map_err(at)?.text;
                let differs = || at(ChatError::new(DIFFERS, CURE).of_template(self.name(), None));
                rendered.text.starts_with(&text).then_some(text.len()).ok_or_else(differs)
            };
            let span = beginning(index, Ending::Prompt)?..beginning(index + 1, Ending::Complete)?;
            rendered.assistant.push(span);
        }
        Ok(rendered)
    }
}

const MISPLACED: &str =
    "a generation block in a macro, a set block or the like: where its text stands is not known";
const DIFFERS: &str = "the conversation up to here is not rendered as the beginning of the whole, so where this answer stands is not known";
