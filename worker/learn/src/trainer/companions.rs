//! What lies in a checkpoint beside weights and state so that other programs take the model and its tokenizer as fleet does: settings, chat
//! template, the tokenizer's other files. They come along with a model, and are made for a new one.

use crate::adapter::ADAPTER_CONFIG;
use crate::error::{Error, Result};
use crate::model::{Model, ending_with};
use crate::preference::REFERENCE_FILE;
use fleet_checkpoint::{
    ADAPTER_BASE_FILE, AdapterBase, CONFIG_FILE, CheckpointError, Dtype, TOKENIZER_FILE, Writer,
};
use fleet_common::job::Quantization;
use fleet_data::END_OF_TEXT;
use fleet_data::chat::CHAT_TEMPLATE;
use fleet_data::chat::end_token;
use fleet_data::model_dir::{
    GENERATION_CONFIG, Object, SPECIAL_TOKENS_MAP, SpecialTokens, TOKENIZER_CONFIG, read_object,
};
use serde_json::{Value, json};
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::Path;
use tokenizers::Tokenizer;

/// What belongs to a `tokenizer.json` and is copied as it is.
const OF_TOKENIZER: [&str; 8] = [
    SPECIAL_TOKENS_MAP,
    "added_tokens.json",
    CHAT_TEMPLATE,
    "chat_template.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
];

/// Where further templates lie, each by its name. A checkpoint has no folders: there they stand in the tokenizer's settings, which
/// transformers reads as well.
const MORE_TEMPLATES: &str = "additional_chat_templates";
const TEMPLATES_MAX: usize = 64;

/// The largest of them, lists of tokens, are some megabytes. Each is held in memory.
const FILE_MAX: u64 = 64 << 20;

const GENERAL_CLASS: &str = "PreTrainedTokenizerFast";
/// What a tokenizer gives to a model. By itself transformers 4 gives one of the general class `token_type_ids` too, which most models refuse and GPT-2 adds
/// to its embedding.
const INPUTS: [&str; 2] = ["input_ids", "attention_mask"];

/// Where a run's model comes from.
pub(super) struct Origins<'a> {
    /// The checkpoint that the run continues, which has what the run began with.
    pub resume: Option<&'a Path>,
    /// The directory of a given model.
    pub model: Option<&'a Path>,
    /// A given `tokenizer.json`.
    pub tokenizer: Option<&'a Path>,
    /// The `tokenizer.json` that is used.
    pub used: &'a Path,
    /// The text of the chat template by which the run's data were written, where the model has another one.
    pub chat_template: Option<&'a str>,
    /// Whether the run's data are rows, whose answers end as the template says.
    pub learns_rows: bool,
    /// How checkpoints have weights.
    pub weights: Dtype,
    /// Of the model beside an adapter.
    pub quantization: Option<Quantization>,
    /// With what the model is compared while it learns preferences.
    pub reference: Option<&'a [u8]>,
}

#[derive(Debug)]
pub(super) struct Companions {
    /// What describes the model, or the adapter, and the file that says so.
    config: (&'static str, Object),
    /// With `tokenizer.json`: the cache that it came from may be emptied while the run goes on.
    files: Vec<(&'static str, Vec<u8>)>,
}

impl Companions {
    /// The `eos_token_id` of `model` is what every document ends with.
    pub fn gather(from: &Origins, model: &Model) -> Result<Companions> {
        let used = std::fs::read(from.used)
            .map_err(|source| CheckpointError::Read { path: from.used.to_owned(), source })?;
        let tokenizer = Tokenizer::from_bytes(&used)
            .map_err(|e| Error::Input(format!("{}: not a tokenizer.json: {e}", from.used.display())))?;
        let beside = from.tokenizer.and_then(Path::parent);
        let mut files = vec![(TOKENIZER_FILE, used)];
        files.extend(from.reference.map(|bytes| (REFERENCE_FILE, bytes.to_owned())));
        for name in OF_TOKENIZER {
            files.extend(first(name, [from.resume, beside])?.map(|bytes| (name, bytes)));
        }

        let mut model = model.clone();
        let special =
            from.tokenizer.map(SpecialTokens::beside).transpose().map_err(input)?.unwrap_or_default();
        if from.model.is_none() {
            // A text without a begin of its own begins where another one ended.
            let named = special.bos.as_deref().and_then(|name| tokenizer.token_to_id(name));
            model.bos_token_id = model.bos_token_id.or(named).or(model.eos_token_id);
        }
        let end = model.eos_token_id.and_then(|id| tokenizer.id_to_token(id));
        let mut of_tokenizer = match first_object(TOKENIZER_CONFIG, [from.resume, beside])? {
            Some(given) => given,
            None => tokenizer_config(&tokenizer, &model),
        };
        for_both_versions(&mut of_tokenizer);
        let own = usual_template(&of_tokenizer, &files);
        if let Some(text) = from.chat_template {
            files.retain(|(name, _)| *name != CHAT_TEMPLATE);
            files.push((CHAT_TEMPLATE, text.as_bytes().to_vec()));
        }
        with_templates(&mut of_tokenizer, &mut files, [from.resume, beside])?;
        if from.chat_template.is_some() {
            as_usual(&mut of_tokenizer, &mut files);
        }
        if from.model.is_none() && special.eos.is_some() && special.eos != end {
            // The job has chosen another end.
            files.retain(|(name, _)| *name != SPECIAL_TOKENS_MAP);
            of_tokenizer.insert("eos_token".into(), json!(end));
        }
        if from.model.is_none() && model.family.adds_end_of_text {
            // The model has no row for that token.
            for role in ["pad_token", "unk_token"]
                .into_iter()
                .filter(|_| tokenizer.token_to_id(END_OF_TEXT).is_none())
            {
                of_tokenizer.entry(role).or_insert_with(|| json!(end));
            }
        }
        files.push((TOKENIZER_CONFIG, pretty(&of_tokenizer)));

        // With what answers end that were learnt by a template: transformers ends them there.
        let own = own.as_deref().filter(|_| from.learns_rows);
        let learnt = from.chat_template.or(own);
        let learnt = learnt.and_then(|text| end_token(text, special.named.clone(), &tokenizer));
        let generation = match from.model {
            Some(dir) => first_object(GENERATION_CONFIG, [from.resume, Some(dir)])?
                .or_else(|| learnt.map(|_| Object::new())),
            None => Some(Object::new()),
        };
        if let Some(mut generation) = generation.filter(|_| model.adapter.is_none()) {
            if from.model.is_none() {
                generation.insert("bos_token_id".into(), json!(model.bos_token_id));
            }
            let generation = ending_with(generation, &model.before, &[model.eos_token_id, learnt]);
            files.push((GENERATION_CONFIG, pretty(&generation)));
        }
        if let Some(adapter) = &model.adapter {
            let quantization = from.quantization.map(|it| it.name().to_owned());
            let base = AdapterBase { quantization, ..AdapterBase::of(&adapter.base)? };
            files.push((ADAPTER_BASE_FILE, base.to_bytes()));
        }
        let config = match &model.adapter {
            Some(adapter) => (ADAPTER_CONFIG, adapter.config.json.clone()),
            None => (CONFIG_FILE, model.config_json_of(from.weights)),
        };
        Ok(Companions { config, files })
    }

    pub fn write(&self, writer: &mut Writer) -> std::result::Result<(), CheckpointError> {
        let (name, config) = &self.config;
        writer.write_bytes(name, &pretty(config))?;
        self.files.iter().try_for_each(|(name, bytes)| writer.write_bytes(name, bytes))
    }
}

/// A `tokenizer_config.json` for a tokenizer that has none: without one, transformers guesses a class by the model, and that class adds tokens
/// that the model does not have.
fn tokenizer_config(tokenizer: &Tokenizer, model: &Model) -> Object {
    let name = |id: Option<u32>| id.and_then(|id| tokenizer.id_to_token(id));
    let json = serde_json::to_value(tokenizer).unwrap_or_default();
    let mut made = Object::new();
    for (role, token) in [
        ("bos_token", name(model.bos_token_id)),
        ("eos_token", name(model.eos_token_id)),
        ("unk_token", json["model"]["unk_token"].as_str().map(str::to_owned)),
    ] {
        if let Some(token) = token.filter(|token| tokenizer.token_to_id(token).is_some()) {
            made.insert(role.into(), token.into());
        }
    }
    // Transformers 4 sets it anew in the tokenizer, and takes it for false where it is not said.
    if json["pre_tokenizer"]["add_prefix_space"] == true {
        made.insert("add_prefix_space".into(), true.into());
    }
    made.insert("clean_up_tokenization_spaces".into(), false.into());
    made.insert("model_max_length".into(), model.decoder.max_positions.into());
    made.insert("tokenizer_class".into(), GENERAL_CLASS.into());
    made.insert("model_input_names".into(), json!(INPUTS));
    made
}

/// What transformers 5 writes into a `tokenizer_config.json` and transformers 4 cannot read, by the names that both take for the same.
fn for_both_versions(of_tokenizer: &mut Object) {
    if of_tokenizer.get("tokenizer_class").is_some_and(|class| class == "TokenizersBackend") {
        of_tokenizer.insert("tokenizer_class".into(), GENERAL_CLASS.into());
        of_tokenizer.entry("model_input_names").or_insert_with(|| json!(INPUTS));
    }
    let (list, older) = ("extra_special_tokens", "additional_special_tokens");
    if of_tokenizer.get(list).is_some_and(|tokens| tokens.is_array())
        && !of_tokenizer.contains_key(older)
        && let Some(tokens) = of_tokenizer.remove(list)
    {
        of_tokenizer.insert(older.into(), tokens);
    }
}

/// The file of this name in the first directory that has it.
fn first(name: &str, dirs: [Option<&Path>; 2]) -> Result<Option<Vec<u8>>> {
    for path in dirs.into_iter().flatten().map(|dir| dir.join(name)) {
        let failed = |source| CheckpointError::Read { path: path.clone(), source };
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(e) if e.kind() == ErrorKind::NotFound => continue,
            Err(e) => return Err(failed(e).into()),
        };
        let mut bytes = Vec::new();
        file.take(FILE_MAX + 1).read_to_end(&mut bytes).map_err(failed)?;
        if bytes.len() as u64 > FILE_MAX {
            let path = path.display();
            return Err(Error::Input(format!(
                "{path}: has more than {FILE_MAX} bytes; it is no {name}, move it away"
            )));
        }
        return Ok(Some(bytes));
    }
    Ok(None)
}

/// Puts all chat templates into the settings, where the first of `dirs` that has further ones has any.
fn with_templates(
    settings: &mut Object,
    files: &mut Vec<(&str, Vec<u8>)>,
    dirs: [Option<&Path>; 2],
) -> Result<()> {
    let mut found = dirs.into_iter().flatten().map(more_templates);
    let Some(more) = found.find(|more| !matches!(more, Ok(more) if more.is_empty())).transpose()? else {
        return Ok(());
    };
    let own = files.iter().position(|(name, _)| *name == CHAT_TEMPLATE).map(|at| files.remove(at).1);
    let own = own.map(|bytes| String::from_utf8_lossy(&bytes).into_owned().into());
    let usual = own.or_else(|| settings.remove("chat_template").filter(Value::is_string));
    let all = usual.map(|text| ("default".to_owned(), text)).into_iter().chain(more);
    let all = all.map(|(name, template)| json!({"name": name, "template": template})).collect();
    settings.insert("chat_template".into(), all);
    Ok(())
}

/// The text of the template by which a conversation is written where none is named.
fn usual_template(settings: &Object, files: &[(&str, Vec<u8>)]) -> Option<String> {
    if let Some((_, bytes)) = files.iter().find(|(name, _)| *name == CHAT_TEMPLATE) {
        return String::from_utf8(bytes.clone()).ok();
    }
    let text = match settings.get("chat_template")? {
        Value::Array(all) => all.iter().find(|template| template["name"] == "default")?.get("template")?,
        text => text,
    };
    text.as_str().map(str::to_owned)
}

/// The settings say no other usual template than the file: where they have several, it is one of them.
fn as_usual(settings: &mut Object, files: &mut Vec<(&str, Vec<u8>)>) {
    let Some(at) = files.iter().position(|(name, _)| *name == CHAT_TEMPLATE) else { return };
    match settings.get_mut("chat_template") {
        Some(Value::Array(all)) => {
            let text = String::from_utf8_lossy(&files.remove(at).1).into_owned();
            all.retain(|template| template["name"] != "default");
            all.insert(0, json!({"name": "default", "template": text}));
        }
        _ => {
            settings.remove("chat_template");
        }
    }
}

/// Names and texts of the further templates of the tokenizer in `dir`, by name.
fn more_templates(dir: &Path) -> Result<Vec<(String, Value)>> {
    let dir = dir.join(MORE_TEMPLATES);
    let Ok(entries) = std::fs::read_dir(&dir) else { return Ok(Vec::new()) };
    let mut files: Vec<_> = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect();
    files.retain(|file| file.ends_with(".jinja"));
    files.sort();
    if files.len() > TEMPLATES_MAX {
        let (dir, count) = (dir.display(), files.len());
        return Err(Error::Input(format!("{dir}: has {count} chat templates; keep at most {TEMPLATES_MAX}")));
    }
    let mut templates = Vec::new();
    for file in files {
        let text = first(&file, [Some(&dir), None])?.unwrap_or_default();
        let name = file.trim_end_matches(".jinja").to_owned();
        templates.push((name, String::from_utf8_lossy(&text).into()));
    }
    Ok(templates)
}

fn first_object(name: &str, dirs: [Option<&Path>; 2]) -> Result<Option<Object>> {
    for dir in dirs.into_iter().flatten() {
        if let Some(object) = read_object(&dir.join(name)).map_err(input)? {
            return Ok(Some(object));
        }
    }
    Ok(None)
}

fn input(error: fleet_data::DataError) -> Error {
    Error::Input(error.to_string())
}

fn pretty(object: &Object) -> Vec<u8> {
    serde_json::to_vec_pretty(object).expect("an object that was read or made here can be written")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As transformers 5.24 writes it; loaded by 5.24 and 4.57 with these names, both give the same tokens.
    #[test]
    fn settings_of_transformers_5_are_written_so_that_4_reads_them_too() {
        let change = |settings: serde_json::Value| {
            let mut settings: Object = serde_json::from_value(settings).unwrap();
            for_both_versions(&mut settings);
            serde_json::Value::Object(settings)
        };
        assert_eq!(
            change(
                json!({"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<x>"], "eos_token": "</s>"})
            ),
            json!({"tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": ["<x>"], "eos_token": "</s>", "model_input_names": INPUTS})
        );
        for same in [
            json!({"tokenizer_class": "LlamaTokenizer", "extra_special_tokens": {"image_token": "<i>"}}),
            json!({"additional_special_tokens": [], "extra_special_tokens": ["<x>"]}),
            json!({}),
        ] {
            assert_eq!(change(same.clone()), same);
        }
    }
}
