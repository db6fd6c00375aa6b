//! What a build of rows has done, from where one goes on that comes after a kill.

use super::Report;
use super::build::Kept;
use super::write::Written;
use crate::build::replace;
use crate::tokenise::Appended;
use crate::{Counts, Coverage, DataError};
use fleet_common::job::RowFormat;
use serde::{Deserialize, Serialize};
use std::fs;
use std::path::Path;

const DONE: &str = "done.json";

/// What is known of the examples that are written, a line of JSON each.
const EXAMPLES: &str = "examples.jsonl";

/// Raised when what a build leaves is to be read otherwise.
const LAYOUT: u32 = 1;

/// How far a build is, but for what its files have.
#[derive(Default, Serialize, Deserialize)]
pub(super) struct Done {
    layout: u32,
    /// The number of the file that is read, what its rows are, and how many blocks of it are done.
    pub file: usize,
    pub format: Option<RowFormat>,
    pub blocks: usize,
    pub counts: Counts,
    pub report: Report,
    /// A chat template has written some of the rows.
    pub is_templated: bool,
    pub coverage: Coverage,
    pub written: Written,
    /// Bytes of the list of examples, and how many it has.
    examples: u64,
    pub kept: usize,
}

impl Done {
    /// Of the build before in `dir`, with its examples; nothing where that is not whole. `needed` says of which files how many bytes must be there.
    pub fn left(dir: &Path, needed: impl Fn(&Done) -> Vec<(&'static str, u64)>) -> (Done, Vec<Kept>) {
        let has =
            |(name, bytes): &(&str, u64)| fs::metadata(dir.join(name)).is_ok_and(|meta| meta.len() >= *bytes);
        let read = || {
            let done: Done = serde_json::from_slice(&fs::read(dir.join(DONE)).ok()?).ok()?;
            let lines = fs::read(dir.join(EXAMPLES)).ok()?;
            let lines = lines.get(..usize::try_from(done.examples).ok()?)?.split(|byte| *byte == b'\n');
            let kept = lines.filter(|line| !line.is_empty()).map(serde_json::from_slice);
            let kept: Vec<Kept> = kept.collect::<Result<_, _>>().ok()?;
            let is_whole = done.layout == LAYOUT && done.kept == kept.len() && needed(&done).iter().all(has);
            is_whole.then_some((done, kept))
        };
        read().unwrap_or_default()
    }

    /// Notes it in `dir`, whose other files are synced. `kept`: all examples.
    pub fn note(&mut self, dir: &Path, kept: &[Kept]) -> Result<(), DataError> {
        let mut list = Appended::open(dir.join(EXAMPLES), self.examples)?;
        for kept in &kept[self.kept..] {
            let mut line = serde_json::to_vec(kept).expect("plain data");
            line.push(b'\n');
            list.write(&line)?;
        }
        (self.layout, self.examples, self.kept) = (LAYOUT, list.sync()?, kept.len());
        replace(dir, DONE, &serde_json::to_vec(self).expect("counts are plain data"))
    }

    /// Takes away what is noted in `dir`.
    pub fn forget(dir: &Path) -> Result<(), DataError> {
        for path in [dir.join(DONE), dir.join(EXAMPLES)] {
            match fs::remove_file(&path) {
                Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
                    return Err(DataError::Write { path, source });
                }
                _ => {}
            }
        }
        Ok(())
    }
}
