//! Tokens that are named beside a `tokenizer.json`. Transformers adds those that it lacks behind those that it has, and so does fleet where the model
//! has an embedding for them; of a token that it has they say how it is matched.

use crate::DataError;
use crate::model_dir::{Object, TOKENIZER_CONFIG, read_object, whole, without_nulls};
use serde_json::Value;
use std::collections::{BTreeMap, HashSet};
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

/// Adds all that the files beside the tokenizer at `path` name, as far as their ids are below `rows`: those that have an id, which says their
/// order alone, and then those that have a role, `special`, and are not there yet. Gives what that changed.
pub fn add(
    tokenizer: &mut Tokenizer,
    path: &Path,
    special: &[AddedToken],
    rows: u32,
) -> Result<Vec<AddedToken>, DataError> {
    let mut taken = with_ids(path, special)?;
    let before = tokenizer.get_added_tokens_decoder();
    for token in special {
        let is_there = |other: &AddedToken| other.content == token.content;
        if !before.values().chain(&taken).any(is_there) {
            taken.push(token.clone());
        }
    }
    // As the tokenizers library numbers them.
    let base = tokenizer.get_vocab_size(false) as u32;
    let last = before.keys().max().copied();
    let next = last.map_or(base, |last| base.max(last + 1));
    let mut new = HashSet::new();
    taken.retain(|token| match tokenizer.token_to_id(&token.content) {
        Some(_) => !before.values().any(|other| other == token),
        None => {
            new.contains(&token.content) || {
                let has_row = next as usize + new.len() < rows as usize;
                has_row && new.insert(token.content.clone())
            }
        }
    });
    tokenizer.add_tokens(&taken);
    Ok(taken)
}

fn with_ids(tokenizer: &Path, special: &[AddedToken]) -> Result<Vec<AddedToken>, DataError> {
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
    Ok(by_id.into_values().collect())
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
            vec![config(json!({"added_tokens_decoder": {"9": x, "10": x, "11": y}}))],
        ] {
            assert_eq!(ids(7, TEXT, &files), [0, 5, 0, 6], "{files:?}");
        }
        let both = vec![config(json!({"additional_special_tokens": ["<x>", "<y>"]}))];
        assert_eq!(ids(6, TEXT, &both), [0, 5, 0, 1, 3, 2], "no row for the second");
        assert_eq!(ids(5, TEXT, &both), [0, 1, 3, 2, 0, 1, 3, 2]);
        assert_eq!(ids(7, TEXT, &[]), [0, 1, 3, 2, 0, 1, 3, 2]);
    }

    /// Measured with transformers 5.17 and 4.57, which agree.
    #[test]
    fn of_a_token_that_is_there_they_say_how_it_is_matched() {
        let config = |json: Value| [("tokenizer_config.json", json)];
        let decoder = |token: Value| config(json!({"added_tokens_decoder": {"0": token}}));
        assert_eq!(ids(5, "aa", &[]), [3]);
        assert_eq!(ids(5, "aa", &decoder(json!({"content": "a"}))), [0, 0], "of the vocabulary");
        assert_eq!(ids(5, "aa a", &decoder(json!({"content": "a", "single_word": true}))), [3, 0]);
        assert_eq!(ids(5, "aa", &config(json!({"pad_token": "a"}))), [0, 0], "by its role");
        assert_eq!(ids(5, "b<s>c", &[]), [3, 4, 3]);
        assert_eq!(
            ids(5, "b<s>c", &decoder(json!({"content": "<s>", "special": true, "single_word": true}))),
            [3, 1, 3, 2, 3]
        );
        assert_eq!(ids(5, "a <s>", &config(json!({"split_special_tokens": true}))), [0, 1, 3, 2]);
    }
}
