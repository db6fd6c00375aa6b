//! Fully sharded (FSDP): each rank keeps its part of the optimizer's state and of the gradients. On a host the weights lie in memory that its ranks
//! share, so that gathering a unit costs nothing. A rank's own gradients are those of two blocks, in turn, and of embedding and head: a unit's are
//! reduced to parts while the next one is computed, after every micro-batch.

use super::state::{HostState, own_part};
use super::{Micro, Read, Report, Slot, Strategy, Votes};
use crate::error::Result;
use crate::optimizer::Update;
use crate::shim::buffers::{RankGradients, SharedSlice};
use crate::units::{Gradients, Host, HostNumber, HostWeights, UnitWeights, Units};
use crate::workers::Workers;
use fleet_collectives::{Activity, DType, Gang, Op, Posted, SharedHost, Ticket};
use fleet_common::model::Layout;
use fleet_kernels as kernels;
use std::borrow::Cow;
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

pub struct Sharded<E> {
    gang: Box<dyn SharedHost>,
    state: HostState<E>,
    rooms: Rooms,
    /// The sums over ranks and micro-batches, of which each rank looks at its parts.
    sums: SharedSlice<f32>,
    /// Units whose reduction is under way, oldest first.
    posted: VecDeque<(usize, Ticket)>,
    /// The first micro-batch of a step.
    first: bool,
}

/// This rank's own gradients, of as many units as are on their way.
struct Rooms {
    numbers: RankGradients,
    units: Vec<Range<usize>>,
    /// For each unit where its room is in `numbers`.
    rooms: Vec<Range<usize>>,
    /// Between the parameters of each unit: nobody writes there, so that another unit's numbers would be left.
    gaps: Vec<Vec<Range<usize>>>,
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

impl Rooms {
    fn of(&self, range: &Range<usize>) -> Range<usize> {
        let unit = self.units.partition_point(|unit| unit.end <= range.start);
        let shift = |at: usize| at - self.units[unit].start + self.rooms[unit].start;
        shift(range.start)..shift(range.end)
    }
}

impl Gradients for Rooms {
    fn range(&mut self, range: Range<usize>) -> &mut [f32] {
        self.numbers.range_mut(self.of(&range))
    }
    /// What was there before was another unit's, or has been added up.
    fn fresh(&self) -> bool {
        true
    }
}

/// Rooms for the gradients of each unit, and how long they are together. Blocks take two in turn; embedding and head share one, unless the
/// head writes into the embedding's.
pub(super) fn rooms(layout: &Layout) -> (Vec<Range<usize>>, usize) {
    let units = &layout.units;
    let last = units.len() - 1;
    let tied = layout.head.weight == layout.embedding;
    let [embedding, head] = [units[0].len(), units[last].len()];
    let head_at = if tied { embedding } else { 0 };
    let edges = embedding.max(head_at + head);
    let block = units[1..last].iter().map(Range::len).max().unwrap_or(0);
    let start = |unit: usize| match unit {
        0 => 0,
        unit if unit == last => head_at,
        unit => edges + unit % 2 * block,
    };
    let rooms =
        units.iter().enumerate().map(|(unit, range)| start(unit)..start(unit) + range.len()).collect();
    (rooms, edges + 2 * block)
}

impl<E: HostNumber> Sharded<E> {
    /// Weights are zero until they are filled. All ranks are on one host. A collective call.
    pub fn new(layout: Layout, workers: Arc<Workers>, mut gang: Box<dyn SharedHost>) -> Result<Sharded<E>> {
        gang.note(Activity::Starting);
        let state = HostState::new(layout, workers, &mut *gang)?;
        let (rooms, len) = rooms(&state.layout);
        let numbers = RankGradients::new(gang.allocate_per_rank(len * 4)?);
        let sums = SharedSlice::new(gang.allocate_common(state.layout.len * 4)?);
        let gaps = gaps(&state.layout);
        let rooms = Rooms { numbers, units: state.layout.units.clone(), rooms, gaps };
        Ok(Sharded { gang, state, rooms, sums, posted: VecDeque::new(), first: true })
    }

    /// Adds up the oldest unit whose reduction is under way, and gives its room back.
    fn take_in(&mut self) -> Result<()> {
        let Some((unit, ticket)) = self.posted.pop_front() else { return Ok(()) };
        self.gang.wait(ticket)?;
        let part = own_part(&self.state.layout.units[unit], &*self.gang);
        if part.is_empty() {
            return Ok(());
        }
        let (sums, new) = (self.sums.part_mut(part.clone()), self.rooms.range(part));
        match self.first {
            true => sums.copy_from_slice(new),
            false => kernels::add(sums, new),
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

impl<E: HostNumber> UnitWeights<Host<E>> for Sharded<E> {
    fn need(&mut self, _unit: usize) -> Result<()> {
        Ok(())
    }
    fn release(&mut self, _unit: usize) {}
    fn weights(&self) -> HostWeights<'_, E> {
        self.state.weights()
    }
}

impl<E: HostNumber> Units<Host<E>> for Sharded<E> {
    fn numbers(&mut self) -> (HostWeights<'_, E>, &mut dyn Gradients) {
        (self.state.weights(), &mut self.rooms)
    }

    fn ready(&mut self, unit: usize) -> Result<()> {
        self.gang.note(Activity::Backward);
        for gap in self.rooms.gaps[unit].clone() {
            self.rooms.range(gap).fill(0.0);
        }
        let room = self.rooms.rooms[unit].clone();
        let bytes = room.start * 4..room.end * 4;
        let memory = self.rooms.numbers.memory();
        let ticket = self.gang.post(memory, bytes, Posted::ReduceScatter(DType::F32, Op::Sum))?;
        self.posted.push_back((unit, ticket));
        // The next one's room has to be free; before the first of another micro-batch all of them.
        let Some(next) = unit.checked_sub(1) else { return self.take_all_in() };
        let next = self.rooms.rooms[next].clone();
        let taken = |rooms: &Rooms, unit: usize| {
            let room = &rooms.rooms[unit];
            room.start < next.end && next.start < room.end
        };
        while self.posted.iter().any(|(unit, _)| taken(&self.rooms, *unit)) {
            self.take_in()?;
        }
        Ok(())
    }
}

impl<E: HostNumber> Strategy<Host<E>> for Sharded<E> {
    fn gang(&mut self) -> &mut dyn Gang {
        &mut *self.gang
    }

    fn units(&mut self, micro: Micro) -> &mut dyn Units<Host<E>> {
        self.first = micro.first;
        self
    }

    fn weights(&mut self) -> &mut dyn UnitWeights<Host<E>> {
        self
    }

    fn update(&mut self, update: &Update, loss: f64, votes: Votes) -> Result<Report> {
        self.gang.note(Activity::Optimizer);
        let sums = &self.sums;
        let squares = self.state.parts.iter().map(|part| kernels::sum_squares(sums.part(part.clone()))).sum();
        let [stop, time] = votes.numbers();
        let mut all = [squares, loss, stop, time];
        self.gang.all_reduce_f64(&mut all, Op::Sum)?;
        let report = Report::of_sums(all, update.step)?;
        self.state.update(update, report.grad_norm, |range| sums.part(range));
        self.gang.barrier()?;
        Ok(report)
    }

    fn fill(&mut self, slot: Slot, read: &mut Read) -> Result<()> {
        self.state.fill(slot, read)?;
        Ok(self.gang.barrier()?)
    }

    fn flat(&self, slot: Slot) -> Result<Cow<'_, [f32]>> {
        Ok(Cow::Borrowed(self.state.of(slot)))
    }

    fn name(&self) -> &'static str {
        "fsdp"
    }

    /// Every host has the same numbers: the first one's ranks write them, on its disk.
    fn writers(&mut self) -> usize {
        self.gang.local_size()
    }

    fn kept(&self) -> Vec<Range<usize>> {
        self.state.kept(&*self.gang)
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
            let (rooms, len) = rooms(&layout);
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
