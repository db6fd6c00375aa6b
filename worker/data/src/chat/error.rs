//! What can be wrong with a chat template or with what it is given, in one line.

use std::fmt;

/// Of an error's text: templates write theirs themselves.
const TEXT_MAX: usize = 500;

/// Which template, where in it, at which message, what, and what to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChatError {
    /// The file, or the name, of the template; none where only the conversation is wrong.
    pub template: Option<String>,
    /// From 1.
    pub line: Option<usize>,
    /// The index of a message, from 0, and its role.
    pub message: Option<(usize, String)>,
    what: String,
    cure: &'static str,
}

impl ChatError {
    pub(super) fn new(what: impl Into<String>, cure: &'static str) -> ChatError {
        ChatError { template: None, line: None, message: None, what: what.into(), cure }
    }

    pub(super) fn of_template(self, template: &str, line: Option<usize>) -> ChatError {
        ChatError { template: Some(template.to_owned()), line, ..self }
    }

    pub(super) fn at_message(self, index: usize, role: &str) -> ChatError {
        ChatError { message: Some((index, role.to_owned())), ..self }
    }

    /// Whether two renderings failed for the same reason.
    pub(super) fn is_as(&self, other: &ChatError) -> bool {
        (self.line, &self.what) == (other.line, &other.what)
    }
}

impl fmt::Display for ChatError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let line = self.line.map(|line| format!(", line {line}")).unwrap_or_default();
        if let Some(template) = &self.template {
            write!(f, "chat template {template}{line}: ")?;
        }
        if let Some((index, role)) = &self.message {
            write!(f, "at messages[{index}] (role {role}): ")?;
        }
        let what: String = self.what.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
        match what.char_indices().nth(TEXT_MAX) {
            Some((end, _)) => write!(f, "{} ...", &what[..end])?,
            None => f.write_str(what.trim())?,
        }
        write!(f, "; {}", self.cure)
    }
}

impl std::error::Error for ChatError {}
