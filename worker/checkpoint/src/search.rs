//! Finding and tidying the checkpoints of one directory.

use crate::manifest::Manifest;
use crate::writer::TEMPORARY;
use crate::{CheckpointError, verify};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// What `latest` found.
#[derive(Debug)]
pub struct Search {
    /// The newest checkpoint that is whole.
    pub newest: Option<(PathBuf, Manifest)>,
    /// Newer ones that are not, each with its damage.
    pub passed_over: Vec<CheckpointError>,
}

/// Looks for the newest whole checkpoint of `checkpoint_dir`, verifying from the newest down to the first good one. A directory
/// that does not exist has none.
pub fn latest(checkpoint_dir: &Path) -> Result<Search, CheckpointError> {
    let dirs = by_age(checkpoint_dir).map_err(|e| CheckpointError::read(checkpoint_dir, e))?;
    let mut passed_over = Vec::new();
    for Found { path, .. } in dirs.into_iter().rev() {
        match verify(&path) {
            Ok(manifest) => return Ok(Search { newest: Some((path, manifest)), passed_over }),
            Err(e) => passed_over.push(e),
        }
    }
    Ok(Search { newest: None, passed_over })
}

/// The directories `step-*`, by step. Empty where `dir` does not exist.
pub(crate) fn step_dirs(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry?;
        let name = entry.file_name();
        let step = name.to_str().and_then(|n| n.strip_prefix("step-")).and_then(|n| n.parse::<u64>().ok());
        if let Some(step) = step
            && entry.path().is_dir()
        {
            found.push((step, entry.path()));
        }
    }
    found.sort();
    Ok(found.into_iter().map(|(_, path)| path).collect())
}

/// The serial of the newest checkpoint, 0 where there is none.
pub(crate) fn highest_serial(dir: &Path) -> io::Result<u64> {
    Ok(by_age(dir)?.last().map_or(0, |found| found.serial))
}

/// Removes what writers and rotations that died have left. Their names end with the process; this process has no other writer. What cannot be
/// removed is told and stays: it is in nobody's way.
pub(crate) fn remove_leftovers(dir: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        let writer = name.rsplit('-').next().and_then(|pid| pid.parse::<i32>().ok());
        if name.starts_with(TEMPORARY) && !writer.is_some_and(is_another_live_process) {
            let path = entry.path();
            let removed = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
            if let Err(e) = removed {
                tracing::warn!(
                    "cannot remove {}, which an unfinished checkpoint has left: {e}",
                    path.display()
                );
            }
        }
    }
    Ok(())
}

fn is_another_live_process(pid: i32) -> bool {
    let found = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), None);
    pid > 0 && pid != std::process::id() as i32 && found != Err(nix::errno::Errno::ESRCH)
}

/// A directory `step-*` and what its manifest says of its age and of who wrote it.
#[derive(Debug)]
pub(crate) struct Found {
    pub path: PathBuf,
    pub serial: u64,
    /// `None` where the manifest cannot be read.
    pub run: Option<String>,
}

impl Found {
    pub fn at(path: PathBuf) -> Found {
        match Manifest::read(&path) {
            Ok(manifest) => {
                Found { path, serial: manifest.serial.min(u64::MAX - 1), run: Some(manifest.run) }
            }
            Err(_) => Found { path, serial: 0, run: None },
        }
    }
}

/// Oldest first. One whose manifest cannot be read has no serial: it takes the place that its step gives it.
pub(crate) fn by_age(dir: &Path) -> io::Result<Vec<Found>> {
    let mut newest_so_far = 0;
    let mut all: Vec<Found> = Vec::new();
    for path in step_dirs(dir)? {
        let mut found = Found::at(path);
        if found.run.is_none() {
            found.serial = newest_so_far;
        }
        newest_so_far = newest_so_far.max(found.serial);
        all.push(found);
    }
    all.sort_by_key(|found| found.serial); // stable: equal serials stay in the order of their steps
    Ok(all)
}
