//! Tokens that are named beside a `tokenizer.json` and not in it. Transformers adds them behind those that it has, and so does fleet where the model
//! has an embedding for them.

use crate::DataError;
use crate::model_dir::{Object, TOKENIZER_CONFIG, read_object, whole, without_nulls};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;
use tokenizers::{AddedToken, Tokenizer};

/// An older place for them: names with their ids.
const ADDED_TOKENS: &str = "added_tokens.json";

/// A token as a setting has it: a string, or an object that also says how it is matched.
pub fn token(setting: &Value, special: bool) -> Option<AddedToken> {
    let content = setting.as_str().or_else(|| setting.get("content")?.as_str());
    let content = content.filter(|text| !text.is_empty())?;
    let flag = |key: &str, usual: bool| setting.get(key).and_then(Value::as_bool).unwrap_or(usual);
    let special = flag("special", special);
    let token = AddedToken::from(content, special).normalized(flag("normalized", !special));
    let token = token.lstrip(flag("lstrip", false)).rstrip(flag("rstrip", false));
    Some(token.single_word(flag("single_word", false)))
}

/// All that the files beside `tokenizer` name, in the order in which transformers 5 adds what a tokenizer lacks: those that have an id, which
/// says their order alone, and then those that have a role, `special`.
pub fn named(tokenizer: &Path, special: &[AddedToken]) -> Result<Vec<AddedToken>, DataError> {
    let read = |name: &str| -> Result<Object, DataError> {
        Ok(without_nulls(read_object(&tokenizer.with_file_name(name))?.unwrap_or_default()))
    };
    let mut by_id: BTreeMap<u32, AddedToken> = BTreeMap::new();
    match read(TOKENIZER_CONFIG)?.get("added_tokens_decoder").and_then(Value::as_object) {
        Some(given) => {
            let entries =
                given.iter().filter_map(|(id, entry)| Some((id.parse().ok()?, token(entry, false)?)));
            by_id.extend(entries);
        }
        None => {
            for (name, id) in &read(ADDED_TOKENS)? {
                let is_special = special.iter().any(|token| token.content == *name);
                by_id.extend(whole(id).map(|id| (id, AddedToken::from(name.clone(), is_special))));
            }
        }
    }
    Ok(by_id.into_values().chain(special.iter().cloned()).collect())
}

/// Adds those of `named` that the tokenizer lacks, as far as their ids are below `rows`; gives their names.
pub fn add(tokenizer: &mut Tokenizer, named: &[AddedToken], rows: u32) -> Vec<String> {
    let mut taken: Vec<AddedToken> = Vec::new();
    for token in named {
        let is_known = tokenizer.token_to_id(&token.content).is_some();
        if !is_known && taken.iter().all(|other| other.content != token.content) {
            taken.push(token.clone());
        }
    }
    // As the tokenizers library numbers them.
    let base = tokenizer.get_vocab_size(false) as u32;
    let last = tokenizer.get_added_tokens_decoder().keys().max().copied();
    let next = last.map_or(base, |last| base.max(last + 1));
    taken.truncate(rows.saturating_sub(next) as usize);
    let names = taken.iter().map(|token| token.content.clone()).collect();
    tokenizer.add_tokens(&taken);
    names
}

#[cfg(test)]
mod tests {
    use crate::model_dir::GivenTokenizer;
    use serde_json::{Value, json};

    /// Ids of a text by the tokenizer of five tokens with these files beside it.
    fn ids(rows: u32, text: &str, files: &[(&str, Value)]) -> Vec<u32> {
        let dir = tempfile::tempdir().unwrap();
        let tokenizer = json!({"version": "1.0", "pre_tokenizer": {"type": "Whitespace"},
            "added_tokens": [{"id": 4, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
                "special": true}],
            "model": {"type": "WordLevel", "vocab": {"a": 0, "<": 1, ">": 2, "?": 3}, "unk_token": "?"}});
        for (name, json) in files.iter().chain(&[("tokenizer.json", tokenizer)]) {
            std::fs::write(dir.path().join(name), json.to_string()).unwrap();
        }
        let opened = GivenTokenizer::open(&dir.path().join("tokenizer.json"), rows).unwrap();
        opened.tokenizer.encode(text, true).unwrap().get_ids().to_vec()
    }

    /// Measured with transformers 5.17 and 4.57.
    #[test]
    fn tokens_beside_a_tokenizer_are_added_behind_its_own_in_the_order_of_transformers() {
        const TEXT: &str = "a<x>a<y>";
        let config = |json: Value| ("tokenizer_config.json", json);
        let [x, y] =
            ["<x>", "<y>"].map(|name| json!({"content": name, "special": true, "normalized": false}));
        for files in [
            vec![config(json!({"added_tokens_decoder": {"10": y, "9": x}}))],
            vec![config(json!({"additional_special_tokens": ["<x>", "<y>"]}))],
            vec![config(json!({"extra_special_tokens": {"first": "<x>", "second": "<y>"}}))],
            vec![config(json!({"additional_special_tokens": ["<y>"], "pad_token": "<x>"}))],
            vec![config(json!({"additional_special_tokens": ["<y>"], "added_tokens_decoder": {"9": x}}))],
            vec![("special_tokens_map.json", json!({"additional_special_tokens": ["<x>", "<y>"]}))],
            vec![("added_tokens.json", json!({"<y>": 8, "<x>": 7}))],
        ] {
            assert_eq!(ids(7, TEXT, &files), [0, 5, 0, 6], "{files:?}");
        }
        let both = vec![config(json!({"additional_special_tokens": ["<x>", "<y>"]}))];
        assert_eq!(ids(6, TEXT, &both), [0, 5, 0, 1, 3, 2], "no row for the second");
        assert_eq!(ids(5, TEXT, &both), [0, 1, 3, 2, 0, 1, 3, 2]);
        assert_eq!(ids(7, TEXT, &[]), [0, 1, 3, 2, 0, 1, 3, 2]);
    }
}
