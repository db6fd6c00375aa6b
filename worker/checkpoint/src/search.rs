//! Finding and tidying the checkpoints of one directory.

use crate::manifest::Manifest;
use crate::writer::TEMPORARY;
use crate::{CheckpointError, MANIFEST_FILE, verify};
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
/// that does not exist has none. One that cannot be read now, or by this version, may be whole, so it is not passed over.
pub fn latest(checkpoint_dir: &Path) -> Result<Search, CheckpointError> {
    let dirs = by_age(checkpoint_dir).map_err(|e| CheckpointError::read(checkpoint_dir, e))?;
    let mut passed_over = Vec::new();
    for Found { path, .. } in dirs.into_iter().rev() {
        match verify(&path) {
            Ok(manifest) => return Ok(Search { newest: Some((path, manifest)), passed_over }),
            Err(CheckpointError::Read { source, .. }) => {
                return Err(CheckpointError::Unreadable { path, source });
            }
            Err(e @ CheckpointError::OtherVersion { .. }) => return Err(e),
            Err(e) => passed_over.push(e),
        }
    }
    Ok(Search { newest: None, passed_over })
}

/// What is called `step-*`, by step, whole or not. Empty where `dir` does not exist.
pub fn steps(dir: &Path) -> io::Result<Vec<(u64, PathBuf)>> {
    let entries = match fs::read_dir(dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry?;
        let step = entry.file_name().to_str().and_then(step_of);
        found.extend(step.map(|step| (step, entry.path())));
    }
    found.sort();
    Ok(found)
}

fn step_of(name: &str) -> Option<u64> {
    name.strip_prefix("step-")?.parse().ok()
}

/// What is called as a checkpoint of a step after `step` and holds what fleet did not write: a file, a link, a directory without a manifest.
pub(crate) fn in_the_way(dir: &Path, after: Option<u64>) -> io::Result<Option<PathBuf>> {
    let later = steps(dir)?.into_iter().filter(|(step, _)| after.is_none_or(|after| *step > after));
    Ok(later.map(|(_, path)| path).find(|path| !is_replaceable(path)))
}

/// Whether nothing but a checkpoint of fleet's would be lost with what is at `path`. Links are not followed.
pub(crate) fn is_replaceable(path: &Path) -> bool {
    match fs::symlink_metadata(path) {
        Ok(found) if found.is_dir() => {
            has_manifest(path) || fs::read_dir(path).is_ok_and(|mut entries| entries.next().is_none())
        }
        Ok(_) => false,
        Err(e) => e.kind() == io::ErrorKind::NotFound,
    }
}

fn has_manifest(dir: &Path) -> bool {
    fs::symlink_metadata(dir.join(MANIFEST_FILE)).is_ok_and(|found| found.is_file())
}

/// The serial of the newest checkpoint, 0 where there is none.
pub(crate) fn highest_serial(dir: &Path) -> io::Result<u64> {
    Ok(by_age(dir)?.last().map_or(0, |found| found.serial))
}

/// Removes what writers and rotations that died have left. Their names end with the process; what this one left goes where it has `alone` no
/// other writer. What cannot be removed is told and stays: it is in nobody's way.
pub(crate) fn remove_leftovers(dir: &Path, alone: bool) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        let writer = name.rsplit('-').next().and_then(|pid| pid.parse::<i32>().ok());
        let is_mine = writer == Some(std::process::id() as i32);
        if name.starts_with(TEMPORARY) && !writer.is_some_and(is_another_live_process) && (alone || !is_mine)
        {
            let path = entry.path();
            if let Err(e) = remove(&path) {
                tracing::warn!(
                    "cannot remove {}, which an unfinished checkpoint has left: {e}",
                    path.display()
                );
            }
        }
    }
    Ok(())
}

/// A directory with all in it, or a file or a link itself.
pub(crate) fn remove(path: &Path) -> io::Result<()> {
    let is_dir = fs::symlink_metadata(path)?.is_dir();
    if is_dir { fs::remove_dir_all(path) } else { fs::remove_file(path) }
}

fn is_another_live_process(pid: i32) -> bool {
    let found = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), None);
    pid > 0 && pid != std::process::id() as i32 && found != Err(nix::errno::Errno::ESRCH)
}

/// A directory `step-*` and what its manifest says.
#[derive(Debug)]
pub(crate) struct Found {
    pub path: PathBuf,
    pub serial: u64,
    /// `None` where it is damaged, is not there, or cannot be read now.
    pub manifest: Option<Manifest>,
    /// Why the manifest cannot be read, now or by this version of fleet: it may be whole.
    pub unreadable: Option<CheckpointError>,
}

impl Found {
    pub fn at(path: PathBuf) -> Found {
        let (manifest, unreadable) = match Manifest::read(&path) {
            Ok(manifest) => (Some(manifest), None),
            Err(CheckpointError::Read { source, .. }) => {
                (None, Some(CheckpointError::Unreadable { path: path.clone(), source }))
            }
            Err(e @ CheckpointError::OtherVersion { .. }) => (None, Some(e)),
            Err(_) => (None, None),
        };
        let serial = manifest.as_ref().map_or(0, |manifest| manifest.serial.min(u64::MAX - 1));
        Found { path, serial, manifest, unreadable }
    }

    /// Who wrote it; `None` where that cannot be told.
    pub fn run(&self) -> Option<&str> {
        self.manifest.as_ref().map(|manifest| manifest.run.as_str())
    }

    pub fn name(&self) -> String {
        self.path.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// Whether fleet wrote it, whole or not.
    pub fn is_fleets(&self) -> bool {
        self.manifest.is_some() || has_manifest(&self.path)
    }

    /// Whether it may be removed where checkpoints of other runs may.
    pub fn may_go(&self) -> bool {
        self.is_fleets() && self.unreadable.is_none()
    }

    /// As its name says.
    pub fn step(&self) -> u64 {
        step_of(&self.name()).unwrap_or(0)
    }

    /// As far as lengths tell; also of what one of several disks has.
    pub fn seems_whole(&self) -> bool {
        self.manifest.as_ref().is_some_and(|manifest| manifest.fits(&self.path))
    }
}

/// The directories `step-*`, oldest first, without those that links lead to. One whose manifest cannot be read has no serial: it takes the
/// place that its step gives it.
pub(crate) fn by_age(dir: &Path) -> io::Result<Vec<Found>> {
    let mut newest_so_far = 0;
    let mut all: Vec<Found> = Vec::new();
    let is_dir = |path: &Path| fs::symlink_metadata(path).is_ok_and(|found| found.is_dir());
    for (_, path) in steps(dir)?.into_iter().filter(|(_, path)| is_dir(path)) {
        let mut found = Found::at(path);
        if found.manifest.is_none() {
            found.serial = newest_so_far;
        }
        newest_so_far = newest_so_far.max(found.serial);
        all.push(found);
    }
    all.sort_by_key(|found| found.serial); // stable: equal serials stay in the order of their steps
    Ok(all)
}
