//! The worker of a launch, as its parent hears it: that it is registered, and what the program prints that it runs.

use super::signals::{Signal, Signals};
use fleet_common::codec;
use fleet_common::protocol::Printed;
use nix::sys::signal::{kill, killpg};
use nix::unistd::Pid;
use serde::Deserialize;
use std::process::ExitStatus;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, ChildStdout};
use tokio::sync::mpsc;

/// Pieces of output that are read ahead, each of at most 16 KiB; the rest waits in the pipe, and then the program does.
const PIECES_MAX: usize = 16;
/// How long it may take to end after SIGTERM.
const GRACE: Duration = Duration::from_secs(5);

pub struct Worker {
    pub child: Child,
    pub pid: u32,
    said: mpsc::Receiver<Said>,
    registered: bool,
    /// What its program prints is wanted: the job's number was said.
    pub listens: bool,
    /// It was told that nobody reads its program's stdout, and its stderr.
    unheard: [bool; 2],
}

/// What a worker says on stdout.
pub enum Said {
    Registered { node: String, pid: u32 },
    Printed(Printed),
}

/// The first line.
#[derive(Deserialize)]
struct Registered {
    node: String,
    pid: u32,
}

impl Worker {
    /// `child` has a pipe for its stdout.
    pub fn attend(mut child: Child) -> Worker {
        let (tell, said) = mpsc::channel(PIECES_MAX);
        if let Some(stdout) = child.stdout.take() {
            tokio::spawn(listen(BufReader::new(stdout), tell));
        }
        let pid = child.id().unwrap_or_default();
        Worker { child, pid, said, registered: false, listens: false, unheard: [false; 2] }
    }

    /// The next thing that it says; once it is gone and all that it had said was heard, how it ended. May be dropped and called again.
    pub async fn next(&mut self) -> Result<Said, ExitStatus> {
        if self.registered && !self.listens {
            return Err(self.child.wait().await.unwrap_or_default());
        }
        match self.said.recv().await {
            Some(said) => {
                self.registered |= matches!(said, Said::Registered { .. });
                Ok(said)
            }
            None => Err(self.child.wait().await.unwrap_or_default()),
        }
    }

    /// Has the signal passed on to the program, but for SIGTERM and SIGQUIT: then the cluster stops it, with a SIGTERM.
    pub fn pass_on(&self, signal: Signal) {
        if !matches!(signal, Signal::SIGTERM | Signal::SIGQUIT) {
            self.tell(signal);
        }
    }

    /// Has the program's stdout or stderr closed: its next write there fails, as in a pipeline whose reader is gone.
    pub fn close(&mut self, stderr: bool) {
        if !std::mem::replace(&mut self.unheard[usize::from(stderr)], true) {
            self.tell(if stderr { Signal::SIGIO } else { Signal::SIGPIPE });
        }
    }

    /// Before it is registered there is no program, and the signal might end the worker.
    fn tell(&self, signal: Signal) {
        if let Some(pid) = self.process().filter(|_| self.registered) {
            let _ = kill(pid, signal); // ended in this moment
        }
    }

    /// Ends it, when its job is over, and hears what is still on its way. A signal cuts that short.
    pub async fn finish(mut self, signals: &mut Signals, mut print: impl FnMut(Printed)) {
        self.listens = true;
        if let Some(pid) = self.process() {
            let _ = kill(pid, Signal::SIGTERM); // ended in this moment
        }
        let deadline = tokio::time::sleep(GRACE);
        tokio::pin!(deadline);
        loop {
            tokio::select! {
                said = self.next() => match said {
                    Ok(Said::Printed(printed)) => print(printed),
                    Ok(Said::Registered { .. }) => {}
                    Err(_) => return,
                },
                () = &mut deadline => {
                    if let Some(pid) = self.process() {
                        let _ = killpg(pid, Signal::SIGKILL); // ended in this moment
                    }
                    // What it had written is in the pipe.
                    while let Ok(said) = self.next().await {
                        if let Said::Printed(printed) = said {
                            print(printed);
                        }
                    }
                    return;
                }
                _ = signals.next() => break,
            }
        }
        if let Some(pid) = self.process() {
            let _ = killpg(pid, Signal::SIGKILL); // ended in this moment
        }
        let _ = self.child.wait().await;
    }

    /// `None` once it was waited for: its number may be another's.
    fn process(&self) -> Option<Pid> {
        self.child.id().and_then(|pid| i32::try_from(pid).ok()).map(Pid::from_raw)
    }
}

async fn listen(mut stdout: BufReader<ChildStdout>, tell: mpsc::Sender<Said>) {
    let mut line = String::new();
    if stdout.read_line(&mut line).await.is_err() {
        return;
    }
    let Ok(Registered { node, pid }) = serde_json::from_str(&line) else { return };
    let mut next = Some(Said::Registered { node, pid });
    while let Some(said) = next {
        if tell.send(said).await.is_err() {
            return; // nobody wants to hear it any more: the pipe goes, too
        }
        // A worker that was killed may have left half a frame.
        next = codec::read_frame(&mut stdout).await.ok().flatten().map(Said::Printed);
    }
}
