//! What makes a change happen once, however often it is sent: this process is a client of its own, and numbers its changes.
//!
//! Nothing of it is kept on disk. A process that dies takes its numbers along; who wants to repeat a submit in another process gives it a
//! name (`fleet submit --id`).

use crate::failure::Failure;
use fleet_common::ids::ClientId;
use fleet_common::protocol::{ClientFrame, Request};
use rand::TryRngCore;
use std::time::{Duration, Instant};

/// A client that was silent for longer begins anew: the cluster forgets those that others have overtaken, and then cannot tell whether a
/// change of theirs was made.
const IDLE_MAX: Duration = Duration::from_secs(30);

/// One after the other: a change is sent when the one before was answered or given up.
pub struct Session {
    client: ClientId,
    /// Where the log was before the first change.
    since: u64,
    next: u64,
    used: Instant,
}

impl Session {
    /// `since`: a position of the log that the cluster told just now.
    pub fn begin(since: u64) -> Result<Session, Failure> {
        let mut id = [0; 16];
        rand::rngs::OsRng
            .try_fill_bytes(&mut id)
            .map_err(|e| Failure::environment(format!("the operating system gave no random bytes: {e}")))?;
        Ok(Session { client: ClientId(u128::from_be_bytes(id)), since, next: 1, used: Instant::now() })
    }

    pub fn is_idle(&self) -> bool {
        self.used.elapsed() > IDLE_MAX
    }

    /// The next change. On a retry the same frame is sent again.
    pub fn number(&mut self, request: Request) -> ClientFrame {
        let seq = self.next;
        self.next += 1;
        self.used = Instant::now();
        ClientFrame { since: self.since, ..ClientFrame::change(self.client, seq, request) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fleet_common::ids::NodeId;

    #[test]
    fn every_process_is_another_client_and_every_change_another_number() {
        let (mut one, mut other) = (Session::begin(7).unwrap(), Session::begin(7).unwrap());
        let frame = |session: &mut Session| session.number(Request::Undrain(NodeId(1)));
        let (first, second, foreign) = (frame(&mut one), frame(&mut one), frame(&mut other));
        assert_eq!((first.seq, first.answered_below, first.since), (1, 1, 7));
        assert_eq!((second.seq, second.answered_below, second.client), (2, 2, first.client));
        assert_ne!(foreign.client, first.client);
    }
}
