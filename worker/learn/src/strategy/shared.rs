//! Data-parallel on one host: every rank computes gradients of its part of the global batch. Master weights, their bf16 copy and the
//! optimizer state lie once in memory that all ranks share. A unit's gradients are reduced while earlier units are still computed; each
//! rank updates its part of every unit, so all ranks hold the same weights because they are the same memory.

use super::{Micro, Read, Report, Slot, Strategy, Votes};
use crate::error::Result;
use crate::optimizer::{Numbers, Update};
use crate::shim::buffers::{RankGradients, SharedSlice};
use crate::units::{Gradients, Host, HostNumber, HostWeights, UnitWeights, Units};
use crate::workers::Workers;
use fleet_collectives::{Activity, Collective, DType, Keep, Op, part};
use fleet_common::model::Layout;
use fleet_kernels as kernels;
use half::bf16;
use std::borrow::Cow;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::Arc;

pub struct Shared<E> {
    gang: Box<dyn Collective>,
    layout: Layout,
    /// This rank's part of each unit.
    parts: Vec<Range<usize>>,
    workers: Arc<Workers>,
    master: SharedSlice<f32>,
    /// What products read under bf16-mixed; empty in fp32.
    copy: SharedSlice<bf16>,
    moment1: SharedSlice<f32>,
    moment2: SharedSlice<f32>,
    grads: Reduced,
    kind: PhantomData<E>,
}

/// Gradients that are handed to the peers unit by unit.
struct Reduced {
    numbers: RankGradients,
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
    pub fn new(layout: Layout, workers: Arc<Workers>, mut gang: Box<dyn Collective>) -> Result<Shared<E>> {
        gang.note(Activity::Starting);
        let (rank, world) = (gang.rank(), gang.world_size());
        let own = |unit: &Range<usize>| {
            let within = part(unit.len(), rank, world);
            unit.start + within.start..unit.start + within.end
        };
        let mut common = |bytes: usize| gang.allocate_common(bytes);
        let [master, moment1, moment2] =
            [common(layout.len * 4)?, common(layout.len * 4)?, common(layout.len * 4)?];
        let copy = common(if E::IS_BF16 { layout.len * 2 } else { 0 })?;
        let numbers = RankGradients::new(gang.allocate_per_rank(layout.len * 4)?);
        Ok(Shared {
            gang,
            parts: layout.units.iter().map(own).filter(|part| !part.is_empty()).collect(),
            layout,
            workers,
            master: SharedSlice::new(master),
            copy: SharedSlice::new(copy),
            moment1: SharedSlice::new(moment1),
            moment2: SharedSlice::new(moment2),
            grads: Reduced { numbers, micro: Micro { first: true, last: true } },
            kind: PhantomData,
        })
    }
}

impl<E: HostNumber> UnitWeights<Host<E>> for Shared<E> {
    fn need(&mut self, _unit: usize) -> Result<()> {
        Ok(())
    }
    fn release(&mut self, _unit: usize) {}
    fn weights(&self) -> HostWeights<'_, E> {
        HostWeights::flat(self.master.all(), self.copy.all())
    }
}

impl<E: HostNumber> Units<Host<E>> for Shared<E> {
    fn numbers(&mut self) -> (HostWeights<'_, E>, &mut dyn Gradients) {
        (HostWeights::flat(self.master.all(), self.copy.all()), &mut self.grads)
    }

    fn ready(&mut self, unit: usize) -> Result<()> {
        if self.grads.micro.last {
            self.gang.note(Activity::Backward);
            let unit = &self.layout.units[unit];
            let (memory, bytes) = (self.grads.numbers.memory(), unit.start * 4..unit.end * 4);
            self.gang.post_reduce(memory, bytes, DType::F32, Op::Sum, Keep::MyPart)?;
        }
        Ok(())
    }
}

impl<E: HostNumber> Strategy<Host<E>> for Shared<E> {
    fn gang(&mut self) -> &mut dyn Collective {
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
        let grads = &mut self.grads.numbers;
        let squares = self.parts.iter().map(|part| kernels::sum_squares(grads.range_mut(part.clone()))).sum();
        let [stop, time] = votes.numbers();
        let mut sums = [squares, loss, stop, time];
        self.gang.all_reduce_f64(&mut sums, Op::Sum)?;
        let report = Report::of_sums(sums, update.step)?;
        for (step, range) in update.over(report.grad_norm, &self.layout, &self.parts) {
            let numbers = Numbers {
                master: self.master.part_mut(range.clone()),
                moment1: self.moment1.part_mut(range.clone()),
                moment2: self.moment2.part_mut(range.clone()),
                copy: E::IS_BF16.then_some(&mut self.copy).map(|copy| copy.part_mut(range.clone())),
                grads: self.grads.numbers.range_mut(range),
            };
            numbers.update(&step, &self.workers);
        }
        self.gang.barrier()?;
        Ok(report)
    }

    fn fill(&mut self, slot: Slot, read: &mut Read) -> Result<()> {
        for part in &self.parts {
            let numbers = match slot {
                Slot::Weights => &mut self.master,
                Slot::Moment1 => &mut self.moment1,
                Slot::Moment2 => &mut self.moment2,
            };
            let numbers = numbers.part_mut(part.clone());
            read(part.clone(), numbers)?;
            if slot == Slot::Weights && E::IS_BF16 {
                kernels::convert(numbers, self.copy.part_mut(part.clone()));
            }
        }
        Ok(self.gang.barrier()?)
    }

    fn flat(&self, slot: Slot) -> Result<Cow<'_, [f32]>> {
        Ok(Cow::Borrowed(match slot {
            Slot::Weights => self.master.all(),
            Slot::Moment1 => self.moment1.all(),
            Slot::Moment2 => self.moment2.all(),
        }))
    }
    fn name(&self) -> &'static str {
        "shared"
    }

    fn kept(&self) -> Vec<Range<usize>> {
        self.parts.clone()
    }
}
