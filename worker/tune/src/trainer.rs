//! Trains an adapter beside a model: on texts and rows, or on preferences.

use crate::adapters::copy_adapter;
use crate::chats;
use crate::dataset::Quality;
use crate::job_file::{Plan, free_name, keep};
use crate::result::Told;
use crate::{Backend, Dataset, LoraConfig, Model, TrainingConfig, TrainingResult};
use fleet_checkpoint::{TrainerState, continued};
use fleet_common::events::{EventBody, Level};
use fleet_common::job::{Dpo, Job, Warning};
use fleet_data::{DataFiles, Note, TokenCache};
use fleet_learn::{Error, Result};
use fleet_rank::local;
use std::cell::RefCell;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Instant;

type Listener = Box<dyn FnMut(&EventBody) -> ControlFlow<()>>;

/// Trains an adapter. Each call goes on from what the one before has learnt, in a run of its own with checkpoints of its own.
///
/// ```
/// use fleet_tune::{Backend, SftConfig};
/// use serde_json::json;
///
/// # let dir = tempfile::tempdir().unwrap();
/// # let dir = dir.path();
/// # let model = fleet_tune::testing::tiny_model(dir)?;
/// # let training = fleet_tune::testing::short(dir);
/// let backend = Backend::new("cpu")?;
/// let model = backend.load_model(&model)?;
/// let config = SftConfig { training, ..SftConfig::default() };
/// let mut trainer = backend.create_sft_trainer(&model, config)?;
/// let rows = (0..16).map(|n| json!({"prompt": format!("say {n}"), "completion": format!(" it is {n}")}));
/// let result = trainer.train(rows.collect::<Vec<_>>())?;
/// assert!(result.success && result.metrics["train_loss"] == result.final_loss);
/// let adapter = trainer.save_adapter(dir.join("adapters/sft"))?;
/// assert!(adapter.join("adapter_model.safetensors").is_file());
/// # Ok::<(), fleet_tune::Error>(())
/// ```
pub struct Trainer {
    backend: Backend,
    base: PathBuf,
    /// What has been learnt, or is gone on from.
    adapter: Option<PathBuf>,
    training: TrainingConfig,
    lora: LoraConfig,
    dpo: Option<Dpo>,
    listener: Listener,
    run: Option<String>,
    learns_chats: bool,
}

impl Trainer {
    pub(crate) fn of(
        backend: &Backend,
        model: &Model,
        training: TrainingConfig,
        lora: LoraConfig,
        dpo: Option<Dpo>,
    ) -> Result<Trainer> {
        backend.expects(model)?;
        let adapter = model.adapters().active_dir().map(Path::to_owned);
        if adapter.is_none() {
            lora.check()?;
        }
        Ok(Trainer {
            backend: backend.clone(),
            base: model.path().to_owned(),
            adapter,
            training,
            lora,
            dpo,
            listener: Box::new(|_| ControlFlow::Continue(())),
            run: None,
            learns_chats: false,
        })
    }

    /// From now on `listener` is told what happens, in its order: data, steps, evaluations, checkpoints, warnings. `Break` ends the run, with a
    /// checkpoint.
    pub fn on_event(
        &mut self,
        listener: impl FnMut(&EventBody) -> ControlFlow<()> + 'static,
    ) -> &mut Trainer {
        self.listener = Box::new(listener);
        self
    }

    /// Trains on `data` as the settings say. What cannot be trained at all is an error; a run that fails after steps is a result that says so.
    pub fn train(&mut self, data: impl Into<Dataset>) -> Result<TrainingResult> {
        let data = data.into();
        let usual = match (&self.dpo, data.has_rows()) {
            (Some(_), _) => "dpo",
            (None, true) => "sft",
            (None, false) => "text",
        };
        let wanted = self.training.run_name.as_deref().unwrap_or(usual);
        let name = free_name(&self.training.output_dir, wanted);
        self.run(&data, name)
    }

    /// The same for one topic of several, whose run is called by it.
    pub fn train_on_topic(&mut self, data: impl Into<Dataset>, topic: &str) -> Result<TrainingResult> {
        let name = free_name(&self.training.output_dir, topic);
        self.run(&data.into(), name)
    }

    fn run(&mut self, data: &Dataset, name: String) -> Result<TrainingResult> {
        let (job, warnings) = self.job(data, &name)?;
        keep(&job)?;
        self.run = Some(name);
        for Warning(line) in warnings {
            // A run that has not begun cannot be ended.
            let _ = (self.listener)(&EventBody::Log { rank: None, level: Level::Warn, line });
        }
        let (began, mut told) = (Instant::now(), Told::after(steps_before(&job)?));
        let outcome = local::train(&job, self.backend.device().of_a_rank(), &mut |event| {
            told.take(event);
            (self.listener)(event)
        });
        let batch = u64::from(job.batch_size) * u64::from(job.accumulate_grad_batches);
        let result = told.result(outcome, began.elapsed(), batch)?;
        self.learns_chats = result.success && chats::are_learnt(&job)?;
        if let Some(adapter) = &result.adapter_path {
            self.adapter = Some(adapter.clone());
        }
        Ok(result)
    }

    fn job(&self, data: &Dataset, name: &str) -> Result<(Job, Vec<Warning>)> {
        let plan = Plan {
            backend: &self.backend,
            base: &self.base,
            adapter: self.adapter.as_deref(),
            training: &self.training,
            lora: &self.lora,
            dpo: self.dpo.as_ref(),
        };
        plan.job(data, name)
    }

    /// What is to know of `data` before they are trained on. They are read and tokenised as for training, which then finds that done.
    pub fn quality(&self, data: impl Into<Dataset>) -> Result<Quality> {
        let (job, _) = self.job(&data.into(), &free_name(&self.training.output_dir, "quality"))?;
        let notes = RefCell::new(Vec::new());
        let tell = |note: Note| notes.borrow_mut().push(note.line);
        let files = DataFiles::find(&job, &tell)?;
        let (cache, _) = TokenCache::build_or_open(&job, &files, &tell)?;
        Ok(Quality::of(&cache, notes.take()))
    }

    /// What has been learnt: the newest checkpoint, or the adapter that the trainer goes on from.
    pub fn adapter_path(&self) -> Option<&Path> {
        self.adapter.as_deref()
    }

    /// Whether a chat template has written what the last run has learnt: `Model::chat` asks so.
    pub fn learns_chats(&self) -> bool {
        self.learns_chats
    }

    /// Of the last run: its checkpoints and its job file are called so.
    pub fn run_name(&self) -> Option<&str> {
        self.run.as_deref()
    }

    pub fn config(&self) -> &TrainingConfig {
        &self.training
    }

    /// Copies what has been learnt to the new directory `path`, as PEFT has it.
    pub fn save_adapter(&self, path: impl AsRef<Path>) -> Result<PathBuf> {
        let Some(adapter) = &self.adapter else {
            return Err(Error::Input("there is no adapter to save; train first".into()));
        };
        copy_adapter(adapter, path.as_ref())
    }

    /// The model with what has been learnt switched on, under the name of the run.
    pub fn model(&self) -> Result<Model> {
        let mut model = self.backend.load_model(&self.base)?;
        if let Some(adapter) = &self.adapter {
            let name = self.run.as_deref().unwrap_or("default");
            model.adapters_mut().load(name, adapter)?;
            model.adapters_mut().switch_to(name)?;
        }
        Ok(model)
    }
}

/// Steps of the checkpoint that a job goes on from.
fn steps_before(job: &Job) -> Result<u64> {
    let resumed = continued(job, &|_, _| ())?;
    Ok(resumed.map(|dir| TrainerState::read(&dir)).transpose()?.map_or(0, |state| state.step))
}
