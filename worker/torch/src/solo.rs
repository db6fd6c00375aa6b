//! One rank that has everything on one device.

use crate::device::{self, memory_is_short};
use crate::memory::{FlatWeights, Gradients, Stored, Tensors, Weights, copy_out, dtype, set};
use crate::network::Numbers;
use crate::optimizer::{Optimizer, Scaled, norm};
use crate::{Error, Result};
use fleet_checkpoint::Dtype;
use fleet_collectives::Gang;
use fleet_common::model::Layout;
use fleet_learn::strategy::{Disks, Micro, Read, Report, Slot, Strategy, Votes};
use fleet_learn::{UnitWeights, Units, Update};
use std::borrow::Cow;
use std::ops::Range;
use tch::{Device, Kind, Tensor};

/// Numbers for each parameter: weight, gradient, two moments.
const NUMBERS: usize = 4;

pub struct Solo {
    gang: fleet_collectives::Solo,
    layout: Layout,
    weights: FlatWeights,
    grads: Tensor,
    fresh: bool,
    optimizer: Optimizer,
    /// Of the losses whose gradients these are.
    loss_scale: f64,
}

impl Solo {
    /// Weights are zero until they are filled.
    pub fn new(layout: Layout, device: Device, numbers: Numbers, generation: u64) -> Result<Solo> {
        let (kept, copied) = numbers.bytes();
        let bytes = (kept * NUMBERS + copied) * layout.len;
        Solo::made(layout, device, numbers, generation).map_err(|error| match memory_is_short(&error.0) {
            true => Error(format!(
                "{} has not enough memory for weights, gradients and optimizer state ({} MiB): train a smaller model, or on a device with more",
                device::name(device),
                bytes >> 20
            )),
            false => error,
        })
    }

    fn made(layout: Layout, device: Device, numbers: Numbers, generation: u64) -> Result<Solo> {
        Ok(Solo {
            gang: fleet_collectives::Solo::new(generation),
            weights: FlatWeights::new(layout.len, device, numbers)?,
            grads: Tensor::f_zeros([layout.len as i64], (numbers.kept, device))?,
            fresh: true,
            optimizer: Optimizer::new(
                layout.len,
                layout.parameters.iter().map(|p| (p, p.range.clone())),
                (numbers.kept, device),
            )?,
            loss_scale: 1.0,
            layout,
        })
    }

    fn of(&self, slot: Slot) -> &Tensor {
        match slot {
            Slot::Weights => self.weights.master(),
            Slot::Moment1 => &self.optimizer.moment1,
            Slot::Moment2 => &self.optimizer.moment2,
        }
    }
}

impl UnitWeights<Tensors> for Solo {
    fn need(&mut self, _unit: usize) -> fleet_learn::Result<()> {
        Ok(())
    }
    fn release(&mut self, _unit: usize) {}
    fn weights(&self) -> Weights<'_> {
        self.weights.view()
    }
}

impl Units<Tensors> for Solo {
    fn numbers(&mut self) -> (Weights<'_>, Gradients<'_>) {
        let numbers = Stored { flat: &self.grads, places: None };
        (self.weights.view(), Gradients { numbers, fresh: self.fresh })
    }
    fn ready(&mut self, _unit: usize) -> fleet_learn::Result<()> {
        Ok(())
    }
}

impl Strategy<Tensors> for Solo {
    fn gang(&mut self) -> &mut dyn Gang {
        &mut self.gang
    }

    fn units(&mut self, micro: Micro) -> &mut dyn Units<Tensors> {
        self.fresh = micro.first;
        self
    }

    fn weights(&mut self) -> &mut dyn UnitWeights<Tensors> {
        self
    }

    /// The device has all that it shall do before its numbers are waited for.
    fn update(&mut self, update: &Update, loss: Tensor, votes: Votes) -> fleet_learn::Result<Report> {
        let mut done = || -> Result<Vec<f64>> {
            let scale = self.loss_scale;
            let norm = norm(&self.grads, self.layout.units.iter().cloned())?.f_div_scalar(scale)?;
            let grads = Scaled { numbers: &self.grads, norm: &norm, scale };
            self.optimizer.step(self.weights.master(), &grads, update)?;
            self.weights.refresh()?;
            // Read at once.
            let both = Tensor::f_cat(&[loss.f_view([1])?, norm.f_to_kind(loss.kind())?.f_view([1])?], 0)?;
            Ok(Vec::<f64>::try_from(&both.f_to_device(Device::Cpu)?.f_to_kind(Kind::Double)?)?)
        };
        match done().map_err(|error| Error(format!("the optimizer's step: {error}")))?[..] {
            [loss, grad_norm] => Report::new(loss, grad_norm, votes).checked(update.step),
            _ => unreachable!("two numbers were put together"),
        }
    }

    fn fill(&mut self, slot: Slot, read: &mut Read) -> fleet_learn::Result<()> {
        for unit in &self.layout.units {
            let mut numbers = vec![0.0; unit.len()];
            read(unit.clone(), &mut numbers)?;
            set(self.of(slot), unit.start, &numbers)?;
        }
        Ok(self.weights.refresh()?)
    }

    fn flat(&self, slot: Slot) -> fleet_learn::Result<Cow<'_, [f32]>> {
        let mut numbers = vec![0.0; self.layout.len];
        copy_out(self.of(slot), 0, &mut numbers)?;
        Ok(Cow::Owned(numbers))
    }

    fn scale_losses(&mut self, scale: f64) {
        self.loss_scale = scale;
    }

    fn dtype(&self) -> Dtype {
        dtype(self.grads.kind())
    }

    fn copy_out(&mut self, slot: Slot, ranges: &[Range<usize>], out: &mut [f32]) -> fleet_learn::Result<()> {
        let mut rest = out;
        for range in ranges {
            let (now, later) = rest.split_at_mut(range.len());
            copy_out(self.of(slot), range.start, now)?;
            rest = later;
        }
        Ok(())
    }

    fn name(&self) -> &'static str {
        "solo"
    }

    fn kept(&self, _disks: &Disks) -> Vec<Range<usize>> {
        self.layout.units.clone()
    }
}
