//! Final norm, vocabulary projection and cross-entropy, in slices of tokens: the logits never exist all at once, and are overwritten by
//! their gradient.

use super::block::{grad, norm, norm_backward};
use super::workspace::Scratch;
use super::{Llama, Sink, Weights};
use crate::product::{Out, Products, Storage};
use crate::workers::Workers;
use fleet_kernels::{self as kernels, IGNORED, Store};

/// Summed over tokens, in nats.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Loss {
    pub sum: f64,
    /// Tokens that had a target.
    pub tokens: u64,
}

impl Loss {
    pub fn add(&mut self, other: Loss) {
        self.sum += other.sum;
        self.tokens += other.tokens;
    }
}

impl Llama {
    /// Loss of the hidden states `x_th`; leaves their gradient in `scratch.g`.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn head_forward_backward<E: Storage>(
        &self,
        w: Weights<E>,
        x: &[f32],
        targets: &[i64],
        scale: f32,
        products: &mut Products,
        scratch: &mut Scratch<E>,
        sink: &mut impl Sink,
    ) -> Loss {
        let (t, h, v) = (targets.len(), self.hidden(), self.config.vocab_size as usize);
        let Scratch { normed, rstd, rows, g, logits, logit_rows, norm_sums, .. } = scratch;
        let (x, normed, rstd) = (&x[..t * h], &mut normed[..t * h], &mut rstd[..t]);
        let norm_w = &w.master[self.layout.final_norm.clone()];
        norm(products.workers(), x, norm_w, self.eps(), normed, rstd);
        let head = w.of(&self.layout.head);
        let mut sum = 0.0;
        for (slice, targets) in targets.chunks(*logit_rows).enumerate() {
            let n = targets.len();
            let at = slice * *logit_rows * h;
            let (normed, logits) = (&normed[at..at + n * h], &mut logits[..n * v]);
            products.forward(normed, head, Out::Store(logits), (n, h, v));
            sum += cross_entropy(products.workers(), logits, targets, v, |logits, targets| {
                kernels::cross_entropy(logits, targets, scale)
            });
            let dw = match slice {
                0 => grad(sink, &self.layout.head),
                _ => Out::Add(sink.range(self.layout.head.clone())),
            };
            products.backward_weight(logits, normed, dw, (n, h, v));
            products.backward_input(logits, head, Out::Store(&mut rows[at..at + n * h]), (n, h, v));
        }
        let range = &self.layout.final_norm;
        let g = &mut g[..t * h];
        norm_backward(
            products.workers(),
            &rows[..t * h],
            x,
            norm_w,
            rstd,
            g,
            Store::Set,
            norm_sums,
            sink,
            range,
        );
        Loss { sum, tokens: count(targets) }
    }

    /// Loss of the hidden states `x_th` alone.
    pub(super) fn head_loss<E: Storage>(
        &self,
        w: Weights<E>,
        x: &[f32],
        targets: &[i64],
        products: &mut Products,
        scratch: &mut Scratch<E>,
    ) -> Loss {
        let (t, h, v) = (targets.len(), self.hidden(), self.config.vocab_size as usize);
        let Scratch { normed, rstd, logits, logit_rows, .. } = scratch;
        let normed = &mut normed[..t * h];
        let norm_w = &w.master[self.layout.final_norm.clone()];
        norm(products.workers(), &x[..t * h], norm_w, self.eps(), normed, &mut rstd[..t]);
        let mut sum = 0.0;
        for (slice, targets) in targets.chunks(*logit_rows).enumerate() {
            let (n, at) = (targets.len(), slice * *logit_rows * h);
            let logits = &mut logits[..n * v];
            products.forward(&normed[at..at + n * h], w.of(&self.layout.head), Out::Store(logits), (n, h, v));
            sum += cross_entropy(products.workers(), logits, targets, v, |logits, targets| {
                kernels::cross_entropy_loss(logits, targets)
            });
        }
        Loss { sum, tokens: count(targets) }
    }

    /// `[t, v]` logits of the hidden states `x_th`, in fp32.
    pub(super) fn head_logits<E: Storage>(
        &self,
        w: Weights<E>,
        x: &[f32],
        products: &mut Products,
        scratch: &mut Scratch<E>,
    ) -> Vec<f32> {
        let (h, v) = (self.hidden(), self.config.vocab_size as usize);
        let t = x.len() / h;
        let normed = &mut scratch.normed[..t * h];
        let norm_w = &w.master[self.layout.final_norm.clone()];
        norm(products.workers(), x, norm_w, self.eps(), normed, &mut scratch.rstd[..t]);
        let mut logits = vec![0.0; t * v];
        products.forward(normed, w.of(&self.layout.head), Out::Set(&mut logits), (t, h, v));
        logits
    }
}

fn count(targets: &[i64]) -> u64 {
    targets.iter().filter(|target| **target != IGNORED).count() as u64
}

/// Sum of `loss` over pieces of rows, added in their order.
fn cross_entropy<E: Storage>(
    workers: &Workers,
    logits: &mut [E],
    targets: &[i64],
    v: usize,
    loss: impl Fn(&mut [E], &[i64]) -> f64 + Sync,
) -> f64 {
    if workers.count() == 1 {
        return loss(logits, targets);
    }
    let share = workers.share(targets.len(), 1);
    let mut sums = vec![0.0; targets.len().div_ceil(share)];
    let pieces = logits.chunks_mut(share * v).zip(targets.chunks(share)).zip(sums.iter_mut());
    workers.each(pieces, |((logits, targets), sum)| *sum = loss(logits, targets));
    sums.iter().sum()
}
