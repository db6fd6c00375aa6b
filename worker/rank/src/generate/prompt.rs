//! A prompt as tokens.

use fleet_data::Encoded;
use fleet_data::chat::{Conversation, Ending, Template, TurnEnd};
use fleet_data::model_dir::GivenTokenizer;
use fleet_learn::{Error, Result};
use time::OffsetDateTime;

/// What a model is asked.
#[derive(Clone, Copy)]
pub enum Ask<'a> {
    /// To continue this text.
    Text(&'a str),
    /// To answer in a conversation.
    Chat(Chat<'a>),
}

impl<'a> From<&'a str> for Ask<'a> {
    fn from(text: &'a str) -> Self {
        Ask::Text(text)
    }
}

/// A conversation, which a chat template turns into a prompt.
#[derive(Clone, Copy)]
pub struct Chat<'a> {
    pub conversation: &'a Conversation,
    pub template: &'a Template,
    /// For templates that write the date.
    pub now: OffsetDateTime,
}

pub struct Prompt {
    pub ids: Vec<u32>,
    /// With what an answer ends, besides what ends a text.
    pub end: Option<TurnEnd>,
    /// What the user should know of it.
    pub notes: Vec<String>,
}

impl Prompt {
    pub fn of(ask: &Ask, given: &GivenTokenizer) -> Result<Prompt> {
        let Chat { conversation, template, now } = match ask {
            Ask::Text(text) => return Prompt::encode(given, text),
            Ask::Chat(chat) => *chat,
        };
        let input = |e: &dyn std::fmt::Display| Error::Input(e.to_string());
        let rendered = template.render(conversation, Ending::Prompt, now).map_err(|e| input(&e))?;
        if !template.says_last(conversation, &rendered, now) {
            return Err(Error::Input(
                "the chat template writes nothing of the message; name another one with --chat-template"
                    .into(),
            ));
        }
        let tokens = rendered.tokens(given).map_err(|e| input(&e))?;
        let prompt = Prompt::known(given, &rendered.text, tokens.encoded)?;
        Ok(Prompt { end: template.turn_end(&given.tokenizer, now), ..prompt })
    }

    /// As documents are encoded for training.
    fn encode(given: &GivenTokenizer, text: &str) -> Result<Prompt> {
        let encoded = given.encode(text).map_err(refuse)?;
        Prompt::known(given, text, encoded)
    }

    /// Refused where the tokenizer can write nothing of the text.
    fn known(given: &GivenTokenizer, text: &str, encoded: Encoded) -> Result<Prompt> {
        let coverage = given.coverage(text, &encoded).map_err(refuse)?;
        if coverage.lost_bytes > 0 && coverage.said_bytes() == 0 {
            return Err(Error::Input(
                "the tokenizer can write nothing of the prompt; give one in the characters that the model was trained on".into(),
            ));
        }
        let mut notes = coverage.prompt_note().into_iter().collect::<Vec<String>>();
        if !encoded.own_begin.is_empty() {
            let token = |id: &u32| given.tokenizer.id_to_token(*id);
            let tokens: Vec<String> = encoded.own_begin.iter().filter_map(token).collect();
            notes.push(format!(
                "the prompt begins with {}, which the tokenizer adds by itself; it was not added again",
                tokens.concat()
            ));
        }
        Ok(Prompt { ids: encoded.ids, end: None, notes })
    }
}

fn refuse(e: impl std::fmt::Display) -> Error {
    Error::Input(format!("the tokenizer cannot encode the prompt: {e}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_begin_is_added_once() {
        let special = json!({"id": 1, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
            "special": true});
        let pieces =
            json!([{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]);
        let json = json!({"version": "1.0", "added_tokens": [special], "pre_tokenizer": {"type": "Whitespace"},
            "post_processor": {"type": "TemplateProcessing", "single": pieces, "pair": pieces,
                "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
            "model": {"type": "WordLevel", "vocab": {"a": 0, "<s>": 1, "<unk>": 2}, "unk_token": "<unk>"}});
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tokenizer.json");
        std::fs::write(&path, json.to_string()).unwrap();
        let given = GivenTokenizer::open(&path, u32::MAX).unwrap();
        let encode = |text| {
            let Prompt { ids, notes, .. } = Prompt::encode(&given, text).unwrap();
            (ids, notes.join(" | "))
        };
        assert_eq!(encode("a a"), (vec![1, 0, 0], String::new()));
        assert_eq!(encode(""), (vec![1], String::new()));
        let (twice, note) = encode("<s>a");
        assert_eq!(twice, [1, 0]);
        assert!(note.contains("begins with <s>"), "{note}");
    }

    #[test]
    fn what_the_tokenizer_cannot_write_is_told_and_a_prompt_of_nothing_else_refused() {
        let json = json!({"version": "1.0", "added_tokens": [], "decoder": {"type": "Fuse"},
            "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}});
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tokenizer.json");
        std::fs::write(&path, json.to_string()).unwrap();
        let given = GivenTokenizer::open(&path, u32::MAX).unwrap();
        let prompt = Prompt::encode(&given, "a\u{65e5}b").unwrap();
        assert_eq!(prompt.ids, [0, 1]);
        let told = prompt.notes.concat();
        assert!(told.contains("60 % of the prompt (such as `\u{65e5}`)"), "{told}");
        let error = Prompt::encode(&given, "\u{65e5}\u{672c}").err().unwrap().to_string();
        assert!(error.contains("can write nothing of the prompt"), "{error}");
        assert_eq!(Prompt::encode(&given, "ab").unwrap().notes, [] as [String; 0]);
    }
}
