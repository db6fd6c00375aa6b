//! Small models and batches that the tests share.

use crate::error::Result;
use crate::optimizer::{Numbers, Update};
use crate::shim::buffers::as_bytes;
use crate::strategy::{Micro, Read, Report, Slot, Strategy, Votes};
use crate::units::{Gradients, Host, HostNumber, HostWeights, Pieces, UnitWeights, Units};
use crate::workers::Workers;
use fleet_collectives::{Collective, DType, Op};
use fleet_common::model::{Layout, Object};
use half::bf16;
use serde_json::{Value, json};
use std::borrow::Cow;
use std::marker::PhantomData;
use std::ops::Range;

/// Two blocks, grouped-query attention, odd vocabulary.
pub fn tiny_config() -> Object {
    tiny_with(Value::Null)
}

/// That with what `more` says.
pub fn tiny_with(more: Value) -> Object {
    let tiny = json!({
        "model_type": "llama", "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0, "tie_word_embeddings": false, "initializer_range": 0.1,
    });
    let entries = [tiny, more].into_iter().filter_map(|object| object.as_object().cloned());
    entries.flatten().collect()
}

/// Token ids that look random but are not.
pub fn token_ids(count: usize, vocab: usize, seed: u64) -> Vec<i64> {
    (0..count as u64)
        .map(|i| ((i + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15 ^ (seed << 7)) >> 33) as i64 % vocab as i64)
        .collect()
}

/// A model's flat weights and gradients, without a strategy around them.
pub struct Whole {
    pub master: Vec<f32>,
    pub copy: Vec<bf16>,
    pub grads: Sums,
    /// Units whose gradients were said to be ready, in their order.
    pub done: Vec<usize>,
}

pub struct Sums {
    pub numbers: Vec<f32>,
    pub fresh: bool,
}

impl Gradients for Sums {
    fn range(&mut self, range: Range<usize>) -> &mut [f32] {
        &mut self.numbers[range]
    }
    fn fresh(&self) -> bool {
        self.fresh
    }
}

impl Whole {
    /// Gradients are nonsense that the first micro-batch overwrites.
    pub fn new(master: Vec<f32>) -> Whole {
        let copy = master.iter().map(|x| bf16::from_f32(*x)).collect();
        let grads = Sums { numbers: vec![f32::NAN; master.len()], fresh: true };
        Whole { master, copy, grads, done: Vec::new() }
    }

    pub fn flat<E: HostNumber>(&self) -> HostWeights<'_, E> {
        HostWeights::flat(&self.master, &self.copy)
    }
}

impl<E: HostNumber> UnitWeights<Host<E>> for Whole {
    fn need(&mut self, _unit: usize) -> Result<()> {
        Ok(())
    }
    fn release(&mut self, _unit: usize) {}
    fn weights(&self) -> HostWeights<'_, E> {
        self.flat()
    }
}

impl<E: HostNumber> Units<Host<E>> for Whole {
    fn numbers(&mut self) -> (HostWeights<'_, E>, &mut dyn Gradients) {
        (HostWeights::flat(&self.master, &self.copy), &mut self.grads)
    }
    fn ready(&mut self, unit: usize) -> Result<()> {
        self.done.push(unit);
        Ok(())
    }
}

/// A strategy that keeps no more than its part of each unit and gathers a unit when it is needed: what the seam has to bear.
pub struct Gathering<E> {
    gang: Box<dyn Collective>,
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
    pub fn new(layout: Layout, gang: Box<dyn Collective>) -> Gathering<E> {
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
    fn gang(&mut self) -> &mut dyn Collective {
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
        let [stop, time] = [votes.stop, votes.time].map(|vote| f64::from(u8::from(vote)));
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
}
