//! What each rank does, kept in the segment so that others can read it when a gang stalls.
//!
//! One writer (the rank), any number of readers. A reader may catch it half written; it is shown to people, never acted on.

#![allow(unsafe_code)]

use crate::call::{self, Signature};
use crate::collective::{Activity, Pace};
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// What one rank does, and since when.
#[repr(C, align(64))]
pub(super) struct History {
    /// Calls made so far. A posted reduction counts when it is posted.
    calls: AtomicU64,
    /// The number of the call that the rank waits in; 0: none.
    inside: AtomicU64,
    inside_what: AtomicU64,
    inside_since_ns: AtomicU64,
    /// When the last call that ended did.
    left_ns: AtomicU64,
    attached_ns: AtomicU64,
    activity: AtomicU64,
    activity_since_ns: AtomicU64,
    /// The step that the rank works on; 0: none yet.
    step: AtomicU64,
    /// How long the step before it took; 0: not known.
    last_step_ns: AtomicU64,
    /// Steps of which is known how they went, and how long the rank computed for them.
    steps: AtomicU64,
    computed_ns: AtomicU64,
    /// Of all calls, and how long the rank was in them.
    exchanged_bytes: AtomicU64,
    inside_ns: AtomicU64,
}

/// Nanoseconds of the clock that all processes of the machine share.
fn now_ns() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is valid for the write; this clock always exists on Linux.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    (time.tv_sec as u64) * 1_000_000_000 + time.tv_nsec as u64
}

impl History {
    pub fn attach(&self) {
        self.attached_ns.store(now_ns(), Relaxed);
    }

    pub fn note(&self, activity: Activity) {
        self.activity_since_ns.store(now_ns(), Relaxed);
        self.activity.store(activity as u64 + 1, Relaxed);
    }

    pub fn begin_step(&self, step: u64, last: Option<Pace>) {
        self.last_step_ns.store(last.map_or(0, |last| last.took.as_nanos().max(1) as u64), Relaxed);
        if let Some(Pace { computed, .. }) = last {
            self.computed_ns.fetch_add(computed.as_nanos() as u64, Relaxed);
            self.steps.fetch_add(1, Relaxed);
        }
        self.step.store(step, Relaxed);
    }

    /// A call that exchanges so many bytes.
    pub fn enter(&self, sequence: u64, bytes: u64) {
        self.calls.store(sequence, Relaxed);
        self.exchanged_bytes.fetch_add(bytes, Relaxed);
    }

    /// The rank waits in this call, from now on.
    pub fn wait_in(&self, call: Signature) {
        self.inside_since_ns.store(now_ns(), Relaxed);
        self.inside_what.store(call.word, Relaxed);
        self.inside.store(call.sequence, Relaxed);
    }

    /// It waits no more.
    pub fn go_on(&self) {
        self.inside.store(0, Relaxed);
        let since = self.inside_since_ns.load(Relaxed);
        self.inside_ns.fetch_add(now_ns().saturating_sub(since), Relaxed);
    }

    pub fn leave(&self) {
        self.left_ns.store(now_ns(), Relaxed);
    }

    pub fn calls(&self) -> u64 {
        self.calls.load(Relaxed)
    }

    pub fn report(&self, rank: usize) -> RankReport {
        let now = now_ns();
        let since = |time: &AtomicU64| match time.load(Relaxed) {
            0 => None,
            ns => Some(Duration::from_nanos(now.saturating_sub(ns))),
        };
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
        let doing = match (since(&self.attached_ns), self.inside.load(Relaxed)) {
            (None, _) => Doing::NotAttached,
            (Some(attached), 0) => {
                let since_activity = since(&self.activity_since_ns).unwrap_or(attached);
                Doing::Outside {
                    since: since(&self.left_ns).unwrap_or(attached),
                    activity: activity.map(|activity| (activity, since_activity)),
                }
            }
            (Some(attached), call) => Doing::Inside {
                operation: format!("{} #{call}", call::name(self.inside_what.load(Relaxed))),
                call,
                since: since(&self.inside_since_ns).unwrap_or(attached),
                during: activity,
            },
        };
        let last_step = Some(self.last_step_ns.load(Relaxed)).filter(|ns| *ns != 0);
        RankReport {
            rank,
            doing,
            calls: self.calls(),
            step: self.step.load(Relaxed),
            last_step: last_step.map(Duration::from_nanos),
            computed: Computed {
                steps: self.steps.load(Relaxed),
                time: Duration::from_nanos(self.computed_ns.load(Relaxed)),
            },
            exchanged: Exchanged {
                bytes: self.exchanged_bytes.load(Relaxed),
                time: Duration::from_nanos(self.inside_ns.load(Relaxed)),
            },
        }
    }
}

/// Where a rank is.
#[derive(Clone, Debug, PartialEq)]
pub enum Doing {
    /// Its process has not come as far as the segment.
    NotAttached,
    /// In a call that waits for its peers, by its number.
    Inside { operation: String, call: u64, since: Duration, during: Option<Activity> },
    /// Between calls; since when, and what it says it does.
    Outside { since: Duration, activity: Option<(Activity, Duration)> },
}

impl fmt::Display for Doing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Doing::NotAttached => write!(f, "it has not reached the gang's memory yet"),
            Doing::Inside { operation, since, .. } => {
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
    /// How many it has made; the same call has the same number on every rank, from 1.
    pub calls: u64,
    /// The step that it works on, or has done last; 0: none yet.
    pub step: u64,
    /// How long the step before that took, if that tells how long steps take.
    pub last_step: Option<Duration>,
    pub computed: Computed,
    pub exchanged: Exchanged,
}

/// What a rank has exchanged with the others of its host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Exchanged {
    /// That it gave to its calls.
    pub bytes: u64,
    /// In calls: waiting, and copying what they bring. What is done of posted calls while the rank computes is not in it.
    pub time: Duration,
}

/// What a rank has done by itself in all steps so far that tell how steps go.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Computed {
    pub steps: u64,
    pub time: Duration,
}
