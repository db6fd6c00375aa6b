//! Whether data are rows of instructions, for whoever may as well read a text in each row.

use super::{Row, format, source};
use crate::DataFiles;
use crate::blocks::{Contents, Input, Reading};
use fleet_common::job::{Job, RowFormat, Rows};

/// Whether a job that may learn rows says how they are, or the first rows of its first file have what such have, and no text in
/// `data.text_field`. What cannot be read holds none: what is wrong with it says whoever reads it.
pub fn holds_rows(job: &Job) -> bool {
    let Some(rows) = &job.data.rows else { return false };
    if rows.format == Some(RowFormat::Text) {
        return false;
    }
    let is_said = *rows != Rows { bad_rows: rows.bad_rows, ..Rows::default() };
    is_said || first(job).is_some_and(|first| format::are_instructions(&job.data, rows, &first))
}

/// The first rows.
fn first(job: &Job) -> Option<Vec<Row>> {
    let path = DataFiles::find(job, &|_| {}).ok()?.files.into_iter().next()?;
    let input = Input { path, sha256: [0; 32], weight: 1.0 };
    let mut first = None;
    // No more than one block is read, so the hash counts for nothing.
    let read = input.blocks(Reading { damaged_too: true, ..Reading::default() }, &mut |block| {
        if !matches!(block.contents, Contents::Texts { .. }) {
            let mut rows = Vec::new();
            source::each(&input.path, block, &mut |_, row| {
                rows.extend(row.ok().filter(|_| rows.len() < format::FIRST));
                Ok(())
            })?;
            first = Some(rows);
        }
        Ok(false)
    });
    read.ok()?;
    first
}
