//! What holds all processes of one gang on this node together, so that they can be ended together: a control group where there is one, and
//! always a mark in the environment of every rank, which whatever it starts inherits.
//!
//! The mark finds processes that left their session, whose parents are gone, and that run beside those of other gangs; also after the
//! agent that started them was killed.

use crate::cgroup;
use crate::processes::{self, Process, Seen};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};

/// The variable with the marks: of the container, behind those that hold the agent itself, each after a colon.
pub const MARK_ENV: &str = "FLEET_GANG";

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Container {
    pub mark: String,
    pub cgroup: Option<PathBuf>,
}

impl Container {
    /// The value of `MARK_ENV` for its processes.
    pub fn marks(&self) -> String {
        match std::env::var(MARK_ENV) {
            Ok(outer) if !outer.is_empty() => format!("{outer}:{}", self.mark),
            _ => self.mark.clone(),
        }
    }
}

/// Makes the containers of one agent.
#[derive(Debug)]
pub struct Containers {
    process: u64,
    cgroups: Option<PathBuf>,
    made: AtomicU64,
}

impl Containers {
    /// For the agent that drew this number when it began; `cgroups` is where it may make control groups.
    pub fn new(process: u64, cgroups: Option<PathBuf>) -> Containers {
        Containers { process, cgroups, made: AtomicU64::new(0) }
    }

    /// A new one. Fails where its control group cannot be made.
    pub fn create(&self) -> io::Result<Container> {
        let number = self.made.fetch_add(1, Ordering::Relaxed);
        let mark = format!("{}{number}", prefix(self.process));
        let cgroup = match &self.cgroups {
            Some(parent) => Some(cgroup::create(parent, &format!("fleet-{mark}")).map_err(|error| {
                io::Error::new(error.kind(), format!("no control group in {}: {error}", parent.display()))
            })?),
            None => None,
        };
        Ok(Container { mark, cgroup })
    }

    /// All that this agent started.
    pub fn all(&self) -> Remains {
        let mut remains = Remains::default();
        remains.add_agent(self.process, self.cgroups.as_ref());
        remains
    }
}

/// How all marks of one agent begin.
fn prefix(process: u64) -> String {
    format!("{process:016x}.")
}

/// The process of a rank, which leads its process group, as it was when it had just been started.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Leader {
    #[serde(flatten)]
    pub process: Process,
    /// What the machine had started by then, as `processes::forks`.
    pub forks: u64,
}

impl Leader {
    /// The living process of this number.
    pub fn of(pid: u32) -> Option<Leader> {
        Some(Leader { process: Process::of(pid)?, forks: processes::forks()? })
    }

    /// It is this one, or in the process group or the session that this one led, which keep its number after it has ended.
    fn holds(&self, seen: &Seen) -> bool {
        let Process { pid, start } = self.process;
        if seen.process.pid == pid {
            return seen.process.start == start;
        }
        (seen.group == pid || seen.session == pid)
            && seen.process.start >= start
            && processes::numbers_hold_since(self.forks)
    }
}

/// What may be left of containers, and shall end.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Remains {
    marks: BTreeSet<String>,
    prefixes: BTreeSet<String>,
    cgroups: BTreeSet<PathBuf>,
    ranks: Vec<Leader>,
}

impl From<&Container> for Remains {
    fn from(container: &Container) -> Remains {
        let mut remains = Remains::default();
        remains.add(container, &[]);
        remains
    }
}

impl Remains {
    pub fn add(&mut self, container: &Container, ranks: &[Leader]) {
        // One that was never made has no mark, and neither have most processes.
        self.marks.extend(Some(container.mark.clone()).filter(|mark| !mark.is_empty()));
        self.cgroups.extend(container.cgroup.clone());
        self.ranks.extend(ranks);
    }

    /// Everything that an agent started, also what is not recorded.
    pub fn add_agent(&mut self, process: u64, cgroups: Option<&PathBuf>) {
        let prefix = prefix(process);
        let named = cgroups.into_iter().flat_map(|parent| cgroup::named(parent, &format!("fleet-{prefix}")));
        self.cgroups.extend(named);
        self.prefixes.insert(prefix);
    }

    /// Kills all that lives of it. Returns how many were found; they may take a moment to end, and have started others meanwhile.
    pub fn kill(&self) -> usize {
        let groups = self.cgroups.iter().filter(|dir| cgroup::kill(dir)).count();
        let all = processes::living();
        let found = processes::trees(&all, |seen| self.holds(seen));
        found.iter().for_each(|process| process.kill());
        found.len().max(groups)
    }

    /// Removes the control groups, which must be empty.
    pub fn remove(&self) {
        self.cgroups.iter().for_each(|dir| cgroup::remove(dir));
    }

    fn holds(&self, seen: &Seen) -> bool {
        self.ranks.iter().any(|rank| rank.holds(seen))
            || processes::has_variable(seen.process.pid, MARK_ENV, |marks| {
                marks.split(':').any(|mark| self.has_mark(mark))
            })
    }

    fn has_mark(&self, mark: &str) -> bool {
        self.marks.contains(mark) || self.prefixes.iter().any(|prefix| mark.starts_with(prefix))
    }
}

#[cfg(all(test, target_os = "linux"))]
#[allow(clippy::unwrap_used)] // in a test an unwrap is an assertion
mod tests {
    use super::*;
    use std::process::{Child, Command, Stdio};

    fn start(container: &Container) -> Child {
        let mut command = Command::new("sleep");
        command.arg("1000").env(MARK_ENV, format!("outer.1:{}", container.mark)).stdin(Stdio::null());
        let child = command.spawn().unwrap();
        // Until it has become that program it shows the environment of this one.
        while !processes::has_variable(child.id(), MARK_ENV, |marks| marks.ends_with(&container.mark)) {
            std::thread::yield_now();
        }
        child
    }

    fn kill_until_none_is_left(remains: &Remains) {
        while remains.kill() > 0 {
            std::thread::yield_now();
        }
    }

    #[test]
    fn only_what_bears_the_mark_is_killed_among_many_or_all_of_one_agent() {
        let containers = Containers::new(rand::random(), None);
        let [one, two] = [0, 1].map(|_| containers.create().unwrap());
        assert_ne!(one.mark, two.mark);
        let [mut first, mut second] = [start(&one), start(&two)];
        kill_until_none_is_left(&Remains::from(&one));
        assert!(!first.wait().unwrap().success());
        assert!(second.try_wait().unwrap().is_none());
        kill_until_none_is_left(&Containers::new(rand::random(), None).all());
        assert!(second.try_wait().unwrap().is_none(), "another agent's");
        kill_until_none_is_left(&containers.all());
        assert!(!second.wait().unwrap().success());
    }

    #[test]
    fn a_process_without_the_mark_is_known_by_its_group() {
        use std::os::unix::process::CommandExt;
        let mut leader = Command::new("sh");
        leader.args(["-c", "sleep 1000 & echo $!; wait"]).env_clear().process_group(0).stdout(Stdio::piped());
        let mut leader = leader.spawn().unwrap();
        let rank = Leader::of(leader.id()).unwrap();
        let mut line = String::new();
        std::io::BufRead::read_line(&mut std::io::BufReader::new(leader.stdout.take().unwrap()), &mut line)
            .unwrap();
        let child = Process::of(line.trim().parse().unwrap()).unwrap();
        leader.kill().unwrap();
        leader.wait().unwrap();
        assert!(child.is_alive());
        let remains = |rank| {
            let mut remains = Remains::default();
            remains.add(&Container { mark: "none".into(), cgroup: None }, &[rank]);
            remains
        };
        let of_old =
            Leader { forks: 0, process: Process { start: rank.process.start + 1_000_000, ..rank.process } };
        remains(of_old).kill();
        assert!(child.is_alive(), "the group was another one then");
        kill_until_none_is_left(&remains(rank));
        assert!(!child.is_alive());
    }
}
