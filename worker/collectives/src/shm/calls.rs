//! The calls of ranks that share a segment.

#![allow(unsafe_code)]

use super::gang::ShmCollective;
use super::posted::Told;
use super::segment::{HALF_BYTES, PAGE, RANKS_MAX};
use crate::call::Call;
use crate::collective::{
    Activity, Exchange, Gang, Gather, Keep, Pace, Posted, SharedHost, Ticket, refuse, through_bytes,
};
use crate::dtype::{DType, Op};
use crate::error::Result;
use crate::memory::reduce::reduce;
use crate::memory::{Common, PerRank};
use std::ops::Range;
use std::time::Duration;

fn expect_whole(operation: &'static str, bytes: usize, dtype: DType) -> Result<()> {
    if bytes.is_multiple_of(dtype.size()) {
        return Ok(());
    }
    Err(refuse(operation, format!("{bytes} bytes are not whole {dtype} elements")))
}

/// Phases that `bytes` need in chunks of `chunk`.
fn steps(bytes: usize, chunk: usize) -> usize {
    bytes.div_ceil(chunk)
}

/// The bytes of chunk `step`.
fn chunk_of(step: usize, chunk: usize, bytes: usize) -> Range<usize> {
    step * chunk..((step + 1) * chunk).min(bytes)
}

impl Gang for ShmCollective {
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

    fn begin_step(&mut self, step: u64, last: Option<Pace>) {
        self.slot().history.begin_step(step, last);
    }

    fn barrier(&mut self) -> Result<()> {
        self.latched(|gang| gang.exchange(Call::Barrier, 0, 0, |_, _| {}, |_, _| {}))
    }

    fn all_reduce_f64(&mut self, values: &mut [f64], op: Op) -> Result<()> {
        through_bytes(values, |bytes| self.all_reduce(bytes, DType::F64, op))
    }
}

impl Exchange for ShmCollective {
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
                Call::AllGather(DType::U8),
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

    fn allocate_per_rank(&mut self, bytes: usize) -> Result<PerRank> {
        self.latched(|gang| {
            let (map, offset) = gang.allocate(false, bytes, gang.world())?;
            let stride = bytes.next_multiple_of(PAGE);
            Ok(PerRank::new(map, bytes, stride, gang.rank, gang.world(), offset as u64))
        })
    }

    fn post(&mut self, buffers: &PerRank, bytes: Range<usize>, exchange: Posted) -> Result<Ticket> {
        let told = Told { exchange, call: exchange.call(), of_all: true, own: None };
        self.latched(|gang| gang.post_exchange(buffers, bytes, told))
    }

    fn progress(&mut self) -> Result<()> {
        self.latched(ShmCollective::work_off_ready)
    }

    fn pending(&self) -> usize {
        self.pending.len()
    }

    fn wait(&mut self, ticket: Ticket) -> Result<()> {
        self.latched(|gang| gang.finish_until(ticket))
    }

    fn finish(&mut self) -> Result<()> {
        self.latched(ShmCollective::finish_posted)
    }
}

impl SharedHost for ShmCollective {
    fn local_rank(&self) -> usize {
        self.rank
    }

    fn local_size(&self) -> usize {
        self.world()
    }

    fn host(&self) -> usize {
        0
    }

    fn size_of_host(&self, host: usize) -> usize {
        if host == 0 { self.world() } else { 0 }
    }

    fn all_reduce_f64_of_host(&mut self, values: &mut [f64], op: Op) -> Result<()> {
        self.all_reduce_f64(values, op)
    }

    fn allocate_common(&mut self, bytes: usize) -> Result<Common> {
        self.latched(|gang| {
            let (map, _) = gang.allocate(true, bytes, 1)?;
            Ok(Common::new(map, bytes))
        })
    }

    fn post_reduce(
        &mut self,
        buffers: &PerRank,
        bytes: Range<usize>,
        dtype: DType,
        op: Op,
        keep: Keep,
    ) -> Result<Ticket> {
        let (exchange, of_all) = match keep {
            Keep::MyPart | Keep::MyPartOfHost | Keep::MyShard => (Posted::ReduceScatter(dtype, op), false),
            Keep::Everything => (Posted::AllReduce(dtype, op), true),
        };
        let told = Told { exchange, call: Call::Reduce(dtype, op, keep), of_all, own: None };
        self.latched(|gang| gang.post_exchange(buffers, bytes, told))
    }

    fn post_gather_of_host(
        &mut self,
        buffers: &PerRank,
        bytes: Range<usize>,
        dtype: DType,
    ) -> Result<Ticket> {
        self.post(buffers, bytes, Posted::AllGather(dtype))
    }

    /// The ranks of one host need not send each other anything: each puts its part in place, once all have left what was there.
    fn post_gather(&mut self, gather: Gather<'_>) -> Result<Ticket> {
        self.latched(|gang| {
            let own = gather.check(gang.rank, gang.world())?;
            gang.exchange(Call::Gather, own.len(), 0, |_, _| {}, |_, _| {})?;
            gather.place_own(own);
            let told =
                Told { exchange: Posted::AllGather(DType::U8), call: Call::Gather, of_all: true, own: None };
            gang.post_exchange(gather.from.0, 0..0, told)
        })
    }
}

impl ShmCollective {
    /// A `post_reduce` of which this rank gets `own`, bytes of the buffer, and no other rank of the host the same.
    pub(crate) fn post_reduce_own(
        &mut self,
        buffers: &PerRank,
        bytes: Range<usize>,
        dtype: DType,
        op: Op,
        own: Vec<Range<usize>>,
    ) -> Result<Ticket> {
        let exchange = Posted::ReduceScatter(dtype, op);
        let call = Call::Reduce(dtype, op, Keep::MyShard);
        let told = Told { exchange, call, of_all: false, own: Some(own) };
        self.latched(|gang| gang.post_exchange(buffers, bytes, told))
    }
}
