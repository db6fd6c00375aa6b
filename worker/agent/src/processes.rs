//! The processes of this machine, as `/proc` shows them; none where there is no `/proc`.
//!
//! A process is its number and its start time together, never the number alone: numbers are used again. It is struck through a pidfd that
//! was opened before its start time was looked at, so that no other one can be hit.

use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Process {
    pub pid: u32,
    /// In the kernel's ticks since boot.
    pub start: u64,
}

/// A process that lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    pub process: Process,
    pub parent: u32,
    pub group: u32,
    pub session: u32,
    /// By a signal or a debugger.
    pub stopped: bool,
    /// Time that all its threads have computed, in the kernel's ticks.
    pub cpu: u64,
}

impl Process {
    /// The living process of this number.
    pub fn of(pid: u32) -> Option<Process> {
        look(pid).map(|seen| seen.process)
    }

    pub fn is_alive(self) -> bool {
        Process::of(self.pid) == Some(self)
    }

    /// SIGKILL, to this process and no other.
    #[cfg(target_os = "linux")]
    pub fn kill(self) {
        use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
        let Some(pid) = i32::try_from(self.pid).ok().and_then(Pid::from_raw) else { return };
        let Ok(descriptor) = pidfd_open(pid, PidfdFlags::empty()) else { return }; // gone
        if self.is_alive() {
            let _ = pidfd_send_signal(descriptor, Signal::KILL); // gone, or another user's
        }
    }

    #[cfg(not(target_os = "linux"))]
    pub fn kill(self) {}
}

/// All that live, but for this process itself.
pub fn living() -> Vec<Seen> {
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    let pids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|&pid| pid != std::process::id()).filter_map(look).collect()
}

/// Those of `all` that `root` holds for, and whatever descends from them.
pub fn trees(all: &[Seen], root: impl Fn(&Seen) -> bool) -> Vec<Process> {
    let mut found: BTreeSet<u32> = BTreeSet::new();
    let mut tree: Vec<Process> = Vec::new();
    let mut new: Vec<&Seen> = all.iter().filter(|seen| root(seen)).collect();
    while !new.is_empty() {
        new.retain(|seen| found.insert(seen.process.pid));
        tree.extend(new.iter().map(|seen| seen.process));
        new = all
            .iter()
            .filter(|seen| found.contains(&seen.parent) && !found.contains(&seen.process.pid))
            .collect();
    }
    tree
}

/// Whether the process was started with this variable in its environment, and with a value that `fits`. Not for processes of another user.
pub fn has_variable(pid: u32, name: &str, fits: impl Fn(&str) -> bool) -> bool {
    let Some(environment) = environment(pid) else { return false };
    let value = |variable: &[u8]| {
        let value = variable.strip_prefix(name.as_bytes())?.strip_prefix(b"=")?;
        std::str::from_utf8(value).ok().map(str::to_owned)
    };
    environment.split(|byte| *byte == 0).filter_map(value).any(|value| fits(&value))
}

/// `None` for a process that is gone or another user's. One that takes on another program shows none for a moment, in which it is asked
/// again.
fn environment(pid: u32) -> Option<Vec<u8>> {
    for _ in 0..EXEC_LOOKS {
        let environment = std::fs::read(format!("/proc/{pid}/environ")).ok()?;
        if !environment.is_empty() || !takes_on_a_program(pid) {
            return Some(environment);
        }
        std::thread::sleep(EXEC_PAUSE);
    }
    Some(Vec::new())
}

/// How often it is asked, and how long apart: a fifth of a second in all, for a program on a slow disk.
const EXEC_LOOKS: u32 = 100;
const EXEC_PAUSE: std::time::Duration = std::time::Duration::from_millis(2);

/// Whether the process has memory and the kernel has not yet put an environment there, which is the case between the old program and the
/// new one.
fn takes_on_a_program(pid: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| is_between_programs(&stat))
}

/// By the 23rd field of `/proc/PID/stat`, the size of the memory, and the 51st, where the environment ends.
fn is_between_programs(stat: &str) -> bool {
    let fields: Vec<&str> = stat.rsplit_once(')').map_or("", |(_, rest)| rest).split_whitespace().collect();
    fields.get(20).is_some_and(|size| *size != "0") && fields.get(48) == Some(&"0")
}

/// Processes and threads that this machine has started since boot.
pub fn forks() -> Option<u64> {
    let stat = std::fs::read_to_string("/proc/stat").ok()?;
    stat.lines().find_map(|line| line.strip_prefix("processes "))?.trim().parse().ok()
}

/// Whether no number that was in use when `forks` were counted can have been given to another process since. The kernel gives out numbers
/// in a circle; half a round of it is far from coming back.
pub fn numbers_hold_since(forks_then: u64) -> bool {
    let highest = || std::fs::read_to_string("/proc/sys/kernel/pid_max").ok()?.trim().parse::<u64>().ok();
    let since = forks().and_then(|now| now.checked_sub(forks_then));
    matches!((since, highest()), (Some(since), Some(highest)) if since < highest / 2)
}

/// The living process of this number.
pub fn look(pid: u32) -> Option<Seen> {
    parse(pid, &std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

/// `pid (name that may hold spaces and parentheses) state ppid pgrp session ...`; the 14th and 15th are the time computed in the program and
/// in the kernel for it, the 22nd is the start.
fn parse(pid: u32, stat: &str) -> Option<Seen> {
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let number = |at: usize| fields.get(at)?.parse().ok();
    let state = *fields.first()?;
    if matches!(state, "Z" | "X" | "x") {
        return None; // dead, and only not reaped
    }
    let long = |at: usize| fields.get(at)?.parse::<u64>().ok();
    Some(Seen {
        process: Process { pid, start: long(19)? },
        parent: number(1)?,
        group: number(2)?,
        session: number(3)?,
        stopped: matches!(state, "T" | "t"),
        cpu: long(11)?.saturating_add(long(12)?),
    })
}

#[cfg(all(test, target_os = "linux"))]
#[allow(clippy::unwrap_used)] // in a test an unwrap is an assertion
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    /// A process that lives until it is killed.
    fn child() -> std::process::Child {
        Command::new("sleep").arg("1000").env("FLEET_TEST_MARK", "a:b").stdin(Stdio::null()).spawn().unwrap()
    }

    #[test]
    fn a_process_is_struck_only_while_it_is_the_one_that_was_meant() {
        let mut child = child();
        let process = Process::of(child.id()).unwrap();
        let another = Process { start: process.start + 1, ..process };
        assert!(process.is_alive() && !another.is_alive());
        another.kill();
        assert!(process.is_alive() && child.try_wait().unwrap().is_none());
        process.kill();
        assert!(!child.wait().unwrap().success());
        assert!(!process.is_alive());
    }

    #[test]
    fn one_that_is_dead_and_not_reaped_does_not_live() {
        let mut child = child();
        let process = Process::of(child.id()).unwrap();
        process.kill();
        while process.is_alive() {
            std::thread::yield_now();
        }
        assert!(std::path::Path::new(&format!("/proc/{}", child.id())).exists(), "not reaped");
        assert!(living().iter().all(|seen| seen.process != process));
        child.wait().unwrap();
    }

    #[test]
    fn a_process_between_two_programs_is_told_from_one_with_an_empty_environment() {
        let bare = Command::new("sleep").arg("1000").env_clear().stdin(Stdio::null()).spawn();
        let mut bare = bare.unwrap();
        assert_eq!(environment(bare.id()), Some(Vec::new()));
        assert!(!takes_on_a_program(bare.id()));
        bare.kill().unwrap();
        bare.wait().unwrap();
        let between = |size: &str, end: &str| {
            let mut fields = vec!["S"; 50];
            (fields[20], fields[48]) = (size, end);
            is_between_programs(&format!("7 (a ) b) {}", fields.join(" ")))
        };
        assert!(between("4096", "0"));
        assert!(!between("4096", "140"), "a running program");
        assert!(!between("0", "0"), "a thread of the kernel, or one that is dead");
    }

    #[test]
    fn a_variable_is_found_in_the_environment_that_a_process_was_started_with() {
        let mut child = child();
        // Until it has become `sleep` it shows the environment of this process.
        while std::fs::read(format!("/proc/{}/cmdline", child.id()))
            .is_ok_and(|line| !line.starts_with(b"sleep"))
        {
            std::thread::yield_now();
        }
        assert!(has_variable(child.id(), "FLEET_TEST_MARK", |value| value == "a:b"));
        assert!(!has_variable(child.id(), "FLEET_TEST_MARK", |value| value == "a"));
        assert!(!has_variable(child.id(), "FLEET_TEST", |_| true));
        assert!(
            living().iter().any(|seen| seen.process.pid == child.id() && seen.parent == std::process::id())
        );
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn a_tree_has_all_that_descends_from_its_roots_once() {
        let seen = |pid: u32, parent: u32| Seen {
            process: Process { pid, start: 1 },
            parent,
            group: pid,
            session: 1,
            stopped: false,
            cpu: 0,
        };
        let all = [seen(5, 1), seen(4, 7), seen(7, 5), seen(6, 1), seen(9, 4)];
        let pids = |root: u32| {
            let mut pids: Vec<u32> =
                trees(&all, |seen| seen.process.pid == root).iter().map(|p| p.pid).collect();
            pids.sort_unstable();
            pids
        };
        assert_eq!(pids(5), [4, 5, 7, 9]);
        assert_eq!(pids(6), [6]);
        assert_eq!(pids(8), Vec::<u32>::new());
        assert_eq!(trees(&all, |_| true).len(), all.len());
    }

    #[test]
    fn a_name_with_parentheses_and_spaces_does_not_confuse() {
        let stat = "12 (a) b) c) S 3 4 5 0 -1 0 0 0 0 0 60 6 0 0 20 0 1 0 777 0";
        let process = Process { pid: 12, start: 777 };
        let seen = Seen { process, parent: 3, group: 4, session: 5, stopped: false, cpu: 66 };
        assert_eq!(parse(12, stat), Some(seen));
        assert_eq!(parse(12, &stat.replace(" S ", " T ")), Some(Seen { stopped: true, ..seen }));
        assert_eq!(parse(12, &stat.replace(" S ", " Z ")), None);
        assert_eq!(parse(12, "12 (a) S 3"), None);
    }

    #[test]
    fn numbers_hold_for_half_a_round() {
        let now = forks().unwrap();
        assert!(numbers_hold_since(now));
        assert!(!numbers_hold_since(now.saturating_sub(1 << 23)) || now < 1 << 14);
        assert!(!numbers_hold_since(now + (1 << 40)), "counted on another boot");
    }
}
