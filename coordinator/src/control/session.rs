//! One agent's connection: what it was told, and what of its events is under way. Pure bookkeeping; `agents` acts on it.

use fleet_common::events::EventBatch;
use fleet_common::ids::{Generation, JobId, NodeId};
use fleet_common::protocol::{AgentHello, Loan, Superseded, ToAgent};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// How far a connection has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// Connected, has not greeted.
    Silent,
    /// Has greeted; waits for a look at the state.
    Reading,
    /// The node's record is being set right.
    Describing,
    /// The record is as the greeting says.
    Described,
    /// The ends of gangs that it came back without are being recorded; this many are left.
    Recording { left: usize },
    /// They are recorded.
    Recorded,
    /// Welcomed.
    Up,
}

pub(super) struct AgentSession {
    pub node: NodeId,
    pub phase: Phase,
    /// The greeting must be over by then.
    pub deadline_ms: u64,
    pub hello: Option<AgentHello>,
    told: BTreeSet<Order>,
    /// What it was told that others may read at its node.
    pub loans: Vec<Loan>,
    /// What it was told that its node need not keep.
    pub superseded: Vec<Superseded>,
    queue: VecDeque<Piece>,
    /// Batches of the driver that are not given back.
    held: usize,
    /// The piece that is under way is the last one of its batch.
    recording: Option<bool>,
    /// Gangs that were asked to send again from here: what lies further is dropped until they do.
    expected: BTreeMap<(JobId, Generation), u64>,
    /// Nothing could be recorded; not before then again.
    pub retry_ms: u64,
}

/// A batch of events, or a part of one that was too large.
struct Piece {
    batch: EventBatch,
    last: bool,
}

/// An order that was sent on this connection already.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
enum Order {
    Start(JobId, Generation),
    Meet(JobId, Generation),
    Stop(JobId, Generation, bool),
    Other,
}

impl From<&ToAgent> for Order {
    fn from(order: &ToAgent) -> Order {
        match order {
            ToAgent::StartGang(gang) => Order::Start(gang.job, gang.generation),
            ToAgent::MeetPeers { job, generation, .. } => Order::Meet(*job, *generation),
            ToAgent::StopGang { job, generation, now } => Order::Stop(*job, *generation, *now),
            _ => Order::Other,
        }
    }
}

impl AgentSession {
    pub fn new(node: NodeId, deadline_ms: u64) -> AgentSession {
        AgentSession {
            node,
            phase: Phase::Silent,
            deadline_ms,
            hello: None,
            told: BTreeSet::new(),
            loans: Vec::new(),
            superseded: Vec::new(),
            queue: VecDeque::new(),
            held: 0,
            recording: None,
            expected: BTreeMap::new(),
            retry_ms: 0,
        }
    }

    /// The agent is this process.
    pub fn is_of(&self, process: u64) -> bool {
        self.hello.as_ref().is_some_and(|hello| hello.process == process)
    }

    /// The agent has these gangs already.
    pub fn knows(&mut self, gangs: &[(JobId, Generation)]) {
        self.told.extend(gangs.iter().map(|(job, generation)| Order::Start(*job, *generation)));
    }

    /// Whether this order was not sent on this connection before.
    pub fn is_news(&mut self, order: &ToAgent) -> bool {
        self.told.insert(Order::from(order))
    }

    /// Orders that are over are forgotten.
    pub fn remember_only(&mut self, orders: &[ToAgent]) {
        let standing: BTreeSet<Order> = orders.iter().map(Order::from).collect();
        self.told.retain(|order| standing.contains(order));
    }

    /// Takes a batch; returns how many the session holds.
    pub fn queue(&mut self, batch: EventBatch) -> usize {
        self.held += 1;
        self.queue.push_back(Piece { batch, last: true });
        self.held
    }

    /// The next piece to be recorded, if none is under way. `given_back` counts the batches that are done with because they lie
    /// behind a gap.
    pub fn next(&mut self, now_ms: u64, given_back: &mut usize) -> Option<EventBatch> {
        if self.phase != Phase::Up || self.recording.is_some() || now_ms < self.retry_ms {
            return None;
        }
        self.retry_ms = 0;
        while let Some(Piece { batch, last }) = self.queue.pop_front() {
            let gang = (batch.job, batch.generation);
            match self.expected.get(&gang) {
                Some(next_seq) if batch.first_seq > *next_seq => {
                    self.held -= usize::from(last);
                    *given_back += usize::from(last);
                }
                _ => {
                    self.expected.remove(&gang);
                    self.recording = Some(last);
                    return Some(batch);
                }
            }
        }
        None
    }

    /// The piece under way is recorded; returns whether its batch is done with.
    pub fn recorded(&mut self) -> bool {
        let last = self.recording.take().unwrap_or_default();
        self.held -= usize::from(last);
        last
    }

    /// Events before the piece under way are missing.
    pub fn gap(&mut self, job: JobId, generation: Generation, next_seq: u64) -> bool {
        self.expected.insert((job, generation), next_seq);
        self.recorded()
    }

    /// The piece under way was not recorded: it is tried again after `retry_ms`.
    pub fn put_back(&mut self, batch: EventBatch, retry_ms: u64) {
        let last = self.recording.take().unwrap_or_default();
        self.queue.push_front(Piece { batch, last });
        self.retry_ms = retry_ms;
    }

    /// The piece under way is too large for the log. False if it cannot be halved.
    pub fn halve(&mut self, mut batch: EventBatch) -> bool {
        if batch.events.len() < 2 {
            return false;
        }
        let last = self.recording.take().unwrap_or_default();
        let later = batch.events.split_off(batch.events.len() / 2);
        let first_seq = batch.first_seq + batch.events.len() as u64;
        let later = EventBatch { first_seq, events: later, ..batch.clone() };
        self.queue.push_front(Piece { batch: later, last });
        self.queue.push_front(Piece { batch, last: false });
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::tests::step;
    use fleet_common::events::Event;

    fn batch(first_seq: u64, events: u64) -> EventBatch {
        let event = |seq| Event { unix_ms: seq, body: step(seq) };
        let events = (first_seq..first_seq + events).map(event).collect();
        EventBatch { job: JobId(1), generation: 1, first_seq, events }
    }

    fn up() -> AgentSession {
        AgentSession { phase: Phase::Up, ..AgentSession::new(NodeId(1), 0) }
    }

    fn next(session: &mut AgentSession) -> Option<(u64, usize)> {
        session.next(0, &mut 0).map(|batch| (batch.first_seq, batch.events.len()))
    }

    #[test]
    fn one_piece_is_under_way_at_a_time_in_order() {
        let mut session = up();
        session.queue(batch(1, 2));
        assert_eq!(session.queue(batch(3, 1)), 2);
        assert_eq!(next(&mut session), Some((1, 2)));
        assert_eq!(next(&mut session), None);
        assert!(session.recorded());
        assert_eq!(next(&mut session), Some((3, 1)));
    }

    #[test]
    fn a_batch_that_is_too_large_goes_in_halves_and_is_given_back_once() {
        let mut session = up();
        session.queue(batch(1, 3));
        let whole = session.next(0, &mut 0).unwrap();
        assert!(session.halve(whole));
        assert_eq!(next(&mut session), Some((1, 1)));
        assert!(!session.recorded());
        let rest = session.next(0, &mut 0).unwrap();
        assert_eq!((rest.first_seq, rest.events.len()), (2, 2));
        assert!(session.halve(rest));
        assert_eq!(next(&mut session), Some((2, 1)));
        assert!(!session.recorded());
        let single = session.next(0, &mut 0).unwrap();
        assert!(!session.halve(single), "a single event cannot be halved");
    }

    #[test]
    fn what_lies_behind_a_gap_is_dropped_until_the_agent_sends_again() {
        let mut session = up();
        for first_seq in [5, 6, 7, 3, 8] {
            session.queue(batch(first_seq, 1));
        }
        assert_eq!(next(&mut session), Some((5, 1)));
        assert!(session.gap(JobId(1), 1, 3));
        let mut given_back = 0;
        let next_batch = session.next(0, &mut given_back).unwrap();
        assert_eq!((next_batch.first_seq, given_back), (3, 2));
        session.recorded();
        assert_eq!(next(&mut session), Some((8, 1)));
    }

    #[test]
    fn what_was_not_recorded_is_tried_again_later() {
        let mut session = up();
        session.queue(batch(1, 1));
        let first = session.next(0, &mut 0).unwrap();
        session.put_back(first, 200);
        assert!(session.next(199, &mut 0).is_none());
        assert_eq!(session.next(200, &mut 0).unwrap().first_seq, 1);
    }
}
