//! Forward and backward of a whole decoder, unit by unit: a unit's graph lives from its forward to its backward, and its gradients are
//! complete when its turn is over, while the units before it still wait.

use crate::memory::{Gradients, Tensors, Weights};
use crate::needs::{LOGIT_ROWS_MIN, LOGITS_MAX};
use crate::network::{Frame, Leaf, Leaves, Network, Numbers};
use crate::{Error, Result, device, fused, shim};
use fleet_common::model::{Decoder, Layout, Wiring};
use fleet_learn::{Batch, Executor, IGNORED, Tally, TokenBatch, UnitWeights, Units, Weigh, Which};
use std::ops::Range;
use tch::{Device, Kind, Tensor};

/// Computes; owns activations for as long as a step, never weights.
pub struct TorchExecutor {
    pub network: Network,
    /// Most numbers of logits that exist at once.
    logits_max: usize,
    frame: Option<(usize, Frame)>,
    /// Of so many blocks, from the first on, the forward is computed a second time.
    again: usize,
    /// Summed since it was asked for.
    loss: Option<Tensor>,
    /// What is being computed, for errors.
    doing: Doing,
    /// Why a CUDA device goes without our own kernels.
    unfused: Option<String>,
}

/// A part of a step.
#[derive(Clone, Copy, Debug)]
enum Doing {
    Forward(usize),
    Head,
    Backward(usize),
}

/// Token ids of `[b, s]` and what is to be predicted, on the executor's device.
struct OnDevice {
    ids: Tensor,
    /// `[b * s]`.
    targets: Tensor,
    /// `[b * s]` in fp32: what each target counts; zero where there is none.
    weights: Tensor,
}

/// What is kept of a unit between its forward and its backward.
struct Saved {
    input: Tensor,
    output: Tensor,
    /// `None`: there is no graph, and its forward will be computed a second time.
    leaves: Option<Vec<Leaf>>,
}

impl TorchExecutor {
    pub fn new(decoder: Decoder, wiring: Wiring, device: Device, numbers: Numbers) -> TorchExecutor {
        let logits_max = if device.is_cuda() { 1 << 28 } else { LOGITS_MAX };
        let (fused, unfused) = match device.is_cuda().then(|| fused::open(device, numbers.products)) {
            Some(Ok(fused)) => (Some(fused), None),
            Some(Err(why)) => (None, Some(why)),
            None => (None, None),
        };
        let network = Network { decoder, wiring, device, numbers, text: 0, fused };
        let doing = Doing::Forward(0);
        TorchExecutor { network, logits_max, frame: None, again: 0, loss: None, doing, unfused }
    }

    /// Of the first `blocks` blocks nothing is kept between forward and backward but what they read (activation checkpointing).
    pub fn computing_again(mut self, blocks: usize) -> TorchExecutor {
        self.again = blocks;
        self
    }

    /// For batches of texts of so many tokens, the last of which is predicted only.
    pub fn for_texts(mut self, tokens: usize) -> TorchExecutor {
        self.network.text = tokens;
        self
    }

    fn take_frame(&mut self, len: usize) -> Result<Frame> {
        match self.frame.take() {
            Some((have, frame)) if have == len => Ok(frame),
            _ => self.network.frame(len),
        }
    }

    /// `[b, s, v]` logits of `[b, s]` ids, in the type of products.
    pub fn logits(&mut self, weights: Weights, ids: &Tensor) -> Result<Tensor> {
        let _guard = tch::no_grad_guard();
        let len = ids.size()[1] as usize;
        let frame = self.take_frame(len)?;
        let network = &self.network;
        let mut leaves = Leaves::new(network, weights, false);
        let mut x = network.embed(&mut leaves, ids)?;
        for number in 0..network.wiring.blocks.len() {
            x = network.block(&mut leaves, number, &x, &frame)?;
        }
        let last = network.last(&mut leaves, &x)?;
        let (head, bias) = self.head(weights)?;
        self.frame = Some((len, frame));
        Ok(last.f_linear(&head, bias.as_ref())?)
    }

    /// The head's matrix and bias.
    fn head(&self, weights: Weights) -> Result<(Tensor, Option<Tensor>)> {
        let head = &self.network.wiring.head;
        let matrix = weights.products.of(&head.weight)?.f_view([head.outputs as i64, head.inputs as i64])?;
        Ok((matrix, head.bias.as_ref().map(|range| weights.products.of(range)).transpose()?))
    }

    /// The units whose weights the head reads: its own, and that of the embedding where it is tied.
    fn head_units(&self) -> impl Iterator<Item = usize> + use<> {
        let layout = &self.network.wiring.layout;
        layout.is_tied().then_some(0).into_iter().chain([layout.units.len() - 1])
    }

    fn on_device(&self, batch: &Batch) -> Result<OnDevice> {
        // What libtorch attends to is a rectangle.
        let padded = batch.lengths.map(|_| batch.padded());
        let batch = padded.as_ref().map_or(*batch, TokenBatch::view);
        let seq = batch.seq as i64;
        let weight = |at: usize| batch.weights.map_or(1.0, |weights| weights[at]);
        let weights: Vec<f32> = (0..batch.targets.len())
            .map(|at| if batch.targets[at] == IGNORED { 0.0 } else { weight(at) })
            .collect();
        // Any token will do where none is to be predicted.
        let targets: Vec<i64> = batch.targets.iter().map(|target| (*target).max(0)).collect();
        let to = |tensor: Tensor| device::to(&tensor, self.network.device);
        Ok(OnDevice {
            ids: to(Tensor::f_from_slice(batch.ids)?)?.f_view([-1, seq])?,
            targets: to(Tensor::f_from_slice(&targets)?)?,
            weights: to(Tensor::f_from_slice(&weights)?)?,
        })
    }

    fn step(
        &mut self,
        units: &mut dyn Units<Tensors>,
        mut batch: OnDevice,
        scale: f64,
        weigh: Option<&mut Weigh>,
    ) -> fleet_learn::Result<()> {
        let len = batch.ids.size()[1] as usize;
        let frame = self.take_frame(len)?;
        let last_unit = self.network.wiring.layout.units.len() - 1;
        let mut saved: Vec<Saved> = Vec::with_capacity(last_unit);
        for unit in 0..last_unit {
            self.doing = Doing::Forward(unit);
            units.need(unit)?;
            let input = match saved.last() {
                None => batch.ids.shallow_clone(),
                Some(before) => before.output.f_detach().map_err(Error::from)?,
            };
            let keeps = unit == 0 || unit > self.again;
            saved.push(self.unit_forward(units.weights(), unit, input, keeps, &frame)?);
            units.release(unit);
        }
        self.doing = Doing::Head;
        self.head_units().try_for_each(|unit| units.need(unit))?;
        let (weights, grads) = units.numbers();
        let hidden = &saved[last_unit - 1].output;
        if let Some(weigh) = weigh {
            let counts = weigh(&self.sequence_losses(weights, hidden, &batch)?);
            batch.weights = self.spread(&batch, &counts)?;
        }
        let mut seed = self.head_step(weights, &grads, hidden, &batch, scale)?;
        self.head_units().for_each(|unit| units.release(unit));
        units.ready(last_unit)?;
        while let Some(mut kept) = saved.pop() {
            let unit = saved.len();
            self.doing = Doing::Backward(unit);
            units.need(unit)?;
            let (weights, grads) = units.numbers();
            if kept.leaves.is_none() {
                kept = self.unit_forward(weights, unit, kept.input, true, &frame)?;
            }
            let Saved { input, output, leaves } = kept;
            let given = seed.take().ok_or_else(|| Error::of("a unit has no part in the one after it"))?;
            // What the first unit reads are ids.
            let input = (unit > 0).then_some(&input);
            seed = self.unit_backward(&grads, (&output, &given), input, leaves.as_deref().unwrap_or(&[]))?;
            units.release(unit);
            units.ready(unit)?;
        }
        self.frame = Some((len, frame));
        Ok(())
    }

    /// The forward of the embedding or of a block for its `input`: ids, or what the unit before it gave. `keeps` its graph, or nothing of it.
    fn unit_forward(
        &self,
        weights: Weights,
        unit: usize,
        input: Tensor,
        keeps: bool,
        frame: &Frame,
    ) -> Result<Saved> {
        let _guard = (!keeps).then(tch::no_grad_guard);
        let input = if unit > 0 { input.set_requires_grad(keeps) } else { input };
        let mut leaves = Leaves::new(&self.network, weights, keeps);
        let output = match unit {
            0 => self.network.embed(&mut leaves, &input)?,
            _ => self.network.block(&mut leaves, unit - 1, &input, frame)?,
        };
        Ok(Saved { input, output, leaves: keeps.then(|| leaves.into_taken()) })
    }

    /// The gradients of a unit's parameters; what flows back to its input.
    fn unit_backward(
        &self,
        grads: &Gradients,
        (output, seed): (&Tensor, &Tensor),
        input: Option<&Tensor>,
        leaves: &[Leaf],
    ) -> Result<Option<Tensor>> {
        let inputs: Vec<&Tensor> = leaves.iter().map(|leaf| &leaf.tensor).chain(input).collect();
        let mut found = shim::grad(output, seed, &inputs)?;
        let input_grad = if input.is_some() { found.pop().flatten() } else { None };
        for (leaf, grad) in leaves.iter().zip(found) {
            grads.store(&leaf.range, grad.as_ref(), grads.fresh && !self.head_wrote(input, &leaf.range))?;
        }
        Ok(input_grad)
    }

    /// A head that is the embedding has written there already when the embedding's turn comes.
    fn head_wrote(&self, input: Option<&Tensor>, range: &Range<usize>) -> bool {
        let wiring = &self.network.wiring;
        input.is_none() && *range == wiring.embedding && wiring.layout.is_tied()
    }

    /// The head's forward and backward at once; what flows back to `x`, the last block's output.
    fn head_step(
        &mut self,
        weights: Weights,
        grads: &Gradients,
        x: &Tensor,
        batch: &OnDevice,
        scale: f64,
    ) -> Result<Option<Tensor>> {
        let input = x.f_detach()?.set_requires_grad(true);
        let mut leaves = Leaves::new(&self.network, weights, true);
        let last = self.network.last(&mut leaves, &input)?;
        let leaves = leaves.into_taken();
        let (loss, seed, _) = self.score(weights, Some((grads, scale)), &last, batch)?;
        self.add_loss(loss)?;
        self.unit_backward(grads, (&last, &seed), Some(&input), &leaves)
    }

    /// Of each sequence the summed loss of its targets, for `x`, the last block's output.
    fn sequence_losses(&self, weights: Weights, x: &Tensor, batch: &OnDevice) -> Result<Vec<f64>> {
        let _guard = tch::no_grad_guard();
        let last = self.network.last(&mut Leaves::new(&self.network, weights, false), &x.f_detach()?)?;
        let (matrix, bias) = self.head(weights)?;
        let read = last.f_view([-1, self.network.wiring.head.inputs as i64])?;
        let is_target = batch.weights.f_ne(0.0)?.f_to_kind(Kind::Float)?;
        let rows = self.logit_rows(read.size()[0]);
        let of_slice = |start: i64| {
            let cut = |tensor: &Tensor| tensor.f_narrow(0, start, rows.min(read.size()[0] - start));
            let logits = cut(&read)?.f_linear(&matrix, bias.as_ref())?;
            Ok(self.cross_entropy(logits, &cut(&batch.targets)?, &cut(&is_target)?, None)?.0)
        };
        let slices = (0..read.size()[0]).step_by(rows as usize).map(of_slice).collect::<Result<Vec<_>>>()?;
        let losses = Tensor::f_cat(&slices, 0)?.f_view(batch.ids.size().as_slice())?;
        let sums = losses.f_sum_dim_intlist([1i64].as_slice(), false, self.loss_kind())?;
        Ok(Vec::<f64>::try_from(sums.f_to_kind(Kind::Double)?)?)
    }

    /// What each target counts, where all of a sequence count alike.
    fn spread(&self, batch: &OnDevice, counts: &[f64]) -> Result<Tensor> {
        let counts: Vec<f32> = counts.iter().map(|count| *count as f32).collect();
        let of_sequences = device::to(&Tensor::f_from_slice(&counts)?, self.network.device)?;
        let is_target = batch.weights.f_ne(0.0)?.f_to_kind(Kind::Float)?.f_view(batch.ids.size().as_slice())?;
        Ok(is_target.f_mul(&of_sequences.f_unsqueeze(1)?)?.f_view([-1])?)
    }

    /// Tokens whose logits exist at once, of `tokens`.
    fn logit_rows(&self, tokens: i64) -> i64 {
        let rows = self.logits_max / self.network.wiring.head.outputs;
        (rows as i64).clamp(LOGIT_ROWS_MIN as i64, tokens.max(LOGIT_ROWS_MIN as i64))
    }

    fn add_loss(&mut self, loss: Tensor) -> Result<()> {
        self.loss = Some(match self.loss.take() {
            Some(sum) => sum.f_add(&loss)?,
            None => loss,
        });
        Ok(())
    }

    /// The summed loss and, with `grads`, the head's gradients for `scale` times it and what flows back to `last`, `[b, s, e]`; without them, how
    /// many targets are the likeliest token. Works in slices of tokens, so that logits never exist all at once.
    fn score(
        &self,
        weights: Weights,
        grads: Option<(&Gradients, f64)>,
        last: &Tensor,
        batch: &OnDevice,
    ) -> Result<(Tensor, Tensor, Tensor)> {
        let _guard = tch::no_grad_guard();
        let wiring = &self.network.wiring;
        let e = wiring.head.inputs as i64;
        let (matrix, bias) = self.head(weights)?;
        let x = last.f_detach()?.f_view([-1, e])?;
        let tokens = x.size()[0];
        let rows = self.logit_rows(tokens);
        let seed = x.f_empty_like()?;
        // Of a head whose gradients are kept in 16 bits, slices of tokens are added in fp32 and rounded once.
        let is_summed = self.network.numbers.kept != Kind::Float && rows < tokens;
        let mut sum: Option<Tensor> = None;
        let mut loss = Tensor::f_zeros([1], (self.loss_kind(), self.network.device))?;
        let mut hits = Tensor::f_zeros([1], (Kind::Int64, self.network.device))?;
        for start in (0..tokens).step_by(rows as usize) {
            let count = rows.min(tokens - start);
            let cut = |tensor: &Tensor| tensor.f_narrow(0, start, count);
            let (x, targets, counts) = (cut(&x)?, cut(&batch.targets)?, cut(&batch.weights)?);
            let logits = x.f_linear(&matrix, bias.as_ref())?;
            if grads.is_none() {
                let hit = logits.f_argmax(-1, false)?.f_eq_tensor(&targets)?;
                hits = hits.f_add(&hit.f_logical_and(&counts.f_gt(0.0)?)?.f_sum(Kind::Int64)?)?;
            }
            let scale = grads.map(|(_, scale)| scale);
            let (losses, flow) = self.cross_entropy(logits, &targets, &counts, scale)?;
            loss = loss.f_add(&losses.f_sum(self.loss_kind())?)?;
            let (Some((grads, _)), Some(flow)) = (grads, flow) else { continue };
            let _ = Tensor::f_matmul_out(&flow, &cut(&seed)?, &matrix)?;
            let set = grads.fresh && start == 0;
            let product = flow.f_transpose(0, 1)?.f_matmul(&x)?;
            match &mut sum {
                Some(sum) => sum.f_add_(&product).map(|_| ())?,
                None if is_summed => sum = Some(product.f_to_kind(Kind::Float)?),
                None => grads.store(&wiring.head.weight, Some(&product), set)?,
            }
            if let Some(range) = &wiring.head.bias {
                let sum = flow.f_sum_dim_intlist([0i64].as_slice(), false, Kind::Float)?;
                grads.store(range, Some(&sum), set)?;
            }
        }
        if let (Some((grads, _)), Some(sum)) = (grads, &sum) {
            grads.store(&wiring.head.weight, Some(sum), grads.fresh)?;
        }
        Ok((loss, seed.f_view(last.size().as_slice())?, hits))
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
    fn loss_kind(&self) -> Kind {
        if self.network.device == Device::Mps { Kind::Float } else { Kind::Double }
    }

    /// The summed loss alone, and how many targets are the likeliest token, as tensors of one number on the device.
    fn loss(
        &mut self,
        units: &mut dyn UnitWeights<Tensors>,
        batch: &OnDevice,
    ) -> fleet_learn::Result<(Tensor, Tensor)> {
        let _guard = tch::no_grad_guard();
        let len = batch.ids.size()[1] as usize;
        let frame = self.take_frame(len)?;
        let network = &self.network;
        units.need(0)?;
        let mut x = network.embed(&mut Leaves::new(network, units.weights(), false), &batch.ids)?;
        units.release(0);
        for number in 0..network.wiring.blocks.len() {
            units.need(number + 1)?;
            x = network.block(&mut Leaves::new(network, units.weights(), false), number, &x, &frame)?;
            units.release(number + 1);
        }
        self.head_units().try_for_each(|unit| units.need(unit))?;
        let weights = units.weights();
        let last = network.last(&mut Leaves::new(network, weights, false), &x)?;
        let (loss, _, hits) = self.score(weights, None, &last, batch)?;
        self.head_units().for_each(|unit| units.release(unit));
        self.frame = Some((len, frame));
        Ok((loss, hits))
    }

    /// What went wrong, with the part of the model and, where memory is short, what to do.
    fn explained(&self, error: fleet_learn::Error) -> fleet_learn::Error {
        let fleet_learn::Error::Environment(what) = error else { return error };
        let blocks = self.network.wiring.blocks.len();
        let unit = |unit: usize| match unit {
            0 => "the embedding".to_owned(),
            unit => format!("block {unit} of {blocks}"),
        };
        let part = match self.doing {
            Doing::Forward(number) => format!("the forward of {}", unit(number)),
            Doing::Backward(number) => format!("the backward of {}", unit(number)),
            Doing::Head => "the head".to_owned(),
        };
        let device = device::name(self.network.device);
        fleet_learn::Error::Environment(match device::memory_is_short(&what) {
            true => format!(
                "{device} has not enough memory for {part}: {}; lower batch_size and raise accumulate_grad_batches, or lower max_seq_len",
                what.split(". ").take(2).collect::<Vec<_>>().join(". ").trim_end_matches('.')
            ),
            false => format!("{device} failed in {part}: {what}"),
        })
    }
}

impl Executor<Tensors> for TorchExecutor {
    fn layout(&self) -> &Layout {
        &self.network.wiring.layout
    }

    fn name(&self) -> &'static str {
        "torch"
    }

    fn device(&self) -> String {
        device::name(self.network.device)
    }

    fn describe(&self) -> String {
        let kind = match (self.network.numbers.kept, self.network.numbers.products) {
            (Kind::BFloat16, _) => "everything in bf16,",
            (_, Kind::BFloat16) => "bf16",
            (_, Kind::Half) => "fp16",
            _ => "fp32",
        };
        let own = match (&self.network.fused, &self.unfused) {
            (Some(_), _) => ", with fused kernels",
            (None, Some(why)) => &format!(", without fused kernels: {why}"),
            (None, None) => "",
        };
        let slow = match (self.network.device.is_cuda(), self.network.numbers.products) {
            (true, Kind::Float) => " (several times slower there than with precision = \"bf16-mixed\")",
            _ => "",
        };
        format!("{kind} products by libtorch on {}{slow}{own}", device::describe(self.network.device))
    }

    fn forward_weigh_backward(
        &mut self,
        units: &mut dyn Units<Tensors>,
        batch: &Batch,
        scale: f32,
        weigh: Option<&mut Weigh>,
    ) -> fleet_learn::Result<()> {
        self.doing = Doing::Forward(0);
        let result = self.on_device(batch).map_err(Into::into);
        let result = result.and_then(|batch| self.step(units, batch, f64::from(scale), weigh));
        result.map_err(|error| self.explained(error))
    }

    fn take_loss(&mut self) -> fleet_learn::Result<Tensor> {
        match self.loss.take() {
            Some(loss) => Ok(loss),
            None => Ok(Tensor::f_zeros([1], (self.loss_kind(), self.network.device)).map_err(Error::from)?),
        }
    }

    /// One sequence at a time: only an adapter has a base, and those this executor does not train.
    fn losses(
        &mut self,
        units: &mut dyn UnitWeights<Tensors>,
        batch: &Batch,
        _which: Which,
    ) -> fleet_learn::Result<Vec<f64>> {
        let padded = batch.padded();
        let (ids, targets) = (padded.ids.chunks(padded.seq), padded.targets.chunks(padded.seq));
        let one = |(ids, targets)| Batch { ids, targets, seq: padded.seq, ..Batch::default() };
        ids.zip(targets).map(|both| Ok(self.evaluate(units, &one(both))?.loss)).collect()
    }

    fn evaluate(
        &mut self,
        units: &mut dyn UnitWeights<Tensors>,
        batch: &Batch,
    ) -> fleet_learn::Result<Tally> {
        self.doing = Doing::Forward(0);
        let result = self.on_device(batch).map_err(Into::into);
        let result = result.and_then(|batch| {
            let (loss, hits) = self.loss(units, &batch)?;
            let hits = i64::try_from(&hits).map_err(Error::from)?;
            Ok((f64::try_from(&loss).map_err(Error::from)?, hits))
        });
        let (loss, hits) = result.map_err(|error: fleet_learn::Error| self.explained(error))?;
        Ok(Tally { loss, weight: batch.weight(), tokens: batch.tokens(), hits: hits as u64 })
    }
}
