//! The processes of a launch: one coordinator, one worker. Starts them, notices when one ends, brings the coordinator back, and ends both.
//!
//! Both get `--die-with-parent` and process groups of their own: a Ctrl-C on the terminal reaches `fleet` alone, which decides.

use super::signals::Signals;
use crate::failure::Failure;
use crate::{json, programs};
use fleet_common::endpoint::Endpoint;
use fleet_common::exit;
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;
use serde::Deserialize;
use serde_json::Value;
use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::{Duration, Instant};
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};

/// From the start of a coordinator to its first answer; a full log is replayed in less.
const READY_MAX: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(2);
/// A coordinator that dies this often within `RESTART_WINDOW` will not get well.
const RESTARTS_MAX: usize = 5;
const RESTART_WINDOW: Duration = Duration::from_secs(60);
/// How long a child may take to end after SIGTERM.
const GRACE: Duration = Duration::from_secs(5);

pub struct Local {
    data_dir: PathBuf,
    slots: u32,
    coordinator_program: PathBuf,
    worker_program: PathBuf,
    coordinator: Option<Child>,
    worker: Option<Worker>,
    endpoint: Option<Endpoint>,
    restarts: VecDeque<Instant>,
}

struct Worker {
    child: Child,
    pid: u32,
    stdout: Option<Lines<BufReader<ChildStdout>>>,
}

/// The worker's first line on stdout.
#[derive(Deserialize)]
struct Registered {
    node: String,
    pid: u32,
}

/// Something that happened to a process.
pub enum Incident {
    NodeJoined {
        node: String,
        pid: u32,
    },
    CoordinatorRestarted {
        pid: u32,
        why: String,
    },
    /// The launch cannot go on.
    Lost(Failure),
}

/// What `cluster` says.
pub struct Started {
    endpoint: Endpoint,
    data_dir: PathBuf,
    worker_pid: Option<u32>,
}

impl Started {
    pub fn as_json(&self) -> Value {
        let e = &self.endpoint;
        let pids =
            [("fleet", Some(std::process::id())), ("coordinator", Some(e.pid)), ("worker", self.worker_pid)];
        json::cluster(&e.quic, &e.http, &e.cluster_id, &self.data_dir.display().to_string(), pids)
    }

    pub fn as_text(&self) -> String {
        format!(
            "cluster at {} (http://{}), in {}",
            self.endpoint.quic,
            self.endpoint.http,
            self.data_dir.display()
        )
    }
}

impl Local {
    pub fn new(data_dir: &Path, slots: u32) -> Result<Local, Failure> {
        Ok(Local {
            data_dir: data_dir.to_owned(),
            slots,
            coordinator_program: programs::beside("coordinator")?,
            worker_program: programs::beside("worker")?,
            coordinator: None,
            worker: None,
            endpoint: None,
            restarts: VecDeque::new(),
        })
    }

    pub fn data_dir(&self) -> &Path {
        &self.data_dir
    }

    /// Starts both. Returns when the coordinator listens; the worker joins meanwhile.
    pub async fn start(&mut self) -> Result<Started, Failure> {
        let pid = self.spawn_coordinator()?;
        let endpoint = self.coordinator_listens(pid).await?;
        let worker = self.start_worker(&endpoint.quic)?;
        let worker_pid = Some(worker.pid);
        self.worker = Some(worker);
        self.endpoint = Some(endpoint.clone());
        Ok(Started { endpoint, data_dir: self.data_dir.clone(), worker_pid })
    }

    /// On the first start ports of its choice, later the ones it had, which the worker and the clients go on trying.
    fn spawn_coordinator(&mut self) -> Result<u32, Failure> {
        let free = "127.0.0.1:0";
        let (listen, http) =
            self.endpoint.as_ref().map_or((free, free), |e| (e.quic.as_str(), e.http.as_str()));
        let mut command = Command::new(&self.coordinator_program);
        command.arg("start").arg("--data-dir").arg(&self.data_dir);
        command.args(["--listen", listen, "--http", http, "--log-format", "json"]);
        command.stdout(Stdio::null());
        let child = self.spawn(command, "coordinator")?;
        let pid = child.id().unwrap_or_default();
        self.coordinator = Some(child);
        Ok(pid)
    }

    async fn coordinator_listens(&mut self, pid: u32) -> Result<Endpoint, Failure> {
        let deadline = Instant::now() + READY_MAX;
        loop {
            let ended = self.coordinator.as_mut().and_then(|child| child.try_wait().ok().flatten());
            if let Some(status) = ended {
                self.coordinator = None;
                return Err(self.ended_early("coordinator", status));
            }
            // an older file may lie there: only the one that names this process counts
            let endpoint = Endpoint::load(&self.data_dir).map_err(|e| Failure::environment(e.to_string()))?;
            if let Some(endpoint) = endpoint.filter(|endpoint| endpoint.pid == pid) {
                return Ok(endpoint);
            }
            if Instant::now() > deadline {
                let log = self.log_path("coordinator");
                let waited = READY_MAX.as_secs();
                let message =
                    format!("the coordinator does not listen after {waited} s; its log is {}", log.display());
                return Err(Failure::environment(message));
            }
            tokio::time::sleep(POLL).await;
        }
    }

    fn start_worker(&self, address: &str) -> Result<Worker, Failure> {
        let mut command = Command::new(&self.worker_program);
        command.arg("join").arg(address);
        command.arg("--token-file").arg(self.data_dir.join("tokens/worker.token"));
        command.arg("--data-dir").arg(self.data_dir.join("worker"));
        command.arg("--slots").arg(self.slots.to_string());
        command.args(["--name", "local", "--log-format", "json"]);
        command.stdout(Stdio::piped());
        let mut child = self.spawn(command, "worker")?;
        let pid = child.id().unwrap_or_default();
        let stdout = child.stdout.take().map(|stdout| BufReader::new(stdout).lines());
        Ok(Worker { child, pid, stdout })
    }

    fn spawn(&self, mut command: Command, name: &str) -> Result<Child, Failure> {
        command.arg("--die-with-parent").arg(std::process::id().to_string());
        let path = self.log_path(name);
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&path)
            .map_err(|e| Failure::io("write", &path, &e))?;
        command.stdin(Stdio::null()).stderr(Stdio::from(log)).process_group(0).kill_on_drop(true);
        command.spawn().map_err(|e| Failure::environment(format!("cannot start {name}: {e}")))
    }

    fn log_path(&self, name: &str) -> PathBuf {
        self.data_dir.join(format!("{name}.log"))
    }

    /// Waits until something happens to a process. May be dropped and called again.
    pub async fn incident(&mut self) -> Incident {
        let (Some(coordinator), Some(worker)) = (self.coordinator.as_mut(), self.worker.as_mut()) else {
            return std::future::pending().await;
        };
        let first_line = async {
            match worker.stdout.as_mut() {
                Some(lines) => lines.next_line().await,
                None => std::future::pending().await,
            }
        };
        let (coordinator_ended, worker_ended) = tokio::select! {
            line = first_line => {
                let Ok(Some(line)) = line else {
                    worker.stdout = None;
                    return Box::pin(self.incident()).await;
                };
                match serde_json::from_str::<Registered>(&line) {
                    Ok(Registered { node, pid }) => return Incident::NodeJoined { node, pid },
                    Err(_) => return Box::pin(self.incident()).await,
                }
            }
            status = coordinator.wait() => (Some(status), None),
            status = worker.child.wait() => (None, Some(status)),
        };
        if let Some(status) = worker_ended {
            self.worker = None;
            let status = status.unwrap_or_default();
            let mut failure = self.ended_early("worker", status);
            if !matches!(status.code().map(u8::try_from), Some(Ok(exit::REFUSED_INPUT | exit::ENVIRONMENT))) {
                failure.code = exit::JOB_FAILED;
            }
            return Incident::Lost(failure);
        }
        self.coordinator = None;
        self.restart_coordinator(coordinator_ended.and_then(Result::ok).unwrap_or_default())
    }

    /// On its data directory. Should it not come up, it ends, which is the next incident.
    fn restart_coordinator(&mut self, status: ExitStatus) -> Incident {
        let now = Instant::now();
        self.restarts.retain(|then| now.duration_since(*then) < RESTART_WINDOW);
        self.restarts.push_back(now);
        if self.restarts.len() > RESTARTS_MAX {
            return Incident::Lost(self.ended_early("coordinator", status));
        }
        match self.spawn_coordinator() {
            Ok(pid) => Incident::CoordinatorRestarted { pid, why: how(status) },
            Err(failure) => Incident::Lost(failure),
        }
    }

    /// One line with how it ended and the last thing that it said.
    fn ended_early(&self, name: &str, status: ExitStatus) -> Failure {
        let path = self.log_path(name);
        // what was killed had no last words
        let last =
            status.code().and_then(|_| last_words(&path)).map_or(String::new(), |line| format!(": {line}"));
        let code = match status.code().map(u8::try_from) {
            Some(Ok(code @ (exit::REFUSED_INPUT | exit::UNREACHABLE | exit::ENVIRONMENT))) => code,
            _ => exit::ENVIRONMENT,
        };
        Failure {
            code,
            message: format!("the {name} ended ({}){last}; its log is {}", how(status), path.display()),
        }
    }

    /// Ends both: SIGTERM, then SIGKILL for what is still there after the grace, or at once when a signal comes meanwhile.
    pub async fn end(&mut self, signals: &mut Signals) {
        let worker = self.worker.take().map(|worker| worker.child);
        let coordinator = self.coordinator.take();
        let mut children: Vec<Child> = worker.into_iter().chain(coordinator).collect();
        for child in &children {
            signal(child, Signal::SIGTERM);
        }
        let all_ended = async {
            for child in &mut children {
                let _ = child.wait().await;
            }
        };
        tokio::select! {
            () = all_ended => return,
            () = tokio::time::sleep(GRACE) => {}
            _ = signals.next() => {}
        }
        for child in &mut children {
            if let Some(pid) = child.id().and_then(|pid| i32::try_from(pid).ok()) {
                let _ = killpg(Pid::from_raw(pid), Signal::SIGKILL); // ended in this moment
            }
            let _ = child.wait().await;
        }
    }
}

fn signal(child: &Child, signal: Signal) {
    // a child that was reaped has no id any more, so no other process is ever struck
    if let Some(pid) = child.id().and_then(|pid| i32::try_from(pid).ok()) {
        let _ = kill(Pid::from_raw(pid), signal);
    }
}

fn how(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(number)) => {
            let name = Signal::try_from(number)
                .map_or_else(|_| format!("signal {number}"), |signal| signal.to_string());
            format!("killed by {name}")
        }
        (None, None) => "ended".to_owned(),
    }
}

/// The last line of a log; of a JSON line its message.
fn last_words(path: &Path) -> Option<String> {
    const TAIL: u64 = 4096;
    use std::io::{Read, Seek, SeekFrom};
    let mut file = File::open(path).ok()?;
    let length = file.metadata().ok()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(TAIL))).ok()?;
    let mut bytes = Vec::new();
    file.take(TAIL).read_to_end(&mut bytes).ok()?;
    let text = String::from_utf8_lossy(&bytes);
    let line = text.lines().rev().find(|line| !line.trim().is_empty())?.trim();
    let message =
        serde_json::from_str::<Value>(line).ok().and_then(|json| json["message"].as_str().map(str::to_owned));
    let line = message.unwrap_or_else(|| line.to_owned());
    Some(line.strip_prefix("error: ").unwrap_or(&line).to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_words_of_a_log_are_its_last_message() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.log");
        let words = |text: &str| {
            std::fs::write(&path, text).unwrap();
            last_words(&path)
        };
        assert_eq!(words(""), None);
        assert_eq!(words("{\"message\":\"first\"}\nerror: no port\n\n").as_deref(), Some("no port"));
        assert_eq!(words("x\n{\"level\":\"INFO\",\"message\":\"stopped\"}\n").as_deref(), Some("stopped"));
        assert_eq!(words(&format!("{}\nlast", "y".repeat(10_000))).as_deref(), Some("last"));
    }

    #[test]
    fn an_exit_is_told_by_code_or_signal() {
        assert_eq!(how(ExitStatus::from_raw(3 << 8)), "exit code 3");
        assert_eq!(how(ExitStatus::from_raw(9)), "killed by SIGKILL");
    }
}
