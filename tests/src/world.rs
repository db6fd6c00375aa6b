//! A world for one test: a directory, a home, and a mark by which everything that was started in it can be found again.

use crate::{Finished, Running, TinyJob, corpus, eventually, program};
use fleet_common::endpoint::Endpoint;
use nix::sys::signal::{SigSet, Signal, kill};
use nix::unistd::Pid;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use tempfile::TempDir;

/// In the environment of every process that the test started, and of their children; the value is the world's directory.
const MARK: &str = "FLEET_TEST_WORLD";

/// The directories of all worlds of this process.
static WORLDS: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// For programs that make worlds, before any thread is started: one that is told to end leaves nothing of them behind.
pub fn end_worlds_on_signals() {
    let signals: SigSet = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP].into_iter().collect();
    signals.thread_block().expect("these signals can be blocked");
    std::thread::spawn(move || {
        let signal = signals.wait().expect("these signals can be waited for");
        println!("ended by {signal}");
        for dir in WORLDS.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            // Until there are none: one may be about to start another.
            while !processes_in(dir).is_empty() {
                strike(dir);
            }
            let _ = fs::remove_dir_all(dir); // somebody may have removed it
        }
        std::process::exit(128 + signal as i32);
    });
}

/// Ends, by number, whatever is left of its processes when dropped.
pub struct World {
    dir: TempDir,
}

/// A coordinator that was started by hand.
pub struct Standing {
    pub process: Running,
    pub data_dir: PathBuf,
    pub endpoint: Endpoint,
}

impl Default for World {
    fn default() -> Self {
        World::new()
    }
}

impl World {
    /// A fresh one, with `corpus.jsonl` in it.
    pub fn new() -> World {
        let dir = tempfile::Builder::new()
            .prefix("fleet-test-")
            .tempdir()
            .expect("the temporary directory is writable");
        let world = World { dir };
        WORLDS.lock().unwrap_or_else(PoisonError::into_inner).push(world.dir.path().to_owned());
        fs::create_dir(world.path("home")).expect("the world is empty");
        world.write("corpus.jsonl", corpus(60));
        world
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn write(&self, name: &str, contents: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, contents).expect("the world is writable");
        path
    }

    /// Writes `NAME.toml`, unless it is there: a process may be reading it.
    pub fn job(&self, job: &TinyJob) -> PathBuf {
        let (name, text) = (format!("{}.toml", job.run_name), job.toml());
        match fs::read_to_string(self.path(&name)) {
            Ok(there) if there == text => self.path(&name),
            _ => self.write(&name, text),
        }
    }

    /// A program of this workspace that will run in this world.
    pub fn command(&self, name: &str) -> Command {
        self.enter(Command::new(program(name)))
    }

    /// Lets any command run in this world: its directory, its home, its mark, and nothing of the user's cluster.
    pub fn enter(&self, mut command: Command) -> Command {
        for name in [
            "FLEET_CLUSTER",
            "FLEET_TOKEN",
            "FLEET_LOG",
            "XDG_STATE_HOME",
            "XDG_DATA_HOME",
            "OMP_NUM_THREADS",
        ] {
            command.env_remove(name);
        }
        command.current_dir(self.dir.path()).env("HOME", self.path("home")).env(MARK, self.dir.path());
        command
    }

    pub fn start(&self, name: &str, args: &[&str]) -> Running {
        let mut command = self.command(name);
        command.args(args);
        Running::start(command)
    }

    pub fn run(&self, name: &str, args: &[&str]) -> Finished {
        self.start(name, args).finish()
    }

    /// `fleet launch -n RANKS --json JOB ARGS`.
    pub fn launch(&self, ranks: u32, job: &TinyJob, args: &[&str]) -> Running {
        let (file, ranks) = (self.job(job).display().to_string(), ranks.to_string());
        let launch = ["launch", "-n", &ranks, "--json", &file];
        self.start("fleet", &[&launch, args].concat())
    }

    /// `coordinator start` on free ports, once it listens.
    pub fn coordinator(&self, data_dir: &Path, listen: &str) -> Standing {
        let mut command = self.command("coordinator");
        command.arg("start").arg("--data-dir").arg(data_dir).args([
            "--listen",
            listen,
            "--http",
            "127.0.0.1:0",
        ]);
        self.standing(Running::start(command), data_dir)
    }

    /// `coordinator join` on free ports with a fresh token, once it listens. `more` goes to the command line.
    pub fn join_coordinator(&self, cluster: &Standing, data_dir: &Path, more: &[&str]) -> Standing {
        let token = self.token(cluster, &["--role", "coordinator"]);
        let mut command = self.command("coordinator");
        let any = "127.0.0.1:0";
        command.args(["join", &cluster.endpoint.quic, "--token", &token, "--listen", any, "--http", any]);
        command.arg("--data-dir").arg(data_dir).args(more);
        self.standing(Running::start(command), data_dir)
    }

    /// `coordinator start` where there is one already, on the ports that it had.
    pub fn restart_coordinator(&self, data_dir: &Path) -> Standing {
        let mut command = self.command("coordinator");
        command.args(["start", "--expect-existing", "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0"]);
        command.arg("--data-dir").arg(data_dir);
        self.standing(Running::start(command), data_dir)
    }

    /// Three coordinators that vote, each with its own process and data directory.
    pub fn three_coordinators(&self) -> Vec<Standing> {
        let mut all = vec![self.coordinator(&self.path("coordinator-1"), "127.0.0.1:0")];
        for number in 2..=3 {
            let joined = self.join_coordinator(&all[0], &self.path(&format!("coordinator-{number}")), &[]);
            all.push(joined);
        }
        eventually("three coordinators vote", || {
            self.coordinators(&all[0]).iter().filter(|view| view["voter"] == true).count() == 3
        });
        all
    }

    /// What `fleet coordinators ls` says.
    pub fn coordinators(&self, cluster: &Standing) -> Vec<serde_json::Value> {
        let args = ["coordinators", "ls", "--json", "--cluster", cluster.cluster()];
        let done = self.run("fleet", &args).expect(0);
        let list: serde_json::Value = serde_json::from_str(&done.stdout.concat()).expect("it prints JSON");
        list.as_array().cloned().unwrap_or_default()
    }

    /// A fresh join token.
    pub fn token(&self, cluster: &Standing, args: &[&str]) -> String {
        let command = ["token", "create", "--cluster", cluster.cluster()];
        let done = self.run("fleet", &[&command, args].concat()).expect(0);
        done.stdout.concat().trim().to_owned()
    }

    /// Waits until the coordinator that `process` is listens.
    pub fn standing(&self, mut process: Running, data_dir: &Path) -> Standing {
        let (mut found, pid) = (None, process.pid());
        eventually("the coordinator listens", || {
            process.must_live();
            found = Endpoint::load(data_dir).ok().flatten().filter(|endpoint| endpoint.pid == pid);
            found.is_some()
        });
        let endpoint = found.expect("that was waited for");
        Standing { process, data_dir: data_dir.to_owned(), endpoint }
    }

    /// `worker join`, once it is registered.
    pub fn worker(&self, cluster: &Standing, slots: u32) -> Running {
        let token = cluster.data_dir.join("tokens/worker.token");
        let (slots, dir) = (slots.to_string(), self.path("node"));
        let mut command = self.command("worker");
        command.args(["join", &cluster.endpoint.quic, "--device", "cpu", "--slots", &slots]);
        command.arg("--token-file").arg(token).arg("--data-dir").arg(dir);
        let mut worker = Running::start(command);
        worker.until("registration", |line| line["node"].is_string());
        worker
    }

    /// Lets a command run in user and mount namespaces of its own, after a tmpfs of `size` was mounted over `place`, with `sh` doing
    /// `script` on the arguments. `None`, with the reason printed, where that is not allowed.
    pub fn on_a_disk_of(&self, size: &str, place: &Path, script: &str, args: &[&str]) -> Option<Command> {
        let allowed = Command::new("unshare").args(["-Urm", "true"]).output();
        if !allowed.is_ok_and(|output| output.status.success()) {
            eprintln!(
                "skipped: this machine does not allow `unshare -Urm`, which a disk of limited size needs"
            );
            return None;
        }
        let mut command = self.enter(Command::new("unshare"));
        let script = format!("mount -t tmpfs -o size={size} tmpfs {} || exit 99; {script}", place.display());
        command.args(["-Urm", "sh", "-c", &script, "sh"]).args(args);
        Some(command)
    }

    /// Living processes that were started in this world, as number and command line.
    pub fn processes(&self) -> Vec<(u32, String)> {
        processes_in(self.dir.path())
    }

    /// Ends every process of this world at once, as a power cut would.
    pub fn strike_all(&self) {
        strike(self.dir.path());
    }

    /// The ranks of this world.
    pub fn ranks(&self) -> Vec<u32> {
        self.processes()
            .into_iter()
            .filter(|(_, line)| line.contains("fleet-rank"))
            .map(|(pid, _)| pid)
            .collect()
    }

    /// Waits until no process of this world lives.
    pub fn is_empty_soon(&self) {
        let mut left = Vec::new();
        let begun = std::time::Instant::now();
        eventually("nothing is left behind", || {
            left = self.processes();
            assert!(begun.elapsed().as_secs() < 20, "left behind: {left:?}");
            left.is_empty()
        });
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.strike_all();
        WORLDS.lock().unwrap_or_else(PoisonError::into_inner).retain(|dir| dir != self.dir.path());
    }
}

/// Living processes that were started in the world of this directory.
fn processes_in(world: &Path) -> Vec<(u32, String)> {
    let mark = format!("{MARK}={}", world.display());
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let marked = |pid: &u32| {
        let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        environment.split(|byte| *byte == 0).any(|variable| variable == mark.as_bytes())
    };
    let line = |pid: u32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        (pid, String::from_utf8_lossy(&line).replace('\0', " "))
    };
    pids.filter(|pid| *pid != std::process::id()).filter(marked).map(line).collect()
}

fn strike(world: &Path) {
    for (pid, _) in processes_in(world) {
        let _ = kill(Pid::from_raw(pid as i32), Signal::SIGKILL); // ended in this moment
    }
}

impl Standing {
    /// What `--cluster` takes.
    pub fn cluster(&self) -> &str {
        self.data_dir.to_str().expect("temporary directories have plain names")
    }
}
