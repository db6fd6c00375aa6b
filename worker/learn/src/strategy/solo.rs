//! One rank that has everything in its own memory.

use super::state::copy_ranges;
use super::{Micro, Read, Report, Slot, Strategy, Votes};
use crate::error::Result;
use crate::optimizer::{Numbers, Update};
use crate::units::{Gradients, Host, HostNumber, HostWeights, UnitWeights, Units};
use crate::workers::Workers;
use crate::zeros::{Part, zeros};
use fleet_checkpoint::Disks;
use fleet_collectives::Gang;
use fleet_common::model::Layout;
use fleet_kernels as kernels;
use half::bf16;
use std::borrow::Cow;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::Arc;

pub struct Solo<E> {
    gang: fleet_collectives::Solo,
    layout: Layout,
    workers: Arc<Workers>,
    master: Vec<f32>,
    /// What products read under bf16-mixed; empty in fp32.
    copy: Vec<bf16>,
    moment1: Vec<f32>,
    moment2: Vec<f32>,
    grads: Summed,
    kind: PhantomData<E>,
}

struct Summed {
    numbers: Vec<f32>,
    fresh: bool,
}

impl Gradients for Summed {
    fn range(&mut self, range: Range<usize>) -> &mut [f32] {
        &mut self.numbers[range]
    }
    fn fresh(&self) -> bool {
        self.fresh
    }
}

impl<E: HostNumber> Solo<E> {
    /// Weights are zero until they are filled.
    pub fn new(layout: Layout, workers: Arc<Workers>, generation: u64) -> Result<Solo<E>> {
        let numbers = || zeros(layout.len, Part::Learner);
        Ok(Solo {
            gang: fleet_collectives::Solo::new(generation),
            master: numbers()?,
            copy: zeros(if E::IS_BF16 { layout.len } else { 0 }, Part::Learner)?,
            moment1: numbers()?,
            moment2: numbers()?,
            grads: Summed { numbers: numbers()?, fresh: true },
            layout,
            workers,
            kind: PhantomData,
        })
    }
}

impl<E: HostNumber> UnitWeights<Host<E>> for Solo<E> {
    fn need(&mut self, _unit: usize) -> Result<()> {
        Ok(())
    }
    fn release(&mut self, _unit: usize) {}
    fn weights(&self) -> HostWeights<'_, E> {
        HostWeights::flat(&self.master, &self.copy)
    }
}

impl<E: HostNumber> Units<Host<E>> for Solo<E> {
    fn numbers(&mut self) -> (HostWeights<'_, E>, &mut dyn Gradients) {
        (HostWeights::flat(&self.master, &self.copy), &mut self.grads)
    }
    fn ready(&mut self, _unit: usize) -> Result<()> {
        Ok(())
    }
}

impl<E: HostNumber> Strategy<Host<E>> for Solo<E> {
    fn gang(&mut self) -> &mut dyn Gang {
        &mut self.gang
    }

    fn units(&mut self, micro: Micro) -> &mut dyn Units<Host<E>> {
        self.grads.fresh = micro.first;
        self
    }

    fn weights(&mut self) -> &mut dyn UnitWeights<Host<E>> {
        self
    }

    fn update(&mut self, update: &Update, loss: f64, votes: Votes) -> Result<Report> {
        let units = &self.layout.units;
        let squares = units.iter().map(|unit| kernels::sum_squares(&self.grads.numbers[unit.clone()])).sum();
        let [stop, time] = votes.numbers();
        let report = Report::of_sums([squares, loss, stop, time], update.step)?;
        for (step, range) in update.over(report.grad_norm, &self.layout, units) {
            let numbers = Numbers {
                grads: &self.grads.numbers[range.clone()],
                moment1: &mut self.moment1[range.clone()],
                moment2: &mut self.moment2[range.clone()],
                copy: E::IS_BF16.then_some(&mut self.copy).map(|copy| &mut copy[range.clone()]),
                master: &mut self.master[range],
            };
            numbers.update(&step, &self.workers);
        }
        Ok(report)
    }

    fn fill(&mut self, slot: Slot, read: &mut Read) -> Result<()> {
        let numbers = match slot {
            Slot::Weights => &mut self.master,
            Slot::Moment1 => &mut self.moment1,
            Slot::Moment2 => &mut self.moment2,
        };
        for unit in &self.layout.units {
            read(unit.clone(), &mut numbers[unit.clone()])?;
        }
        if slot == Slot::Weights && E::IS_BF16 {
            kernels::convert(&self.master, &mut self.copy);
        }
        Ok(())
    }

    fn flat(&self, slot: Slot) -> Result<Cow<'_, [f32]>> {
        Ok(Cow::Borrowed(match slot {
            Slot::Weights => &self.master,
            Slot::Moment1 => &self.moment1,
            Slot::Moment2 => &self.moment2,
        }))
    }
    fn copy_out(&mut self, slot: Slot, ranges: &[Range<usize>], out: &mut [f32]) -> Result<()> {
        let flat = self.flat(slot)?;
        copy_ranges(|range| &flat[range.clone()], ranges, out, &self.workers);
        Ok(())
    }

    fn name(&self) -> &'static str {
        "solo"
    }

    fn kept(&self, _disks: &Disks) -> Vec<Range<usize>> {
        self.layout.units.clone()
    }
}
