//! Runs that clients record by themselves, and what may be said of any run. A training job is a run too: its series are its events.

use super::State;
use fleet_common::ids::{JobId, RunId};
use fleet_common::protocol::{RunKey, RunState};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Runs that are open at a time.
pub const OPEN_RUNS_MAX: usize = 1_000;
/// Runs that ended last and are kept in memory with the open ones.
pub const FINISHED_RUNS_IN_STATE: usize = 1_000;
/// Series of one run.
pub const SERIES_MAX: usize = 64;

/// Its points are in the history, in batches.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunRecord {
    pub name: String,
    pub state: RunState,
    pub started_unix_ms: u64,
    pub finished_unix_ms: Option<u64>,
    pub batches: u64,
    pub points: u64,
    /// Of its rows in the history.
    pub bytes: u64,
    /// The newest value of each series.
    pub last: BTreeMap<String, f64>,
}

impl State {
    /// The open runs of clients and those that ended last.
    pub fn runs(&self) -> &BTreeMap<RunId, RunRecord> {
        &self.runs
    }

    /// Runs of clients that there ever were, numbered from 1; likewise the others.
    pub fn last_run(&self) -> u64 {
        self.last_run
    }

    pub fn last_export(&self) -> u64 {
        self.last_export
    }

    pub fn last_profile(&self) -> u64 {
        self.last_profile
    }

    /// Whether there is or was such a run.
    pub(crate) fn is_run(&self, run: RunKey) -> bool {
        match run {
            RunKey::Own(run) => run.0 > 0 && run.0 <= self.last_run,
            RunKey::Job(job) => {
                self.archived.contains_key(&job) || self.jobs.get(&job).is_some_and(|record| record.trains)
            }
        }
    }

    /// Hash of the manifest of a checkpoint that is valid, or was when its job was moved to the history.
    pub(crate) fn checkpoint(&self, job: JobId, step: u64) -> Option<&str> {
        if let Some(record) = self.jobs.get(&job) {
            let known = record.checkpoints.iter().rev().find(|known| known.record.step == step);
            return known.map(|known| known.record.manifest_sha256.as_str());
        }
        let left = self.archived.get(&job)?;
        left.iter().rev().find(|(known, _)| *known == step).map(|(_, hash)| hash.as_str())
    }
}
