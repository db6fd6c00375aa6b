//! The trait that the engine programs against, and the words it uses. No transport is named here.

use crate::error::Result;
use crate::shm::memory::{Common, PerRank};
use std::fmt;
use std::ops::Range;
use std::time::Duration;

/// Type of the elements that a reduction works on. All are in the machine's byte order; buffers need no alignment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DType {
    F32,
    /// Summed in f32, rounded once.
    Bf16,
    F64,
    /// Sums wrap.
    I64,
    /// Sums wrap.
    U64,
}

impl DType {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            DType::Bf16 => 2,
            DType::F32 => 4,
            DType::F64 | DType::I64 | DType::U64 => 8,
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DType::F32 => "f32",
            DType::Bf16 => "bf16",
            DType::F64 => "f64",
            DType::I64 => "i64",
            DType::U64 => "u64",
        })
    }
}

/// How elements of different ranks become one. Always taken in rank order, so every rank gets the same bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    Sum,
    /// A NaN on any rank gives NaN.
    Max,
}

/// Where the result of `Collective::post_reduce` is left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// Reduce-scatter: each rank has the result of its own `part`, in its own buffer; the rest of its buffer keeps its input.
    MyPart,
    /// All-reduce: every rank has the whole result in its own buffer.
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

/// Parts of a reduction begin at multiples of this many elements: whole cache lines for every type, so that ranks never write
/// into the same line.
pub const PART_ALIGN: usize = 64;

/// The elements, of `0..elements`, that `rank` of `world_size` reduces and (with shared optimizer state) updates. The parts of all ranks
/// cover `0..elements` once, in rank order; late parts can be shorter or empty.
pub fn part(elements: usize, rank: usize, world_size: usize) -> Range<usize> {
    let size = elements.div_ceil(world_size).next_multiple_of(PART_ALIGN);
    (rank * size).min(elements)..((rank + 1) * size).min(elements)
}

/// One rank's end of a gang. Every rank makes the same calls in the same order with the same sizes.
///
/// Errors latch: after one, every further call fails at once with the same error. A call waits at most the deadline for its peers, and
/// ends early when the gang is aborted. Blocking calls first `finish` what was posted.
///
/// Two kinds of memory let ranks of one host work without copies. For data-parallel training with one optimizer state per host:
/// gradients in a `PerRank` buffer; master weights, optimizer state and the bf16 copy in `Common` buffers; then per step
/// 1. after each block's last backward `post_reduce(&grads, range_of_block, F32, Sum, Keep::MyPart)`, which also makes progress;
/// 2. `finish()`: now `part(elements_of_block, rank, world_size)` of each block's range holds the sum over the ranks;
/// 3. the sum of squares of these parts through `all_reduce_f64`: after it no peer reads this rank's gradients any more, so they may be
///    zeroed or overwritten;
/// 4. the optimizer on the own parts of the common buffers;
/// 5. `barrier()`: all parts are written, the next forward may read them.
pub trait Collective: Send {
    fn rank(&self) -> usize;
    fn world_size(&self) -> usize;
    /// The start of the job's gang that this rank belongs to.
    fn generation(&self) -> u64;
    /// Longest wait of one call for its peers. 60 s until set.
    fn set_deadline(&mut self, deadline: Duration);
    /// Tells whoever looks at a stalled gang what this rank is doing now. Costs one store.
    fn note(&mut self, activity: Activity);
    /// Tells the same that this rank begins a step, counted from 1, and how long the one before took, where that is how long steps take.
    fn begin_step(&mut self, step: u64, last: Option<Duration>);

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
    /// Returns when every rank has called it; what they wrote before, also in shared buffers, is then visible.
    fn barrier(&mut self) -> Result<()>;

    /// One buffer that all ranks of the host see, zeroed, page-aligned. A collective call.
    fn allocate_common(&mut self, bytes: usize) -> Result<Common>;
    /// A buffer for each rank, zeroed, page-aligned, that `post_reduce` reduces in place. A collective call.
    fn allocate_per_rank(&mut self, bytes: usize) -> Result<PerRank>;
    /// Starts the reduction of `bytes` (a range of bytes of every rank's buffer) and returns at once: this rank's input is complete and
    /// must not be touched until `finish`. Reductions that all ranks have posted are worked off here, in `progress` and in `finish`.
    fn post_reduce(
        &mut self,
        buffers: &PerRank,
        bytes: Range<usize>,
        dtype: DType,
        op: Op,
        keep: Keep,
    ) -> Result<()>;
    /// Does this rank's share of the posted reductions whose peers are ready. Never waits.
    fn progress(&mut self) -> Result<()>;
    /// Completes everything posted. After it the result is in place; other ranks may still be reading this rank's buffer until
    /// the next blocking call returns (with `Keep::Everything`: nobody does).
    fn finish(&mut self) -> Result<()>;

    /// `all_reduce` of a few numbers.
    fn all_reduce_f64(&mut self, values: &mut [f64], op: Op) -> Result<()> {
        let mut bytes: Vec<u8> = values.iter().flat_map(|value| value.to_ne_bytes()).collect();
        self.all_reduce(&mut bytes, DType::F64, op)?;
        for (value, eight) in values.iter_mut().zip(bytes.chunks_exact(8)) {
            *value = f64::from_ne_bytes(eight.try_into().expect("a chunk of eight bytes"));
        }
        Ok(())
    }
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
