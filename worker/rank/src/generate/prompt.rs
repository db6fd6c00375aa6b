//! A prompt as tokens.

use fleet_data::model_dir::PromptTokenizer;
use fleet_learn::{Error, Result};
use tokenizers::Tokenizer;

pub struct Prompt {
    pub ids: Vec<u32>,
    /// What the user should know of it.
    pub note: Option<String>,
}

impl Prompt {
    /// As transformers encodes a text for a model: with what the tokenizer's post-processor puts around it, be it a begin or an end of a
    /// text. Only a begin that the text itself has too is not put there again.
    pub fn encode(tokenizer: &Tokenizer, text: &str) -> Result<Prompt> {
        let encode = |special| {
            let encoding = tokenizer.encode_fast(text, special);
            encoding.map(|encoding| encoding.get_ids().to_vec())
        };
        let refuse = |e| Error::Input(format!("the tokenizer cannot encode the prompt: {e}"));
        let (plain, mut ids) = (encode(false).map_err(refuse)?, encode(true).map_err(refuse)?);
        let begin = (0..ids.len()).find(|at| ids[*at..].starts_with(&plain)).unwrap_or(0);
        if begin == 0 || plain.is_empty() || !plain.starts_with(&ids[..begin]) {
            return Ok(Prompt { ids, note: None });
        }
        let tokens: Vec<String> = ids.drain(..begin).filter_map(|id| tokenizer.id_to_token(id)).collect();
        let note = format!(
            "the prompt begins with {}, which the tokenizer adds by itself; it was not added again",
            tokens.concat()
        );
        Ok(Prompt { ids, note: Some(note) })
    }
}

/// The ids that end a text in the model directory `dir`: those of its configuration, and what its tokenizer calls so.
pub fn end_ids(dir: &std::path::Path, tokenizer: &PromptTokenizer) -> Result<Vec<u32>> {
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
            "model": {"type": "WordLevel", "vocab": {"a": 0, "<s>": 1}, "unk_token": "a"}});
        let tokenizer = Tokenizer::from_bytes(json.to_string()).unwrap();
        let encode = |text| Prompt::encode(&tokenizer, text).unwrap();
        assert_eq!((encode("a a").ids, encode("a a").note), (vec![1, 0, 0], None));
        assert_eq!((encode("").ids, encode("").note), (vec![1], None));
        let twice = encode("<s>a");
        assert_eq!(twice.ids, [1, 0]);
        assert!(twice.note.unwrap().contains("begins with <s>"));
    }
}
