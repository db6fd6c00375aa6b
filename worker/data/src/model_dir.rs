//! The settings beside a tokenizer and the weights of a Hugging Face model: `config.json`, `generation_config.json`,
//! `tokenizer_config.json`, `special_tokens_map.json`. Read as transformers 5 reads them, where a null says what a missing key says.

use crate::{DataError, added, prefix_space};
use fleet_common::files::stand_in;
use fleet_common::model::Family;
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};
use tokenizers::{AddedToken, Tokenizer};

pub type Object = Map<String, Value>;

pub const CONFIG: &str = "config.json";
pub const GENERATION_CONFIG: &str = "generation_config.json";
pub const TOKENIZER: &str = "tokenizer.json";
pub const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
pub const SPECIAL_TOKENS_MAP: &str = "special_tokens_map.json";

/// Roles in transformers' order.
const ROLES: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// Settings are some kilobytes; with a list of added tokens and a chat template some megabytes.
const FILE_MAX: u64 = 64 << 20;

/// The JSON object in `path` as it stands, nulls included; `None` where there is no such file.
pub fn read_object(path: &Path) -> Result<Option<Object>, DataError> {
    let failed = |source| DataError::Read { path: path.to_owned(), source };
    let bad = |what: String| DataError::Settings { path: path.to_owned(), what };
    let file = match File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(failed(e)),
    };
    let mut bytes = Vec::new();
    file.take(FILE_MAX + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > FILE_MAX {
        return Err(bad(format!("has more than {FILE_MAX} bytes")));
    }
    if let Some(pointer) = stand_in(&bytes) {
        return Err(DataError::Foreign { path: path.to_owned(), name: pointer.name, cure: pointer.cure });
    }
    fleet_common::model::parse_object(&bytes)
        .map(Some)
        .map_err(|e| bad(format!("is not a JSON object ({e})")))
}

/// `object` without its nulls, at any depth.
pub fn without_nulls(object: Object) -> Object {
    let within = |value| match value {
        Value::Object(object) => Value::Object(without_nulls(object)),
        value => value,
    };
    object
        .into_iter()
        .filter(|(_, value)| !value.is_null())
        .map(|(key, value)| (key, within(value)))
        .collect()
}

/// A whole number of at least 0; `1e4` and `10000.0` are ones.
pub fn whole(value: &Value) -> Option<u32> {
    let float = || value.as_f64().filter(|x| x.fract() == 0.0 && (0.0..=f64::from(u32::MAX)).contains(x));
    match value.as_u64() {
        Some(number) => u32::try_from(number).ok(),
        None => float().map(|x| x as u32),
    }
}

/// The ids under `key`: one, a list, or none. What is no id, such as the -1 of old configurations, is left out.
pub fn token_ids(object: &Object, key: &str) -> Vec<u32> {
    match object.get(key) {
        Some(Value::Array(list)) => list.iter().filter_map(whole).collect(),
        Some(value) => whole(value).into_iter().collect(),
        None => Vec::new(),
    }
}

/// The same of a file, where what is no id is refused. Old configurations write -1 for none.
fn ids_of(path: &Path, object: &Object, key: &str) -> Result<Vec<u32>, DataError> {
    let is_none = |value: &Value| path.ends_with(CONFIG) && value.as_i64().is_some_and(|id| id < 0);
    let wrong = |value: &Value| whole(value).is_none() && !is_none(value);
    let bad = match object.get(key) {
        None | Some(Value::Null) => None,
        Some(Value::Array(list)) => list.iter().find(|value| wrong(value)),
        Some(value) => Some(value).filter(|value| wrong(value)),
    };
    match bad {
        None => Ok(token_ids(object, key)),
        Some(value) => {
            let what = format!("has {value} in {key}, which is no token's id");
            Err(DataError::Settings { path: path.to_owned(), what })
        }
    }
}

/// The ids at which a model in `dir` ends a text: what `generation_config.json` says, else what `config.json` says. An absent
/// key there means what it means in transformers' configuration of the family; a null means none.
pub fn end_ids(dir: &Path) -> Result<Vec<u32>, DataError> {
    const KEY: &str = "eos_token_id";
    let path = dir.join(CONFIG);
    let config = read_object(&path)?.unwrap_or_default();
    let ends = ids_of(&path, &config, KEY)?;
    let path = dir.join(GENERATION_CONFIG);
    if let Some(generation) = read_object(&path)? {
        let ids = ids_of(&path, &generation, KEY)?;
        if !ids.is_empty() {
            return Ok(ids);
        }
    }
    if config.contains_key(KEY) {
        return Ok(ends);
    }
    let family = config.get("model_type").and_then(Value::as_str).and_then(Family::find);
    Ok(family.and_then(|family| family.eos).into_iter().collect())
}

/// What the files beside a `tokenizer.json` call its special tokens.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SpecialTokens {
    pub bos: Option<String>,
    pub eos: Option<String>,
    /// These two and all others that have a role, in the order in which transformers adds them where a tokenizer lacks them.
    pub all: Vec<AddedToken>,
    /// Those that have a name, by it: `bos_token`, `image_token`. Chat templates know them.
    pub named: BTreeMap<String, String>,
}

impl SpecialTokens {
    /// As transformers 5 does it: `special_tokens_map.json` is older and counts only where `tokenizer_config.json` has no
    /// `added_tokens_decoder`, but then first.
    pub fn beside(tokenizer: &Path) -> Result<SpecialTokens, DataError> {
        let read = |name: &str| -> Result<Object, DataError> {
            Ok(without_nulls(read_object(&tokenizer.with_file_name(name))?.unwrap_or_default()))
        };
        let mut roles = read(TOKENIZER_CONFIG)?;
        if !roles.contains_key("added_tokens_decoder") {
            roles.extend(read(SPECIAL_TOKENS_MAP)?);
        }
        let content = |token: &Value| added::token(token, true).map(|token| token.content);
        let of = |role: &str| roles.get(role).and_then(content);
        let several =
            ["extra_special_tokens", "additional_special_tokens"].iter().find_map(|key| roles.get(*key));
        let several = match several {
            Some(Value::Array(list)) => list.iter().collect(),
            Some(Value::Object(named)) => named.values().collect(),
            _ => Vec::new(),
        };
        let is_named = |key: &str| key.ends_with("_token");
        let is_role = |key: &str| is_named(key) && !ROLES.contains(&key);
        let extra = roles.get("extra_special_tokens").and_then(Value::as_object);
        let named = extra.into_iter().flatten().chain(roles.iter().filter(|(key, _)| is_named(key)));
        let named = named.filter_map(|(name, token)| Some((name.clone(), content(token)?))).collect();
        let others = roles.iter().filter(|(key, _)| is_role(key)).map(|(_, value)| value);
        let usual = ROLES.iter().filter_map(|role| roles.get(*role));
        let all = usual.chain(others).chain(several).filter_map(|value| added::token(value, true)).collect();
        Ok(SpecialTokens { bos: of("bos_token"), eos: of("eos_token"), all, named })
    }
}

/// A `tokenizer.json` as transformers loads it with what lies beside it, for prompts, for generated text and for data: truncation and
/// padding that are stored in it do not act, `add_prefix_space` does, and the tokens that have a role are special. Tokens that it lacks are
/// added where the model has a row for them.
pub struct GivenTokenizer {
    pub tokenizer: Tokenizer,
    pub special: SpecialTokens,
    /// The file as it stands.
    pub json: Vec<u8>,
    /// Names what the files beside it change.
    pub beside: String,
}

impl GivenTokenizer {
    /// For a model of `rows` embeddings.
    pub fn open(path: &Path, rows: u32) -> Result<GivenTokenizer, DataError> {
        let bad = |what: String| DataError::Tokenizer { path: PathBuf::from(path), what };
        let json = std::fs::read(path).map_err(|source| match (source.kind(), instead(path)) {
            (ErrorKind::NotFound, Some(others)) => bad(format!(
                "it is not there, and {others} is; write it with transformers: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
            )),
            _ => DataError::Read { path: path.to_owned(), source },
        })?;
        if let Some(pointer) = stand_in(&json) {
            return Err(bad(format!("it is {}; {}", pointer.name, pointer.cure)));
        }
        let settings =
            without_nulls(read_object(&path.with_file_name(TOKENIZER_CONFIG))?.unwrap_or_default());
        let (changed, mut beside) = match prefix_space::changed(&json, &settings) {
            Some((changed, what)) => (changed, what.to_owned()),
            None => (json.clone(), String::new()),
        };
        let mut tokenizer =
            Tokenizer::from_bytes(changed).map_err(|e| bad(format!("not a tokenizer.json: {e}")))?;
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None).map_err(|e| bad(e.to_string()))?;
        let special = SpecialTokens::beside(path)?;
        let added = added::add(&mut tokenizer, path, &special.all, rows)?;
        if !added.is_empty() {
            beside += &format!(" added {added:?}");
        }
        if settings.get("split_special_tokens").and_then(Value::as_bool) == Some(true) {
            tokenizer.set_encode_special_tokens(true);
            beside += " special tokens are split";
        }
        Ok(GivenTokenizer { tokenizer, special, json, beside })
    }

    /// The id of the token that the files beside the tokenizer call the end of a text.
    pub fn eos_id(&self) -> Option<u32> {
        self.special.eos.as_deref().and_then(|name| self.tokenizer.token_to_id(name))
    }
}

/// Files of a tokenizer in older forms, where a `tokenizer.json` is looked for.
fn instead(tokenizer: &Path) -> Option<&'static str> {
    ["vocab.json", "tokenizer.model", "spiece.model", "vocab.txt"]
        .into_iter()
        .find(|name| tokenizer.with_file_name(name).exists())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn object(value: Value) -> Object {
        value.as_object().unwrap().clone()
    }

    /// A directory with these files.
    fn dir(files: &[(&str, Value)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, json) in files {
            std::fs::write(dir.path().join(name), json.to_string()).unwrap();
        }
        dir
    }

    #[test]
    fn a_null_is_absent_at_any_depth() {
        let given = json!({"a": null, "b": {"c": null, "d": 1}, "e": [null]});
        assert_eq!(Value::Object(without_nulls(object(given))), json!({"b": {"d": 1}, "e": [null]}));
    }

    #[test]
    fn ids_are_one_or_several_and_minus_one_is_none() {
        let ids = |value: Value| token_ids(&object(json!({"id": value})), "id");
        assert_eq!(ids(json!(2)), [2]);
        assert_eq!(ids(json!(2.0)), [2]);
        assert_eq!(ids(json!([7, 8.0, -1])), [7, 8]);
        for none in [json!(null), json!(-1), json!(1.5), json!("2"), json!([])] {
            assert_eq!(ids(none.clone()), [0u32; 0], "{none}");
        }
        assert_eq!(token_ids(&Object::new(), "id"), [0u32; 0]);
        assert_eq!((whole(&json!(1e4)), whole(&json!(5e9)), whole(&json!(true))), (Some(10_000), None, None));
    }

    #[test]
    fn the_generation_config_says_where_a_text_ends_before_the_config() {
        let ends = |files: &[(&str, Value)]| end_ids(dir(files).path()).unwrap();
        let config = (CONFIG, json!({"eos_token_id": [2, 5]}));
        assert_eq!(ends(std::slice::from_ref(&config)), [2, 5]);
        let generation = |eos: Value| (GENERATION_CONFIG, json!({"eos_token_id": eos}));
        assert_eq!(ends(&[config.clone(), generation(json!([7, 8]))]), [7, 8]);
        assert_eq!(ends(&[config.clone(), generation(json!(null))]), [2, 5]);
        let error = |files: &[(&str, Value)]| end_ids(dir(files).path()).unwrap_err().to_string();
        for wrong in
            [json!(-1), json!("7"), json!([[7]]), json!([7, "8"]), json!([7, null]), json!(7.5), json!(true)]
        {
            let said = error(&[config.clone(), generation(wrong.clone())]);
            assert!(
                said.contains("generation_config.json has") && said.contains("in eos_token_id"),
                "{wrong}: {said}"
            );
        }
        let said = error(&[(CONFIG, json!({"eos_token_id": "2"}))]);
        assert!(said.contains("config.json has \"2\" in eos_token_id"), "{said}");
        assert_eq!(ends(&[(CONFIG, json!({"eos_token_id": -1}))]), [0u32; 0], "old ones mean none");
        assert_eq!(ends(&[(CONFIG, json!({"model_type": "llama"}))]), [2], "as LlamaConfig has it");
        assert_eq!(ends(&[(CONFIG, json!({"eos_token_id": null}))]), [0u32; 0]);
    }

    #[test]
    fn special_tokens_are_found_in_both_files_and_both_spellings() {
        let special = |files: &[(&str, Value)]| {
            SpecialTokens::beside(&dir(files).path().join("tokenizer.json")).unwrap()
        };
        let config = json!({"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": false}, "pad_token": null,
            "additional_special_tokens": ["<a>", {"content": "<b>"}], "add_bos_token": true, "clean_up_tokenization_spaces": false});
        let found = special(&[(TOKENIZER_CONFIG, config.clone())]);
        assert_eq!((found.bos.as_deref(), found.eos.as_deref()), (Some("<s>"), Some("</s>")));
        let names: Vec<&str> = found.all.iter().map(|token| token.content.as_str()).collect();
        assert_eq!(names, ["<s>", "</s>", "<a>", "<b>"]);
        let map = (SPECIAL_TOKENS_MAP, json!({"eos_token": "<end>", "bos_token": null}));
        let found = special(&[(TOKENIZER_CONFIG, config.clone()), map.clone()]);
        assert_eq!((found.bos.as_deref(), found.eos.as_deref()), (Some("<s>"), Some("<end>")));
        let mut newer = object(config);
        newer.insert("added_tokens_decoder".into(), json!({}));
        assert_eq!(special(&[(TOKENIZER_CONFIG, newer.into()), map]).eos.as_deref(), Some("</s>"));
        assert_eq!(special(&[]), SpecialTokens::default());
    }

    #[test]
    fn what_is_stored_for_training_does_not_act_and_named_tokens_are_special() {
        let tokenizer = json!({"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"},
            "truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
            "padding": {"strategy": {"Fixed": 8}, "direction": "Right", "pad_id": 0, "pad_type_id": 0, "pad_token": "a"},
            "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1, "[END]": 2}, "unk_token": "a"}});
        let config = json!({"eos_token": "[END]", "pad_token": "[PAD]"});
        let dir = dir(&[("tokenizer.json", tokenizer), (TOKENIZER_CONFIG, config)]);
        let opened = GivenTokenizer::open(&dir.path().join("tokenizer.json"), 3).unwrap();
        let ids = |text| opened.tokenizer.encode(text, true).unwrap().get_ids().to_vec();
        assert_eq!(ids("b b b"), [1, 1, 1]);
        assert_eq!(ids("b[END]"), [1, 2], "a special token is found within text");
        assert_eq!(opened.tokenizer.decode(&[1, 2], true).unwrap(), "b");
        assert_eq!((opened.eos_id(), opened.tokenizer.get_vocab_size(true)), (Some(2), 3));
    }

    #[test]
    fn older_forms_of_a_tokenizer_are_named_with_what_to_do() {
        let dir = dir(&[("vocab.json", json!({}))]);
        let error = GivenTokenizer::open(&dir.path().join("tokenizer.json"), 3).err().unwrap().to_string();
        assert!(error.contains("vocab.json is") && error.contains("save_pretrained"), "{error}");
    }

    #[test]
    fn settings_that_are_no_object_are_named() {
        let dir = dir(&[(CONFIG, json!([1]))]);
        let error = end_ids(dir.path()).unwrap_err().to_string();
        assert!(error.contains("config.json") && error.contains("not a JSON object"), "{error}");
    }
}
