//! A rank's end of the shared segment: how ranks meet, compare what they call, and fail together.

#![allow(unsafe_code)]

use super::posted::Pending;
use super::segment::{Control, HALF_BYTES, Mark, PAGE, Slot};
use super::wait::{Event, Woken};
use crate::abort::Abort;
use crate::call::{self, Call, Signature};
use crate::collective::{Activity, Pace, refuse};
use crate::error::{CollectiveError, Result};
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{Ordering::Relaxed, Ordering::SeqCst};
use std::time::Duration;

const DEADLINE: Duration = Duration::from_secs(60);

/// Collectives over the segment that the agent made. Every rank of the gang must be on this host.
///
/// Calls that differ between ranks (in kind, type, size or order) are always noticed, before any result is written, and named.
pub struct ShmCollective {
    pub(super) control: Arc<Control>,
    pub(super) rank: usize,
    /// By which ranks are called in errors.
    names: Vec<usize>,
    pub(super) deadline: Duration,
    /// Calls made, blocking and posted.
    pub(super) sequence: u64,
    /// Phases gone through.
    phase: u64,
    /// Exchanges posted.
    pub(super) posts: u64,
    /// Posted and not yet done by this rank, oldest first.
    pub(super) pending: VecDeque<Pending>,
    /// Number of the last post that is over only when every rank has done its part; 0: none.
    pub(super) last_of_all: u64,
    /// Bytes of the segment's file in use; the same on every rank.
    arena_end: usize,
    failed: Option<CollectiveError>,
}

/// Where a rank says what it does.
pub(crate) struct Notes {
    control: Arc<Control>,
    rank: usize,
}

impl Notes {
    pub fn note(&self, activity: Activity) {
        self.control.slot(self.rank).history.note(activity);
    }

    pub fn begin_step(&self, step: u64, last: Option<Pace>) {
        self.control.slot(self.rank).history.begin_step(step, last);
    }
}

/// Aborts a gang from another thread.
#[derive(Clone)]
pub struct AbortHandle(Arc<Control>);

impl AbortHandle {
    pub fn abort(&self, abort: Abort) {
        self.0.abort(abort);
    }
}

/// The staging halves of one phase, to read from.
pub(super) struct Halves<'a> {
    control: &'a Control,
    half: usize,
}

impl Halves<'_> {
    pub fn of(&self, rank: usize) -> *const u8 {
        self.control.half(rank, self.half)
    }

    /// `range` must lie within a half and hold what `rank` put there in this phase.
    pub fn copy_out(&self, rank: usize, range: Range<usize>, to: &mut [u8]) {
        assert!(range.end <= HALF_BYTES && range.len() == to.len(), "outside of the staging area");
        // SAFETY: inside the mapping; the owner does not write to this half again before we mark the next phase.
        unsafe { std::ptr::copy_nonoverlapping(self.of(rank).add(range.start), to.as_mut_ptr(), to.len()) }
    }
}

impl Mark {
    pub(super) fn set(&self, number: u64, signature: Signature) {
        self.sequence.store(signature.sequence, Relaxed);
        self.what.store(signature.word, Relaxed);
        self.bytes.store(signature.bytes, Relaxed);
        self.place.store(signature.place, Relaxed);
        self.number.store(number, SeqCst);
    }

    fn content(&self) -> Signature {
        Signature {
            sequence: self.sequence.load(Relaxed),
            word: self.what.load(Relaxed),
            bytes: self.bytes.load(Relaxed),
            place: self.place.load(Relaxed),
        }
    }
}

fn phase_mark(slot: &Slot, number: u64) -> &Mark {
    &slot.phases[(number % 2) as usize]
}

impl ShmCollective {
    /// Joins the gang as `rank` of `world_size`, all on this host. `fd` is the number of the descriptor that the agent let this
    /// process inherit; it is duplicated, not consumed.
    pub fn attach(fd: i32, rank: usize, world_size: usize, generation: u64) -> Result<ShmCollective> {
        let control = Control::attach(fd, rank, world_size, generation)?;
        control.slot(rank).history.attach();
        Ok(ShmCollective {
            arena_end: control.arena_start(),
            control: Arc::new(control),
            rank,
            names: (0..world_size).collect(),
            deadline: DEADLINE,
            sequence: 0,
            phase: 0,
            posts: 0,
            pending: VecDeque::new(),
            last_of_all: 0,
            failed: None,
        })
    }

    /// Lets errors call the ranks of this host by their numbers in a larger gang, one for each. Whoever aborts must use them too.
    pub fn named(mut self, names: Vec<usize>) -> ShmCollective {
        assert_eq!(names.len(), self.world(), "a name for each rank of the host");
        self.names = names;
        self
    }

    /// Says what this rank does, from whichever of its threads.
    pub(crate) fn notes(&self) -> Notes {
        Notes { control: self.control.clone(), rank: self.rank }
    }

    pub fn abort_handle(&self) -> AbortHandle {
        AbortHandle(self.control.clone())
    }

    pub(super) fn slot(&self) -> &Slot {
        self.control.slot(self.rank)
    }

    pub(super) fn world(&self) -> usize {
        self.control.world_size
    }

    /// Runs one call: nothing after an error, and an error stays, here and for the peers.
    pub(super) fn latched<T>(&mut self, call: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        let result = match self.control.aborted() {
            Some(abort) => Err(abort.into()),
            None => call(self),
        };
        if let Err(error) = &result {
            self.failed = Some(error.clone());
            self.control.abort(Abort::for_error(error, self.names[self.rank]));
        }
        result
    }

    /// Numbers a call and records that the rank is in it.
    pub(super) fn enter(&mut self, call: Call, bytes: usize, place: u64) -> Signature {
        self.sequence += 1;
        let exchanged = if matches!(call, Call::Allocate { .. }) { 0 } else { bytes as u64 };
        self.slot().history.enter(self.sequence, exchanged);
        Signature { sequence: self.sequence, word: call.word(), bytes: bytes as u64, place }
    }

    /// The rank that did not come: of several the one that is furthest behind. `None` if all have come after all.
    fn late(&self, signature: Signature, ready: impl Fn(&Slot) -> bool) -> Option<CollectiveError> {
        let missing = (0..self.world()).filter(|rank| !ready(self.control.slot(*rank)));
        let rank = missing.min_by_key(|rank| self.control.slot(*rank).history.calls())?;
        Some(CollectiveError::Deadline {
            rank: self.names[rank],
            operation: signature.short(),
            seconds: self.deadline.as_secs_f64(),
            doing: self.control.slot(rank).history.report(rank).doing.to_string(),
        })
    }

    /// Waits until `ready` for every rank's slot.
    pub(super) fn wait_for_all(
        &self,
        event: &Event,
        signature: Signature,
        ready: impl Fn(&Slot) -> bool,
    ) -> Result<()> {
        let all = || (0..self.world()).all(|rank| ready(self.control.slot(rank)));
        match event.wait(self.deadline, all, || self.control.is_aborted()) {
            Woken::Ready => Ok(()),
            Woken::TimedOut => self.late(signature, ready).map_or(Ok(()), Err),
            Woken::Stopped => Err(self.control.aborted().unwrap_or(Abort::Stopped).into()),
        }
    }

    /// Compares what the ranks say they do; all have marked it.
    pub(super) fn compare<'a>(&'a self, mine: Signature, mark: impl Fn(&'a Slot) -> &'a Mark) -> Result<()> {
        let says = |rank: usize| mark(self.control.slot(rank)).content();
        if (0..self.world()).all(|rank| says(rank) == mine) {
            return Ok(());
        }
        let all: Vec<(usize, Signature)> =
            (0..self.world()).map(|rank| (self.names[rank], says(rank))).collect();
        call::compare(&all)
    }

    /// One phase: mark, wait for all, compare.
    fn meet(&mut self, signature: Signature) -> Result<()> {
        self.phase += 1;
        let phase = self.phase;
        phase_mark(self.slot(), phase).set(phase, signature);
        let ready = |slot: &Slot| phase_mark(slot, phase).number.load(SeqCst) >= phase;
        let header = self.control.header();
        if (0..self.world()).all(|rank| ready(self.control.slot(rank))) {
            header.posted.wake();
        } else {
            self.wait_for_all(&header.posted, signature, ready)?;
        }
        self.compare(signature, |slot| phase_mark(slot, phase))
    }

    /// A blocking call: finishes what was posted, then `steps` phases (at least one), each filled before and drained after the
    /// ranks meet. `fill` gets this rank's half.
    pub(super) fn exchange(
        &mut self,
        call: Call,
        bytes: usize,
        steps: usize,
        mut fill: impl FnMut(usize, &mut [u8]),
        mut drain: impl FnMut(usize, &Halves<'_>),
    ) -> Result<()> {
        self.finish_posted()?;
        let signature = self.enter(call, bytes, 0);
        self.slot().history.wait_in(signature);
        for step in 0..steps.max(1) {
            let half = ((self.phase + 1) % 2) as usize;
            if step < steps {
                let staging = self.control.half(self.rank, half);
                // SAFETY: our own half, inside the mapping; peers read it only between our mark of this phase and theirs of the next,
                // and all have marked the phase before this one, which ends their reading of what this half held.
                fill(step, unsafe { std::slice::from_raw_parts_mut(staging, HALF_BYTES) });
            }
            self.meet(signature)?;
            if step < steps {
                drain(step, &Halves { control: &self.control, half });
            }
        }
        self.slot().history.go_on();
        self.slot().history.leave();
        Ok(())
    }

    /// Takes the next `bytes` of the arena, whole pages.
    pub(super) fn allocate(
        &mut self,
        common: bool,
        bytes: usize,
        copies: usize,
    ) -> Result<(memmap2::MmapRaw, usize)> {
        let offset = self.arena_end;
        let total = bytes
            .checked_next_multiple_of(PAGE)
            .and_then(|stride| stride.checked_mul(copies))
            .filter(|total| offset.checked_add(*total).is_some())
            .ok_or_else(|| refuse("allocate", format!("{bytes} bytes are more than can be mapped")))?;
        self.exchange(Call::Allocate { common }, bytes, 0, |_, _| {}, |_, _| {})?;
        let map = self.control.arena(offset, total)?;
        self.arena_end = offset + total;
        Ok((map, offset))
    }
}
