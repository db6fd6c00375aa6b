//! What must be there before ranks start: the token cache and the checkpoint to resume from, found, built and verified. Blocking work
//! for a thread of its own; its errors carry their fault.

use crate::gang::Prepared;
use crate::verdict::agent_error;
use fleet_checkpoint::CheckpointError;
use fleet_common::events::{JobError, Level};
use fleet_common::job::{Job, Resume};
use fleet_data::TokenCache;
use std::path::PathBuf;

/// Prepares a job on the node `node`, telling `progress` what goes on.
pub fn prepare(job: &Job, node: &str, progress: &dyn Fn(Level, String)) -> Result<Prepared, JobError> {
    let resume =
        resume(job, progress).map_err(|error| agent_error(error.fault(), node, error.to_string()))?;
    let cache = TokenCache::build_or_open(job, &|note| progress(note.level, note.line));
    let (cache, stats) = cache.map_err(|error| agent_error(error.fault(), node, error.to_string()))?;
    Ok(Prepared { cache_dir: cache.dir().to_owned(), stats, resume })
}

/// The checkpoint that the job continues from, with every hash checked.
fn resume(job: &Job, progress: &dyn Fn(Level, String)) -> Result<Option<PathBuf>, CheckpointError> {
    let dir = match &job.checkpoint.resume {
        Resume::No => return Ok(None),
        Resume::Path(dir) => {
            fleet_checkpoint::verify(dir)?;
            dir.clone()
        }
        Resume::Latest => {
            let search = fleet_checkpoint::latest(&job.checkpoint_dir())?;
            for damage in &search.passed_over {
                progress(Level::Warn, damage.to_string());
            }
            let Some((dir, _)) = search.newest else {
                let place = job.checkpoint_dir();
                progress(
                    Level::Info,
                    format!("no checkpoint in {} yet: starting from the beginning", place.display()),
                );
                return Ok(None);
            };
            dir
        }
    };
    progress(Level::Info, format!("continuing from {}", dir.display()));
    Ok(Some(dir))
}
