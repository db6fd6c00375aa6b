//! From where a job goes on: its model, or a checkpoint, which has all that its run began with.

use crate::{CONFIG_FILE, CheckpointError, MANIFEST_FILE, ModelDir, Search, TOKENIZER_FILE, latest, verify};
use fleet_common::events::Level;
use fleet_common::job::{Job, Model, Resume, Tokenizer};
use std::path::{Path, PathBuf};

/// What the job itself says it continues from, as it lies on this machine, with every hash checked.
pub fn continued(job: &Job, progress: &dyn Fn(Level, String)) -> Result<Option<PathBuf>, CheckpointError> {
    let dir = match &job.checkpoint.resume {
        Resume::No => return Ok(None),
        Resume::Path(dir) => {
            verify(dir)?;
            dir.clone()
        }
        Resume::Latest => {
            let place = job.checkpoint_dir();
            let Search { newest, passed_over } = latest(&place)?;
            for damage in &passed_over {
                progress(Level::Warn, damage.to_string());
            }
            let count = passed_over.len();
            match (newest, passed_over.into_iter().next()) {
                (Some((dir, _)), _) => dir,
                (None, Some(damage)) if !job.checkpoint.overwrite => {
                    return Err(CheckpointError::NoneWhole { dir: place, count, newest: Box::new(damage) });
                }
                (None, _) => {
                    let line =
                        format!("no checkpoint in {} yet: starting from the beginning", place.display());
                    progress(Level::Info, line);
                    return Ok(None);
                }
            }
        }
    };
    progress(Level::Info, format!("continuing from {}", dir.display()));
    Ok(Some(dir))
}

/// Refuses a model from which no run can begin. A checkpoint is one whole, also where only its weights are wanted; of several disks, what one of
/// them has.
pub fn can_begin(model: &Path, job: &Job) -> Result<(), CheckpointError> {
    if model.join(MANIFEST_FILE).exists() {
        match verify(model) {
            Ok(_) | Err(CheckpointError::Partial { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    ModelDir::of_job(model, job).map(drop)
}

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
