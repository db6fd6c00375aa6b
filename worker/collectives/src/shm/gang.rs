//! A rank's end of the shared segment: the collectives themselves.

#![allow(unsafe_code)]

use super::memory::{Common, PerRank};
use super::reduce::reduce;
use super::segment::{Abort, Control, HALF_BYTES, Mark, PAGE, POSTS_MAX, RANKS_MAX, Slot};
use super::trace::{self, Call};
use super::wait::Woken;
use crate::collective::{Activity, Collective, DType, Keep, Op, part};
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
    control: Arc<Control>,
    rank: usize,
    deadline: Duration,
    /// Calls made, blocking and posted.
    sequence: u64,
    /// Phases gone through.
    phase: u64,
    /// Reductions posted.
    posts: u64,
    /// Posted and not yet done by this rank, oldest first.
    pending: VecDeque<Posted>,
    /// Number of the last post whose result every rank writes into every buffer.
    last_everything: u64,
    /// Bytes of the segment's file in use; the same on every rank.
    arena_end: usize,
    failed: Option<CollectiveError>,
}

struct Posted {
    number: u64,
    sequence: u64,
    buffers: PerRank,
    bytes: Range<usize>,
    dtype: DType,
    op: Op,
    keep: Keep,
}

/// What a rank says about a call when it marks its arrival; equal on all ranks or the gang is broken.
#[derive(Clone, Copy)]
struct Signature {
    sequence: u64,
    call: Call,
    bytes: u64,
    /// Where in the shared buffers; 0 for other calls.
    place: u64,
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
struct Halves<'a> {
    control: &'a Control,
    half: usize,
}

impl Halves<'_> {
    fn of(&self, rank: usize) -> *const u8 {
        self.control.half(rank, self.half)
    }

    /// `range` must lie within a half and hold what `rank` put there in this phase.
    fn copy_out(&self, rank: usize, range: Range<usize>, to: &mut [u8]) {
        assert!(range.end <= HALF_BYTES && range.len() == to.len(), "outside of the staging area");
        // SAFETY: inside the mapping; the owner does not write to this half again before we mark the next phase.
        unsafe { std::ptr::copy_nonoverlapping(self.of(rank).add(range.start), to.as_mut_ptr(), to.len()) }
    }
}

impl Mark {
    fn set(&self, number: u64, signature: Signature) {
        self.sequence.store(signature.sequence, Relaxed);
        self.what.store(signature.call.word(), Relaxed);
        self.bytes.store(signature.bytes, Relaxed);
        self.place.store(signature.place, Relaxed);
        self.number.store(number, SeqCst);
    }

    fn has(&self, signature: Signature) -> bool {
        self.content() == [signature.sequence, signature.call.word(), signature.bytes, signature.place]
    }

    fn content(&self) -> [u64; 4] {
        [&self.sequence, &self.what, &self.bytes, &self.place].map(|word| word.load(Relaxed))
    }
}

fn phase_mark(slot: &Slot, number: u64) -> &Mark {
    &slot.phases[(number % 2) as usize]
}

fn post_mark(slot: &Slot, number: u64) -> &Mark {
    &slot.posts[(number % POSTS_MAX as u64) as usize]
}

fn refuse(operation: &'static str, message: String) -> CollectiveError {
    CollectiveError::Refused { operation, message }
}

fn expect_whole(operation: &'static str, bytes: usize, dtype: DType) -> Result<()> {
    if bytes.is_multiple_of(dtype.size()) {
        return Ok(());
    }
    Err(refuse(operation, format!("{bytes} bytes are not whole {dtype} elements")))
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
            deadline: DEADLINE,
            sequence: 0,
            phase: 0,
            posts: 0,
            pending: VecDeque::new(),
            last_everything: 0,
            failed: None,
        })
    }

    pub fn abort_handle(&self) -> AbortHandle {
        AbortHandle(self.control.clone())
    }

    fn slot(&self) -> &Slot {
        self.control.slot(self.rank)
    }

    fn world(&self) -> usize {
        self.control.world_size
    }

    /// Runs one call: nothing after an error, and an error stays, here and for the peers.
    fn latched<T>(&mut self, call: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        let result = match self.control.aborted() {
            Some(abort) => Err(abort.into()),
            None => call(self),
        };
        if let Err(error) = &result {
            self.failed = Some(error.clone());
            self.control.abort(match error {
                CollectiveError::Deadline { rank, .. } => Abort::RankLate(*rank),
                CollectiveError::Mismatch { rank, .. } => Abort::RankDiffers(*rank),
                _ => Abort::RankFailed(self.rank),
            });
        }
        result
    }

    /// Numbers a call and records that the rank is in it.
    fn enter(&mut self, call: Call, bytes: usize, place: u64) -> Signature {
        self.sequence += 1;
        self.slot().history.enter(self.sequence);
        Signature { sequence: self.sequence, call, bytes: bytes as u64, place }
    }

    /// The rank that did not come: of several the one that is furthest behind. `None` if all have come after all.
    fn late(&self, signature: Signature, ready: impl Fn(&Slot) -> bool) -> Option<CollectiveError> {
        let missing = (0..self.world()).filter(|rank| !ready(self.control.slot(*rank)));
        let rank = missing.min_by_key(|rank| self.control.slot(*rank).history.calls())?;
        Some(CollectiveError::Deadline {
            rank,
            operation: format!("{} #{}", trace::name(signature.call.word()), signature.sequence),
            seconds: self.deadline.as_secs_f64(),
            doing: self.control.slot(rank).history.report(rank).doing.to_string(),
        })
    }

    /// Waits until `ready` for every rank's slot.
    fn wait(
        &self,
        event: &super::wait::Event,
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

    /// Compares what the ranks say they do; all have marked it. Names the first rank that is not with the majority.
    fn compare<'a>(&'a self, signature: Signature, mark: impl Fn(&'a Slot) -> &'a Mark) -> Result<()> {
        let ranks = || (0..self.world()).map(|rank| (rank, mark(self.control.slot(rank))));
        if ranks().all(|(_, mark)| mark.has(signature)) {
            return Ok(());
        }
        let says: Vec<[u64; 4]> = ranks().map(|(_, mark)| mark.content()).collect();
        let agree = |rank: usize| says.iter().filter(|other| **other == says[rank]).count();
        let most = (0..says.len()).rev().max_by_key(|rank| agree(*rank)).unwrap_or(0);
        let odd = (0..says.len()).find(|rank| says[*rank] != says[most]).unwrap_or(self.rank);
        let describe = |rank: usize| trace::describe(says[rank][0], says[rank][1], says[rank][2]);
        Err(CollectiveError::Mismatch {
            rank: odd,
            other: most,
            theirs: describe(odd),
            others: describe(most),
        })
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
            self.wait(&header.posted, signature, ready)?;
        }
        self.compare(signature, |slot| phase_mark(slot, phase))
    }

    /// A blocking call: finishes what was posted, then `steps` phases (at least one), each filled before and drained after the
    /// ranks meet. `fill` gets this rank's half.
    fn exchange(
        &mut self,
        call: Call,
        bytes: usize,
        steps: usize,
        mut fill: impl FnMut(usize, &mut [u8]),
        mut drain: impl FnMut(usize, &Halves<'_>),
    ) -> Result<()> {
        self.finish_posted()?;
        let signature = self.enter(call, bytes, 0);
        self.slot().history.wait_in(signature.sequence, signature.call);
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

    fn signature(posted: &Posted) -> Signature {
        Signature {
            sequence: posted.sequence,
            call: Call::Reduce(posted.dtype, posted.op, posted.keep),
            bytes: posted.bytes.len() as u64,
            place: posted.buffers.id + posted.bytes.start as u64,
        }
    }

    /// Every rank's input is complete: reduces this rank's part where it lies and says so.
    fn work_off(&mut self, posted: &Posted) -> Result<()> {
        self.compare(Self::signature(posted), |slot| post_mark(slot, posted.number))?;
        let size = posted.dtype.size();
        let mine = part(posted.bytes.len() / size, self.rank, self.world());
        let start = posted.bytes.start + mine.start * size;
        let mut all = [std::ptr::null_mut::<u8>(); RANKS_MAX];
        for (rank, pointer) in all[..self.world()].iter_mut().enumerate() {
            *pointer = posted.buffers.of(rank).wrapping_add(start);
        }
        let sources = all.map(<*mut u8>::cast_const);
        let results = match posted.keep {
            Keep::Everything => &all[..self.world()],
            Keep::MyPart => &all[self.rank..=self.rank],
        };
        // SAFETY: the range was checked against the buffers when it was posted, and all ranks posted the same. All ranks have marked
        // their input complete; nobody but this rank reads or writes this part of any buffer until it is done.
        unsafe { reduce(&sources[..self.world()], results, mine.len(), posted.dtype, posted.op) };
        self.slot().done.value.store(posted.number, SeqCst);
        self.control.header().done.wake();
        self.slot().history.leave();
        Ok(())
    }

    fn is_posted(&self, number: u64) -> bool {
        (0..self.world()).all(|r| post_mark(self.control.slot(r), number).number.load(SeqCst) >= number)
    }

    fn work_off_ready(&mut self) -> Result<()> {
        while let Some(front) = self.pending.front()
            && self.is_posted(front.number)
            && let Some(posted) = self.pending.pop_front()
        {
            self.work_off(&posted)?;
        }
        Ok(())
    }

    fn work_off_front(&mut self) -> Result<()> {
        let Some(posted) = self.pending.pop_front() else { return Ok(()) };
        let (number, signature) = (posted.number, Self::signature(&posted));
        self.slot().history.wait_in(signature.sequence, signature.call);
        self.wait(&self.control.header().posted, signature, |slot| {
            post_mark(slot, number).number.load(SeqCst) >= number
        })?;
        self.slot().history.go_on();
        self.work_off(&posted)
    }

    /// Waits until every rank has done its part of post `number`, which this rank has.
    fn wait_done(&self, number: u64, signature: Signature) -> Result<()> {
        self.slot().history.wait_in(signature.sequence, signature.call);
        self.wait(&self.control.header().done, signature, |slot| slot.done.value.load(SeqCst) >= number)?;
        self.slot().history.go_on();
        Ok(())
    }

    fn finish_posted(&mut self) -> Result<()> {
        let Some(last) = self.pending.back().map(Self::signature) else {
            return self.finish_everything(None);
        };
        while !self.pending.is_empty() {
            self.work_off_front()?;
        }
        self.finish_everything(Some(last))
    }

    /// The peers write their parts of what was posted with `Keep::Everything` into this rank's buffer: waits for them.
    fn finish_everything(&mut self, last: Option<Signature>) -> Result<()> {
        let number = std::mem::take(&mut self.last_everything);
        if number == 0 {
            return Ok(());
        }
        let signature = last.unwrap_or(Signature {
            sequence: self.sequence,
            call: Call::Reduce(DType::F32, Op::Sum, Keep::Everything),
            bytes: 0,
            place: 0,
        });
        self.wait_done(number, signature)
    }

    /// Takes the next `bytes` of the arena, whole pages.
    fn allocate(&mut self, common: bool, bytes: usize, copies: usize) -> Result<(memmap2::MmapRaw, usize)> {
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

/// Phases that `bytes` need in chunks of `chunk`.
fn steps(bytes: usize, chunk: usize) -> usize {
    bytes.div_ceil(chunk)
}

/// The bytes of chunk `step`.
fn chunk_of(step: usize, chunk: usize, bytes: usize) -> Range<usize> {
    step * chunk..((step + 1) * chunk).min(bytes)
}

impl Collective for ShmCollective {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.control.world_size
    }

    fn generation(&self) -> u64 {
        self.control.generation
    }

    fn set_deadline(&mut self, deadline: Duration) {
        self.deadline = deadline;
    }

    fn note(&mut self, activity: Activity) {
        self.slot().history.note(activity);
    }

    fn begin_step(&mut self, step: u64, last: Option<Duration>) {
        self.slot().history.begin_step(step, last);
    }

    fn all_reduce(&mut self, data: &mut [u8], dtype: DType, op: Op) -> Result<()> {
        let (bytes, world) = (data.len(), self.world());
        // `fill` and `drain` both want the data, one after the other.
        let data = std::cell::RefCell::new(data);
        self.latched(|gang| {
            expect_whole("all_reduce", bytes, dtype)?;
            gang.exchange(
                Call::AllReduce(dtype, op),
                bytes,
                steps(bytes, HALF_BYTES),
                |step, staging| {
                    let range = chunk_of(step, HALF_BYTES, bytes);
                    staging[..range.len()].copy_from_slice(&data.borrow()[range]);
                },
                |step, halves| {
                    let range = chunk_of(step, HALF_BYTES, bytes);
                    let elements = range.len() / dtype.size();
                    let mut sources = [std::ptr::null::<u8>(); RANKS_MAX];
                    for (rank, source) in sources[..world].iter_mut().enumerate() {
                        *source = halves.of(rank);
                    }
                    let result = data.borrow_mut()[range].as_mut_ptr();
                    // SAFETY: the chunk is no longer than a half; nobody writes to these halves before we mark the next phase; the result
                    // is ordinary memory of our own.
                    unsafe { reduce(&sources[..world], &[result], elements, dtype, op) };
                },
            )
        })
    }

    fn reduce_scatter(&mut self, input: &[u8], output: &mut [u8], dtype: DType, op: Op) -> Result<()> {
        let (bytes, world, me) = (output.len(), self.world(), self.rank);
        self.latched(|gang| {
            expect_whole("reduce_scatter", bytes, dtype)?;
            if input.len() != bytes * world {
                let message = format!("{} bytes are not {world} parts of {bytes}", input.len());
                return Err(refuse("reduce_scatter", message));
            }
            let chunk = HALF_BYTES / world / dtype.size() * dtype.size();
            gang.exchange(
                Call::ReduceScatter(dtype, op),
                bytes,
                steps(bytes, chunk),
                |step, staging| {
                    let range = chunk_of(step, chunk, bytes);
                    for (part, room) in input.chunks_exact(bytes).zip(staging.chunks_exact_mut(chunk)) {
                        room[..range.len()].copy_from_slice(&part[range.clone()]);
                    }
                },
                |step, halves| {
                    let range = chunk_of(step, chunk, bytes);
                    let elements = range.len() / dtype.size();
                    let mut sources = [std::ptr::null::<u8>(); RANKS_MAX];
                    for (rank, source) in sources[..world].iter_mut().enumerate() {
                        *source = halves.of(rank).wrapping_add(me * chunk);
                    }
                    let result = output[range].as_mut_ptr();
                    // SAFETY: our part of each half, no longer than `chunk`; nobody writes to these halves before we mark the next phase;
                    // the result is ordinary memory of our own.
                    unsafe { reduce(&sources[..world], &[result], elements, dtype, op) };
                },
            )
        })
    }

    fn all_gather(&mut self, input: &[u8], output: &mut [u8]) -> Result<()> {
        let (bytes, world) = (input.len(), self.world());
        self.latched(|gang| {
            if output.len() != bytes * world {
                let message = format!("{} bytes are not room for {world} parts of {bytes}", output.len());
                return Err(refuse("all_gather", message));
            }
            gang.exchange(
                Call::AllGather,
                bytes,
                steps(bytes, HALF_BYTES),
                |step, staging| {
                    let range = chunk_of(step, HALF_BYTES, bytes);
                    staging[..range.len()].copy_from_slice(&input[range]);
                },
                |step, halves| {
                    let range = chunk_of(step, HALF_BYTES, bytes);
                    for (rank, part) in output.chunks_exact_mut(bytes).enumerate() {
                        halves.copy_out(rank, 0..range.len(), &mut part[range.clone()]);
                    }
                },
            )
        })
    }

    fn broadcast(&mut self, data: &mut [u8], root: usize) -> Result<()> {
        let (bytes, world, me) = (data.len(), self.world(), self.rank);
        let data = std::cell::RefCell::new(data);
        self.latched(|gang| {
            if root >= world {
                return Err(refuse("broadcast", format!("there is no rank {root} of {world}")));
            }
            gang.exchange(
                Call::Broadcast { root },
                bytes,
                steps(bytes, HALF_BYTES),
                |step, staging| {
                    let range = chunk_of(step, HALF_BYTES, bytes);
                    if me == root {
                        staging[..range.len()].copy_from_slice(&data.borrow()[range]);
                    }
                },
                |step, halves| {
                    let range = chunk_of(step, HALF_BYTES, bytes);
                    if me != root {
                        halves.copy_out(root, 0..range.len(), &mut data.borrow_mut()[range]);
                    }
                },
            )
        })
    }

    fn all_to_all(&mut self, input: &[u8], output: &mut [u8]) -> Result<()> {
        let (total, world, me) = (input.len(), self.world(), self.rank);
        self.latched(|gang| {
            if output.len() != total || !total.is_multiple_of(world) {
                let message =
                    format!("input of {total} and output of {} bytes, not {world} parts each", output.len());
                return Err(refuse("all_to_all", message));
            }
            let (bytes, chunk) = (total / world, HALF_BYTES / world);
            gang.exchange(
                Call::AllToAll,
                bytes,
                steps(bytes, chunk),
                |step, staging| {
                    let range = chunk_of(step, chunk, bytes);
                    for (part, room) in input.chunks_exact(bytes).zip(staging.chunks_exact_mut(chunk)) {
                        room[..range.len()].copy_from_slice(&part[range.clone()]);
                    }
                },
                |step, halves| {
                    let range = chunk_of(step, chunk, bytes);
                    for (rank, part) in output.chunks_exact_mut(bytes).enumerate() {
                        let theirs = me * chunk..me * chunk + range.len();
                        halves.copy_out(rank, theirs, &mut part[range.clone()]);
                    }
                },
            )
        })
    }

    fn barrier(&mut self) -> Result<()> {
        self.latched(|gang| gang.exchange(Call::Barrier, 0, 0, |_, _| {}, |_, _| {}))
    }

    fn allocate_common(&mut self, bytes: usize) -> Result<Common> {
        self.latched(|gang| {
            let (map, _) = gang.allocate(true, bytes, 1)?;
            Ok(Common::new(map, bytes))
        })
    }

    fn allocate_per_rank(&mut self, bytes: usize) -> Result<PerRank> {
        self.latched(|gang| {
            let (map, offset) = gang.allocate(false, bytes, gang.world())?;
            let stride = bytes.next_multiple_of(PAGE);
            Ok(PerRank::new(map, bytes, stride, gang.rank, gang.world(), offset as u64))
        })
    }

    fn post_reduce(
        &mut self,
        buffers: &PerRank,
        bytes: Range<usize>,
        dtype: DType,
        op: Op,
        keep: Keep,
    ) -> Result<()> {
        self.latched(|gang| {
            buffers.check(&bytes, dtype)?;
            if buffers.ranks() != gang.world() {
                return Err(refuse("reduce", "the buffer was not allocated by this gang".to_owned()));
            }
            // The oldest mark is overwritten only when every rank has compared it.
            if let Some(oldest) = (gang.posts + 1).checked_sub(POSTS_MAX as u64).filter(|n| *n > 0) {
                while gang.pending.front().is_some_and(|posted| posted.number <= oldest) {
                    gang.work_off_front()?;
                }
                let call = Call::Reduce(dtype, op, keep);
                let sequence = gang.sequence;
                gang.wait_done(oldest, Signature { sequence, call, bytes: 0, place: 0 })?;
            }
            let call = Call::Reduce(dtype, op, keep);
            let place = buffers.id + bytes.start as u64;
            let signature = gang.enter(call, bytes.len(), place);
            gang.posts += 1;
            let number = gang.posts;
            if keep == Keep::Everything {
                gang.last_everything = number;
            }
            let buffers = buffers.clone();
            let sequence = signature.sequence;
            gang.pending.push_back(Posted { number, sequence, buffers, bytes, dtype, op, keep });
            post_mark(gang.slot(), number).set(number, signature);
            if gang.is_posted(number) {
                gang.control.header().posted.wake();
            }
            gang.work_off_ready()
        })
    }

    fn progress(&mut self) -> Result<()> {
        self.latched(ShmCollective::work_off_ready)
    }

    fn finish(&mut self) -> Result<()> {
        self.latched(ShmCollective::finish_posted)
    }
}
