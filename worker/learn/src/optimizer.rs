//! The optimizer's numbers, and its step over numbers of the host.

use crate::workers::Workers;
use fleet_common::job;
use fleet_common::model::{Layout, Parameter};
use fleet_kernels::{self as kernels, AdamWStep, Element};
use half::bf16;
use std::ops::Range;

/// PyTorch's `clip_grad_norm_` adds this to the norm.
pub const CLIP_EPS: f64 = 1e-6;

/// Fewest numbers of a step that one thread takes.
const GRANULE: usize = 4096;

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

impl From<&job::Optimizer> for AdamW {
    fn from(o: &job::Optimizer) -> AdamW {
        AdamW {
            beta1: o.beta1,
            beta2: o.beta2,
            eps: o.eps,
            weight_decay: o.weight_decay,
            max_grad_norm: o.max_grad_norm,
        }
    }
}

impl AdamW {
    /// What gradients of this norm are multiplied with.
    fn clip(&self, norm: f64) -> f64 {
        match self.max_grad_norm > 0.0 {
            true => (self.max_grad_norm / (norm + CLIP_EPS)).min(1.0),
            false => 1.0,
        }
    }
}

/// One step of the optimizer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Update {
    pub adamw: AdamW,
    pub lr: f64,
    /// Counts from 1.
    pub step: u64,
}

impl Update {
    /// The numbers of the step for each range of `parts` in which they are the same; the gradients of the whole model have `norm`.
    pub fn over<'a>(
        &'a self,
        norm: f64,
        layout: &'a Layout,
        parts: &'a [Range<usize>],
    ) -> impl Iterator<Item = (AdamWStep, Range<usize>)> + 'a {
        layout.parameters.iter().flat_map(move |parameter| {
            let step = self.of(parameter, norm);
            parts.iter().filter_map(move |part| {
                let range = part.start.max(parameter.range.start)..part.end.min(parameter.range.end);
                (!range.is_empty()).then_some((step, range))
            })
        })
    }

    fn of(&self, parameter: &Parameter, norm: f64) -> AdamWStep {
        let AdamW { beta1, beta2, eps, weight_decay, .. } = self.adamw;
        AdamWStep {
            lr: self.lr * parameter.rate,
            beta1,
            beta2,
            eps,
            weight_decay: if parameter.role.decays() { weight_decay } else { 0.0 },
            step: self.step,
            grad_scale: self.adamw.clip(norm) as f32,
        }
    }
}

/// A range of the flat buffers, all of one length.
pub struct Numbers<'a, S = f32> {
    pub master: &'a mut [S],
    pub grads: &'a [S],
    pub moment1: &'a mut [S],
    pub moment2: &'a mut [S],
    /// Under bf16-mixed.
    pub copy: Option<&'a mut [bf16]>,
}

impl<S: Element> Numbers<'_, S> {
    /// AdamW on these numbers.
    pub fn update(self, step: &AdamWStep, workers: &Workers) {
        let share = workers.share(self.master.len(), GRANULE);
        let slices = self.master.chunks_mut(share).zip(self.grads.chunks(share));
        let slices = slices.zip(self.moment1.chunks_mut(share)).zip(self.moment2.chunks_mut(share));
        match self.copy {
            Some(copy) => workers.each(slices.zip(copy.chunks_mut(share)), |((((p, g), m), v), c)| {
                kernels::adamw(step, p, g, m, v, Some(c))
            }),
            None => workers.each(slices, |(((p, g), m), v)| kernels::adamw(step, p, g, m, v, None)),
        }
    }
}
