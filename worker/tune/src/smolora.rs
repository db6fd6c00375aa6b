//! One object for everything: a model, data, training, saving, asking.

use crate::result::of_fault;
use crate::{
    Backend, BackendConfig, Dataset, Fault, LoraConfig, Model, Settings, SftConfig, Trainer, TrainingConfig,
    TrainingResult,
};
use fleet_learn::{Error, Result};
use std::path::{Path, PathBuf};

/// Fine-tunes a model with usual settings: the best device, an adapter (LoRA) as it suits the model's family.
///
/// ```no_run
/// use fleet_tune::{Result, SmoLora};
///
/// fn main() -> Result<()> {
///     let mut tuned = SmoLora::new("Qwen2.5-0.5B", "rows.jsonl")?.train()?.save()?;
///     println!("{}", tuned.inference("Name three rivers.")?);
///     Ok(())
/// }
/// ```
pub struct SmoLora {
    data: Dataset,
    config: SftConfig,
    backend: Backend,
    /// Asked. After training, with what has been learnt.
    model: Model,
    trainer: Option<Trainer>,
    result: Option<TrainingResult>,
    saved: Option<PathBuf>,
    settings: Settings,
}

impl SmoLora {
    /// `model` is a directory of Hugging Face's layout, `dataset` files, rows or texts.
    pub fn new(model: impl AsRef<Path>, dataset: impl Into<Dataset>) -> Result<SmoLora> {
        let backend = Backend::create(&BackendConfig::default())?;
        let model = backend.load_model(model)?;
        let lora = LoraConfig::of_model(model.path())?;
        let config = SftConfig { training: TrainingConfig::default(), lora };
        Ok(SmoLora {
            data: dataset.into(),
            config,
            backend,
            model,
            trainer: None,
            result: None,
            saved: None,
            settings: Settings::default(),
        })
    }

    /// Computes by another backend.
    pub fn on(mut self, backend: &Backend) -> Result<SmoLora> {
        self.model = backend.load_model(self.model.path())?;
        self.backend = backend.clone();
        Ok(self)
    }

    #[must_use]
    pub fn with_config(mut self, config: TrainingConfig) -> SmoLora {
        self.config.training = config;
        self
    }

    #[must_use]
    pub fn with_lora(mut self, lora: LoraConfig) -> SmoLora {
        self.config.lora = lora;
        self
    }

    /// How `inference` writes.
    #[must_use]
    pub fn with_settings(mut self, settings: Settings) -> SmoLora {
        self.settings = settings;
        self
    }

    /// Runs the whole training. Again, it goes on from what it has learnt.
    pub fn train(mut self) -> Result<SmoLora> {
        // Two copies of the weights would be one too many.
        self.model.release();
        let mut trainer = match self.trainer.take() {
            Some(trainer) => trainer,
            None => self.backend.create_sft_trainer(&self.model, self.config.clone())?,
        };
        let result = trainer.train(self.data.clone())?;
        if let Some(why) = &result.error_message {
            return Err(of_fault(result.error_fault.unwrap_or(Fault::Job), why.clone()));
        }
        self.model = trainer.model()?;
        (self.trainer, self.result, self.saved) = (Some(trainer), Some(result), None);
        Ok(self)
    }

    /// Saves the adapter, as PEFT has it, in `output_dir`, in a new folder that is called as its run.
    pub fn save(mut self) -> Result<SmoLora> {
        let Some(trainer) = &self.trainer else {
            return Err(Error::Input("there is nothing to save yet; train first".into()));
        };
        if self.saved.is_none() {
            let name = trainer.run_name().unwrap_or("adapter");
            self.saved = Some(trainer.save_adapter(trainer.config().output_dir.join(name))?);
        }
        Ok(self)
    }

    /// Where `save` has put the adapter.
    pub fn saved_to(&self) -> Option<&Path> {
        self.saved.as_deref()
    }

    /// How training went.
    pub fn result(&self) -> Option<&TrainingResult> {
        self.result.as_ref()
    }

    /// What the model writes after `prompt`: where a chat template has written what it has learnt, its answer to that as a message.
    pub fn inference(&mut self, prompt: &str) -> Result<String> {
        let is_chat = self.trainer.as_ref().is_some_and(Trainer::learns_chats);
        let generated = match is_chat {
            true => self.model.chat(None, prompt, &self.settings)?,
            false => self.model.generate(prompt, &self.settings)?,
        };
        Ok(generated.text)
    }

    /// The model as it is asked: for chats, adapters and whole copies.
    pub fn model(&mut self) -> &mut Model {
        &mut self.model
    }
}
