//! A disk in memory for tests and the simulator: it can lose what was not synced, be full, break off in the middle of a round of
//! writes, and rot.

use super::disk::{Batch, Disk, DiskError, Durability, Op, Renewal, Table};
use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::{Mutex, MutexGuard, PoisonError};

type Rows = BTreeMap<Vec<u8>, Vec<u8>>;

#[derive(Debug, Default)]
pub struct MemoryDisk {
    inner: Mutex<Inner>,
}

/// Invariant: undoing `unsynced` from the newest to the oldest gives what is durable.
#[derive(Clone, Debug, Default)]
struct Inner {
    tables: BTreeMap<Table, Rows>,
    /// For each unsynced batch what brings its rows back, in the order in which they were changed.
    unsynced: Vec<Vec<Former>>,
    full: bool,
    /// What every read and every `recover` fails with.
    blind: Option<DiskError>,
    /// Writes that still succeed; after them the machine has no power.
    fuse: Option<u64>,
    /// A write that deletes anything is the last one that succeeds.
    fuse_at_deletion: bool,
    syncs: u64,
    /// Batches that the tables have had.
    sequence: u64,
    /// As `sequence` was at the last sync. Kept apart from the tables: it is not lost or put back with them.
    mark: u64,
    /// A table in waiting.
    renewed: Option<(Table, Rows)>,
    /// Rows of the log that were removed since somebody looked.
    removed_log: Rows,
}

/// A row before it was changed.
#[derive(Clone, Debug)]
struct Former {
    table: Table,
    key: Vec<u8>,
    value: Option<Vec<u8>>,
}

impl MemoryDisk {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a machine finds after a power failure that kept the first `kept` unsynced batches.
    pub fn after_power_failure(&self, kept: usize) -> MemoryDisk {
        let mut inner = self.lock().clone();
        inner.lose_power(kept);
        MemoryDisk { inner: Mutex::new(inner) }
    }

    /// A power failure that keeps the first `kept` unsynced batches. The machine can start again.
    pub fn lose_power(&self, kept: usize) {
        self.lock().lose_power(kept);
    }

    /// The process was killed: all that it wrote is there, and its successor may write again.
    pub fn restart(&self) {
        let mut inner = self.lock();
        (inner.fuse, inner.fuse_at_deletion, inner.renewed) = (None, false, None);
    }

    /// After `writes` more writes every one fails and changes nothing, until `lose_power` or `restart`.
    pub fn set_fuse(&self, writes: u64) {
        self.lock().fuse = Some(writes);
    }

    /// The same after the next write that deletes anything: that is when a log is cut.
    pub fn set_fuse_at_deletion(&self) {
        self.lock().fuse_at_deletion = true;
    }

    /// Whether a write was cut off.
    pub fn is_dead(&self) -> bool {
        self.lock().fuse == Some(0)
    }

    pub fn unsynced_batches(&self) -> usize {
        self.lock().unsynced.len()
    }

    /// Synced writes so far.
    pub fn syncs(&self) -> u64 {
        self.lock().syncs
    }

    /// While true, every write fails with `Full`.
    pub fn set_full(&self, full: bool) {
        self.lock().full = full;
    }

    pub fn is_full(&self) -> bool {
        self.lock().full
    }

    /// While set, every read and every `recover` fails with it: a disk that could not be opened again, or that is broken.
    pub fn set_blind(&self, blind: Option<DiskError>) {
        self.lock().blind = blind;
    }

    /// Flips a bit of the `row`-th row of a table, both counted round. False when the table is empty.
    pub fn rot(&self, table: Table, row: usize, bit: usize) -> bool {
        let mut inner = self.lock();
        let Some(rows) = inner.tables.get_mut(&table).filter(|rows| !rows.is_empty()) else { return false };
        let row = row % rows.len();
        let Some(value) = rows.values_mut().nth(row).filter(|value| !value.is_empty()) else { return false };
        let bit = bit % (value.len() * 8);
        value[bit / 8] ^= 1 << (bit % 8);
        true
    }

    /// Loses the last `count` rows of a table, synced or not.
    pub fn lose_rows(&self, table: Table, count: usize) {
        let mut inner = self.lock();
        let rows = inner.tables.entry(table).or_default();
        (0..count).for_each(|_| drop(rows.pop_last()));
    }

    /// All that there is, mark included: what a snapshot of a whole machine has.
    pub fn copy(&self) -> MemoryDisk {
        MemoryDisk { inner: Mutex::new(self.lock().clone()) }
    }

    /// Puts the tables of another disk in the place of this one's, which keeps its mark: an older copy of the database's directory was put
    /// back, or an empty one.
    pub fn replace_tables(&self, with: &MemoryDisk) {
        let (tables, sequence) = {
            let with = with.lock();
            (with.tables.clone(), with.sequence)
        };
        let mut inner = self.lock();
        (inner.tables, inner.sequence) = (tables, sequence);
        inner.unsynced.clear();
    }

    /// The last key of a table.
    pub fn last_key(&self, table: Table) -> Option<Vec<u8>> {
        self.lock().tables.get(&table)?.last_key_value().map(|(key, _)| key.clone())
    }

    /// Rows of the log that were removed since this was called last: a log may be cut in the round in which its entries are committed.
    pub fn take_removed_log(&self) -> BTreeMap<Vec<u8>, Vec<u8>> {
        std::mem::take(&mut self.lock().removed_log)
    }

    pub fn rows(&self, table: Table) -> usize {
        self.lock().tables.get(&table).map_or(0, BTreeMap::len)
    }
}

impl Inner {
    fn has_lost(&self) -> bool {
        self.sequence < self.mark
    }

    fn see(&self) -> Result<(), DiskError> {
        self.blind.clone().map_or(Ok(()), Err)
    }

    fn lose_power(&mut self, kept: usize) {
        let lost = self.unsynced.drain(kept.min(self.unsynced.len())..).rev().collect::<Vec<_>>();
        self.sequence = self.sequence.saturating_sub(lost.len() as u64);
        for former in lost.into_iter().flat_map(|batch| batch.into_iter().rev()) {
            let rows = self.tables.entry(former.table).or_default();
            match former.value {
                Some(value) => drop(rows.insert(former.key, value)),
                None => drop(rows.remove(&former.key)),
            }
        }
        self.unsynced.clear();
        (self.fuse, self.fuse_at_deletion, self.renewed) = (None, false, None);
    }

    /// Writes to the table in waiting what goes to the one that it replaces.
    fn renew(&mut self, op: &Op) {
        let Some((renewed, rows)) = &mut self.renewed else { return };
        match op {
            Op::Put { table, key, value } if table == renewed => {
                drop(rows.insert(key.clone(), value.clone()))
            }
            Op::DeleteRange { table, from, to } if table == renewed => {
                rows.retain(|key, _| !(from..to).contains(&key));
            }
            _ => {}
        }
    }

    /// Makes a batch's changes visible. Returns how the rows were.
    fn apply(&mut self, batch: &Batch, undoable: bool) -> Vec<Former> {
        let mut formers = Vec::new();
        for op in &batch.ops {
            self.renew(op);
            match op {
                Op::Put { table, key, value } => {
                    let former = self.tables.entry(*table).or_default().insert(key.clone(), value.clone());
                    if undoable {
                        formers.push(Former { table: *table, key: key.clone(), value: former });
                    }
                }
                Op::DeleteRange { table, from, to } if from < to => {
                    if (*table, from.is_empty()) == (Table::Log, true) {
                        self.removed_log.clear();
                    }
                    let rows = self.tables.entry(*table).or_default();
                    let keys: Vec<Vec<u8>> =
                        rows.range(from.clone()..to.clone()).map(|(key, _)| key.clone()).collect();
                    for key in keys {
                        let value = rows.remove(&key);
                        // All of a log goes when another one takes its place: it may never have been committed.
                        if let (Table::Log, false, Some(value)) = (table, from.is_empty(), &value) {
                            self.removed_log.insert(key.clone(), value.clone());
                        }
                        if undoable {
                            formers.push(Former { table: *table, key, value });
                        }
                    }
                }
                Op::DeleteRange { .. } => {}
            }
        }
        formers
    }
}

impl Disk for MemoryDisk {
    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Vec<u8>>, DiskError> {
        let inner = self.lock();
        inner.see()?;
        Ok(inner.tables.get(&table).and_then(|rows| rows.get(key)).cloned())
    }

    fn scan(
        &self,
        table: Table,
        from: &[u8],
        to: &[u8],
        visit: &mut dyn FnMut(&[u8], &[u8]) -> bool,
    ) -> Result<(), DiskError> {
        if from >= to {
            return Ok(());
        }
        let inner = self.lock();
        inner.see()?;
        let Some(rows) = inner.tables.get(&table) else { return Ok(()) };
        for (key, value) in rows.range::<[u8], _>((Bound::Included(from), Bound::Excluded(to))) {
            if !visit(key, value) {
                break;
            }
        }
        Ok(())
    }

    fn write(&self, batch: &Batch, durability: Durability) -> Result<(), DiskError> {
        let mut inner = self.lock();
        match &mut inner.fuse {
            Some(0) => return Err(DiskError::Failed("the machine has no power".into())),
            Some(left) => *left -= 1,
            None => {}
        }
        if inner.full {
            return Err(DiskError::Unwritable("no room in memory".into()));
        }
        if inner.fuse_at_deletion && batch.ops.iter().any(|op| matches!(op, Op::DeleteRange { .. })) {
            inner.fuse = Some(0);
        }
        let synced = durability == Durability::Synced;
        let has_lost = inner.has_lost();
        let formers = inner.apply(batch, !synced);
        // Nothing that is written later makes up for what was lost.
        inner.sequence += u64::from(!has_lost);
        if synced {
            inner.syncs += 1;
            inner.mark = inner.mark.max(inner.sequence);
            inner.unsynced.clear();
        } else {
            inner.unsynced.push(formers);
        }
        Ok(())
    }

    fn recover(&self) -> Result<(), DiskError> {
        self.lock().see()
    }

    fn lost(&self) -> Option<String> {
        let inner = self.lock();
        inner
            .has_lost()
            .then(|| format!("it ends at write {} and had come to {}", inner.sequence, inner.mark))
    }

    fn renew(&self, step: Renewal) -> Result<(), DiskError> {
        let mut inner = self.lock();
        if inner.full {
            return Err(DiskError::Unwritable("no room in memory".into()));
        }
        match (step, inner.renewed.take()) {
            (Renewal::Begin(table), _) => inner.renewed = Some((table, Rows::new())),
            (Renewal::Rows(rows), Some((table, mut renewed))) => {
                renewed.extend(rows);
                inner.renewed = Some((table, renewed));
            }
            (Renewal::Finish, Some((table, renewed))) => {
                // Its rows are durable now.
                inner.unsynced.iter_mut().for_each(|batch| batch.retain(|former| former.table != table));
                inner.tables.insert(table, renewed);
            }
            (Renewal::Drop, _) | (_, None) => {}
        }
        Ok(())
    }

    fn damaged(&self) -> Option<(Table, String)> {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::super::conformance::{self, Kind};
    use super::*;

    struct InMemory;

    impl Kind for InMemory {
        type Disk = MemoryDisk;

        fn empty(&mut self) -> MemoryDisk {
            MemoryDisk::default()
        }

        fn killed(&mut self, disk: MemoryDisk) -> MemoryDisk {
            disk.restart();
            disk
        }

        fn without_power(&mut self, disk: MemoryDisk) -> Option<MemoryDisk> {
            Some(disk.after_power_failure(0))
        }

        fn copied(&mut self, disk: &MemoryDisk) -> MemoryDisk {
            disk.copy()
        }

        fn put_back(&mut self, disk: MemoryDisk, copy: &MemoryDisk) -> MemoryDisk {
            disk.replace_tables(copy);
            disk.restart();
            disk
        }

        fn fill(&mut self, disk: &MemoryDisk, full: bool) -> bool {
            disk.set_full(full);
            true
        }
    }

    #[test]
    fn behaves_as_a_disk() {
        conformance::check(&mut InMemory);
    }

    fn put(disk: &MemoryDisk, key: u8, value: u8, durability: Durability) -> Result<(), DiskError> {
        let mut batch = Batch::default();
        batch.put(Table::Log, &[key], vec![value]);
        disk.write(&batch, durability)
    }

    #[test]
    fn a_power_failure_keeps_what_was_synced_and_a_prefix_of_the_rest() {
        let disk = MemoryDisk::default();
        for (n, durability) in
            [Durability::Written, Durability::Synced, Durability::Written, Durability::Written]
                .into_iter()
                .enumerate()
        {
            put(&disk, n as u8, n as u8, durability).unwrap();
        }
        for kept in 0..3 {
            let after = disk.after_power_failure(kept);
            let present: Vec<bool> =
                (0..4u8).map(|n| after.get(Table::Log, &[n]).unwrap().is_some()).collect();
            assert_eq!(present, [true, true, kept >= 1, kept >= 2]);
        }
    }

    #[test]
    fn a_power_failure_brings_back_what_was_overwritten_and_deleted() {
        let disk = MemoryDisk::default();
        (0..4).for_each(|n| put(&disk, n, 1, Durability::Synced).unwrap());
        put(&disk, 0, 2, Durability::Written).unwrap();
        let mut batch = Batch::default();
        batch.delete_range(Table::Log, &[0], &[3]);
        batch.put(Table::Log, &[1], vec![3]);
        disk.write(&batch, Durability::Written).unwrap();
        let rows =
            |disk: &MemoryDisk| (0..4u8).map(|n| disk.get(Table::Log, &[n]).unwrap()).collect::<Vec<_>>();
        let row = |n: u8| Some(vec![n]);
        assert_eq!(rows(&disk), [None, row(3), None, row(1)]);
        assert_eq!(rows(&disk.after_power_failure(1)), [row(2), row(1), row(1), row(1)]);
        disk.lose_power(0);
        assert_eq!(rows(&disk), [row(1), row(1), row(1), row(1)]);
    }

    #[test]
    fn a_fuse_cuts_a_round_of_writes_off() {
        let disk = MemoryDisk::default();
        disk.set_fuse(1);
        put(&disk, 1, 1, Durability::Written).unwrap();
        assert!(matches!(put(&disk, 2, 2, Durability::Synced), Err(DiskError::Failed(_))));
        assert!(disk.is_dead());
        disk.restart();
        assert_eq!((disk.rows(Table::Log), disk.unsynced_batches()), (1, 1));
        put(&disk, 2, 2, Durability::Synced).unwrap();
        assert_eq!(disk.last_key(Table::Log), Some(vec![2]));
        disk.set_fuse_at_deletion();
        put(&disk, 3, 3, Durability::Synced).unwrap();
        let mut batch = Batch::default();
        batch.delete_range(Table::Log, &[1], &[2]);
        disk.write(&batch, Durability::Synced).unwrap();
        assert!(put(&disk, 4, 4, Durability::Synced).is_err());
        assert_eq!(disk.rows(Table::Log), 2);
    }
}
