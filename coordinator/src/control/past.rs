//! Coordinators compare what they have committed. A majority that was put back to an older state may give a term a second time, to other
//! entries, and raft takes them for the same: it would go on from a past that is not the one of this coordinator.
//!
//! One asks the others when it starts, and again whom it begins to follow, about the last entry that it had committed before. It stops
//! where another one has something else there.

use super::{Action, Control, Now, PeerMessage};
use crate::raft::disk::Disk;
use crate::raft::landmark::Landmark;
use fleet_common::ids::ReplicaId;
use std::collections::BTreeMap;

/// Between two questions to those that have not answered: those that are asked before this coordinator takes part, and later.
const ASK_EVERY_MS: u64 = 200;
const ASK_AGAIN_MS: u64 = 1_000;

#[derive(Default)]
pub(super) struct Past {
    begun: bool,
    /// What was committed when it was looked last.
    index: u64,
    /// Who is asked what.
    open: BTreeMap<ReplicaId, Landmark>,
    asked_ms: Option<u64>,
}

impl<D: Disk> Control<D> {
    pub(super) fn look_after_past(&mut self, now: Now) {
        if !self.past.begun {
            self.past.begun = true;
            self.past.index = self.replica.commit_index();
            for other in self.others().collect::<Vec<_>>() {
                self.compare_past_with(other);
            }
        }
        let every_ms = if self.has_greeted() { ASK_AGAIN_MS } else { ASK_EVERY_MS };
        if self.past.asked_ms.is_some_and(|asked| now.mono_ms.saturating_sub(asked) < every_ms) {
            return;
        }
        self.past.asked_ms = Some(now.mono_ms);
        let mut open = std::mem::take(&mut self.past.open);
        open.retain(|to, _| self.others().any(|other| other == *to));
        for (to, landmark) in &open {
            self.out.push(Action::ToPeer { to: *to, message: PeerMessage::ComparePast(*landmark) });
        }
        self.past.open = open;
    }

    /// It leads from now on, or was not asked yet.
    pub(super) fn compare_past_with(&mut self, other: ReplicaId) {
        if let Some(landmark) = self.replica.landmark_at(self.past.index) {
            self.past.open.entry(other).or_insert(landmark);
        }
    }

    /// After every round, when it is known who leads.
    pub(super) fn note_past(&mut self) {
        self.past.index = self.replica.commit_index();
    }

    pub(super) fn past_is_compared(&mut self, from: ReplicaId, theirs: &Landmark) {
        let here = self.replica.instead_of(theirs);
        if here.as_ref() == Some(theirs) {
            self.contradicting.remove(&from);
        }
        self.out.push(Action::ToPeer { to: from, message: PeerMessage::Past(here) });
    }

    pub(super) fn take_past(&mut self, from: ReplicaId, theirs: Option<Landmark>) {
        self.past.open.remove(&from);
        if let Some(theirs) = theirs {
            self.replica.compare(from.0, &theirs);
            self.raft_touched = true;
        }
    }
}
