//! What whoever starts a job should know of its data while it is prepared.

use fleet_common::events::Level;

/// One line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Note {
    pub level: Level,
    pub line: String,
}

impl Note {
    pub(crate) fn info(line: impl Into<String>) -> Note {
        Note { level: Level::Info, line: line.into() }
    }

    pub(crate) fn warning(line: impl Into<String>) -> Note {
        Note { level: Level::Warn, line: line.into() }
    }
}
