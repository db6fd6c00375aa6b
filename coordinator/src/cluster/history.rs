//! What is kept for long and therefore not in memory: rows that a command adds to the history tables of the store.
//!
//! A row is an immutable fact under a key that follows from the log: it is never written with another content, and removed only with
//! all that belongs to it, by a command (`retention`). So writing or removing one twice is harmless, which is what lets the log be
//! replayed from the last snapshot.

use super::records::JobRecord;
use super::runs::RunRecord;
use crate::raft::disk::Table;
use fleet_common::codec::{self, CodecError};
use fleet_common::events::Event;
use fleet_common::ids::{ExportId, JobId, ProfileId, RunId};
use fleet_common::protocol::{ExportView, Point, ProfileView, Work};
use serde::{Deserialize, Serialize};

/// Characters of a reason.
pub const WHY_MAX: usize = 1_000;

#[derive(Clone, Debug, PartialEq)]
pub enum HistoryRow {
    /// The `index`-th event of a job, from 1, over all its generations.
    Event {
        job: JobId,
        index: u64,
        event: Event,
    },
    /// What a job was asked to do.
    Work {
        job: JobId,
        work: Work,
    },
    /// A job as it ended.
    Job {
        job: JobId,
        record: Box<JobRecord>,
    },
    /// A run of a client as it ended.
    Run {
        run: RunId,
        record: Box<RunRecord>,
    },
    /// The `batch`-th points of a run of a client, from 1.
    Points {
        run: RunId,
        batch: u64,
        points: Vec<Point>,
    },
    Export {
        export: ExportId,
        record: Box<ExportView>,
    },
    Profile {
        profile: ProfileId,
        record: Box<ProfileView>,
    },
    /// Decisions are numbered from 1.
    Decision {
        number: u64,
        decision: Decision,
    },
}

/// What the planner decided and why.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Decision {
    pub unix_ms: u64,
    pub why: String,
}

impl HistoryRow {
    pub fn table(&self) -> Table {
        match self {
            HistoryRow::Event { .. } => Table::Events,
            HistoryRow::Work { .. } => Table::Works,
            HistoryRow::Job { .. } => Table::Jobs,
            HistoryRow::Run { .. } => Table::Runs,
            HistoryRow::Points { .. } => Table::Metrics,
            HistoryRow::Export { .. } => Table::Exports,
            HistoryRow::Profile { .. } => Table::Profiles,
            HistoryRow::Decision { .. } => Table::Decisions,
        }
    }

    pub fn key(&self) -> Vec<u8> {
        match self {
            HistoryRow::Event { job, index, .. } => key(&[job.0, *index]),
            HistoryRow::Work { job, .. } => key(&[job.0]),
            HistoryRow::Job { job, .. } => key(&[job.0]),
            HistoryRow::Run { run, .. } => key(&[run.0]),
            HistoryRow::Points { run, batch, .. } => key(&[run.0, *batch]),
            HistoryRow::Export { export, .. } => key(&[export.0]),
            HistoryRow::Profile { profile, .. } => key(&[profile.0]),
            HistoryRow::Decision { number, .. } => key(&[*number]),
        }
    }

    /// Bytes of its content.
    pub fn encoded_len(&self) -> u64 {
        let length = match self {
            HistoryRow::Event { event, .. } => codec::encoded_len(event),
            HistoryRow::Work { work, .. } => codec::encoded_len(work),
            HistoryRow::Job { record, .. } => codec::encoded_len(record),
            HistoryRow::Run { record, .. } => codec::encoded_len(record),
            HistoryRow::Points { points, .. } => codec::encoded_len(points),
            HistoryRow::Export { record, .. } => codec::encoded_len(record),
            HistoryRow::Profile { record, .. } => codec::encoded_len(record),
            HistoryRow::Decision { decision, .. } => codec::encoded_len(decision),
        };
        length.unwrap_or_default() as u64
    }

    pub fn encode(&self) -> Result<Vec<u8>, CodecError> {
        match self {
            HistoryRow::Event { event, .. } => codec::encode(event),
            HistoryRow::Work { work, .. } => codec::encode(work),
            HistoryRow::Job { record, .. } => codec::encode(record),
            HistoryRow::Run { record, .. } => codec::encode(record),
            HistoryRow::Points { points, .. } => codec::encode(points),
            HistoryRow::Export { record, .. } => codec::encode(record),
            HistoryRow::Profile { record, .. } => codec::encode(record),
            HistoryRow::Decision { decision, .. } => codec::encode(decision),
        }
    }
}

/// Numbers as bytes that sort like them.
pub fn key(numbers: &[u64]) -> Vec<u8> {
    numbers.iter().flat_map(|number| number.to_be_bytes()).collect()
}
