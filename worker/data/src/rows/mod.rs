//! Rows of instruction data into sequences of tokens, with a mask of those that carry loss.
//!
//! ```text
//! file ──source──▶ row ──example──▶ what it teaches ──sequence──▶ ids and mask ──write──▶ a cache whose items are examples or packs
//! ```
//!
//! Nothing is padded, and of a file no more is held than its bytes and a batch of rows.

mod build;
mod done;
mod example;
mod fields;
mod format;
mod messages;
mod pack;
mod peek;
mod report;
mod sequence;
mod source;
mod templates;
mod write;

pub(crate) use build::build;
pub use peek::holds_rows;
pub use report::Report;
pub(crate) use templates::described;

/// A row as it stands in the data.
type Row = serde_json::Map<String, serde_json::Value>;

/// Why a row teaches nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Unused {
    /// It cannot be read: what is wrong, in one line.
    Bad(String),
    /// It has no text, or no answer.
    Empty,
    /// What is chosen is what is rejected.
    Same,
    /// Its messages need a chat template, and there is none.
    NoTemplate,
}

fn bad<T>(what: impl Into<String>) -> Result<T, Unused> {
    Err(Unused::Bad(what.into()))
}
