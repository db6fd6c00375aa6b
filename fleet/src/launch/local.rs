//! The processes of a launch: its coordinators, one worker. Starts them, notices when one ends, brings coordinators back, and ends all.
//!
//! All get `--die-with-parent` and process groups of their own: a Ctrl-C on the terminal reaches `fleet` alone, which decides.

use super::signals::{Signal, Signals};
use super::worker::{Said, Worker};
use crate::client::{Client, unexpected};
use crate::cluster::Cluster;
use crate::failure::Failure;
use crate::{json, programs};
use fleet_common::endpoint::Endpoint;
use fleet_common::protocol::{Printed, Reply, Request, Role};
use fleet_common::{exit, files};
use nix::sys::signal::{kill, killpg};
use nix::unistd::{Pid, getpgrp, tcgetpgrp};
use serde_json::Value;
use std::collections::VecDeque;
use std::fs::File;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::process::{ExitStatus, Stdio};
use std::task::Poll;
use std::time::{Duration, Instant};
use tokio::process::{Child, Command};

/// From the start of a coordinator to its first answer; a full log is replayed in less.
const READY_MAX: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(2);
/// A coordinator that dies this often within `RESTART_WINDOW` will not get well.
const RESTARTS_MAX: usize = 5;
const RESTART_WINDOW: Duration = Duration::from_secs(60);
/// How long a child may take to end after SIGTERM.
const GRACE: Duration = Duration::from_secs(5);

/// For new replicas to be caught up and vote.
const VOTERS_MAX: Duration = Duration::from_secs(30);
const VOTERS_POLL: Duration = Duration::from_millis(20);
/// Life of the token by which the other coordinators join, which happens at once.
const TOKEN_TTL_S: u64 = 600;

pub struct Local {
    data_dir: PathBuf,
    slots: u32,
    /// What is run is a program, whose output the worker relays: `apart` or `together`.
    relay: Option<&'static str>,
    coordinator_program: PathBuf,
    worker_program: PathBuf,
    /// The first one has the launch's own data directory.
    coordinators: Vec<Coordinator>,
    worker: Option<Worker>,
}

struct Coordinator {
    name: String,
    dir: PathBuf,
    child: Option<Child>,
    endpoint: Option<Endpoint>,
    restarts: VecDeque<Instant>,
}

/// Something that happened to a process.
pub enum Incident {
    NodeJoined {
        node: String,
        pid: u32,
    },
    /// By the program that the worker runs.
    Printed(Printed),
    CoordinatorRestarted {
        name: String,
        pid: u32,
        why: String,
    },
    /// The launch cannot go on.
    Lost(Failure),
}

/// What `cluster` says.
pub struct Started {
    /// The first coordinator's.
    endpoint: Endpoint,
    coordinators: Vec<(String, u32)>,
    data_dir: PathBuf,
    worker_pid: Option<u32>,
}

impl Started {
    pub fn as_json(&self) -> Value {
        let e = &self.endpoint;
        let fleet = std::iter::once(("fleet", Some(std::process::id())));
        let coordinators = self.coordinators.iter().map(|(name, pid)| (name.as_str(), Some(*pid)));
        let pids = fleet.chain(coordinators).chain([("worker", self.worker_pid)]);
        json::cluster(&e.quic, &e.http, &e.cluster_id, &self.data_dir.display().to_string(), pids)
    }

    pub fn as_text(&self) -> String {
        let count = match self.coordinators.len() {
            1 => String::new(),
            count => format!(" with {count} coordinators"),
        };
        format!(
            "cluster at {} (http://{}){count}, in {}",
            self.endpoint.quic,
            self.endpoint.http,
            self.data_dir.display()
        )
    }
}

impl Local {
    /// `coordinators` of them: 1, 3 or 5. `relay`: see there.
    pub fn new(
        data_dir: &Path,
        slots: u32,
        coordinators: u32,
        relay: Option<&'static str>,
    ) -> Result<Local, Failure> {
        let coordinator = |number: u32| {
            let name = if number == 1 { "coordinator".to_owned() } else { format!("coordinator-{number}") };
            let dir = if number == 1 { data_dir.to_owned() } else { data_dir.join(&name) };
            Coordinator { name, dir, child: None, endpoint: None, restarts: VecDeque::new() }
        };
        Ok(Local {
            data_dir: data_dir.to_owned(),
            slots,
            relay,
            coordinator_program: programs::beside("coordinator")?,
            worker_program: programs::beside("worker")?,
            coordinators: (1..=coordinators).map(coordinator).collect(),
            worker: None,
        })
    }

    pub fn data_dir(&self) -> &Path {
        &self.data_dir
    }

    /// Starts all. Returns when the coordinators listen and vote; the worker joins meanwhile.
    pub async fn start(&mut self) -> Result<Started, Failure> {
        self.start_coordinator(0, None)?;
        let endpoint = self.listens(0).await?;
        // Those of an earlier launch in this directory are members already.
        let token = match self.coordinators.iter().skip(1).any(|other| !is_member(&other.dir)) {
            true => Some(self.coordinator_token().await?),
            false => None,
        };
        for index in 1..self.coordinators.len() {
            let joins = !is_member(&self.coordinators[index].dir);
            self.start_coordinator(index, token.as_deref().filter(|_| joins))?;
        }
        let mut addresses = vec![endpoint.quic.clone()];
        for index in 1..self.coordinators.len() {
            addresses.push(self.listens(index).await?.quic);
        }
        let worker = self.start_worker(&addresses.join(","))?;
        let worker_pid = Some(worker.pid);
        self.worker = Some(worker);
        self.all_vote().await?;
        let pid = |coordinator: &Coordinator| {
            let pid = coordinator.child.as_ref().and_then(Child::id).unwrap_or_default();
            (coordinator.name.clone(), pid)
        };
        let coordinators = self.coordinators.iter().map(pid).collect();
        Ok(Started { endpoint, coordinators, data_dir: self.data_dir.clone(), worker_pid })
    }

    async fn coordinator_token(&self) -> Result<String, Failure> {
        let mut client = Client::patient(Cluster::in_data_dir(&self.data_dir), READY_MAX);
        let uses = self.coordinators.len() as u32;
        let request = Request::CreateToken { role: Role::Coordinator, ttl_s: TOKEN_TTL_S, uses };
        match client.change(request).await? {
            Reply::Token { text } => Ok(text),
            other => Err(unexpected(&other)),
        }
    }

    /// A cluster of three that is not one yet would lose its quorum with the first that dies.
    async fn all_vote(&self) -> Result<(), Failure> {
        if self.coordinators.len() == 1 {
            return Ok(());
        }
        let deadline = Instant::now() + VOTERS_MAX;
        let mut client = Client::patient(Cluster::in_data_dir(&self.data_dir), VOTERS_MAX);
        loop {
            let voters = match client.ask(Request::Coordinators).await? {
                Reply::Coordinators(views) => views.iter().filter(|view| view.voter).count(),
                other => return Err(unexpected(&other)),
            };
            if voters >= self.coordinators.len() {
                return Ok(());
            }
            if Instant::now() > deadline {
                let waited = VOTERS_MAX.as_secs();
                let message = format!(
                    "after {waited} s only {voters} of {} coordinators vote; their logs are below {}",
                    self.coordinators.len(),
                    self.data_dir.display()
                );
                return Err(Failure::environment(message));
            }
            tokio::time::sleep(VOTERS_POLL).await;
        }
    }

    /// On the first start ports of its choice, later the ones it had, which the worker and the clients go on trying. With a token it joins.
    fn start_coordinator(&mut self, index: usize, token: Option<&str>) -> Result<u32, Failure> {
        let coordinator = &self.coordinators[index];
        let free = "127.0.0.1:0";
        let (listen, member, http) = match &coordinator.endpoint {
            Some(e) => (e.quic.as_str(), e.member.as_str(), e.http.as_str()),
            None => (free, free, free),
        };
        let mut command = Command::new(&self.coordinator_program);
        match (token, &self.coordinators[0].endpoint) {
            (Some(token), Some(first)) => {
                command.arg("join").arg(&first.quic).env("FLEET_TOKEN", token);
            }
            _ => {
                command.arg("start").env_remove("FLEET_TOKEN");
            }
        }
        files::create_dir(&coordinator.dir).map_err(|e| Failure::environment(e.to_string()))?;
        command.arg("--data-dir").arg(&coordinator.dir);
        command.args(["--listen", listen, "--member-listen", member, "--http", http, "--log-format", "json"]);
        command.stdin(Stdio::null()).stdout(Stdio::null());
        let child = self.spawn(command, &coordinator.name)?;
        let pid = child.id().unwrap_or_default();
        self.coordinators[index].child = Some(child);
        Ok(pid)
    }

    async fn listens(&mut self, index: usize) -> Result<Endpoint, Failure> {
        let deadline = Instant::now() + READY_MAX;
        loop {
            let coordinator = &mut self.coordinators[index];
            let pid = coordinator.child.as_ref().and_then(Child::id);
            let ended = coordinator.child.as_mut().and_then(|child| child.try_wait().ok().flatten());
            let name = coordinator.name.clone();
            if let Some(status) = ended {
                coordinator.child = None;
                return Err(self.ended_early(&name, status));
            }
            // an older file may lie there: only the one that names this process counts
            let endpoint =
                Endpoint::load(&coordinator.dir).map_err(|e| Failure::environment(e.to_string()))?;
            if let Some(endpoint) = endpoint.filter(|endpoint| Some(endpoint.pid) == pid) {
                coordinator.endpoint = Some(endpoint.clone());
                return Ok(endpoint);
            }
            if Instant::now() > deadline {
                let log = self.log_path(&name);
                let waited = READY_MAX.as_secs();
                let message =
                    format!("the {name} does not listen after {waited} s; its log is {}", log.display());
                return Err(Failure::environment(message));
            }
            tokio::time::sleep(POLL).await;
        }
    }

    fn start_worker(&self, addresses: &str) -> Result<Worker, Failure> {
        let mut command = Command::new(&self.worker_program);
        command.arg("join").arg(addresses);
        command.arg("--token-file").arg(self.data_dir.join("tokens/worker.token"));
        command.arg("--data-dir").arg(self.data_dir.join("worker"));
        command.arg("--slots").arg(self.slots.to_string());
        command.args(["--name", "local", "--log-format", "json", "--inherit-env"]);
        match self.relay {
            Some(streams) => command.args(["--relay", streams]),
            // The cluster ends with its job: all that is printed is shown.
            None => command.args(["--log-rate", "0"]),
        };
        command.stdin(self.stdin()).stdout(Stdio::piped());
        Ok(Worker::attend(self.spawn(command, "worker")?))
    }

    /// A program's rank 0 reads what this launch was given to read, at a terminal as well: ranks are in sessions of their own, to which its
    /// rules of who may read there do not apply. So a launch in the background keeps them away from what is typed for the one in front.
    fn stdin(&self) -> Stdio {
        match self.relay {
            Some(_) if !is_in_the_background() => Stdio::inherit(),
            _ => Stdio::null(),
        }
    }

    fn spawn(&self, mut command: Command, name: &str) -> Result<Child, Failure> {
        command.arg("--die-with-parent").arg(std::process::id().to_string());
        let path = self.log_path(name);
        let log = files::private()
            .create(true)
            .append(true)
            .open(&path)
            .map_err(|e| Failure::io("write", &path, &e))?;
        command.stderr(Stdio::from(log)).process_group(0).kill_on_drop(true);
        command.spawn().map_err(|e| Failure::environment(format!("cannot start {name}: {e}")))
    }

    fn log_path(&self, name: &str) -> PathBuf {
        self.data_dir.join(format!("{name}.log"))
    }

    /// Waits until something happens to a process. May be dropped and called again.
    pub async fn incident(&mut self) -> Incident {
        let Local { coordinators, worker: Some(worker), .. } = self else {
            return std::future::pending().await;
        };
        let (coordinator_ended, worker_ended) = tokio::select! {
            said = worker.next() => match said {
                Ok(Said::Registered { node, pid }) => return Incident::NodeJoined { node, pid },
                Ok(Said::Printed(printed)) => return Incident::Printed(printed),
                Err(status) => (None, Some(status)),
            },
            ended = first_to_end(coordinators) => (Some(ended), None),
        };
        if let Some(status) = worker_ended {
            self.worker = None;
            let mut failure = self.ended_early("worker", status);
            if !matches!(status.code().map(u8::try_from), Some(Ok(exit::REFUSED_INPUT | exit::ENVIRONMENT))) {
                failure.code = exit::JOB_FAILED;
            }
            return Incident::Lost(failure);
        }
        let (index, status) = coordinator_ended.unwrap_or_default();
        self.restart_coordinator(index, status)
    }

    /// On its data directory. Should it not come up, it ends, which is the next incident.
    fn restart_coordinator(&mut self, index: usize, status: ExitStatus) -> Incident {
        let (now, several) = (Instant::now(), self.coordinators.len() > 1);
        let coordinator = &mut self.coordinators[index];
        coordinator.child = None;
        coordinator.restarts.retain(|then| now.duration_since(*then) < RESTART_WINDOW);
        // Who kills one of several, and that often, wants to see it come back; one that ends by itself does not get well.
        if !several || status.code().is_some() {
            coordinator.restarts.push_back(now);
        }
        let name = coordinator.name.clone();
        if coordinator.restarts.len() > RESTARTS_MAX {
            return Incident::Lost(self.ended_early(&name, status));
        }
        match self.start_coordinator(index, None) {
            Ok(pid) => Incident::CoordinatorRestarted { name, pid, why: how(status) },
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

    /// From now on what the program prints is an incident.
    pub fn listen(&mut self) {
        if let Some(worker) = &mut self.worker {
            worker.listens = true;
        }
    }

    /// Has a signal passed on to the program.
    pub fn pass_on(&self, signal: Signal) {
        if let Some(worker) = self.worker.as_ref().filter(|_| self.relay.is_some()) {
            worker.pass_on(signal);
        }
    }

    /// Nobody reads what the program writes to stdout, or stderr, any more: has it learn that.
    pub fn close(&mut self, stderr: bool) {
        if let Some(worker) = &mut self.worker {
            worker.close(stderr);
        }
    }

    /// The job is over: ends the worker, and hears what its program had printed before.
    pub async fn rest_of_output(&mut self, signals: &mut Signals, print: impl FnMut(Printed)) {
        if let Some(worker) = self.worker.take() {
            worker.finish(signals, print).await;
        }
    }

    /// Ends all: SIGTERM, then SIGKILL for what is still there after the grace, or at once when a signal comes meanwhile.
    pub async fn end(&mut self, signals: &mut Signals) {
        let worker = self.worker.take().map(|worker| worker.child);
        let coordinators = self.coordinators.iter_mut().filter_map(|coordinator| coordinator.child.take());
        let mut children: Vec<Child> = worker.into_iter().chain(coordinators).collect();
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

/// Whether stdin is the terminal of this session and another process group is in front there.
fn is_in_the_background() -> bool {
    tcgetpgrp(std::io::stdin()).is_ok_and(|front| front != getpgrp())
}

/// Whether a coordinator joined there, all the way.
fn is_member(dir: &Path) -> bool {
    let interrupted =
        std::fs::read_to_string(dir.join("joining.json")).is_ok_and(|joining| joining.contains("false"));
    dir.join("identity").exists() && !interrupted
}

/// Waits until one of the coordinators has ended.
async fn first_to_end(coordinators: &mut [Coordinator]) -> (usize, ExitStatus) {
    std::future::poll_fn(|context| {
        for (index, coordinator) in coordinators.iter_mut().enumerate() {
            let Some(child) = coordinator.child.as_mut() else { continue };
            if let Poll::Ready(status) = pin!(child.wait()).poll(context) {
                return Poll::Ready((index, status.unwrap_or_default()));
            }
        }
        Poll::Pending
    })
    .await
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
    fn an_interrupted_join_is_made_again() {
        let dir = tempfile::tempdir().unwrap();
        assert!(!is_member(dir.path()));
        std::fs::create_dir(dir.path().join("identity")).unwrap();
        std::fs::write(dir.path().join("joining.json"), "{\"complete\":false}").unwrap();
        assert!(!is_member(dir.path()));
        std::fs::write(dir.path().join("joining.json"), "{\"complete\":true}").unwrap();
        assert!(is_member(dir.path()));
    }

    #[test]
    fn an_exit_is_told_by_code_or_signal() {
        assert_eq!(how(ExitStatus::from_raw(3 << 8)), "exit code 3");
        assert_eq!(how(ExitStatus::from_raw(9)), "killed by SIGKILL");
    }
}
