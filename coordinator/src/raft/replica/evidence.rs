//! Evidence that a disk was put back to an older state: marks of what replicas have shown each other, and messages that contradict what
//! is committed here.

use super::{Doom, Mark, Replica};
use crate::cluster::State;
use crate::raft::disk::Disk;
use crate::raft::landmark::Landmark;
use crate::raft::log::Position;
use raft::eraftpb::{Message, MessageType};
use raft::{GetEntriesContext, StateRole};

/// Between two writes of the marks: they are lost with the machine at worst, never with the process for long.
const MARKS_EVERY_TICKS: u64 = 4;

impl<D: Disk> Replica<D> {
    /// What is known of all replicas' disks.
    pub fn marks(&self) -> Vec<(u64, Mark)> {
        self.marks.iter().collect()
    }

    /// Another replica tells what it knows. Returns whether it was news; this replica must stop when it has less than it showed.
    pub fn shown(&mut self, from: u64, marks: &[(u64, Mark)]) -> bool {
        let mut news = false;
        for (id, mark) in marks.iter().copied() {
            news |= self.takes_part(id) && self.marks.raise(id, mark);
        }
        self.marks_changed |= news;
        if let Some(what) = self.forgotten(self.marks.of(self.id())).filter(|_| !self.is_halted()) {
            self.doomed = Some(Doom::Forgot(format!("replica-{from} has seen that {what}")));
        }
        news
    }

    /// What this replica has shown and does not have.
    fn forgotten(&self, mark: Mark) -> Option<String> {
        let last = self.node.raft.raft_log.last_index();
        let Position { index, term } = mark.at;
        if mark.term > self.term() {
            return Some(format!("it spoke in term {} and its disk knows {}", mark.term, self.term()));
        }
        if index > last {
            return Some(format!("it acknowledged entry {index}, and its log ends at {last}"));
        }
        let other = self.known_term(index).filter(|known| *known != term)?;
        Some(format!("it acknowledged entry {index} of term {term}, and has one of term {other} there"))
    }

    /// Of an entry that is in the log here.
    fn known_term(&self, index: u64) -> Option<u64> {
        self.node.raft.raft_log.term(index).ok().filter(|term| *term > 0)
    }

    /// What is in the log here, if it reaches there.
    pub fn landmark_at(&self, index: u64) -> Option<Landmark> {
        let log = &self.node.raft.raft_log;
        if self.is_halted() || !(log.first_index()..=log.last_index()).contains(&index) {
            return None;
        }
        let entries = log.slice(index, index + 1, None, GetEntriesContext::empty(false)).ok()?;
        entries.first().map(Landmark::of)
    }

    /// What is here in the place of what another replica has committed. An entry of another term that is not committed here is no answer: the
    /// next leader replaces it.
    pub fn instead_of(&self, theirs: &Landmark) -> Option<Landmark> {
        let settled =
            |here: &Landmark| here.at.index <= self.commit_index() || here.at.term == theirs.at.term;
        self.landmark_at(theirs.at.index).filter(settled)
    }

    /// Another replica has this. This one must stop where its past is another one.
    pub fn compare(&mut self, from: u64, theirs: &Landmark) {
        let Some(here) = self.landmark_at(theirs.at.index).filter(|here| here != theirs) else { return };
        let (Position { index, term }, own) = (theirs.at, here.at.term);
        let what = if term == own {
            format!("replica-{from} has another entry {index} of term {term} than is committed here")
        } else if index <= self.commit_index() {
            format!(
                "replica-{from} has entry {index} of term {term}, where one of term {own} is committed here"
            )
        } else {
            return;
        };
        self.doomed.get_or_insert(Doom::Contradicted(what));
    }

    fn takes_part(&self, id: u64) -> bool {
        id == self.id() || self.conf.voters.contains(&id) || self.conf.learners.contains(&id)
    }

    /// The sender's disk knows the term in which it speaks. Not so when it only asks how an election would end; and one that votes alone
    /// speaks before it has written.
    pub(super) fn note_term(&mut self, message: &Message) {
        use MessageType::{MsgRequestPreVote, MsgRequestPreVoteResponse};
        let asks = [MsgRequestPreVote, MsgRequestPreVoteResponse].contains(&message.get_msg_type());
        if !asks && self.conf.voters.len() > 1 && self.takes_part(message.from) {
            let mark = Mark { term: message.term, at: Position::default() };
            self.marks_changed |= self.marks.raise(message.from, mark);
        }
    }

    /// The leader alone knows what the others have acknowledged.
    pub(super) fn note_acknowledged(&mut self) {
        if self.node.raft.state != StateRole::Leader {
            return;
        }
        let committed = self.commit_index();
        let reached = |(id, matched): (u64, u64)| (id, matched.min(committed));
        let progress = self.node.raft.prs().iter().map(|(id, progress)| reached((*id, progress.matched)));
        let risen = progress.filter(|(id, index)| *index > self.marks.of(*id).at.index);
        for (id, index) in risen.collect::<Vec<_>>() {
            if let Some(term) = self.known_term(index).filter(|_| self.takes_part(id)) {
                self.marks_changed |= self.marks.raise(id, Mark { term: 0, at: Position { index, term } });
            }
        }
    }

    pub(super) fn marks_are_due(&mut self) -> bool {
        let due = self.marks_changed && self.ticks >= self.marks_written + MARKS_EVERY_TICKS;
        if due {
            let (me, conf) = (self.id(), &self.conf);
            self.marks.keep_only(|id| id == me || conf.voters.contains(&id) || conf.learners.contains(&id));
        }
        due
    }

    /// What is committed here and another past stands for in this state, which a leader offers in its place.
    pub(super) fn lost_past(&self, from: u64, state: &State) -> Option<String> {
        let index = self.commit_index();
        let here = self.known_term(index)?;
        let term = state.epochs().term_at(index).filter(|term| *term != here)?;
        Some(format!(
            "the snapshot of replica-{from} has entry {index} of term {term}, where one of term {here} is committed here"
        ))
    }

    /// What a leader of this or a later term says of entries that are committed here must be what they are.
    pub(super) fn contradiction(&self, message: &Message) -> Option<String> {
        let kind = message.get_msg_type();
        if message.term < self.term() {
            return None;
        }
        let said: Vec<(u64, u64)> = match kind {
            MessageType::MsgAppend => {
                let entries = message.entries.iter().map(|entry| (entry.index, entry.term));
                entries.chain([(message.index, message.log_term)]).collect()
            }
            MessageType::MsgSnapshot => {
                let metadata = message.get_snapshot().get_metadata();
                vec![(metadata.index, metadata.term)]
            }
            _ => return None,
        };
        let committed = said.into_iter().filter(|(index, _)| *index <= self.commit_index());
        let mut wrong = committed.filter_map(|(index, term)| {
            let here = self.known_term(index).filter(|here| *here != term)?;
            Some(format!(
                "replica-{} leads in term {} and has entry {index} of term {term}, where one of term {here} is committed here",
                message.from, message.term
            ))
        });
        wrong.next()
    }
}
