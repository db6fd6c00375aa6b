//! What was seen in the data's folders and not taken, so that nothing is left out without a word.

use std::collections::BTreeMap;
use std::path::Path;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Reason {
    NotIncluded,
    /// By its name a file of data, of a kind that is not read by itself.
    Data,
    /// A file, or a folder with all that is in it; so are the next three.
    Excluded,
    Hidden,
    Target,
    /// The job's output directory, and what fleet keeps anywhere: caches, checkpoints.
    Output,
    /// A FIFO, a socket or a device.
    Special,
    /// Its file was taken already.
    Again,
    Loop,
}

/// For each reason how many entries, and the first of them.
#[derive(Debug, Default)]
pub(crate) struct LeftOut(BTreeMap<Reason, (u64, String)>);

impl LeftOut {
    pub fn add(&mut self, reason: Reason, below: &Path) {
        self.0.entry(reason).or_insert_with(|| (0, below.display().to_string())).0 += 1;
    }

    /// How many for this reason, and the first of them.
    pub fn of(&self, reason: Reason) -> Option<(u64, &str)> {
        self.0.get(&reason).map(|(count, first)| (*count, first.as_str()))
    }

    /// One line, if there is anything to tell.
    pub fn told(&self) -> Option<String> {
        let told: Vec<String> =
            self.0.iter().map(|(reason, (count, first))| told(*reason, *count, first)).collect();
        (!told.is_empty()).then(|| format!("left out: {}", told.join(", ")))
    }
}

fn told(reason: Reason, count: u64, first: &str) -> String {
    let what = match (reason, count) {
        (Reason::NotIncluded, _) => "that data.include does not name",
        (Reason::Data, 1) => "that looks like data and is of no kind that is read",
        (Reason::Data, _) => "that look like data and are of no kind that is read",
        (Reason::Excluded, _) => "by data.exclude",
        (Reason::Hidden, _) => "hidden",
        (Reason::Target, _) => "of build outputs",
        (Reason::Output, _) => "that fleet writes",
        (Reason::Special, 1) => "that is no file",
        (Reason::Special, _) => "that are no files",
        (Reason::Again, _) => "under a second name",
        (Reason::Loop, 1) => "link back to a folder that it lies in",
        (Reason::Loop, _) => "links back to folders that they lie in",
    };
    let example = if count == 1 { first.to_owned() } else { format!("such as {first}") };
    format!("{count} {what} ({example})")
}
