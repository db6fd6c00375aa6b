//! Numbers of a model as tensors of one device: what the executor reads and where its gradients go.

use crate::network::Numbers;
use crate::{Error, Result};
use fleet_checkpoint::Dtype;
use fleet_learn::{Memory, Places, UnitWeights};
use std::ops::Range;
use tch::{Device, Kind, Tensor};

/// The memory of a device of libtorch.
pub struct Tensors;

impl Memory for Tensors {
    type Weights<'a> = Weights<'a>;
    type Gradients<'a> = Gradients<'a>;
    /// Of one number, in fp64 where the device has that.
    type Number = Tensor;

    fn value(number: Tensor) -> fleet_learn::Result<f64> {
        let value = number.f_to_device(Device::Cpu).and_then(|number| number.f_double_value(&[0]));
        Ok(value.map_err(Error::from)?)
    }

    fn all_finite(gradients: Gradients<'_>, range: &Range<usize>) -> fleet_learn::Result<bool> {
        Ok(gradients.hold(range, |numbers| numbers.f_isfinite()?.f_all())?)
    }

    fn any(gradients: Gradients<'_>, range: &Range<usize>) -> fleet_learn::Result<bool> {
        Ok(gradients.hold(range, |numbers| numbers.f_ne(0)?.f_any())?)
    }
}

/// Numbers of a model in a flat tensor.
#[derive(Clone, Copy)]
pub struct Stored<'a> {
    pub flat: &'a Tensor,
    /// Where ranges of a model are in it; `None` where all lie as in the flat buffer.
    pub places: Option<&'a Places>,
}

impl Stored<'_> {
    /// A range within one unit, which is in.
    pub fn of(&self, range: &Range<usize>) -> Result<Tensor> {
        match self.places {
            Some(places) => narrow(self.flat, &places.of(range)),
            None => narrow(self.flat, range),
        }
    }
}

/// Weights of the units that are in.
#[derive(Clone, Copy)]
pub struct Weights<'a> {
    /// In the type of products.
    pub products: Stored<'a>,
    /// As they are kept, fp32 or bf16: of all that is not read by products at least.
    pub exact: Stored<'a>,
}

/// All parameters of a model, flat, on one device.
pub struct FlatWeights {
    master: Tensor,
    copy: Option<Tensor>,
}

impl FlatWeights {
    /// `len` zeros.
    pub fn new(len: usize, device: Device, numbers: Numbers) -> Result<FlatWeights> {
        let zeros = |kind| Tensor::f_zeros([len as i64], (kind, device));
        let copy = numbers.copied().map(zeros).transpose()?;
        Ok(FlatWeights { master: zeros(numbers.kept)?, copy })
    }

    pub fn view(&self) -> Weights<'_> {
        let flat = |flat| Stored { flat, places: None };
        Weights { products: flat(self.copy.as_ref().unwrap_or(&self.master)), exact: flat(&self.master) }
    }

    /// As they are kept.
    pub fn master(&self) -> &Tensor {
        &self.master
    }

    /// Sets the numbers from `start` on; `refresh` has to follow.
    pub fn set(&mut self, start: usize, numbers: &[f32]) -> Result<()> {
        set(&self.master, start, numbers)
    }

    /// Makes the copy for products anew.
    pub fn refresh(&mut self) -> Result<()> {
        if let Some(copy) = &mut self.copy {
            let _guard = tch::no_grad_guard();
            copy.f_copy_(&self.master)?;
        }
        Ok(())
    }
}

/// A model that is only read.
impl UnitWeights<Tensors> for FlatWeights {
    fn need(&mut self, _unit: usize) -> fleet_learn::Result<()> {
        Ok(())
    }
    fn release(&mut self, _unit: usize) {}
    fn weights(&self) -> Weights<'_> {
        self.view()
    }
}

/// Sets the numbers of a flat tensor from `start` on.
pub(crate) fn set(flat: &Tensor, start: usize, numbers: &[f32]) -> Result<()> {
    let _guard = tch::no_grad_guard();
    let mut target = flat.f_narrow(0, start as i64, numbers.len() as i64)?;
    target.f_copy_(&Tensor::f_from_slice(numbers)?)?;
    Ok(())
}

/// Numbers of a flat tensor from `start` on, in fp32.
pub(crate) fn copy_out(flat: &Tensor, start: usize, numbers: &mut [f32]) -> Result<()> {
    let some = narrow(flat, &(start..start + numbers.len()))?.f_to_device(Device::Cpu)?;
    Ok(some.f_to_kind(Kind::Float)?.f_copy_data(numbers, numbers.len())?)
}

/// As the files of checkpoints have numbers of this type.
pub(crate) fn dtype(kept: Kind) -> Dtype {
    if kept == Kind::BFloat16 { Dtype::BF16 } else { Dtype::F32 }
}

/// Where gradients go, as they are kept: at the ranges of the flat buffer, or in rooms.
pub struct Gradients<'a> {
    pub numbers: Stored<'a>,
    /// The first micro-batch of a step overwrites what is there.
    pub fresh: bool,
}

impl Gradients<'_> {
    /// What `question` finds of the numbers of a range, as one number.
    fn hold(
        &self,
        range: &Range<usize>,
        question: impl FnOnce(&Tensor) -> std::result::Result<Tensor, tch::TchError>,
    ) -> Result<bool> {
        let _guard = tch::no_grad_guard();
        let numbers = self.numbers.of(range)?;
        Ok(question(&numbers)?.f_int64_value(&[])? != 0)
    }

    /// Sets or adds the gradient of a range; nothing is a gradient of zeros.
    pub fn store(&self, range: &Range<usize>, grad: Option<&Tensor>, set: bool) -> Result<()> {
        let _guard = tch::no_grad_guard();
        let mut slot = self.numbers.of(range)?;
        match (grad, set) {
            (Some(grad), true) => slot.f_copy_(&grad.f_reshape([-1])?).map(|_| ())?,
            (Some(grad), false) => slot.f_add_(&grad.f_reshape([-1])?).map(|_| ())?,
            (None, true) => slot.f_zero_().map(|_| ())?,
            (None, false) => {}
        }
        Ok(())
    }
}

pub(crate) fn narrow(flat: &Tensor, range: &Range<usize>) -> Result<Tensor> {
    flat.f_narrow(0, range.start as i64, range.len() as i64).map_err(Error::from)
}

/// Copies into a range of a room without autograd's knowledge: a graph has a unit's weights where they were at its forward, and the same
/// numbers are there again at its backward.
pub(crate) fn hidden_copy(room: &Tensor, range: &Range<usize>, numbers: &Tensor) -> Result<()> {
    let _guard = tch::no_grad_guard();
    narrow(&room.f_data()?, range)?.f_copy_(numbers)?;
    Ok(())
}
