//! Raft's log, hard state and snapshot on a disk.
//!
//! Every batch is atomic and says how far the log reaches, every row carries a checksum, and indexes are contiguous. A log that is
//! damaged or shorter than it promised does not open: a replica that forgot what it acknowledged must not vote again.

use super::disk::{Batch, Disk, DiskError, Durability, Table};
use super::marks::Marks;
use super::seal;
use super::shape::{NUMBER_MAX, is_consistent};
use super::transfer::Descriptor;
use fleet_common::codec;
use prost::Message;
use raft::eraftpb::{ConfState, Entry, HardState, Snapshot, SnapshotMetadata};
use raft::{GetEntriesContext, RaftState, Storage, StorageError};
use serde::{Deserialize, Serialize};
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::sync::Arc;

/// Version of the rows; another one is refused.
const FORMAT: u32 = 5;
/// Where a new log begins: the first state counts as a snapshot at this position.
const GENESIS: Position = Position { index: 1, term: 1 };
/// Where the log of a replica is that waits to be let into a cluster: before everything.
const NOTHING: Position = Position { index: 0, term: 0 };
/// Newest entries kept in memory, so that what was just written is not read back.
const TAIL_BYTES: usize = 4 << 20;

const FORMAT_KEY: &[u8] = b"format";
const HARD_KEY: &[u8] = b"hard";
const SNAPSHOT_KEY: &[u8] = b"snapshot";
const STATE_KEY: &[u8] = b"state";
/// Why this replica must not take part any more.
pub const DAMAGE_KEY: &[u8] = b"damage";
const MARKS_KEY: &[u8] = b"marks";

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Position {
    pub index: u64,
    pub term: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LogError {
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// This replica must not take part any more.
    #[error(
        "the log of this replica is damaged: {0}; it must not take part any more: set its directory aside, join a new one with `coordinator join`, and take this one out with `fleet coordinators remove`; where it was the only one, restore a backup"
    )]
    Damaged(String),
    #[error(
        "the log has format {found}, this program knows {FORMAT}; use the version of fleet that wrote it"
    )]
    Format { found: u32 },
}

/// The one row that looks the same in every format.
#[derive(Serialize, Deserialize)]
struct FormatRow {
    version: u32,
    replica: u64,
}

#[derive(Serialize, Deserialize)]
struct HardRow {
    term: u64,
    vote: u64,
    commit: u64,
    /// The log reaches at least to here.
    last_index: u64,
}

#[derive(Serialize, Deserialize)]
struct SnapshotRow {
    at: Position,
    state: Descriptor,
    /// The entry before the first one that is still there.
    floor: Position,
    voters: Vec<u64>,
    learners: Vec<u64>,
    voters_outgoing: Vec<u64>,
    learners_next: Vec<u64>,
    auto_leave: bool,
}

/// How much of the log stays behind a snapshot, for replicas that are a little behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Keep {
    pub entries: u64,
    pub bytes: u64,
}

/// Changes of the log that go to the disk together.
#[derive(Clone, Debug, Default)]
pub struct Staged {
    pub batch: Batch,
    hard: Option<HardState>,
    entries: Vec<Entry>,
    snapshot: Option<NewSnapshot>,
}

#[derive(Clone, Debug)]
struct NewSnapshot {
    at: Position,
    state: Descriptor,
    floor: Position,
    conf: ConfState,
    /// From a leader, instead of the log that was here.
    replaces_log: bool,
}

/// Invariants: entries `floor.index + 1 ..= last` are on the disk; `floor.index <= snapshot.index <= hard.commit <= last`.
pub struct LogStore<D> {
    disk: Arc<D>,
    replica: u64,
    hard: HardState,
    snapshot: Position,
    /// Of the snapshot's state.
    descriptor: Descriptor,
    /// A replica needs a newer snapshot than there is.
    outdated: Cell<bool>,
    /// The first read for raft that failed.
    failed: RefCell<Option<LogError>>,
    floor: Position,
    /// As of `snapshot`; later changes of membership are in the log.
    conf: ConfState,
    last: Position,
    /// Bytes of each entry from the first one that is there.
    sizes: VecDeque<u32>,
    /// The newest entries, contiguous up to `last`.
    tail: VecDeque<Entry>,
    tail_bytes: usize,
}

impl<D: Disk> LogStore<D> {
    /// Begins a log on an empty disk, for a cluster of these voters with this encoded state.
    pub fn create(disk: Arc<D>, replica: u64, voters: &[u64], state: Vec<u8>) -> Result<Self, LogError> {
        Self::begin(disk, replica, GENESIS, voters, state)
    }

    /// Begins the log of a replica that waits for a leader to let it in. It has no members and cannot vote.
    pub fn join(disk: Arc<D>, replica: u64, state: Vec<u8>) -> Result<Self, LogError> {
        Self::begin(disk, replica, NOTHING, &[], state)
    }

    /// Begins a log at any position, which counts as that of a snapshot.
    pub fn begin(
        disk: Arc<D>,
        replica: u64,
        at: Position,
        voters: &[u64],
        state: Vec<u8>,
    ) -> Result<Self, LogError> {
        let conf = ConfState { voters: voters.to_vec(), ..ConfState::default() };
        let hard = HardState { term: at.term, vote: 0, commit: at.index };
        let descriptor = Descriptor::of(&state);
        let mut batch = Batch::default();
        put(&mut batch, FORMAT_KEY, &FormatRow { version: FORMAT, replica })?;
        put(&mut batch, HARD_KEY, &hard_row(&hard, at.index))?;
        put(&mut batch, SNAPSHOT_KEY, &snapshot_row(at, descriptor, at, &conf))?;
        batch.put(Table::Meta, STATE_KEY, seal::seal(Table::Meta, STATE_KEY, state));
        disk.write(&batch, Durability::Synced)?;
        let (tail, tail_bytes, outdated) = (VecDeque::new(), 0, Cell::new(false));
        Ok(LogStore {
            disk,
            replica,
            hard,
            snapshot: at,
            descriptor,
            outdated,
            failed: RefCell::new(None),
            floor: at,
            conf,
            last: at,
            sizes: VecDeque::new(),
            tail,
            tail_bytes,
        })
    }

    /// Opens the log on this disk and checks all of it; `None` when the disk is empty. Damage that is found is marked on the disk.
    pub fn open(disk: Arc<D>) -> Result<Option<Self>, LogError> {
        Self::checked(disk.clone()).inspect_err(|error| mark(disk.as_ref(), error))
    }

    fn checked(disk: Arc<D>) -> Result<Option<Self>, LogError> {
        let format = get::<D, FormatRow>(&disk, FORMAT_KEY)?;
        if let Some(FormatRow { version: found, .. }) = format
            && found != FORMAT
        {
            return Err(LogError::Format { found });
        }
        if let Some(what) = get::<D, String>(&disk, DAMAGE_KEY)? {
            return Err(LogError::Damaged(what));
        }
        if let Some(what) = disk.lost() {
            return Err(LogError::Damaged(what));
        }
        let Some(format) = format else {
            let mut rows = 0;
            disk.scan(Table::Log, &[], &[0xFF; 9], &mut |_, _| {
                rows += 1;
                false
            })?;
            return if rows == 0 {
                Ok(None)
            } else {
                Err(LogError::Damaged("its format row is missing".into()))
            };
        };
        let missing = |what: &str| LogError::Damaged(format!("its {what} row is missing"));
        let hard = get::<D, HardRow>(&disk, HARD_KEY)?.ok_or_else(|| missing("hard state"))?;
        let row = get::<D, SnapshotRow>(&disk, SNAPSHOT_KEY)?.ok_or_else(|| missing("snapshot"))?;
        let mut log = LogStore {
            disk,
            replica: format.replica,
            hard: HardState { term: hard.term, vote: hard.vote, commit: hard.commit },
            snapshot: row.at,
            descriptor: row.state,
            outdated: Cell::new(false),
            failed: RefCell::new(None),
            floor: row.floor,
            conf: ConfState {
                voters: row.voters,
                learners: row.learners,
                voters_outgoing: row.voters_outgoing,
                learners_next: row.learners_next,
                auto_leave: row.auto_leave,
            },
            last: row.floor,
            sizes: VecDeque::new(),
            tail: VecDeque::new(),
            tail_bytes: 0,
        };
        let has_no_members = log.conf == ConfState::default() && log.snapshot == NOTHING;
        let numbers = [hard.term, hard.commit, hard.last_index, log.snapshot.index, log.floor.index];
        if numbers.iter().any(|number| *number >= NUMBER_MAX)
            || log.floor.index > log.snapshot.index
            || log.replica == raft::INVALID_ID
            || !(has_no_members || is_consistent(&log.conf))
        {
            return Err(LogError::Damaged(
                "its rows of format, hard state and snapshot make no sense".into(),
            ));
        }
        log.check_entries()?;
        if log.last.index != hard.last_index {
            return Err(LogError::Damaged(format!(
                "it ends at entry {} and promised {}",
                log.last.index, hard.last_index
            )));
        }
        if log.snapshot.index > hard.commit || hard.commit > log.last.index || log.last.term > hard.term {
            let (snapshot, last) = (log.snapshot.index, log.last.index);
            return Err(LogError::Damaged(format!(
                "snapshot {snapshot}, commit {} and last entry {last} do not fit together",
                hard.commit
            )));
        }
        Ok(Some(log))
    }

    /// Reads every entry: checksums, contiguous indexes, terms that never fall.
    fn check_entries(&mut self) -> Result<(), LogError> {
        let disk = self.disk.clone();
        let mut damage = None;
        disk.scan(Table::Log, &(self.floor.index + 1).to_be_bytes(), &[0xFF; 9], &mut |key, value| {
            let expected = self.last.index + 1;
            match read_entry(key, value) {
                Some(entry) if entry.index == expected && entry.term >= self.last.term => {
                    self.push_tail(entry)
                }
                Some(entry) => damage = Some(format!("entry {expected} is missing; {} follows", entry.index)),
                None => damage = Some(format!("entry {expected} has a wrong checksum")),
            }
            damage.is_none()
        })?;
        damage.map_or(Ok(()), |what| Err(LogError::Damaged(what)))
    }

    pub fn replica(&self) -> u64 {
        self.replica
    }

    pub fn disk(&self) -> &Arc<D> {
        &self.disk
    }

    pub fn snapshot_position(&self) -> Position {
        self.snapshot
    }

    pub fn conf(&self) -> &ConfState {
        &self.conf
    }

    /// Bytes of the snapshot's state.
    pub fn state_bytes(&self) -> u64 {
        self.descriptor.state_bytes
    }

    /// Raft asked for a newer snapshot than there is, for example because a new member is not in it.
    pub fn is_snapshot_outdated(&self) -> bool {
        self.outdated.get()
    }

    /// The last entry on the disk.
    pub fn last(&self) -> Position {
        self.last
    }

    /// Bytes of all entries that are there.
    pub fn bytes(&self) -> u64 {
        self.sizes.iter().map(|size| u64::from(*size)).sum()
    }

    /// As it is on the disk.
    pub fn hard_state(&self) -> &HardState {
        &self.hard
    }

    /// A replica that was found to be damaged is so for ever: its disk says it to whoever opens it again. Nothing else is done to it,
    /// and a disk that takes no mark stays without.
    pub fn mark(&self, error: &LogError) {
        mark(self.disk.as_ref(), error);
    }

    /// raft has been told something untrue, because a read failed. Nothing that came of it may be written or sent.
    pub fn check(&self) -> Result<(), LogError> {
        self.failed.borrow().clone().map_or(Ok(()), Err)
    }

    pub fn has_failed(&self) -> bool {
        self.failed.borrow().is_some()
    }

    /// raft-rs panics where a read fails. It gets `instead`, and `check` has the error.
    fn read<T>(&self, result: Result<T, LogError>, instead: T) -> T {
        result.unwrap_or_else(|error| {
            let error = match error {
                LogError::Disk(DiskError::Unwritable(what)) => LogError::Disk(DiskError::Failed(what)),
                error => error,
            };
            self.failed.borrow_mut().get_or_insert(error);
            instead
        })
    }

    /// What this replica has seen of the others' disks, and they of its own.
    pub fn marks(&self) -> Result<Marks, LogError> {
        Ok(get(self.disk.as_ref(), MARKS_KEY)?.unwrap_or_default())
    }

    pub fn stage_marks(&self, marks: &Marks, batch: &mut Batch) -> Result<(), LogError> {
        put(batch, MARKS_KEY, marks)
    }

    /// The encoded state of the snapshot.
    pub fn snapshot_state(&self) -> Result<Vec<u8>, LogError> {
        let sealed = self.disk.get(Table::Meta, STATE_KEY)?;
        let sealed = sealed.ok_or_else(|| LogError::Damaged("its state row is missing".into()))?;
        let payload = seal::open(Table::Meta, STATE_KEY, &sealed);
        payload.map(<[u8]>::to_vec).ok_or_else(|| LogError::Damaged("its state has a wrong checksum".into()))
    }

    /// New entries, which replace all from the first one's index on, and a new hard state.
    pub fn stage(&self, entries: Vec<Entry>, hard: Option<HardState>) -> Result<Staged, LogError> {
        let mut batch = Batch::default();
        let mut last = self.last.index;
        if let Some(first) = entries.first() {
            if first.index <= last {
                batch.delete_range(Table::Log, &first.index.to_be_bytes(), &(last + 1).to_be_bytes());
            }
            for entry in &entries {
                let key = entry.index.to_be_bytes();
                batch.put(Table::Log, &key, seal::seal(Table::Log, &key, entry.encode_to_vec()));
                last = entry.index;
            }
        }
        if !entries.is_empty() || hard.is_some() {
            put(&mut batch, HARD_KEY, &hard_row(hard.as_ref().unwrap_or(&self.hard), last))?;
        }
        Ok(Staged { batch, hard, entries, snapshot: None })
    }

    /// A snapshot of the applied state at `at`, and the entries gone that lie more than `keep` entries or bytes before it.
    pub fn stage_compaction(
        &self,
        at: Position,
        conf: ConfState,
        state: Vec<u8>,
        keep: Keep,
    ) -> Result<Staged, LogError> {
        let floor_index = self.floor_behind(at.index, keep);
        let floor = Position { index: floor_index, term: self.term_at(floor_index)? };
        let mut batch = Batch::default();
        let descriptor = Descriptor::of(&state);
        put(&mut batch, SNAPSHOT_KEY, &snapshot_row(at, descriptor, floor, &conf))?;
        batch.put(Table::Meta, STATE_KEY, seal::seal(Table::Meta, STATE_KEY, state));
        let mut hard = self.hard.clone();
        hard.commit = hard.commit.max(at.index);
        put(&mut batch, HARD_KEY, &hard_row(&hard, self.last.index))?;
        batch.delete_range(
            Table::Log,
            &(self.floor.index + 1).to_be_bytes(),
            &(floor.index + 1).to_be_bytes(),
        );
        Ok(Staged {
            batch,
            hard: Some(hard),
            entries: Vec::new(),
            snapshot: Some(NewSnapshot { at, state: descriptor, floor, conf, replaces_log: false }),
        })
    }

    /// The last entry that is not kept when a snapshot is taken at `index`.
    fn floor_behind(&self, index: u64, keep: Keep) -> u64 {
        let there = usize::try_from(index - self.floor.index).unwrap_or(usize::MAX);
        let sizes = self.sizes.iter().take(there).rev().scan(0, |sum, size| {
            *sum += u64::from(*size);
            Some(*sum)
        });
        let fit = sizes.take_while(|sum| *sum <= keep.bytes).count() as u64;
        index - fit.min(keep.entries)
    }

    /// A leader's snapshot in place of the whole log.
    pub fn stage_installation(
        &self,
        snapshot: &Snapshot,
        hard: Option<HardState>,
    ) -> Result<Staged, LogError> {
        let metadata = snapshot.get_metadata();
        let at = Position { index: metadata.index, term: metadata.term };
        let conf = metadata.get_conf_state().clone();
        let mut hard = hard.unwrap_or_else(|| self.hard.clone());
        hard.commit = hard.commit.max(at.index);
        let mut batch = Batch::default();
        batch.delete_range(Table::Log, &[], &[0xFF; 9]);
        let state = Descriptor::of(&snapshot.data);
        put(&mut batch, SNAPSHOT_KEY, &snapshot_row(at, state, at, &conf))?;
        batch.put(Table::Meta, STATE_KEY, seal::seal(Table::Meta, STATE_KEY, snapshot.data.clone()));
        put(&mut batch, HARD_KEY, &hard_row(&hard, at.index))?;
        Ok(Staged {
            batch,
            hard: Some(hard),
            entries: Vec::new(),
            snapshot: Some(NewSnapshot { at, state, floor: at, conf, replaces_log: true }),
        })
    }

    /// Writes what was staged. After an error nothing has changed and the same may be tried again.
    pub fn write(&mut self, staged: &Staged, durability: Durability) -> Result<(), DiskError> {
        if staged.batch.is_empty() {
            return Ok(());
        }
        self.disk.write(&staged.batch, durability)?;
        if let Some(hard) = &staged.hard {
            self.hard = hard.clone();
        }
        if let Some(new) = &staged.snapshot {
            match new.replaces_log {
                true => self.sizes.clear(),
                false => drop(self.sizes.drain(..(new.floor.index - self.floor.index) as usize)),
            }
            (self.snapshot, self.floor, self.conf) = (new.at, new.floor, new.conf.clone());
            self.descriptor = new.state;
            self.outdated.set(false);
            while self.tail.front().is_some_and(|entry| new.replaces_log || entry.index <= new.floor.index) {
                self.pop_oldest();
            }
            if new.replaces_log {
                self.last = new.at;
            }
        }
        if let Some(first) = staged.entries.first() {
            self.sizes.truncate((first.index - self.floor.index - 1) as usize);
            while self.tail.back().is_some_and(|entry| entry.index >= first.index) {
                if let Some(entry) = self.tail.pop_back() {
                    self.tail_bytes -= cost(&entry);
                }
            }
            for entry in &staged.entries {
                self.push_tail(entry.clone());
            }
        }
        Ok(())
    }

    fn push_tail(&mut self, entry: Entry) {
        self.last = Position { index: entry.index, term: entry.term };
        self.sizes.push_back(u32::try_from(cost(&entry)).unwrap_or(u32::MAX));
        self.tail_bytes += cost(&entry);
        self.tail.push_back(entry);
        while self.tail_bytes > TAIL_BYTES && self.tail.len() > 1 {
            self.pop_oldest();
        }
    }

    fn pop_oldest(&mut self) {
        if let Some(entry) = self.tail.pop_front() {
            self.tail_bytes -= cost(&entry);
        }
    }

    fn in_tail(&self, index: u64) -> Option<&Entry> {
        let first = self.tail.front()?.index;
        self.tail.get(usize::try_from(index.checked_sub(first)?).ok()?)
    }

    fn term_at(&self, index: u64) -> Result<u64, LogError> {
        for known in [self.floor, self.snapshot, self.last] {
            if index == known.index {
                return Ok(known.term);
            }
        }
        match self.in_tail(index) {
            Some(entry) => Ok(entry.term),
            None => self.on_disk(index).map(|entry| entry.term),
        }
    }

    fn on_disk(&self, index: u64) -> Result<Entry, LogError> {
        let key = index.to_be_bytes();
        let value = self
            .disk
            .get(Table::Log, &key)?
            .ok_or_else(|| LogError::Damaged(format!("entry {index} is missing")))?;
        read_entry(&key, &value)
            .ok_or_else(|| LogError::Damaged(format!("entry {index} has a wrong checksum")))
    }
}

impl<D: Disk> Storage for LogStore<D> {
    fn initial_state(&self) -> raft::Result<RaftState> {
        Ok(RaftState::new(self.hard.clone(), self.conf.clone()))
    }

    fn entries(
        &self,
        low: u64,
        high: u64,
        max_size: impl Into<Option<u64>>,
        _: GetEntriesContext,
    ) -> raft::Result<Vec<Entry>> {
        if low <= self.floor.index {
            return Err(raft::Error::Store(StorageError::Compacted));
        }
        if high > self.last.index + 1 {
            return Err(raft::Error::Store(StorageError::Unavailable));
        }
        let max_size = max_size.into().unwrap_or(u64::MAX);
        let mut entries = Vec::new();
        let mut size = 0;
        for index in low..high {
            let entry = self.in_tail(index).cloned().map_or_else(|| self.on_disk(index), Ok);
            // Fewer than were asked for are in order.
            let Some(entry) = self.read(entry.map(Some), None) else { break };
            size += entry.encoded_len() as u64;
            if size > max_size && !entries.is_empty() {
                break;
            }
            entries.push(entry);
        }
        Ok(entries)
    }

    fn term(&self, index: u64) -> raft::Result<u64> {
        if index < self.floor.index {
            return Err(raft::Error::Store(StorageError::Compacted));
        }
        if index > self.last.index {
            return Err(raft::Error::Store(StorageError::Unavailable));
        }
        Ok(self.read(self.term_at(index), 0))
    }

    fn first_index(&self) -> raft::Result<u64> {
        Ok(self.floor.index + 1)
    }

    fn last_index(&self) -> raft::Result<u64> {
        Ok(self.last.index)
    }

    /// A descriptor only; `transfer` brings the content.
    fn snapshot(&self, request_index: u64, to: u64) -> raft::Result<Snapshot> {
        let knows = self.conf.voters.contains(&to) || self.conf.learners.contains(&to);
        if request_index > self.snapshot.index || !knows {
            self.outdated.set(true);
            return Err(raft::Error::Store(StorageError::SnapshotTemporarilyUnavailable));
        }
        let metadata = SnapshotMetadata {
            conf_state: Some(self.conf.clone()),
            index: self.snapshot.index,
            term: self.snapshot.term,
        };
        Ok(Snapshot { data: self.descriptor.announced(), metadata: Some(metadata) })
    }
}

fn mark<D: Disk>(disk: &D, error: &LogError) {
    let LogError::Damaged(what) = error else { return };
    let mut batch = Batch::default();
    if disk.get(Table::Meta, DAMAGE_KEY) == Ok(None) && put(&mut batch, DAMAGE_KEY, what).is_ok() {
        // The replica stops in any case.
        let _ = disk.write(&batch, Durability::Synced);
    }
}

/// What an entry takes in memory, roughly.
fn cost(entry: &Entry) -> usize {
    size_of::<Entry>() + entry.data.len() + entry.context.len()
}

fn read_entry(key: &[u8], value: &[u8]) -> Option<Entry> {
    let entry = Entry::decode(seal::open(Table::Log, key, value)?).ok()?;
    (entry.index.to_be_bytes() == key).then_some(entry)
}

fn hard_row(hard: &HardState, last_index: u64) -> HardRow {
    HardRow { term: hard.term, vote: hard.vote, commit: hard.commit, last_index }
}

fn snapshot_row(at: Position, state: Descriptor, floor: Position, conf: &ConfState) -> SnapshotRow {
    SnapshotRow {
        at,
        state,
        floor,
        voters: conf.voters.clone(),
        learners: conf.learners.clone(),
        voters_outgoing: conf.voters_outgoing.clone(),
        learners_next: conf.learners_next.clone(),
        auto_leave: conf.auto_leave,
    }
}

fn put<T: Serialize>(batch: &mut Batch, key: &[u8], row: &T) -> Result<(), LogError> {
    let payload =
        codec::encode(row).map_err(|error| DiskError::Failed(format!("a row cannot be encoded: {error}")))?;
    batch.put(Table::Meta, key, seal::seal(Table::Meta, key, payload));
    Ok(())
}

fn get<D: Disk, T: serde::de::DeserializeOwned>(disk: &D, key: &[u8]) -> Result<Option<T>, LogError> {
    let damaged =
        || LogError::Damaged(format!("its {} row has a wrong checksum", String::from_utf8_lossy(key)));
    let Some(value) = disk.get(Table::Meta, key)? else { return Ok(None) };
    let payload = seal::open(Table::Meta, key, &value).ok_or_else(damaged)?;
    codec::decode(payload).map(Some).map_err(|_| damaged())
}

#[cfg(test)]
mod tests;
