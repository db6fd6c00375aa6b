//! The end of a coordinator that was taken out. It serves nobody from then on, but goes on granting its vote for a while: others may not
//! know of the removal yet, count it among those of whom a majority is needed, and lose another one just then.

use super::{Action, Control, Now, PeerMessage};
use crate::raft::disk::Disk;
use fleet_common::ids::ReplicaId;
use std::collections::BTreeSet;

/// Between questions whether the others know.
const ASK_EVERY_MS: u64 = 250;
/// After the first answer. Who has not answered by then has failed, or hears of the removal from who has.
const FAREWELL_MS: u64 = 30_000;

pub(super) struct Leaving {
    pub why: String,
    /// Those on whose disks the removal is known to be committed.
    known_to: BTreeSet<ReplicaId>,
    first_known_ms: Option<u64>,
    asked_ms: Option<u64>,
    /// Nobody needs this coordinator any more.
    over: bool,
}

impl<D: Disk> Control<D> {
    /// This coordinator is none any more: it has applied its removal, or one who has says so.
    pub(super) fn leave(&mut self, now: Now) {
        if self.leaving.is_some() {
            return;
        }
        let why =
            format!("{} was removed from the cluster; join with a new token to take part again", self.me());
        self.refuse_all(&why);
        self.close_all_agents(&why);
        self.out.push(Action::Decided(format!("{why}; it ends when the others know")));
        let (known_to, first_known_ms, asked_ms) = (BTreeSet::new(), None, None);
        self.leaving = Some(Leaving { why, known_to, first_known_ms, asked_ms, over: false });
        self.look_after_leaving(now);
    }

    pub(super) fn removal_is_known_to(&mut self, now: Now, replica: ReplicaId) {
        self.leave(now);
        if let Some(leaving) = &mut self.leaving {
            leaving.known_to.insert(replica);
            leaving.first_known_ms.get_or_insert(now.mono_ms);
        }
        self.look_after_leaving(now);
    }

    pub(super) fn look_after_leaving(&mut self, now: Now) {
        let me = self.replica.id();
        let others = self.replica.conf().voters.iter().filter(|voter| **voter != me);
        let Some(leaving) = self.leaving.as_mut().filter(|leaving| !leaving.over) else { return };
        let unknown: Vec<ReplicaId> =
            others.map(|voter| ReplicaId(*voter)).filter(|voter| !leaving.known_to.contains(voter)).collect();
        let passed = |since_ms: u64, ms: u64| now.mono_ms.saturating_sub(since_ms) >= ms;
        if unknown.is_empty() || leaving.first_known_ms.is_some_and(|since| passed(since, FAREWELL_MS)) {
            leaving.over = true;
            self.out.push(Action::Removed(leaving.why.clone()));
        } else if leaving.asked_ms.is_none_or(|asked| passed(asked, ASK_EVERY_MS)) {
            leaving.asked_ms = Some(now.mono_ms);
            let ask = |to| Action::ToPeer { to, message: PeerMessage::Leaving };
            self.out.extend(unknown.into_iter().map(ask));
        }
    }

    pub(super) fn has_left(&self) -> bool {
        self.leaving.as_ref().is_some_and(|leaving| leaving.over)
    }
}
