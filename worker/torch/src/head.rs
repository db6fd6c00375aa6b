//! What follows the last block: norm, vocabulary projection and cross-entropy, in slices of tokens. The logits never exist all at once.

use crate::adapter::View;
use crate::base::Matrix;
use crate::executor::{OnDevice, TorchExecutor};
use crate::memory::Gradients;
use crate::needs::LOGIT_ROWS_MIN;
use crate::network::{Leaf, Leaves};
use crate::{Result, shim};
use fleet_learn::Executor;
use tch::{Device, Kind, Tensor};

/// What a pass over the head finds.
pub(crate) struct Scored {
    /// `[t]` in fp32: the loss of each token, times what it counts.
    pub losses: Tensor,
    /// `[b, s, e]`: what flows back to what the head reads, where gradients are asked for.
    pub seed: Tensor,
    /// Of one number: how many targets are the likeliest token, where that is asked for.
    pub hits: Tensor,
}

/// What a pass over the head is for.
#[derive(Clone, Copy)]
pub(crate) enum Sought<'a> {
    Losses,
    /// And how many targets are the likeliest token.
    Hits,
    /// And the gradients of so many times their sum.
    Gradients(&'a Gradients<'a>, f64),
}

/// What an adapter adds to a slice of logits, as a graph of its own.
struct Graph {
    x: Tensor,
    logits: Tensor,
    leaves: Vec<Leaf>,
}

impl TorchExecutor {
    /// The units whose weights the head reads: its own, and that of the embedding where it is tied.
    pub(crate) fn head_units(&self) -> impl Iterator<Item = usize> + use<> {
        let layout = self.layout();
        layout.is_tied().then_some(0).into_iter().chain([layout.units.len() - 1])
    }

    /// The head's forward and backward at once; the summed loss, and what flows back to `x`, the last block's output.
    pub(crate) fn head_step(
        &self,
        view: View,
        grads: &Gradients,
        x: &Tensor,
        batch: &OnDevice,
        scale: f64,
    ) -> Result<(Tensor, Option<Tensor>)> {
        let input = x.f_detach()?.set_requires_grad(true);
        let mut leaves = Leaves::new(&self.network, view, true);
        let last = self.network.last(&mut leaves, &input)?;
        let leaves = leaves.into_taken();
        let Scored { losses, seed, .. } = self.score(view, Sought::Gradients(grads, scale), &last, batch)?;
        let flow = self.unit_backward(grads, (&last, &seed), Some(&input), &leaves)?;
        Ok((losses.f_sum(self.loss_kind())?.f_view([1])?, flow))
    }

    /// Losses and what else is sought. `last` is `[b, s, e]`.
    pub(crate) fn score(
        &self,
        view: View,
        sought: Sought,
        last: &Tensor,
        batch: &OnDevice,
    ) -> Result<Scored> {
        let _guard = tch::no_grad_guard();
        let grads = match sought {
            Sought::Gradients(grads, scale) => Some((grads, scale)),
            Sought::Losses | Sought::Hits => None,
        };
        let head = &self.network.wiring.head;
        let (v, e) = (head.outputs as i64, head.inputs as i64);
        let (weight, bias) = Leaves::new(&self.network, view, false).matrix_and_bias(head)?;
        let matrix = weight.widened()?;
        let (trained, trained_bias) =
            (view.place(&head.weight), head.bias.as_ref().and_then(|bias| view.place(bias)));
        let x = last.f_detach()?.f_view([-1, e])?;
        let tokens = x.size()[0];
        let rows =
            (self.logits_max as i64 / v).clamp(LOGIT_ROWS_MIN as i64, tokens.max(LOGIT_ROWS_MIN as i64));
        let seed = x.f_empty_like()?;
        // Of a head whose gradients are kept in 16 bits, slices of tokens are added in fp32 and rounded once.
        let is_summed = self.network.numbers.kept != Kind::Float && rows < tokens;
        let mut sum: Option<Tensor> = None;
        let mut all = Vec::new();
        let mut hits = Tensor::f_zeros([1], (Kind::Int64, self.network.device))?;
        for start in (0..tokens).step_by(rows as usize) {
            let count = rows.min(tokens - start);
            let cut = |tensor: &Tensor| tensor.f_narrow(0, start, count);
            let (x, targets, counts) = (cut(&x)?, cut(&batch.targets)?, cut(&batch.weights)?);
            let mut logits = x.f_linear(&matrix, bias.as_ref())?;
            let added = self.added_logits(view.at_row(start as usize), &x, &weight, grads.is_some())?;
            if let Some(added) = &added {
                logits = logits.f_add(&added.logits)?;
            }
            if matches!(sought, Sought::Hits) {
                let hit = logits.f_argmax(-1, false)?.f_eq_tensor(&targets)?;
                hits = hits.f_add(&hit.f_logical_and(&counts.f_gt(0.0)?)?.f_sum(Kind::Int64)?)?;
            }
            let scale = grads.map(|(_, scale)| scale);
            let (losses, flow) = self.cross_entropy(logits, &targets, &counts, scale)?;
            all.push(losses);
            let (Some((grads, _)), Some(flow)) = (grads, flow) else { continue };
            let mut seed = cut(&seed)?;
            let _ = Tensor::f_matmul_out(&flow, &seed, &matrix)?;
            let set = grads.fresh && start == 0;
            if let Some(added) = added {
                let _ = seed.f_add_(&added.backward(&flow, grads, set)?)?;
            }
            if let Some(range) = &trained {
                let product = flow.f_transpose(0, 1)?.f_matmul(&x)?;
                match &mut sum {
                    Some(sum) => sum.f_add_(&product).map(|_| ())?,
                    None if is_summed => sum = Some(product.f_to_kind(Kind::Float)?),
                    None => grads.store(range, Some(&product), set)?,
                }
            }
            if let Some(range) = &trained_bias {
                let sum = flow.f_sum_dim_intlist([0i64].as_slice(), false, Kind::Float)?;
                grads.store(range, Some(&sum), set)?;
            }
        }
        if let (Some((grads, _)), Some(sum), Some(range)) = (grads, &sum, &trained) {
            grads.store(range, Some(sum), grads.fresh)?;
        }
        Ok(Scored { losses: Tensor::f_cat(&all, 0)?, seed: seed.f_view(last.size().as_slice())?, hits })
    }

    /// What an adapter adds to the logits of `x`, `[n, e]`, if it changes the head.
    fn added_logits(&self, view: View, x: &Tensor, matrix: &Matrix, has_grad: bool) -> Result<Option<Graph>> {
        let head = &self.network.wiring.head;
        if !view.changes(&head.weight) {
            return Ok(None);
        }
        tch::with_grad(|| {
            let x = if has_grad { x.f_detach()?.set_requires_grad(true) } else { x.shallow_clone() };
            let mut leaves = Leaves::new(&self.network, view, has_grad);
            let Some(added) = leaves.added(head, matrix)? else { return Ok(None) };
            let logits = leaves.addition(&added, &x, matrix, None)?;
            Ok(Some(Graph { x, logits, leaves: leaves.into_taken() }))
        })
    }

    /// Losses of `[n, v]` logits, each times its weight, `[n]`; with `scale` also their gradients times that, in the type of products.
    fn cross_entropy(
        &self,
        logits: Tensor,
        targets: &Tensor,
        weights: &Tensor,
        scale: Option<f64>,
    ) -> Result<(Tensor, Option<Tensor>)> {
        if let Some(fused) = &self.network.fused {
            let losses = fused.cross_entropy(&logits, targets, weights, scale)?;
            return Ok((losses, scale.map(|_| logits)));
        }
        let logs = logits.f_log_softmax(-1, Kind::Float)?;
        drop(logits);
        let at = targets.f_unsqueeze(1)?;
        let losses = logs.f_gather(1, &at, false)?.f_squeeze_dim(1)?.f_mul(weights)?.f_neg()?;
        let Some(scale) = scale else { return Ok((losses, None)) };
        let mut flow = logs.f_exp()?;
        drop(logs);
        let minus = Tensor::f_full([targets.size()[0], 1], -1.0, (Kind::Float, self.network.device))?;
        let _ = flow.f_scatter_add_(1, &at, &minus)?;
        let flow = flow.f_mul(&weights.f_mul_scalar(scale)?.f_unsqueeze(1)?)?;
        Ok((losses, Some(flow.f_to_kind(self.network.numbers.products)?)))
    }

    /// Metal has no fp64.
    pub(crate) fn loss_kind(&self) -> Kind {
        if self.network.device == Device::Mps { Kind::Float } else { Kind::Double }
    }
}

impl Graph {
    /// Stores gradients for `flow`, those of the logits; what flows back to what was read.
    fn backward(self, flow: &Tensor, grads: &Gradients, set: bool) -> Result<Tensor> {
        let inputs: Vec<&Tensor> = self.leaves.iter().map(|leaf| &leaf.tensor).chain([&self.x]).collect();
        let mut found = shim::grad(&self.logits, flow, &inputs)?;
        let back = found.pop().flatten();
        for (leaf, grad) in self.leaves.iter().zip(found) {
            grads.store(&leaf.range, grad.as_ref(), set)?;
        }
        back.map_or_else(|| Ok(self.x.f_zeros_like()?), Ok)
    }
}
