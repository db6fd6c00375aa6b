//! The leader has removed what is over the limits of the history.

use super::asks::{Asker, What};
use super::{Control, Now};
use crate::cluster::commands::{Change, Forget};
use crate::raft::disk::Disk;

/// Between looks: what is written meanwhile is little beside the limits.
const LOOK_EVERY_MS: u64 = 5_000;

#[derive(Default)]
pub(super) struct Forgets {
    looked_ms: u64,
    pub under_way: bool,
}

impl<D: Disk> Control<D> {
    pub(super) fn look_after_retention(&mut self, now: Now) {
        let idle = self.lead.is_none() || self.forgets.under_way;
        if idle || now.mono_ms.saturating_sub(self.forgets.looked_ms) < LOOK_EVERY_MS {
            return;
        }
        self.forgets.looked_ms = now.mono_ms;
        if self.replica.state().retention().is_due(now.unix_ms) {
            self.forgets.under_way = true;
            self.ask(now, Asker::History, What::change(None, Change::Forget(Forget)));
        }
    }
}
