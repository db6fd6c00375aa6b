//! Where the time of this rank's steps goes. At each moment a rank is in one phase; the stopwatch is told when that changes. Where a trace is
//! wanted, it keeps what it was told.

use crate::shim::monotonic_ns;
use crate::trace::{Row, Trace, What};
use std::io::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What a rank's time goes into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Reading windows of the token cache.
    Data,
    Forward,
    /// Of head and loss the forward too, which is computed with the backward.
    Backward,
    /// In calls of the gang: waiting for peers, and working for them while nothing else is computed.
    Communication,
    Optimizer,
    /// Copying what is saved, and waiting for an earlier save.
    Checkpoint,
    Evaluation,
    /// Between steps.
    Other,
}

impl Phase {
    /// Those that a step is made of; `Times` has a number for each.
    pub const OF_A_STEP: [Phase; 6] = [
        Phase::Data,
        Phase::Forward,
        Phase::Backward,
        Phase::Communication,
        Phase::Optimizer,
        Phase::Checkpoint,
    ];
}

/// A phase, and for which unit of the model, where it is for one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Doing {
    pub phase: Phase,
    pub unit: Option<usize>,
}

impl From<Phase> for Doing {
    fn from(phase: Phase) -> Doing {
        Doing { phase, unit: None }
    }
}

/// Handles of one stopwatch; it costs a look at the clock each time that something changes.
#[derive(Clone, Debug)]
pub struct Stopwatch(Arc<Mutex<Laps>>);

impl Default for Stopwatch {
    fn default() -> Stopwatch {
        Stopwatch(Arc::new(Mutex::new(Laps::new(monotonic_ns()))))
    }
}

impl Stopwatch {
    /// From now on the rank is in this phase; the one before is the answer.
    pub fn switch(&self, to: impl Into<Doing>) -> Doing {
        self.laps().switch(to.into(), monotonic_ns())
    }

    /// A step begins, with its data.
    pub fn begin_step(&self, step: u64) {
        let now = monotonic_ns();
        let mut laps = self.laps();
        laps.switch(Phase::Data.into(), now);
        laps.step = Some((step, now));
    }

    /// It is over.
    pub fn end_step(&self) {
        let now = monotonic_ns();
        let mut laps = self.laps();
        laps.switch(Phase::Other.into(), now);
        if let Some((step, began)) = laps.step.take() {
            laps.keep(What::Step(step), began, now);
        }
    }

    /// Does `work` in this phase, and goes back to the one before.
    pub fn during<R>(&self, phase: Phase, work: impl FnOnce() -> R) -> R {
        let before = self.switch(phase);
        let done = work();
        self.switch(before);
        done
    }

    /// Nanoseconds in each phase of `Phase::OF_A_STEP` so far.
    pub fn sums(&self) -> [u64; 6] {
        let mut laps = self.laps();
        let now = laps.now;
        laps.switch(now, monotonic_ns());
        Phase::OF_A_STEP.map(|phase| laps.sums[phase as usize])
    }

    /// What it is told from now on is kept, up to `SPANS_MAX`.
    pub fn begin_trace(&self) {
        self.laps().trace = Some(Trace::default());
    }

    /// What was done, and for how many seconds each time, since the trace began, which is over.
    pub fn take_trace(&self) -> Vec<(Doing, f64)> {
        self.laps().trace.take().into_iter().flat_map(Trace::doings).collect()
    }

    pub(crate) fn is_tracing(&self) -> bool {
        self.laps().trace.is_some()
    }

    /// Now, and what the rank does now.
    pub(crate) fn now(&self) -> (u64, Doing) {
        (monotonic_ns(), self.laps().now)
    }

    /// Something that the rank did not wait for, until now.
    pub(crate) fn keep(&self, what: What, began: u64) {
        self.laps().keep(what, began, monotonic_ns());
    }

    /// Writes what was kept, if a trace was wanted; how many spans had no room.
    pub fn write_trace(&self, row: &Row, out: &mut impl Write) -> io::Result<u64> {
        self.laps().trace.as_ref().map_or(Ok(0), |trace| trace.write(row, out))
    }

    fn laps(&self) -> MutexGuard<'_, Laps> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The stopwatch without a clock: times, in nanoseconds, are arguments.
#[derive(Debug)]
struct Laps {
    now: Doing,
    since: u64,
    /// For each phase.
    sums: [u64; Phase::Other as usize + 1],
    /// The step under way, and when it began.
    step: Option<(u64, u64)>,
    trace: Option<Trace>,
}

impl Laps {
    fn new(at: u64) -> Laps {
        Laps { now: Phase::Other.into(), since: at, sums: Default::default(), step: None, trace: None }
    }

    fn switch(&mut self, to: Doing, at: u64) -> Doing {
        let (now, since) = (self.now, std::mem::replace(&mut self.since, at));
        self.sums[now.phase as usize] += at.saturating_sub(since);
        if now.phase != Phase::Other && at > since {
            self.keep(What::Doing(now), since, at);
        }
        std::mem::replace(&mut self.now, to)
    }

    fn keep(&mut self, what: What, began: u64, ended: u64) {
        if let Some(trace) = &mut self.trace {
            trace.add(what, began, ended);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_moment_counts_once() {
        let mut laps = Laps::new(100);
        let forward = Doing { phase: Phase::Forward, unit: Some(3) };
        assert_eq!(laps.switch(forward, 110), Phase::Other.into());
        assert_eq!(laps.switch(Phase::Communication.into(), 150), forward);
        laps.switch(forward, 157);
        laps.switch(Phase::Backward.into(), 160);
        laps.switch(Phase::Other.into(), 200);
        let of = |phase: Phase| laps.sums[phase as usize];
        assert_eq!([of(Phase::Forward), of(Phase::Communication), of(Phase::Backward)], [43, 7, 40]);
        assert_eq!(laps.sums.iter().sum::<u64>(), 100);
    }

    #[test]
    fn work_within_a_phase_leaves_the_one_around_it_as_it_was() {
        let watch = Stopwatch::default();
        watch.switch(Phase::Backward);
        assert_eq!(watch.during(Phase::Communication, || 7), 7);
        assert_eq!(watch.switch(Phase::Other), Phase::Backward.into());
    }
}
