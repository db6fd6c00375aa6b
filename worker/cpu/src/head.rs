//! What follows the last block: norm, vocabulary projection and cross-entropy, in slices of tokens. The logits never exist all at once, and
//! are overwritten by their gradient.

use crate::block::Pass;
use crate::network::{Further, grad, summed};
use crate::product::{Out, Storage};
use crate::workspace::Scratch;
use fleet_kernels::{self as kernels, Store};
use fleet_learn::zeros::{Part, zeros};
use fleet_learn::{Batch, Gradients, Result, Workers};
use std::sync::atomic::{AtomicU64, Ordering};

impl<E: Storage> Pass<'_, E> {
    /// What the head multiplies, `[t, e]`: in `scratch.more_rows` where a matrix leads there, else in `scratch.normed`.
    fn before_head(&mut self, x: &[f32], scratch: &mut Scratch<E>) {
        let t = x.len() / self.network.hidden();
        let wiring = &self.network.wiring;
        let normed = &mut scratch.normed[..x.len()];
        match &wiring.final_norm {
            Some(affine) => self.norm(x, affine, normed, &mut scratch.norms),
            None => kernels::convert(x, normed),
        }
        if let Some(project) = &wiring.project_out {
            let out = Out::Store(&mut scratch.more_rows[..t * project.outputs]);
            self.times(normed, &project.weight, out, (t, project.inputs, project.outputs));
        }
    }

    fn bias_of_head(&self) -> Option<&[f32]> {
        self.network.wiring.head.bias.as_ref().map(|range| self.weights.exact(range))
    }

    /// Loss of the hidden states `x_th`; leaves their gradient in `scratch.g`.
    pub(crate) fn head_forward_backward(
        &mut self,
        x: &[f32],
        batch: &Batch,
        scale: f32,
        scratch: &mut Scratch<E>,
        sink: &mut dyn Gradients,
    ) -> f64 {
        let wiring = &self.network.wiring;
        let Batch { targets, weights, .. } = *batch;
        let (t, h, e, v) = (targets.len(), self.network.hidden(), wiring.head.inputs, wiring.head.outputs);
        let x = &x[..t * h];
        self.before_head(x, scratch);
        let Scratch { normed, rows, more_rows, g, logits, logit_rows, norms, .. } = scratch;
        let (normed, g) = (&mut normed[..t * h], &mut g[..t * h]);
        let read = if wiring.project_out.is_some() { &more_rows[..t * e] } else { &normed[..t * e] };
        let mut sum = 0.0;
        for (slice, targets) in targets.chunks(*logit_rows).enumerate() {
            let n = targets.len();
            let (first, at) = (slice * *logit_rows, slice * *logit_rows * e);
            let weights = weights.map(|weights| &weights[first..first + n]);
            let (read, logits) = (&read[at..at + n * e], &mut logits[..n * v]);
            self.slice = Some(first..first + n);
            self.linear(read, &wiring.head, logits);
            sum += cross_entropy(self.workers(), logits, targets, weights, |logits, targets, weights| {
                kernels::cross_entropy(logits, targets, weights, scale)
            });
            if let Some(range) = wiring.head.bias.as_ref().and_then(|bias| self.weights.trained(bias)) {
                let sums = if slice == 0 { summed(sink, range) } else { sink.range(range) };
                kernels::sum_rows(logits, sums);
            }
            if let Some(range) = self.weights.trained(&wiring.head.weight) {
                let dw = match slice {
                    0 => grad(sink, range),
                    _ => Out::Add(sink.range(range)),
                };
                self.products.backward_weight(logits, read, dw, (n, e, v));
            }
            match slice {
                0 => self.adapter_weight_backward(logits, read, &wiring.head, sink),
                _ => self.adapter_weight_backward(logits, read, &wiring.head, &mut Further(sink)),
            }
            self.linear_input_backward(logits, &wiring.head, Out::Store(&mut rows[at..at + n * e]));
        }
        self.slice = None;
        let mut flow = &rows[..t * e];
        if let Some(project) = &wiring.project_out {
            self.linear_weight_backward(flow, normed, project, norms.sums(), sink);
            let dx = &mut more_rows[..t * h];
            self.linear_input_backward(flow, project, Out::Store(dx));
            flow = dx;
        }
        match &wiring.final_norm {
            Some(affine) => self.norm_backward(flow, x, affine, g, Store::Set, false, norms, sink),
            None => kernels::convert(flow, g),
        }
        sum
    }

    /// Loss of the hidden states `x_th` alone, and how many targets are the likeliest token.
    pub(crate) fn head_loss(&mut self, x: &[f32], batch: &Batch, scratch: &mut Scratch<E>) -> (f64, u64) {
        let wiring = &self.network.wiring;
        let Batch { targets, weights, .. } = *batch;
        let (t, h, e, v) = (targets.len(), self.network.hidden(), wiring.head.inputs, wiring.head.outputs);
        self.before_head(&x[..t * h], scratch);
        let Scratch { normed, more_rows, logits, logit_rows, .. } = scratch;
        let read = if wiring.project_out.is_some() { &more_rows[..t * e] } else { &normed[..t * e] };
        let (mut sum, hits) = (0.0, AtomicU64::new(0));
        for (slice, targets) in targets.chunks(*logit_rows).enumerate() {
            let (n, first, at) = (targets.len(), slice * *logit_rows, slice * *logit_rows * e);
            let weights = weights.map(|weights| &weights[first..first + n]);
            let logits = &mut logits[..n * v];
            self.slice = Some(first..first + n);
            self.linear(&read[at..at + n * e], &wiring.head, logits);
            sum += cross_entropy(self.workers(), logits, targets, weights, |logits, targets, weights| {
                hits.fetch_add(count_hits(logits, targets), Ordering::Relaxed);
                kernels::cross_entropy_loss(logits, targets, weights)
            });
        }
        self.slice = None;
        (sum, hits.into_inner())
    }

    /// Of each sequence the summed loss of the hidden states `x_th` of all.
    pub(crate) fn head_losses(&mut self, x: &[f32], batch: &Batch, scratch: &mut Scratch<E>) -> Vec<f64> {
        let wiring = &self.network.wiring;
        let targets = batch.targets;
        let (t, h, e, v) = (targets.len(), self.network.hidden(), wiring.head.inputs, wiring.head.outputs);
        self.before_head(&x[..t * h], scratch);
        let Scratch { normed, more_rows, logits, logit_rows, .. } = scratch;
        let read = if wiring.project_out.is_some() { &more_rows[..t * e] } else { &normed[..t * e] };
        let mut sums = vec![0.0; batch.sequences()];
        for (slice, targets) in targets.chunks(*logit_rows).enumerate() {
            let (n, first) = (targets.len(), slice * *logit_rows);
            let logits = &mut logits[..n * v];
            self.slice = Some(first..first + n);
            self.linear(&read[first * e..][..n * e], &wiring.head, logits);
            let mut at = 0;
            while at < n {
                // As many tokens as are of one sequence.
                let (sequence, _) = self.place(first + at);
                let len = (at..n).take_while(|token| self.place(first + token).0 == sequence).count();
                let (logits, targets) = (&mut logits[at * v..][..len * v], &targets[at..at + len]);
                sums[sequence] +=
                    cross_entropy(self.workers(), logits, targets, None, |logits, targets, weights| {
                        kernels::cross_entropy_loss(logits, targets, weights)
                    });
                at += len;
            }
        }
        self.slice = None;
        sums
    }

    /// `[n, v]` logits of the hidden states `x_nh`, in fp32. There may be fewer of them than the pass has tokens.
    pub(crate) fn head_logits(&mut self, x: &[f32], scratch: &mut Scratch<E>) -> Result<Vec<f32>> {
        let wiring = &self.network.wiring;
        let n = x.len() / self.network.hidden();
        self.heads.batch = 1;
        self.heads.seq = n;
        self.before_head(x, scratch);
        let (e, v) = (wiring.head.inputs, wiring.head.outputs);
        let read =
            if wiring.project_out.is_some() { &scratch.more_rows[..n * e] } else { &scratch.normed[..n * e] };
        let mut logits = zeros(n * v, Part::Logits)?;
        self.times(read, &wiring.head.weight, Out::Set(&mut logits), (n, e, v));
        if let Some(bias) = self.bias_of_head() {
            kernels::add_rows(&mut logits, bias);
        }
        Ok(logits)
    }
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
    weights: Option<&[f32]>,
    loss: impl Fn(&mut [E], &[i64], Option<&[f32]>) -> f64 + Sync,
) -> f64 {
    if workers.count() == 1 {
        return loss(logits, targets, weights);
    }
    let (share, v) = (workers.share(targets.len(), 1), logits.len() / targets.len());
    let mut sums = vec![0.0; targets.len().div_ceil(share)];
    let pieces = logits.chunks_mut(share * v).zip(targets.chunks(share)).zip(sums.iter_mut()).enumerate();
    workers.each(pieces, |(piece, ((logits, targets), sum))| {
        let weights = weights.map(|weights| &weights[piece * share..][..targets.len()]);
        *sum = loss(logits, targets, weights);
    });
    sums.iter().sum()
}
