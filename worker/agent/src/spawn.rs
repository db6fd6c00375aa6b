//! The one thread that starts, strikes and reaps child processes, and lives as long as the process.
//!
//! `PR_SET_PDEATHSIG` fires when the thread that spawned ends, so no other thread may spawn. And because nothing else forks,
//! descriptors can be made inheritable here for the moment of a spawn without leaking into another child. A process id is only
//! used between its spawn and its reaping, both here, so no foreign process is ever struck.

use crate::container::{Container, MARK_ENV, Remains};
use crate::exec_rank;
use crate::gang::Blow;
use crate::panics::Vital;
use crate::processes::{self, Process};
use crate::verdict::Exit;
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill, killpg};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid, waitpid};
use nix::unistd::Pid;
use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
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
    /// Holds what is started.
    pub container: Container,
    /// Its stderr goes where its stdout does.
    pub one_pipe: bool,
    /// It reads what this agent was given to read.
    pub own_stdin: bool,
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
    /// Where it has one of its own.
    pub stderr: Option<ChildStderr>,
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
    Sweep(Box<Sweep>, oneshot::Sender<usize>),
    EndAll(Box<Remains>, mpsc::Sender<()>),
}

/// Something to be ended, wherever its processes are.
#[derive(Debug)]
pub struct Sweep {
    pub remains: Remains,
    /// No rank lives: whatever the agent, as their subreaper, has adopted belongs to none.
    pub adopted: bool,
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
            let _vital = Vital("thread that starts and reaps ranks");
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

    /// Ends what is left of a container. The answer is how many processes are still there after a while: they were struck and can do
    /// nothing any more, but the kernel does not let them go.
    pub fn sweep(&self, sweep: Sweep) -> oneshot::Receiver<usize> {
        let (reply, answer) = oneshot::channel();
        self.order(Order::Sweep(Box::new(sweep), reply));
        answer
    }

    /// Ends every child and all that is left of them, and waits until that is done.
    pub fn end_all(&self, remains: Remains) {
        let (done, wait) = mpsc::channel();
        self.order(Order::EndAll(Box::new(remains), done));
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
            Order::Sweep(sweep, reply) => {
                let left = self.sweep(&sweep);
                let _ = reply.send(left); // the agent ends
            }
            Order::EndAll(remains, done) => {
                let living = std::mem::take(&mut self.living);
                living.into_iter().for_each(|pid| signal_group(pid, Signal::SIGKILL));
                self.sweep(&Sweep { remains: *remains, adopted: true });
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
        let cgroup = launch.container.cgroup.as_ref().map_or(OsStr::new(""), |dir| dir.as_os_str());
        let mut command = Command::new(own_image);
        if launch.clear_env {
            command.env_clear();
        }
        command
            .arg0("worker")
            .args(exec_rank::arguments(std::process::id(), launch.dir.as_os_str(), cgroup, &launch.argv))
            // Whoever has it may join machines.
            .env_remove("FLEET_TOKEN")
            .envs(launch.env.iter().map(|(name, value)| (name, value)))
            .env(MARK_ENV, launch.container.marks())
            .stdin(if launch.own_stdin { Stdio::inherit() } else { Stdio::null() });
        let (stdout, stdout_end) = io::pipe()?;
        let (stderr, stderr_end) = match launch.one_pipe {
            true => (None, stdout_end.try_clone()?),
            false => io::pipe().map(|(stderr, end)| (Some(stderr), end))?,
        };
        command.stdout(stdout_end).stderr(stderr_end);
        for ((_, name), number) in launch.inherit.iter().zip(&inherited) {
            if let Some(name) = name {
                command.env(name, number.to_string());
            }
        }
        let pid = command.spawn()?.id();
        self.living.insert(pid);
        let (stdout, stderr) = (OwnedFd::from(stdout), stderr.map(OwnedFd::from));
        Ok(Started { pid, inherited, stdout: stdout.into(), stderr: stderr.map(Into::into) })
    }

    fn strike(&self, pid: u32, blow: Blow) {
        if !self.living.contains(&pid) {
            return;
        }
        match blow {
            Blow::HangUp => signal_group(pid, Signal::SIGHUP),
            Blow::Interrupt => signal_group(pid, Signal::SIGINT),
            Blow::User1 => signal_group(pid, Signal::SIGUSR1),
            Blow::User2 => signal_group(pid, Signal::SIGUSR2),
            Blow::Terminate => signal_group(pid, Signal::SIGTERM),
            Blow::Kill => {
                // While it lives, also what has left its group is known to descend from it.
                let tree = processes::trees(&processes::living(), |seen| seen.process.pid == pid);
                signal_group(pid, Signal::SIGKILL);
                tree.iter().for_each(|process| process.kill());
            }
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

    /// What is killed may have started others, or hand its children over, so this goes on until none is left.
    fn sweep(&mut self, sweep: &Sweep) -> usize {
        let end = Instant::now() + SWEEP_MAX;
        let mut pause = Duration::from_micros(200);
        loop {
            self.reap();
            let mut left = sweep.remains.kill();
            if sweep.adopted {
                let adopted = self.adopted();
                adopted.iter().for_each(|process| process.kill());
                left = left.max(adopted.len());
            }
            if left == 0 || Instant::now() > end {
                sweep.remains.remove();
                return left;
            }
            std::thread::sleep(pause);
            pause = (2 * pause).min(Duration::from_millis(20));
        }
    }

    /// Living children that were not spawned here, and what descends from them.
    fn adopted(&self) -> Vec<Process> {
        let me = std::process::id();
        processes::trees(&processes::living(), |seen| {
            seen.parent == me && !self.living.contains(&seen.process.pid)
        })
    }
}

/// To the process group that this child, which is not reaped, leads; in its first moment, before it does, to it alone.
fn signal_group(pid: u32, signal: Signal) {
    let pid = Pid::from_raw(pid as i32);
    // Gone in this moment: the reaping follows.
    if killpg(pid, signal) == Err(Errno::ESRCH) {
        let _ = kill(pid, signal);
    }
}
