//! How many tokens a `tokenizer.json` has. Reads nothing else of it; the data package does the tokenising.

use serde::de::{Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use std::fmt;
use std::path::Path;

/// A tokenizer of a million tokens takes some 50 MB.
const FILE_MAX: u64 = 256 << 20;

#[derive(serde::Deserialize)]
struct File {
    model: Model,
    added_tokens: Option<Vec<Added>>,
}

#[derive(serde::Deserialize)]
struct Model {
    #[serde(deserialize_with = "highest_id")]
    vocab: Option<u32>,
}

#[derive(serde::Deserialize)]
struct Added {
    id: u32,
}

/// One more than the highest id. The error is one line that names the file.
pub(super) fn count(path: &Path) -> Result<u32, String> {
    let shown = path.display();
    let size = std::fs::metadata(path).map_err(|e| format!("cannot read {shown}: {e}"))?.len();
    if size > FILE_MAX {
        return Err(format!("{shown} has {size} bytes, too many for a tokenizer.json"));
    }
    let text = std::fs::read_to_string(path).map_err(|e| format!("cannot read {shown}: {e}"))?;
    let file: File =
        serde_json::from_str(&text).map_err(|e| format!("{shown} is not a tokenizer.json: {e}"))?;
    let added = file.added_tokens.unwrap_or_default().into_iter().map(|token| token.id);
    let highest = added.chain(file.model.vocab).max();
    highest.and_then(|id| id.checked_add(1)).ok_or_else(|| format!("{shown} has no tokens"))
}

/// Of a vocabulary as BPE, WordPiece and WordLevel write it, a map from token to id, or as Unigram does, a list of `[token, score]` in which
/// the place is the id.
fn highest_id<'de, D: Deserializer<'de>>(from: D) -> Result<Option<u32>, D::Error> {
    struct Highest;

    impl<'de> Visitor<'de> for Highest {
        type Value = Option<u32>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a vocabulary, a map from token to id or a list of [token, score]")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Option<u32>, A::Error> {
            let mut highest = None;
            while let Some((_, id)) = map.next_entry::<IgnoredAny, u32>()? {
                highest = highest.max(Some(id));
            }
            Ok(highest)
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Option<u32>, A::Error> {
            let mut pieces = 0u32;
            while list.next_element::<(IgnoredAny, f64)>()?.is_some() {
                pieces = pieces.saturating_add(1);
            }
            Ok(pieces.checked_sub(1))
        }
    }

    from.deserialize_any(Highest)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counted(json: &str) -> Result<u32, String> {
        let file = tempfile::NamedTempFile::new().expect("a temporary file");
        std::fs::write(file.path(), json).expect("it can be written");
        count(file.path())
    }

    #[test]
    fn every_kind_of_vocabulary_is_counted() {
        let map = r#""vocab":{"a":0,"b":1,"c":2}"#;
        let models = [
            format!(r#"{{"type":"BPE",{map},"merges":[]}}"#),
            format!(r#"{{"type":"WordPiece",{map},"unk_token":"a","max_input_chars_per_word":9}}"#),
            format!(r#"{{"type":"WordLevel",{map},"unk_token":"a"}}"#),
            r#"{"type":"Unigram","unk_id":0,"vocab":[["<unk>",0.0],["a",-1.5],["b",-2]]}"#.into(),
            r#"{"vocab":[["<unk>",0],["a",-1.5],["b",-2]],"unk_id":null}"#.into(),
        ];
        for model in models {
            assert_eq!(counted(&format!(r#"{{"model":{model}}}"#)), Ok(3), "{model}");
            assert_eq!(counted(&format!(r#"{{"added_tokens":null,"model":{model}}}"#)), Ok(3), "{model}");
            let added = r#""added_tokens":[{"id":2,"content":"x"},{"id":7,"content":"y","special":true}]"#;
            assert_eq!(counted(&format!(r#"{{{added},"model":{model}}}"#)), Ok(8), "{model}");
        }
    }

    #[test]
    fn what_is_no_vocabulary_is_refused_and_named() {
        for (json, why) in [
            (r#"{"model":{"vocab":{}}}"#, "no tokens"),
            (r#"{"model":{"vocab":[]}}"#, "no tokens"),
            (r#"{"model":{"vocab":7}}"#, "expected a vocabulary, a map from token to id or a list"),
            (r#"{"model":{"vocab":[["a"]]}}"#, "not a tokenizer.json"),
            (r#"{"model":{"vocab":{"a":-1}}}"#, "not a tokenizer.json"),
        ] {
            let error = counted(json).unwrap_err();
            assert!(error.contains(why), "{json}: {error}");
        }
    }
}
