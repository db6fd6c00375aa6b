//! `fleet runs ls --local`: the runs whose checkpoints lie in a folder of this machine. `fleet launch` keeps no cluster: what it leaves is there.

use crate::failure::Failure;
use crate::{out, places, text};
use fleet_checkpoint::{TrainerState, checkpoint_steps};
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

/// What is known of a run by its newest checkpoint.
struct Run {
    name: String,
    state: TrainerState,
    checkpoints: usize,
    saved_unix_ms: u64,
    path: PathBuf,
}

/// Lists the newest `count` runs below `dir`, an `output_dir` of jobs.
pub fn list(dir: &Path, count: usize, as_json: bool) -> Result<(), Failure> {
    let folder = dir.join("checkpoints");
    let entries = fs::read_dir(&folder).map_err(|e| {
        let why = format!("{}: {e}; name the output_dir of the jobs: --dir DIR", folder.display());
        Failure::input(why)
    })?;
    let mut runs: Vec<Run> = entries.flatten().filter_map(|entry| Run::of(&entry.path())).collect();
    runs.sort_by_key(|run| std::cmp::Reverse(run.saved_unix_ms));
    runs.truncate(count);
    match as_json {
        true => out::json(&runs.iter().map(Run::json).collect()),
        false => {
            let header = ["RUN", "STEP", "OF", "LOSS", "EVAL LOSS", "CHECKPOINTS", "SAVED", "PATH"];
            out::table(&header, &runs.iter().map(Run::row).collect::<Vec<_>>());
        }
    }
    Ok(())
}

impl Run {
    /// `None` where no checkpoint is there.
    fn of(dir: &Path) -> Option<Run> {
        let steps = checkpoint_steps(dir).ok()?;
        let read = |(_, path): &(u64, PathBuf)| Some((TrainerState::read(path).ok()?, path.clone()));
        let mut newest_first: Vec<_> = steps.iter().collect();
        newest_first.sort_by_key(|(step, _)| std::cmp::Reverse(*step));
        let (state, path) = newest_first.into_iter().find_map(read)?;
        let saved = fs::metadata(&path).and_then(|meta| meta.modified()).ok()?;
        let saved_unix_ms = saved.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64);
        let name = dir.file_name()?.to_string_lossy().into_owned();
        Some(Run { name, state, checkpoints: steps.len(), saved_unix_ms, path })
    }

    fn row(&self) -> Vec<String> {
        vec![
            self.name.clone(),
            self.state.step.to_string(),
            self.state.total_steps.to_string(),
            text::loss(Some(self.state.loss)),
            text::loss(self.state.eval_loss),
            self.checkpoints.to_string(),
            format!("{} ago", text::age(places::unix_ms().saturating_sub(self.saved_unix_ms))),
            self.path.display().to_string(),
        ]
    }

    fn json(&self) -> Value {
        json!({
            "run_name": self.name,
            "step": self.state.step,
            "total_steps": self.state.total_steps,
            "loss": self.state.loss,
            "eval_loss": self.state.eval_loss,
            "checkpoints": self.checkpoints,
            "saved_unix_ms": self.saved_unix_ms,
            "path": self.path,
        })
    }
}
