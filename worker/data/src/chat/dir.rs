//! Where a model's chat templates come from.

use super::{ChatError, Template, builtin};
use crate::DataError;
use crate::model_dir::{SpecialTokens, TOKENIZER_CONFIG, read_object};
use serde_json::Value;
use std::collections::BTreeMap;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

const DEFAULT: &str = "default";
const TOOL_USE: &str = "tool_use";
/// The file of the template that a model is asked with.
pub const CHAT_TEMPLATE: &str = "chat_template.jinja";
const MORE: &str = "additional_chat_templates";

/// Bytes of a file that are read; a template may have fewer.
const FILE_MAX: u64 = 2 << 20;

/// Files in the directory of additional templates.
const FILES_MAX: usize = 64;

/// The chat templates of a model directory, with its special tokens.
pub struct Templates {
    dir: PathBuf,
    /// By name: where each stands, and its text.
    found: BTreeMap<String, (String, String)>,
    special: BTreeMap<String, String>,
}

impl Templates {
    /// Reads `chat_template.jinja` and `additional_chat_templates/*.jinja`; where there are none, `chat_template` of
    /// tokenizer_config.json, a text or a list of them with names.
    pub fn of_dir(dir: &Path) -> Result<Templates, DataError> {
        let special = SpecialTokens::beside(&dir.join(crate::model_dir::TOKENIZER))?.named;
        let mut found = of_files(dir)?;
        if found.is_empty() {
            found = of_settings(&dir.join(TOKENIZER_CONFIG))?;
        }
        Ok(Templates { dir: dir.to_owned(), found, special })
    }

    /// Those of a model and of what changes it, of which the last has the last word.
    pub fn of_changed(dir: &Path, changed_by: &[PathBuf]) -> Result<Templates, DataError> {
        changed_by.iter().try_fold(Templates::of_dir(dir)?, |mut all, adapter| {
            let Templates { found, special, .. } = Templates::of_dir(adapter)?;
            all.found.extend(found);
            all.special.extend(special);
            Ok(all)
        })
    }

    /// Whether the model has one that is taken where none is named.
    pub(crate) fn has_usual(&self) -> bool {
        self.found.contains_key(DEFAULT)
    }

    /// Whether both take the same one where none is named.
    pub(crate) fn has_usual_of(&self, other: &Templates) -> bool {
        let source = |templates: &Templates| templates.found.get(DEFAULT).map(|(_, source)| source.clone());
        source(self) == source(other)
    }

    /// The template in a file, with the special tokens of this model.
    pub fn of_file(&self, path: &Path) -> Result<Template, DataError> {
        let missing = || DataError::Read { path: path.to_owned(), source: ErrorKind::NotFound.into() };
        let source = read(path)?.ok_or_else(missing)?;
        Template::parse(&path.display().to_string(), &source, self.special.clone()).map_err(DataError::Chat)
    }

    /// The one of this name, of the model or built in; without a name the model's own, for tools where there are some.
    pub fn choose(&self, name: Option<&str>, has_tools: bool) -> Result<Template, ChatError> {
        let usual = if has_tools { [TOOL_USE, DEFAULT] } else { [DEFAULT, DEFAULT] };
        let own = match name {
            Some(name) => self.found.get(name),
            None => usual.iter().find_map(|name| self.found.get(*name)),
        };
        if let Some((place, source)) = own {
            return Template::parse(place, source, self.special.clone());
        }
        if let Some((name, source)) = name.and_then(|name| Some((name, builtin::find(name)?))) {
            return Template::parse(name, source, self.special.clone());
        }
        let own: Vec<&str> = self.found.keys().map(String::as_str).collect();
        let own = if own.is_empty() { "none".to_owned() } else { own.join(", ") };
        let what = match name {
            Some(name) => format!("there is no chat template {name}"),
            None => format!("{} has no chat template for this", self.dir.display()),
        };
        let what = format!("{what} (of the model: {own}; built in: {})", builtin::names());
        Err(ChatError::new(
            what,
            "name the one with which the model was trained (--chat-template NAME, in a job data.chat_template)",
        ))
    }
}

type Found = BTreeMap<String, (String, String)>;

fn of_files(dir: &Path) -> Result<Found, DataError> {
    let mut found = Found::new();
    let mut add = |name: &str, path: &Path| -> Result<(), DataError> {
        if let Some(source) = read(path)? {
            found.insert(name.to_owned(), (path.display().to_string(), source));
        }
        Ok(())
    };
    add(DEFAULT, &dir.join(CHAT_TEMPLATE))?;
    let more = dir.join(MORE);
    let unread = |source| DataError::Read { path: more.clone(), source };
    let entries = match std::fs::read_dir(&more) {
        Ok(entries) => entries,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(found),
        Err(e) => return Err(unread(e)),
    };
    for entry in entries.take(FILES_MAX) {
        let path = entry.map_err(unread)?.path();
        let name = path.file_stem().and_then(|stem| stem.to_str());
        if let Some(name) = name.filter(|_| path.extension().is_some_and(|end| end == "jinja")) {
            add(name, &path)?;
        }
    }
    Ok(found)
}

fn read(path: &Path) -> Result<Option<String>, DataError> {
    let unread = |source| DataError::Read { path: path.to_owned(), source };
    let file = match std::fs::File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(unread(e)),
    };
    let mut bytes = Vec::new();
    file.take(FILE_MAX).read_to_end(&mut bytes).map_err(unread)?;
    let not_utf8 = |e: std::string::FromUtf8Error| DataError::NotUtf8 {
        path: path.to_owned(),
        offset: e.utf8_error().valid_up_to(),
    };
    String::from_utf8(bytes).map(Some).map_err(not_utf8)
}

fn of_settings(path: &Path) -> Result<Found, DataError> {
    let settings = read_object(path)?.unwrap_or_default();
    let place = |name: &str| format!("{name} of {}", path.display());
    let bad = || DataError::Settings {
        path: path.to_owned(),
        what: "has a chat_template that is neither a text nor a list of {\"name\", \"template\"}".to_owned(),
    };
    match settings.get("chat_template") {
        None | Some(Value::Null) => Ok(Found::new()),
        Some(Value::String(source)) => {
            Ok(Found::from([(DEFAULT.to_owned(), (place("chat_template"), source.clone()))]))
        }
        Some(Value::Array(list)) => list
            .iter()
            .map(|one| match (&one["name"], &one["template"]) {
                (Value::String(name), Value::String(source)) => {
                    Ok((name.clone(), (place(&format!("chat_template {name}")), source.clone())))
                }
                _ => Err(bad()),
            })
            .collect(),
        Some(_) => Err(bad()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chat::{Conversation, Ending};
    use serde_json::json;
    use time::OffsetDateTime;

    fn dir(files: &[(&str, String)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join(MORE)).unwrap();
        files.iter().for_each(|(name, text)| std::fs::write(dir.path().join(name), text).unwrap());
        dir
    }

    fn rendered(dir: &Path, name: Option<&str>, has_tools: bool) -> Result<String, String> {
        let template = Templates::of_dir(dir).map_err(|e| e.to_string())?.choose(name, has_tools);
        let ask = Conversation::ask(Some("s"), "q");
        let text =
            template.and_then(|template| template.render(&ask, Ending::Prompt, OffsetDateTime::UNIX_EPOCH));
        text.map(|rendered| rendered.text).map_err(|e| e.to_string())
    }

    #[test]
    fn a_file_counts_before_the_settings_and_tools_have_their_own() {
        let settings = |template: Value| {
            let json = json!({"chat_template": template, "bos_token": {"content": "<s>"}, "eos_token": "</s>", "image_token": "<i>"});
            (TOKENIZER_CONFIG, json.to_string())
        };
        let named = json!([{"name": "default", "template": "D{{ bos_token }}"}, {"name": "tool_use", "template": "T{{ image_token }}"}]);
        let of_settings = dir(&[settings(named.clone())]);
        assert_eq!(rendered(of_settings.path(), None, false).unwrap(), "D<s>");
        assert_eq!(rendered(of_settings.path(), None, true).unwrap(), "T<i>");
        assert_eq!(rendered(of_settings.path(), Some("tool_use"), false).unwrap(), "T<i>");
        let files = [
            settings(named),
            (CHAT_TEMPLATE, "F{{ eos_token }}".to_owned()),
            ("additional_chat_templates/rag.jinja", "R".to_owned()),
        ];
        let of_files = dir(&files);
        assert_eq!(rendered(of_files.path(), None, true).unwrap(), "F</s>");
        assert_eq!(rendered(of_files.path(), Some("rag"), true).unwrap(), "R");
        let text = dir(&[settings(json!("{{ messages[1].content }}{{ pad_token }}"))]);
        assert_eq!(rendered(text.path(), None, false).unwrap(), "q");
    }

    #[test]
    fn a_model_without_a_template_takes_a_named_one_and_is_told_which_there_are() {
        let none = dir(&[]);
        let chatml =
            "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n";
        assert_eq!(rendered(none.path(), Some("chatml"), false).unwrap(), chatml);
        for name in [None, Some("chatlm")] {
            let said = rendered(none.path(), name, false).unwrap_err();
            let listed =
                "(of the model: none; built in: chatml, llama3, llama2, mistral, gemma, phi3, zephyr)";
            assert!(
                said.contains(listed) && said.contains("--chat-template NAME") && !said.contains('\n'),
                "{said}"
            );
        }
        let other = dir(&[("additional_chat_templates/rag.jinja", "R".to_owned())]);
        assert!(rendered(other.path(), None, false).unwrap_err().contains("of the model: rag;"));
    }

    #[test]
    fn what_changes_a_model_has_the_last_word() {
        let base = dir(&[
            (CHAT_TEMPLATE, "B{{ eos_token }}".to_owned()),
            (TOKENIZER_CONFIG, json!({"eos_token": "</s>"}).to_string()),
        ]);
        let adapter = dir(&[(CHAT_TEMPLATE, "A{{ eos_token }}".to_owned())]);
        let plain = dir(&[]);
        let said = |changed_by: &[&tempfile::TempDir]| {
            let changed_by: Vec<PathBuf> = changed_by.iter().map(|dir| dir.path().to_owned()).collect();
            let template = Templates::of_changed(base.path(), &changed_by).unwrap().choose(None, false);
            let ask = Conversation::ask(None, "q");
            template.unwrap().render(&ask, Ending::Prompt, OffsetDateTime::UNIX_EPOCH).unwrap().text
        };
        assert_eq!(said(&[]), "B</s>");
        assert_eq!(said(&[&adapter, &plain]), "A</s>");
    }

    #[test]
    fn files_that_hold_no_template_are_named() {
        let bad = dir(&[(TOKENIZER_CONFIG, json!({"chat_template": [{"name": 3}]}).to_string())]);
        let said = rendered(bad.path(), None, false).unwrap_err();
        assert!(said.contains("tokenizer_config.json has a chat_template that is neither"), "{said}");
        let bad = dir(&[(CHAT_TEMPLATE, "\u{1}".repeat(1 << 21))]);
        let said = rendered(bad.path(), None, false).unwrap_err();
        assert!(said.contains("chat_template.jinja: it has 2097152 bytes; the most is 1048576"), "{said}");
        std::fs::write(bad.path().join(CHAT_TEMPLATE), b"a\xff").unwrap();
        let said = rendered(bad.path(), None, false).unwrap_err();
        assert!(said.contains("bad byte at offset 1"), "{said}");
    }
}
