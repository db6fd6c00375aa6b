//! A strategy that keeps no more than its part of each unit and gathers a unit when it is needed, written from outside of `fleet-learn`.

use fleet_collectives::{DType, Exchange, Gang, Op};
use fleet_common::model::Layout;
use fleet_learn::optimizer::Numbers;
use fleet_learn::shim::buffers::as_bytes;
use fleet_learn::strategy::{Micro, Read, Slot};
use fleet_learn::{
    Gradients, Host, HostNumber, HostWeights, Pieces, Report, Result, Strategy, UnitWeights, Units, Update,
    Votes, Workers,
};
use half::bf16;
use std::borrow::Cow;
use std::marker::PhantomData;
use std::ops::Range;

/// What the seam has to bear.
pub struct Gathering<E> {
    gang: Box<dyn Exchange>,
    layout: Layout,
    /// For each slot and unit this rank's part, as long as every other rank's.
    parts: [Vec<Vec<f32>>; 3],
    /// For each unit where it begins, and its numbers while it is in.
    master: Vec<(usize, Vec<f32>)>,
    copy: Vec<(usize, Vec<bf16>)>,
    grads: UnitSums,
    /// This rank's part of each unit's gradients, over all ranks.
    reduced: Vec<Vec<f32>>,
    last: bool,
    /// Most units that were in at once.
    pub most: usize,
    kind: PhantomData<E>,
}

struct UnitSums {
    units: Vec<(Range<usize>, Vec<f32>)>,
    fresh: bool,
}

impl Gradients for UnitSums {
    fn range(&mut self, range: Range<usize>) -> &mut [f32] {
        let at = self.units.partition_point(|(unit, _)| unit.end <= range.start);
        let (unit, numbers) = &mut self.units[at];
        numbers.resize(unit.len(), f32::NAN);
        &mut numbers[range.start - unit.start..range.end - unit.start]
    }
    fn fresh(&self) -> bool {
        self.fresh
    }
}

impl<E: HostNumber> Gathering<E> {
    pub fn new(layout: Layout, gang: Box<dyn Exchange>) -> Gathering<E> {
        let world = gang.world_size();
        let zeros = || -> Vec<Vec<f32>> {
            layout.units.iter().map(|unit| vec![0.0; unit.len().div_ceil(world)]).collect()
        };
        let parts = [zeros(), zeros(), zeros()];
        let units = layout.units.iter().map(|unit| (unit.clone(), Vec::new())).collect();
        Gathering {
            gang,
            parts,
            master: layout.units.iter().map(|unit| (unit.start, Vec::new())).collect(),
            copy: layout.units.iter().map(|unit| (unit.start, Vec::new())).collect(),
            grads: UnitSums { units, fresh: true },
            reduced: zeros(),
            last: true,
            most: 0,
            layout,
            kind: PhantomData,
        }
    }

    /// This rank's part of `unit` in the flat buffer; its vectors may be longer.
    fn own(&self, unit: usize) -> Range<usize> {
        let (rank, world) = (self.gang.rank(), self.gang.world_size());
        let unit = &self.layout.units[unit];
        let size = unit.len().div_ceil(world);
        (unit.start + rank * size).min(unit.end)..(unit.start + (rank + 1) * size).min(unit.end)
    }
}

impl<E: HostNumber> UnitWeights<Host<E>> for Gathering<E> {
    fn need(&mut self, unit: usize) -> Result<()> {
        if self.master[unit].1.is_empty() {
            let part = &self.parts[Slot::Weights as usize][unit];
            let mut bytes = vec![0; self.gang.world_size() * part.len() * 4];
            self.gang.all_gather(as_bytes(part), &mut bytes)?;
            let numbers = bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b));
            self.master[unit].1 = numbers.take(self.layout.units[unit].len()).collect();
            self.copy[unit].1 = self.master[unit].1.iter().map(|x| bf16::from_f32(*x)).collect();
            self.most = self.most.max(self.master.iter().filter(|(_, numbers)| !numbers.is_empty()).count());
        }
        Ok(())
    }
    fn release(&mut self, unit: usize) {
        self.master[unit].1 = Vec::new();
        self.copy[unit].1 = Vec::new();
    }
    fn weights(&self) -> HostWeights<'_, E> {
        HostWeights::new(Pieces::Units(&self.master), Pieces::Units(&self.copy))
    }
}

impl<E: HostNumber> Units<Host<E>> for Gathering<E> {
    fn numbers(&mut self) -> (HostWeights<'_, E>, &mut dyn Gradients) {
        let weights = HostWeights::new(Pieces::Units(&self.master), Pieces::Units(&self.copy));
        (weights, &mut self.grads)
    }

    fn ready(&mut self, unit: usize) -> Result<()> {
        if self.last {
            let reduced = &mut self.reduced[unit];
            let mut whole = std::mem::take(&mut self.grads.units[unit].1);
            whole.resize(reduced.len() * self.gang.world_size(), 0.0);
            let mut bytes = vec![0; reduced.len() * 4];
            self.gang.reduce_scatter(as_bytes(&whole), &mut bytes, DType::F32, Op::Sum)?;
            reduced.iter_mut().zip(bytes.as_chunks::<4>().0).for_each(|(x, b)| *x = f32::from_le_bytes(*b));
        }
        Ok(())
    }
}

impl<E: HostNumber> Strategy<Host<E>> for Gathering<E> {
    fn gang(&mut self) -> &mut dyn Gang {
        &mut *self.gang
    }

    fn units(&mut self, micro: Micro) -> &mut dyn Units<Host<E>> {
        (self.grads.fresh, self.last) = (micro.first, micro.last);
        self
    }

    fn weights(&mut self) -> &mut dyn UnitWeights<Host<E>> {
        self
    }

    fn update(&mut self, update: &Update, loss: f64, votes: Votes) -> Result<Report> {
        assert!(self.master.iter().all(|(_, numbers)| numbers.is_empty()), "what was needed was released");
        // Padding is no gradient: it may hold anything.
        let squares = |unit: usize| {
            let own = self.own(unit);
            let counts = self.layout.parameters.iter().map(|p| {
                let range = own.start.max(p.range.start)..own.end.min(p.range.end);
                match range.is_empty() {
                    true => 0.0,
                    false => {
                        let within = range.start - own.start..range.end - own.start;
                        fleet_kernels::sum_squares(&self.reduced[unit][within])
                    }
                }
            });
            counts.sum::<f64>()
        };
        let squares: f64 = (0..self.layout.units.len()).map(squares).sum();
        let [stop, time] = votes.numbers();
        let mut sums = [squares, loss, stop, time];
        self.gang.all_reduce_f64(&mut sums, Op::Sum)?;
        let report = Report::of_sums(sums, update.step)?;
        let workers = Workers::new(1, || {}).expect("one thread is the caller's");
        for unit in 0..self.layout.units.len() {
            let own = self.own(unit);
            let [master, moment1, moment2] = self.parts.each_mut().map(|units| &mut units[unit]);
            for (step, range) in update.over(report.grad_norm, &self.layout, std::slice::from_ref(&own)) {
                let within = range.start - own.start..range.end - own.start;
                let numbers = Numbers {
                    master: &mut master[within.clone()],
                    moment1: &mut moment1[within.clone()],
                    moment2: &mut moment2[within.clone()],
                    grads: &self.reduced[unit][within],
                    copy: None,
                };
                numbers.update(&step, &workers);
            }
        }
        Ok(report)
    }

    fn fill(&mut self, slot: Slot, read: &mut Read) -> Result<()> {
        for unit in 0..self.layout.units.len() {
            let own = self.own(unit);
            let part = &mut self.parts[slot as usize][unit];
            read(own.clone(), &mut part[..own.len()])?;
        }
        Ok(())
    }

    /// This rank's part, and zeros.
    fn flat(&self, slot: Slot) -> Result<Cow<'_, [f32]>> {
        let mut flat = vec![0.0; self.layout.len];
        for unit in 0..self.layout.units.len() {
            let own = self.own(unit);
            flat[own.clone()].copy_from_slice(&self.parts[slot as usize][unit][..own.len()]);
        }
        Ok(Cow::Owned(flat))
    }
    fn name(&self) -> &'static str {
        "gathering"
    }

    fn kept(&self) -> Vec<Range<usize>> {
        (0..self.layout.units.len()).map(|unit| self.own(unit)).collect()
    }

    /// Weights unit by unit, as for a pass; moments from where they are.
    fn copy_out(&mut self, slot: Slot, ranges: &[Range<usize>], out: &mut [f32]) -> Result<()> {
        for unit in 0..self.layout.units.len() {
            let (own, whole) = (self.own(unit), self.layout.units[unit].clone());
            if slot == Slot::Weights {
                self.need(unit)?;
            }
            let (first, numbers) = match slot {
                Slot::Weights => (whole.start, &self.master[unit].1),
                _ => (own.start, &self.parts[slot as usize][unit]),
            };
            let mut at = 0;
            for range in ranges {
                if whole.contains(&range.start) {
                    let numbers = &numbers[range.start - first..range.end - first];
                    out[at..at + range.len()].copy_from_slice(numbers);
                }
                at += range.len();
            }
            self.release(unit);
        }
        Ok(())
    }
}
