//! What a job that continues a checkpoint takes from there because it is gone: the checkpoint has all that the run began with.

use crate::{CONFIG_FILE, TOKENIZER_FILE};
use fleet_common::job::{Job, Model, Tokenizer};
use std::path::Path;

/// Puts the checkpoint in the place of a `model.path` or `tokenizer.path` that is not there any more. Returns a note for each.
pub fn take_what_is_gone(job: &mut Job, checkpoint: &Path) -> Vec<String> {
    let mut notes = Vec::new();
    let mut note = |key: &str, path: &Path| {
        notes.push(format!("{key} {} is gone: taken from {}", path.display(), checkpoint.display()));
    };
    // What an adapter began with is in its checkpoint, and what it is trained beside is not.
    if let Some(path) = job.adapter.as_mut().and_then(|adapter| adapter.path.as_mut()) {
        checkpoint.clone_into(path);
    }
    if let Model::Pretrained(dir) = &mut job.model
        && job.adapter.is_none()
        && !dir.join(CONFIG_FILE).exists()
    {
        note("model.path", dir);
        checkpoint.clone_into(dir);
    }
    if let Tokenizer::File(path) = &mut job.tokenizer
        && !path.exists()
    {
        note("the tokenizer", path);
        *path = checkpoint.join(TOKENIZER_FILE);
    }
    notes
}
