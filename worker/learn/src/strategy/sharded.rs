//! Sharded (FSDP, HSDP): each rank keeps its part of the optimizer's state and of the gradients. On a host the weights lie in memory that its
//! ranks share, so that gathering a unit there costs nothing. Over several hosts FSDP shards them over all ranks, and collects a unit once for
//! each host, while the one before it is computed; HSDP keeps all of them on each host. A rank's own gradients are those of two blocks, in turn,
//! and of embedding and head: a unit's are reduced to parts while the next one is computed, after every micro-batch. Only those of the last one
//! of a step go across hosts: what a host has summed before is added to them there.

use super::narrow::NarrowState;
use super::shards::ShardState;
use super::state::{HostState, State, of_host};
use super::{Micro, Read, Report, Resident, Slot, Strategy, Votes};
use crate::error::Result;
use crate::optimizer::Update;
use crate::shim::buffers::RankSlice;
use crate::units::{Gradients, Host, HostNumber, HostWeights, Kept, Places, UnitWeights, Units};
use crate::workers::Workers;
use crate::zeros::{Part, zeros};
use fleet_checkpoint::{Disks, Dtype};
use fleet_collectives::{Activity, DType, Gang, Keep, Op, SharedHost, Ticket};
use fleet_common::model::Layout;
use fleet_kernels as kernels;
use half::bf16;
use std::borrow::Cow;
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

/// Sums of gradients are kept as `S`.
pub struct Sharded<E, S: Kept = f32> {
    gang: Box<dyn SharedHost>,
    state: Box<dyn State<E, S>>,
    own: OwnGradients,
    /// Over all ranks, when a step's last micro-batch is done.
    sums: Summed<S>,
    /// Over the ranks of this host and the micro-batches so far; `None` where `sums` has the same parts, or no step has had several micro-batches.
    held: Option<Summed<S>>,
    /// Units whose reduction is under way, oldest first.
    posted: VecDeque<(usize, Ticket)>,
    micro: Micro,
    name: &'static str,
}

/// This rank's own gradients, of as many units as are on their way.
struct OwnGradients {
    numbers: RankSlice<f32>,
    /// For each unit where its room is in `numbers`.
    rooms: Vec<Range<usize>>,
    places: Places,
    /// Between the parameters of each unit: nobody writes there, so that another unit's numbers would be left.
    gaps: Vec<Vec<Range<usize>>>,
}

/// A part of each unit's gradients.
struct Summed<S> {
    parts: Vec<Range<usize>>,
    numbers: Vec<S>,
    places: Places,
}

impl<S: Kept> Summed<S> {
    /// One of `parts` for each unit.
    fn new(parts: Vec<Range<usize>>) -> Result<Summed<S>> {
        let places = Places::in_a_row(parts.iter().cloned());
        Ok(Summed { parts, numbers: zeros(places.end(), Part::Learner)?, places })
    }

    fn of(&self, part: Range<usize>) -> &[S] {
        &self.numbers[self.places.of(&part)]
    }

    fn of_mut(&mut self, part: Range<usize>) -> &mut [S] {
        &mut self.numbers[self.places.of(&part)]
    }
}

/// Places for the units of a model that are not all there at once.
pub(super) struct Rooms {
    /// Of each unit.
    pub rooms: Vec<Range<usize>>,
    pub len: usize,
}

impl Rooms {
    /// Of units that are so long. Blocks take two rooms in turn; embedding and head have their own.
    pub fn apart(lens: &[usize]) -> Rooms {
        Rooms::with(lens, lens[0])
    }

    /// Of units that are so long, each in its own.
    pub fn of_all(lens: &[usize]) -> Rooms {
        let mut next = 0;
        let room = |len: &usize| {
            next += len;
            next - len..next
        };
        let rooms = lens.iter().map(room).collect();
        Rooms { rooms, len: next }
    }

    /// For gradients. Embedding and head share one, unless the head writes into the embedding's.
    pub fn of_gradients(layout: &Layout) -> Rooms {
        let lens: Vec<usize> = layout.units.iter().map(Range::len).collect();
        let tied = layout.is_tied();
        Rooms::with(&lens, if tied { lens[0] } else { 0 })
    }

    fn with(lens: &[usize], head_at: usize) -> Rooms {
        let last = lens.len() - 1;
        let edges = lens[0].max(head_at + lens[last]);
        let block = lens[1..last].iter().copied().max().unwrap_or(0);
        let start = |unit: usize| match unit {
            0 => 0,
            unit if unit == last => head_at,
            unit => edges + unit % 2 * block,
        };
        let rooms = lens.iter().enumerate().map(|(unit, len)| start(unit)..start(unit) + len).collect();
        Rooms { rooms, len: edges + 2 * block }
    }
}

/// For each unit what of its range no parameter has.
fn gaps(layout: &Layout) -> Vec<Vec<Range<usize>>> {
    let of = |unit: &Range<usize>| {
        let mut parameters: Vec<Range<usize>> = layout.parameters.iter().map(|p| p.range.clone()).collect();
        parameters.retain(|range| unit.start <= range.start && range.end <= unit.end);
        parameters.sort_by_key(|range| range.start);
        let ends = std::iter::once(unit.start).chain(parameters.iter().map(|range| range.end));
        let starts = parameters.iter().map(|range| range.start).chain([unit.end]);
        ends.zip(starts).map(|(end, start)| end..start).filter(|gap| !gap.is_empty()).collect()
    };
    layout.units.iter().map(of).collect()
}

impl Gradients for OwnGradients {
    fn range(&mut self, range: Range<usize>) -> &mut [f32] {
        self.numbers.range_mut(self.places.of(&range))
    }
    /// What was there before was another unit's, or has been added up.
    fn fresh(&self) -> bool {
        true
    }
}

impl<E: HostNumber> Sharded<E> {
    /// Each rank has its shard among all ranks of the gang. Weights are zero until they are filled. A collective call.
    pub fn fully(
        layout: Layout,
        workers: Arc<Workers>,
        mut gang: Box<dyn SharedHost>,
        resident: Resident,
    ) -> Result<Sharded<E>> {
        gang.note(Activity::Starting);
        let state: Box<dyn State<E>> = match gang.local_size() == gang.world_size() {
            true => Box::new(HostState::new(layout, workers, &mut *gang)?),
            false => Box::new(ShardState::new(layout, workers, resident, &mut *gang)?),
        };
        Sharded::new(state, gang, "fsdp")
    }

    /// Each rank has its shard among the ranks of its host, and every host all of them. As `fully`.
    pub fn within_hosts(
        layout: Layout,
        workers: Arc<Workers>,
        mut gang: Box<dyn SharedHost>,
    ) -> Result<Sharded<E>> {
        gang.note(Activity::Starting);
        let state = HostState::new(layout, workers, &mut *gang)?;
        Sharded::new(Box::new(state), gang, "hsdp")
    }
}

impl Sharded<bf16, bf16> {
    /// A model in bf16: each rank has its shard among the ranks of its host, whatever the strategy is that `name` names. Sums over ranks are
    /// made in fp32, and rounded where they are kept. As `fully`.
    pub fn in_bf16(
        layout: Layout,
        workers: Arc<Workers>,
        mut gang: Box<dyn SharedHost>,
        name: &'static str,
    ) -> Result<Sharded<bf16, bf16>> {
        gang.note(Activity::Starting);
        let state = NarrowState::new(layout, workers, &mut *gang)?;
        Sharded::new(Box::new(state), gang, name)
    }
}

impl<E: HostNumber, S: Kept> Sharded<E, S> {
    fn new(
        state: Box<dyn State<E, S>>,
        mut gang: Box<dyn SharedHost>,
        name: &'static str,
    ) -> Result<Sharded<E, S>> {
        let layout = &state.base().layout;
        let Rooms { rooms, len } = Rooms::of_gradients(layout);
        let own = OwnGradients {
            numbers: RankSlice::new(gang.allocate_per_rank(len * 4)?),
            places: Places::new(layout.units.iter().cloned().zip(rooms.iter().map(|room| room.start))),
            rooms,
            gaps: gaps(layout),
        };
        let sums = Summed::new(state.base().parts.to_vec())?;
        let micro = Micro { first: true, last: true };
        Ok(Sharded { gang, state, own, sums, held: None, posted: VecDeque::new(), micro, name })
    }

    /// Has room for what this host sums before the last micro-batch.
    fn hold(&mut self) -> Result<()> {
        if self.held.is_none() && self.state.keep() == Keep::MyShard {
            let units = &self.state.base().layout.units;
            self.held = Some(Summed::new(units.iter().map(|unit| of_host(unit, &*self.gang)).collect())?);
        }
        Ok(())
    }

    /// Adds up the oldest unit whose reduction is under way, and gives its room back.
    fn take_in(&mut self) -> Result<()> {
        let Some((unit, ticket)) = self.posted.pop_front() else { return Ok(()) };
        self.gang.wait(ticket)?;
        let into =
            if self.micro.last { &mut self.sums } else { self.held.as_mut().unwrap_or(&mut self.sums) };
        let part = into.parts[unit].clone();
        if !part.is_empty() {
            let (sums, new) = (into.of_mut(part.clone()), self.own.range(part));
            match self.micro.first || self.micro.last {
                true => kernels::convert(&*new, sums),
                false => kernels::add(sums, &*new),
            }
        }
        Ok(())
    }

    fn take_all_in(&mut self) -> Result<()> {
        while !self.posted.is_empty() {
            self.take_in()?;
        }
        Ok(())
    }
}

impl<E: HostNumber, S: Kept> UnitWeights<Host<E>> for Sharded<E, S> {
    fn need(&mut self, unit: usize) -> Result<()> {
        self.state.need(unit, &mut *self.gang)
    }
    /// Its room goes to the one that is needed after the next.
    fn release(&mut self, _unit: usize) {}
    fn weights(&self) -> HostWeights<'_, E> {
        self.state.weights()
    }
}

impl<E: HostNumber, S: Kept> Units<Host<E>> for Sharded<E, S> {
    fn numbers(&mut self) -> (HostWeights<'_, E>, &mut dyn Gradients) {
        (self.state.weights(), &mut self.own)
    }

    fn ready(&mut self, unit: usize) -> Result<()> {
        self.gang.note(Activity::Backward);
        for gap in self.own.gaps[unit].clone() {
            self.own.range(gap).fill(0.0);
        }
        let keep = match self.micro {
            Micro { last: false, .. } => {
                self.hold()?;
                Keep::MyPartOfHost
            }
            Micro { first: false, .. } => {
                let held = self.held.as_ref().unwrap_or(&self.sums);
                let part = held.parts[unit].clone();
                kernels::add(self.own.range(part.clone()), held.of(part));
                self.state.keep()
            }
            _ => self.state.keep(),
        };
        let room = self.own.rooms[unit].clone();
        let (memory, bytes) = (self.own.numbers.memory(), room.start * 4..room.end * 4);
        let ticket = self.gang.post_reduce(memory, bytes, DType::F32, Op::Sum, keep)?;
        self.posted.push_back((unit, ticket));
        // The next one's room has to be free; before the first of another micro-batch all of them.
        let Some(next) = unit.checked_sub(1) else { return self.take_all_in() };
        let next = self.own.rooms[next].clone();
        let taken = |room: &Range<usize>| room.start < next.end && next.start < room.end;
        while self.posted.iter().any(|(unit, _)| taken(&self.own.rooms[*unit])) {
            self.take_in()?;
        }
        Ok(())
    }
}

impl<E: HostNumber, S: Kept> Strategy<Host<E>> for Sharded<E, S> {
    fn gang(&mut self) -> &mut dyn Gang {
        &mut *self.gang
    }

    fn units(&mut self, micro: Micro) -> &mut dyn Units<Host<E>> {
        self.micro = micro;
        self
    }

    fn weights(&mut self) -> &mut dyn UnitWeights<Host<E>> {
        self
    }

    fn passes_together(&self) -> bool {
        self.state.needs_together()
    }

    fn update(&mut self, update: &Update, loss: f64, votes: Votes) -> Result<Report> {
        self.gang.note(Activity::Optimizer);
        let sums = &self.sums;
        let squares = self.state.squares(&|part| sums.of(part), &*self.gang);
        let report = Report::summed(&mut *self.gang, squares, loss, votes, update.step)?;
        self.state.update(update, report.grad_norm, &|part| sums.of(part), &mut *self.gang)?;
        Ok(report)
    }

    fn fill(&mut self, slot: Slot, read: &mut Read) -> Result<()> {
        self.state.fill(slot, read, &mut *self.gang)
    }

    fn flat(&self, slot: Slot) -> Result<Cow<'_, [f32]>> {
        Ok(self.state.flat(slot))
    }

    fn dtype(&self) -> Dtype {
        S::DTYPE
    }

    fn name(&self) -> &'static str {
        self.name
    }

    fn writers(&mut self, disks: &Disks) -> usize {
        self.state.writers(disks, &*self.gang)
    }

    fn kept(&self, disks: &Disks) -> Vec<Range<usize>> {
        self.state.kept(disks, &*self.gang)
    }

    fn copy_out(&mut self, slot: Slot, ranges: &[Range<usize>], out: &mut [f32]) -> Result<()> {
        self.state.copy_out(slot, ranges, out, &mut *self.gang)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Model;
    use crate::testing::tiny_with;
    use serde_json::json;

    #[test]
    fn neighbours_never_share_a_room_and_a_tied_head_leaves_the_embedding_alone() {
        for (tied, layers) in [(false, 1), (false, 4), (true, 1), (true, 5)] {
            let config = tiny_with(json!({"tie_word_embeddings": tied, "num_hidden_layers": layers}));
            let layout = Model::new(&config).unwrap().layout();
            let Rooms { rooms, len } = Rooms::of_gradients(&layout);
            let apart = |a: &Range<usize>, b: &Range<usize>| a.end <= b.start || b.end <= a.start;
            for (unit, room) in rooms.iter().enumerate() {
                assert_eq!(room.len(), layout.units[unit].len());
                assert!(room.end <= len);
                assert!(unit == 0 || apart(room, &rooms[unit - 1]), "{layers} layers: {rooms:?}");
            }
            assert_eq!(apart(&rooms[0], &rooms[layers + 1]), tied);
        }
    }
}
