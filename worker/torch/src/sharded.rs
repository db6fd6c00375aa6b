//! Several ranks, each of which keeps its part of the weights, of the gradients and of the optimizer's state. Whole units are in rooms: a
//! unit's weights are gathered before it is computed, while the one before it still is; its gradients are reduced to parts while earlier
//! units are computed. With a room for every unit that is data-parallel training (DDP), with rooms for two blocks fully sharded (FSDP); with rooms
//! for all weights and two blocks' gradients FSDP that gathers once for each step.

use crate::device::memory_is_short;
use crate::gathered::Gathered;
use crate::memory::{Gradients, Stored, Tensors, Weights, copy_out, dtype, narrow, set};
use crate::network::Numbers;
use crate::optimizer::{Optimizer, Scaled, norm};
use crate::parts::{Held, Parts, Rooms, Seat, Turn};
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
    pub(crate) fn home(&self) -> Device {
        if self.offload { Device::Cpu } else { self.device }
    }
}

pub struct Sharded {
    transport: Box<dyn Transport>,
    layout: Layout,
    keeping: Keeping,
    seat: Seat,
    /// With the rooms of whole units' gradients.
    parts: Parts,
    /// This rank's part of each unit's weights.
    master: Tensor,
    optimizer: Optimizer,
    /// Of its gradients.
    grads: Tensor,
    weights: Gathered,
    /// Whole units' gradients.
    whole: Room,
    /// Units whose gradients are on their way, oldest first.
    reduced: VecDeque<(usize, Posted)>,
    micro: Micro,
    /// Of the losses whose gradients these are.
    loss_scale: f64,
}

impl Sharded {
    /// Weights are zero until they are filled. A collective call.
    pub fn new(
        layout: Layout,
        keeping: Keeping,
        mut transport: Box<dyn Transport>,
    ) -> fleet_learn::Result<Sharded> {
        transport.gang().note(Activity::Starting);
        let weights = Gathered::new(&layout, &keeping, &mut *transport)?;
        let parts = Parts::new(&layout, keeping.held.gradients, &transport.seat());
        let whole = transport.room(parts.rooms, keeping.numbers.kept)?;
        let made = Sharded::made(layout, keeping, (weights, parts, whole), transport);
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
        (weights, parts, whole): (Gathered, Parts, Room),
        transport: Box<dyn Transport>,
    ) -> Result<Sharded> {
        let options = (keeping.numbers.kept, keeping.home());
        let shard = || Tensor::f_zeros([parts.shard as i64], options);
        Ok(Sharded {
            seat: transport.seat(),
            transport,
            keeping,
            master: shard()?,
            optimizer: Optimizer::new(parts.shard, parts.kept(&layout), options)?,
            grads: shard()?,
            weights,
            whole,
            reduced: VecDeque::new(),
            micro: Micro { first: true, last: true },
            loss_scale: 1.0,
            parts,
            layout,
        })
    }

    /// Starts to reduce a unit's gradients to parts. Between replicas go those of a step's last micro-batch alone, to which this one adds what it has
    /// summed before.
    fn reduce(&mut self, unit: usize) -> fleet_learn::Result<()> {
        let of = &self.parts.units()[unit];
        let is_whole = self.seat.replicas == 1 || self.micro.last;
        let exchange = if is_whole { Exchanged::Reduced } else { Exchanged::ReducedWithin };
        if self.seat.replicas > 1 && self.micro.last && !self.micro.first {
            let _guard = tch::no_grad_guard();
            let sums =
                narrow(&self.grads, &of.shard)?.f_to_device(self.keeping.device).map_err(Error::from)?;
            let mut own = narrow(&self.whole.tensor, &of.own_room(self.seat.rank))?;
            let _ = own.f_add_(&sums).map_err(Error::from)?;
        }
        let posted = self.transport.post(&self.whole, of.room.clone(), exchange)?;
        self.reduced.push_back((unit, posted));
        Ok(())
    }

    /// Sums of this step are what comes, and are not added to what was there: that is in it, or of another step.
    fn sets_sums(&self) -> bool {
        // Ranks that keep every unit's gradients have summed over micro-batches before.
        let is_in = self.seat.replicas > 1 && self.micro.last;
        self.micro.first || is_in || self.keeping.held.gradients == Rooms::Everything
    }

    /// Adds up the oldest unit whose gradients are on their way, and gives its room back.
    fn take_in(&mut self) -> fleet_learn::Result<()> {
        let Some((unit, posted)) = self.reduced.pop_front() else { return Ok(()) };
        self.transport.wait(posted)?;
        let of = &self.parts.units()[unit];
        let own_room = of.own_room(self.seat.rank);
        let mut add = |used: &Range<usize>| -> Result<()> {
            let within = |start: usize| start + used.start..start + used.end;
            let new = narrow(&self.whole.tensor, &within(own_room.start))?;
            let mut sum = narrow(&self.grads, &within(of.shard.start))?;
            match self.sets_sums() {
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
}

impl UnitWeights<Tensors> for Sharded {
    fn need(&mut self, unit: usize) -> fleet_learn::Result<()> {
        self.weights.need(unit, &self.master, &mut *self.transport)
    }
    fn release(&mut self, unit: usize) {
        self.weights.release(unit);
    }
    fn weights(&self) -> Weights<'_> {
        self.weights.view()
    }
}

impl Units<Tensors> for Sharded {
    fn numbers(&mut self) -> (Weights<'_>, Gradients<'_>) {
        // What was in a room of two blocks was another's, or has been added up.
        let fresh = self.micro.first || self.keeping.held.gradients == Rooms::TwoBlocks;
        let numbers = Stored { flat: &self.whole.tensor, places: Some(&self.parts.places) };
        (self.weights.view(), Gradients { numbers, fresh })
    }

    fn ready(&mut self, unit: usize) -> fleet_learn::Result<()> {
        let last = self.parts.last();
        if unit == last {
            self.transport.gang().note(Activity::Backward);
            self.weights.begin(Turn::back(last));
        }
        if self.micro.last || self.keeping.held.gradients == Rooms::TwoBlocks {
            self.reduce(unit)?;
        }
        // The next one's room has to be free; before another micro-batch all of them.
        let Some(next) = unit.checked_sub(1) else { return self.take_all_in() };
        let neighbours: Vec<usize> = self.parts.neighbours(next).collect();
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
        self.transport.gang() as &mut dyn Gang
    }

    fn units(&mut self, micro: Micro) -> &mut dyn Units<Tensors> {
        self.micro = micro;
        self.weights.begin(Turn::FORWARD);
        self
    }

    fn weights(&mut self) -> &mut dyn UnitWeights<Tensors> {
        self.weights.begin(Turn::FORWARD);
        self
    }

    fn update(&mut self, update: &Update, loss: Tensor, votes: Votes) -> fleet_learn::Result<Report> {
        self.transport.gang().note(Activity::Optimizer);
        let number = |tensor: &Tensor| f64::try_from(tensor).map_err(Error::from);
        let scale = self.loss_scale;
        let shards = self.parts.units().iter().map(|unit| unit.shard.clone());
        let norm = number(&norm(&self.grads, shards)?)? / scale;
        // Every replica has the same sums.
        let squares = if self.seat.replica == 0 { norm * norm } else { 0.0 };
        let report = Report::summed(self.transport.gang(), squares, number(&loss)?, votes, update.step)?;
        let mut step = || -> Result<()> {
            let norm =
                Tensor::f_full([1], report.grad_norm, (Kind::Float, self.grads.device()))?.f_squeeze()?;
            let grads = Scaled { numbers: &self.grads, norm: &norm, scale };
            self.optimizer.step(&self.master, &grads, update)
        };
        step().map_err(|error| Error(format!("the optimizer's step: {error}")))?;
        self.weights.outdate(&mut *self.transport)?;
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
        self.weights.outdate(&mut *self.transport)?;
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
            Rooms::TwoBlocks if self.seat.replicas > 1 => "hsdp",
            Rooms::TwoBlocks => "fsdp",
        }
    }

    /// Where every host has everything, nothing need lie on another disk than rank 0's.
    fn writers(&mut self, disks: &Disks) -> usize {
        if self.seat.replicas > 1 { disks.together() } else { self.seat.world }
    }

    /// Those of a host, where each has everything.
    fn all_can_copy(&mut self, this_can: bool) -> fleet_learn::Result<bool> {
        let mut cannot = [f64::from(u8::from(!this_can))];
        match self.seat.replicas {
            1 => self.transport.gang().all_reduce_f64(&mut cannot, Op::Max)?,
            _ => self.transport.gang().all_reduce_f64_of_host(&mut cannot, Op::Max)?,
        }
        Ok(cannot[0] == 0.0)
    }

    fn kept(&self, _disks: &Disks) -> Vec<Range<usize>> {
        let parts = self.parts.units().iter().map(|unit| unit.own.clone());
        parts.filter(|part| self.seat.replica == 0 && !part.is_empty()).collect()
    }

    /// Weights unit by unit, as for a pass; moments from where they are.
    fn copy_out(&mut self, slot: Slot, ranges: &[Range<usize>], out: &mut [f32]) -> fleet_learn::Result<()> {
        for (number, unit) in self.parts.units().iter().enumerate() {
            let (numbers, begin) = match slot {
                Slot::Weights => {
                    (self.weights.whole(number, &self.master, &mut *self.transport)?, unit.flat.start)
                }
                _ => (narrow(self.of(slot), &unit.shard)?, unit.own.start),
            };
            let mut at = 0;
            for range in ranges {
                let out = &mut out[at..at + range.len()];
                at += range.len();
                if unit.flat.contains(&range.start) {
                    copy_out(&numbers, range.start - begin, out)?;
                }
            }
        }
        Ok(())
    }
}
