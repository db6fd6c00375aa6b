//! The history on the disk: events and work of jobs, finished ones included. Read by anyone, written only with the log.

use super::disk::{Batch, Disk, DiskError, Table};
use super::seal;
use super::stretch::{Damage, broken};
use crate::cluster::history::{HistoryRow, key};
use crate::cluster::retention::Removal;
use fleet_common::codec;
use fleet_common::events::Event;
use fleet_common::ids::{JobId, RunId};
use fleet_common::protocol::{Point, Work};
use serde::de::DeserializeOwned;
use std::sync::{Arc, Mutex, PoisonError};

/// Of events, after which no more are read at once.
const EVENT_BYTES: usize = 4 << 20;

/// Reads what is recorded. Cheap to clone. What cannot be read is an error to who wanted it, and noted for who mends it.
pub struct History<D: ?Sized> {
    disk: Arc<D>,
    noted: Arc<Mutex<Option<Damage>>>,
}

impl<D: ?Sized> Clone for History<D> {
    fn clone(&self) -> Self {
        History { disk: self.disk.clone(), noted: self.noted.clone() }
    }
}

impl<D: Disk + ?Sized> History<D> {
    pub fn new(disk: Arc<D>) -> Self {
        History { disk, noted: Arc::default() }
    }

    pub fn disk(&self) -> &D {
        &self.disk
    }

    /// Damage that was met since this was asked last; one place stands for all.
    pub fn take_noted(&self) -> Option<Damage> {
        self.noted.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn note<T>(&self, table: Table, read: Result<T, DiskError>) -> Result<T, DiskError> {
        if let Err(DiskError::Failed(why)) = &read {
            let damage = Damage { table, why: why.clone() };
            *self.noted.lock().unwrap_or_else(PoisonError::into_inner) = Some(damage);
        }
        read
    }

    /// At most `max` events of a job from the `from`-th on, each with its index; fewer when they are large.
    pub fn events(&self, job: JobId, from: u64, max: usize) -> Result<Vec<(u64, Event)>, DiskError> {
        self.scan(Table::Events, &key(&[job.0, from]), &key(&[job.0, u64::MAX]), max, EVENT_BYTES)
    }

    /// Rows of a table with one number for a key, `from <= number < to`.
    pub fn rows_between<T: DeserializeOwned>(
        &self,
        table: Table,
        from: u64,
        to: u64,
        max: usize,
    ) -> Result<Vec<(u64, T)>, DiskError> {
        self.scan(table, &key(&[from]), &key(&[to]), max, usize::MAX)
    }

    /// One batch of a run's points.
    pub fn points(&self, run: RunId, batch: u64) -> Result<Option<Vec<Point>>, DiskError> {
        self.get(Table::Metrics, &key(&[run.0, batch]))
    }

    /// The row of a table with one number for a key.
    pub fn row<T: DeserializeOwned>(&self, table: Table, number: u64) -> Result<Option<T>, DiskError> {
        self.get(table, &key(&[number]))
    }

    fn get<T: DeserializeOwned>(&self, table: Table, key: &[u8]) -> Result<Option<T>, DiskError> {
        let row = self.disk.get(table, key);
        let row = row.and_then(|row| row.map(|value| open(table, key, &value)).transpose());
        self.note(table, row)
    }

    /// Rows from `first` up to `end`, each with the last number of its key.
    fn scan<T: DeserializeOwned>(
        &self,
        table: Table,
        first: &[u8],
        end: &[u8],
        max: usize,
        bytes_max: usize,
    ) -> Result<Vec<(u64, T)>, DiskError> {
        let (mut rows, mut bytes) = (Vec::new(), 0);
        let mut damage = None;
        let scanned = self.disk.scan(table, first, end, &mut |key, value| {
            bytes += value.len();
            match open(table, key, value) {
                Ok(row) => rows.push((last_number(key), row)),
                Err(error) => damage = Some(error),
            }
            damage.is_none() && rows.len() < max && bytes < bytes_max
        });
        self.note(table, scanned.and_then(|()| damage.map_or(Ok(rows), Err)))
    }

    pub fn work(&self, job: JobId) -> Result<Option<Work>, DiskError> {
        self.row(Table::Works, job.0)
    }
}

/// Adds a row to a batch.
pub fn stage(row: &HistoryRow, batch: &mut Batch) -> Result<(), DiskError> {
    let (table, key) = (row.table(), row.key());
    let payload = row.encode().map_err(|error| {
        DiskError::Failed(format!("a row of {} cannot be encoded: {error}", table.name()))
    })?;
    batch.put(table, &key, seal::seal(table, &key, payload));
    Ok(())
}

/// Adds to a batch that rows are not kept any more.
pub fn stage_removal(removal: &Removal, batch: &mut Batch) {
    let Removal { table, from, to } = *removal;
    batch.delete_range(table, &key(&[from]), &key(&[to]));
}

fn open<T: DeserializeOwned>(table: Table, key: &[u8], value: &[u8]) -> Result<T, DiskError> {
    let damaged = || DiskError::Failed(broken(table, key));
    let payload = seal::open(table, key, value).ok_or_else(damaged)?;
    codec::decode(payload).map_err(|_| damaged())
}

fn last_number(key: &[u8]) -> u64 {
    key.iter().rev().take(8).rev().fold(0, |n, byte| n << 8 | u64::from(*byte))
}

#[cfg(test)]
mod tests {
    use super::super::disk::Durability;
    use super::super::memory::MemoryDisk;
    use super::*;
    use crate::cluster::tests::step;

    #[test]
    fn a_job_reads_its_own_events_in_order() {
        let disk = Arc::new(MemoryDisk::default());
        let mut batch = Batch::default();
        for index in 1..=300 {
            for job in [JobId(1), JobId(2)] {
                let event = Event { unix_ms: index, body: step(index * job.0) };
                stage(&HistoryRow::Event { job, index, event }, &mut batch).unwrap();
            }
        }
        disk.write(&batch, Durability::Written).unwrap();
        let history = History::new(disk);
        let read = history.events(JobId(2), 255, 3).unwrap();
        assert_eq!(
            read.iter().map(|(index, event)| (*index, event.unix_ms)).collect::<Vec<_>>(),
            [(255, 255), (256, 256), (257, 257)]
        );
        assert_eq!(history.events(JobId(1), 1, 1_000).unwrap().len(), 300);
        assert!(history.events(JobId(1), 301, 9).unwrap().is_empty());
    }
}
