//! The model of a job: one that lies in a directory, or a new one that `[model]` describes in the words of its family's `config.json`.

use super::error::JobFileError;
use super::fields::{DROPOUTS, Fields};
use super::load::{VOCAB_MIN, absolute};
use super::value::{self, Kind};
use super::{Model, Tokenizer};
use crate::model::Object;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

const VOCAB_MAX: u32 = 1 << 20;
/// The longest sequence that can be asked for.
const POSITIONS_MAX: usize = 1 << 24;
/// How a description says what `config.json` says with a null, in a format that has none.
pub(super) const NONE: &str = "none";

/// The model and its tokenizer. Relative paths are taken from `dir`.
pub(super) fn model(f: &Fields, dir: &Path, max_seq_len: u32) -> Result<(Model, Tokenizer), JobFileError> {
    let path = |key, wanted| f.text(key, wanted)?.map(|path| absolute(f, key, dir, &path)).transpose();
    let model = path("model.path", "a Hugging Face directory")?;
    let mut tokenizer = path("tokenizer.path", "a tokenizer.json, or its directory")?;
    tokenizer.iter_mut().filter(|path| path.is_dir()).for_each(|path| path.push("tokenizer.json"));
    match model {
        Some(path) => pretrained(f, path, tokenizer),
        None => fresh(f, max_seq_len, tokenizer),
    }
}

fn pretrained(
    f: &Fields,
    path: PathBuf,
    tokenizer: Option<PathBuf>,
) -> Result<(Model, Tokenizer), JobFileError> {
    let shape = f.of_new_model();
    if !shape.is_empty() {
        let keys: Vec<_> = shape.iter().map(|name| format!("`{}`", f.spelling(name))).collect();
        let message = format!(
            "{} and `model.path` do not go together: the shape comes from {}/config.json; take {} out",
            keys.join(", "),
            path.display(),
            if keys.len() == 1 { "one" } else { "them, or `model.path`," }
        );
        return Err(f.refuse(&shape, message));
    }
    let tokenizer = Tokenizer::File(tokenizer.unwrap_or_else(|| path.join("tokenizer.json")));
    Ok((Model::Pretrained(path), tokenizer))
}

fn fresh(
    f: &Fields,
    max_seq_len: u32,
    tokenizer: Option<PathBuf>,
) -> Result<(Model, Tokenizer), JobFileError> {
    let family = f.family;
    only_what_is_trained(f)?;
    let (vocab_size, tokenizer) = vocabulary(f, tokenizer)?;
    let mut config = described(f);
    config.insert("vocab_size".into(), vocab_size.into());
    let decoder = (family.fill)(&mut config, max_seq_len as usize).and_then(|()| family.decoder(&config));
    let decoder = decoder.map_err(|why| f.refuse_description(&why))?;
    let (key, positions) = (family.positions_key, decoder.max_positions);
    if positions < max_seq_len as usize {
        let given = f.description().filter(|(given, ..)| *given == key).map(|(_, name, _)| name);
        let message = format!(
            "`model.{key}` ({positions}) is smaller than `max_seq_len` ({max_seq_len}): raise it or shorten the sequences"
        );
        return Err(f.refuse(&given.chain(["max_seq_len"]).collect::<Vec<_>>(), message));
    }
    if positions > POSITIONS_MAX {
        return Err(
            f.refuse_description(&format!("{key} is {positions}; fleet takes at most {POSITIONS_MAX}"))
        );
    }
    // with every default spelled out
    let mut config = Object::new();
    config.insert("model_type".into(), family.model_type.into());
    config.extend((family.write)(&decoder));
    let last = vocab_size - 1;
    for (key, id) in [
        ("bos_token_id", f.int32("model.bos_token_id", 0, last)?),
        ("eos_token_id", f.int32("model.eos_token_id", 0, last)?),
    ] {
        config.extend(id.map(|id| (key.into(), id.into())));
    }
    Ok((Model::New(config), tokenizer))
}

/// Keys of a `config.json` that may stand in `[model]` with the one value that fleet trains with.
fn only_what_is_trained(f: &Fields) -> Result<(), JobFileError> {
    let class = f.family.architecture;
    f.get("model.architectures", &format!("[{class:?}]"), |v| {
        v.texts().filter(|names| names.iter().all(|name| name == class))
    })?;
    for name in DROPOUTS {
        f.float(name, "0, for nothing is dropped in training,", |x| x == 0.0)?;
    }
    Ok(())
}

/// What the job says, as a `config.json` says it.
fn described(f: &Fields) -> Object {
    let mut config = Object::new();
    for (key, _, value) in f.description() {
        let value = json_of(value);
        match key.split_once('.') {
            None => {
                config.insert(key.into(), value);
            }
            Some((table, key)) => {
                let table = config.entry(table).or_insert_with(|| Object::new().into());
                if let Value::Object(table) = table {
                    table.insert(key.into(), value);
                }
            }
        }
    }
    config
}

fn json_of(value: &value::Value) -> Value {
    match &value.kind {
        Kind::Null => Value::Null,
        Kind::Bool(b) => json!(b),
        Kind::Int(n) => json!(n),
        // JSON has no word for it, and a null would say something
        Kind::Float(x) if !x.is_finite() => json!(x.to_string()),
        Kind::Float(x) => json!(x),
        Kind::Text(text) if text == NONE => Value::Null,
        Kind::Text(text) => json!(text),
        Kind::List(items) => items.iter().map(json_of).collect(),
        Kind::Table(entries) => {
            entries.iter().map(|(key, value)| (key.clone(), json_of(value))).collect::<Object>().into()
        }
    }
}

/// What of a description is written in a job file: what stands in `rope_parameters` and beside it is said once, and a null in a word.
pub(super) fn in_a_file(config: &Object) -> Object {
    let mut file = config.clone();
    let beside = |key: &str, value: &Value| file.get(key) == Some(value);
    if let Some(Value::Object(rope)) = config.get("rope_parameters") {
        let rest: Object = rope
            .iter()
            .filter(|(key, value)| !beside(key, value))
            .map(|(k, v)| (k.clone(), v.clone()))
            .collect();
        file.shift_remove("rope_parameters");
        if rest.iter().any(|(key, value)| key != "rope_type" || value != "default") {
            file.insert("rope_parameters".into(), rest.into()); // last, as TOML has its tables
        }
    }
    file.values_mut().filter(|value| value.is_null()).for_each(|value| *value = NONE.into());
    file
}

fn vocabulary(f: &Fields, tokenizer: Option<PathBuf>) -> Result<(u32, Tokenizer), JobFileError> {
    let Some(path) = tokenizer else {
        let vocab_size = f.int32("vocab_size", VOCAB_MIN, VOCAB_MAX)?.unwrap_or(2048);
        return Ok((vocab_size, Tokenizer::Train { vocab_size }));
    };
    let given = f.int32("vocab_size", 1, VOCAB_MAX)?;
    let counted = super::vocabulary::count(&path);
    match (given, counted) {
        (Some(given), Ok(counted)) if given < counted => {
            let message = format!(
                "`{}` ({given}) is smaller than the vocabulary of {} ({counted} tokens): leave it out, or raise it",
                f.spelling("vocab_size"),
                path.display()
            );
            Err(f.refuse(&["vocab_size"], message))
        }
        (Some(given), _) => Ok((given, Tokenizer::File(path))),
        (None, Ok(counted)) => Ok((counted, Tokenizer::File(path))),
        (None, Err(why)) => {
            let fetch = match path.exists() {
                true => "",
                false => {
                    " (one of the Hugging Face hub is fetched before: `hf download NAME tokenizer.json --local-dir DIR`)"
                }
            };
            let message = format!("`tokenizer.path`: {why}{fetch}");
            Err(f.refuse(&["tokenizer.path"], message))
        }
    }
}

#[cfg(test)]
mod tests;
