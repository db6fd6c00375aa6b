//! Looks at a state that has everything which was acknowledged before the look was asked for (raft's ReadIndex, never a lease).
//!
//! All that are asked for between two rounds share one confirmation by the quorum. A confirmation may vanish: it is asked for again.

use super::{Call, Control, Now, PeerMessage, Session, Told};
use crate::control::Action;
use crate::raft::disk::Disk;
use crate::raft::replica::Ticket;
use fleet_common::ids::ReplicaId;
use fleet_common::protocol::Request;
use std::collections::{BTreeMap, VecDeque};

/// Without a confirmation for this long it is asked for again: a few round trips of a slow network.
const READ_RETRY_MS: u64 = 250;
/// Those who wait give up before.
const READ_DEADLINE_MS: u64 = 10_000;
/// Confirmations under way; later looks wait for the next one.
const BATCHES_MAX: usize = 16;
/// Looks that wait: one for each call and each greeting agent, and as many from the other coordinators.
const READERS_MAX: usize = 2 * (super::CALLS_MAX + super::AGENTS_MAX);

/// Looks in one round: the costly ones take a millisecond, and raft must not wait for more than some dozens of them.
const LOOKS_MAX: usize = 64;

/// Who wants to look.
pub(super) enum Reader {
    /// A query that was asked here.
    Query {
        ticket: Ticket,
        request: Box<Request>,
    },
    /// A query that was asked at another coordinator.
    PassedOn {
        from: ReplicaId,
        ticket: Ticket,
        request: Box<Request>,
    },
    Greeting(Session),
    Watch(Call),
    Output(Call),
    Join(Call),
    Look(Call),
}

struct Batch {
    readers: Vec<Reader>,
    since_ms: u64,
    asked_ms: u64,
}

#[derive(Default)]
pub(super) struct Reads {
    fresh: Vec<Reader>,
    batches: BTreeMap<Ticket, Batch>,
    /// May look now.
    ready: VecDeque<Reader>,
    waiting: usize,
}

impl Reads {
    pub fn add(&mut self, reader: Reader) {
        self.fresh.push(reader);
        self.waiting += 1;
    }

    /// A confirmation can be asked for in the next round.
    fn are_due(&self) -> bool {
        !self.fresh.is_empty() && self.batches.len() < BATCHES_MAX
    }

    /// Somebody waits who can be served by the next round.
    pub fn are_busy(&self) -> bool {
        self.are_due() || !self.ready.is_empty()
    }

    pub fn is_crowded(&self) -> bool {
        self.waiting >= READERS_MAX
    }

    fn confirmed(&mut self, ticket: Ticket) {
        let readers = self.batches.remove(&ticket).map_or_else(Vec::new, |batch| batch.readers);
        self.ready.extend(readers);
    }

    fn confirmed_all(&mut self) {
        let batches = std::mem::take(&mut self.batches);
        let fresh = std::mem::take(&mut self.fresh);
        self.ready.extend(batches.into_values().flat_map(|batch| batch.readers).chain(fresh));
    }

    fn next(&mut self) -> Option<Reader> {
        let reader = self.ready.pop_front()?;
        self.waiting -= 1;
        Some(reader)
    }
}

impl<D: Disk> Control<D> {
    /// Asks raft for the confirmations that are wanted.
    pub(super) fn ask_for_reads(&mut self, now: Now) {
        if self.reads.are_due() {
            let ticket = self.next_ticket();
            let readers = std::mem::take(&mut self.reads.fresh);
            let batch = Batch { readers, since_ms: now.mono_ms, asked_ms: now.mono_ms };
            self.reads.batches.insert(ticket, batch);
            self.replica.read_index(ticket);
        }
    }

    /// Asks again for those that may have vanished.
    pub(super) fn look_after_reads(&mut self, now: Now) {
        let Reads { batches, waiting, .. } = &mut self.reads;
        batches.retain(|_, batch| {
            let keep = now.mono_ms.saturating_sub(batch.since_ms) < READ_DEADLINE_MS;
            if !keep {
                *waiting -= batch.readers.len();
            }
            keep
        });
        for (ticket, batch) in batches {
            if now.mono_ms.saturating_sub(batch.asked_ms) >= READ_RETRY_MS {
                batch.asked_ms = now.mono_ms;
                self.replica.read_index(*ticket);
            }
        }
    }

    pub(super) fn confirmed_reads(&mut self, now: Now, tickets: Vec<Ticket>) {
        for ticket in tickets {
            self.reads.confirmed(ticket);
        }
        // Nobody else can have changed anything: a full disk does not keep a lone replica from answering.
        if self.replica.is_alone() && self.replica.full().is_some() {
            self.reads.confirmed_all();
        }
        for _ in 0..LOOKS_MAX {
            let Some(reader) = self.reads.next() else { break };
            self.look(now, reader);
        }
    }

    fn look(&mut self, now: Now, reader: Reader) {
        match reader {
            Reader::Query { ticket, request } => {
                // Whoever asked may have given up, or another one leads by now and is asked.
                if self.is_asked_here(ticket) {
                    let result = self.query(now, &request);
                    self.replied(now, ticket, result);
                }
            }
            Reader::PassedOn { from, ticket, request } => {
                let told = match self.query(now, &request) {
                    Ok(reply) => Told::Reply(Box::new(reply)),
                    Err(refusal) => Told::Refused(refusal),
                };
                self.out.push(Action::ToPeer { to: from, message: PeerMessage::Told { ticket, told } });
            }
            Reader::Greeting(session) => self.greeting_read(now, session),
            Reader::Watch(call) => self.watch_read(call),
            Reader::Output(call) => self.output_read(now, call),
            Reader::Join(call) => self.join_read(now, call),
            Reader::Look(call) => self.looked(call, Ok(())),
        }
    }
}
