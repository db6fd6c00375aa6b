//! The socket to the agent that started this rank: events go up, requests come down through a reader thread.

use fleet_common::codec;
use fleet_common::events::{Event, EventBody, Level};
use fleet_common::ids::Rank;
use fleet_common::protocol::{FromRank, RankStart, ToRank};
use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// What the agent asked for.
#[derive(Debug, Default)]
struct Inbox {
    stop: bool,
    /// Newest checkpoint step that the cluster recorded.
    committed: Option<u64>,
    /// The agent closed the socket.
    gone: bool,
}

#[derive(Debug, Default)]
struct Shared {
    inbox: Mutex<Inbox>,
    changed: Condvar,
}

#[derive(Debug)]
pub struct AgentLink {
    socket: UnixStream,
    shared: Arc<Shared>,
    rank: Rank,
}

impl AgentLink {
    /// Waits for the agent's first message.
    pub fn open(mut socket: UnixStream) -> io::Result<(AgentLink, RankStart)> {
        let start = match codec::read_frame_blocking::<_, ToRank>(&mut socket).map_err(io::Error::other)? {
            Some(ToRank::Start(start)) => *start,
            Some(other) => {
                return Err(io::Error::other(format!("the agent's first message is {other:?}, not Start")));
            }
            None => return Err(io::Error::other("the agent closed the socket before it said what to do")),
        };
        let shared = Arc::new(Shared::default());
        let reader = (socket.try_clone()?, shared.clone());
        std::thread::Builder::new().name("agent-link".into()).spawn(move || read(reader.0, &reader.1))?;
        Ok((AgentLink { socket, shared, rank: start.rank }, start))
    }

    /// Sends an event. That the agent is gone shows as a wish to stop.
    pub fn event(&mut self, body: EventBody) {
        let unix_ms = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64);
        self.send(&FromRank::Event(Event { unix_ms, body }));
    }

    pub fn log(&mut self, level: Level, line: impl Into<String>) {
        let rank = Some(self.rank);
        self.event(EventBody::Log { rank, level, line: line.into() });
    }

    pub fn send(&mut self, message: &FromRank) {
        if codec::write_frame_blocking(&mut self.socket, message).is_err() {
            self.inbox().gone = true;
        }
    }

    /// Whether to stop: asked, or left alone.
    pub fn stop_asked(&self) -> bool {
        let inbox = self.inbox();
        inbox.stop || inbox.gone
    }

    /// The newest checkpoint that is recorded.
    pub fn committed(&self) -> Option<u64> {
        self.inbox().committed
    }

    /// Waits until the checkpoint of `step` is recorded, at most `timeout`.
    pub fn wait_committed(&self, step: u64, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        let mut inbox = self.inbox();
        while inbox.committed.is_none_or(|committed| committed < step) && !inbox.gone {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            inbox = self.shared.changed.wait_timeout(inbox, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        !inbox.gone
    }

    fn inbox(&self) -> MutexGuard<'_, Inbox> {
        self.shared.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Ends the reader, and tells the agent.
impl Drop for AgentLink {
    fn drop(&mut self) {
        let _ = self.socket.shutdown(Shutdown::Both); // an agent that is gone needs no telling
    }
}

fn read(mut socket: UnixStream, shared: &Shared) {
    loop {
        let message = codec::read_frame_blocking::<_, ToRank>(&mut socket);
        let mut inbox = shared.inbox.lock().unwrap_or_else(PoisonError::into_inner);
        match message {
            Ok(Some(ToRank::Stop)) => inbox.stop = true,
            Ok(Some(ToRank::CheckpointCommitted { step })) => {
                inbox.committed = inbox.committed.max(Some(step))
            }
            Ok(Some(ToRank::Start(_))) => {}
            Ok(None) | Err(_) => inbox.gone = true,
        }
        shared.changed.notify_all();
        if inbox.gone {
            return;
        }
    }
}
