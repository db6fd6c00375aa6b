//! Data-parallel (DDP): every rank computes gradients of its part of the global batch, for all of the model. What the optimizer keeps lies once on
//! each host. A unit's gradients are reduced while earlier units are still computed.

use super::state::{HostState, State};
use super::{Micro, Read, Report, Slot, Strategy, Votes};
use crate::error::Result;
use crate::optimizer::Update;
use crate::shim::buffers::RankSlice;
use crate::units::{Gradients, Host, HostNumber, HostWeights, UnitWeights, Units};
use crate::workers::Workers;
use fleet_checkpoint::Disks;
use fleet_collectives::{Activity, DType, Gang, Keep, Op, SharedHost};
use fleet_common::model::Layout;
use std::borrow::Cow;
use std::ops::Range;
use std::sync::Arc;

pub struct Shared<E> {
    gang: Box<dyn SharedHost>,
    state: HostState<E>,
    grads: Reduced,
}

/// Gradients that are handed to the peers unit by unit.
struct Reduced {
    numbers: RankSlice<f32>,
    micro: Micro,
}

impl Gradients for Reduced {
    fn range(&mut self, range: Range<usize>) -> &mut [f32] {
        self.numbers.range_mut(range)
    }
    fn fresh(&self) -> bool {
        self.micro.first
    }
}

impl<E: HostNumber> Shared<E> {
    /// Weights are zero until they are filled. A collective call.
    pub fn new(layout: Layout, workers: Arc<Workers>, mut gang: Box<dyn SharedHost>) -> Result<Shared<E>> {
        gang.note(Activity::Starting);
        let state = HostState::new(layout, workers, &mut *gang)?;
        let numbers = RankSlice::new(gang.allocate_per_rank(state.base().layout.len * 4)?);
        Ok(Shared { gang, state, grads: Reduced { numbers, micro: Micro { first: true, last: true } } })
    }
}

impl<E: HostNumber> UnitWeights<Host<E>> for Shared<E> {
    fn need(&mut self, _unit: usize) -> Result<()> {
        Ok(())
    }
    fn release(&mut self, _unit: usize) {}
    fn weights(&self) -> HostWeights<'_, E> {
        self.state.weights()
    }
}

impl<E: HostNumber> Units<Host<E>> for Shared<E> {
    fn numbers(&mut self) -> (HostWeights<'_, E>, &mut dyn Gradients) {
        (self.state.weights(), &mut self.grads)
    }

    fn ready(&mut self, unit: usize) -> Result<()> {
        if self.grads.micro.last {
            self.gang.note(Activity::Backward);
            let unit = &self.state.base().layout.units[unit];
            let (memory, bytes) = (self.grads.numbers.memory(), unit.start * 4..unit.end * 4);
            self.gang.post_reduce(memory, bytes, DType::F32, Op::Sum, Keep::MyPart)?;
        }
        Ok(())
    }
}

impl<E: HostNumber> Strategy<Host<E>> for Shared<E> {
    fn gang(&mut self) -> &mut dyn Gang {
        &mut *self.gang
    }

    fn units(&mut self, micro: Micro) -> &mut dyn Units<Host<E>> {
        self.grads.micro = micro;
        self
    }

    fn weights(&mut self) -> &mut dyn UnitWeights<Host<E>> {
        self
    }

    fn update(&mut self, update: &Update, loss: f64, votes: Votes) -> Result<Report> {
        self.gang.finish()?;
        self.gang.note(Activity::Optimizer);
        let grads = &self.grads.numbers;
        let squares = self.state.squares(&|range| grads.range(range), &*self.gang);
        let report = Report::summed(&mut *self.gang, squares, loss, votes, update.step)?;
        self.state.update(update, report.grad_norm, &|range| grads.range(range), &mut *self.gang)?;
        Ok(report)
    }

    fn fill(&mut self, slot: Slot, read: &mut Read) -> Result<()> {
        self.state.fill(slot, read, &mut *self.gang)
    }

    fn flat(&self, slot: Slot) -> Result<Cow<'_, [f32]>> {
        Ok(self.state.flat(slot))
    }

    fn copy_out(&mut self, slot: Slot, ranges: &[Range<usize>], out: &mut [f32]) -> Result<()> {
        self.state.copy_out(slot, ranges, out, &mut *self.gang)
    }

    fn name(&self) -> &'static str {
        "ddp"
    }

    fn writers(&mut self, disks: &Disks) -> usize {
        self.state.writers(disks, &*self.gang)
    }

    fn kept(&self, disks: &Disks) -> Vec<Range<usize>> {
        self.state.kept(disks, &*self.gang)
    }
}
