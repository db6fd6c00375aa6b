//! What this worker has started, on disk: `process.json` names the process that uses the directory and the gangs that it has started, and
//! `gangs/JOB.GENERATION/record.json` says what a gang is. Both are there from before a gang's first rank is started until the cluster has
//! recorded how the gang ended here.
//!
//! A process that finds records of an earlier one ends whatever is left of that, and tells the cluster. Without the records it starts
//! nothing that may have been started before; so a file that is damaged or gone costs jobs, but nothing ever runs twice. That is why the
//! gangs are named in two places: whoever has the right to take over what an earlier process was given knows what that one has started.

use crate::agent::Past;
use crate::container::{Container, Leader, Remains};
use crate::gang::GangId;
use crate::processes::Process;
use anyhow::Context;
use fleet_common::files;
use fleet_common::protocol::EARLIER_MAX;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

/// Directories of ended gangs that are kept for their log files.
const ENDED_KEPT: usize = 32;
const RECORD: &str = "record.json";

#[derive(Debug)]
pub struct Records {
    dir: PathBuf,
    me: Owner,
}

/// What was found of earlier processes.
#[derive(Debug)]
pub struct Found {
    pub past: Past,
    /// Nothing of it may live when the worker greets.
    pub remains: Remains,
}

/// The process that uses the directory, and those before it of which the cluster may not know that they are gone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Owner {
    machine: Machine,
    #[serde(flatten)]
    process: Process,
    #[serde(flatten)]
    drawn: Drawn,
    earlier: Vec<Drawn>,
    /// What was started, by this process and those before it, and is not forgotten.
    #[serde(default)]
    gangs: BTreeSet<String>,
}

/// What one process marks its ranks with, and where its control groups are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Drawn {
    number: u64,
    cgroups: Option<PathBuf>,
}

/// A machine between two boots: numbers of processes mean nothing elsewhere.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Machine {
    id: String,
    boot: String,
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct Record {
    boot: String,
    container: Container,
    ranks: Vec<Leader>,
}

impl Records {
    /// Takes the directory over for this process, which has drawn `number` and makes its control groups in `cgroups`. To be called under
    /// the directory's lock. Fails where a process that uses a copy of the directory still runs, or nothing can be written.
    pub fn open(data_dir: &Path, number: u64, cgroups: Option<PathBuf>) -> anyhow::Result<(Records, Found)> {
        let machine = Machine::this();
        let pid = std::process::id();
        let process = Process::of(pid).unwrap_or(Process { pid, start: 0 });
        let mut found = Found { past: Past::default(), remains: Remains::default() };
        let mut earlier = Vec::new();
        let before: Option<Owner> = read(&data_dir.join("process.json"));
        let known = fs::read_dir(data_dir.join("gangs")).into_iter().flatten().flatten();
        let recorded = known.map(|entry| entry.path()).filter(|dir| dir.join(RECORD).exists());
        for dir in recorded.collect::<Vec<_>>() {
            let id = dir.file_name().and_then(|name| name.to_str()).and_then(GangId::parse);
            let Some(id) = id else { continue };
            let record: Record = read(&dir.join(RECORD)).unwrap_or_default();
            found.past.gangs.insert(id);
            let here = record.boot == machine.boot;
            found.remains.add(&record.container, if here { &record.ranks } else { &[] });
        }
        if let Some(before) = before {
            found.past.gangs.extend(before.gangs.iter().filter_map(|name| GangId::parse(name)));
            if before.machine.boot == machine.boot && before.process != process && before.process.is_alive() {
                anyhow::bail!(
                    "a worker that runs (process {}) has a copy of {}; every worker joins with a data directory of its own",
                    before.process.pid,
                    data_dir.display()
                );
            }
            if before.machine.id == machine.id {
                earlier = before.earlier;
                earlier.push(before.drawn);
                earlier.drain(..earlier.len().saturating_sub(EARLIER_MAX));
            } else {
                tracing::warn!(dir = %data_dir.display(), "used on another machine before: nothing that was started there is taken over");
            }
        }
        found.past.processes = earlier.iter().map(|drawn| drawn.number).collect();
        earlier.iter().for_each(|drawn| found.remains.add_agent(drawn.number, drawn.cgroups.as_ref()));
        let gangs = found.past.gangs.iter().map(ToString::to_string).collect();
        let me = Owner { machine, process, drawn: Drawn { number, cgroups }, earlier, gangs };
        let records = Records { dir: data_dir.to_owned(), me };
        records.store_owner().context("a worker that cannot keep what it starts may not start anything")?;
        Ok((records, found))
    }

    /// The cluster knows that the earlier processes are gone.
    pub fn settled(&mut self) {
        self.me.earlier.clear();
        if let Err(error) = self.store_owner() {
            tracing::warn!(%error, "earlier processes of this worker will be named again");
        }
    }

    /// Where the log files of a gang go.
    pub fn dir_of(&self, id: GangId) -> PathBuf {
        self.dir.join("gangs").join(id.to_string())
    }

    /// To be called before the first process of a gang is started; it may be started once this has returned.
    pub fn begin(&mut self, id: GangId, container: &Container) -> io::Result<()> {
        self.me.gangs.insert(id.to_string());
        self.store_owner()?;
        let dir = self.dir_of(id);
        files::create_dir(&dir)?;
        self.store(id, container, Vec::new())?;
        let gangs = self.dir.join("gangs");
        File::open(&gangs).and_then(|dir| dir.sync_all())?;
        if let Err(error) = remove_oldest(&gangs) {
            tracing::warn!(dir = %gangs.display(), %error, "log files of old gangs stay");
        }
        Ok(())
    }

    /// Adds the processes that were started.
    pub fn started(&self, id: GangId, container: &Container, ranks: Vec<Leader>) {
        if let Err(error) = self.store(id, container, ranks) {
            tracing::warn!(gang = %id, %error, "its processes are known by their mark only");
        }
    }

    /// The gang is over, and the cluster knows.
    pub fn forget(&mut self, id: GangId) {
        self.me.gangs.remove(&id.to_string());
        if let Err(error) = self.store_owner() {
            tracing::warn!(gang = %id, %error, "it is told to the cluster again");
        }
        match fs::remove_file(self.dir_of(id).join(RECORD)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(gang = %id, %error, "its record stays, and is told to the cluster again");
            }
            _ => {}
        }
    }

    fn store(&self, id: GangId, container: &Container, ranks: Vec<Leader>) -> io::Result<()> {
        let record = Record { boot: self.me.machine.boot.clone(), container: container.clone(), ranks };
        write(&self.dir_of(id).join(RECORD), &record)
    }

    fn store_owner(&self) -> io::Result<()> {
        write(&self.dir.join("process.json"), &self.me)
    }
}

impl Machine {
    /// Without what the system does not say, which then is the same everywhere.
    fn this() -> Machine {
        let line = |path: &str| fs::read_to_string(path).unwrap_or_default().trim().to_owned();
        let host = nix::sys::utsname::uname().ok();
        let host = host.as_ref().and_then(|name| name.nodename().to_str()).unwrap_or_default();
        Machine {
            id: format!("{} {host}", line("/etc/machine-id")),
            boot: line("/proc/sys/kernel/random/boot_id"),
        }
    }
}

/// `None` where there is none, or none that can be read.
fn read<T: DeserializeOwned>(path: &Path) -> Option<T> {
    let text = files::read_optional(path).unwrap_or_else(|error| {
        tracing::warn!(%error, "goes on without it");
        None
    });
    serde_json::from_str(&text?)
        .inspect_err(|error| tracing::warn!(path = %path.display(), %error, "damaged; goes on without it"))
        .ok()
}

fn write(path: &Path, value: &impl Serialize) -> io::Result<()> {
    let text = serde_json::to_string(value).map_err(io::Error::other)? + "\n";
    files::write_atomic(path, text.as_bytes())
}

/// Removes directories of gangs that have ended, the oldest first.
fn remove_oldest(gangs: &Path) -> io::Result<()> {
    let mut ended = BTreeSet::new();
    for entry in fs::read_dir(gangs)? {
        let entry = entry?;
        if !entry.path().join(RECORD).exists() {
            // Changed last when the record was removed.
            ended.insert((entry.metadata()?.modified()?, entry.path()));
        }
    }
    let excess = ended.len().saturating_sub(ENDED_KEPT);
    ended.iter().take(excess).try_for_each(|(_, old)| fs::remove_dir_all(old))
}

#[cfg(test)]
mod tests {
    use super::*;
    use fleet_common::ids::JobId;
    use std::os::unix::fs::PermissionsExt;

    fn id(job: u64) -> GangId {
        GangId { job: JobId(job), generation: 1 }
    }

    fn container(mark: &str) -> Container {
        Container { mark: mark.into(), cgroup: None }
    }

    fn remains(mark: &str, agents: &[u64]) -> Remains {
        let mut remains = Remains::default();
        remains.add(&container(mark), &[]);
        agents.iter().for_each(|number| remains.add_agent(*number, None));
        remains
    }

    #[test]
    fn what_was_begun_and_not_forgotten_is_found_by_the_next_process() {
        let dir = tempfile::tempdir().unwrap();
        let (mut records, found) = Records::open(dir.path(), 7, None).unwrap();
        assert_eq!((found.past, found.remains), (Past::default(), Remains::default()));
        records.begin(id(1), &container("m1")).unwrap();
        records.begin(id(2), &container("m2")).unwrap();
        let record = records.dir_of(id(1)).join(RECORD);
        assert_eq!(fs::metadata(&record).unwrap().permissions().mode() & 0o777, 0o600);
        records.forget(id(1));
        records.forget(id(1));
        let (mut records, found) = Records::open(dir.path(), 8, None).unwrap();
        assert_eq!(found.past, Past { processes: vec![7], gangs: [id(2)].into() });
        assert_eq!(found.remains, remains("m2", &[7]));
        // Until the cluster knows, every process before is named.
        let (_, found) = Records::open(dir.path(), 9, None).unwrap();
        assert_eq!(found.past.processes, [7, 8]);
        records.settled();
        records.forget(id(2));
        let (_, found) = Records::open(dir.path(), 10, None).unwrap();
        assert_eq!(found.past, Past { processes: vec![8], gangs: BTreeSet::new() });
    }

    #[test]
    fn a_gang_whose_own_record_is_gone_was_started_all_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let (mut records, _) = Records::open(dir.path(), 7, None).unwrap();
        records.begin(id(1), &container("m1")).unwrap();
        records.begin(id(2), &container("m2")).unwrap();
        records.forget(id(2));
        for number in [8, 9] {
            let _ = fs::remove_dir_all(dir.path().join("gangs"));
            let (_, found) = Records::open(dir.path(), number, None).unwrap();
            assert_eq!(found.past.gangs, [id(1)].into());
            assert!(found.past.processes.contains(&7), "it takes over what that one was given");
        }
        let (mut records, _) = Records::open(dir.path(), 10, None).unwrap();
        records.forget(id(1));
        assert!(Records::open(dir.path(), 11, None).unwrap().1.past.gangs.is_empty());
    }

    #[test]
    fn damaged_files_cost_what_they_said_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let (mut records, _) = Records::open(dir.path(), 7, None).unwrap();
        records.begin(id(1), &container("m1")).unwrap();
        fs::write(records.dir_of(id(1)).join(RECORD), "{").unwrap();
        fs::create_dir_all(dir.path().join("gangs/other")).unwrap();
        fs::write(dir.path().join("gangs/other").join(RECORD), "{}").unwrap();
        let (_, found) = Records::open(dir.path(), 8, None).unwrap();
        assert_eq!(found.past, Past { processes: vec![7], gangs: [id(1)].into() });
        fs::write(dir.path().join("process.json"), "rubbish").unwrap();
        let (_, found) = Records::open(dir.path(), 9, None).unwrap();
        assert_eq!(found.past, Past { processes: vec![], gangs: [id(1)].into() }, "it is an heir of nobody");
    }

    #[test]
    fn nothing_of_another_machine_is_taken_over_and_no_number_of_another_boot_is_struck() {
        let dir = tempfile::tempdir().unwrap();
        let (mut records, _) = Records::open(dir.path(), 7, None).unwrap();
        records.begin(id(1), &container("m1")).unwrap();
        records.started(id(1), &container("m1"), Leader::of(std::process::id()).into_iter().collect());
        let (mut other, found) = Records::open(dir.path(), 8, None).unwrap();
        assert_ne!(found.remains, remains("m1", &[7]), "its ranks are known by their numbers too");
        other.me.machine.boot = "before".into();
        other.started(id(1), &container("m1"), Leader::of(std::process::id()).into_iter().collect());
        other.store_owner().unwrap();
        let (mut other, found) = Records::open(dir.path(), 9, None).unwrap();
        assert_eq!(found.remains, remains("m1", &[7, 8]));
        other.me.machine.id = "elsewhere".into();
        other.store_owner().unwrap();
        let (_, found) = Records::open(dir.path(), 10, None).unwrap();
        assert_eq!(found.past.processes, Vec::<u64>::new());
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_copy_of_a_directory_that_a_living_worker_uses_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let (mut records, _) = Records::open(dir.path(), 7, None).unwrap();
        let mut other = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        records.me.process = Process::of(other.id()).unwrap();
        records.store_owner().unwrap();
        let refused = Records::open(dir.path(), 8, None).unwrap_err().to_string();
        assert!(refused.contains("has a copy of"), "{refused}");
        other.kill().unwrap();
        other.wait().unwrap();
        assert_eq!(Records::open(dir.path(), 8, None).unwrap().1.past.processes, [7]);
    }

    #[test]
    fn log_files_of_gangs_that_run_are_kept_however_many_there_are() {
        let dir = tempfile::tempdir().unwrap();
        let (mut records, _) = Records::open(dir.path(), 7, None).unwrap();
        let count = ENDED_KEPT as u64 + 20;
        for job in 1..=count {
            records.begin(id(job), &container("m")).unwrap();
        }
        let gangs = dir.path().join("gangs");
        let there = || (1..=count).filter(|job| gangs.join(id(*job).to_string()).exists()).count();
        assert_eq!(there(), count as usize, "all of them run");
        (1..=count).for_each(|job| records.forget(id(job)));
        records.begin(id(count + 1), &container("m")).unwrap();
        assert_eq!(there(), ENDED_KEPT);
        assert!(records.dir_of(id(count + 1)).exists());
    }
}
