//! What coordinators tell each other of their disks. One that has just started asks the others what they have seen of its own, and takes
//! no part in raft before: a disk that was put back to an older state is found before it gives a vote away, and before it is brought up
//! to date, which would hide what it forgot. Whom it does not know from its own disk, which may be of a time with other members, it asks
//! when that one speaks. The leader tells what it learns to all.

use super::{Action, Control, Now, PeerMessage};
use crate::raft::disk::Disk;
use crate::raft::log::LogError;
use crate::raft::marks::Mark;
use crate::raft::replica::ReplicaError;
use fleet_common::ids::ReplicaId;
use std::collections::{BTreeMap, BTreeSet};

/// When a majority has answered, the others get so long.
const STRAGGLERS_MS: u64 = 500;
/// One that hears nothing from a majority, or from one that speaks to it, takes part after this long all the same: some of those that it
/// knew may be gone for good.
const GREETING_MS: u64 = 3_000;
/// Between two questions to those that have not answered.
const ASK_EVERY_MS: u64 = 200;
/// Between two times that what is new is told.
const TELL_EVERY_MS: u64 = 1_000;

pub(super) struct Greeting {
    begun_ms: u64,
    asked_ms: Option<u64>,
    answered: BTreeSet<ReplicaId>,
    /// Who spoke of raft before having told its marks: when first, and when it was asked for them last.
    spoke_ms: BTreeMap<ReplicaId, (u64, u64)>,
    over: bool,
    told_ms: u64,
    told: Vec<(ReplicaId, Mark)>,
}

impl Greeting {
    pub fn new(now: Now) -> Greeting {
        Greeting {
            begun_ms: now.mono_ms,
            asked_ms: None,
            answered: BTreeSet::new(),
            spoke_ms: BTreeMap::new(),
            over: false,
            told_ms: now.mono_ms,
            told: Vec::new(),
        }
    }
}

impl<D: Disk> Control<D> {
    /// Whether this coordinator takes part in raft already.
    pub(super) fn has_greeted(&self) -> bool {
        self.greeting.over
    }

    /// Whether it does with this one, who speaks. If that one has not told its marks, it is asked for them.
    pub(super) fn takes_part_with(&mut self, now: Now, from: ReplicaId) -> bool {
        if self.greeting.answered.contains(&from) {
            return self.has_greeted();
        }
        let known = self.greeting.spoke_ms.get(&from).copied();
        let (first_ms, asked_ms) = known.unwrap_or((now.mono_ms, now.mono_ms));
        if known.is_none() || now.mono_ms.saturating_sub(asked_ms) >= ASK_EVERY_MS {
            self.greeting.spoke_ms.insert(from, (first_ms, now.mono_ms));
            self.tell_marks(from, true);
        }
        self.has_greeted() && now.mono_ms.saturating_sub(first_ms) >= GREETING_MS
    }

    pub(super) fn look_after_greeting(&mut self, now: Now) {
        let age = |since_ms: u64| now.mono_ms.saturating_sub(since_ms);
        self.greeting.over |= self.has_heard_enough(age(self.greeting.begun_ms));
        if !self.greeting.over && self.greeting.asked_ms.is_none_or(|asked| age(asked) >= ASK_EVERY_MS) {
            self.greeting.asked_ms = Some(now.mono_ms);
            let silent = self.asked().into_iter().filter(|id| !self.greeting.answered.contains(id));
            for to in silent.collect::<Vec<_>>() {
                self.tell_marks(to, true);
            }
        } else if self.lead.is_some() && age(self.greeting.told_ms) >= TELL_EVERY_MS {
            self.greeting.told_ms = now.mono_ms;
            let marks = self.marks();
            if marks != self.greeting.told {
                for to in self.others().collect::<Vec<_>>() {
                    self.tell_marks(to, false);
                }
                self.greeting.told = marks;
            }
        }
    }

    /// All have told their marks, or enough of them and it was time; for one that knows no members, anybody is enough.
    fn has_heard_enough(&self, age_ms: u64) -> bool {
        let (me, voters) = (self.me(), &self.replica.conf().voters);
        let answered = &self.greeting.answered;
        let known = voters.iter().filter(|id| **id == me.0 || answered.contains(&ReplicaId(**id))).count();
        let enough = if voters.is_empty() { !answered.is_empty() } else { known > voters.len() / 2 };
        let all = enough && self.asked().is_subset(answered);
        all || enough && age_ms >= STRAGGLERS_MS || age_ms >= GREETING_MS
    }

    /// Who has something to tell before this coordinator takes part.
    fn asked(&self) -> BTreeSet<ReplicaId> {
        self.others().chain(self.greeting.spoke_ms.keys().copied()).collect()
    }

    /// Whom this coordinator knows of.
    pub(super) fn others(&self) -> impl Iterator<Item = ReplicaId> {
        let (me, conf) = (self.me(), self.replica.conf());
        let members = conf.voters.iter().chain(&conf.learners).map(|id| ReplicaId(*id));
        let seeds = self.myself.seeds.iter().copied().filter(|_| !self.is_member());
        members.chain(seeds).filter(move |id| *id != me)
    }

    fn marks(&self) -> Vec<(ReplicaId, Mark)> {
        self.replica.marks().into_iter().map(|(id, mark)| (ReplicaId(id), mark)).collect()
    }

    fn tell_marks(&mut self, to: ReplicaId, asks: bool) {
        self.out.push(Action::ToPeer { to, message: PeerMessage::Marks { marks: self.marks(), asks } });
    }

    pub(super) fn take_marks(
        &mut self,
        now: Now,
        from: ReplicaId,
        marks: Vec<(ReplicaId, Mark)>,
        asks: bool,
    ) {
        let marks: Vec<(u64, Mark)> = marks.into_iter().map(|(id, mark)| (id.0, mark)).collect();
        self.replica.shown(from.0, &marks);
        self.raft_touched = true;
        if asks {
            self.tell_marks(from, false);
        }
        self.greeting.answered.insert(from);
        self.greeting.spoke_ms.remove(&from);
        self.look_after_greeting(now);
    }

    /// This coordinator has found what concerns all.
    pub(super) fn say_last_words(
        &mut self,
        error: &ReplicaError,
        send: &mut dyn FnMut(ReplicaId, PeerMessage),
    ) {
        let (ReplicaError::Contradicted(why) | ReplicaError::Log(LogError::Damaged(why))) = error else {
            return;
        };
        for to in self.others() {
            send(to, PeerMessage::Stops { why: why.clone() });
        }
    }
}
