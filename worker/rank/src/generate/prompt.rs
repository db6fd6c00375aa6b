//! A prompt as tokens.

use fleet_data::model_dir::GivenTokenizer;
use fleet_learn::{Error, Result};

pub struct Prompt {
    pub ids: Vec<u32>,
    /// What the user should know of it.
    pub notes: Vec<String>,
}

impl Prompt {
    /// As documents are encoded for training. Refused where the tokenizer can write nothing of it.
    pub fn encode(given: &GivenTokenizer, text: &str) -> Result<Prompt> {
        let refuse = |e: String| Error::Input(format!("the tokenizer cannot encode the prompt: {e}"));
        let encoded = given.encode(text).map_err(|e| refuse(e.to_string()))?;
        let coverage = given.coverage(text, &encoded).map_err(|e| refuse(e.to_string()))?;
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
        Ok(Prompt { ids: encoded.ids, notes })
    }
}

/// The ids that end a text in the model directory `dir`: those of its configuration, and what its tokenizer calls so.
pub fn end_ids(dir: &std::path::Path, tokenizer: &GivenTokenizer) -> Result<Vec<u32>> {
    let mut ids = fleet_data::model_dir::end_ids(dir).map_err(|e| Error::Input(e.to_string()))?;
    ids.extend(tokenizer.eos_id());
    Ok(ids)
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
            let Prompt { ids, notes } = Prompt::encode(&given, text).unwrap();
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
