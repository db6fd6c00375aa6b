//! What computes: a decoder's forward and backward on some device.

use crate::batch::Batch;
use crate::error::Result;
use crate::units::{Memory, UnitWeights, Units};
use fleet_common::model::Layout;
use std::ops::Range;

/// Computes with weights that it is given, and owns what it keeps between forward and backward. It makes no decision about training.
pub trait Executor<M: Memory> {
    /// Where the model's tensors lie in the flat buffer.
    fn layout(&self) -> &Layout;
    /// As `executor` in a job names it.
    fn name(&self) -> &'static str;
    /// As `device` in a job names it.
    fn device(&self) -> String;
    /// For the log: with what it computes.
    fn describe(&self) -> String;

    /// The gradients of `scale` times the summed loss of `batch`, unit by unit from the head to the embedding. The loss itself is
    /// added to what `take_loss` gives.
    fn forward_backward(&mut self, units: &mut dyn Units<M>, batch: &Batch, scale: f32) -> Result<()> {
        self.forward_weigh_backward(units, batch, scale, None)
    }
    /// The same. What the targets of each sequence count is asked of `weigh`, where there is one, between forward and backward.
    fn forward_weigh_backward(
        &mut self,
        units: &mut dyn Units<M>,
        batch: &Batch,
        scale: f32,
        weigh: Option<&mut Weigh>,
    ) -> Result<()>;
    /// The losses that were summed since it was asked last, not waited for.
    fn take_loss(&mut self) -> Result<M::Number>;
    /// Of each sequence the summed loss of its targets, whatever they count, which is minus its log-probability. `noise` of the batch is heeded.
    fn losses(&mut self, units: &mut dyn UnitWeights<M>, batch: &Batch, which: Which) -> Result<Vec<f64>>;
    /// The lengths of rows of one of the matrices beside which an adapter is trained, from row `first` on, as products read it.
    fn row_lengths(&self, weight: &Range<usize>, first: usize, out: &mut [f32]) {
        unreachable!("{weight:?}, {first}, {}: an adapter is trained beside a frozen model", out.len());
    }
    /// The loss alone.
    fn evaluate(&mut self, units: &mut dyn UnitWeights<M>, batch: &Batch) -> Result<Tally>;
}

/// From the summed loss of each sequence's targets, whatever they count, to what each of them counts; both `[b]`.
pub type Weigh<'a> = dyn FnMut(&[f64]) -> Vec<f64> + Send + 'a;

/// Whose losses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which {
    /// Of the model as it is trained.
    Trained,
    /// Of the model beside which an adapter is trained, as if there were none.
    Base,
}

/// Sums over targets.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Tally {
    /// In nats, each times its weight.
    pub loss: f64,
    /// What the targets count together.
    pub weight: f64,
    /// How many they are.
    pub tokens: u64,
    /// How many of them the model finds likelier than any other token.
    pub hits: u64,
}

impl Tally {
    pub fn add(&mut self, other: Tally) {
        self.loss += other.loss;
        self.weight += other.weight;
        self.tokens += other.tokens;
        self.hits += other.hits;
    }

    /// Nats for each that counts.
    pub fn mean(&self) -> f64 {
        self.loss / if self.weight > 0.0 { self.weight } else { 1.0 }
    }
}
