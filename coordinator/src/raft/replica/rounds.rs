//! The replica's work: what raft wants written, sent and applied, round by round, with one sync of the disk for each.

use super::{
    Doom, Keep, Output, Replica, ReplicaError, SNAPSHOT_STATES, Stuck, TRANSFER_LEASE_TICKS, ticket, unknown,
};
use crate::cluster::history::key;
use crate::cluster::retention::Removal;
use crate::cluster::tally::Intent;
use crate::cluster::{Answer, Command};
use crate::raft::disk::{Batch, Disk, DiskError, Durability};
use crate::raft::history;
use crate::raft::image;
use crate::raft::log::{LogError, Position, Staged};
use fleet_common::codec;
use prost::Message as _;
use raft::eraftpb::{ConfChange, Entry, EntryType, HardState, Message, MessageType};
use raft::{Ready, StateRole, Storage};

impl<D: Disk> Replica<D> {
    /// Does all that raft wants done. `send` gets messages for peers, a leader's before its own disk is asked, all others after.
    pub fn process(&mut self, send: &mut dyn FnMut(Message)) -> Result<Output, ReplicaError> {
        let mut output = Output::default();
        if self.blind {
            return Ok(output);
        }
        match self.round(send, &mut output) {
            Ok(()) => self.full = None,
            Err(ReplicaError::Log(LogError::Disk(error @ DiskError::Unwritable(_)))) => {
                self.full = Some(error.to_string())
            }
            Err(error) => {
                if let ReplicaError::Log(error) = &error {
                    self.node.store().mark(error);
                }
                return Err(error);
            }
        }
        Ok(output)
    }

    /// Tries to make a disk usable again that could not be written; `process` then goes on where it stopped. A disk that could not be
    /// opened again yet cannot be read either, so until then raft is asked for nothing.
    pub fn recover(&mut self) -> Result<(), ReplicaError> {
        let recovered = self.node.store().disk().recover();
        self.blind = recovered.is_err();
        match recovered {
            Ok(()) => Ok(()),
            Err(error @ DiskError::Unwritable(_)) => {
                self.full = Some(error.to_string());
                Ok(())
            }
            Err(error) => Err(error.into()),
        }
    }

    fn round(&mut self, send: &mut dyn FnMut(Message), output: &mut Output) -> Result<(), ReplicaError> {
        match &self.doomed {
            Some(Doom::Contradicted(what)) => return Err(ReplicaError::Contradicted(what.clone())),
            Some(Doom::Forgot(what)) => return Err(LogError::Damaged(what.clone()).into()),
            Some(Doom::NewerSnapshot { from, found }) => {
                return Err(ReplicaError::NewerSnapshot { from: *from, found: *found });
            }
            None => self.node.store().check()?,
        }
        if let Some(Stuck { ready, staged }) = self.stuck.take() {
            self.persist(ready, staged, send, output)?;
        }
        while self.node.has_ready() {
            let mut ready = self.node.ready();
            self.send_all(ready.take_messages(), send)?;
            let reads = ready.take_read_states();
            self.reads.extend(
                reads.into_iter().filter_map(|read| Some((read.index, ticket(read.request_ctx.get(8..)?)?))),
            );
            let staged = if ready.snapshot().is_empty() {
                self.node.store().stage(ready.take_entries(), ready.hs().cloned())?
            } else {
                let mut staged =
                    self.node.store().stage_installation(ready.snapshot(), ready.hs().cloned())?;
                // What was removed by entries that this replica will never see may have come before, or by an earlier snapshot.
                let state = image::decode(&ready.snapshot().data)?;
                state.removals().iter().for_each(|gone| history::stage_removal(gone, &mut staged.batch));
                staged
            };
            let committed = ready.take_committed_entries();
            self.apply(committed, output)?;
            self.persist(ready, staged, send, output)?;
        }
        self.write_rows()?;
        self.reads.retain(|(index, ticket)| {
            let wait = *index > self.applied.index;
            if !wait {
                output.reads.push(*ticket);
            }
            wait
        });
        self.compact()
    }

    /// A snapshot that is announced is kept until it was fetched. Nothing is sent that may follow from a read that failed.
    fn send_all(
        &mut self,
        messages: Vec<Message>,
        send: &mut dyn FnMut(Message),
    ) -> Result<(), ReplicaError> {
        self.node.store().check()?;
        for message in messages {
            if message.get_msg_type() == MessageType::MsgSnapshot {
                self.outgoing.insert(message.to, self.ticks + TRANSFER_LEASE_TICKS);
            }
            send(message);
        }
        Ok(())
    }

    /// Makes a `Ready` durable and lets raft go on with it.
    fn persist(
        &mut self,
        mut ready: Ready,
        staged: Staged,
        send: &mut dyn FnMut(Message),
        output: &mut Output,
    ) -> Result<(), ReplicaError> {
        let durability = if ready.must_sync() { Durability::Synced } else { Durability::Written };
        if let Err(error) = self.node.mut_store().write(&staged, durability) {
            self.stuck = Some(Stuck { ready, staged });
            return Err(error.into());
        }
        if !ready.snapshot().is_empty() {
            self.install(&ready)?;
            output.installed = true;
        }
        self.send_all(ready.take_persisted_messages(), send)?;
        let mut light = self.node.advance_append(ready);
        self.send_all(light.take_messages(), send)?;
        self.apply(light.take_committed_entries(), output)?;
        self.node.advance_apply_to(self.applied.index);
        Ok(())
    }

    fn install(&mut self, ready: &Ready) -> Result<(), ReplicaError> {
        let snapshot = ready.snapshot();
        let metadata = snapshot.get_metadata();
        self.state = image::decode(&snapshot.data)?;
        self.tally.replaced(&self.state);
        self.applied = Position { index: metadata.index, term: metadata.term };
        self.unreadable = None;
        self.conf = metadata.get_conf_state().clone();
        self.rows = Batch::default();
        self.removals.clear();
        self.bytes_since_snapshot = 0;
        Ok(())
    }

    fn apply(&mut self, entries: Vec<Entry>, output: &mut Output) -> Result<(), ReplicaError> {
        for entry in entries {
            let index = entry.index;
            self.bytes_since_snapshot += entry.data.len();
            self.state.reach(index, entry.term);
            match entry.get_entry_type() {
                EntryType::EntryNormal if entry.data.is_empty() => {}
                EntryType::EntryNormal => {
                    self.apply_command(index, &entry.data, &entry.context, output)?;
                }
                EntryType::EntryConfChange => {
                    let change =
                        ConfChange::decode(&entry.data[..]).map_err(|error| unknown(index, error))?;
                    if self.apply_command(index, &change.context, &entry.context, output)? {
                        self.conf = self.node.apply_conf_change(&change)?;
                        self.members_changed = true;
                        self.leave_if_removed();
                    }
                }
                EntryType::EntryConfChangeV2 => {
                    return Err(unknown(index, "fleet changes one member at a time"));
                }
            }
            self.applied = Position { index, term: entry.term };
        }
        Ok(())
    }

    /// A leader whose removal was decided under an earlier one is no leader any more. raft-rs would go on leading, and panic when it
    /// looks for its own progress.
    fn leave_if_removed(&mut self) {
        let raft = &mut self.node.raft;
        if raft.state == StateRole::Leader && raft.prs().get(raft.id).is_none() {
            raft.become_follower(raft.term, raft::INVALID_ID);
        }
    }

    /// Returns false if the state machine rejected it.
    fn apply_command(
        &mut self,
        index: u64,
        data: &[u8],
        context: &[u8],
        output: &mut Output,
    ) -> Result<bool, ReplicaError> {
        let command: Command = codec::decode(data).map_err(|error| unknown(index, error))?;
        let intent = Intent::of(command.unix_ms, &command.change);
        let applied = self.state.apply(index, command);
        self.tally.note(index, &intent, &applied, &self.state);
        for row in &applied.history {
            history::stage(row, &mut self.rows)?;
        }
        for removal in applied.removed {
            history::stage_removal(&removal, &mut self.rows);
            self.removals.push(removal);
        }
        let accepted = !matches!(applied.answer, Answer::Rejected(_));
        output.effects.extend(applied.effects);
        output.answers.extend(ticket(context).map(|ticket| (ticket, applied.answer)));
        Ok(accepted)
    }

    /// Writes the history of what was applied, and with it how far the log is committed. Not synced, since the log has it all; but a
    /// replica that counts by new members shall not count by the old ones again after a power failure.
    fn write_rows(&mut self) -> Result<(), ReplicaError> {
        let commit = self.commit_index();
        let known = self.node.store().hard_state().commit == commit;
        let marks = self.marks_are_due();
        if self.rows.is_empty() && known && !self.members_changed && !marks {
            return Ok(());
        }
        let hard = HardState { commit, ..self.node.store().hard_state().clone() };
        let mut staged = self.node.store().stage(Vec::new(), Some(hard))?;
        staged.batch.ops.extend(self.rows.ops.iter().cloned());
        if marks {
            self.node.store().stage_marks(&self.marks, &mut staged.batch)?;
        }
        let durability = if self.members_changed { Durability::Synced } else { Durability::Written };
        self.node.mut_store().write(&staged, durability)?;
        self.rows = Batch::default();
        self.members_changed = false;
        if marks {
            (self.marks_changed, self.marks_written) = (false, self.ticks);
        }
        for Removal { table, from, to } in std::mem::take(&mut self.removals) {
            self.node.store().disk().reclaim(table, &key(&[from]), &key(&[to]))?;
        }
        Ok(())
    }

    fn compact(&mut self) -> Result<(), ReplicaError> {
        let store = self.node.store();
        let entries = self.applied.index - store.snapshot_position().index;
        let bytes = self.sizes.snapshot_bytes.max(SNAPSHOT_STATES * store.state_bytes() as usize);
        let due = self.bytes_since_snapshot >= bytes
            || entries >= self.sizes.snapshot_entries
            || (store.is_snapshot_outdated() && entries > 0);
        // Who fetches the snapshot needs it, and the log behind it, until the end; but no disk is filled for it.
        if due && (self.outgoing.is_empty() || store.bytes() >= self.sizes.fetched_log_bytes) {
            self.snapshot()?;
        }
        Ok(())
    }

    /// Makes the applied state durable, so that the log before it is not needed any more.
    pub fn snapshot(&mut self) -> Result<(), ReplicaError> {
        let state = image::encode(&self.state)?;
        let keep = Keep { entries: self.sizes.keep_behind, bytes: self.sizes.keep_behind_bytes };
        let staged = self.node.store().stage_compaction(self.applied, self.conf.clone(), state, keep)?;
        self.node.mut_store().write(&staged, Durability::Synced)?;
        self.bytes_since_snapshot = 0;
        Ok(())
    }

    /// First entry that is still in the log.
    pub fn first_index(&self) -> u64 {
        self.node.store().first_index().unwrap_or_default()
    }
}
