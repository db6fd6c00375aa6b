//! Which chat template rows go through.

use super::Unused;
use crate::DataError;
use crate::chat::{ChatError, Template, Templates};
use fleet_common::job::{ChatTemplate, Rows};
use std::path::{Path, PathBuf};

/// A model's template, and the one that it has for conversations with tools, which is often the same.
pub(super) struct Chosen {
    usual: Template,
    with_tools: Template,
    /// The model does not have it as its usual one.
    is_other: bool,
}

impl Chosen {
    /// As the job says, else that of the adapter from which it goes on, if that has one, else the model's own, if it has one. `tokenizer` lies where the
    /// model's templates are.
    pub fn of(rows: &Rows, tokenizer: &Path, adapter: Option<&Path>) -> Result<Option<Chosen>, DataError> {
        let dir = tokenizer.parent().unwrap_or(Path::new("."));
        let templates = Templates::of_dir(dir)?;
        let adapters: Vec<PathBuf> = adapter.into_iter().map(Path::to_owned).collect();
        let changed = Templates::of_changed(dir, &adapters)?;
        let choose = |from: &Templates, name: Option<&str>| -> Result<Option<Chosen>, ChatError> {
            let of = |has_tools| from.choose(name, has_tools);
            let is_other = name.is_some() || !from.has_usual_of(&templates);
            Ok(Some(Chosen { usual: of(false)?, with_tools: of(true)?, is_other }))
        };
        let refused = |error: ChatError| DataError::Rows(format!("data.chat_template: {error}"));
        match &rows.chat_template {
            Some(ChatTemplate::None) => Ok(None),
            None if !changed.has_usual() => Ok(None),
            None => choose(&changed, None).map_err(refused),
            Some(ChatTemplate::Model) => choose(&templates, None).map_err(refused),
            Some(ChatTemplate::Named(name)) => choose(&templates, Some(name)).map_err(refused),
            Some(ChatTemplate::File(path)) => {
                let read = || templates.of_file(path);
                Ok(Some(Chosen { usual: read()?, with_tools: read()?, is_other: true }))
            }
        }
    }

    pub fn template(&self, has_tools: bool) -> &Template {
        if has_tools { &self.with_tools } else { &self.usual }
    }

    /// Whether the model has another one as its usual one.
    pub fn is_other(&self) -> bool {
        self.is_other
    }

    /// The text of a template that the model does not have as its usual one: with it the checkpoint has to be asked.
    pub fn carried(&self) -> Option<&str> {
        self.is_other.then(|| self.usual.source())
    }
}

/// What decides how rows are written, for the hash of a cache.
pub(crate) fn described(rows: &Rows, tokenizer: &Path, adapter: Option<&Path>) -> Result<String, DataError> {
    let settings = serde_json::to_string(rows).expect("plain data");
    let chosen = Chosen::of(rows, tokenizer, adapter)?;
    let templates = chosen.iter().flat_map(|chosen| [&chosen.usual, &chosen.with_tools]);
    Ok(templates.fold(settings, |all, template| all + "\n" + &template.described()))
}

/// The error of rows of messages where there is no template.
pub(super) fn missing() -> DataError {
    DataError::Rows(format!(
        "rows of messages need a chat template, and the model has none; set data.chat_template to the one with which it shall learn: {}, \
         or a .jinja file",
        crate::chat::built_in()
    ))
}

impl From<ChatError> for Unused {
    fn from(error: ChatError) -> Unused {
        Unused::Bad(error.to_string())
    }
}
