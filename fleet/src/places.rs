//! Where fleet keeps its own state on this machine: running launches and the clusters that `fleet login` joined.

use crate::failure::Failure;
use crate::out;
use fleet_common::files::{self, Kind};
use fleet_common::{home, process};
use nix::unistd::geteuid;
use serde::{Deserialize, Serialize};
use std::fs::{File, TryLockError};
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// Directories of ended launches that are kept, for their logs.
const ENDED_KEPT: usize = 10;

/// What is in the state directory.
const STATE: &[&str] = &["clusters", "launches"];

/// `${XDG_STATE_HOME:-~/.local/state}/fleet`, of which others see nothing. It need not exist.
fn state_dir() -> Result<PathBuf, Failure> {
    let dir = home::state().map_err(|e| Failure::environment(e.to_string()))?.join("fleet");
    // A look into it costs as much as what is in it, so it is taken once.
    let is_open =
        dir.metadata().is_ok_and(|found| found.mode() & 0o077 != 0 || found.uid() != geteuid().as_raw());
    if is_open {
        tell(files::mend(&dir, STATE))?;
    }
    Ok(dir)
}

fn tell(mended: std::io::Result<Option<String>>) -> Result<(), Failure> {
    let failed = |e: std::io::Error| match e.kind() {
        ErrorKind::InvalidInput => Failure::input(e.to_string()),
        _ => Failure::environment(e.to_string()),
    };
    if let Some(was_open) = mended.map_err(failed)? {
        out::note(&format!("warning: {was_open}"));
    }
    Ok(())
}

/// Of the clusters that `fleet login` knows, each with a directory by its name.
pub fn logins_dir() -> Result<PathBuf, Failure> {
    Ok(state_dir()?.join("clusters"))
}

pub fn launches_dir() -> Result<PathBuf, Failure> {
    Ok(state_dir()?.join("launches"))
}

/// One `fleet launch`, in `launches/NAME/launch.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Launch {
    pub name: String,
    pub pid: u32,
    /// Tells the process from a later one with the same number.
    pub pid_start: Option<u64>,
    pub started_unix_ms: u64,
    /// The coordinator's data directory.
    pub data_dir: PathBuf,
}

/// A running launch's entry; taken out when dropped.
#[derive(Debug)]
pub struct Registration {
    pub launch: Launch,
    dir: PathBuf,
    own_data: bool,
    keep: bool,
    /// Held while the launch runs: in a home that several machines or containers share its number says nothing to the others.
    _lock: File,
}

impl Registration {
    /// Enters this process. Without a `data_dir` it gets one below the entry.
    pub fn enter(data_dir: Option<&Path>) -> Result<Registration, Failure> {
        Registration::enter_in(&launches_dir()?, data_dir)
    }

    fn enter_in(launches: &Path, data_dir: Option<&Path>) -> Result<Registration, Failure> {
        prune(launches);
        let (pid, started_unix_ms) = (std::process::id(), unix_ms());
        let name = format!("{started_unix_ms}-{pid}");
        let dir = launches.join(&name);
        let data = match data_dir {
            Some(given) => std::path::absolute(given).map_err(|e| Failure::io("use", given, &e))?,
            None => dir.join("data"),
        };
        tell(files::claim(&data, Kind::Coordinator))?;
        files::create_dir(&dir).map_err(|e| Failure::environment(e.to_string()))?;
        let path = dir.join("lock");
        let lock = files::private().create(true).truncate(true).write(true).open(&path);
        let lock = lock.map_err(|e| Failure::io("make", &path, &e))?;
        let _ = lock.try_lock(); // nobody else has it; a file system without locks tells nobody
        let launch = Launch { name, pid, pid_start: process::started(pid), started_unix_ms, data_dir: data };
        let text = serde_json::to_string_pretty(&launch).map_err(|e| Failure::environment(e.to_string()))?;
        let file = dir.join("launch.json");
        files::write_atomic(&file, text.as_bytes()).map_err(|e| Failure::environment(e.to_string()))?;
        Ok(Registration { launch, dir, own_data: data_dir.is_none(), keep: false, _lock: lock })
    }

    /// Leaves the data directory in place after the end, because somebody may want to read its logs.
    pub fn keep(&mut self) {
        self.keep = true;
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(self.dir.join("launch.json"));
        if !(self.own_data && self.keep) {
            let _ = std::fs::remove_dir_all(&self.dir);
        }
    }
}

/// The launches that run, newest first.
pub fn running() -> Result<Vec<Launch>, Failure> {
    Ok(running_in(&launches_dir()?))
}

fn running_in(launches: &Path) -> Vec<Launch> {
    let mut found: Vec<Launch> =
        directories(launches).iter().filter_map(|dir| read(dir)).filter(is_running).collect();
    found.sort_by_key(|launch| std::cmp::Reverse(launch.started_unix_ms));
    found
}

fn read(dir: &Path) -> Option<Launch> {
    serde_json::from_slice(&std::fs::read(dir.join("launch.json")).ok()?).ok()
}

fn is_running(launch: &Launch) -> bool {
    process::is_running(launch.pid, launch.pid_start)
}

/// Whether a launch holds its entry, on whichever machine it runs.
fn is_held(dir: &Path) -> bool {
    let lock = File::options().write(true).open(dir.join("lock"));
    lock.is_ok_and(|lock| matches!(lock.try_lock(), Err(TryLockError::WouldBlock)))
}

/// Removes what older launches left, but for the newest few.
fn prune(launches: &Path) {
    let runs = |dir: &PathBuf| is_held(dir) || read(dir).is_some_and(|launch| is_running(&launch));
    let mut ended: Vec<PathBuf> = directories(launches).into_iter().filter(|dir| !runs(dir)).collect();
    ended.sort();
    for dir in ended.iter().rev().skip(ENDED_KEPT) {
        // entered a moment ago and not yet written
        let age = dir.metadata().and_then(|m| m.modified()).ok().and_then(|m| m.elapsed().ok());
        if age.is_some_and(|age| age.as_secs() > 60) {
            let _ = std::fs::remove_dir_all(dir);
        }
    }
}

fn directories(parent: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(parent).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).filter(|path| path.is_dir()).collect()
}

pub fn unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_launch_is_found_while_it_runs_and_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let entry = Registration::enter_in(dir.path(), None).unwrap();
        assert_eq!(running_in(dir.path()), std::slice::from_ref(&entry.launch));
        assert!(entry.launch.data_dir.is_dir());
        drop(entry);
        assert_eq!(running_in(dir.path()), []);
        assert_eq!(directories(dir.path()), Vec::<PathBuf>::new());
    }

    #[test]
    fn a_failed_launch_keeps_its_logs_but_is_not_running() {
        let dir = tempfile::tempdir().unwrap();
        let mut entry = Registration::enter_in(dir.path(), None).unwrap();
        let data = entry.launch.data_dir.clone();
        entry.keep();
        drop(entry);
        assert!(data.is_dir());
        assert_eq!(running_in(dir.path()), []);
    }

    /// As if nothing had been done there for an hour.
    fn age(dir: &Path) {
        File::open(dir)
            .unwrap()
            .set_modified(SystemTime::now() - std::time::Duration::from_secs(3_600))
            .unwrap();
    }

    /// Directories that launches left an hour ago.
    fn ended(launches: &Path, names: &[String]) {
        for name in names {
            std::fs::create_dir(launches.join(name)).unwrap();
            age(&launches.join(name));
        }
    }

    #[test]
    fn a_launch_of_another_machine_that_shares_this_home_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let entry = Registration::enter_in(dir.path(), None).unwrap();
        let elsewhere = Launch { pid_start: Some(1), ..entry.launch.clone() };
        let file = dir.path().join(&elsewhere.name).join("launch.json");
        std::fs::write(&file, serde_json::to_string(&elsewhere).unwrap()).unwrap();
        age(&dir.path().join(&elsewhere.name));
        ended(dir.path(), &(10..25).map(|n| format!("{n}00000000000000-7")).collect::<Vec<_>>());
        prune(dir.path());
        assert!(elsewhere.data_dir.is_dir() && file.is_file());
        assert_eq!(running_in(dir.path()), [], "it is not this machine's");
    }

    #[test]
    fn the_ten_newest_that_ended_are_kept_whatever_their_age() {
        let dir = tempfile::tempdir().unwrap();
        let names: Vec<String> = (10..25).map(|n| format!("{n}00-7")).collect();
        ended(dir.path(), &names);
        prune(dir.path());
        let mut left = directories(dir.path());
        left.sort();
        assert_eq!(left, names[5..].iter().map(|name| dir.path().join(name)).collect::<Vec<_>>());
    }

    #[test]
    fn a_given_directory_is_never_removed_and_a_dead_process_is_not_running() {
        let (dir, data) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let entry = Registration::enter_in(dir.path(), Some(data.path())).unwrap();
        let mut other = entry.launch.clone();
        other.pid_start = Some(1);
        assert!(is_running(&entry.launch) && !is_running(&other));
        drop(entry);
        assert!(data.path().is_dir());
    }
}
