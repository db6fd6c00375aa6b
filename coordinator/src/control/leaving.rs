//! The end of a coordinator that was taken out. It serves nobody from then on, but goes on granting its vote for a while: others may not
//! know of the removal yet, count it among those of whom a majority is needed, and lose another one just then. Who knows refuses its
//! connections, and so it hears of it.

use super::{Action, Control, Now};
use crate::cluster::admitted::cut_off;
use crate::raft::disk::Disk;
use fleet_common::ids::ReplicaId;
use fleet_common::protocol::Member;
use std::collections::BTreeSet;

/// After a majority is known to know. The rest has failed, or hears of the removal from those.
const FAREWELL_MS: u64 = 30_000;

pub(super) struct Leaving {
    pub why: String,
    /// Those on whose disks the removal is known to be committed.
    known_to: BTreeSet<ReplicaId>,
    /// When these were a majority of the others.
    known_ms: Option<u64>,
    /// Nobody needs this coordinator any more.
    over: bool,
}

impl<D: Disk> Control<D> {
    /// This coordinator is none any more: it has applied its removal, or one who has says so.
    pub(super) fn leave(&mut self, now: Now) {
        if self.leaving.is_some() {
            return;
        }
        let why = cut_off(Member::Coordinator(self.me()));
        self.refuse_all(&why);
        self.close_all_agents(&why);
        self.out.push(Action::Decided(format!("{why}; it ends when the others know")));
        self.leaving = Some(Leaving { why, known_to: BTreeSet::new(), known_ms: None, over: false });
        self.look_after_leaving(now);
    }

    pub(super) fn removal_is_known_to(&mut self, now: Now, replica: ReplicaId) {
        self.leave(now);
        if let Some(leaving) = &mut self.leaving {
            leaving.known_to.insert(replica);
        }
        self.look_after_leaving(now);
    }

    pub(super) fn look_after_leaving(&mut self, now: Now) {
        let me = self.replica.id();
        let others: Vec<u64> =
            self.replica.conf().voters.iter().copied().filter(|voter| *voter != me).collect();
        let Some(leaving) = self.leaving.as_mut().filter(|leaving| !leaving.over) else { return };
        let known = others.iter().filter(|voter| leaving.known_to.contains(&ReplicaId(**voter))).count();
        if known > others.len() / 2 {
            leaving.known_ms.get_or_insert(now.mono_ms);
        }
        let late = |since_ms: u64| now.mono_ms.saturating_sub(since_ms) >= FAREWELL_MS;
        if known == others.len() || leaving.known_ms.is_some_and(late) {
            leaving.over = true;
            self.out.push(Action::Removed(leaving.why.clone()));
        }
    }

    pub(super) fn has_left(&self) -> bool {
        self.leaving.as_ref().is_some_and(|leaving| leaving.over)
    }
}
