//! Several ranks, each of which keeps its part of the weights, of the gradients and of the optimizer's state. Whole units are in rooms: a
//! unit's weights are gathered before it is computed, while the one before it still is; its gradients are reduced to parts while earlier
//! units are computed. With a room for every unit that is data-parallel training (DDP), with rooms for two blocks fully sharded (FSDP); with rooms
//! for all weights and two blocks' gradients FSDP that gathers once for each step.

use crate::device::memory_is_short;
use crate::memory::{Gradients, Tensors, Weights, copy_out, dtype, hidden_copy, narrow, set};
use crate::network::Numbers;
use crate::optimizer::{Optimizer, Scaled, norm};
use crate::parts::{Held, Parts, Rooms, Turn};
use crate::transport::{Exchanged, Posted, Room, Transport};
use crate::{Error, Result, device};
use fleet_checkpoint::Dtype;
use fleet_collectives::{Activity, Gang, Op};
use fleet_common::model::Layout;
use fleet_learn::strategy::{Disks, Micro, Read, Report, Slot, Strategy, Votes};
use fleet_learn::{UnitWeights, Units, Update};
use std::borrow::Cow;
use std::collections::VecDeque;
use std::ops::Range;
use tch::{Device, Kind, Tensor};

/// How a rank keeps a model.
#[derive(Clone, Copy, Debug)]
pub struct Keeping {
    pub held: Held,
    pub numbers: Numbers,
    /// Where is computed.
    pub device: Device,
    /// This rank's parts are in the memory of the host, where they are updated; the device has whole units alone (optimizer offload).
    pub offload: bool,
}

impl Keeping {
    /// Where this rank's parts are.
    fn home(&self) -> Device {
        if self.offload { Device::Cpu } else { self.device }
    }
}

pub struct Sharded {
    transport: Box<dyn Transport>,
    layout: Layout,
    keeping: Keeping,
    /// With the rooms of whole units' weights.
    parts: Parts,
    /// With those of their gradients.
    gradients: Parts,
    rank: usize,
    /// This rank's parts.
    master: Tensor,
    optimizer: Optimizer,
    grads: Tensor,
    weights: InRooms,
    /// Whole units' gradients.
    whole: Room,
    /// Units whose gradients are on their way, oldest first.
    reduced: VecDeque<(usize, Posted)>,
    micro: Micro,
    /// Of the losses whose gradients these are.
    loss_scale: f64,
}

/// Whole units' weights.
struct InRooms {
    master: Room,
    /// In the type of products, where that is another.
    copy: Option<Tensor>,
    units: Vec<Standing>,
    turn: Turn,
}

#[derive(Clone, Copy, Debug, Default)]
struct Standing {
    gathered: Gathered,
    /// Between `need` and `release`.
    in_use: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq)]
enum Gathered {
    #[default]
    No,
    Coming(Posted),
    Yes,
}

impl Sharded {
    /// Weights are zero until they are filled. A collective call.
    pub fn new(
        layout: Layout,
        keeping: Keeping,
        mut transport: Box<dyn Transport>,
    ) -> fleet_learn::Result<Sharded> {
        transport.gang().note(Activity::Starting);
        let (rank, world) = (transport.gang().rank(), transport.gang().world_size());
        let parts = |rooms| Parts::new(&layout, rooms, rank, world);
        let parts = [parts(keeping.held.weights), parts(keeping.held.gradients)];
        let mut room = |of: &Parts| transport.room(of.rooms, keeping.numbers.kept);
        let whole = [room(&parts[0])?, room(&parts[1])?];
        let made = Sharded::made(layout, keeping, parts, transport, whole);
        Ok(made.map_err(|error| match memory_is_short(&error.0) {
            true => Error(format!(
                "{} has not enough memory for this rank's part of weights, gradients and optimizer state: train with more ranks, a smaller model, or strategy = \"fsdp\"",
                device::name(keeping.device)
            )),
            false => error,
        })?)
    }

    fn made(
        layout: Layout,
        keeping: Keeping,
        [parts, gradients]: [Parts; 2],
        mut transport: Box<dyn Transport>,
        [weights, whole]: [Room; 2],
    ) -> Result<Sharded> {
        let numbers = keeping.numbers;
        let copy = numbers.copied().map(|kind| Tensor::f_zeros([parts.rooms as i64], (kind, keeping.device)));
        let options = (numbers.kept, keeping.home());
        let shard = || Tensor::f_zeros([parts.shard as i64], options);
        let units = vec![Standing::default(); parts.units().len()];
        Ok(Sharded {
            rank: transport.gang().rank(),
            transport,
            keeping,
            master: shard()?,
            optimizer: Optimizer::new(parts.shard, parts.kept(&layout), options)?,
            grads: shard()?,
            weights: InRooms { master: weights, copy: copy.transpose()?, units, turn: Turn::FORWARD },
            whole,
            reduced: VecDeque::new(),
            micro: Micro { first: true, last: true },
            loss_scale: 1.0,
            parts,
            gradients,
            layout,
        })
    }

    /// Starts to gather a unit's weights. What else was in its room is not in any more.
    fn gather(&mut self, unit: usize) -> fleet_learn::Result<Posted> {
        for other in self.parts.neighbours(unit).collect::<Vec<_>>() {
            let standing = &mut self.weights.units[other];
            assert!(!standing.in_use, "unit {other} is in use and has its room with unit {unit}");
            if let Gathered::Coming(posted) = std::mem::take(&mut standing.gathered) {
                self.transport.wait(posted)?;
            }
        }
        let of = &self.parts.units()[unit];
        hidden_copy(&self.weights.master.tensor, &of.own_room(self.rank), &narrow(&self.master, &of.shard)?)?;
        let posted = self.transport.post(&self.weights.master, of.room.clone(), Exchanged::Gathered)?;
        self.weights.units[unit].gathered = Gathered::Coming(posted);
        Ok(posted)
    }

    /// Has a unit's weights in its room.
    fn bring(&mut self, unit: usize) -> fleet_learn::Result<()> {
        let posted = match self.weights.units[unit].gathered {
            Gathered::Yes => return Ok(()),
            Gathered::Coming(posted) => posted,
            Gathered::No => self.gather(unit)?,
        };
        self.transport.wait(posted)?;
        if let Some(copy) = &self.weights.copy {
            let room = &self.parts.units()[unit].room;
            hidden_copy(copy, room, &narrow(&self.weights.master.tensor, room)?)?;
        }
        self.weights.units[unit].gathered = Gathered::Yes;
        Ok(())
    }

    /// Starts to gather a unit whose room is free.
    fn prepare(&mut self, unit: usize) -> fleet_learn::Result<()> {
        let taken = self.parts.neighbours(unit).any(|other| self.weights.units[other].in_use);
        if self.weights.units[unit].gathered == Gathered::No && !taken {
            self.gather(unit)?;
        }
        Ok(())
    }

    /// What was gathered is not what ranks keep any more.
    fn outdate(&mut self) -> fleet_learn::Result<()> {
        for standing in &mut self.weights.units {
            if let Gathered::Coming(posted) = std::mem::take(&mut standing.gathered) {
                self.transport.wait(posted)?;
            }
        }
        Ok(())
    }

    /// Adds up the oldest unit whose gradients are on their way, and gives its room back.
    fn take_in(&mut self) -> fleet_learn::Result<()> {
        let Some((unit, posted)) = self.reduced.pop_front() else { return Ok(()) };
        self.transport.wait(posted)?;
        let of = &self.gradients.units()[unit];
        let own_room = of.own_room(self.rank);
        let mut add = |used: &Range<usize>| -> Result<()> {
            let within = |start: usize| start + used.start..start + used.end;
            let new = narrow(&self.whole.tensor, &within(own_room.start))?;
            let mut sum = narrow(&self.grads, &within(of.shard.start))?;
            // Ranks that keep every unit's gradients have summed over micro-batches before.
            let set = self.micro.first || self.keeping.held.gradients == Rooms::Everything;
            match set {
                true => sum.f_copy_(&new)?,
                false => sum.f_add_(&new.f_to_device(self.keeping.home())?).map(|_| ())?,
            }
            Ok(())
        };
        let _guard = tch::no_grad_guard();
        Ok(of.used.iter().try_for_each(&mut add)?)
    }

    fn take_all_in(&mut self) -> fleet_learn::Result<()> {
        while !self.reduced.is_empty() {
            self.take_in()?;
        }
        Ok(())
    }

    fn of(&self, slot: Slot) -> &Tensor {
        match slot {
            Slot::Weights => &self.master,
            Slot::Moment1 => &self.optimizer.moment1,
            Slot::Moment2 => &self.optimizer.moment2,
        }
    }

    fn in_rooms(&self) -> Weights<'_> {
        Weights {
            master: &self.weights.master.tensor,
            copy: self.weights.copy.as_ref(),
            parts: Some(&self.parts),
        }
    }
}

impl UnitWeights<Tensors> for Sharded {
    fn need(&mut self, unit: usize) -> fleet_learn::Result<()> {
        self.bring(unit)?;
        self.weights.units[unit].in_use = true;
        match self.weights.turn.after(unit, self.parts.last()) {
            Some(next) => self.prepare(next),
            None => Ok(()),
        }
    }
    fn release(&mut self, unit: usize) {
        self.weights.units[unit].in_use = false;
    }
    fn weights(&self) -> Weights<'_> {
        self.in_rooms()
    }
}

impl Units<Tensors> for Sharded {
    fn numbers(&mut self) -> (Weights<'_>, Gradients<'_>) {
        // What was in a room of two blocks was another's, or has been added up.
        let fresh = self.micro.first || self.keeping.held.gradients == Rooms::TwoBlocks;
        let grads = Gradients { flat: &self.whole.tensor, parts: Some(&self.gradients), fresh };
        (self.in_rooms(), grads)
    }

    fn ready(&mut self, unit: usize) -> fleet_learn::Result<()> {
        let last = self.parts.last();
        if unit == last {
            self.transport.gang().note(Activity::Backward);
            self.weights.turn = Turn::back(last);
        }
        if self.micro.last || self.keeping.held.gradients == Rooms::TwoBlocks {
            let room = self.gradients.units()[unit].room.clone();
            let posted = self.transport.post(&self.whole, room, Exchanged::Reduced)?;
            self.reduced.push_back((unit, posted));
        }
        // The next one's room has to be free; before another micro-batch all of them.
        let Some(next) = unit.checked_sub(1) else { return self.take_all_in() };
        let neighbours: Vec<usize> = self.gradients.neighbours(next).collect();
        let is_taken =
            |reduced: &VecDeque<(usize, Posted)>| reduced.iter().any(|(unit, _)| neighbours.contains(unit));
        // What goes to the host does so while earlier units are computed.
        while is_taken(&self.reduced) || (self.keeping.offload && self.reduced.len() > 1) {
            self.take_in()?;
        }
        Ok(())
    }
}

impl Strategy<Tensors> for Sharded {
    fn gang(&mut self) -> &mut dyn Gang {
        self.transport.gang()
    }

    fn units(&mut self, micro: Micro) -> &mut dyn Units<Tensors> {
        self.micro = micro;
        self.weights.turn = Turn::FORWARD;
        self
    }

    fn weights(&mut self) -> &mut dyn UnitWeights<Tensors> {
        self.weights.turn = Turn::FORWARD;
        self
    }

    fn update(&mut self, update: &Update, loss: Tensor, votes: Votes) -> fleet_learn::Result<Report> {
        self.transport.gang().note(Activity::Optimizer);
        let number = |tensor: &Tensor| f64::try_from(tensor).map_err(Error::from);
        let scale = self.loss_scale;
        let shards = self.parts.units().iter().map(|unit| unit.shard.clone());
        let norm = number(&norm(&self.grads, shards)?)? / scale;
        let [stop, time] = votes.numbers();
        let mut sums = [norm * norm, number(&loss)?, stop, time];
        self.transport.gang().all_reduce_f64(&mut sums, Op::Sum)?;
        let report = Report::of_sums(sums, update.step)?;
        let mut step = || -> Result<()> {
            let norm =
                Tensor::f_full([1], report.grad_norm, (Kind::Float, self.grads.device()))?.f_squeeze()?;
            let grads = Scaled { numbers: &self.grads, norm: &norm, scale };
            self.optimizer.step(&self.master, &grads, update)
        };
        step().map_err(|error| Error(format!("the optimizer's step: {error}")))?;
        self.outdate()?;
        Ok(report)
    }

    fn passes_together(&self) -> bool {
        true
    }

    fn scale_losses(&mut self, scale: f64) {
        self.loss_scale = scale;
    }

    fn dtype(&self) -> Dtype {
        dtype(self.keeping.numbers.kept)
    }

    fn fill(&mut self, slot: Slot, read: &mut Read) -> fleet_learn::Result<()> {
        for unit in self.parts.units() {
            let mut numbers = vec![0.0; unit.own.len()];
            read(unit.own.clone(), &mut numbers)?;
            set(self.of(slot), unit.shard.start, &numbers)?;
        }
        self.outdate()?;
        Ok(self.transport.gang().barrier()?)
    }

    /// This rank's part, and zeros.
    fn flat(&self, slot: Slot) -> fleet_learn::Result<Cow<'_, [f32]>> {
        let mut flat = vec![0.0; self.layout.len];
        for unit in self.parts.units() {
            copy_out(self.of(slot), unit.shard.start, &mut flat[unit.own.clone()])?;
        }
        Ok(Cow::Owned(flat))
    }

    fn name(&self) -> &'static str {
        match self.keeping.held.gradients {
            Rooms::Everything => "ddp",
            Rooms::TwoBlocks => "fsdp",
        }
    }

    fn kept(&self, _disks: &Disks) -> Vec<Range<usize>> {
        let parts = self.parts.units().iter().map(|unit| unit.own.clone());
        parts.filter(|part| !part.is_empty()).collect()
    }

    /// Weights unit by unit, as for a pass; moments from where they are.
    fn copy_out(&mut self, slot: Slot, ranges: &[Range<usize>], out: &mut [f32]) -> fleet_learn::Result<()> {
        for number in 0..self.parts.units().len() {
            if slot == Slot::Weights {
                self.bring(number)?;
            }
            let unit = &self.parts.units()[number];
            let mut at = 0;
            for range in ranges {
                let numbers = &mut out[at..at + range.len()];
                at += range.len();
                if !unit.flat.contains(&range.start) {
                    continue;
                }
                match slot {
                    Slot::Weights => {
                        copy_out(&self.weights.master.tensor, self.parts.place(range).start, numbers)?
                    }
                    _ => {
                        let start = range.start - unit.own.start + unit.shard.start;
                        copy_out(self.of(slot), start, numbers)?
                    }
                }
            }
        }
        Ok(())
    }
}
