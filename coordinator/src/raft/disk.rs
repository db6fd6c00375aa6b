//! What the log store needs of a disk: ordered tables, atomic batches, and a write that returns when it is durable.
//!
//! Writes become visible and durable in the order in which they were made: a synced write makes all earlier ones durable.

use std::fmt;

/// Rows are ordered by their key's bytes within a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Table {
    /// Single rows: format, hard state, snapshot, state.
    Meta,
    /// Raft entries by index.
    Log,
    /// Events by job and index.
    Events,
    /// What each job was asked to do, by job.
    Works,
    /// Jobs that ended long ago, by job.
    Jobs,
    /// Runs of clients that ended long ago, by run.
    Runs,
    /// What the planner decided and why, by number.
    Decisions,
    /// Points of runs' series, by run and batch.
    Metrics,
    /// Exports, by number.
    Exports,
    /// Drift profiles, by number.
    Profiles,
}

impl Table {
    pub const ALL: [Table; 10] = [
        Table::Meta,
        Table::Log,
        Table::Events,
        Table::Works,
        Table::Jobs,
        Table::Runs,
        Table::Decisions,
        Table::Metrics,
        Table::Exports,
        Table::Profiles,
    ];

    /// Immutable facts under keys that follow from the log: rows are added, never changed, and removed by a command of the log.
    pub const HISTORY: [Table; 8] = [
        Table::Events,
        Table::Works,
        Table::Jobs,
        Table::Runs,
        Table::Decisions,
        Table::Metrics,
        Table::Exports,
        Table::Profiles,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Table::Meta => "meta",
            Table::Log => "log",
            Table::Events => "events",
            Table::Works => "works",
            Table::Jobs => "jobs",
            Table::Runs => "runs",
            Table::Decisions => "decisions",
            Table::Metrics => "metrics",
            Table::Exports => "exports",
            Table::Profiles => "profiles",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    Put {
        table: Table,
        key: Vec<u8>,
        value: Vec<u8>,
    },
    /// Removes `from <= key < to`.
    DeleteRange {
        table: Table,
        from: Vec<u8>,
        to: Vec<u8>,
    },
}

/// Changes that are made together or not at all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    pub ops: Vec<Op>,
}

impl Batch {
    pub fn put(&mut self, table: Table, key: &[u8], value: Vec<u8>) {
        self.ops.push(Op::Put { table, key: key.to_vec(), value });
    }

    pub fn delete_range(&mut self, table: Table, from: &[u8], to: &[u8]) {
        self.ops.push(Op::DeleteRange { table, from: from.to_vec(), to: to.to_vec() });
    }

    pub fn is_empty(&self) -> bool {
        self.ops.is_empty()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// Survives kill -9 of the process; a power failure may lose it.
    Written,
    /// Survives a power failure.
    Synced,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DiskError {
    /// There is no room, or the file system is read-only. Nothing of the batch counts; trying again after `recover` may work.
    Unwritable(String),
    /// The disk or what lies on it cannot be trusted any more.
    Failed(String),
}

impl fmt::Display for DiskError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DiskError::Unwritable(what) => write!(f, "the disk cannot be written: {what}"),
            DiskError::Failed(what) => f.write_str(what),
        }
    }
}

impl std::error::Error for DiskError {}

/// A step in making a table anew, because rows of it cannot be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Renewal {
    /// Begins an empty table in waiting, to which everything goes as well that is written to the old one from now on. One that was begun
    /// before is dropped.
    Begin(Table),
    /// Rows for the table in waiting, with their keys.
    Rows(Vec<(Vec<u8>, Vec<u8>)>),
    /// The table in waiting is durable and takes the place of the old one, which is dropped unread.
    Finish,
    /// The table in waiting is not wanted any more. When the process ends it is dropped as well.
    Drop,
}

pub trait Disk: Send + Sync + 'static {
    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Vec<u8>>, DiskError>;

    /// Shows the rows with `from <= key < to` in order, until `visit` returns false.
    fn scan(
        &self,
        table: Table,
        from: &[u8],
        to: &[u8],
        visit: &mut dyn FnMut(&[u8], &[u8]) -> bool,
    ) -> Result<(), DiskError>;

    fn write(&self, batch: &Batch, durability: Durability) -> Result<(), DiskError>;

    /// Gives room back where rows were deleted and none will be written again: `from <= key < to`. A wish.
    fn reclaim(&self, _table: Table, _from: &[u8], _to: &[u8]) -> Result<(), DiskError> {
        Ok(())
    }

    /// Makes the disk usable again after `Unwritable`, where it can be.
    fn recover(&self) -> Result<(), DiskError>;

    /// Why not all is there that was ever synced, as far as a mark outside of the tables tells: rows are gone with their files, or all of
    /// it is an older copy. Found when the disk is opened. `None` as long as nothing is known to be missing.
    fn lost(&self) -> Option<String>;

    /// Makes a table anew, step by step. A step without a beginning does nothing.
    fn renew(&self, step: Renewal) -> Result<(), DiskError>;

    /// A table of the history in which the disk itself came upon damage while it moved rows, and what that is.
    fn damaged(&self) -> Option<(Table, String)>;
}
