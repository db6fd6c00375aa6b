//! The traits that the engine programs against: what ranks can do together, from what every transport can to what only ranks of one host
//! can. No transport is named here.
//!
//! | trait | who has it |
//! |---|---|
//! | `Gang`: who am I, meet, add a few numbers | all |
//! | `Exchange`: buffers from rank to rank | all that have host memory |
//! | `SharedHost`: memory that all ranks of a host see | `Solo`, `ShmCollective`, `HostCollective` |

use crate::call::Call;
use crate::dtype::{DType, Op};
use crate::error::{CollectiveError, Result};
use crate::memory::{Common, PerRank};
use crate::net::SlowLink;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

/// Of each rank of a gang, in rank order, the bytes of a buffer that are its own; each begins where the one before it ends.
pub type Parts = Arc<[Range<usize>]>;

/// What the result of `SharedHost::post_reduce` is, and where it is left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// Each rank has the result of its `part` among the ranks of its host, in its own buffer; the rest of its buffer keeps its input.
    MyPart,
    /// The result is over the ranks of the host alone: nothing goes across. It is left as with `MyPart`.
    MyPartOfHost,
    /// Each rank has the result of its `part` among all ranks of the gang, in its own buffer; what the rest holds is not defined.
    MyShard,
    /// Every rank has the whole result in its own buffer.
    Everything,
}

/// What a rank does between collectives, for the diagnosis of stalls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activity {
    Starting,
    LoadingData,
    Forward,
    Backward,
    Optimizer,
    Evaluating,
    Saving,
}

impl fmt::Display for Activity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Activity::Starting => "starting",
            Activity::LoadingData => "loading data",
            Activity::Forward => "in forward",
            Activity::Backward => "in backward",
            Activity::Optimizer => "in the optimizer",
            Activity::Evaluating => "evaluating",
            Activity::Saving => "saving a checkpoint",
        })
    }
}

/// How a step went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pace {
    pub took: Duration,
    /// So much of that this rank computed; for the rest it was busy with its peers.
    pub computed: Duration,
}

/// Parts of a reduction begin at multiples of this many elements: whole cache lines for every type, so that ranks never write
/// into the same line.
pub const PART_ALIGN: usize = 64;

/// The elements, of `0..elements`, that `rank` of `world_size` reduces and (with sharded optimizer state) updates. The parts of all ranks
/// cover `0..elements` once, in rank order; late parts can be shorter or empty.
pub fn part(elements: usize, rank: usize, world_size: usize) -> Range<usize> {
    let size = elements.div_ceil(world_size).next_multiple_of(PART_ALIGN);
    (rank * size).min(elements)..((rank + 1) * size).min(elements)
}

/// An exchange that can be posted, in place on a range of every rank's registered buffer. `part` is that of all elements of the range
/// among all ranks of the gang.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Posted {
    /// The range becomes the reduction over all ranks.
    AllReduce(DType, Op),
    /// This rank's `part` becomes the reduction; what the rest of the range holds afterwards is not defined.
    ReduceScatter(DType, Op),
    /// Each rank gives its `part`; the range becomes all of them.
    AllGather(DType),
    Broadcast {
        root: usize,
    },
    /// The first half of the range is the input, the second the output; both hold `world_size` parts of equal length.
    AllToAll,
}

impl Posted {
    pub(crate) fn call(self) -> Call {
        match self {
            Posted::AllReduce(dtype, op) => Call::AllReduce(dtype, op),
            Posted::ReduceScatter(dtype, op) => Call::ReduceScatter(dtype, op),
            Posted::AllGather(dtype) => Call::AllGather(dtype),
            Posted::Broadcast { root } => Call::Broadcast { root },
            Posted::AllToAll => Call::AllToAll,
        }
    }

    /// Refuses what cannot be done on `bytes` of `buffers` by `world_size` ranks.
    pub(crate) fn check(self, buffers: &PerRank, bytes: &Range<usize>, world_size: usize) -> Result<()> {
        let whole = match self {
            Posted::AllReduce(dtype, _) | Posted::ReduceScatter(dtype, _) | Posted::AllGather(dtype) => dtype,
            Posted::Broadcast { .. } | Posted::AllToAll => DType::U8,
        };
        buffers.check(bytes, whole)?;
        match self {
            Posted::Broadcast { root } if root >= world_size => {
                Err(refuse("broadcast", format!("there is no rank {root} of {world_size}")))
            }
            Posted::AllToAll if !bytes.len().is_multiple_of(2 * world_size) => {
                let message =
                    format!("{} bytes are not {world_size} parts of input and output each", bytes.len());
                Err(refuse("all_to_all", message))
            }
            _ => Ok(()),
        }
    }
}

pub(crate) fn refuse(operation: &'static str, message: String) -> CollectiveError {
    CollectiveError::Refused { operation, message }
}

/// A posted exchange, to be waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ticket(pub(crate) u64);

/// One rank's end of a gang: who it is, and how it meets the others. Every rank makes the same calls in the same order with the same sizes.
///
/// Errors latch: after one, every further call fails at once with the same error. A call waits at most the deadline for its peers, and
/// ends early when the gang is aborted. Blocking calls first `finish` what was posted.
pub trait Gang: Send {
    fn rank(&self) -> usize;
    fn world_size(&self) -> usize;
    /// The start of the job's gang that this rank belongs to.
    fn generation(&self) -> u64;
    /// Longest wait of one call for its peers. 60 s until set.
    fn set_deadline(&mut self, deadline: Duration);
    /// Tells whoever looks at a stalled gang what this rank is doing now. Costs one store.
    fn note(&mut self, activity: Activity);
    /// Tells the same that this rank begins a step, counted from 1, and how the one before went, where that is how steps go.
    fn begin_step(&mut self, step: u64, last: Option<Pace>);
    /// Returns when every rank has called it; what they wrote before, also in shared buffers, is then visible.
    fn barrier(&mut self) -> Result<()>;
    /// Replaces each of a few numbers by its reduction over all ranks.
    fn all_reduce_f64(&mut self, values: &mut [f64], op: Op) -> Result<()>;
    /// The link between hosts, if there is one, that was much slower than the others since the last call. A collective call; all ranks get
    /// the same.
    fn slow_link(&mut self) -> Result<Option<SlowLink>> {
        Ok(None)
    }
}

/// Buffers travel between ranks: at once, or posted and worked off while the caller computes.
///
/// A posted exchange works in place. From `post` to the return of its `wait` (or of `finish`, or of any blocking call) the range belongs to
/// the transport. What is posted is done in the order in which it was posted.
pub trait Exchange: Gang {
    /// Replaces `data` by the reduction of all ranks' `data`.
    fn all_reduce(&mut self, data: &mut [u8], dtype: DType, op: Op) -> Result<()>;
    /// `input` holds `world_size` parts of `output.len()` bytes; `output` becomes the reduction of all ranks' part number `rank`.
    fn reduce_scatter(&mut self, input: &[u8], output: &mut [u8], dtype: DType, op: Op) -> Result<()>;
    /// `output` becomes all ranks' `input`, in rank order; `output.len() == world_size * input.len()`.
    fn all_gather(&mut self, input: &[u8], output: &mut [u8]) -> Result<()>;
    /// `data` becomes rank `root`'s `data`.
    fn broadcast(&mut self, data: &mut [u8], root: usize) -> Result<()>;
    /// Part `p` of `output` becomes part `rank` of rank `p`'s `input`; both hold `world_size` parts of equal length.
    fn all_to_all(&mut self, input: &[u8], output: &mut [u8]) -> Result<()>;

    /// A registered buffer for each rank, zeroed, page-aligned, for what is posted. A collective call.
    fn allocate_per_rank(&mut self, bytes: usize) -> Result<PerRank>;
    /// Starts an exchange of `bytes` (a range of bytes of every rank's buffer) and returns at once.
    fn post(&mut self, buffers: &PerRank, bytes: Range<usize>, exchange: Posted) -> Result<Ticket>;
    /// Does what this rank can do now for what is posted. Never waits. A transport with threads of its own needs none of it.
    fn progress(&mut self) -> Result<()>;
    /// Of what is posted so much was not done when it was looked at last. Costs nothing.
    fn pending(&self) -> usize;
    /// Completes a posted exchange, and all that were posted before it.
    fn wait(&mut self, ticket: Ticket) -> Result<()>;
    /// Completes everything posted.
    fn finish(&mut self) -> Result<()>;
}

/// Ranks of one host share memory, so that weights and optimizer state lie there once.
///
/// For data-parallel training: gradients in a `PerRank` buffer; master weights, optimizer state and the bf16 copy in `Common` buffers;
/// then per step
/// 1. after each block's last backward `post_reduce(&grads, range_of_block, F32, Sum, Keep::MyPart)`, which also makes progress;
/// 2. `finish()`: now `part(elements_of_block, local_rank, local_size)` of each block's range holds the sum over all ranks of the gang, the
///    same bits on every host;
/// 3. the sum of squares of these parts through `all_reduce_f64`, counted on the first host alone: after it no peer reads this rank's
///    gradients any more, so they may be zeroed or overwritten;
/// 4. the optimizer on the own parts of the common buffers;
/// 5. `barrier()`: all parts are written, the next forward may read them.
pub trait SharedHost: Exchange {
    /// This rank's place among the ranks of its host.
    fn local_rank(&self) -> usize;
    /// Ranks on this host.
    fn local_size(&self) -> usize;
    /// This rank's host among those of the gang, from 0. What every host has the same of is counted on host 0.
    fn host(&self) -> usize;

    /// Ranks on a host of the gang; 0 where there is no such host.
    fn size_of_host(&self, host: usize) -> usize;

    /// As `all_reduce_f64`, over the ranks of this host alone.
    fn all_reduce_f64_of_host(&mut self, values: &mut [f64], op: Op) -> Result<()>;
    /// One buffer that all ranks of the host see, zeroed, page-aligned. A collective call.
    fn allocate_common(&mut self, bytes: usize) -> Result<Common>;
    /// Starts the reduction of `bytes` (a range of bytes of every rank's buffer) over all ranks of the gang and returns at once: this rank's
    /// input is complete and must not be touched until `wait` of the ticket, or `finish`. Then the result is in place. After `finish` other
    /// ranks may still be reading this rank's buffer until the next blocking call returns; after `wait`, and with `Keep::Everything`, nobody does.
    fn post_reduce(
        &mut self,
        buffers: &PerRank,
        bytes: Range<usize>,
        dtype: DType,
        op: Op,
        keep: Keep,
    ) -> Result<Ticket>;

    /// As `post` of an `AllGather`, of the `part`s of the ranks of this host alone.
    fn post_gather_of_host(&mut self, buffers: &PerRank, bytes: Range<usize>, dtype: DType)
    -> Result<Ticket>;

    /// Starts to collect what the ranks of the gang have each of `parts`, into a range of the host's memory, and returns at once. From the post
    /// to its `wait` the source and the parts belong to the transport, on all ranks of the host: nobody reads what was there before.
    fn post_gather(&mut self, gather: Gather<'_>) -> Result<Ticket>;
}

/// What `SharedHost::post_gather` collects: once for each host.
#[derive(Clone, Copy, Debug)]
pub struct Gather<'a> {
    /// Where this rank's part is: its own buffer, from this byte on.
    pub from: (&'a PerRank, usize),
    pub into: &'a Common,
    /// In `into`.
    pub parts: &'a Parts,
}

impl Gather<'_> {
    /// Refuses what does not fit. Returns this rank's part.
    pub(crate) fn check(&self, rank: usize, world: usize) -> Result<Range<usize>> {
        let Gather { from: (from, at), into, parts } = *self;
        let own = parts.get(rank).cloned().unwrap_or_default();
        let joined = parts.windows(2).all(|two| two[0].end == two[1].start);
        let inside = parts.last().is_some_and(|last| last.end <= into.len());
        if parts.len() == world && joined && inside && own.start <= own.end && at + own.len() <= from.len() {
            return Ok(own);
        }
        let message = format!(
            "{} parts of a gang of {world} do not fit into {} bytes, or byte {at} of {} is not where one begins",
            parts.len(),
            into.len(),
            from.len()
        );
        Err(refuse("gather", message))
    }

    /// Puts this rank's part where it belongs.
    pub(crate) fn place_own(&self, own: Range<usize>) {
        let Gather { from: (from, at), into, .. } = *self;
        from.copy_to(at, into, own);
    }
}

/// `Gang::all_reduce_f64` by way of an `all_reduce` of bytes.
pub(crate) fn through_bytes(
    values: &mut [f64],
    all_reduce: impl FnOnce(&mut [u8]) -> Result<()>,
) -> Result<()> {
    let mut bytes: Vec<u8> = values.iter().flat_map(|value| value.to_ne_bytes()).collect();
    all_reduce(&mut bytes)?;
    for (value, eight) in values.iter_mut().zip(bytes.chunks_exact(8)) {
        *value = f64::from_ne_bytes(eight.try_into().expect("a chunk of eight bytes"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn parts_cover_everything_once_and_start_on_whole_lines(elements in 0usize..100_000, world_size in 1usize..9) {
            let mut next = 0;
            for rank in 0..world_size {
                let range = part(elements, rank, world_size);
                prop_assert_eq!(range.start, next);
                prop_assert!(range.is_empty() || range.start.is_multiple_of(PART_ALIGN));
                next = range.end;
            }
            prop_assert_eq!(next, elements);
        }
    }
}
