//! Where a model's numbers lie, who reduces gradients and who updates weights.

mod gathered;
mod narrow;
mod needs;
mod sharded;
mod shards;
mod shared;
mod solo;
mod state;

pub use fleet_checkpoint::Disks;
pub use needs::{Keeping, Needs};
pub use sharded::Sharded;
pub use shared::Shared;
pub use solo::Solo;
pub(crate) use state::of_host as part_on_host;

use crate::error::{Error, Result};
use crate::optimizer::Update;
use crate::units::{Memory, UnitWeights, Units};
use fleet_checkpoint::Dtype;
use fleet_collectives::{Gang, Op};
use std::borrow::Cow;
use std::ops::Range;

/// One rank's part in keeping and updating a model. All ranks make the same calls in the same order.
pub trait Strategy<M: Memory> {
    /// The ranks that train together.
    fn gang(&mut self) -> &mut dyn Gang;

    /// For one micro-batch of a step.
    fn units(&mut self, micro: Micro) -> &mut dyn Units<M>;
    /// To be read, between two steps.
    fn weights(&mut self) -> &mut dyn UnitWeights<M>;

    /// Ends a step whose micro-batches are done: gradients of all ranks together, clipped, one step of the optimizer. `loss` is this rank's
    /// sum. Where loss or norm is no number, on all ranks the weights stay what they were, and `Error::NoNumber` is the answer.
    fn update(&mut self, update: &Update, loss: M::Number, votes: Votes) -> Result<Report>;

    /// Gradients are those of the losses times `scale` from now on, which `update` divides out.
    fn scale_losses(&mut self, scale: f64) {
        assert!(scale == 1.0, "{} takes losses as they are", self.name());
    }

    /// Calls `read` for each range that this rank keeps of `slot`, which is to be filled. Afterwards all ranks see it.
    fn fill(&mut self, slot: Slot, read: &mut Read) -> Result<()>;
    /// The flat buffer of `slot`, on the host.
    fn flat(&self, slot: Slot) -> Result<Cow<'_, [f32]>>;

    /// Whether a pass over the model is a collective call, so that all ranks have to make as many.
    fn passes_together(&self) -> bool {
        false
    }

    /// How weights and moments are kept, and written to checkpoints: F32 or BF16.
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }
    /// As a checkpoint names it.
    fn name(&self) -> &'static str;
    /// Ranks that write checkpoints to these disks, the first ones.
    fn writers(&mut self, _disks: &Disks) -> usize {
        self.gang().world_size()
    }
    /// The ranges of the flat buffer whose optimizer state this rank writes to checkpoints: no number is in those of two ranks, every one is
    /// in those of one.
    fn kept(&self, disks: &Disks) -> Vec<Range<usize>>;
    /// Whether this rank and all with which it copies out can. A collective call of these.
    fn all_can_copy(&mut self, this_can: bool) -> Result<bool> {
        if !self.passes_together() {
            return Ok(this_can);
        }
        let mut cannot = [f64::from(u8::from(!this_can))];
        self.gang().all_reduce_f64(&mut cannot, Op::Max)?;
        Ok(cannot[0] == 0.0)
    }
    /// Copies numbers of `slot` out, range after range: of weights any, each within a unit, of moments what this rank keeps. A collective
    /// call of all writers, between two steps.
    fn copy_out(&mut self, slot: Slot, ranges: &[Range<usize>], out: &mut [f32]) -> Result<()>;
}

/// Fills a range of the flat buffer.
pub type Read<'a> = dyn FnMut(Range<usize>, &mut [f32]) -> Result<()> + 'a;

/// What a host has of weights that it collects from others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resident {
    /// Embedding and head, and two blocks in turn: blocks are collected for the forward and again for the backward.
    TwoBlocks,
    /// All units, from a step's first forward to its last backward: each is collected once.
    AllUnits,
}

impl Resident {
    pub fn of(reshard_after_forward: bool) -> Resident {
        if reshard_after_forward { Resident::TwoBlocks } else { Resident::AllUnits }
    }
}

/// Which micro-batch of a step it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Micro {
    /// Gradients are set, not added.
    pub first: bool,
    /// Gradients are complete after it.
    pub last: bool,
}

/// What a strategy keeps of each parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Slot {
    Weights,
    /// Of the optimizer: the mean of gradients.
    Moment1,
    /// The mean of their squares.
    Moment2,
}

/// What all ranks know after a step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Report {
    /// Summed over all ranks; an engine divides it by what the targets count together.
    pub loss: f64,
    /// Before clipping.
    pub grad_norm: f64,
    /// Of any rank.
    pub votes: Votes,
    /// Gradients of scaled losses were no numbers: nothing was changed. Then `loss` and `grad_norm` may be none, too.
    pub skipped: bool,
}

/// Why a rank wants to end the run after this step.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Votes {
    /// It was asked to.
    pub stop: bool,
    /// The time limit is over.
    pub time: bool,
}

impl Votes {
    /// As they are summed with other numbers.
    pub fn numbers(self) -> [f64; 2] {
        [self.stop, self.time].map(|vote| f64::from(u8::from(vote)))
    }
}

impl Report {
    pub fn new(loss: f64, grad_norm: f64, votes: Votes) -> Report {
        Report { loss, grad_norm, votes, skipped: false }
    }

    /// Of all ranks, of which this one has these squares of gradients, this loss, and these votes. A collective call.
    pub fn summed(gang: &mut dyn Gang, squares: f64, loss: f64, votes: Votes, step: u64) -> Result<Report> {
        let [stop, time] = votes.numbers();
        let mut sums = [squares, loss, stop, time];
        gang.all_reduce_f64(&mut sums, Op::Sum)?;
        Report::of_sums(sums, step)
    }

    /// `squares` of the gradients, `loss`, and votes, summed over all ranks.
    pub fn of_sums(sums: [f64; 4], step: u64) -> Result<Report> {
        let [squares, loss, stop, time] = sums;
        let votes = Votes { stop: stop > 0.0, time: time > 0.0 };
        Report::new(loss, squares.sqrt(), votes).checked(step)
    }

    /// Itself, unless it has no numbers.
    pub fn checked(self, step: u64) -> Result<Report> {
        let (what, number) = match self.loss.is_finite() {
            true if self.grad_norm.is_finite() => return Ok(self),
            true => ("gradient norm", self.grad_norm),
            false => ("loss", self.loss),
        };
        let error = Error::no_number(&format!("the {what} became {number}"), step, None);
        Err(error.with_report(self))
    }
}
