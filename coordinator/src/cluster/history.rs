//! What is kept for ever and therefore not in memory: rows that a command adds to the history tables of the store.
//!
//! Writing a row twice is harmless, which is what lets the log be replayed from the last snapshot.

use fleet_common::events::Event;
use fleet_common::ids::JobId;
use fleet_common::protocol::Work;

#[derive(Clone, Debug, PartialEq)]
pub enum HistoryRow {
    /// The `index`-th event of a job, from 1, over all its generations.
    Event { job: JobId, index: u64, event: Event },
    /// What a job was asked to do.
    Work { job: JobId, work: Work },
}
