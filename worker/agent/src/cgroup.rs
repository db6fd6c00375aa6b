//! Control groups (cgroup v2): a process that is in one cannot leave it by a session, a parent or an environment of its own, and the kernel
//! ends all of it at a word. They are there where this process may make some below its own: as root, or where systemd has delegated
//! its group (`Delegate=yes`).

use crate::exec_rank;
use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Where this process may make control groups, or why it may not, in a few words. To be asked before any other child is started.
pub fn find() -> Result<PathBuf, String> {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").map_err(|error| error.to_string())?;
    let groups = std::fs::read_to_string("/proc/self/cgroup").map_err(|error| error.to_string())?;
    let there = |dir: &PathBuf| dir.join("cgroup.procs").exists();
    let own = own(&mounts, &groups).into_iter().find(there).ok_or("there is no cgroup v2 file system")?;
    let trial = create(&own, &format!("fleet-trial-{}", std::process::id()))
        .map_err(|error| format!("none can be made in {}: {error}", own.display()))?;
    let entered = enters(&trial);
    let kills = trial.join("cgroup.kill").exists();
    remove(&trial);
    match (entered, kills) {
        (Ok(()), true) => Ok(own),
        (Ok(()), false) => Err("this kernel has no cgroup.kill, which came with Linux 5.14".to_owned()),
        (Err(error), _) => Err(format!("no process may be put into those in {}: {error}", own.display())),
    }
}

/// Whether a child can enter as ranks do.
fn enters(dir: &Path) -> io::Result<()> {
    let image = std::env::current_exe()?;
    let argv = [image.clone().into_os_string(), "--version".into()];
    let output = Command::new(image)
        .args(exec_rank::arguments(std::process::id(), OsStr::new(""), dir.as_os_str(), &argv))
        .stdin(Stdio::null())
        .output()?;
    if output.status.success() {
        return Ok(());
    }
    let stderr = String::from_utf8_lossy(&output.stderr);
    Err(io::Error::other(
        stderr.lines().last().unwrap_or("the trial failed").trim_start_matches("error: ").to_owned(),
    ))
}

pub fn create(parent: &Path, name: &str) -> io::Result<PathBuf> {
    let dir = parent.join(name);
    match std::fs::create_dir(&dir) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => Ok(dir),
    }
}

/// Puts this process, and all that it will start, into the group.
pub fn enter(dir: &Path) -> io::Result<()> {
    std::fs::write(dir.join("cgroup.procs"), "0")
}

/// Ends all processes of the group and of those below it. Whether there were any.
pub fn kill(dir: &Path) -> bool {
    let events = std::fs::read_to_string(dir.join("cgroup.events")).unwrap_or_default();
    let populated = events.lines().any(|line| line == "populated 1");
    if populated {
        let _ = std::fs::write(dir.join("cgroup.kill"), "1"); // it went in this moment, or is looked at again
    }
    populated
}

/// Removes an empty group and the empty ones below it, which a job may have made.
pub fn remove(dir: &Path) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove(&entry.path());
        }
    }
    if let Err(error) = std::fs::remove_dir(dir)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::debug!(dir = %dir.display(), %error, "a control group stays");
    }
}

/// The groups in `parent` whose names begin so.
pub fn named(parent: &Path, prefix: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(parent).into_iter().flatten().flatten();
    let ours = |name: &OsStr| name.to_str().is_some_and(|name| name.starts_with(prefix));
    entries.filter(|entry| ours(&entry.file_name())).map(|entry| entry.path()).collect()
}

/// Where the group of this process may be seen, from `/proc/self/mountinfo` and `/proc/self/cgroup`.
fn own(mounts: &str, groups: &str) -> Vec<PathBuf> {
    let Some(own) = groups.lines().find_map(|line| line.strip_prefix("0::")) else { return Vec::new() };
    if Path::new(own).components().any(|part| part.as_os_str() == "..") {
        return Vec::new(); // outside of what this process sees
    }
    let place = |line: &str| {
        let (mount, kind) = line.split_once(" - ")?;
        let [_, _, _, root, point, ..] = mount.split(' ').collect::<Vec<_>>()[..] else { return None };
        let below = Path::new(own).strip_prefix(root).ok()?;
        // Spaces and such are written as `\040`; nobody mounts this file system there.
        (kind.starts_with("cgroup2 ") && !point.contains('\\'))
            .then(|| Path::new(point).join(below).components().collect())
    };
    mounts.lines().filter_map(place).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str = "31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,name=systemd
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime shared:9 - cgroup2 cgroup2 rw";

    #[test]
    fn the_own_group_is_found_below_whatever_is_mounted() {
        let at = |mounts: &str, groups: &str| own(mounts, groups);
        assert_eq!(at(HYBRID, "9:name=systemd:/\n0::/\n"), [PathBuf::from("/sys/fs/cgroup/unified")]);
        assert_eq!(at(HYBRID, "0::/a.slice/b\n"), [PathBuf::from("/sys/fs/cgroup/unified/a.slice/b")]);
        let inner = "41 31 0:38 /pod/x /sys/fs/cgroup rw - cgroup2 cgroup rw";
        assert_eq!(at(inner, "0::/pod/x/y\n"), [PathBuf::from("/sys/fs/cgroup/y")]);
        assert!(at(inner, "0::/other\n").is_empty());
        assert!(at(HYBRID, "0::/../..\n").is_empty());
        assert!(at(HYBRID, "9:name=systemd:/\n").is_empty());
        assert!(at("", "0::/\n").is_empty());
    }
}
