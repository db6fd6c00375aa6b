//! What was read, and what became of it on the way to documents: told with every start.

use crate::Note;
use serde::{Deserialize, Serialize};

/// What was read, and what became of it on the way to documents.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Counts {
    pub files: u64,
    /// Of tables and JSON.
    pub rows: u64,
    /// Files that are a document each.
    pub whole: u64,
    /// Rows and files without text.
    pub empty: u64,
    /// Pieces that the rest was cut into, where there were too few documents; else 0.
    pub pieces: u64,
    /// Documents or pieces that cleaning dropped.
    pub cleaned_away: u64,
    /// Rows of TSV whose text stands in quotes as in CSV, which a TSV does not have.
    pub quoted: u64,
    /// Rows that are left out, because they cannot be read, and the first of them: where, and what is wrong.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub bad: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_bad: Option<String>,
    /// Rows and texts that are left out, because they hold bytes that are not UTF-8.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub not_utf8: u64,
    /// Documents that are left out, because one before them is nearly the same.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub near_duplicates: u64,
}

fn is_zero(count: &u64) -> bool {
    *count == 0
}

impl Counts {
    /// What the user should know.
    pub(crate) fn notes(&self) -> Vec<Note> {
        let mut notes = vec![Note::info(self.told())];
        if self.quoted > 0 {
            notes.push(Note::warning(format!(
                "{} of TSV with text in quotes, which stay in the text: a TSV has no quoting; where quotes are not meant, write CSV \
                 or JSON Lines",
                counted(self.quoted, "row")
            )));
        }
        if self.bad > 0 {
            let first =
                self.first_bad.as_ref().map(|first| format!(" (the first: {first})")).unwrap_or_default();
            notes.push(Note::warning(format!(
                "left out: {} that cannot be read{first}",
                counted(self.bad, "row")
            )));
        }
        if self.not_utf8 > 0 {
            notes.push(Note::warning(format!(
                "left out: {} with bytes that are not UTF-8",
                counted(self.not_utf8, "row")
            )));
        }
        notes
    }

    /// Of both together; files are counted by whoever knows them.
    pub(crate) fn add(&mut self, more: Counts) {
        self.files += more.files;
        self.rows += more.rows;
        self.whole += more.whole;
        self.empty += more.empty;
        self.pieces += more.pieces;
        self.cleaned_away += more.cleaned_away;
        self.quoted += more.quoted;
        self.bad += more.bad;
        self.not_utf8 += more.not_utf8;
        self.near_duplicates += more.near_duplicates;
        self.first_bad = self.first_bad.take().or(more.first_bad);
    }

    /// When all have been added: where nothing was cut there are no pieces.
    pub(crate) fn settle(&mut self) {
        if self.pieces + self.empty + self.bad + self.not_utf8 == self.rows + self.whole {
            self.pieces = 0;
        }
    }

    pub(crate) fn told(&self) -> String {
        let (files, all) = (counted(self.files, "file"), counted(self.rows + self.whole, "document"));
        let mut line = match (self.rows, self.whole) {
            (_, 0) => format!("read {} of {files}", counted(self.rows, "row")),
            (0, _) => format!("read {all} of {files}"),
            (rows, whole) => {
                format!("read {all} of {files}: {} and {whole} whole", counted(rows, "row"))
            }
        };
        for (count, what) in [
            (self.empty, "without text"),
            (self.pieces, "pieces after cutting"),
            (self.cleaned_away, "dropped by data.clean"),
            (self.near_duplicates, "left out as near duplicates"),
        ] {
            if count > 0 {
                line += &format!(", {count} {what}");
            }
        }
        line
    }
}

fn counted(count: u64, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}
