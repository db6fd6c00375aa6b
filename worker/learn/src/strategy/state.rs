//! What a rank and its host keep of a model: weights, and what the optimizer keeps.

use super::{Read, Slot};
use crate::error::Result;
use crate::optimizer::{Numbers, Update};
use crate::shim::buffers::SharedSlice;
use crate::units::{HostNumber, HostWeights};
use crate::workers::Workers;
use fleet_checkpoint::Disks;
use fleet_collectives::{Keep, SharedHost, part};
use fleet_common::model::Layout;
use fleet_kernels::{self as kernels, Element};
use half::bf16;
use std::borrow::Cow;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::Arc;

/// This rank's gradients of a range that it updates, summed over all ranks.
pub(super) type Sums<'a, S = f32> = dyn Fn(Range<usize>) -> &'a [S] + 'a;

/// What every state has.
pub(super) struct Base {
    pub layout: Layout,
    /// Of each unit the part that this rank updates; it may hold nothing.
    pub parts: Vec<Range<usize>>,
    pub workers: Arc<Workers>,
}

impl Base {
    /// Of a state that lies once on each host: each of its ranks has a part of every unit.
    pub fn of_host(layout: Layout, workers: Arc<Workers>, gang: &dyn SharedHost) -> Base {
        let parts = layout.units.iter().map(|unit| of_host(unit, gang)).collect();
        Base { layout, parts, workers }
    }
}

/// Where weights and moments are, and which of them this rank updates with sums of gradients in `S`. Where nothing else is said, all of it is
/// on each host, which holds the same sums as others.
pub(super) trait State<E, S: Element = f32>: Send {
    fn base(&self) -> &Base;

    /// Which sums of gradients it wants.
    fn keep(&self) -> Keep {
        Keep::MyPart
    }
    /// The squares of this rank's part of the gradients, each counted by one rank of the gang.
    fn squares(&self, sums: &Sums<'_, S>, gang: &dyn SharedHost) -> f64 {
        match gang.host() {
            0 => self.base().parts.iter().map(|part| kernels::sum_squares(sums(part.clone()))).sum(),
            _ => 0.0,
        }
    }

    /// Brings the weights of a unit in.
    fn need(&mut self, _unit: usize, _gang: &mut dyn SharedHost) -> Result<()> {
        Ok(())
    }
    /// Whether that is a collective call.
    fn needs_together(&self) -> bool {
        false
    }
    /// Of all units that are in.
    fn weights(&self) -> HostWeights<'_, E>;

    /// One step of the optimizer on this rank's parts; the gradients of the whole model have `norm`. A collective call.
    fn update(
        &mut self,
        update: &Update,
        norm: f64,
        sums: &Sums<'_, S>,
        gang: &mut dyn SharedHost,
    ) -> Result<()>;
    /// Calls `read` for each of this rank's parts. A collective call.
    fn fill(&mut self, slot: Slot, read: &mut Read, gang: &mut dyn SharedHost) -> Result<()>;
    /// What is here of the flat buffer; the rest is zero.
    fn flat(&self, slot: Slot) -> Cow<'_, [f32]>;
    /// As `Strategy::copy_out`.
    fn copy_out(
        &mut self,
        slot: Slot,
        ranges: &[Range<usize>],
        out: &mut [f32],
        gang: &mut dyn SharedHost,
    ) -> Result<()>;

    /// Ranks that write checkpoints, the first ones. Where every host has all of it, nothing need lie on another disk than rank 0's.
    fn writers(&self, disks: &Disks, _gang: &dyn SharedHost) -> usize {
        disks.together()
    }
    /// What this rank writes of the moments.
    fn kept(&self, disks: &Disks, gang: &dyn SharedHost) -> Vec<Range<usize>> {
        let (rank, writers) = (gang.rank(), disks.together());
        let parts = self.base().layout.units.iter().filter(|_| rank < writers);
        parts.map(|unit| within(unit, rank, writers)).collect()
    }
}

/// The part of a unit that this rank has among the ranks of its host. It may hold nothing.
pub(crate) fn of_host(unit: &Range<usize>, gang: &dyn SharedHost) -> Range<usize> {
    within(unit, gang.local_rank(), gang.local_size())
}

/// The part of a unit that one of `ranks` has.
pub(super) fn within(unit: &Range<usize>, rank: usize, ranks: usize) -> Range<usize> {
    let part = part(unit.len(), rank, ranks);
    unit.start + part.start..unit.start + part.end
}

/// Numbers that one thread copies at a time.
const COPIED: usize = 1 << 18;

/// Copies what `of` has of each range, one after the other, by all of the rank's threads.
pub(super) fn copy_ranges<'a>(
    of: impl Fn(&Range<usize>) -> &'a [f32],
    ranges: &[Range<usize>],
    out: &mut [f32],
    workers: &Workers,
) {
    let mut rest = out;
    let pieces = ranges.iter().flat_map(|range| {
        let (now, later) = std::mem::take(&mut rest).split_at_mut(range.len());
        rest = later;
        of(range).chunks(COPIED).zip(now.chunks_mut(COPIED))
    });
    workers.each(pieces, |(from, to)| kernels::copy(from, to));
}

/// All of it once on each host, in memory that its ranks share: master weights, their copy for products, and moments. Each rank updates its
/// part of every unit among the ranks of its host, so all of them hold the same weights because they are the same memory.
pub(super) struct HostState<E> {
    base: Base,
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
        let base = Base::of_host(layout, workers, gang);
        let len = base.layout.len;
        let mut common = |bytes: usize| gang.allocate_common(bytes);
        let [master, moment1, moment2] = [common(len * 4)?, common(len * 4)?, common(len * 4)?];
        let copy = common(if E::IS_BF16 { len * 2 } else { 0 })?;
        Ok(HostState {
            base,
            master: SharedSlice::new(master),
            copy: SharedSlice::new(copy),
            moment1: SharedSlice::new(moment1),
            moment2: SharedSlice::new(moment2),
            kind: PhantomData,
        })
    }

    fn of(&self, slot: Slot) -> &[f32] {
        match slot {
            Slot::Weights => self.master.all(),
            Slot::Moment1 => self.moment1.all(),
            Slot::Moment2 => self.moment2.all(),
        }
    }
}

impl<E: HostNumber> State<E> for HostState<E> {
    fn base(&self) -> &Base {
        &self.base
    }

    fn weights(&self) -> HostWeights<'_, E> {
        HostWeights::flat(self.master.all(), self.copy.all())
    }

    fn update(
        &mut self,
        update: &Update,
        norm: f64,
        sums: &Sums<'_>,
        gang: &mut dyn SharedHost,
    ) -> Result<()> {
        for (step, range) in update.over(norm, &self.base.layout, &self.base.parts) {
            let numbers = Numbers {
                master: self.master.part_mut(range.clone()),
                moment1: self.moment1.part_mut(range.clone()),
                moment2: self.moment2.part_mut(range.clone()),
                copy: E::IS_BF16.then_some(&mut self.copy).map(|copy| copy.part_mut(range.clone())),
                grads: sums(range),
            };
            numbers.update(&step, &self.base.workers);
        }
        Ok(gang.barrier()?)
    }

    fn fill(&mut self, slot: Slot, read: &mut Read, gang: &mut dyn SharedHost) -> Result<()> {
        for part in &self.base.parts {
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
        Ok(gang.barrier()?)
    }

    fn flat(&self, slot: Slot) -> Cow<'_, [f32]> {
        Cow::Borrowed(self.of(slot))
    }

    fn copy_out(
        &mut self,
        slot: Slot,
        ranges: &[Range<usize>],
        out: &mut [f32],
        _gang: &mut dyn SharedHost,
    ) -> Result<()> {
        let flat = self.of(slot);
        copy_ranges(|range| &flat[range.clone()], ranges, out, &self.base.workers);
        Ok(())
    }
}
