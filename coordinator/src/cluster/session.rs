//! What makes a request that is sent twice happen once: the answers of each client, kept in the state until the client has them.
//!
//! A client is one process. It says with each change which answers it has, so an answer is dropped when nobody will ask for it again, and
//! never before while the client is remembered at all. What is remembered is bounded: the clients that were silent longest are forgotten,
//! by position in the log, because a clock would differ between replicas. A client says where the log was when it began, so one that was
//! forgotten is never taken for a new one: whether its request was done is then *unknown*, and it is not done again.

use super::Answer;
use fleet_common::ids::ClientId;
use fleet_common::protocol::CHANGES_IN_FLIGHT_MAX;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Bytes of memory for all that is remembered of clients: of 87,000 with one answer each. That is twice what all coordinators together can
/// have open (`control` holds this against its limits), and to be forgotten while it retries, for ten seconds, a client must be overtaken by
/// 8,000 new processes a second, more than coordinators can shake hands with.
pub const MEMORY_MAX: usize = 32 << 20;
/// What a client costs in memory, with both places that know it, and an answer without its text.
pub const SESSION_BYTES: usize = 320;
pub const ANSWER_BYTES: usize = 64;
/// A client is forgotten when the log has grown by this much since its last change: minutes at the highest rates, and a retry comes
/// within seconds.
pub const EXPIRE_AFTER: u64 = 1_000_000;

/// Identifies a request: the same on every retry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct RequestId {
    pub client: ClientId,
    pub seq: u64,
}

/// Whose request a command is, and what its client says of its others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stamp {
    pub id: RequestId,
    /// Answers to lower numbers are not asked for again.
    pub answered_below: u64,
    /// A position of the log before the client's first change.
    pub since: u64,
}

impl From<RequestId> for Stamp {
    /// Of one who does not know where the log is: a coordinator on its own behalf, a joiner. Where it was forgotten it is done again.
    fn from(id: RequestId) -> Stamp {
        Stamp { id, answered_below: id.seq, since: u64::MAX }
    }
}

/// What is remembered, and how much of it there may be.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(from = "Kept")]
pub struct Sessions {
    clients: BTreeMap<ClientId, Session>,
    /// No client that began after this position was ever forgotten.
    forgotten_to: u64,
    /// Clients by the log position of their last change, which is unique.
    #[serde(skip)]
    by_age: BTreeMap<u64, ClientId>,
    #[serde(skip)]
    bytes: usize,
    #[serde(skip)]
    bytes_max: usize,
}

/// What of it lies in snapshots; the rest follows.
#[derive(Deserialize)]
struct Kept {
    clients: BTreeMap<ClientId, Session>,
    forgotten_to: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Session {
    last_index: u64,
    /// Lower numbers are not asked for again.
    answered_below: u64,
    /// Of higher ones, in rising order.
    answers: Vec<(u64, Answer)>,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Lookup {
    New,
    Answered(Answer),
    /// Whether it was applied is not known any more.
    Forgotten,
    /// The client has more under way than it may.
    Crowded,
}

impl Default for Sessions {
    fn default() -> Sessions {
        Sessions::bounded(MEMORY_MAX)
    }
}

impl From<Kept> for Sessions {
    fn from(Kept { clients, forgotten_to }: Kept) -> Sessions {
        let by_age = clients.iter().map(|(id, session)| (session.last_index, *id)).collect();
        let bytes = clients.values().map(Session::bytes).sum();
        Sessions { clients, forgotten_to, by_age, bytes, bytes_max: MEMORY_MAX }
    }
}

impl Sessions {
    fn bounded(bytes_max: usize) -> Sessions {
        let (clients, by_age) = (BTreeMap::new(), BTreeMap::new());
        Sessions { clients, forgotten_to: 0, by_age, bytes: 0, bytes_max }
    }

    /// What is known of a request. Drops the answers that its client has.
    pub fn look_up(&mut self, stamp: &Stamp) -> Lookup {
        let RequestId { client, seq } = stamp.id;
        let Some(session) = self.clients.get_mut(&client) else {
            return match stamp.since < self.forgotten_to {
                true => Lookup::Forgotten,
                false => among(seq, stamp.answered_below),
            };
        };
        self.bytes -= session.acknowledge(stamp.answered_below);
        match session.answer(seq) {
            Some(answer) => Lookup::Answered(answer.clone()),
            None => among(seq, session.answered_below),
        }
    }

    /// Whether this request has been answered and its client has not said that it knows.
    pub fn has_answered(&self, id: RequestId) -> bool {
        self.clients.get(&id.client).is_some_and(|session| session.answer(id.seq).is_some())
    }

    /// Keeps the answer of a request that was looked up as new, which is at position `index` of the log.
    pub fn remember(&mut self, stamp: &Stamp, answer: Answer, index: u64) {
        let RequestId { client, seq } = stamp.id;
        let session = self.clients.entry(client).or_insert_with(|| {
            self.bytes += SESSION_BYTES;
            Session { answered_below: stamp.answered_below, ..Session::default() }
        });
        self.by_age.remove(&session.last_index);
        self.by_age.insert(index, client);
        session.last_index = index;
        self.bytes += cost(&answer);
        let place = session.answers.partition_point(|(known, _)| *known < seq);
        session.answers.insert(place, (seq, answer));
    }

    /// Forgets the clients that were silent for too long at log position `index`, and those for which there is no memory.
    pub fn expire(&mut self, index: u64) {
        while let Some(oldest) = self.by_age.first_entry() {
            if self.bytes <= self.bytes_max && oldest.key() + EXPIRE_AFTER >= index {
                break;
            }
            let (last_index, client) = oldest.remove_entry();
            if let Some(session) = self.clients.remove(&client) {
                self.bytes -= session.bytes();
            }
            self.forgotten_to = last_index;
        }
    }

    pub fn len(&self) -> usize {
        self.clients.len()
    }

    pub fn is_empty(&self) -> bool {
        self.clients.is_empty()
    }
}

/// What a number without an answer is, where those below `answered_below` have been answered.
fn among(seq: u64, answered_below: u64) -> Lookup {
    match seq.checked_sub(answered_below) {
        None => Lookup::Forgotten,
        Some(ahead) if ahead >= CHANGES_IN_FLIGHT_MAX => Lookup::Crowded,
        Some(_) => Lookup::New,
    }
}

impl Session {
    fn answer(&self, seq: u64) -> Option<&Answer> {
        let place = self.answers.binary_search_by_key(&seq, |(known, _)| *known).ok()?;
        Some(&self.answers[place].1)
    }

    /// Drops what the client has. Returns how many bytes that frees.
    fn acknowledge(&mut self, below: u64) -> usize {
        self.answered_below = self.answered_below.max(below);
        let known = self.answers.partition_point(|(seq, _)| *seq < self.answered_below);
        self.answers.drain(..known).map(|(_, answer)| cost(&answer)).sum()
    }

    fn bytes(&self) -> usize {
        SESSION_BYTES + self.answers.iter().map(|(_, answer)| cost(answer)).sum::<usize>()
    }
}

fn cost(answer: &Answer) -> usize {
    let text = match answer {
        Answer::Rejected(refusal) => refusal.message.len(),
        Answer::TokenCreated { id } => id.len(),
        _ => 0,
    };
    ANSWER_BYTES + text
}

#[cfg(test)]
mod tests;
