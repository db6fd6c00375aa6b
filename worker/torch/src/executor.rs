//! Forward and backward of a whole decoder, unit by unit: a unit's graph lives from its forward to its backward, and its gradients are
//! complete when its turn is over, while the units before it still wait.

use crate::adapter::{Beside, View};
use crate::base::Base;
use crate::dropout::Rows;
use crate::head::{Scored, Sought};
use crate::memory::{Gradients, Tensors, Weights, copy_out};
use crate::needs::LOGITS_MAX;
use crate::neftune::Moving;
use crate::network::{Frame, Leaf, Leaves, Network, Numbers};
use crate::{Error, Result, device, fused, shim};
use fleet_common::model::{Decoder, Layout, Wiring};
use fleet_learn::{Batch, Executor, IGNORED, Tally, TokenBatch, UnitWeights, Units, Weigh, Which};
use std::ops::Range;
use tch::{Device, Kind, Tensor};

/// Computes; owns activations for as long as a step, never weights.
pub struct TorchExecutor {
    pub network: Network,
    /// What is not trained, where an adapter is.
    base: Option<Base>,
    /// Most numbers of logits that exist at once.
    pub(crate) logits_max: usize,
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
pub(crate) struct OnDevice {
    pub ids: Tensor,
    /// `[b * s]`.
    pub targets: Tensor,
    /// `[b * s]` in fp32: what each target counts; zero where there is none.
    pub weights: Tensor,
    /// `[b]`, on the host: what decides what of each sequence is dropped, if anything is.
    noise: Option<Vec<u64>>,
    /// `[b]`, without what makes them a rectangle.
    lengths: Vec<usize>,
    /// How far embeddings of sequences with noise are moved.
    neftune: f32,
}

impl OnDevice {
    /// `[b * s]`: what each target counts, where all of a sequence count alike.
    fn spread(&self, counts: &[f64]) -> Result<Tensor> {
        let counts: Vec<f32> = counts.iter().map(|count| *count as f32).collect();
        let counts = device::to(&Tensor::f_from_slice(&counts)?, self.weights.device())?.f_unsqueeze(1)?;
        let is_target = self.weights.f_ne(0.0)?.f_to_kind(Kind::Float)?.f_view(self.ids.size().as_slice())?;
        Ok(is_target.f_mul(&counts)?.f_view([-1])?)
    }
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
        TorchExecutor { network, base: None, logits_max, frame: None, again: 0, loss: None, doing, unfused }
    }

    /// Trains an adapter beside a model that stays as it is.
    pub fn beside(mut self, base: Base) -> TorchExecutor {
        self.base = Some(base);
        self
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
        let mut leaves = Leaves::new(network, self.view(weights, Which::Trained, None), false);
        let mut x = network.embed(&mut leaves, ids)?;
        for number in 0..network.wiring.blocks.len() {
            x = network.block(&mut leaves, number, &x, &frame)?;
        }
        let last = network.last(&mut leaves, &x)?;
        let logits = leaves.linear(&last, &network.wiring.head)?;
        self.frame = Some((len, frame));
        Ok(logits)
    }

    /// What a pass over a batch reads.
    fn view<'a>(&'a self, weights: Weights<'a>, which: Which, batch: Option<&'a OnDevice>) -> View<'a> {
        let is_on = which == Which::Trained;
        let rows = batch.filter(|_| is_on).and_then(|batch| {
            let seq = batch.ids.size()[1] as usize;
            Some(Rows { noise: batch.noise.as_deref()?, seq, first: 0 })
        });
        let moving = batch.filter(|batch| is_on && batch.neftune > 0.0).and_then(|batch| {
            Some(Moving { noise: batch.noise.as_deref()?, lengths: &batch.lengths, alpha: batch.neftune })
        });
        View { weights, beside: self.base.as_ref().map(|base| Beside { base, is_on, rows }), moving }
    }

    /// The first unit of which anything is trained.
    fn lowest(&self) -> usize {
        self.base.as_ref().map_or(0, |base| base.trained.lowest())
    }

    fn on_device(&self, batch: &Batch) -> Result<OnDevice> {
        let lengths = batch.sequence_lengths().collect();
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
            noise: batch.noise.map(<[u64]>::to_vec),
            lengths,
            neftune: batch.neftune,
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
        let lowest = self.lowest();
        let mut saved: Vec<Saved> = Vec::with_capacity(last_unit);
        let mut x = batch.ids.shallow_clone();
        for unit in 0..last_unit {
            self.doing = Doing::Forward(unit);
            units.need(unit)?;
            let keeps = unit >= lowest && (unit == 0 || unit > self.again);
            let view = self.view(units.weights(), Which::Trained, Some(&batch));
            let one = self.unit_forward(view, unit, x, keeps, &frame)?;
            units.release(unit);
            x = one.output.f_detach().map_err(Error::from)?;
            if unit >= lowest {
                saved.push(one);
            }
        }
        self.doing = Doing::Head;
        self.head_units().try_for_each(|unit| units.need(unit))?;
        let (weights, grads) = units.numbers();
        if let Some(weigh) = weigh {
            let view = self.view(weights, Which::Trained, Some(&batch));
            let last = self.network.last(&mut Leaves::new(&self.network, view, false), &x)?;
            let losses = self.score(view, Sought::Losses, &last, &batch)?.losses;
            batch.weights = batch.spread(&weigh(&self.of_sequences(&losses, len)?))?;
        }
        let view = self.view(weights, Which::Trained, Some(&batch));
        let (loss, mut seed) = self.head_step(view, &grads, &x, &batch, scale)?;
        drop(x);
        self.add_loss(loss)?;
        self.head_units().for_each(|unit| units.release(unit));
        units.ready(last_unit)?;
        for unit in (0..last_unit).rev() {
            self.doing = Doing::Backward(unit);
            let Some(mut kept) = saved.pop() else {
                units.ready(unit)?;
                continue;
            };
            units.need(unit)?;
            let (weights, grads) = units.numbers();
            if kept.leaves.is_none() {
                let view = self.view(weights, Which::Trained, Some(&batch));
                kept = self.unit_forward(view, unit, kept.input, true, &frame)?;
            }
            let Saved { input, output, leaves } = kept;
            let given = seed.take().ok_or_else(|| Error::of("a unit has no part in the one after it"))?;
            // Below it nothing is trained, and what the first unit reads are ids.
            let input = (unit > lowest).then_some(&input);
            seed = self.unit_backward(&grads, (&output, &given), input, leaves.as_deref().unwrap_or(&[]))?;
            units.release(unit);
            units.ready(unit)?;
        }
        self.frame = Some((len, frame));
        Ok(())
    }

    /// The sums of each sequence's `losses`, `[b * s]`.
    fn of_sequences(&self, losses: &Tensor, seq: usize) -> Result<Vec<f64>> {
        let each = losses.f_view([-1, seq as i64])?;
        let sums = each.f_sum_dim_intlist([1].as_slice(), false, self.loss_kind())?;
        Ok(Vec::<f64>::try_from(&sums.f_to_device(Device::Cpu)?.f_to_kind(Kind::Double)?)?)
    }

    fn add_loss(&mut self, loss: Tensor) -> Result<()> {
        self.loss = Some(match self.loss.take() {
            Some(sum) => sum.f_add(&loss)?,
            None => loss,
        });
        Ok(())
    }

    /// The forward of the embedding or of a block for its `input`: ids, or what the unit before it gave. `keeps` its graph, or nothing of it.
    fn unit_forward(
        &self,
        view: View,
        unit: usize,
        input: Tensor,
        keeps: bool,
        frame: &Frame,
    ) -> Result<Saved> {
        let _guard = (!keeps).then(tch::no_grad_guard);
        let input = if unit > self.lowest() { input.set_requires_grad(keeps) } else { input };
        let mut leaves = Leaves::new(&self.network, view, keeps);
        let output = match unit {
            0 => self.network.embed(&mut leaves, &input)?,
            _ => self.network.block(&mut leaves, unit - 1, &input, frame)?,
        };
        Ok(Saved { input, output, leaves: keeps.then(|| leaves.into_taken()) })
    }

    /// The gradients of a unit's parameters; what flows back to its input.
    pub(crate) fn unit_backward(
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
        input.is_none() && self.layout().is_tied() && *range == self.network.wiring.embedding
    }

    /// A pass without gradients.
    fn scored(
        &mut self,
        units: &mut dyn UnitWeights<Tensors>,
        batch: &Batch,
        which: Which,
        sought: Sought,
    ) -> fleet_learn::Result<Scored> {
        let _guard = tch::no_grad_guard();
        self.doing = Doing::Forward(0);
        let batch = &self.on_device(batch)?;
        let len = batch.ids.size()[1] as usize;
        let frame = self.take_frame(len)?;
        let mut x = batch.ids.shallow_clone();
        for unit in 0..=self.network.wiring.blocks.len() {
            self.doing = Doing::Forward(unit);
            units.need(unit)?;
            let view = self.view(units.weights(), which, Some(batch));
            x = self.unit_forward(view, unit, x, false, &frame)?.output;
            units.release(unit);
        }
        self.doing = Doing::Head;
        self.head_units().try_for_each(|unit| units.need(unit))?;
        let view = self.view(units.weights(), which, Some(batch));
        let last = self.network.last(&mut Leaves::new(&self.network, view, false), &x)?;
        let scored = self.score(view, sought, &last, batch)?;
        self.head_units().for_each(|unit| units.release(unit));
        self.frame = Some((len, frame));
        Ok(scored)
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
        self.base.as_ref().map_or(&self.network.wiring.layout, |base| &base.trained.layout)
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

    fn losses(
        &mut self,
        units: &mut dyn UnitWeights<Tensors>,
        batch: &Batch,
        which: Which,
    ) -> fleet_learn::Result<Vec<f64>> {
        let result = self
            .scored(units, &Batch { weights: None, ..*batch }, which, Sought::Losses)
            .and_then(|scored| Ok(self.of_sequences(&scored.losses, batch.seq)?));
        result.map_err(|error| self.explained(error))
    }

    fn row_lengths(&self, weight: &Range<usize>, first: usize, out: &mut [f32]) {
        let base = self.base.as_ref().expect("an adapter is trained beside a model");
        let p = self.network.wiring.layout.parameters.iter().find(|p| p.range == *weight);
        let lengths = base.lengths(weight, p.expect("a matrix of the model").shape[1]);
        let some = lengths.and_then(|lengths| copy_out(&lengths, first, out));
        some.expect("a matrix of the model is read");
    }

    fn evaluate(
        &mut self,
        units: &mut dyn UnitWeights<Tensors>,
        batch: &Batch,
    ) -> fleet_learn::Result<Tally> {
        let quiet = Batch { noise: None, ..*batch };
        let result = self.scored(units, &quiet, Which::Trained, Sought::Hits).and_then(|scored| {
            let loss = scored.losses.f_sum(self.loss_kind()).and_then(|loss| f64::try_from(&loss));
            let hits = i64::try_from(&scored.hits);
            Ok((loss.map_err(Error::from)?, hits.map_err(Error::from)?))
        });
        let (loss, hits) = result.map_err(|error| self.explained(error))?;
        Ok(Tally { loss, weight: batch.weight(), tokens: batch.tokens(), hits: hits as u64 })
    }
}
