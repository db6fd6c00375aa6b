//! The history on the disk: events and work of all jobs, finished ones included. Read by anyone, written only with the log.

use super::disk::{Batch, Disk, DiskError, Table};
use super::seal;
use crate::cluster::history::HistoryRow;
use fleet_common::codec;
use fleet_common::events::Event;
use fleet_common::ids::JobId;
use fleet_common::protocol::Work;
use std::sync::Arc;

/// Reads what is recorded. Cheap to clone.
pub struct History<D: ?Sized> {
    disk: Arc<D>,
}

impl<D: ?Sized> Clone for History<D> {
    fn clone(&self) -> Self {
        History { disk: self.disk.clone() }
    }
}

impl<D: Disk + ?Sized> History<D> {
    pub fn new(disk: Arc<D>) -> Self {
        History { disk }
    }

    /// At most `max` events of a job from the `from`-th on, each with its index.
    pub fn events(&self, job: JobId, from: u64, max: usize) -> Result<Vec<(u64, Event)>, DiskError> {
        let (first, end) = (event_key(job, from), event_key(job, u64::MAX));
        let mut events = Vec::new();
        let mut damage = None;
        self.disk.scan(Table::Events, &first, &end, &mut |key, value| {
            match open(Table::Events, key, value) {
                Ok(event) => events.push((index_of(key), event)),
                Err(error) => damage = Some(error),
            }
            damage.is_none() && events.len() < max
        })?;
        damage.map_or(Ok(events), Err)
    }

    pub fn work(&self, job: JobId) -> Result<Option<Work>, DiskError> {
        let key = job.0.to_be_bytes();
        self.disk.get(Table::Works, &key)?.map(|value| open(Table::Works, &key, &value)).transpose()
    }
}

/// Adds a row to a batch.
pub fn stage(row: &HistoryRow, batch: &mut Batch) -> Result<(), DiskError> {
    let (table, key, encoded) = match row {
        HistoryRow::Event { job, index, event } => {
            (Table::Events, event_key(*job, *index), codec::encode(event))
        }
        HistoryRow::Work { job, work } => (Table::Works, job.0.to_be_bytes().to_vec(), codec::encode(work)),
    };
    let payload = encoded.map_err(|error| {
        DiskError::Failed(format!("a row of {} cannot be encoded: {error}", table.name()))
    })?;
    batch.put(table, &key, seal::seal(table, &key, payload));
    Ok(())
}

fn open<T: serde::de::DeserializeOwned>(table: Table, key: &[u8], value: &[u8]) -> Result<T, DiskError> {
    let damaged =
        || DiskError::Failed(format!("row {} of table {} is damaged", hex::encode(key), table.name()));
    let payload = seal::open(table, key, value).ok_or_else(damaged)?;
    codec::decode(payload).map_err(|_| damaged())
}

fn event_key(job: JobId, index: u64) -> Vec<u8> {
    [job.0.to_be_bytes(), index.to_be_bytes()].concat()
}

fn index_of(key: &[u8]) -> u64 {
    key.iter().skip(8).fold(0, |n, byte| n << 8 | u64::from(*byte))
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
