//! Snapshots in chunks. A replica that needs one asks the leader for it piece by piece, one under way at a time; the leader answers
//! from its disk. Where one is lost, it is asked for again, and goes on where it stopped.

use super::{Action, Control, Now, PeerMessage};
use crate::raft::disk::Disk;
use crate::raft::replica::ReplicaError;
use crate::raft::transfer::{Chunk, Cut, Fetch};
use fleet_common::ids::ReplicaId;
use std::collections::BTreeMap;

/// A chunk that has not come after this long is asked for again.
const CHUNK_RETRY_MS: u64 = 1_000;

#[derive(Default)]
pub(super) struct Transfers {
    /// What others want of this replica, the newest wish of each.
    wanted: BTreeMap<ReplicaId, Fetch>,
    /// What has come and is not taken yet: one, because one is under way.
    arrived: Option<(ReplicaId, Chunk)>,
    /// What was asked for, of whom and when.
    asked: Option<(u64, Fetch, u64)>,
}

impl Transfers {
    pub fn want(&mut self, from: ReplicaId, fetch: Fetch) {
        self.wanted.insert(from, fetch);
    }

    pub fn arrived(&mut self, from: ReplicaId, chunk: Chunk) {
        self.arrived = Some((from, chunk));
    }
}

impl<D: Disk> Control<D> {
    /// Before raft's round: what has come may complete a snapshot.
    pub(super) fn take_chunk(&mut self) -> Result<(), ReplicaError> {
        match self.transfers.arrived.take() {
            Some((from, chunk)) => {
                let known = self.replica.unreadable_snapshot().map(str::to_owned);
                self.replica.take_chunk(from.0, chunk)?;
                if let Some(what) = self.replica.unreadable_snapshot()
                    && known.as_deref() != Some(what)
                {
                    self.out.push(Action::Alarm(what.to_owned()));
                }
                Ok(())
            }
            None => Ok(()),
        }
    }

    /// After raft's round: answers what others want, and asks for what is wanted here.
    pub(super) fn exchange_chunks(&mut self, now: Now) -> Result<(), ReplicaError> {
        for (to, fetch) in std::mem::take(&mut self.transfers.wanted) {
            match self.replica.serve(to.0, &fetch)? {
                Cut::Chunk(chunk) => {
                    self.out.push(Action::ToPeer { to, message: PeerMessage::Chunk(Box::new(chunk)) });
                }
                Cut::Damaged(damage) => self.damage_found(damage),
            }
        }
        let Some((from, fetch)) = self.replica.wants() else {
            self.transfers.asked = None;
            return Ok(());
        };
        let under_way = self.transfers.asked.as_ref().is_some_and(|(whom, what, since_ms)| {
            (*whom, what) == (from, &fetch) && now.mono_ms.saturating_sub(*since_ms) < CHUNK_RETRY_MS
        });
        if !under_way {
            self.transfers.asked = Some((from, fetch.clone(), now.mono_ms));
            self.out.push(Action::ToPeer { to: ReplicaId(from), message: PeerMessage::Fetch(fetch) });
        }
        Ok(())
    }
}
