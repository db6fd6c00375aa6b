//! What follows the last block: norm, vocabulary projection and cross-entropy, in slices of tokens. The logits never exist all at once, and
//! are overwritten by their gradient.

use crate::block::Pass;
use crate::network::{Sink, grad, summed};
use crate::product::{Out, Storage};
use crate::workers::Workers;
use crate::workspace::Scratch;
use fleet_kernels::{self as kernels, IGNORED, Store};
use std::sync::atomic::{AtomicU64, Ordering};

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

/// What a model makes of targets that it is not trained on.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Score {
    pub loss: Loss,
    /// Targets that the model finds likelier than any other token.
    pub hits: u64,
}

impl<E: Storage> Pass<'_, E> {
    /// What the head multiplies, `[t, e]`: in `scratch.more_rows` where a matrix leads there, else in `scratch.normed`.
    fn before_head(&mut self, x: &[f32], scratch: &mut Scratch<E>) {
        let t = x.len() / self.network.hidden();
        let layout = &self.network.layout;
        let normed = &mut scratch.normed[..x.len()];
        match &layout.final_norm {
            Some(affine) => self.norm(x, affine, normed, &mut scratch.norms),
            None => kernels::convert(x, normed),
        }
        if let Some(project) = &layout.project_out {
            let weight = self.weights.of(&project.weight);
            let out = Out::Store(&mut scratch.more_rows[..t * project.outputs]);
            self.products.forward(normed, weight, out, (t, project.inputs, project.outputs));
        }
    }

    fn bias_of_head(&self) -> Option<&[f32]> {
        self.network.layout.head.bias.as_ref().map(|range| self.weights.exact(range))
    }

    /// Loss of the hidden states `x_th`; leaves their gradient in `scratch.g`.
    pub(crate) fn head_forward_backward(
        &mut self,
        x: &[f32],
        targets: &[i64],
        scale: f32,
        scratch: &mut Scratch<E>,
        sink: &mut impl Sink,
    ) -> Loss {
        let layout = &self.network.layout;
        let (t, h, e, v) = (targets.len(), self.network.hidden(), layout.head.inputs, layout.head.outputs);
        let x = &x[..t * h];
        self.before_head(x, scratch);
        let Scratch { normed, rows, more_rows, g, logits, logit_rows, norms, .. } = scratch;
        let (normed, g) = (&mut normed[..t * h], &mut g[..t * h]);
        let read = if layout.project_out.is_some() { &more_rows[..t * e] } else { &normed[..t * e] };
        let head = self.weights.of(&layout.head.weight);
        let mut sum = 0.0;
        for (slice, targets) in targets.chunks(*logit_rows).enumerate() {
            let n = targets.len();
            let at = slice * *logit_rows * e;
            let (read, logits) = (&read[at..at + n * e], &mut logits[..n * v]);
            self.products.forward(read, head, Out::Store(logits), (n, e, v));
            if let Some(bias) = self.bias_of_head() {
                kernels::add_rows(logits, bias);
            }
            sum += cross_entropy(self.workers(), logits, targets, v, |logits, targets| {
                kernels::cross_entropy(logits, targets, scale)
            });
            if let Some(range) = &layout.head.bias {
                let sums = if slice == 0 { summed(sink, range) } else { sink.range(range.clone()) };
                kernels::sum_rows(logits, sums);
            }
            let dw = match slice {
                0 => grad(sink, &layout.head.weight),
                _ => Out::Add(sink.range(layout.head.weight.clone())),
            };
            self.products.backward_weight(logits, read, dw, (n, e, v));
            self.products.backward_input(logits, head, Out::Store(&mut rows[at..at + n * e]), (n, e, v));
        }
        let mut flow = &rows[..t * e];
        if let Some(project) = &layout.project_out {
            self.linear_weight_backward(flow, normed, project, norms.sums(), sink);
            let dx = &mut more_rows[..t * h];
            self.linear_input_backward(flow, project, Out::Store(dx));
            flow = dx;
        }
        match &layout.final_norm {
            Some(affine) => self.norm_backward(flow, x, affine, g, Store::Set, false, norms, sink),
            None => kernels::convert(flow, g),
        }
        Loss { sum, tokens: count(targets) }
    }

    /// Loss of the hidden states `x_th` alone, and where they are asked for, the hits.
    pub(crate) fn head_score(
        &mut self,
        x: &[f32],
        targets: &[i64],
        wants_hits: bool,
        scratch: &mut Scratch<E>,
    ) -> Score {
        let layout = &self.network.layout;
        let (t, h, e, v) = (targets.len(), self.network.hidden(), layout.head.inputs, layout.head.outputs);
        self.before_head(&x[..t * h], scratch);
        let Scratch { normed, more_rows, logits, logit_rows, .. } = scratch;
        let read = if layout.project_out.is_some() { &more_rows[..t * e] } else { &normed[..t * e] };
        let head = self.weights.of(&layout.head.weight);
        let (mut sum, hits) = (0.0, AtomicU64::new(0));
        for (slice, targets) in targets.chunks(*logit_rows).enumerate() {
            let (n, at) = (targets.len(), slice * *logit_rows * e);
            let logits = &mut logits[..n * v];
            self.products.forward(&read[at..at + n * e], head, Out::Store(logits), (n, e, v));
            if let Some(bias) = self.bias_of_head() {
                kernels::add_rows(logits, bias);
            }
            sum += cross_entropy(self.workers(), logits, targets, v, |logits, targets| {
                if wants_hits {
                    hits.fetch_add(count_hits(logits, targets), Ordering::Relaxed);
                }
                kernels::cross_entropy_loss(logits, targets)
            });
        }
        Score { loss: Loss { sum, tokens: count(targets) }, hits: hits.into_inner() }
    }

    /// `[n, v]` logits of the hidden states `x_nh`, in fp32. There may be fewer of them than the pass has tokens.
    pub(crate) fn head_logits(&mut self, x: &[f32], scratch: &mut Scratch<E>) -> Vec<f32> {
        let layout = &self.network.layout;
        let n = x.len() / self.network.hidden();
        self.heads.batch = 1;
        self.heads.seq = n;
        self.before_head(x, scratch);
        let (e, v) = (layout.head.inputs, layout.head.outputs);
        let read =
            if layout.project_out.is_some() { &scratch.more_rows[..n * e] } else { &scratch.normed[..n * e] };
        let mut logits = vec![0.0; n * v];
        let head = self.weights.of(&layout.head.weight);
        self.products.forward(read, head, Out::Set(&mut logits), (n, e, v));
        if let Some(bias) = self.bias_of_head() {
            kernels::add_rows(&mut logits, bias);
        }
        logits
    }
}

fn count(targets: &[i64]) -> u64 {
    targets.iter().filter(|target| **target != IGNORED).count() as u64
}

/// Rows whose target has the largest number; of equal ones the first is the largest, as for `argmax`.
fn count_hits<E: Storage>(logits: &[E], targets: &[i64]) -> u64 {
    let rows = logits.chunks_exact(logits.len() / targets.len().max(1));
    let is_hit = |(row, target): &(&[E], &i64)| {
        let Some(at) = usize::try_from(**target).ok().filter(|at| *at < row.len()) else { return false };
        let own = row[at].to_f32();
        row[..at].iter().all(|x| x.to_f32() < own) && row[at..].iter().all(|x| x.to_f32() <= own)
    };
    rows.zip(targets).filter(is_hit).count() as u64
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
