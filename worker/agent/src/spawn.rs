//! The one thread that starts, strikes and reaps child processes, and lives as long as the process.
//!
//! `PR_SET_PDEATHSIG` fires when the thread that spawned ends, so no other thread may spawn. And because nothing else forks,
//! descriptors can be made inheritable here for the moment of a spawn without leaking into another child. A process id is only
//! used between its spawn and its reaping, both here, so no foreign process is ever struck.

use crate::exec_rank;
use crate::gang::Blow;
use crate::verdict::Exit;
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill, killpg};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid, waitpid};
use nix::unistd::Pid;
use std::collections::BTreeSet;
use std::ffi::OsString;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{ChildStderr, ChildStdout, Command, Stdio};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};
use tokio::sync::{mpsc as async_mpsc, oneshot};

/// Ending what a gang left behind takes at most this long; a process in an uninterruptible sleep is left to the kernel.
const SWEEP_MAX: Duration = Duration::from_secs(1);

/// What to start.
#[derive(Debug, Default)]
pub struct Launch {
    pub argv: Vec<OsString>,
    /// Set over the agent's own environment, or instead of it.
    pub env: Vec<(OsString, OsString)>,
    pub clear_env: bool,
    /// Empty: the agent's.
    pub dir: PathBuf,
    /// Descriptors to inherit. Each may name an environment variable that tells the child its number.
    pub inherit: Vec<(Arc<OwnedFd>, Option<&'static str>)>,
}

/// A process that runs.
#[derive(Debug)]
pub struct Started {
    pub pid: u32,
    /// The numbers that the child sees, in the order of `Launch::inherit`.
    pub inherited: Vec<i32>,
    pub stdout: ChildStdout,
    pub stderr: ChildStderr,
}

/// A child that was reaped. Its process group has been killed.
#[derive(Clone, Copy, Debug)]
pub struct Exited {
    pub pid: u32,
    pub exit: Exit,
    pub at: Instant,
}

enum Order {
    Spawn(Box<Launch>, oneshot::Sender<io::Result<Started>>),
    Strike(u32, Blow),
    Reap,
    Sweep,
    EndAll(mpsc::Sender<()>),
}

/// A handle to the thread.
#[derive(Clone, Debug)]
pub struct Spawner {
    orders: mpsc::Sender<Order>,
}

impl Spawner {
    /// Starts the thread. `exits` gets every child that `spawn` made, after it was reported as started.
    pub fn start(exits: async_mpsc::UnboundedSender<Exited>) -> io::Result<Spawner> {
        let (orders, inbox) = mpsc::channel();
        std::thread::Builder::new().name("spawner".to_owned()).spawn(move || {
            let mut children = Children { living: BTreeSet::new(), exits };
            while let Ok(order) = inbox.recv() {
                children.carry_out(order);
            }
        })?;
        Ok(Spawner { orders })
    }

    pub async fn spawn(&self, launch: Launch) -> io::Result<Started> {
        let (reply, answer) = oneshot::channel();
        self.order(Order::Spawn(Box::new(launch), reply));
        answer.await.unwrap_or_else(|_| Err(io::Error::other("the spawning thread is gone")))
    }

    /// To the child's whole process group. A child that is gone already is left alone.
    pub fn strike(&self, pid: u32, blow: Blow) {
        self.order(Order::Strike(pid, blow));
    }

    /// To be called after SIGCHLD.
    pub fn reap(&self) {
        self.order(Order::Reap);
    }

    /// Ends processes that ranks left behind and that have become the agent's children (it is their subreaper).
    pub fn sweep(&self) {
        self.order(Order::Sweep);
    }

    /// Ends every child and what it left behind, and waits until that is done.
    pub fn end_all(&self) {
        let (done, wait) = mpsc::channel();
        self.order(Order::EndAll(done));
        let _ = wait.recv_timeout(2 * SWEEP_MAX);
    }

    fn order(&self, order: Order) {
        // The thread ends only with the process.
        let _ = self.orders.send(order);
    }
}

struct Children {
    living: BTreeSet<u32>,
    exits: async_mpsc::UnboundedSender<Exited>,
}

impl Children {
    fn carry_out(&mut self, order: Order) {
        match order {
            Order::Spawn(launch, reply) => {
                let started = self.spawn(&launch);
                // If nobody waits any more, the child must not live on unseen.
                if let Err(Ok(orphan)) = reply.send(started) {
                    self.strike(orphan.pid, Blow::Kill);
                }
            }
            Order::Strike(pid, blow) => self.strike(pid, blow),
            Order::Reap => self.reap(),
            Order::Sweep => self.sweep(),
            Order::EndAll(done) => {
                let living = std::mem::take(&mut self.living);
                living.into_iter().for_each(|pid| {
                    let _ = killpg(Pid::from_raw(pid as i32), Signal::SIGKILL);
                });
                self.sweep();
                let _ = done.send(());
            }
        }
    }

    fn spawn(&mut self, launch: &Launch) -> io::Result<Started> {
        // `dup` gives descriptors that survive exec; they are closed here as soon as the child has its own.
        let inheritable: Vec<OwnedFd> =
            launch.inherit.iter().map(|(fd, _)| nix::unistd::dup(fd)).collect::<Result<_, _>>()?;
        let inherited: Vec<i32> = inheritable.iter().map(AsRawFd::as_raw_fd).collect();
        // The running image, also after it was replaced on disk.
        let own_image =
            if cfg!(target_os = "linux") { "/proc/self/exe".into() } else { std::env::current_exe()? };
        let mut command = Command::new(own_image);
        if launch.clear_env {
            command.env_clear();
        }
        command
            .arg0("worker")
            .args(exec_rank::arguments(std::process::id(), launch.dir.as_os_str(), &launch.argv))
            // Whoever has it may join machines.
            .env_remove("FLEET_TOKEN")
            .envs(launch.env.iter().map(|(name, value)| (name, value)))
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        for ((_, name), number) in launch.inherit.iter().zip(&inherited) {
            if let Some(name) = name {
                command.env(name, number.to_string());
            }
        }
        let mut child = command.spawn()?;
        let (Some(stdout), Some(stderr)) = (child.stdout.take(), child.stderr.take()) else {
            return Err(io::Error::other("the child has no pipes"));
        };
        self.living.insert(child.id());
        Ok(Started { pid: child.id(), inherited, stdout, stderr })
    }

    fn strike(&self, pid: u32, blow: Blow) {
        if self.living.contains(&pid) {
            let signal = match blow {
                Blow::Terminate => Signal::SIGTERM,
                Blow::Kill => Signal::SIGKILL,
            };
            let _ = killpg(Pid::from_raw(pid as i32), signal); // gone in this moment: the reaping follows
        }
    }

    fn reap(&mut self) {
        // Looking first and reaping after the group is killed: until then the group's number is taken.
        while let Ok(status) =
            waitid(Id::All, WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT)
        {
            let Some(pid) = status.pid() else { return };
            self.bury(pid);
        }
    }

    /// Reaps one dead child. One that was spawned here takes its process group along.
    fn bury(&mut self, pid: Pid) {
        let ours = self.living.remove(&(pid.as_raw() as u32));
        if ours {
            let _ = killpg(pid, Signal::SIGKILL);
        }
        let exit = match waitpid(pid, None) {
            Ok(WaitStatus::Exited(_, code)) => Exit::Code(code),
            Ok(WaitStatus::Signaled(_, signal, _)) => Exit::Signal(signal as i32),
            _ => return,
        };
        if ours {
            let _ = self.exits.send(Exited { pid: pid.as_raw() as u32, exit, at: Instant::now() });
        }
    }

    /// Killing one adopted child may hand over its children, so this goes on until none is left.
    fn sweep(&mut self) {
        let end = Instant::now() + SWEEP_MAX;
        loop {
            self.reap();
            let adopted: Vec<Pid> = children_of(std::process::id())
                .into_iter()
                .filter(|pid| !self.living.contains(pid))
                .map(|pid| Pid::from_raw(pid as i32))
                .collect();
            if adopted.is_empty() || Instant::now() > end {
                return;
            }
            for &pid in &adopted {
                let _ = kill(pid, Signal::SIGKILL);
            }
            for &pid in &adopted {
                while Instant::now() < end {
                    match waitpid(pid, Some(WaitPidFlag::WNOHANG)) {
                        Ok(WaitStatus::StillAlive) => std::thread::sleep(Duration::from_micros(200)),
                        Err(Errno::EINTR) => {}
                        _ => break,
                    }
                }
            }
        }
    }
}

/// Living and dead children of a process, from `/proc/PID/stat`; none where there is no `/proc`.
fn children_of(parent: u32) -> Vec<u32> {
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    let pids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let parent_of = |pid: u32| -> Option<u32> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // `pid (name that may hold spaces and parentheses) state ppid ...`
        stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
    };
    pids.filter(|&pid| parent_of(pid) == Some(parent)).collect()
}
