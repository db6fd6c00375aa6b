//! Forward and backward of a whole decoder, unit by unit: a unit's graph lives from its forward to its backward, and its gradients are
//! complete when its turn is over, while the units before it still wait.

use crate::network::{Frame, Leaf, Leaves, Network, Numbers};
use crate::{Result, shim};
use fleet_common::model::{Decoder, Layout};
use tch::{Device, Kind, Tensor};

/// A target that does not count.
pub const IGNORED: i64 = -100;

/// Computes; owns activations for as long as a step, never weights.
pub struct Executor {
    pub network: Network,
    /// Most numbers of logits that exist at once.
    logits_max: usize,
    frame: Option<(usize, Frame)>,
}

/// The numbers of all units, flat, on one device.
pub struct Memory {
    pub master: Tensor,
    /// In the type of products; `None` where that is the masters'.
    pub copy: Option<Tensor>,
    /// fp32.
    pub grads: Tensor,
}

impl Memory {
    pub fn new(network: &Network, wants_grad: bool) -> Result<Memory> {
        let (len, device) = (network.layout.len as i64, network.device);
        let zeros = |kind, len| Tensor::f_zeros([len], (kind, device));
        let kind = network.numbers.products;
        Ok(Memory {
            master: zeros(Kind::Float, len)?,
            copy: (kind != Kind::Float).then(|| zeros(kind, len)).transpose()?,
            grads: zeros(Kind::Float, if wants_grad { len } else { 0 })?,
        })
    }

    /// Takes over flat parameters, and makes the copy for products.
    pub fn set(&mut self, flat: &[f32]) -> Result<()> {
        self.master.f_copy_(&Tensor::f_from_slice(flat)?)?;
        self.refresh()
    }

    /// Makes the copy for products anew.
    pub fn refresh(&mut self) -> Result<()> {
        if let Some(copy) = &mut self.copy {
            copy.f_copy_(&self.master)?;
        }
        Ok(())
    }
}

/// A unit's graph between its forward and its backward.
struct Saved {
    input: Tensor,
    output: Tensor,
    leaves: Vec<Leaf>,
}

impl Executor {
    pub fn new(decoder: Decoder, layout: Layout, device: Device, numbers: Numbers) -> Executor {
        let logits_max = if device.is_cuda() { 1 << 28 } else { 1 << 20 };
        Executor { network: Network { decoder, layout, device, numbers }, logits_max, frame: None }
    }

    fn take_frame(&mut self, len: usize) -> Result<Frame> {
        match self.frame.take() {
            Some((have, frame)) if have == len => Ok(frame),
            _ => self.network.frame(len),
        }
    }

    /// `[b, s, v]` logits of `[b, s]` ids, in the type of products.
    pub fn logits(&mut self, memory: &Memory, ids: &Tensor) -> Result<Tensor> {
        let _guard = tch::no_grad_guard();
        let last = self.hidden(memory, ids)?;
        Ok(last.f_linear(&self.head(memory)?, self.head_bias(memory)?.as_ref())?)
    }

    /// `[b, s, e]` of `[b, s]` ids: what the head multiplies.
    fn hidden(&mut self, memory: &Memory, ids: &Tensor) -> Result<Tensor> {
        let len = ids.size()[1] as usize;
        let frame = self.take_frame(len)?;
        let network = &self.network;
        let mut leaves = Leaves::new(network, &memory.master, memory.copy.as_ref(), false);
        let mut x = network.embed(&mut leaves, ids)?;
        for number in 0..network.layout.blocks.len() {
            x = network.block(&mut leaves, number, &x, &frame)?;
        }
        let last = network.last(&mut leaves, &x)?;
        self.frame = Some((len, frame));
        Ok(last)
    }

    /// Loss of `[b, s]` ids and targets, summed over the targets that count, and how many of them are the likeliest token. The head works in
    /// slices of tokens.
    pub fn score(&mut self, memory: &Memory, (ids, targets): (&Tensor, &Tensor)) -> Result<(f64, u64)> {
        let _guard = tch::no_grad_guard();
        let last = self.hidden(memory, ids)?;
        let layout = &self.network.layout;
        let (weight, bias) = (self.head(memory)?, self.head_bias(memory)?);
        let x = last.f_view([-1, layout.head.inputs as i64])?;
        let targets = targets.f_view([-1])?;
        let tokens = x.size()[0];
        let rows = (self.logits_max as i64 / layout.head.outputs as i64).clamp(64, tokens.max(64));
        let (mut loss, mut hits) = (0.0, 0);
        for start in (0..tokens).step_by(rows as usize) {
            let count = rows.min(tokens - start);
            let (x, targets) = (x.f_narrow(0, start, count)?, targets.f_narrow(0, start, count)?);
            let logits = x.f_linear(&weight, bias.as_ref())?;
            let hit = logits.f_argmax(-1, false)?.f_eq_tensor(&targets)?.f_sum(Kind::Int64)?;
            hits += u64::try_from(i64::try_from(&hit)?).unwrap_or(0);
            let logs = logits.f_log_softmax(-1, Kind::Float)?;
            let counts = targets.f_ne(IGNORED)?;
            let at = targets.f_where_self(&counts, &targets.f_zeros_like()?)?.f_unsqueeze(1)?;
            let of_target = logs.f_gather(1, &at, false)?.f_squeeze_dim(1)?;
            loss -= f64::try_from(&of_target.f_mul(&counts)?.f_sum(Kind::Double)?)?;
        }
        Ok((loss, hits))
    }

    fn head(&self, memory: &Memory) -> Result<Tensor> {
        let head = &self.network.layout.head;
        let flat = memory.copy.as_ref().unwrap_or(&memory.master);
        let head_rows = flat.f_narrow(0, head.weight.start as i64, head.weight.len() as i64)?;
        Ok(head_rows.f_view([head.outputs as i64, head.inputs as i64])?)
    }

    fn head_bias(&self, memory: &Memory) -> Result<Option<Tensor>> {
        let flat = memory.copy.as_ref().unwrap_or(&memory.master);
        let bias = self.network.layout.head.bias.as_ref();
        Ok(bias.map(|range| flat.f_narrow(0, range.start as i64, range.len() as i64)).transpose()?)
    }

    /// Loss of `[b, s]` ids and targets: the sum over the targets that count, as a tensor of one number on the device. Gradients of `scale`
    /// times it go to `memory.grads`: they are set where `fresh`, else added. `done` hears of each unit whose gradients are complete.
    pub fn forward_backward(
        &mut self,
        memory: &mut Memory,
        batch: (&Tensor, &Tensor),
        scale: f64,
        fresh: bool,
        done: &mut dyn FnMut(usize, &mut Tensor) -> Result<()>,
    ) -> Result<Tensor> {
        let (ids, targets) = batch;
        let len = ids.size()[1] as usize;
        let frame = self.take_frame(len)?;
        let network = &self.network;
        let units = network.layout.units.len();
        let mut saved: Vec<Saved> = Vec::with_capacity(units - 1);
        let (master, copy) = (memory.master.shallow_clone(), memory.copy.as_ref().map(Tensor::shallow_clone));
        let new_leaves = || Leaves::new(network, &master, copy.as_ref(), true);

        let mut leaves = new_leaves();
        let output = network.embed(&mut leaves, ids)?;
        saved.push(Saved { input: ids.shallow_clone(), output, leaves: leaves.into_taken() });
        for number in 0..network.layout.blocks.len() {
            let input = saved[number].output.f_detach()?.set_requires_grad(true);
            let mut leaves = new_leaves();
            let output = network.block(&mut leaves, number, &input, &frame)?;
            saved.push(Saved { input, output, leaves: leaves.into_taken() });
        }
        let input = saved[units - 2].output.f_detach()?.set_requires_grad(true);
        let mut leaves = new_leaves();
        let last = network.last(&mut leaves, &input)?;
        let taken = leaves.into_taken();

        let (loss, seed) = self.head_backward(memory, &last, targets, scale, fresh)?;
        let mut seed = self.unit_backward(memory, (&last, &seed), Some(&input), &taken, fresh)?;
        drop((last, taken));
        done(units - 1, &mut memory.grads)?;
        for unit in (1..units - 1).rev() {
            let Saved { input, output, leaves } = saved.pop().expect("one for each unit but the head");
            let given = seed.take().expect("a block's input has part in its output");
            seed = self.unit_backward(memory, (&output, &given), Some(&input), &leaves, fresh)?;
            done(unit, &mut memory.grads)?;
        }
        let Saved { output, leaves, .. } = saved.pop().expect("the embedding");
        // A head that is the embedding has written there already.
        let tied = network.layout.head.weight == network.layout.embedding;
        let given = seed.take().expect("a block's input has part in its output");
        self.embedding_backward(memory, (&output, &given), &leaves, fresh, tied)?;
        done(0, &mut memory.grads)?;
        self.frame = Some((len, frame));
        Ok(loss)
    }

    fn unit_backward(
        &self,
        memory: &mut Memory,
        (output, seed): (&Tensor, &Tensor),
        input: Option<&Tensor>,
        leaves: &[Leaf],
        fresh: bool,
    ) -> Result<Option<Tensor>> {
        let inputs: Vec<&Tensor> = leaves.iter().map(|leaf| &leaf.tensor).chain(input).collect();
        let mut grads = shim::grad(output, seed, &inputs)?;
        let input_grad = if input.is_some() { grads.pop().flatten() } else { None };
        for (leaf, grad) in leaves.iter().zip(grads) {
            store(&memory.grads, leaf.start, leaf.len, grad.as_ref(), fresh)?;
        }
        Ok(input_grad)
    }

    fn embedding_backward(
        &self,
        memory: &mut Memory,
        (output, seed): (&Tensor, &Tensor),
        leaves: &[Leaf],
        fresh: bool,
        tied: bool,
    ) -> Result<()> {
        let inputs: Vec<&Tensor> = leaves.iter().map(|leaf| &leaf.tensor).collect();
        let grads = shim::grad(output, seed, &inputs)?;
        for (leaf, grad) in leaves.iter().zip(grads) {
            let is_table = leaf.start == self.network.layout.embedding.start;
            store(&memory.grads, leaf.start, leaf.len, grad.as_ref(), fresh && !(tied && is_table))?;
        }
        Ok(())
    }

    /// The summed loss, and what flows back to `last`, `[b, s, e]`. The head works in slices of tokens, so that logits never exist at once.
    fn head_backward(
        &self,
        memory: &mut Memory,
        last: &Tensor,
        targets: &Tensor,
        scale: f64,
        fresh: bool,
    ) -> Result<(Tensor, Tensor)> {
        let _guard = tch::no_grad_guard();
        let layout = &self.network.layout;
        let (v, e) = (layout.head.outputs as i64, layout.head.inputs as i64);
        let (weight, bias) = (self.head(memory)?, self.head_bias(memory)?);
        let x = last.f_detach()?.f_view([-1, e])?;
        let targets = targets.f_view([-1])?;
        let tokens = x.size()[0];
        let rows = (self.logits_max as i64 / v).clamp(64, tokens.max(64));
        let seed = x.f_empty_like()?;
        let mut loss = Tensor::f_zeros([1], (Kind::Float, self.network.device))?;
        for start in (0..tokens).step_by(rows as usize) {
            let count = rows.min(tokens - start);
            let (x, targets) = (x.f_narrow(0, start, count)?, targets.f_narrow(0, start, count)?);
            let logits = x.f_linear(&weight, bias.as_ref())?;
            let logs = logits.f_log_softmax(-1, Kind::Float)?;
            let counts = targets.f_ne(IGNORED)?;
            let at = targets.f_where_self(&counts, &targets.f_zeros_like()?)?.f_unsqueeze(1)?;
            let of_target = logs.f_gather(1, &at, false)?.f_squeeze_dim(1)?;
            let counts = counts.f_to_kind(Kind::Float)?;
            loss = loss.f_sub(&of_target.f_mul(&counts)?.f_sum(Kind::Float)?)?;
            let mut flow = logs.f_exp()?;
            let _ = flow.f_scatter_add_(
                1,
                &at,
                &Tensor::f_full([count, 1], -1.0, (Kind::Float, self.network.device))?,
            )?;
            let flow = flow
                .f_mul(&counts.f_mul_scalar(scale)?.f_unsqueeze(1)?)?
                .f_to_kind(self.network.numbers.products)?;
            let _ = Tensor::f_matmul_out(&flow, &seed.f_narrow(0, start, count)?, &weight)?;
            let set = fresh && start == 0;
            store(
                &memory.grads,
                layout.head.weight.start,
                layout.head.weight.len(),
                Some(&flow.f_transpose(0, 1)?.f_matmul(&x)?),
                set,
            )?;
            if let Some(range) = &layout.head.bias {
                let sum = flow.f_sum_dim_intlist([0i64].as_slice(), false, Kind::Float)?;
                store(&memory.grads, range.start, range.len(), Some(&sum), set)?;
            }
        }
        let shape = last.size();
        Ok((loss, seed.f_view(shape.as_slice())?))
    }
}

/// Sets or adds a gradient in the flat buffer.
fn store(grads: &Tensor, start: usize, len: usize, grad: Option<&Tensor>, set: bool) -> Result<()> {
    let _guard = tch::no_grad_guard();
    let mut slot = grads.f_narrow(0, start as i64, len as i64)?;
    match (grad, set) {
        (Some(grad), true) => slot.f_copy_(&grad.f_reshape([-1])?).map(|_| ())?,
        (Some(grad), false) => slot.f_add_(&grad.f_reshape([-1])?).map(|_| ())?,
        (None, true) => slot.f_zero_().map(|_| ())?,
        (None, false) => {}
    }
    Ok(())
}
