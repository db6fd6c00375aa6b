//! Weights, gradients and optimizer state of one rank, and the optimizer step that all ranks take together.
//!
//! Data-parallel: every rank computes gradients of its part of the global batch; a unit's gradients are reduced as soon as they are
//! complete. Master weights, their bf16 copy and the optimizer state lie once on the host; each rank updates its part of every unit, so all
//! ranks hold the same weights because they are the same memory.

use crate::error::{Error, Result};
use crate::model::{Model, init};
use crate::shim::buffers::{Gradients, SharedSlice, as_bytes};
use fleet_checkpoint::{Dtype, ModelDir, TensorRef, Tensors, stored, stored_shape};
use fleet_collectives::{Activity, Collective, DType, Keep, Op, Solo, part};
use fleet_common::model::{Layout, Parameter};
use fleet_cpu::{Batch, Cache, Loss, Network, Products, Sink, Storage, Weights, Workers, Workspace};
use fleet_kernels::{self as kernels, AdamWStep};
use half::bf16;
use std::borrow::Cow;
use std::ops::Range;
use std::path::Path;

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

/// What all ranks know after a step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Report {
    /// Mean over the tokens of the global batch, in nats.
    pub loss: f64,
    /// Before clipping.
    pub grad_norm: f64,
    /// Of any rank.
    pub votes: Votes,
}

/// Why a rank wants to end the run after this step.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Votes {
    /// It was asked to.
    pub stop: bool,
    /// The time limit is over.
    pub time: bool,
}

pub struct Engine<E> {
    model: Network,
    products: Products,
    work: Workspace<E>,
    collective: Box<dyn Collective>,
    master: SharedSlice<f32>,
    /// What products read under bf16-mixed; empty in fp32.
    copy: SharedSlice<bf16>,
    moment1: SharedSlice<f32>,
    moment2: SharedSlice<f32>,
    grads: Gradients,
}

impl<E: Storage> Engine<E> {
    /// Takes the memory; the weights are zero until `fresh_weights` or `load_weights`. A collective call.
    pub fn new(model: Network, workers: Workers, mut collective: Box<dyn Collective>) -> Result<Self> {
        collective.note(Activity::Starting);
        let len = model.layout.len;
        let master = SharedSlice::new(collective.allocate_common(len * 4)?);
        let moment1 = SharedSlice::new(collective.allocate_common(len * 4)?);
        let moment2 = SharedSlice::new(collective.allocate_common(len * 4)?);
        let copy = SharedSlice::new(collective.allocate_common(if E::IS_BF16 { len * 2 } else { 0 })?);
        let grads = Gradients::new(collective.allocate_per_rank(len * 4)?);
        let products = Products::new(workers);
        Ok(Self {
            model,
            products,
            work: Workspace::new(),
            collective,
            master,
            copy,
            moment1,
            moment2,
            grads,
        })
    }

    /// A model directory on one rank, for sequences of at most `positions` tokens (`None`: as many as the model was made for).
    pub fn open(dir: &Path, threads: u32, positions: Option<usize>) -> Result<Self> {
        let model = Model::read(dir)?;
        let positions = positions.unwrap_or(model.decoder.max_positions);
        let workers = Workers::new(threads)
            .map_err(|e| Error::Environment(format!("cannot start {threads} threads: {e}")))?;
        let mut engine = Self::new(model.network(positions), workers, Box::new(Solo::new(0)))?;
        engine.load_weights(dir)?;
        Ok(engine)
    }

    pub fn model(&self) -> &Network {
        &self.model
    }

    pub fn products(&self) -> &Products {
        &self.products
    }

    pub fn collective(&mut self) -> &mut dyn Collective {
        &mut *self.collective
    }

    /// The flat parameters, to be read between two steps.
    pub fn weights(&self) -> &[f32] {
        self.master.all()
    }

    /// Weights that hang on `seed` alone.
    pub fn fresh_weights(&mut self, seed: u64) -> Result<()> {
        self.fill_parts(|model, range, out| {
            for p in &model.layout.parameters {
                init::fill(p, range.clone(), seed, out, range.start);
            }
            Ok(())
        })
    }

    /// The weights of a model directory or of a checkpoint. Each rank looks whether its part of them are numbers.
    pub fn load_weights(&mut self, dir: &Path) -> Result<()> {
        let given = ModelDir::open(dir)?;
        let shapes = |layout: &Layout| -> Vec<(String, Vec<usize>)> {
            layout.parameters.iter().map(|p| (p.name.clone(), p.shape.clone())).collect()
        };
        if shapes(&given.layout) != shapes(&self.model.layout) {
            return Err(Error::Input(format!(
                "{}: these are the weights of another model than the job's; set model.path to this directory, or use other weights",
                dir.display()
            )));
        }
        self.fill_parts(|model, range, out| {
            for p in &model.layout.parameters {
                if !kernels::all_finite(given.read_part(p, &range, out)) {
                    return Err(Error::Input(format!(
                        "{}: {} holds values that are NaN or infinite; restore the weights, or use an older checkpoint",
                        dir.display(),
                        p.name
                    )));
                }
            }
            Ok(())
        })
    }

    /// The optimizer state of a checkpoint.
    pub fn load_optimizer(&mut self, dir: &Path) -> Result<()> {
        let tensors = Tensors::open(&dir.join(fleet_checkpoint::OPTIMIZER_FILE))?;
        let parts = self.own_parts();
        for (slot, moment) in [(MOMENT1, &mut self.moment1), (MOMENT2, &mut self.moment2)] {
            for p in &self.model.layout.parameters {
                let name = moment_name(&p.name, slot);
                let tensor =
                    tensors.get(&name).filter(|t| t.shape == p.shape && t.dtype == Dtype::F32).ok_or_else(
                        || Error::Input(format!("{}: the optimizer state lacks {name}", dir.display())),
                    )?;
                for range in &parts {
                    copy_moments(tensor.data, &p.range, range, moment.part_mut(range.clone()));
                }
            }
        }
        self.collective.barrier()?;
        Ok(())
    }

    /// Calls `fill` for every part that this rank updates, and lets all ranks see the result.
    fn fill_parts(&mut self, fill: impl Fn(&Network, Range<usize>, &mut [f32]) -> Result<()>) -> Result<()> {
        for range in self.own_parts() {
            let out = self.master.part_mut(range.clone());
            fill(&self.model, range.clone(), out)?;
            if E::IS_BF16 {
                kernels::convert(out, self.copy.part_mut(range));
            }
        }
        self.collective.barrier()?;
        Ok(())
    }

    /// This rank's part of each unit, in elements of the flat buffer.
    fn own_parts(&self) -> Vec<Range<usize>> {
        let (rank, world) = (self.collective.rank(), self.collective.world_size());
        self.model
            .layout
            .units
            .iter()
            .map(|unit| part_of(unit, rank, world))
            .filter(|part| !part.is_empty())
            .collect()
    }

    /// One optimizer step over `micro_batches`, this rank's share of the global batch, which has `global_tokens` targets on all ranks.
    /// `step` counts from 1. `votes` are this rank's.
    pub fn step<'b>(
        &mut self,
        micro_batches: impl ExactSizeIterator<Item = Batch<'b>>,
        global_tokens: u64,
        adamw: &AdamW,
        lr: f64,
        step: u64,
        votes: Votes,
    ) -> Result<Report> {
        self.collective.note(Activity::Forward);
        let scale = 1.0 / global_tokens as f32;
        let last = micro_batches.len() - 1;
        let mut loss = Loss::default();
        for (micro, batch) in micro_batches.enumerate() {
            let mut sink = Reducing {
                grads: &mut self.grads,
                collective: &mut *self.collective,
                fresh: micro == 0,
                complete: micro == last,
            };
            let weights = Weights::<E>::new(self.master.all(), self.copy.all());
            loss.add(self.model.forward_backward(
                weights,
                batch,
                scale,
                &mut self.products,
                &mut self.work,
                &mut sink,
            )?);
        }
        self.collective.finish()?;
        self.collective.note(Activity::Optimizer);

        let parts = self.own_parts();
        let squares: f64 =
            parts.iter().map(|part| kernels::sum_squares(self.grads.range_mut(part.clone()))).sum();
        let [stop, time] = [votes.stop, votes.time].map(|vote| f64::from(u8::from(vote)));
        let mut sums = [squares, loss.sum, stop, time];
        self.collective.all_reduce_f64(&mut sums, Op::Sum)?;
        let votes = Votes { stop: sums[2] > 0.0, time: sums[3] > 0.0 };
        let report = Report { loss: sums[1] / global_tokens as f64, grad_norm: sums[0].sqrt(), votes };
        if !report.loss.is_finite() || !report.grad_norm.is_finite() {
            let what = if report.loss.is_finite() { "gradient norm" } else { "loss" };
            return Err(Error::Job(format!(
                "the {what} became {} at step {step}; lower learning_rate, raise warmup_steps, or look at the data of that step",
                if report.loss.is_finite() { report.grad_norm } else { report.loss }
            )));
        }
        self.update(&parts, adamw, lr, step, report.grad_norm);
        self.collective.barrier()?;
        Ok(report)
    }

    fn update(&mut self, parts: &[Range<usize>], adamw: &AdamW, lr: f64, step: u64, norm: f64) {
        let clip =
            if adamw.max_grad_norm > 0.0 { (adamw.max_grad_norm / (norm + CLIP_EPS)).min(1.0) } else { 1.0 };
        for parameter in &self.model.layout.parameters {
            let update = AdamWStep {
                lr,
                beta1: adamw.beta1,
                beta2: adamw.beta2,
                eps: adamw.eps,
                weight_decay: if parameter.role.is_vector() { 0.0 } else { adamw.weight_decay },
                step,
                grad_scale: clip as f32,
            };
            for part in parts {
                let range = part.start.max(parameter.range.start)..part.end.min(parameter.range.end);
                if range.is_empty() {
                    continue;
                }
                let workers = self.products.workers();
                let share = workers.share(range.len(), 4096);
                let p = self.master.part_mut(range.clone()).chunks_mut(share);
                let m = self.moment1.part_mut(range.clone()).chunks_mut(share);
                let v = self.moment2.part_mut(range.clone()).chunks_mut(share);
                let g = self.grads.range_mut(range.clone()).chunks(share);
                let slices = p.zip(g).zip(m).zip(v);
                if E::IS_BF16 {
                    let copy = self.copy.part_mut(range).chunks_mut(share);
                    workers.each(slices.zip(copy), |((((p, g), m), v), c)| {
                        kernels::adamw(&update, p, g, m, v, Some(c))
                    });
                } else {
                    workers.each(slices, |(((p, g), m), v)| kernels::adamw(&update, p, g, m, v, None));
                }
            }
        }
    }

    /// Loss over the batches of all ranks. A collective call; a rank may have no batch.
    pub fn evaluate<'b>(&mut self, batches: impl Iterator<Item = Batch<'b>>) -> Result<Loss> {
        self.collective.note(Activity::Evaluating);
        let mut loss = Loss::default();
        for batch in batches {
            loss.add(self.loss(batch));
        }
        self.sum_loss(loss)
    }

    /// Loss of one batch on this rank.
    pub fn loss(&mut self, batch: Batch) -> Loss {
        let weights = Weights::<E>::new(self.master.all(), self.copy.all());
        self.model.loss(weights, batch, &mut self.products, &mut self.work)
    }

    /// The loss of all ranks together. A collective call.
    pub fn sum_loss(&mut self, loss: Loss) -> Result<Loss> {
        let mut sums = [loss.sum, loss.tokens as f64];
        self.collective.all_reduce_f64(&mut sums, Op::Sum)?;
        Ok(Loss { sum: sums[0], tokens: sums[1] as u64 })
    }

    /// `[t, v]` logits of whole sequences of `seq` tokens.
    pub fn logits(&mut self, ids: &[i64], seq: usize) -> Vec<f32> {
        let weights = Weights::<E>::new(self.master.all(), self.copy.all());
        self.model.logits(weights, ids, seq, &mut self.products, &mut self.work)
    }

    /// Runs a prompt; `[v]` logits of the token after it.
    pub fn prefill(&mut self, ids: &[i64], cache: &mut Cache<E>) -> Vec<f32> {
        let weights = Weights::<E>::new(self.master.all(), self.copy.all());
        self.model.prefill(weights, ids, cache, &mut self.products, &mut self.work)
    }

    /// `[v]` logits of the token after `id`.
    pub fn decode(&mut self, id: i64, cache: &mut Cache<E>) -> Vec<f32> {
        let weights = Weights::<E>::new(self.master.all(), self.copy.all());
        self.model.decode(weights, id, cache, &mut self.products, &mut self.work)
    }

    /// Weights as the files of the family have them, for writing.
    pub fn stored_weights(&self) -> StoredWeights<'_> {
        let parameters = &self.model.layout.parameters;
        StoredWeights(parameters.iter().map(|p| (p, stored_shape(p), stored(p, self.master.all()))).collect())
    }

    /// Optimizer state, for writing: names from `moment_names`, in that order.
    pub fn moment_refs<'a>(&'a self, names: &'a [String]) -> Vec<TensorRef<'a>> {
        let of = |moment: &'a SharedSlice<f32>| {
            let parameters = self.model.layout.parameters.iter();
            parameters.map(move |p| (&p.shape, as_bytes(&moment.all()[p.range.clone()])))
        };
        let both = [&self.moment1, &self.moment2].into_iter().flat_map(of);
        both.zip(names).map(|((shape, data), name)| TensorRef { name, dtype: Dtype::F32, shape, data }).collect()
    }

    pub fn moment_names(&self) -> Vec<String> {
        let of = |slot| self.model.layout.parameters.iter().map(move |p| moment_name(&p.name, slot));
        of(MOMENT1).chain(of(MOMENT2)).collect()
    }
}

/// Weights on their way to a file: views, or copies where the file has them otherwise.
pub struct StoredWeights<'a>(Vec<(&'a Parameter, Vec<usize>, Cow<'a, [f32]>)>);

impl StoredWeights<'_> {
    pub fn refs(&self) -> Vec<TensorRef<'_>> {
        self.0
            .iter()
            .map(|(p, shape, data)| TensorRef { name: &p.name, dtype: Dtype::F32, shape, data: as_bytes(data) })
            .collect()
    }
}

/// What of a parameter's moments lies in `range`, into `out`, which covers it.
fn copy_moments(bytes: &[u8], parameter: &Range<usize>, range: &Range<usize>, out: &mut [f32]) {
    let (begin, end) = (range.start.max(parameter.start), range.end.min(parameter.end));
    if begin < end {
        let bytes = &bytes[4 * (begin - parameter.start)..4 * (end - parameter.start)];
        let out = &mut out[begin - range.start..end - range.start];
        out.iter_mut().zip(bytes.as_chunks::<4>().0).for_each(|(x, b)| *x = f32::from_le_bytes(*b));
    }
}

/// PyTorch's names.
const MOMENT1: &str = "exp_avg";
const MOMENT2: &str = "exp_avg_sq";

fn moment_name(parameter: &str, slot: &str) -> String {
    format!("{parameter}.{slot}")
}

/// The part of `unit` that `rank` reduces and updates.
fn part_of(unit: &Range<usize>, rank: usize, world: usize) -> Range<usize> {
    let within = part(unit.len(), rank, world);
    unit.start + within.start..unit.start + within.end
}

/// Gradients that are handed to the peers unit by unit.
struct Reducing<'a> {
    grads: &'a mut Gradients,
    collective: &'a mut dyn Collective,
    fresh: bool,
    /// This is the last micro-batch.
    complete: bool,
}

impl Sink for Reducing<'_> {
    type Error = Error;

    fn range(&mut self, range: Range<usize>) -> &mut [f32] {
        self.grads.range_mut(range)
    }

    fn fresh(&self) -> bool {
        self.fresh
    }

    fn unit_done(&mut self, unit: &Range<usize>) -> Result<()> {
        if !self.complete {
            return Ok(());
        }
        self.collective.note(Activity::Backward);
        let bytes = unit.start * 4..unit.end * 4;
        self.collective.post_reduce(self.grads.memory(), bytes, DType::F32, Op::Sum, Keep::MyPart)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests;
