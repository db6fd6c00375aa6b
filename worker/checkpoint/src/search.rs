//! Finding, rotating and tidying the checkpoints of one directory.

use crate::manifest::Manifest;
use crate::writer::{TEMPORARY, sync_dir};
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
    for (_, dir) in dirs.into_iter().rev() {
        match verify(&dir) {
            Ok(manifest) => return Ok(Search { newest: Some((dir, manifest)), passed_over }),
            Err(e) => passed_over.push(e),
        }
    }
    Ok(Search { newest: None, passed_over })
}

/// Removes the oldest checkpoints so that `keep` remain, counting up to and including the one of `committed`, which is known to
/// be good and is never removed; newer ones are not touched. Returns what was removed.
pub fn rotate(checkpoint_dir: &Path, keep: u32, committed: u64) -> Result<Vec<PathBuf>, CheckpointError> {
    let fail =
        |path: &Path, source| CheckpointError::Write { step: committed, path: path.to_owned(), source };
    let mut dirs: Vec<PathBuf> = by_age(checkpoint_dir)
        .map_err(|e| fail(checkpoint_dir, e))?
        .into_iter()
        .map(|(_, dir)| dir)
        .collect();
    let protected = crate::step_dir(checkpoint_dir, committed);
    let Some(last) = dirs.iter().position(|dir| *dir == protected) else {
        return Ok(Vec::new()); // not written here: nothing is known to be good, so nothing is removed
    };
    dirs.truncate(last);
    let excess = dirs.len().saturating_sub(keep.max(1) as usize - 1);
    dirs.truncate(excess);
    for dir in &dirs {
        let name = dir.file_name().unwrap_or_default().to_string_lossy();
        let doomed = checkpoint_dir.join(format!("{TEMPORARY}removed-{name}-{}", std::process::id()));
        fs::rename(dir, &doomed).map_err(|e| fail(dir, e))?; // at no moment is half a checkpoint called one
        fs::remove_dir_all(&doomed).map_err(|e| fail(&doomed, e))?;
    }
    if !dirs.is_empty() {
        sync_dir(checkpoint_dir).map_err(|e| fail(checkpoint_dir, e))?;
    }
    Ok(dirs)
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
    Ok(by_age(dir)?.last().map_or(0, |(serial, _)| *serial))
}

/// Removes what writers and rotations that died have left. Their names end with the process; this process has no other writer.
pub(crate) fn remove_leftovers(dir: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        let writer = name.rsplit('-').next().and_then(|pid| pid.parse::<i32>().ok());
        if name.starts_with(TEMPORARY) && !writer.is_some_and(is_another_live_process) {
            fs::remove_dir_all(entry.path())?;
        }
    }
    Ok(())
}

fn is_another_live_process(pid: i32) -> bool {
    let found = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), None);
    pid > 0 && pid != std::process::id() as i32 && found != Err(nix::errno::Errno::ESRCH)
}

/// Oldest first. One whose manifest cannot be read has no serial: it takes the place that its step gives it.
fn by_age(dir: &Path) -> io::Result<Vec<(u64, PathBuf)>> {
    let mut newest_so_far = 0;
    let mut dirs: Vec<(u64, PathBuf)> = Vec::new();
    for path in step_dirs(dir)? {
        let serial = Manifest::read(&path).map_or(newest_so_far, |m| m.serial.min(u64::MAX - 1));
        newest_so_far = newest_so_far.max(serial);
        dirs.push((serial, path));
    }
    dirs.sort_by_key(|(serial, _)| *serial); // stable: equal serials stay in the order of their steps
    Ok(dirs)
}
