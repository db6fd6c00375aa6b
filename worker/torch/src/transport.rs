//! How the numbers of a device come to the other ranks.

mod alone;
mod host;
mod nccl;

pub use alone::AloneTransport;
pub use host::HostTransport;
pub use nccl::NcclTransport;

use crate::parts::Seat;
use fleet_collectives::{DType, SharedHost};
use fleet_learn::Result;
use std::ops::Range;
use tch::{Kind, Tensor};

/// Exchanges of flat tensors, in place on ranges of rooms that every rank has. Every rank makes the same calls in the same order.
///
/// From `post` to the return of its `wait` the range belongs to the transport. What is posted is done in the order in which it was posted.
pub trait Transport: Send {
    /// All ranks that train together.
    fn gang(&mut self) -> &mut dyn SharedHost;
    /// This rank's among those that keep a model together, which exchange weights.
    fn seat(&self) -> Seat;
    /// `len` zeros of `kind`, fp32, bf16 or fp16, on the device. A collective call.
    fn room(&mut self, len: usize, kind: Kind) -> Result<Room>;
    /// Starts an exchange of a range, which holds one share of equal length for each rank that keeps the model together, and returns at once.
    fn post(&mut self, room: &Room, range: Range<usize>, exchange: Exchanged) -> Result<Posted>;
    /// Completes a posted exchange, and all that were posted before it: what is asked of the device afterwards sees its result.
    fn wait(&mut self, posted: Posted) -> Result<()>;
}

/// What becomes of a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exchanged {
    /// Each rank that keeps the model together gives its share; the range becomes all of them.
    Gathered,
    /// Each rank's share becomes the sum over all ranks of the gang, which in bf16 is rounded where ranks meet; the rest may hold anything
    /// afterwards. Not in fp16.
    Reduced,
    /// The same over those that keep the model together.
    ReducedWithin,
}

/// Memory of this rank that a transport knows.
pub struct Room {
    pub tensor: Tensor,
    number: usize,
}

/// The number of an exchange, from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Posted(u64);

/// How ranks exchange what is of `kind`.
fn dtype(kind: Kind) -> DType {
    match kind {
        Kind::Float => DType::F32,
        Kind::BFloat16 => DType::Bf16,
        Kind::Half => DType::F16,
        other => unreachable!("no room is of {other:?}"),
    }
}

/// The share of a rank.
fn share(range: &Range<usize>, seat: &Seat) -> Range<usize> {
    let len = range.len() / seat.world;
    range.start + seat.rank * len..range.start + (seat.rank + 1) * len
}
