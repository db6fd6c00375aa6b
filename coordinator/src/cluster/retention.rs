//! What is kept of the history: all of what has not ended, and of what has the newest, up to an age, a size and a number.
//!
//! The state has a ledger of what has ended, in the order of the ends: so it follows from the state alone which rows there are, and a
//! replica that comes by a snapshot can remove those that its source removed before. Nothing here looks at a clock: who proposes
//! `Forget` puts its time into the log.

use super::runs::RunRecord;
use super::{Context, State};
use crate::cluster::history::HistoryRow;
use crate::raft::disk::Table;
use fleet_common::ids::{ExportId, JobId, ProfileId, RunId};
use fleet_common::protocol::RetentionView;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeSet, VecDeque};

/// Kept of what has ended, however young and small it is: bounds the ledger, which is in the state.
pub const ENDED_MAX: usize = 100_000;
/// Removed by one command: bounds its work.
const FORGOTTEN_AT_ONCE: usize = 1_000;
/// Decisions are one unit of the ledger when they take so much together, or when the first of them is so old.
const DECISIONS_BYTES: u64 = 64 << 10;
const DECISIONS_MS: u64 = 24 * 3600 * 1000;
/// What a row takes besides its content: key, checksum, and what a table of RocksDB adds.
const ROW_BYTES: u64 = 48;

/// How much is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// What ended longer ago is removed.
    pub age_ms: u64,
    /// The oldest of what has ended is removed where all rows together are more than this.
    pub bytes: u64,
}

impl Default for Limits {
    /// A quarter of a year, on less than half of a disk of 10 GB.
    fn default() -> Self {
        Limits { age_ms: 90 * 24 * 3600 * 1000, bytes: 4 << 30 }
    }
}

/// What is removed as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Unit {
    Job(JobId),
    Run(RunId),
    Export(ExportId),
    Profile(ProfileId),
    /// Those from the one behind the last unit of decisions up to this number.
    Decisions {
        last: u64,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Ended {
    unit: Unit,
    unix_ms: u64,
    bytes: u64,
}

/// Rows of a table whose key begins with a number in `from..to`. They are to be removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Removal {
    pub table: Table,
    pub from: u64,
    pub to: u64,
}

/// The ledger. Invariant: `bytes` is that of all rows that are kept, of what has ended and of what has not.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Retention {
    limits: Limits,
    /// In the order of the ends.
    ended: VecDeque<Ended>,
    bytes: u64,
    decisions: Decisions,
    removed: u64,
    removed_unix_ms: Option<u64>,
}

/// Decisions that are no unit yet.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Decisions {
    /// The first one that is kept, in a unit or not.
    first_kept: u64,
    bytes: u64,
    since_unix_ms: u64,
}

impl Retention {
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// Of all rows that are kept.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// When the newest of what was removed had ended.
    pub fn removed_unix_ms(&self) -> Option<u64> {
        self.removed_unix_ms
    }

    pub fn view(&self) -> RetentionView {
        RetentionView {
            age_s: self.limits.age_ms / 1_000,
            bytes_max: self.limits.bytes,
            bytes: self.bytes,
            ended: self.ended.len() as u64,
            removed: self.removed,
            removed_unix_ms: self.removed_unix_ms,
        }
    }

    /// Exports that are kept.
    pub fn exports(&self) -> usize {
        self.ended.iter().filter(|ended| matches!(ended.unit, Unit::Export(_))).count()
    }

    /// Profiles that are kept.
    pub fn profiles(&self) -> usize {
        self.ended.iter().filter(|ended| matches!(ended.unit, Unit::Profile(_))).count()
    }

    /// There is so much of what has not ended that lines of output are not recorded until something was removed.
    pub(super) fn is_overfull(&self) -> bool {
        self.bytes >= self.limits.bytes.saturating_add(self.limits.bytes / 4)
    }

    /// Whether `Forget` would remove anything at this time.
    pub fn is_due(&self, unix_ms: u64) -> bool {
        self.ended.front().is_some_and(|oldest| self.is_over(oldest, unix_ms))
    }

    fn is_over(&self, ended: &Ended, unix_ms: u64) -> bool {
        ended.unix_ms < unix_ms.saturating_sub(self.limits.age_ms)
            || self.bytes > self.limits.bytes
            || self.ended.len() > ENDED_MAX
    }

    pub(super) fn limit(&mut self, limits: Limits) {
        self.limits = limits;
    }

    pub(super) fn added(&mut self, bytes: u64) {
        self.bytes = self.bytes.saturating_add(bytes);
    }

    pub(super) fn ended(&mut self, unit: Unit, bytes: u64, unix_ms: u64) {
        self.ended.push_back(Ended { unit, unix_ms, bytes });
    }

    /// The decision of this number takes so much.
    pub(super) fn decided(&mut self, number: u64, bytes: u64, unix_ms: u64) {
        let open = &mut self.decisions;
        if open.bytes == 0 {
            open.since_unix_ms = unix_ms;
        }
        open.bytes += bytes;
        if open.bytes >= DECISIONS_BYTES || unix_ms >= open.since_unix_ms.saturating_add(DECISIONS_MS) {
            let bytes = std::mem::take(&mut open.bytes);
            self.ended(Unit::Decisions { last: number }, bytes, unix_ms);
        }
    }

    fn pop(&mut self, unix_ms: u64) -> Option<Unit> {
        if !self.is_due(unix_ms) {
            return None;
        }
        let Ended { unit, unix_ms, bytes } = self.ended.pop_front()?;
        self.bytes = self.bytes.saturating_sub(bytes);
        self.removed += 1;
        self.removed_unix_ms = self.removed_unix_ms.max(Some(unix_ms));
        Some(unit)
    }
}

impl Context {
    /// Adds a row to the history. Returns what it takes.
    pub(crate) fn keep(&mut self, row: HistoryRow) -> u64 {
        let bytes = ROW_BYTES + row.encoded_len();
        self.kept += bytes;
        self.history.push(row);
        bytes
    }
}

impl State {
    pub fn retention(&self) -> &Retention {
        &self.retention
    }

    /// Removes the oldest of what has ended, as far as it is over the limits.
    pub(super) fn forget(&mut self, context: &mut Context) {
        let mut removals: Vec<Removal> = Vec::new();
        for _ in 0..FORGOTTEN_AT_ONCE {
            let Some(unit) = self.retention.pop(context.unix_ms) else { break };
            let (tables, from, to) = self.forget_unit(unit);
            removals.extend(tables.iter().map(|table| Removal { table: *table, from, to }));
        }
        context.removed = merged(removals);
    }

    /// Tables with rows of it, and the numbers that they begin with.
    fn forget_unit(&mut self, unit: Unit) -> (&'static [Table], u64, u64) {
        match unit {
            Unit::Job(job) => {
                self.take_ended(job);
                self.finished.retain(|other| *other != job);
                (&OF_JOBS, job.0, job.0 + 1)
            }
            Unit::Run(run) => {
                self.runs.remove(&run);
                self.finished_runs.retain(|other| *other != run);
                (&OF_RUNS, run.0, run.0 + 1)
            }
            Unit::Export(export) => (&[Table::Exports], export.0, export.0 + 1),
            Unit::Profile(profile) => (&[Table::Profiles], profile.0, profile.0 + 1),
            Unit::Decisions { last } => {
                let from = std::mem::replace(&mut self.retention.decisions.first_kept, last + 1);
                (&[Table::Decisions], from, last + 1)
            }
        }
    }

    /// Everything that was removed, as what lies between what is kept: for a history that may have rows from before.
    pub fn removals(&self) -> Vec<Removal> {
        let mut kept: [BTreeSet<u64>; 4] = Default::default();
        let [jobs, runs, exports, profiles] = &mut kept;
        jobs.extend(self.jobs.keys().map(|job| job.0));
        runs.extend(self.runs.keys().map(|run| run.0));
        for ended in &self.retention.ended {
            match ended.unit {
                Unit::Job(job) => drop(jobs.insert(job.0)),
                Unit::Run(run) => drop(runs.insert(run.0)),
                Unit::Export(export) => drop(exports.insert(export.0)),
                Unit::Profile(profile) => drop(profiles.insert(profile.0)),
                Unit::Decisions { .. } => {}
            }
        }
        let between = |tables: &[Table], kept: &BTreeSet<u64>, last: u64| -> Vec<Removal> {
            let ends = kept.iter().copied().chain([last + 1]);
            let gaps: Vec<(u64, u64)> = ends
                .scan(0, |from, kept| Some((std::mem::replace(from, kept + 1), kept)))
                .filter(|(from, to)| from < to)
                .collect();
            let of = |table: &Table| {
                let table = *table;
                gaps.iter().map(move |&(from, to)| Removal { table, from, to }).collect::<Vec<_>>()
            };
            tables.iter().flat_map(of).collect()
        };
        let decisions = Removal { table: Table::Decisions, from: 0, to: self.retention.decisions.first_kept };
        [
            between(&OF_JOBS, &kept[0], self.last_job),
            between(&OF_RUNS, &kept[1], self.last_run),
            between(&[Table::Exports], &kept[2], self.last_export),
            between(&[Table::Profiles], &kept[3], self.last_profile),
            vec![decisions],
        ]
        .concat()
    }

    /// A client's run has ended.
    pub(super) fn run_ended(&mut self, run: RunId, context: &mut Context) {
        let Some(record) = self.runs.get(&run) else { return };
        let own = ROW_BYTES + len_of(record);
        // Its own row is written when it leaves the memory.
        context.kept += own;
        self.retention.ended(Unit::Run(run), record.bytes + own, context.unix_ms);
        self.finished_runs.push_back(run);
        if self.finished_runs.len() > super::runs::FINISHED_RUNS_IN_STATE
            && let Some(run) = self.finished_runs.pop_front()
            && let Some(record) = self.runs.remove(&run)
        {
            context.history.push(HistoryRow::Run { run, record: Box::new(record) });
        }
    }

    /// A job has ended.
    pub(super) fn job_ended(&mut self, job: JobId, context: &mut Context) {
        let Some(record) = self.jobs.get(&job) else { return };
        let own = ROW_BYTES + len_of(record);
        context.kept += own;
        self.retention.ended(Unit::Job(job), record.bytes + own, context.unix_ms);
    }
}

const OF_JOBS: [Table; 3] = [Table::Events, Table::Works, Table::Jobs];
const OF_RUNS: [Table; 2] = [Table::Metrics, Table::Runs];

fn len_of<T: Serialize>(value: &T) -> u64 {
    fleet_common::codec::encoded_len(value).unwrap_or_default() as u64
}

/// Neighbours as one.
fn merged(mut removals: Vec<Removal>) -> Vec<Removal> {
    removals.sort_by_key(|removal| (removal.table, removal.from));
    let mut merged: Vec<Removal> = Vec::new();
    for removal in removals {
        match merged.last_mut() {
            Some(last) if last.table == removal.table && last.to == removal.from => last.to = removal.to,
            _ => merged.push(removal),
        }
    }
    merged
}

/// Bytes of points that one run may have.
pub const RUN_BYTES_MAX: u64 = 256 << 20;

impl RunRecord {
    /// Whether there is room for more points.
    pub(super) fn has_room(&self) -> bool {
        self.bytes < RUN_BYTES_MAX
    }
}

#[cfg(test)]
mod tests;
