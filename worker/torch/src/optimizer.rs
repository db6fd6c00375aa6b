//! AdamW over flat buffers, with clipping, without waiting for the device: how far gradients are scaled down stays there as a number.

use crate::Result;
use crate::memory::narrow;
use crate::parts::merged;
use crate::shim::{self, AdamWNumbers, AdamWTensors};
use fleet_common::model::Parameter;
use fleet_learn::optimizer::CLIP_EPS;
use fleet_learn::{AdamW, Update};
use std::ops::Range;
use tch::{Device, Kind, Tensor};

/// Gradients of `scale` times the loss.
pub struct Scaled<'a> {
    pub numbers: &'a Tensor,
    /// Of the whole model, without the scale: a tensor of one number on their device.
    pub norm: &'a Tensor,
    pub scale: f64,
}

/// The norm of flat numbers, summed in fp32. Those in 16 bits are widened one of the ranges, which are all of them, after the other.
pub fn norm(numbers: &Tensor, ranges: impl Iterator<Item = Range<usize>>) -> Result<Tensor> {
    let _guard = tch::no_grad_guard();
    if numbers.kind() == Kind::Float {
        return Ok(numbers.f_norm()?);
    }
    let norms = ranges.map(|range| Ok(narrow(numbers, &range)?.f_norm_scalaropt_dtype(2.0, Kind::Float)?));
    Ok(Tensor::f_stack(&norms.collect::<Result<Vec<Tensor>>>()?, 0)?.f_norm()?)
}

/// Moments of what a rank keeps of the parameters.
pub struct Optimizer {
    pub moment1: Tensor,
    pub moment2: Tensor,
    groups: Vec<Group>,
}

/// Parameters with the same constants.
struct Group {
    decays: bool,
    /// What the learning rate is multiplied with.
    rate: f64,
    /// Of the flat buffer: start and length.
    runs: Vec<(i64, i64)>,
}

impl Optimizer {
    /// For a buffer of `len` numbers, in which each of the parameters has a range.
    pub fn new<'a>(
        len: usize,
        parameters: impl Iterator<Item = (&'a Parameter, Range<usize>)>,
        options: (Kind, Device),
    ) -> Result<Optimizer> {
        let zeros = || Tensor::f_zeros([len as i64], options);
        let mut of_group: Vec<(bool, f64, Vec<Range<usize>>)> = Vec::new();
        for (p, range) in parameters {
            let (decays, rate) = (p.role.decays(), p.rate);
            match of_group.iter_mut().find(|group| (group.0, group.1) == (decays, rate)) {
                Some((_, _, ranges)) => ranges.push(range),
                None => of_group.push((decays, rate, vec![range])),
            }
        }
        let group = |(decays, rate, ranges): (bool, f64, Vec<Range<usize>>)| {
            let runs = merged(ranges.into_iter());
            Group { decays, rate, runs: runs.into_iter().map(|r| (r.start as i64, r.len() as i64)).collect() }
        };
        let groups = of_group.into_iter().map(group).collect();
        Ok(Optimizer { moment1: zeros()?, moment2: zeros()?, groups })
    }

    /// One step over `master`, each number computed in fp32 and rounded once to the type in which it is kept. Where the norm of the gradients is
    /// no number, nothing is changed.
    pub fn step(&mut self, master: &Tensor, grads: &Scaled, update: &Update) -> Result<()> {
        let _guard = tch::no_grad_guard();
        let Scaled { numbers: grads, norm, scale } = grads;
        let AdamW { beta1, beta2, eps, weight_decay, max_grad_norm } = update.adamw;
        let divisor = match max_grad_norm > 0.0 {
            true => norm.f_add_scalar(CLIP_EPS)?.f_div_scalar(max_grad_norm)?.f_clamp_min(1.0)?,
            false => norm.f_ones_like()?,
        };
        let divisor = divisor.f_mul_scalar(*scale)?;
        let skip = norm.f_isfinite()?.f_logical_not()?.f_to_kind(Kind::Float)?;
        for Group { decays, rate, runs } in &self.groups {
            let views = |flat: &Tensor| -> Result<Vec<Tensor>> {
                runs.iter().map(|(start, len)| Ok(flat.f_narrow(0, *start, *len)?)).collect()
            };
            // The kernel takes the step from a tensor each; one serves all.
            let count = Tensor::f_full([1], update.step as f64, (Kind::Float, norm.device()))?;
            let steps: Vec<Tensor> = runs.iter().map(|_| count.shallow_clone()).collect();
            let tensors = AdamWTensors {
                params: &views(master)?,
                grads: &views(grads)?,
                moments1: &views(&self.moment1)?,
                moments2: &views(&self.moment2)?,
                steps: &steps,
                divisor: &divisor,
                skip: &skip,
            };
            let decay = if *decays { weight_decay } else { 0.0 };
            shim::adamw(&tensors, AdamWNumbers { lr: update.lr * rate, beta1, beta2, decay, eps })?;
        }
        Ok(())
    }
}
