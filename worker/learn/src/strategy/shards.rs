//! Each rank of a gang on several hosts keeps its shard of every unit: weights, their copy for products, and moments. A host has, once for all
//! of its ranks, the units that are needed: embedding and head, and two blocks, of which one is collected while the other is computed.

use super::gathered::Gathered;
use super::state::{Base, State, Sums, copy_ranges, within};
use super::{Read, Resident, Slot};
use crate::error::Result;
use crate::optimizer::{Numbers, Update};
use crate::shim::buffers::{RankSlice, as_bytes};
use crate::units::{HostNumber, HostWeights, Pieces, Places};
use crate::workers::Workers;
use fleet_checkpoint::Disks;
use fleet_collectives::{Keep, SharedHost, Ticket};
use fleet_common::model::{Layout, Role};
use fleet_kernels as kernels;
use half::bf16;
use std::borrow::Cow;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::Arc;

pub(super) struct ShardState<E> {
    base: Base,
    /// Where this rank's parts are in its moments and, under bf16-mixed, in its masters.
    own: Places,
    moment1: RankSlice<f32>,
    moment2: RankSlice<f32>,
    /// Under bf16-mixed; in fp32 the masters are what is collected.
    master: Option<RankSlice<f32>>,
    /// What is read in fp32: all, or under bf16-mixed tables, norms and biases.
    exact: Gathered<f32>,
    /// Under bf16-mixed what products read.
    copy: Option<Gathered<bf16>>,
    units: Vec<Unit>,
    resident: Resident,
    /// The unit that was needed last.
    last: Option<usize>,
    kind: PhantomData<E>,
}

/// Whether the weights of a unit are on this host.
enum Unit {
    Absent,
    Coming(Vec<Ticket>),
    Here,
}

impl<E: HostNumber> ShardState<E> {
    /// All zeros. A collective call.
    pub fn new(
        layout: Layout,
        workers: Arc<Workers>,
        resident: Resident,
        gang: &mut dyn SharedHost,
    ) -> Result<ShardState<E>> {
        let (rank, world) = (gang.rank(), gang.world_size());
        let shards = |unit: usize, rank: usize| within(&layout.units[unit], rank, world);
        let parts: Vec<Range<usize>> = (0..layout.units.len()).map(|unit| shards(unit, rank)).collect();
        let own = Places::in_a_row(parts.iter().cloned());
        // The first rank has the most.
        let most: usize = (0..layout.units.len()).map(|unit| shards(unit, 0).len()).sum();
        let mut shard =
            || -> Result<RankSlice<f32>> { Ok(RankSlice::new(gang.allocate_per_rank(most * 4)?)) };
        let [moment1, moment2] = [shard()?, shard()?];
        let master = if E::IS_BF16 { Some(shard()?) } else { None };
        let Collected { exact, copy } = Collected::of(&layout, E::IS_BF16);
        let exact = Gathered::new(&exact, &shards, resident, gang)?;
        let copy = copy.map(|copy| Gathered::new(&copy, &shards, resident, gang)).transpose()?;
        let units = layout.units.iter().map(|_| Unit::Absent).collect();
        Ok(ShardState {
            base: Base { layout, parts, workers },
            own,
            moment1,
            moment2,
            master,
            exact,
            copy,
            units,
            resident,
            last: None,
            kind: PhantomData,
        })
    }

    /// Starts to collect a unit that is neither here nor coming; what has its room goes.
    fn post(&mut self, unit: usize, gang: &mut dyn SharedHost) -> Result<()> {
        if !matches!(self.units[unit], Unit::Absent) {
            return Ok(());
        }
        for other in (0..self.units.len()).filter(|other| *other != unit) {
            if self.resident == Resident::TwoBlocks && share_room(unit, other, self.units.len()) {
                self.units[other] = Unit::Absent;
            }
        }
        let copy = match &self.copy {
            Some(copy) => copy.post(unit, gang)?,
            None => None,
        };
        let tickets = self.exact.post(unit, gang)?.into_iter().chain(copy);
        self.units[unit] = Unit::Coming(tickets.collect());
        Ok(())
    }

    /// The one that is needed behind `unit`, going up in a forward and down in a backward pass.
    fn next(&self, unit: usize) -> Option<usize> {
        match self.last {
            Some(last) if unit < last => unit.checked_sub(1),
            Some(last) if unit == last => None,
            _ => Some(unit + 1).filter(|next| *next < self.units.len()),
        }
    }

    /// The weights have changed: the first units are collected for the next pass.
    fn anew(&mut self, gang: &mut dyn SharedHost) -> Result<()> {
        self.units.fill_with(|| Unit::Absent);
        self.last = None;
        self.post(0, gang)?;
        self.post(1, gang)
    }

    /// The masters of a range of this rank's part.
    fn master(&self, range: &Range<usize>) -> &[f32] {
        match &self.master {
            Some(master) => master.range(self.own.of(range)),
            None => self.exact.shard(range).expect("in fp32 all is collected"),
        }
    }

    fn of(&self, slot: Slot, range: &Range<usize>) -> &[f32] {
        match slot {
            Slot::Weights => self.master(range),
            Slot::Moment1 => self.moment1.range(self.own.of(range)),
            Slot::Moment2 => self.moment2.range(self.own.of(range)),
        }
    }

    /// The masters of a unit, of all ranks. A collective call.
    fn gather_masters(&self, unit: usize, gang: &mut dyn SharedHost) -> Result<Vec<f32>> {
        let world = gang.world_size();
        let own = &self.base.parts[unit];
        // The first rank has the most, and as many have the others but the last that have any.
        let mut part = vec![0.0f32; within(&self.base.layout.units[unit], 0, world).len()];
        if !own.is_empty() {
            part[..own.len()].copy_from_slice(self.master(own));
        }
        let mut bytes = vec![0u8; part.len() * world * 4];
        gang.all_gather(as_bytes(&part), &mut bytes)?;
        Ok(bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect())
    }

    /// What is collected, from the masters.
    fn refresh(&mut self) {
        let Some(master) = &self.master else { return };
        for range in self.exact.owned() {
            let numbers = master.range(self.own.of(&range));
            self.exact.shard_mut(&range).expect("a range that is owned").copy_from_slice(numbers);
        }
        let Some(copy) = &mut self.copy else { return };
        for range in copy.owned() {
            let numbers = master.range(self.own.of(&range));
            kernels::convert(numbers, copy.shard_mut(&range).expect("a range that is owned"));
        }
    }
}

/// Blocks take two rooms in turn.
fn share_room(one: usize, other: usize, units: usize) -> bool {
    let block = |unit: usize| unit > 0 && unit + 1 < units;
    block(one) && block(other) && one % 2 == other % 2
}

/// Of each unit what is collected.
pub(super) struct Collected {
    /// In fp32.
    pub exact: Vec<Vec<Range<usize>>>,
    /// In bf16, under bf16-mixed.
    pub copy: Option<Vec<Vec<Range<usize>>>>,
}

impl Collected {
    pub fn of(layout: &Layout, bf16: bool) -> Collected {
        if bf16 {
            let [exact, copy] = members(layout);
            return Collected { exact, copy: Some(copy) };
        }
        Collected { exact: layout.units.iter().map(|unit| vec![unit.clone()]).collect(), copy: None }
    }
}

/// Of each unit what is read in fp32 under bf16-mixed, and what products read.
fn members(layout: &Layout) -> [Vec<Vec<Range<usize>>>; 2] {
    let of = |wanted: &dyn Fn(Role) -> bool| {
        let unit = |number: usize| layout.ranges(|p| p.unit == number && wanted(p.role));
        (0..layout.units.len()).map(unit).collect()
    };
    [
        of(&|role| role.is_vector() || matches!(role, Role::Table | Role::TiedTable | Role::LoraB)),
        of(&|role| matches!(role, Role::Weight | Role::TiedTable | Role::LoraA)),
    ]
}

impl<E: HostNumber> State<E> for ShardState<E> {
    fn base(&self) -> &Base {
        &self.base
    }

    fn keep(&self) -> Keep {
        Keep::MyShard
    }

    fn squares(&self, sums: &Sums<'_>, _gang: &dyn SharedHost) -> f64 {
        self.base.parts.iter().map(|part| kernels::sum_squares(sums(part.clone()))).sum()
    }

    fn need(&mut self, unit: usize, gang: &mut dyn SharedHost) -> Result<()> {
        self.post(unit, gang)?;
        if let Unit::Coming(tickets) = std::mem::replace(&mut self.units[unit], Unit::Here) {
            tickets.into_iter().try_for_each(|ticket| gang.wait(ticket))?;
        }
        if let Some(next) = self.next(unit) {
            self.post(next, gang)?;
        }
        self.last = Some(unit);
        Ok(())
    }

    fn needs_together(&self) -> bool {
        true
    }

    fn weights(&self) -> HostWeights<'_, E> {
        let copy = self.copy.as_ref().map_or(Pieces::Flat(&[]), Gathered::pieces);
        HostWeights::new(self.exact.pieces(), copy)
    }

    fn update(
        &mut self,
        update: &Update,
        norm: f64,
        sums: &Sums<'_>,
        gang: &mut dyn SharedHost,
    ) -> Result<()> {
        gang.finish()?;
        for (step, range) in update.over(norm, &self.base.layout, &self.base.parts) {
            let place = self.own.of(&range);
            let master = match &mut self.master {
                Some(master) => master.range_mut(place.clone()),
                None => self.exact.shard_mut(&range).expect("in fp32 all is collected"),
            };
            let numbers = Numbers {
                master,
                moment1: self.moment1.range_mut(place.clone()),
                moment2: self.moment2.range_mut(place),
                copy: None,
                grads: sums(range),
            };
            numbers.update(&step, &self.base.workers);
        }
        self.refresh();
        self.anew(gang)
    }

    fn fill(&mut self, slot: Slot, read: &mut Read, gang: &mut dyn SharedHost) -> Result<()> {
        gang.finish()?;
        for part in self.base.parts.iter().filter(|part| !part.is_empty()) {
            let place = self.own.of(part);
            let numbers = match (slot, &mut self.master) {
                (Slot::Weights, Some(master)) => master.range_mut(place),
                (Slot::Weights, None) => self.exact.shard_mut(part).expect("in fp32 all is collected"),
                (Slot::Moment1, _) => self.moment1.range_mut(place),
                (Slot::Moment2, _) => self.moment2.range_mut(place),
            };
            read(part.clone(), numbers)?;
        }
        if slot == Slot::Weights {
            self.refresh();
            self.anew(gang)?;
        }
        Ok(gang.barrier()?)
    }

    fn flat(&self, slot: Slot) -> Cow<'_, [f32]> {
        let mut flat = vec![0.0; self.base.layout.len];
        for part in self.base.parts.iter().filter(|part| !part.is_empty()) {
            flat[part.clone()].copy_from_slice(self.of(slot, part));
        }
        Cow::Owned(flat)
    }

    /// Moments from where they are. Weights unit by unit as for a pass, where that brings them in fp32, else through the gang.
    fn copy_out(
        &mut self,
        slot: Slot,
        ranges: &[Range<usize>],
        out: &mut [f32],
        gang: &mut dyn SharedHost,
    ) -> Result<()> {
        if slot != Slot::Weights {
            copy_ranges(|range| self.of(slot, range), ranges, out, &self.base.workers);
            return Ok(());
        }
        for unit in 0..self.base.layout.units.len() {
            let whole = self.base.layout.units[unit].clone();
            let gathered = match &self.master {
                None => {
                    self.need(unit, gang)?;
                    None
                }
                Some(_) => Some(self.gather_masters(unit, gang)?),
            };
            let mut at = 0;
            for range in ranges {
                let room = &mut out[at..at + range.len()];
                at += range.len();
                if range.start < whole.start || range.end > whole.end {
                    continue;
                }
                match &gathered {
                    None => room.copy_from_slice(self.exact.pieces().of(range)),
                    Some(numbers) => {
                        room.copy_from_slice(&numbers[range.start - whole.start..range.end - whole.start]);
                    }
                }
            }
        }
        self.last = None; // the next pass goes up again
        Ok(())
    }

    /// Each rank has other numbers.
    fn writers(&self, _disks: &Disks, gang: &dyn SharedHost) -> usize {
        gang.world_size()
    }

    fn kept(&self, _disks: &Disks, _gang: &dyn SharedHost) -> Vec<Range<usize>> {
        self.base.parts.clone()
    }
}
