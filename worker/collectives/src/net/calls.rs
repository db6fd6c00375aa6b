//! The calls of ranks that are connected.

use super::gang::{Cut, NetCollective};
use super::rate::SlowLink;
use crate::algorithm::Operation;
use crate::call::Call;
use crate::collective::{Activity, Exchange, Gang, Pace, Posted, Ticket, refuse, through_bytes};
use crate::dtype::{DType, Op};
use crate::error::Result;
use crate::memory::PerRank;
use std::ops::Range;
use std::time::Duration;

fn expect_whole(operation: &'static str, bytes: usize, dtype: DType) -> Result<()> {
    if bytes.is_multiple_of(dtype.size()) {
        return Ok(());
    }
    Err(refuse(operation, format!("{bytes} bytes are not whole {dtype} elements")))
}

impl Gang for NetCollective {
    fn rank(&self) -> usize {
        self.rank
    }
    fn world_size(&self) -> usize {
        self.world()
    }
    fn generation(&self) -> u64 {
        self.generation
    }
    fn set_deadline(&mut self, deadline: Duration) {
        self.deadline = deadline;
    }
    fn note(&mut self, _activity: Activity) {}
    fn begin_step(&mut self, _step: u64, _last: Option<Pace>) {}

    fn barrier(&mut self) -> Result<()> {
        self.latched(|gang| gang.call(Call::Barrier, Operation::Barrier, Cut::Even, &mut [0]))
    }

    fn all_reduce_f64(&mut self, values: &mut [f64], op: Op) -> Result<()> {
        through_bytes(values, |bytes| self.all_reduce(bytes, DType::F64, op))
    }

    /// Known where ranks had more to send than connections took.
    fn slow_link(&mut self) -> Result<Option<SlowLink>> {
        let mine: Vec<f64> = {
            self.finish()?;
            self.shared.driver().peers.iter_mut().map(|peer| peer.rate.look()).collect()
        };
        let mut links = SlowLink::of_rank(self.topology(), self.rank, &mine);
        self.all_reduce_f64(&mut links, Op::Sum)?;
        Ok(SlowLink::among(self.topology().hosts(), &links))
    }
}

impl Exchange for NetCollective {
    fn all_reduce(&mut self, data: &mut [u8], dtype: DType, op: Op) -> Result<()> {
        self.latched(|gang| {
            expect_whole("all_reduce", data.len(), dtype)?;
            let operation = Operation::AllReduce(dtype, op);
            gang.call(Call::AllReduce(dtype, op), operation, Cut::Parts(dtype.size()), data)
        })
    }

    fn reduce_scatter(&mut self, input: &[u8], output: &mut [u8], dtype: DType, op: Op) -> Result<()> {
        self.latched(|gang| {
            let (bytes, world) = (output.len(), gang.world());
            expect_whole("reduce_scatter", bytes, dtype)?;
            if input.len() != bytes * world {
                let message = format!("{} bytes are not {world} parts of {bytes}", input.len());
                return Err(refuse("reduce_scatter", message));
            }
            let mut scratch = std::mem::take(&mut gang.scratch);
            scratch.clear();
            scratch.extend_from_slice(input);
            let operation = Operation::ReduceScatter(dtype, op);
            gang.call(Call::ReduceScatter(dtype, op), operation, Cut::Even, &mut scratch)?;
            output.copy_from_slice(&scratch[gang.rank * bytes..(gang.rank + 1) * bytes]);
            gang.scratch = scratch;
            Ok(())
        })
    }

    fn all_gather(&mut self, input: &[u8], output: &mut [u8]) -> Result<()> {
        self.latched(|gang| {
            let (bytes, world) = (input.len(), gang.world());
            if output.len() != bytes * world {
                let message = format!("{} bytes are not room for {world} parts of {bytes}", output.len());
                return Err(refuse("all_gather", message));
            }
            output[gang.rank * bytes..(gang.rank + 1) * bytes].copy_from_slice(input);
            gang.call(Call::AllGather(DType::U8), Operation::AllGather, Cut::Even, output)
        })
    }

    fn broadcast(&mut self, data: &mut [u8], root: usize) -> Result<()> {
        self.latched(|gang| {
            if root >= gang.world() {
                return Err(refuse("broadcast", format!("there is no rank {root} of {}", gang.world())));
            }
            gang.call(Call::Broadcast { root }, Operation::Broadcast { root }, Cut::Even, data)
        })
    }

    fn all_to_all(&mut self, input: &[u8], output: &mut [u8]) -> Result<()> {
        self.latched(|gang| {
            let (total, world) = (input.len(), gang.world());
            if output.len() != total || !total.is_multiple_of(world) {
                let message =
                    format!("input of {total} and output of {} bytes, not {world} parts each", output.len());
                return Err(refuse("all_to_all", message));
            }
            let mut scratch = std::mem::take(&mut gang.scratch);
            scratch.clear();
            scratch.extend_from_slice(input);
            scratch.resize(2 * total, 0);
            keep_own(&mut scratch, gang.rank, world);
            gang.call(Call::AllToAll, Operation::AllToAll, Cut::Even, &mut scratch)?;
            output.copy_from_slice(&scratch[total..]);
            gang.scratch = scratch;
            Ok(())
        })
    }

    fn allocate_per_rank(&mut self, bytes: usize) -> Result<PerRank> {
        let buffer = PerRank::registered(bytes, self.next_buffer)?;
        // Ranges of two buffers are never the same place.
        self.next_buffer += (bytes as u64 + 1).next_multiple_of(64);
        Ok(buffer)
    }

    fn post(&mut self, buffers: &PerRank, bytes: Range<usize>, exchange: Posted) -> Result<Ticket> {
        let place = buffers.id + bytes.start as u64;
        self.post_at(buffers, bytes, exchange, place)
    }

    fn progress(&mut self) -> Result<()> {
        self.latched(|gang| gang.posts.wait_for(0))
    }

    fn pending(&self) -> usize {
        self.posts.pending()
    }

    fn wait(&mut self, ticket: Ticket) -> Result<()> {
        self.latched(|gang| gang.posts.wait_for(ticket.0))
    }

    fn finish(&mut self) -> Result<()> {
        self.latched(|gang| gang.posts.finish())
    }
}

/// The part that a rank sends to itself, from the input half to the output half.
pub(super) fn keep_own(buffer: &mut [u8], rank: usize, world: usize) {
    let half = buffer.len() / 2;
    let size = half / world;
    buffer.copy_within(rank * size..(rank + 1) * size, half + rank * size);
}
