//! AdamW over flat buffers, with clipping, without waiting for the device: how far gradients are scaled down stays there as a number.

use crate::executor::Memory;
use crate::shim::{self, AdamWNumbers, AdamWTensors};
use crate::{Network, Result};
use tch::{Kind, Tensor};

/// PyTorch's `clip_grad_norm_` adds this to the norm.
const CLIP_EPS: f64 = 1e-6;

/// Constants of the optimizer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    /// Of matrices; norms and biases do not decay.
    pub weight_decay: f64,
    /// Gradients are scaled down to this norm; 0 turns clipping off.
    pub max_grad_norm: f64,
}

/// Moments of all parameters.
pub struct Optimizer {
    moment1: Tensor,
    moment2: Tensor,
    /// Runs of the flat buffer that decay, and those that do not: start and length.
    runs: [Vec<(i64, i64)>; 2],
}

impl Optimizer {
    pub fn new(network: &Network) -> Result<Optimizer> {
        let zeros = || Tensor::f_zeros([network.layout.len as i64], (Kind::Float, network.device));
        let mut runs: [Vec<(i64, i64)>; 2] = Default::default();
        for p in &network.layout.parameters {
            let list = &mut runs[usize::from(p.role.is_vector())];
            let (start, len) = (p.range.start as i64, p.range.len() as i64);
            match list.last_mut() {
                Some((before, before_len)) if *before + *before_len == start => *before_len += len,
                _ => list.push((start, len)),
            }
        }
        Ok(Optimizer { moment1: zeros()?, moment2: zeros()?, runs })
    }

    /// One step with the gradients in `memory`; `step` counts from 1. Gives the gradients' norm before clipping, as a tensor of one number
    /// on the device. Where that is no number, nothing is changed.
    pub fn step(&mut self, memory: &mut Memory, adamw: &AdamW, lr: f64, step: u64) -> Result<Tensor> {
        let _guard = tch::no_grad_guard();
        let norm = memory.grads.f_norm()?;
        let divisor = match adamw.max_grad_norm > 0.0 {
            true => norm.f_add_scalar(CLIP_EPS)?.f_div_scalar(adamw.max_grad_norm)?.f_clamp_min(1.0)?,
            false => norm.f_ones_like()?,
        };
        let skip = norm.f_isfinite()?.f_logical_not()?.f_to_kind(Kind::Float)?;
        for (group, decay) in self.runs.iter().zip([adamw.weight_decay, 0.0]) {
            let views = |flat: &Tensor| -> Result<Vec<Tensor>> {
                group.iter().map(|(start, len)| Ok(flat.f_narrow(0, *start, *len)?)).collect()
            };
            // The kernel takes the step from a tensor each; one serves all.
            let count = Tensor::f_full([1], step as f64, (Kind::Float, norm.device()))?;
            let steps: Vec<Tensor> = group.iter().map(|_| count.shallow_clone()).collect();
            let tensors = AdamWTensors {
                params: &views(&memory.master)?,
                grads: &views(&memory.grads)?,
                moments1: &views(&self.moment1)?,
                moments2: &views(&self.moment2)?,
                steps: &steps,
                divisor: &divisor,
                skip: &skip,
            };
            let AdamW { beta1, beta2, eps, .. } = *adamw;
            shim::adamw(&tensors, AdamWNumbers { lr, beta1, beta2, decay, eps })?;
        }
        memory.refresh()?;
        Ok(norm)
    }
}
