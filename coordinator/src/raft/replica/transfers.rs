//! The two ends of a snapshot's way from one replica to another: what this one waits for, and what it keeps for those who fetch.

use super::{Doom, Replica, ReplicaError, TRANSFER_LEASE_TICKS};
use crate::raft::disk::{Disk, DiskError};
use crate::raft::image;
use crate::raft::transfer::{self, Chunk, Cut, Fetch, Taken};
use raft::{ProgressState, SnapshotStatus, StateRole};

impl<D: Disk> Replica<D> {
    /// The snapshot that this replica waits for: from whom, and what comes next. Ask for it, and again when no answer comes.
    pub fn wants(&self) -> Option<(u64, Fetch)> {
        self.incoming.as_ref().map(|incoming| (incoming.source(), incoming.fetch()))
    }

    /// Why this replica cannot take the snapshot that it needs.
    pub fn unreadable_snapshot(&self) -> Option<&str> {
        self.unreadable.as_ref().map(|(_, what)| what.as_str())
    }

    /// What another replica wants of this one's snapshot. Where that is damaged, whoever fetches waits, but the log is not kept for that.
    pub fn serve(&mut self, to: u64, fetch: &Fetch) -> Result<Cut, ReplicaError> {
        if self.is_halted()
            || !self.outgoing.contains_key(&to)
            || fetch.at != self.node.store().snapshot_position()
        {
            self.end_transfer(to, SnapshotStatus::Failure);
            return Ok(Cut::Chunk(Chunk::gone(fetch)));
        }
        let state = match self.outgoing_state.take() {
            Some(state) => state,
            None => self.node.store().snapshot_state()?,
        };
        let cut = transfer::cut(self.node.store().disk().as_ref(), &state, fetch, self.sizes.chunk_bytes)?;
        self.outgoing_state = Some(state);
        if let Cut::Chunk(_) = cut {
            self.outgoing.insert(to, self.ticks + TRANSFER_LEASE_TICKS);
        }
        Ok(cut)
    }

    /// An answer to `wants`. Others than the one that is waited for are dropped.
    pub fn take_chunk(&mut self, from: u64, chunk: Chunk) -> Result<(), ReplicaError> {
        // raft takes nothing new while its last wishes are not on the disk.
        if self.is_halted() {
            return Ok(());
        }
        // The log has brought it here meanwhile, and may have removed rows that the snapshot had.
        let applied = self.applied.index;
        if self.incoming.take_if(|incoming| incoming.at().index <= applied).is_some() {
            return Ok(());
        }
        let Some(incoming) = self.incoming.as_mut().filter(|incoming| incoming.source() == from) else {
            return Ok(());
        };
        let announced = incoming.announced();
        match incoming.take(chunk, self.node.store().disk().as_ref()) {
            Ok(Taken::Nothing | Taken::More) => {}
            Ok(Taken::Lost) => self.incoming = None,
            Ok(Taken::Complete(message)) => {
                self.incoming = None;
                let bytes = &message.get_snapshot().data;
                match image::decode(bytes).map(|state| self.lost_past(from, &state)) {
                    Ok(None) => drop(self.node.step(*message)),
                    Ok(Some(what)) => self.doomed = Some(Doom::Contradicted(what)),
                    // The next one may come from a better disk, or from a version of fleet that this one understands.
                    Err(error) => {
                        let index = announced.1.index;
                        let what = format!(
                            "the snapshot of replica-{from} at entry {index} cannot be read: {error}"
                        );
                        self.unreadable = Some((announced, what));
                    }
                }
            }
            // The rows come again when there is room.
            Err(DiskError::Unwritable(_)) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }

    pub(super) fn end_silent_transfers(&mut self) {
        let silent = self.outgoing.iter().filter(|(_, until)| **until <= self.ticks).map(|(to, _)| *to);
        for to in silent.collect::<Vec<_>>() {
            self.end_transfer(to, SnapshotStatus::Failure);
        }
        let (leads, outgoing) = (self.node.raft.state == StateRole::Leader, &mut self.outgoing);
        if leads {
            let prs = self.node.raft.prs();
            outgoing.retain(|to, _| prs.get(*to).is_some_and(|it| it.state == ProgressState::Snapshot));
        }
        if outgoing.is_empty() {
            self.outgoing_state = None;
        }
    }

    pub(super) fn end_transfer(&mut self, to: u64, status: SnapshotStatus) {
        self.outgoing.remove(&to);
        if self.node.raft.state == StateRole::Leader {
            self.node.report_snapshot(to, status);
        }
    }
}
