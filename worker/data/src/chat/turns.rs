//! How a template begins and ends the turn of an assistant, and whether a model can know it by its tokens.

use super::{Conversation, Ending, Rendered, Template};
use crate::model_dir::GivenTokenizer;
use std::collections::{BTreeMap, BTreeSet};
use time::OffsetDateTime;
use tokenizers::Tokenizer;

const QUESTION: &str = "what";
const ANSWER: &str = "ok";

/// Bytes of a marker's name.
const MARKER_MAX: usize = 40;

/// Markers that are named in a warning.
const NAMED: usize = 4;

/// With what an answer ends, whatever the model's settings say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TurnEnd {
    /// A special token.
    Token(u32),
    /// A marker that is no token of its own.
    Text(String),
}

/// The token with which the template of this text ends an answer, if it is one; `special` are the tokens that templates know by name.
pub fn end_token(source: &str, special: BTreeMap<String, String>, tokenizer: &Tokenizer) -> Option<u32> {
    let template = Template::parse("the chat template", source, special).ok()?;
    // No template ends an answer with the time.
    match template.turn_end(tokenizer, OffsetDateTime::UNIX_EPOCH)? {
        TurnEnd::Token(id) => Some(id),
        TurnEnd::Text(_) => None,
    }
}

impl Template {
    /// What the template writes behind an answer and nobody says.
    pub fn turn_end(&self, tokenizer: &Tokenizer, now: OffsetDateTime) -> Option<TurnEnd> {
        let behind = self.behind_answer(now)?;
        let behind = behind.trim_start();
        let id = *tokenizer.encode(behind, false).ok()?.get_ids().first()?;
        let token = tokenizer.id_to_token(id)?;
        if tokenizer.get_added_vocabulary().is_special_token(&token) {
            return Some(TurnEnd::Token(id));
        }
        let marker = markers(behind).into_iter().next().filter(|marker| behind.starts_with(marker))?;
        Some(TurnEnd::Text(marker.to_owned()))
    }

    /// Whether the template has written the last message: with another one it writes another text.
    pub fn says_last(&self, conversation: &Conversation, rendered: &Rendered, now: OffsetDateTime) -> bool {
        let mut other = conversation.clone();
        if let Some(last) = other.messages_mut().last_mut() {
            let said = format!("{}?", conversation.last_text());
            last.insert("content".into(), said.into());
        }
        let other = self.attempt(&other, Ending::Prompt, now);
        !other.is_ok_and(|other| other.text == rendered.text)
    }

    /// What of the template does not fit a model with this tokenizer, a line each.
    pub fn misfits(&self, given: &GivenTokenizer, now: OffsetDateTime) -> Vec<String> {
        let Some(whole) = self.answered(now) else { return Vec::new() };
        let is_token = |marker: &str| given.tokenizer.token_to_id(marker).is_some();
        let letters: BTreeSet<&str> =
            markers(&whole).into_iter().filter(|marker| !is_token(marker)).collect();
        let mut lines = Vec::new();
        let name = self.name();
        if !letters.is_empty() {
            let named: Vec<&str> = letters.iter().take(NAMED).copied().collect();
            lines.push(format!(
                "chat template {name}: {} {} no token of the model's tokenizer, so the model reads such a marker piece by piece, and programs that end at tokens alone \
                 do not end an answer there; take the template with which the model was trained, or train it on this one",
                named.join(", "),
                if letters.len() == 1 { "is" } else { "are" }
            ));
        }
        if self.turn_end(&given.tokenizer, now).is_none() && !self.ends_with_end(given, now) {
            lines.push(format!(
                "chat template {name}: it writes no token behind an answer that ends a text, so an answer goes on until its length is reached"
            ));
        }
        let asked = self.attempt(&Conversation::ask(None, QUESTION), Ending::Prompt, now);
        if asked.is_ok_and(|asked| !whole.starts_with(&asked.text)) {
            lines.push(format!(
                "chat template {name}: what it writes before an answer that is asked for (add_generation_prompt) is not what stands before one \
                 in a conversation, so the model is asked otherwise than it learns"
            ));
        }
        lines
    }

    /// The end of a text, where it is no special token.
    fn ends_with_end(&self, given: &GivenTokenizer, now: OffsetDateTime) -> bool {
        let behind = self.behind_answer(now).unwrap_or_default();
        let ids = given.tokenizer.encode(behind, false).map(|encoding| encoding.get_ids().to_vec());
        given.eos_id().is_some_and(|end| ids.is_ok_and(|ids| ids.contains(&end)))
    }

    fn behind_answer(&self, now: OffsetDateTime) -> Option<String> {
        let text = self.answered(now)?;
        Some(text[text.rfind(ANSWER)? + ANSWER.len()..].to_owned())
    }

    /// A question and its answer.
    fn answered(&self, now: OffsetDateTime) -> Option<String> {
        let mut conversation = Conversation::ask(None, QUESTION);
        conversation.add("assistant", ANSWER);
        self.attempt(&conversation, Ending::Complete, now).ok().map(|rendered| rendered.text)
    }
}

/// What stands in a text like `<|im_start|>` or `<start_of_turn>`.
fn markers(text: &str) -> Vec<&str> {
    let marker = |(at, _)| {
        let rest = &text[at + 1..];
        let name = &rest[..rest.find('>')?];
        let inner = name.strip_prefix('|').and_then(|name| name.strip_suffix('|'));
        let is_word = |c: char| c.is_alphanumeric() || "_-/.".contains(c);
        let is_marker = match inner {
            Some(inner) => !inner.is_empty() && inner.chars().all(is_word),
            None => name.contains('_') && name.chars().all(is_word),
        };
        (is_marker && name.len() <= MARKER_MAX).then(|| &text[at..at + name.len() + 2])
    };
    text.match_indices('<').filter_map(marker).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};
    use std::collections::BTreeMap;

    /// A tokenizer of letters, in which these are special tokens.
    fn given(special: &[&str]) -> (tempfile::TempDir, GivenTokenizer) {
        let letters = (' '..='~').chain(['\n']).map(String::from);
        let vocab: serde_json::Map<String, Value> =
            letters.zip(0..).map(|(c, id): (_, u32)| (c, id.into())).collect();
        let added = (vocab.len()..).zip(special).map(|(id, content)| {
            json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
                "special": true})
        });
        let added: Vec<Value> = added.collect();
        let tokenizer = json!({"version": "1.0", "added_tokens": added, "decoder": {"type": "Fuse"},
            "model": {"type": "BPE", "vocab": vocab, "merges": []}});
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tokenizer.json");
        std::fs::write(&path, tokenizer.to_string()).unwrap();
        let given = GivenTokenizer::open(&path, u32::MAX).unwrap();
        (dir, given)
    }

    fn built_in(name: &str) -> Template {
        let source = super::super::builtin::find(name).unwrap();
        let special = [("bos_token", "<s>"), ("eos_token", "</s>")];
        let special = special.map(|(name, token)| (name.to_owned(), token.to_owned()));
        Template::parse(name, source, BTreeMap::from(special)).unwrap()
    }

    const NOW: OffsetDateTime = OffsetDateTime::UNIX_EPOCH;

    #[test]
    fn a_turn_ends_with_a_token_or_a_marker() {
        let chatml = built_in("chatml");
        let (_dir, known) = given(&["<|im_start|>", "<|im_end|>"]);
        let end = known.tokenizer.token_to_id("<|im_end|>").unwrap();
        assert_eq!(chatml.turn_end(&known.tokenizer, NOW), Some(TurnEnd::Token(end)));
        assert_eq!(chatml.misfits(&known, NOW), Vec::<String>::new());
        let (_dir, letters) = given(&["</s>"]);
        assert_eq!(chatml.turn_end(&letters.tokenizer, NOW), Some(TurnEnd::Text("<|im_end|>".into())));
        let said = chatml.misfits(&letters, NOW);
        assert!(said.len() == 1 && said[0].contains("<|im_end|>, <|im_start|> are no token"), "{said:?}");
        let zephyr = built_in("zephyr");
        let end = letters.tokenizer.token_to_id("</s>").unwrap();
        assert_eq!(zephyr.turn_end(&letters.tokenizer, NOW), Some(TurnEnd::Token(end)));
        let source = super::super::builtin::find("chatml").unwrap();
        let ends = |tokenizer| end_token(source, BTreeMap::new(), tokenizer);
        assert_eq!(ends(&known.tokenizer), known.tokenizer.token_to_id("<|im_end|>"));
        assert_eq!(ends(&letters.tokenizer), None);
    }

    #[test]
    fn a_template_without_an_end_and_one_that_asks_otherwise_are_told() {
        let (_dir, given) = given(&["</s>"]);
        let own = |source: &str| Template::parse("own", source, BTreeMap::new()).unwrap();
        let endless = own("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}");
        let said = endless.misfits(&given, NOW);
        assert!(said.len() == 1 && said[0].contains("writes no token behind an answer"), "{said:?}");
        let other = own(
            "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}bot:{% endif %}",
        );
        let said = other.misfits(&given, NOW);
        assert!(said.len() == 1 && said[0].contains("asked otherwise than it learns"), "{said:?}");
    }

    #[test]
    fn markers_are_told_from_words_in_brackets() {
        let text = "<|a_b|>x<start_of_turn>user <b> a < b_c > <|| |> <think>";
        assert_eq!(markers(text), ["<|a_b|>", "<start_of_turn>"]);
    }
}
