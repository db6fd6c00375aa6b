//! A disk in memory for tests and the simulator: it can lose what was not synced, and be full.

use super::disk::{Batch, Disk, DiskError, Durability, Op, Table};
use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

type Rows = BTreeMap<(Table, Vec<u8>), Vec<u8>>;

#[derive(Debug, Default)]
pub struct MemoryDisk {
    inner: Mutex<Inner>,
}

#[derive(Clone, Debug, Default)]
struct Inner {
    durable: Rows,
    /// What a reader sees: `durable` and the unsynced batches on top.
    visible: Rows,
    unsynced: Vec<Batch>,
    full: bool,
    syncs: u64,
}

impl MemoryDisk {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a machine finds after a power failure that kept the first `kept` unsynced batches.
    pub fn after_power_failure(&self, kept: usize) -> MemoryDisk {
        let inner = self.lock();
        let mut rows = inner.durable.clone();
        for batch in inner.unsynced.iter().take(kept) {
            apply(&mut rows, batch);
        }
        let inner = Inner { durable: rows.clone(), visible: rows, ..Inner::default() };
        MemoryDisk { inner: Mutex::new(inner) }
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
}

fn apply(rows: &mut Rows, batch: &Batch) {
    for op in &batch.ops {
        match op {
            Op::Put { table, key, value } => {
                rows.insert((*table, key.clone()), value.clone());
            }
            Op::DeleteRange { table, from, to } => {
                if from < to {
                    let gone = rows.range((*table, from.clone())..(*table, to.clone()));
                    let gone: Vec<_> = gone.map(|(key, _)| key.clone()).collect();
                    gone.iter().for_each(|key| drop(rows.remove(key)));
                }
            }
        }
    }
}

impl Disk for MemoryDisk {
    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Vec<u8>>, DiskError> {
        Ok(self.lock().visible.get(&(table, key.to_vec())).cloned())
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
        for ((_, key), value) in inner.visible.range((table, from.to_vec())..(table, to.to_vec())) {
            if !visit(key, value) {
                break;
            }
        }
        Ok(())
    }

    fn write(&self, batch: &Batch, durability: Durability) -> Result<(), DiskError> {
        let mut inner = self.lock();
        if inner.full {
            return Err(DiskError::Full("no room in memory".into()));
        }
        apply(&mut inner.visible, batch);
        inner.unsynced.push(batch.clone());
        if durability == Durability::Synced {
            inner.syncs += 1;
            for batch in std::mem::take(&mut inner.unsynced) {
                apply(&mut inner.durable, &batch);
            }
        }
        Ok(())
    }

    fn recover(&self) -> Result<(), DiskError> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn behaves_as_a_disk() {
        super::super::conformance::check(&mut |_| Box::new(MemoryDisk::default()));
    }

    #[test]
    fn a_power_failure_keeps_what_was_synced_and_a_prefix_of_the_rest() {
        let disk = MemoryDisk::default();
        for (n, durability) in
            [Durability::Written, Durability::Synced, Durability::Written, Durability::Written]
                .into_iter()
                .enumerate()
        {
            let mut batch = Batch::default();
            batch.put(Table::Log, &[n as u8], vec![n as u8]);
            disk.write(&batch, durability).unwrap();
        }
        for kept in 0..3 {
            let after = disk.after_power_failure(kept);
            let present: Vec<bool> =
                (0..4u8).map(|n| after.get(Table::Log, &[n]).unwrap().is_some()).collect();
            assert_eq!(present, [true, true, kept >= 1, kept >= 2]);
        }
    }
}
