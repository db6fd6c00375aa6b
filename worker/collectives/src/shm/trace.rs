//! What each rank did last, kept in the segment so that others can read it when a gang stalls.
//!
//! One writer (the rank), any number of readers. A reader may catch a record half written; it is shown to people, never acted on.

#![allow(unsafe_code)]

use crate::collective::{Activity, DType, Keep, Op};
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// Records kept per rank: a few steps' worth.
const RECORDS: usize = 32;

/// The calls a rank can be in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Call {
    AllReduce(DType, Op),
    ReduceScatter(DType, Op),
    AllGather,
    Broadcast { root: usize },
    AllToAll,
    Barrier,
    Allocate { common: bool },
    Reduce(DType, Op, Keep),
}

impl Call {
    fn kind(self) -> u64 {
        match self {
            Call::AllReduce(..) => 1,
            Call::ReduceScatter(..) => 2,
            Call::AllGather => 3,
            Call::Broadcast { .. } => 4,
            Call::AllToAll => 5,
            Call::Barrier => 6,
            Call::Allocate { .. } => 7,
            Call::Reduce(..) => 8,
        }
    }

    /// One word, never 0: kind, then dtype, operation and keep or root.
    pub fn word(self) -> u64 {
        let element = |dtype: DType, op: Op| ((dtype as u64 + 1) << 8) | ((op as u64) << 16);
        let more = match self {
            Call::AllReduce(dtype, op) | Call::ReduceScatter(dtype, op) => element(dtype, op),
            Call::Reduce(dtype, op, keep) => element(dtype, op) | ((keep as u64) << 24),
            Call::Broadcast { root } => (root as u64) << 24,
            Call::Allocate { common } => u64::from(common) << 24,
            Call::AllGather | Call::AllToAll | Call::Barrier => 0,
        };
        self.kind() | more
    }
}

/// The name of the call in a word.
pub(super) fn name(word: u64) -> &'static str {
    match word & 0xff {
        1 => "all_reduce",
        2 => "reduce_scatter",
        3 => "all_gather",
        4 => "broadcast",
        5 => "all_to_all",
        6 => "barrier",
        7 => "allocate",
        8 => "reduce",
        _ => "an unknown call",
    }
}

/// `all_reduce #412 (f32 sum, 4096 bytes)`.
pub(super) fn describe(sequence: u64, word: u64, bytes: u64) -> String {
    let dtype = match (word >> 8) & 0xff {
        1 => "f32 ",
        2 => "bf16 ",
        3 => "f64 ",
        4 => "i64 ",
        5 => "u64 ",
        _ => "",
    };
    let op = match (dtype, (word >> 16) & 0xff) {
        ("", _) => "",
        (_, 0) => "sum, ",
        _ => "max, ",
    };
    let rest = match (word & 0xff, word >> 24) {
        (4, root) => format!("from rank {root}, "),
        (8, keep) if keep == Keep::Everything as u64 => "all-reduce, ".to_owned(),
        (7, common) if common != 0 => "common, ".to_owned(),
        _ => String::new(),
    };
    format!("{} #{sequence} ({dtype}{op}{rest}{bytes} bytes)", name(word))
}

#[repr(C)]
struct Record {
    sequence: AtomicU64,
    what: AtomicU64,
    bytes: AtomicU64,
    entered_ns: AtomicU64,
    /// 0: still inside.
    left_ns: AtomicU64,
}

/// One rank's ring of records, and what it does between them.
#[repr(C, align(64))]
pub(super) struct History {
    /// Calls made so far; 0: none. A posted reduction counts when it is posted.
    last: AtomicU64,
    /// The call that the rank waits in; 0: none.
    inside: AtomicU64,
    attached_ns: AtomicU64,
    activity: AtomicU64,
    activity_since_ns: AtomicU64,
    records: [Record; RECORDS],
}

/// Nanoseconds of the clock that all processes of the machine share.
fn now_ns() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is valid for the write; this clock always exists on Linux.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    (time.tv_sec as u64) * 1_000_000_000 + time.tv_nsec as u64
}

impl History {
    fn record(&self, sequence: u64) -> &Record {
        &self.records[(sequence % RECORDS as u64) as usize]
    }

    pub fn attach(&self) {
        self.attached_ns.store(now_ns(), Relaxed);
    }

    pub fn note(&self, activity: Activity) {
        self.activity_since_ns.store(now_ns(), Relaxed);
        self.activity.store(activity as u64 + 1, Relaxed);
    }

    pub fn enter(&self, sequence: u64, call: Call, bytes: usize) {
        let record = self.record(sequence);
        record.sequence.store(sequence, Relaxed);
        record.what.store(call.word(), Relaxed);
        record.bytes.store(bytes as u64, Relaxed);
        record.entered_ns.store(now_ns(), Relaxed);
        record.left_ns.store(0, Relaxed);
        self.last.store(sequence, Relaxed);
    }

    /// The rank waits in call `sequence`; 0: it goes on.
    pub fn wait_in(&self, sequence: u64) {
        self.inside.store(sequence, Relaxed);
    }

    pub fn leave(&self, sequence: u64) {
        let record = self.record(sequence);
        if record.sequence.load(Relaxed) == sequence {
            record.left_ns.store(now_ns(), Relaxed);
        }
    }

    pub fn report(&self, rank: usize) -> RankReport {
        let now = now_ns();
        let since = |ns: u64| Duration::from_nanos(now.saturating_sub(ns));
        let last = self.last.load(Relaxed);
        let operations: Vec<OpRecord> = (last.saturating_sub(RECORDS as u64 - 1).max(1)..=last)
            .map(|sequence| self.record(sequence))
            .map(|record| OpRecord {
                sequence: record.sequence.load(Relaxed),
                what: record.what.load(Relaxed),
                bytes: record.bytes.load(Relaxed),
                entered_ago: since(record.entered_ns.load(Relaxed)),
                left_ago: Some(record.left_ns.load(Relaxed)).filter(|ns| *ns != 0).map(since),
            })
            .collect();
        let activity = match self.activity.load(Relaxed) {
            1 => Some(Activity::Starting),
            2 => Some(Activity::LoadingData),
            3 => Some(Activity::Forward),
            4 => Some(Activity::Backward),
            5 => Some(Activity::Optimizer),
            6 => Some(Activity::Evaluating),
            7 => Some(Activity::Saving),
            _ => None,
        };
        let activity = activity.map(|activity| (activity, since(self.activity_since_ns.load(Relaxed))));
        let inside = self.inside.load(Relaxed);
        let waiting = operations.iter().find(|op| op.sequence == inside);
        let doing = match (self.attached_ns.load(Relaxed), waiting) {
            (0, _) => Doing::NotAttached,
            (_, Some(op)) => Doing::Inside { operation: op.label(), since: op.entered_ago },
            (attached, None) => Doing::Outside {
                since: operations.last().and_then(|op| op.left_ago).unwrap_or(since(attached)),
                activity,
            },
        };
        RankReport { rank, doing, operations }
    }
}

/// One call of one rank, oldest first in a report.
#[derive(Clone, Debug)]
pub struct OpRecord {
    /// Counts the rank's calls from 1; the same call has the same number on every rank.
    pub sequence: u64,
    what: u64,
    pub bytes: u64,
    pub entered_ago: Duration,
    /// `None`: the rank is still in it, or it is posted and not yet done.
    pub left_ago: Option<Duration>,
}

impl OpRecord {
    /// `all_reduce #412`.
    pub fn label(&self) -> String {
        format!("{} #{}", name(self.what), self.sequence)
    }
}

impl fmt::Display for OpRecord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&describe(self.sequence, self.what, self.bytes))
    }
}

/// Where a rank is.
#[derive(Clone, Debug, PartialEq)]
pub enum Doing {
    /// Its process has not come as far as the segment.
    NotAttached,
    /// In a call that waits for its peers.
    Inside { operation: String, since: Duration },
    /// Between calls; since when, and what it says it does.
    Outside { since: Duration, activity: Option<(Activity, Duration)> },
}

impl fmt::Display for Doing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Doing::NotAttached => write!(f, "it has not reached the gang's memory yet"),
            Doing::Inside { operation, since } => {
                write!(f, "it is in {operation} since {:.1} s", since.as_secs_f64())
            }
            Doing::Outside { activity: Some((activity, since)), .. } => {
                write!(f, "it is {activity} since {:.1} s", since.as_secs_f64())
            }
            Doing::Outside { since, activity: None } => {
                write!(f, "its last call ended {:.1} s ago", since.as_secs_f64())
            }
        }
    }
}

#[derive(Clone, Debug)]
pub struct RankReport {
    pub rank: usize,
    pub doing: Doing,
    /// The last calls, oldest first.
    pub operations: Vec<OpRecord>,
}

impl RankReport {
    fn sequence(&self) -> u64 {
        self.operations.last().map_or(0, |op| op.sequence)
    }
}

/// Lines the ranks up: the one that has made the fewest calls is the one that the others wait for.
pub(super) fn diagnosis(reports: &[RankReport]) -> String {
    let Some(ahead) = reports.iter().max_by_key(|report| report.sequence()) else {
        return "there are no ranks".to_owned();
    };
    let behind: Vec<&RankReport> =
        reports.iter().filter(|report| report.sequence() < ahead.sequence()).collect();
    let Some(slowest) = behind.iter().min_by_key(|report| report.sequence()) else {
        let each = reports.iter().map(|report| format!("rank {}: {}", report.rank, report.doing));
        return format!("all ranks have made the same calls; {}", each.collect::<Vec<_>>().join("; "));
    };
    let missing = ahead.operations.iter().find(|op| op.sequence > slowest.sequence());
    let missing = missing.map_or("calls that are no longer on record".to_owned(), OpRecord::label);
    format!("rank {} did not enter {missing}; {}", slowest.rank, slowest.doing)
}
