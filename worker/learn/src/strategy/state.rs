//! What the ranks of a host keep of a model, once in memory that they share: master weights, their copy for products, and moments. Each rank
//! updates its part of every unit, so all of them hold the same weights because they are the same memory.

use super::{Read, Slot};
use crate::error::Result;
use crate::optimizer::{Numbers, Update};
use crate::shim::buffers::SharedSlice;
use crate::units::{HostNumber, HostWeights};
use crate::workers::Workers;
use fleet_collectives::{SharedHost, part};
use fleet_common::model::Layout;
use fleet_kernels as kernels;
use half::bf16;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::Arc;

pub(super) struct HostState<E> {
    pub layout: Layout,
    /// This rank's part of each unit.
    pub parts: Vec<Range<usize>>,
    workers: Arc<Workers>,
    master: SharedSlice<f32>,
    /// What products read under bf16-mixed; empty in fp32.
    copy: SharedSlice<bf16>,
    moment1: SharedSlice<f32>,
    moment2: SharedSlice<f32>,
    kind: PhantomData<E>,
}

impl<E: HostNumber> HostState<E> {
    /// All zeros. A collective call.
    pub fn new(layout: Layout, workers: Arc<Workers>, gang: &mut dyn SharedHost) -> Result<HostState<E>> {
        let parts =
            layout.units.iter().map(|unit| own_part(unit, gang)).filter(|part| !part.is_empty()).collect();
        let mut common = |bytes: usize| gang.allocate_common(bytes);
        let [master, moment1, moment2] =
            [common(layout.len * 4)?, common(layout.len * 4)?, common(layout.len * 4)?];
        let copy = common(if E::IS_BF16 { layout.len * 2 } else { 0 })?;
        Ok(HostState {
            layout,
            parts,
            workers,
            master: SharedSlice::new(master),
            copy: SharedSlice::new(copy),
            moment1: SharedSlice::new(moment1),
            moment2: SharedSlice::new(moment2),
            kind: PhantomData,
        })
    }

    /// To be read between a barrier and the next update.
    pub fn weights(&self) -> HostWeights<'_, E> {
        HostWeights::flat(self.master.all(), self.copy.all())
    }

    /// One step of the optimizer on this rank's parts, whose gradients `grads` gives; those of the whole model have `norm`. A barrier has to
    /// follow.
    pub fn update<'a>(
        &mut self,
        update: &Update,
        norm: f64,
        mut grads: impl FnMut(Range<usize>) -> &'a [f32],
    ) {
        for (step, range) in update.over(norm, &self.layout, &self.parts) {
            let numbers = Numbers {
                master: self.master.part_mut(range.clone()),
                moment1: self.moment1.part_mut(range.clone()),
                moment2: self.moment2.part_mut(range.clone()),
                copy: E::IS_BF16.then_some(&mut self.copy).map(|copy| copy.part_mut(range.clone())),
                grads: grads(range),
            };
            numbers.update(&step, &self.workers);
        }
    }

    /// Calls `read` for each of this rank's parts. A barrier has to follow.
    pub fn fill(&mut self, slot: Slot, read: &mut Read) -> Result<()> {
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
        Ok(())
    }

    /// What this rank writes to checkpoints. Every host has the same; the first one's ranks write it.
    pub fn kept(&self, gang: &dyn SharedHost) -> Vec<Range<usize>> {
        if gang.host() == 0 { self.parts.clone() } else { Vec::new() }
    }

    pub fn of(&self, slot: Slot) -> &[f32] {
        match slot {
            Slot::Weights => self.master.all(),
            Slot::Moment1 => self.moment1.all(),
            Slot::Moment2 => self.moment2.all(),
        }
    }
}

/// The part of a unit that this rank updates. It may be empty.
pub(super) fn own_part(unit: &Range<usize>, gang: &dyn SharedHost) -> Range<usize> {
    let within = part(unit.len(), gang.local_rank(), gang.local_size());
    unit.start + within.start..unit.start + within.end
}
