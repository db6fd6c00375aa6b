//! From a model and preferences to an adapter.

use crate::{Backend, Curriculum, CurriculumResult, Dataset, DpoConfig, Model, Trainer, TrainingResult};
use fleet_learn::Result;
use std::path::{Path, PathBuf};

/// Loads a model by a backend and trains an adapter beside it on preferences (DPO), at once or topic by topic. The reference is the model itself;
/// of a topic behind the first, the model as it was before that topic. What the trainer tells of preferences has TRL's names.
///
/// ```
/// use fleet_tune::{Backend, Curriculum, DpoConfig, DpoPipeline};
/// use serde_json::json;
///
/// # let dir = tempfile::tempdir().unwrap();
/// # let dir = dir.path();
/// # let model = fleet_tune::testing::tiny_model(dir)?;
/// let pairs = |word: &str| {
///     let pair = |n| json!({"prompt": format!("say {n}"), "chosen": format!(" {word} {n}"), "rejected": " no"});
///     (0..20).map(pair).collect::<Vec<_>>()
/// };
/// let mut config = DpoConfig::rank_1();
/// # config.training = fleet_tune::testing::short(dir);
/// # config.training.validation_fraction = 0.1;
/// config.training.learning_rate = 1e-3; // a long run takes less
/// let mut pipeline = DpoPipeline::new(&Backend::new("cpu")?, &model, config)?;
/// let topics = Curriculum::default().topic("yes", pairs("yes")).topic("well", pairs("well"));
/// let done = pipeline.train_curriculum(&topics)?;
/// assert!(done.success && done.topics.len() == 2);
/// assert!(done.topics[1].result.metrics.contains_key("eval_rewards/accuracies"));
/// # Ok::<(), fleet_tune::Error>(())
/// ```
pub struct DpoPipeline {
    trainer: Trainer,
}

impl DpoPipeline {
    /// For the model in the directory `model`.
    pub fn new(backend: &Backend, model: impl AsRef<Path>, config: DpoConfig) -> Result<DpoPipeline> {
        DpoPipeline::of_model(backend, &backend.load_model(model)?, config)
    }

    /// For a model that is there, from the adapter on that it has switched on.
    pub fn of_model(backend: &Backend, model: &Model, config: DpoConfig) -> Result<DpoPipeline> {
        Ok(DpoPipeline { trainer: backend.create_dpo_trainer(model, config)? })
    }

    /// Trains on rows with `chosen` and `rejected`.
    pub fn train(&mut self, pairs: impl Into<Dataset>) -> Result<TrainingResult> {
        self.trainer.train(pairs)
    }

    /// Trains on each topic in turn.
    pub fn train_curriculum(&mut self, curriculum: &Curriculum) -> Result<CurriculumResult> {
        curriculum.train(&mut self.trainer)
    }

    /// For a listener, and for what is known of data.
    pub fn trainer(&mut self) -> &mut Trainer {
        &mut self.trainer
    }

    /// Copies what has been learnt to the new directory `path`.
    pub fn save_adapter(&self, path: impl AsRef<Path>) -> Result<PathBuf> {
        self.trainer.save_adapter(path)
    }

    /// The model with what has been learnt switched on.
    pub fn model(&self) -> Result<Model> {
        self.trainer.model()
    }
}
