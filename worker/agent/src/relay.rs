//! What programs print, passed on to the `fleet launch` that started this worker and shows it as if it ran them itself: byte for byte, in
//! frames on this worker's stdout. Who does not read on makes the programs wait, as a terminal would.

use fleet_common::codec;
use fleet_common::ids::Rank;
use fleet_common::protocol::Printed;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use tokio::net::unix::pipe;
use tokio::sync::{Mutex, watch};

/// What is made of a program's stdout and stderr.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Streams {
    Apart,
    /// Both end in the same place, so that they share one pipe and stay in the order in which they were written.
    Together,
}

/// The way to `fleet launch`. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Relay {
    pipe: Arc<Mutex<pipe::Sender>>,
    /// Nobody reads what programs write to their stdout, and to their stderr.
    unheard: watch::Sender<[bool; 2]>,
}

impl Relay {
    /// Over the stdout of this process, which must be a pipe. Within a runtime.
    pub fn over_stdout() -> io::Result<Relay> {
        let stdout = io::stdout().as_fd().try_clone_to_owned()?;
        let pipe = Arc::new(Mutex::new(pipe::Sender::from_owned_fd(stdout)?));
        Ok(Relay { pipe, unheard: watch::Sender::new([false; 2]) })
    }

    /// From now on programs find their stdout, or their stderr, closed.
    pub fn close(&self, stderr: bool) {
        self.unheard.send_modify(|unheard| unheard[usize::from(stderr)] = true);
    }

    /// Waits until that is so.
    pub async fn closed(&self, stderr: bool) {
        let closed = |unheard: &[bool; 2]| unheard[usize::from(stderr)];
        let _ = self.unheard.subscribe().wait_for(closed).await; // the sender is this one's
    }

    /// Returns when it is in the pipe: it is read also when this process is gone by then.
    pub async fn pass_on(&self, rank: Rank, stderr: bool, bytes: &[u8]) {
        let printed = Printed { rank, stderr, bytes: bytes.to_vec() };
        let mut pipe = self.pipe.lock().await;
        if let Err(error) = codec::write_frame(&mut *pipe, &printed).await {
            tracing::debug!(%error, "nobody reads what programs print");
        }
    }
}
