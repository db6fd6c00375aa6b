//! What makes a request that is sent twice happen once: each client's last answers, kept in the state.
//!
//! Bounded, and expiring by position in the log, because a clock would differ between replicas.

use super::Answer;
use fleet_common::ids::ClientId;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Answers kept per client: as many requests as a client may have under way at once.
pub const ANSWERS_PER_CLIENT: usize = 32;
/// Clients remembered; beyond it the one that was silent longest is forgotten.
pub const CLIENTS_MAX: usize = 10_000;
/// A client is forgotten when the log has grown by this much since its last request: hours at the highest rates, and a retry comes
/// within seconds.
pub const EXPIRE_AFTER: u64 = 1_000_000;

/// Identifies a request: the same on every retry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct RequestId {
    pub client: ClientId,
    pub seq: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Sessions {
    clients: BTreeMap<ClientId, Session>,
    /// Clients by the log position of their last request, which is unique.
    by_age: BTreeMap<u64, ClientId>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Session {
    last_index: u64,
    /// By sequence number.
    answers: BTreeMap<u64, Answer>,
    /// Answers up to here were dropped to make room.
    dropped: u64,
}

pub enum Lookup {
    New,
    Answered(Answer),
    /// Too old to know whether it was applied.
    Forgotten,
}

impl Sessions {
    pub fn look_up(&self, request: RequestId) -> Lookup {
        let Some(session) = self.clients.get(&request.client) else { return Lookup::New };
        match session.answers.get(&request.seq) {
            Some(answer) => Lookup::Answered(answer.clone()),
            None if request.seq <= session.dropped => Lookup::Forgotten,
            None => Lookup::New,
        }
    }

    pub fn remember(&mut self, request: RequestId, answer: Answer, index: u64) {
        let session = self.clients.entry(request.client).or_default();
        self.by_age.remove(&session.last_index);
        session.last_index = index;
        session.answers.insert(request.seq, answer);
        while session.answers.len() > ANSWERS_PER_CLIENT {
            if let Some((seq, _)) = session.answers.pop_first() {
                session.dropped = seq;
            }
        }
        self.by_age.insert(index, request.client);
    }

    /// Forgets the clients that were silent for too long at log position `index`.
    pub fn expire(&mut self, index: u64) {
        while let Some(oldest) = self.by_age.first_entry() {
            if self.clients.len() <= CLIENTS_MAX && oldest.key() + EXPIRE_AFTER >= index {
                break;
            }
            self.clients.remove(&oldest.remove());
        }
    }

    pub fn len(&self) -> usize {
        self.clients.len()
    }

    pub fn is_empty(&self) -> bool {
        self.clients.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(client: u128, seq: u64) -> RequestId {
        RequestId { client: ClientId(client), seq }
    }

    #[test]
    fn the_oldest_answers_are_dropped_and_not_mistaken_for_new_requests() {
        let mut sessions = Sessions::default();
        for seq in 1..=ANSWERS_PER_CLIENT as u64 + 2 {
            sessions.remember(id(1, seq), Answer::Done, seq);
        }
        assert!(matches!(sessions.look_up(id(1, 1)), Lookup::Forgotten));
        assert!(matches!(sessions.look_up(id(1, 2)), Lookup::Forgotten));
        assert!(matches!(sessions.look_up(id(1, 3)), Lookup::Answered(_)));
        assert!(matches!(sessions.look_up(id(1, 99)), Lookup::New));
        assert!(matches!(sessions.look_up(id(2, 1)), Lookup::New));
    }

    #[test]
    fn a_silent_client_expires_by_log_position() {
        let mut sessions = Sessions::default();
        sessions.remember(id(1, 1), Answer::Done, 10);
        sessions.remember(id(2, 1), Answer::Done, 11);
        sessions.expire(10 + EXPIRE_AFTER);
        assert_eq!(sessions.len(), 2);
        sessions.expire(11 + EXPIRE_AFTER);
        assert_eq!(sessions.len(), 1);
        assert!(matches!(sessions.look_up(id(2, 1)), Lookup::Answered(_)));
    }

    #[test]
    fn the_number_of_clients_is_bounded() {
        let mut sessions = Sessions::default();
        for n in 0..CLIENTS_MAX as u64 + 5 {
            sessions.remember(id(n.into(), 1), Answer::Done, n + 1);
            sessions.expire(n + 1);
        }
        assert_eq!(sessions.len(), CLIENTS_MAX);
        assert!(matches!(sessions.look_up(id(0, 1)), Lookup::New));
    }
}
