//! Which chat template rows go through.

use super::Unused;
use crate::DataError;
use crate::chat::{ChatError, Template, Templates};
use fleet_common::job::{ChatTemplate, Rows};
use std::path::Path;

/// A model's template, and the one that it has for conversations with tools, which is often the same.
pub(super) struct Chosen {
    usual: Template,
    with_tools: Template,
    /// The model does not have it as its usual one.
    is_other: bool,
}

impl Chosen {
    /// As the job says, else the model's own, if it has one. `tokenizer` lies where the model's templates are.
    pub fn of(rows: &Rows, tokenizer: &Path) -> Result<Option<Chosen>, DataError> {
        let templates = Templates::of_dir(tokenizer.parent().unwrap_or(Path::new(".")))?;
        let choose = |name: Option<&str>| -> Result<Option<Chosen>, ChatError> {
            let of = |has_tools| templates.choose(name, has_tools);
            Ok(Some(Chosen { usual: of(false)?, with_tools: of(true)?, is_other: name.is_some() }))
        };
        let refused = |error: ChatError| DataError::Rows(format!("data.chat_template: {error}"));
        match &rows.chat_template {
            Some(ChatTemplate::None) => Ok(None),
            None if !templates.has_usual() => Ok(None),
            None | Some(ChatTemplate::Model) => choose(None).map_err(refused),
            Some(ChatTemplate::Named(name)) => choose(Some(name)).map_err(refused),
            Some(ChatTemplate::File(path)) => {
                let read = || templates.of_file(path);
                Ok(Some(Chosen { usual: read()?, with_tools: read()?, is_other: true }))
            }
        }
    }

    pub fn template(&self, has_tools: bool) -> &Template {
        if has_tools { &self.with_tools } else { &self.usual }
    }

    /// The text of a template that the model does not have as its usual one: with it the checkpoint has to be asked.
    pub fn carried(&self) -> Option<&str> {
        self.is_other.then(|| self.usual.source())
    }
}

/// What decides how rows are written, for the hash of a cache.
pub(crate) fn described(rows: &Rows, tokenizer: &Path) -> Result<String, DataError> {
    let settings = serde_json::to_string(rows).expect("plain data");
    let chosen = Chosen::of(rows, tokenizer)?;
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
