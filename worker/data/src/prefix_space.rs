//! `add_prefix_space` of a `tokenizer_config.json`: whether a text is taken as if a space stood before it. Transformers 5 makes the tokenizers of
//! some classes anew by it, whatever their `tokenizer.json` says; those of other classes are as their file has them.

use crate::model_dir::Object;
use serde_json::{Value, json};

const KEY: &str = "add_prefix_space";

/// Classes of byte-level tokenizers that obey it, without `Fast`.
const BYTE_LEVEL: [&str; 3] = ["GPT2Tokenizer", "Qwen2Tokenizer", "CodeGenTokenizer"];

/// The tokenizer of `json` as the settings beside it want it, and what they want; `None` where it is so already.
pub fn changed(json: &[u8], settings: &Object) -> Option<(Vec<u8>, &'static str)> {
    let class = settings.get("tokenizer_class").and_then(Value::as_str);
    let class = class.map(|class| class.strip_suffix("Fast").unwrap_or(class));
    let wanted = settings.get(KEY).and_then(Value::as_bool);
    let before: Value = serde_json::from_slice(json).ok()?;
    let mut tokenizer = before.clone();
    match (class, wanted) {
        (Some("LlamaTokenizer"), Some(wanted)) => sentence_piece(&mut tokenizer, wanted),
        (Some(class), wanted) if BYTE_LEVEL.contains(&class) => {
            byte_level(&mut tokenizer, wanted.unwrap_or(false))
        }
        (None, Some(wanted)) => byte_level(&mut tokenizer, wanted),
        _ => return None,
    }
    let what = if wanted == Some(true) { " prefix space" } else { " no prefix space" };
    (tokenizer != before).then(|| (tokenizer.to_string().into_bytes(), what))
}

fn is(part: &Value, name: &str) -> bool {
    part["type"] == name
}

fn byte_level(tokenizer: &mut Value, wanted: bool) {
    let splits = &mut tokenizer["pre_tokenizer"];
    if is(splits, "ByteLevel") {
        splits[KEY] = wanted.into();
    }
}

/// The space is put there by the normalizer or by what splits a text, and taken away by the decoder.
fn sentence_piece(tokenizer: &mut Value, wanted: bool) {
    let has = |tokenizer: &Value, part: &str, name: &str| {
        let all = tokenizer[part]["normalizers"].as_array().cloned().unwrap_or_default();
        is(&tokenizer[part], name) || all.iter().any(|one| is(one, name))
    };
    if is(&tokenizer["pre_tokenizer"], "Metaspace") && !has(tokenizer, "normalizer", "Prepend") {
        let splits = &mut tokenizer["pre_tokenizer"];
        let never = splits["prepend_scheme"] == "never" || splits[KEY] == false;
        if never == wanted {
            splits["prepend_scheme"] = if wanted { "first".into() } else { "never".into() };
            splits.as_object_mut().map(|splits| splits.remove(KEY));
        }
    }
    if !wanted {
        without(&mut tokenizer["normalizer"], "normalizers", |part| is(part, "Prepend"));
        without(&mut tokenizer["decoder"], "decoders", |part| is(part, "Strip") && part["content"] == " ");
        if is(&tokenizer["decoder"], "Metaspace") {
            tokenizer["decoder"] = json!({"type": "Metaspace", "replacement": "\u{2581}", "prepend_scheme": "never", "split": false});
        }
    }
}

/// Takes out what is so, of a sequence or as a whole.
fn without(part: &mut Value, list: &str, unwanted: impl Fn(&Value) -> bool) {
    if unwanted(part) {
        *part = Value::Null;
    } else if let Some(parts) = part.get_mut(list).and_then(Value::as_array_mut) {
        parts.retain(|part| !unwanted(part));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokenizers::Tokenizer;

    fn first(tokenizer: &Value, settings: Value) -> String {
        let json = tokenizer.to_string().into_bytes();
        let changed = changed(&json, settings.as_object().unwrap()).map_or(json, |(json, _)| json);
        let tokenizer = Tokenizer::from_bytes(changed).unwrap();
        let ids = tokenizer.encode("a b", false).unwrap().get_ids().to_vec();
        assert_eq!(tokenizer.decode(&ids, true).unwrap().trim_start(), "a b");
        tokenizer.id_to_token(ids[0]).unwrap()
    }

    /// As transformers 5.17 does it with the same files.
    #[test]
    fn classes_that_obey_it_are_told_from_those_that_do_not() {
        let level = |space: bool| json!({"type": "ByteLevel", "add_prefix_space": space, "trim_offsets": true, "use_regex": true});
        let bytes = |space: bool| {
            json!({"version": "1.0", "added_tokens": [], "pre_tokenizer": level(space), "decoder": level(true),
                "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "\u{120}": 2}, "merges": []}})
        };
        let (with, without) = (
            json!({KEY: true, "tokenizer_class": "GPT2TokenizerFast"}),
            json!({"tokenizer_class": "GPT2Tokenizer"}),
        );
        assert_eq!(
            (first(&bytes(false), with), first(&bytes(true), without)),
            ("\u{120}".into(), "a".into())
        );
        assert_eq!(
            first(&bytes(false), json!({KEY: true, "tokenizer_class": "PreTrainedTokenizerFast"})),
            "a"
        );
        assert_eq!(
            first(&bytes(true), json!({KEY: false, "tokenizer_class": "PreTrainedTokenizerFast"})),
            "\u{120}"
        );
        assert_eq!(first(&bytes(true), json!({"tokenizer_class": "LlamaTokenizer"})), "\u{120}");
        assert_eq!(
            (first(&bytes(false), json!({KEY: true})), first(&bytes(true), json!({}))),
            ("\u{120}".into(), "\u{120}".into())
        );
    }

    #[test]
    fn llama_without_it_begins_without_a_space() {
        let pieces = |normalizer: Value, splits: Value| {
            let decoders = json!([{"type": "Replace", "pattern": {"String": "\u{2581}"}, "content": " "}, {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0}]);
            json!({"version": "1.0", "added_tokens": [], "normalizer": normalizer, "pre_tokenizer": splits,
                "decoder": {"type": "Sequence", "decoders": decoders},
                "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "\u{2581}": 2}, "merges": []}})
        };
        let prepend = json!({"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u{2581}"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "\u{2581}"}]});
        let splits = |scheme: &str| json!({"type": "Metaspace", "replacement": "\u{2581}", "prepend_scheme": scheme, "split": false});
        let settings = |wanted: bool| json!({KEY: wanted, "tokenizer_class": "LlamaTokenizerFast"});
        for tokenizer in [pieces(prepend, Value::Null), pieces(Value::Null, splits("first"))] {
            assert_eq!(first(&tokenizer, json!({"tokenizer_class": "LlamaTokenizerFast"})), "\u{2581}");
            assert_eq!(
                (first(&tokenizer, settings(true)), first(&tokenizer, settings(false))),
                ("\u{2581}".into(), "a".into())
            );
        }
        assert_eq!(first(&pieces(Value::Null, splits("never")), settings(true)), "\u{2581}");
    }
}
