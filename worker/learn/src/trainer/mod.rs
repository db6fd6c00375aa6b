//! The training loop: what happens when. Data, step, log, evaluate, save.
//!
//! Every rank runs it. What depends on time or on the agent (stop, the time limit) is agreed in the step's own reduction, so that all
//! ranks leave the loop after the same step. It never touches a tensor, and knows no device, no family of models and no transport: what it
//! trains is a `Learner`, made by whoever runs it.
//! A checkpoint is written while the next steps are made (`saving`).

mod aim;
mod base;
mod best;
mod breakdown;
mod companions;
mod disks;
mod in_flight;
mod meter;
mod one_resume;
mod pen;
mod room;
mod saving;
mod schedule;
mod slow_host;
mod tracing;

use aim::Aim;
use saving::{Lead, RECORD_WAIT, STOPPED_WAIT, Saving};

pub use schedule::learning_rate;

use crate::agent_link::AgentLink;
use crate::batch::TokenBatch;
use crate::dropout;
use crate::engine::Learner;
use crate::error::{Error, Result};
use crate::model::Model;
use crate::objective::{Measured, Objective, Weighing};
use crate::optimizer::{AdamW, Update};
use crate::stopwatch::{Phase, Stopwatch};
use crate::strategy::Votes;
use base::BaseHash;
use breakdown::Breakdown;
use companions::{Companions, Origins};
use fleet_checkpoint::{Claim, LossScale, RunDir, TrainerState, of_another_base};
use fleet_collectives::{Activity, Pace};
use fleet_common::events::{Evaluation, EventBody, Level, Metrics, Outcome};
use fleet_common::job::{self, Job, Tokenizer};
use fleet_common::model::Positions;
use fleet_common::protocol::RankStart;
use fleet_data::{Cursor, Order, Rest, TokenCache, evaluation_part};
use meter::Meter;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Makes what a rank trains: the model of the job, with weights that are still zero. A collective call.
pub type MakeLearner<'a> = &'a dyn Fn(&RankStart, &Job, &Model) -> Result<Made>;

/// What a rank trains.
pub struct Made {
    pub learner: Box<dyn Learner>,
    /// By which strategy and why, where the job left that open.
    pub strategy: Option<String>,
    /// Why it is not computed where it would be faster.
    pub note: Option<String>,
}

/// Trains as the agent asked, to the end or until stopped.
pub fn run(start: &RankStart, link: &mut AgentLink, learner: MakeLearner) -> Result<Outcome> {
    let began = Instant::now();
    let mut job =
        Job::from_json(&start.job_json).map_err(|e| Error::Input(format!("the job cannot be read: {e}")))?;
    if let Some(checkpoint) = &start.resume {
        fleet_checkpoint::take_what_is_gone(&mut job, Path::new(checkpoint));
    }
    let Some(mut trainer) = Trainer::new(start, job, began, link, learner)? else {
        let checkpoint = start.resume.as_deref().map(Path::new);
        let was = checkpoint.map(TrainerState::read).transpose()?;
        return Ok(Outcome::Stopped { steps: was.map_or(0, |was| was.step) });
    };
    let tracing = trainer.begin_trace(start)?;
    let outcome = trainer.train(link);
    tracing.into_iter().for_each(|tracing| tracing.end(link));
    outcome
}

struct Trainer {
    job: Job,
    rank: u64,
    world: u64,
    learner: Box<dyn Learner>,
    /// Rank 0's.
    base: BaseHash,
    /// Of an adapter: what it changes, for the log.
    beside: Option<String>,
    objective: Box<dyn Objective>,
    cache: TokenCache,
    order: Order,
    adamw: AdamW,
    total_steps: u64,
    /// The longest text that the model was made for, as its configuration says.
    positions: usize,
    began: Instant,
    /// Grows with every step; what a checkpoint stores.
    state: TrainerState,
    meter: Meter,
    /// Of the last step, beside its loss.
    metrics: Vec<(&'static str, f64)>,
    watch: Stopwatch,
    breakdown: Breakdown,
    saving: Saving,
    /// The step whose checkpoint the run continues.
    resumed: Option<u64>,
    /// The step of the newest checkpoint that was written.
    saved: Option<u64>,
    /// The recorded checkpoint after which older ones were removed last.
    rotated: Option<u64>,
    /// The step whose checkpoint is there only because the run was told to stop.
    stopped_at: Option<u64>,
}

impl Trainer {
    /// None where the run was told to stop before it had begun.
    fn new(
        start: &RankStart,
        job: Job,
        began: Instant,
        link: &mut AgentLink,
        make: MakeLearner,
    ) -> Result<Option<Self>> {
        let dir = match start.rank {
            0 => Some(claim(start, &job)?),
            _ => None,
        };
        let cache =
            TokenCache::open(Path::new(&start.cache_dir)).map_err(|e| Error::Environment(e.to_string()))?;
        let (model, pretrained) = model_of(&job, &cache)?;
        let world = u64::from(start.world_size);
        let micro_batches = u64::from(job.accumulate_grad_batches);
        let global_batch = world * u64::from(job.batch_size) * micro_batches;
        let resumed = start.resume.as_deref().map(Path::new);
        let was = resumed.map(TrainerState::read).transpose()?;
        let takes_rest = job.data.rows.as_ref().is_some_and(|rows| !rows.drop_last);
        let rest = if takes_rest { Rest::Taken } else { Rest::LeftOut };
        let mut order = Order::new(job.seed, cache.train().len(), global_batch, micro_batches, rest)
            .map_err(|e| Error::Input(e.to_string()))?;
        if let Some(was) = &was {
            let position = Cursor { epoch: was.epoch, step: was.epoch_step, windows: was.windows_taken() };
            order = order.from(was.step, position);
        }
        let total_steps = order.total_steps(job.epochs, job.max_steps);

        let Made { mut learner, strategy, note } = make(start, &job, &model)?;
        if let Some(line) = strategy.filter(|_| start.rank == 0) {
            link.log(Level::Info, line);
        }
        if let Some(note) = note {
            link.log(Level::Warn, note);
        }
        let from = resumed.zip(was.as_ref()).map(|(checkpoint, was)| (checkpoint, was.step));
        let read = pretrained.filter(|_| start.hosts > 1 && (from.is_none() || model.adapter.is_some()));
        one_resume::agree(from, &read.into_iter().collect::<Vec<_>>(), learner.gang())?;
        let disks = disks::find(start, &job.checkpoint_dir(), learner.gang())?;
        let writers = learner.writers(&disks);
        let rank = start.rank as usize;
        let dir = match dir {
            None if rank < writers && disks.lead(disks.of_rank(rank)) == rank => Some(claim(start, &job)?),
            dir => dir,
        };
        let mut state = TrainerState {
            step: 0,
            epoch: 0,
            epoch_step: 0,
            epoch_windows: None,
            total_steps,
            tokens_seen: 0,
            loss: f64::NAN,
            eval_loss: None,
            seed: job.seed,
            global_batch,
            train_windows: cache.train().len(),
            cache_hash: cache.hash().to_owned(),
            tokenizer_sha256: cache.meta().tokenizer_sha256.clone(),
            model: model.described(),
            precision: job.precision,
            world_size: start.world_size,
            batch_size: job.batch_size,
            accumulate_grad_batches: job.accumulate_grad_batches,
            threads_per_rank: start.threads,
            computed_by: Some(computed_by(&*learner)),
            optimizer: Some(job.optimizer.clone()),
            loss_scale: None,
            adapter: model.adapter.as_ref().map(|adapter| adapter.config.json.clone()),
            quantization: job.quantization,
            base_sha256: None,
            best: None,
            patience: None,
            dpo: job.dpo.clone(),
            neftune_noise_alpha: job.neftune_noise_alpha,
        };
        let of_adapter = model.adapter.as_ref().filter(|_| start.rank == 0);
        let mut base = BaseHash::of(of_adapter.map(|adapter| adapter.base.as_path()))?;
        let Some(Aim { objective, reference }) = Aim::of(&job, start, &model, &cache, &mut *learner, link)?
        else {
            return Ok(None);
        };
        match (resumed.zip(was), &pretrained) {
            (Some((checkpoint, was)), _) => {
                let trained = matches!(job.tokenizer, Tokenizer::Train { .. });
                state.base_sha256 = base.wait()?;
                let notes = was.check_compatible(&state, trained)?;
                if start.rank == 0 {
                    notes.into_iter().for_each(|note| link.log(Level::Warn, note));
                }
                learner.load_weights(checkpoint)?;
                learner.load_optimizer(checkpoint)?;
                was.loss_scale.into_iter().for_each(|scale| learner.set_loss_scale(scale));
                let is_alike = was.has_losses_of(&state);
                state = TrainerState {
                    step: was.step,
                    epoch: was.epoch,
                    epoch_step: was.epoch_step,
                    epoch_windows: was.epoch_windows,
                    tokens_seen: was.tokens_seen,
                    loss: was.loss,
                    eval_loss: was.eval_loss,
                    best: was.best.filter(|_| is_alike),
                    patience: was.patience.filter(|_| is_alike),
                    ..state
                };
            }
            (None, from) => {
                // Of an adapter the model is there already.
                let from = model.adapter.as_ref().map_or(*from, |adapter| adapter.from.as_deref());
                if let Some(adapter) = model.adapter.as_ref().filter(|_| start.rank == 0)
                    && let Some(dir) = &adapter.from
                    && let Some(line) = of_another_base(dir, &adapter.base)?
                {
                    link.log(Level::Warn, line);
                }
                match from {
                    Some(dir) => learner.load_weights(dir)?,
                    None => learner.fresh_weights(job.seed)?,
                }
            }
        }
        state.loss_scale = learner.loss_scale();
        let adamw = AdamW::from(&job.optimizer);
        let positions = model.decoder.max_positions;
        let lead = dir.map(|dir| {
            let origins = Origins {
                resume: resumed,
                model: pretrained,
                tokenizer: match &job.tokenizer {
                    Tokenizer::File(path) => Some(path),
                    Tokenizer::Train { .. } => None,
                },
                used: &cache.tokenizer_path(),
                chat_template: cache.chat_template(),
                learns_rows: job.data.rows.is_some(),
                weights: learner.dtype(),
                quantization: job.quantization,
                reference: reference.as_deref(),
            };
            let companions = (rank == 0).then(|| Companions::gather(&origins, &model)).transpose()?;
            Ok::<_, Error>(Lead { dir, companions: companions.map(Arc::new) })
        });
        let saving = Saving::new(job.checkpoint_dir(), disks, rank, writers, lead.transpose()?);
        let meter = Meter::default();
        let watch = learner.watch().clone();
        let resumed = resumed.map(|_| state.step);
        Ok(Some(Self {
            job,
            rank: rank as u64,
            world,
            learner,
            base,
            beside: model.adapter.as_ref().map(|adapter| adapter.describe(&model)),
            objective,
            cache,
            order,
            adamw,
            total_steps,
            positions,
            began,
            state,
            meter,
            metrics: Vec::new(),
            watch,
            breakdown: Breakdown::new(world as usize, start.hosts.max(1) as usize),
            saving,
            resumed,
            saved: None,
            rotated: None,
            stopped_at: None,
        }))
    }

    fn train(mut self, link: &mut AgentLink) -> Result<Outcome> {
        if self.rank == 0 {
            let parameters = self.learner.layout().count();
            if let Some(beside) = &self.beside {
                link.log(Level::Info, beside.clone());
            }
            link.event(EventBody::Started {
                step: self.state.step,
                parameters,
                device: self.learner.device(),
            });
            link.log(Level::Info, self.learner.describe());
            let (given, made_for) = (self.job.max_seq_len, self.positions);
            if given as usize > made_for {
                let line = format!(
                    "max_seq_len is {given}, and the model was made for {made_for} positions: it learns longer texts, and its checkpoints \
                     still say {made_for}"
                );
                link.log(Level::Warn, line);
            }
            if let Some(line) = self.order.leaves_out().filter(|_| self.job.max_steps.is_none()) {
                link.log(Level::Warn, line);
            }
            if let Some(given) = self.job.optimizer.warmup_steps.filter(|given| *given > self.total_steps) {
                let cut = self.job.optimizer.warmup(self.total_steps);
                let line = format!(
                    "warmup_steps ({given}) is more than the {} steps of the run: cut to {cut}",
                    self.total_steps
                );
                link.log(Level::Warn, line);
            }
        }
        self.warn_of_a_small_disk(link);
        let is_over = self.begin_to_judge(link);
        if self.state.step == 0 && self.total_steps > 0 {
            self.evaluate(link)?;
        }
        if self.rank == 0 && self.state.step >= self.total_steps {
            let (step, total) = (self.state.step, self.total_steps);
            let key = if self.job.max_steps.is_some() { "max_steps" } else { "epochs" };
            link.log(
                Level::Warn,
                format!("the run was done at step {total}, and the checkpoint is of step {step}: nothing is left to do; raise {key} to train on"),
            );
        }
        let first = self.state.step + 1;
        self.breakdown.begin(self.watch.sums(), self.state.step);
        let mut stopped = false;
        while self.state.step < self.total_steps && !stopped && !is_over {
            let votes = self.step(link)?;
            let step = self.state.step;
            if let Some(line) = self.learner.without_gradient().filter(|_| self.rank == 0) {
                link.log(Level::Warn, line);
            }
            let last = step == self.total_steps || votes.stop || votes.time;
            let told = step == first || step.is_multiple_of(self.job.logging_steps) || last;
            if told && self.rank == 0 {
                link.event(EventBody::Step(self.meter.event(&self.state, self.order.epochs_done(step))));
                tell(link, step, "", &self.metrics);
            }
            let every = |steps: u64| steps > 0 && step.is_multiple_of(steps);
            let evaluated =
                !votes.stop && (every(self.job.eval.eval_steps) || last) && self.evaluate(link)?;
            let judged = self.judge(evaluated, last || every(self.job.logging_steps), link);
            let over = last || judged.is_over;
            if every(self.job.checkpoint.save_steps) || over || judged.is_kept {
                let is_regular = !votes.stop
                    || votes.time
                    || every(self.job.checkpoint.save_steps)
                    || step == self.total_steps;
                self.stopped_at = (!is_regular).then_some(step);
                self.save(link)?;
            }
            if step == first {
                self.take_room(link);
            }
            self.look_at_save(link)?;
            self.rotate(link);
            if told {
                self.tell_times(link)?;
                self.tell_slow_link(link)?;
            }
            stopped = votes.stop;
            if votes.time || judged.is_over {
                break;
            }
        }
        self.end_saving(if stopped { STOPPED_WAIT } else { RECORD_WAIT }, link)?;
        self.rotate(link);
        if stopped {
            return Ok(Outcome::Stopped { steps: self.state.step });
        }
        self.last_save()?;
        let final_loss = Some(self.state.loss).filter(|loss| loss.is_finite());
        Ok(Outcome::Succeeded { steps: self.state.step, final_loss, tokens_per_s: self.meter.mean() })
    }

    /// One optimizer step; tells what the ranks agreed on.
    fn step(&mut self, link: &mut AgentLink) -> Result<Votes> {
        let began = Instant::now();
        let step = self.state.step;
        self.watch.begin_step(step + 1);
        let last = self.meter.last.map(|took| Pace { took, computed: self.breakdown.computed });
        self.learner.gang().begin_step(step + 1, last);
        self.learner.gang().note(Activity::LoadingData);
        let mut micro_batches: Vec<TokenBatch> = (0..u64::from(self.job.accumulate_grad_batches))
            .map(|micro| {
                let indices = self.order.rank_part(step, micro, self.rank, self.world);
                let mut batch = self.objective.batch(self.cache.train(), &mut indices.into_iter());
                let noise = batch.noise.iter_mut().flatten();
                noise.for_each(|noise| *noise = dropout::of_sequence(self.job.seed, step, *noise));
                batch.neftune = self.job.neftune_noise_alpha.unwrap_or_default() as f32;
                batch.filled()
            })
            .collect();
        let mut weighing = self.objective.weighing(&mut *self.learner, &mut micro_batches)?;
        let lr = learning_rate(&self.job.optimizer, step, self.total_steps);
        let mine = Votes {
            stop: link.stop_asked(),
            time: self.job.max_time_s.is_some_and(|limit| self.began.elapsed() >= Duration::from_secs(limit)),
        };
        let update = Update { adamw: self.adamw, lr, step: step + 1 };
        let weigh = weighing.as_deref_mut().map(|weighing| weighing as &mut dyn Weighing);
        let report = self.learner.weighed_step(&micro_batches, weigh, &update, mine)?;
        let measured = weighing.map(|weighing| weighing.measured(self.learner.gang())).transpose()?;
        self.watch.end_step();
        self.breakdown.after_step(self.watch.sums(), step + 1);

        // Of all ranks, which each of them can tell.
        let items = (0..u64::from(self.job.accumulate_grad_batches))
            .flat_map(|micro| (0..self.world).map(move |rank| (micro, rank)))
            .flat_map(|(micro, rank)| self.order.rank_part(step, micro, rank, self.world));
        let taken: u64 = items.map(|item| self.cache.train().tokens(item)).sum();
        let cursor = self.order.cursor(step + 1);
        let state = &mut self.state;
        (state.step, state.epoch, state.epoch_step) = (step + 1, cursor.epoch, cursor.step);
        let in_equal_steps = cursor.step * state.global_batch;
        state.epoch_windows = Some(cursor.windows).filter(|windows| *windows != in_equal_steps);
        state.loss = measured.as_ref().map_or(report.loss, |measured| measured.loss);
        let scaled_by = std::mem::replace(&mut state.loss_scale, self.learner.loss_scale());
        let tokens = taken;
        state.tokens_seen += tokens;
        let grad_norm = if report.skipped { self.meter.grad_norm } else { report.grad_norm };
        self.meter.add(tokens, began.elapsed(), lr, grad_norm);
        self.metrics = measured.map(|measured| measured.metrics).unwrap_or_default();
        if report.skipped && self.rank == 0 {
            link.log(Level::Warn, skipped(step + 1, scaled_by, self.state.loss_scale));
        }
        Ok(report.votes)
    }

    /// Whether there was something to evaluate.
    fn evaluate(&mut self, link: &mut AgentLink) -> Result<bool> {
        let watch = self.watch.clone();
        watch.during(Phase::Evaluation, || self.evaluate_now(link))
    }

    /// Loss on the validation part, if it is to be measured and there is one.
    fn evaluate_now(&mut self, link: &mut AgentLink) -> Result<bool> {
        let windows = self.cache.validation();
        if self.job.eval.eval_steps == 0 || windows.is_empty() {
            return Ok(false);
        }
        let mine = evaluation_part(windows.len(), self.job.eval.max_eval_examples, self.rank, self.world);
        // No more at once than a training batch: evaluation then needs no memory of its own.
        let size = u64::from(self.job.eval.batch_size.min(self.job.batch_size)).max(1);
        let batches: Vec<TokenBatch> = mine
            .clone()
            .step_by(size as usize)
            .map(|at| self.objective.batch(windows, &mut (at..(at + size).min(mine.end))))
            .map(|batch| TokenBatch { noise: None, ..batch }.filled())
            .collect();
        let Measured { loss, tally, metrics } = self.objective.evaluate(&mut *self.learner, &batches)?;
        self.state.eval_loss = Some(loss);
        if self.rank == 0 {
            let bytes_per_token = self.cache.meta().validation_bytes_per_token;
            link.event(EventBody::Eval(Evaluation {
                step: self.state.step,
                loss,
                bits_per_byte: tally.mean() / std::f64::consts::LN_2 / bytes_per_token,
                tokens: tally.tokens,
            }));
            tell(link, self.state.step, "eval_", &metrics);
        }
        Ok(true)
    }
}

fn tell(link: &mut AgentLink, step: u64, prefix: &str, metrics: &[(&'static str, f64)]) {
    if !metrics.is_empty() {
        let values = metrics.iter().map(|(name, value)| (format!("{prefix}{name}"), *value)).collect();
        link.event(EventBody::Metrics(Metrics { step, values }));
    }
}

/// What the log says of a step that changed nothing.
fn skipped(step: u64, was: Option<LossScale>, is: Option<LossScale>) -> String {
    let scale = |state: Option<LossScale>| state.map_or(1.0, |state| state.scale);
    format!(
        "step {step} was skipped: its gradients were NaN or infinite with the loss scale {}, which is {} now",
        scale(was),
        scale(is)
    )
}

/// The executor, and on what kind of device, which is the same for all ranks.
fn computed_by(learner: &dyn Learner) -> String {
    let device = learner.device();
    format!("{} on {}", learner.executor(), device.split(':').next().unwrap_or_default())
}

/// Takes the directory of the run for as long as this process lives.
fn claim(start: &RankStart, job: &Job) -> Result<RunDir> {
    let claim = Claim {
        dir: &job.checkpoint_dir(),
        run: &start.run,
        resumed: start.resume.as_deref().map(Path::new),
        overwrite: job.checkpoint.overwrite,
        until: job.max_steps,
        reads: &job.inputs(),
    };
    Ok(RunDir::claim(&claim)?)
}

/// The model, and where its weights come from if they are not fresh.
fn model_of<'a>(job: &'a Job, cache: &TokenCache) -> Result<(Model, Option<&'a Path>)> {
    let mut model = Model::of_job(job)?;
    let pretrained = match &job.model {
        job::Model::New(_) => None,
        job::Model::Pretrained(dir) => Some(dir.as_path()),
    };
    let (vocab, tokens) = (model.decoder.vocab_size, cache.meta().vocab_size);
    if tokens as usize > vocab {
        return Err(Error::Input(format!(
            "the tokenizer has {tokens} tokens and the model's vocab_size is {vocab}; raise it or use the model's own tokenizer"
        )));
    }
    let (positions, len) = (model.decoder.max_positions, job.max_seq_len as usize);
    if matches!(model.decoder.positions, Positions::Learned { .. }) && len > positions {
        return Err(Error::Input(format!(
            "max_seq_len is {len} and the model has learned {positions} positions; lower it to at most {positions}"
        )));
    }
    model.eos_token_id = Some(cache.meta().eos_id); // what every document ends with
    Ok((model, pretrained))
}
