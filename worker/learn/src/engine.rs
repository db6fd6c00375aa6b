//! An executor and a strategy, put together: weights in and out, a step, an evaluation.

use crate::adapter::{ADAPTER_MODEL, AdapterFile, MAGNITUDE, plain_name};
use crate::batch::TokenBatch;
use crate::error::{Error, Result};
use crate::executor::{Executor, Tally, Weigh, Which};
use crate::model::{Model, init};
use crate::objective::Weighing;
use crate::optimizer::Update;
use crate::reached::Reached;
use crate::scaler::Scaler;
use crate::snapshot::{MOMENTS, Share, Snapshot, moment_name};
use crate::stopwatch::{Phase, Stopwatch};
use crate::strategy::{Micro, Report, Slot, Strategy, Votes};
use crate::suspects;
use crate::timed::Pass;
use crate::units::{Memory, Units};
use crate::watched::Watched;
use fleet_checkpoint::{Disks, Dtype, LossScale, ModelDir, Reading, Tensor, Tensors};
use fleet_collectives::{Activity, Gang, Op};
use fleet_common::model::{Fresh, Layout, Parameter, Role};
use fleet_kernels::all_finite;
use std::borrow::Cow;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// All that the trainer sees of a model, of what computes it, and of the ranks that train it together.
pub trait Learner {
    fn layout(&self) -> &Layout;
    /// As `executor` in a job names it.
    fn executor(&self) -> &'static str;
    /// As `device` in a job names it.
    fn device(&self) -> String;
    /// For the log: with what is computed.
    fn describe(&self) -> String;
    /// The ranks that train together.
    fn gang(&mut self) -> &mut dyn Gang;
    /// Is told by the steps what they do.
    fn watch(&self) -> &Stopwatch;

    /// Weights that hang on `seed` alone; of an adapter such that it changes nothing.
    fn fresh_weights(&mut self, seed: u64) -> Result<()>;
    /// The weights of a model directory or of a checkpoint.
    fn load_weights(&mut self, dir: &Path) -> Result<()>;
    /// The optimizer state of a checkpoint.
    fn load_optimizer(&mut self, dir: &Path) -> Result<()>;

    /// One step of the optimizer over `micro_batches`, this rank's share of the global batch. `votes` are this rank's. The loss is that for
    /// each target that counts, over all ranks.
    fn step(&mut self, micro_batches: &[TokenBatch], update: &Update, votes: Votes) -> Result<Report> {
        self.weighed_step(micro_batches, None, update, votes)
    }
    /// The same. What targets count is asked of `weigh`, where there is one, as soon as the losses of a micro-batch are known.
    fn weighed_step(
        &mut self,
        micro_batches: &[TokenBatch],
        weigh: Option<&mut dyn Weighing>,
        update: &Update,
        votes: Votes,
    ) -> Result<Report>;
    /// What to tell of parameters that no gradient of the first step has reached; once, behind it.
    fn without_gradient(&mut self) -> Option<String>;
    /// Of each sequence of this rank's batches the summed loss of its targets. A rank may have no batch. A collective call.
    fn losses(&mut self, batches: &[TokenBatch], which: Which) -> Result<Vec<Vec<f64>>>;
    /// The sums over the batches of all ranks. A rank may have no batch.
    fn evaluate(&mut self, batches: &[TokenBatch]) -> Result<Tally>;

    /// By how much losses are scaled, where they are.
    fn loss_scale(&self) -> Option<LossScale>;
    /// Goes on from a checkpoint's; nothing where losses are not scaled.
    fn set_loss_scale(&mut self, scale: LossScale);

    /// How weights and moments are kept and written: F32 or BF16.
    fn dtype(&self) -> Dtype;
    /// Who keeps which numbers, as a checkpoint names it.
    fn strategy(&self) -> &'static str;
    /// Ranks that write checkpoints to these disks, the first ones.
    fn writers(&mut self, disks: &Disks) -> usize;
    /// Memory for what this rank, one of the writers, writes of a checkpoint to these disks.
    fn room(&mut self, disks: &Disks) -> Result<Snapshot>;
    /// Copies that, into `room` where there is some. A collective call of all writers.
    fn snapshot(&mut self, disks: &Disks, room: Option<Snapshot>) -> Result<Snapshot>;
}

const NOT_SCALED: LossScale = LossScale { scale: 1.0, good_steps: 0, skipped: 0 };

pub struct Engine<M> {
    executor: Box<dyn Executor<M>>,
    strategy: Box<dyn Strategy<M>>,
    layout: Layout,
    watch: Stopwatch,
    /// Until a step has changed weights.
    reached: Option<Reached>,
    without_gradient: Option<String>,
    /// Where products are in fp16.
    scaler: Option<Scaler>,
    /// That read weights and optimizer state.
    readers: usize,
    /// The model beside which an adapter is trained, whose weights are one file.
    beside: Option<PathBuf>,
}

/// Weights of what is trained, in a directory.
enum Given {
    Model(Box<ModelDir>),
    Adapter(Box<AdapterFile>),
}

impl Given {
    fn read_part<'a>(
        &'a self,
        p: &'a Parameter,
        first: usize,
        out: &'a mut [f32],
        reading: &mut Reading<'a>,
    ) {
        match self {
            Given::Model(dir) => dir.read_part(p, first, out, reading),
            Given::Adapter(file) => file.read_part(p, first, out, reading),
        }
    }
}

impl<M: Memory> Engine<M> {
    pub fn new(executor: impl Executor<M> + 'static, strategy: impl Strategy<M> + 'static) -> Engine<M> {
        let layout = executor.layout().clone();
        Engine {
            executor: Box::new(executor),
            strategy: Box::new(strategy),
            watch: Stopwatch::default(),
            reached: Some(Reached::new(&layout)),
            without_gradient: None,
            layout,
            scaler: None,
            readers: 1,
            beside: None,
        }
    }

    /// Trains this model, or the adapter that is beside it.
    pub fn of(self, model: &Model) -> Engine<M> {
        Engine { beside: model.adapter.as_ref().map(|adapter| adapter.base.clone()), ..self }
    }

    /// How many passes all ranks make where they have to make as many, with so many batches on this one. A collective call.
    fn passes(&mut self, batches: usize) -> Result<usize> {
        let mut most = [batches as f64];
        if self.strategy.passes_together() {
            self.strategy.gang().all_reduce_f64(&mut most, Op::Max)?;
        }
        Ok(most[0] as usize)
    }

    fn given(&self, dir: &Path) -> Result<Given> {
        if self.beside.is_some() {
            return Ok(Given::Adapter(Box::new(AdapterFile::open(dir, &self.layout)?)));
        }
        let given = ModelDir::open(dir)?;
        let shapes = |layout: &Layout| -> Vec<(String, Vec<usize>)> {
            layout.parameters.iter().map(|p| (p.name.clone(), p.shape.clone())).collect()
        };
        match shapes(&given.layout) == shapes(&self.layout) {
            true => Ok(Given::Model(Box::new(given))),
            false => Err(Error::Input(format!(
                "{}: these are the weights of another model than the job's; set model.path to this directory, or use other weights",
                dir.display()
            ))),
        }
    }

    /// Reads weights and optimizer state by so many threads.
    pub fn read_by(self, threads: u32) -> Engine<M> {
        Engine { readers: threads as usize, ..self }
    }

    /// With the stopwatch that its gang tells, too.
    pub fn watched(self, watch: Stopwatch) -> Engine<M> {
        Engine { watch, ..self }
    }

    /// Scales losses so that their gradients are numbers in fp16.
    pub fn scaling_losses(self) -> Engine<M> {
        Engine { scaler: Some(Scaler::default()), ..self }
    }

    /// The flat weights, on the host.
    pub fn weights(&self) -> Result<Cow<'_, [f32]>> {
        self.strategy.flat(Slot::Weights)
    }
}

impl<M: Memory> Learner for Engine<M> {
    fn layout(&self) -> &Layout {
        &self.layout
    }

    fn executor(&self) -> &'static str {
        self.executor.name()
    }

    fn device(&self) -> String {
        self.executor.device()
    }

    fn describe(&self) -> String {
        self.executor.describe()
    }

    fn gang(&mut self) -> &mut dyn Gang {
        self.strategy.gang()
    }

    fn watch(&self) -> &Stopwatch {
        &self.watch
    }

    fn fresh_weights(&mut self, seed: u64) -> Result<()> {
        let (layout, executor) = (&self.layout, &self.executor);
        let base = self.beside.as_deref().map(ModelDir::open).transpose()?;
        self.strategy.fill(Slot::Weights, &mut |range, out| {
            for p in &layout.parameters {
                init::fill(p, range.clone(), seed, out, range.start);
            }
            // What is trained of the model itself begins as it is there.
            let mut reading = Reading::default();
            for (p, first, numbers) in by_parameter(layout, &range, out) {
                let Some(base) = &base else { break };
                match of_model(p, base) {
                    Some(of_model) if p.fresh == Fresh::RowLengths => {
                        executor.row_lengths(&of_model.range, first, numbers);
                    }
                    Some(p) => base.read_part(p, first, numbers, &mut reading),
                    None => {}
                }
            }
            Ok(reading.run(1)?)
        })
    }

    /// Each rank looks whether its part of them are numbers.
    fn load_weights(&mut self, dir: &Path) -> Result<()> {
        let given = self.given(dir)?;
        let (layout, readers) = (&self.layout, self.readers);
        self.strategy.fill(Slot::Weights, &mut |range, out| {
            let mut reading = Reading::default();
            for (p, first, numbers) in by_parameter(layout, &range, out) {
                given.read_part(p, first, numbers, &mut reading);
            }
            reading.run(readers)?;
            let no_number = by_parameter(layout, &range, out).find(|(_, _, numbers)| !all_finite(numbers));
            match no_number {
                None => Ok(()),
                Some((p, ..)) => Err(Error::Input(format!(
                    "{}: {} holds values that are NaN or infinite; restore the weights, or use an older checkpoint",
                    dir.display(),
                    p.name
                ))),
            }
        })
    }

    fn load_optimizer(&mut self, dir: &Path) -> Result<()> {
        let tensors = Tensors::of_optimizer(dir)?;
        let (layout, readers) = (&self.layout, self.readers);
        for (slot, suffix) in MOMENTS {
            let of = |p: &Parameter| {
                let name = moment_name(&p.name, suffix);
                let fits = |t: &Tensor| t.shape == p.shape && matches!(t.dtype, Dtype::F32 | Dtype::BF16);
                let lacks = || Error::Input(format!("{}: the optimizer state lacks {name}", dir.display()));
                tensors.get(&name).filter(fits).ok_or_else(lacks)
            };
            layout.parameters.iter().try_for_each(|p| of(p).map(drop))?;
            self.strategy.fill(slot, &mut |range, out| {
                let mut reading = Reading::default();
                for (p, first, numbers) in by_parameter(layout, &range, out) {
                    reading.numbers(of(p)?, first, numbers);
                }
                Ok(reading.run(readers)?)
            })?;
        }
        Ok(())
    }

    fn weighed_step(
        &mut self,
        micro_batches: &[TokenBatch],
        mut weigh: Option<&mut dyn Weighing>,
        update: &Update,
        votes: Votes,
    ) -> Result<Report> {
        let mut weight = [micro_batches.iter().map(|batch| batch.view().weight()).sum()];
        self.strategy.gang().all_reduce_f64(&mut weight, Op::Sum)?;
        let [weight] = weight;
        if weight <= 0.0 {
            return Err(Error::Input(format!(
                "no token of step {} is to be predicted; look at the data",
                update.step
            )));
        }
        self.strategy.gang().note(Activity::Forward);
        let head = self.layout.units.len() - 1;
        let LossScale { scale: loss_scale, skipped, .. } = self.loss_scale().unwrap_or(NOT_SCALED);
        if self.scaler.is_some() {
            self.strategy.scale_losses(loss_scale);
        }
        let scale = loss_scale as f32 / weight as f32;
        let last = micro_batches.len().saturating_sub(1);
        for (number, batch) in micro_batches.iter().enumerate() {
            let micro = Micro { first: number == 0, last: number == last };
            self.watch.switch(Phase::Forward);
            let mut units = Watched { units: self.strategy.units(micro), by: Pass::new(&self.watch, head) };
            let mut looked_at;
            let units: &mut dyn Units<M> = match &mut self.reached {
                Some(reached) => {
                    looked_at = Watched { units: &mut units, by: reached.look(&self.layout) };
                    &mut looked_at
                }
                None => &mut units,
            };
            let mut weigh =
                weigh.as_deref_mut().map(|weigh| move |losses: &[f64]| weigh.weigh(number, losses));
            let weigh = weigh.as_mut().map(|weigh| weigh as &mut Weigh);
            self.executor.forward_weigh_backward(units, &batch.view(), scale, weigh)?;
        }
        self.watch.switch(Phase::Optimizer);
        // Steps that were left out are none to the optimizer.
        let taken = Update { step: update.step.saturating_sub(skipped).max(1), ..*update };
        let outcome = self.strategy.update(&taken, self.executor.take_loss()?, votes);
        // A loss that is no number is none whatever its scale.
        if let Err(Error::NoNumber { report: Some(report), .. }) = &outcome
            && report.loss.is_finite()
            && self.scaler.as_mut().is_some_and(Scaler::skip)
        {
            // What is no number is not zero, and reached nothing.
            self.reached.iter_mut().for_each(|reached| *reached = Reached::new(&self.layout));
            return Ok(Report { loss: report.loss / weight, skipped: true, ..*report });
        }
        match outcome {
            Ok(report) => {
                self.scaler.iter_mut().for_each(Scaler::succeed);
                if let Some(reached) = self.reached.take() {
                    self.without_gradient = reached.line(&self.layout, self.strategy.gang())?;
                }
                Ok(Report { loss: report.loss / weight, ..report })
            }
            Err(error @ Error::NoNumber { .. }) => {
                let step = suspects::Step { micro_batches, scale, number: update.step };
                let error = suspects::named(&mut *self.executor, &mut *self.strategy, &step, weigh, error)?;
                Err(match &self.scaler {
                    Some(scaler) if scaler.is_spent() => error.with_reason(&format!(
                        "a loss scale below 1 helps no more (steps skipped so far: {skipped}): use precision = \"bf16-mixed\" or \"32\""
                    )),
                    Some(_) => error.with_reason("in fp16 what is above 65504 is infinite: precision = \"bf16-mixed\" has the range of fp32"),
                    None => error,
                })
            }
            Err(error) => Err(error),
        }
    }

    fn without_gradient(&mut self) -> Option<String> {
        self.without_gradient.take()
    }

    fn losses(&mut self, batches: &[TokenBatch], which: Which) -> Result<Vec<Vec<f64>>> {
        let most = self.passes(batches.len())?;
        let losses =
            batches.iter().map(|batch| self.executor.losses(self.strategy.weights(), &batch.view(), which));
        let losses = losses.collect::<Result<Vec<_>>>()?;
        let nothing = TokenBatch::nothing();
        for _ in batches.len()..most {
            self.executor.losses(self.strategy.weights(), &nothing.view(), which)?;
        }
        Ok(losses)
    }

    fn evaluate(&mut self, batches: &[TokenBatch]) -> Result<Tally> {
        self.strategy.gang().note(Activity::Evaluating);
        let most = self.passes(batches.len())?;
        let mut tally = Tally::default();
        for batch in batches {
            tally.add(self.executor.evaluate(self.strategy.weights(), &batch.view())?);
        }
        let nothing = TokenBatch::nothing();
        for _ in batches.len()..most {
            self.executor.evaluate(self.strategy.weights(), &nothing.view())?;
        }
        let mut sums = [tally.loss, tally.weight, tally.tokens as f64, tally.hits as f64];
        self.strategy.gang().all_reduce_f64(&mut sums, Op::Sum)?;
        let [loss, weight, tokens, hits] = sums;
        Ok(Tally { loss, weight, tokens: tokens as u64, hits: hits as u64 })
    }

    fn loss_scale(&self) -> Option<LossScale> {
        self.scaler.as_ref().map(Scaler::state)
    }

    fn set_loss_scale(&mut self, scale: LossScale) {
        self.scaler.iter_mut().for_each(|scaler| *scaler = Scaler::of(scale));
    }

    fn dtype(&self) -> Dtype {
        self.strategy.dtype()
    }

    fn strategy(&self) -> &'static str {
        self.strategy.name()
    }

    fn writers(&mut self, disks: &Disks) -> usize {
        self.strategy.writers(disks)
    }

    fn room(&mut self, disks: &Disks) -> Result<Snapshot> {
        let (rank, optimizers) = (self.strategy.gang().rank(), self.strategy.writers(disks));
        let disk = disks.of_rank(rank);
        let writers = disks.ranks(disk).filter(|rank| *rank < optimizers).count();
        let here = writers.div_ceil(disks.hosts(disk).count().max(1));
        let file = self.beside.is_some().then_some(ADAPTER_MODEL);
        let share = Share { rank, models: disks.together(), optimizers, here, file };
        Snapshot::new((&self.layout, self.dtype()), &self.strategy.kept(disks), share)
    }

    fn snapshot(&mut self, disks: &Disks, room: Option<Snapshot>) -> Result<Snapshot> {
        let snapshot = room.map_or_else(|| self.room(disks), Ok);
        let all_have_room = self.strategy.all_can_copy(snapshot.is_ok())?;
        let mut snapshot = snapshot?;
        if !all_have_room {
            return Err(Error::Environment("another rank has no memory for its copy".into()));
        }
        snapshot.take(&mut |slot, ranges, out| self.strategy.copy_out(slot, ranges, out))?;
        Ok(snapshot)
    }
}

/// The parameter of the model that an adapter has itself, or whose rows' lengths.
fn of_model<'a>(p: &Parameter, base: &'a ModelDir) -> Option<&'a Parameter> {
    let name = match p.role {
        Role::Magnitude => plain_name(&p.name).replace(MAGNITUDE, ".weight"),
        _ => plain_name(&p.name),
    };
    let is_added = matches!(p.role, Role::LoraA | Role::LoraB);
    base.layout.parameters.iter().find(|other| !is_added && other.name == name)
}

/// The parameters of which something lies in `range`, each with the first of its numbers there, and with their places in `out`, which is as long
/// as `range`.
pub(crate) fn by_parameter<'a>(
    layout: &'a Layout,
    range: &Range<usize>,
    out: &'a mut [f32],
) -> impl Iterator<Item = (&'a Parameter, usize, &'a mut [f32])> {
    let within = |p: &Parameter| range.start.max(p.range.start)..range.end.min(p.range.end);
    let mut parts: Vec<(&Parameter, Range<usize>)> =
        layout.parameters.iter().map(|p| (p, within(p))).filter(|(_, part)| !part.is_empty()).collect();
    parts.sort_by_key(|(_, part)| part.start);
    let (mut at, mut rest) = (range.start, out);
    parts.into_iter().map(move |(p, part)| {
        let (_, from) = std::mem::take(&mut rest).split_at_mut(part.start - at);
        let (numbers, later) = from.split_at_mut(part.len());
        (at, rest) = (part.end, later);
        (p, part.start - p.range.start, numbers)
    })
}
