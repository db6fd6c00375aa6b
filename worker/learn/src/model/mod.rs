//! The model of a run: what it is made of, where it came from, what is written of it.

mod config;
pub mod init;

pub use config::ending_with;

use crate::adapter::{FewBits, TrainedAdapter};
use crate::error::{Error, Result};
use fleet_checkpoint::ModelDir;
use fleet_common::job::{self, Job};
use fleet_common::model::{Decoder, Family, Layout, Object, Wiring};
use fleet_data::model_dir::token_ids;
use std::path::Path;
use std::sync::Arc;

/// A model without its weights.
#[derive(Clone, Debug)]
pub struct Model {
    pub family: &'static Family,
    pub decoder: Decoder,
    /// `config.json` as it came; empty for a new model.
    pub before: Object,
    pub bos_token_id: Option<u32>,
    pub eos_token_id: Option<u32>,
    /// Trained in the place of the model.
    pub adapter: Option<Arc<TrainedAdapter>>,
}

impl Model {
    /// A new one, as a job describes it.
    pub fn new(config: &Object) -> Result<Model> {
        let mut config = config.clone();
        // A job of an earlier version.
        config.entry("model_type").or_insert_with(|| Family::DEFAULT.model_type.into());
        let described = Family::of_config(&config);
        let (family, decoder) = described
            .map_err(|why| Error::Input(format!("the model that `[model]` describes cannot be: {why}")))?;
        let id = |key| token_ids(&config, key).first().copied();
        let (bos_token_id, eos_token_id) = (id("bos_token_id"), id("eos_token_id"));
        Ok(Model { family, decoder, before: Object::new(), bos_token_id, eos_token_id, adapter: None })
    }

    /// The one in a directory.
    pub fn read(dir: &Path) -> Result<Model> {
        Ok(Model::of_dir(&ModelDir::open(dir)?))
    }

    pub fn of_dir(dir: &ModelDir) -> Model {
        let id = |key| token_ids(&dir.config, key).first().copied();
        Model {
            family: dir.family,
            decoder: dir.decoder.clone(),
            before: dir.config.clone(),
            bos_token_id: id("bos_token_id"),
            eos_token_id: id("eos_token_id"),
            adapter: None,
        }
    }

    /// The one that a job gives or describes, with the adapter that it trains.
    pub fn of_job(job: &Job) -> Result<Model> {
        let dir = match &job.model {
            job::Model::New(config) => return Model::new(config),
            job::Model::Pretrained(dir) => dir,
        };
        let dir = ModelDir::of_job(dir, job)?;
        let mut model = Model::of_dir(&dir);
        if let Some(adapter) = &job.adapter {
            let few_bits = FewBits::of(&dir, job.quantization)?;
            model.adapter = Some(Arc::new(TrainedAdapter::new(adapter, few_bits, &model, &dir)?));
        }
        Ok(model)
    }

    /// Where the numbers lie that are trained.
    pub fn trained_layout(&self) -> Layout {
        self.adapter.as_ref().map_or_else(|| self.layout(), |adapter| adapter.trained.layout.clone())
    }

    /// Where its tensors lie.
    pub fn layout(&self) -> Layout {
        self.wiring().layout
    }

    /// What each part of the decoder reads of them.
    pub fn wiring(&self) -> Wiring {
        Wiring::new(&self.decoder, self.family)
    }

    /// What describes it, in the words of its `config.json`.
    pub fn described(&self) -> Object {
        let mut json = (self.family.write)(&self.decoder);
        json.insert("model_type".into(), self.family.model_type.into());
        json
    }
}
