//! Fine-tuning from Rust. A model of Hugging Face's layout gets an adapter that learns texts, instructions or preferences; it is asked, merged
//! and saved. Everything is done by what also runs the jobs of `fleet launch`, in this process and with one rank: the library makes a `Job`,
//! trains it, and tells how it went. The job lies beside its checkpoints as a job file, which `fleet launch -n 4` takes up with more ranks.
//!
//! ```
//! use fleet_tune::{Result, SmoLora};
//!
//! # fn main() -> Result<()> {
//! # let dir = tempfile::tempdir().unwrap();
//! # let dir = dir.path();
//! # let model = fleet_tune::testing::tiny_model(dir)?;
//! # let rows = dir.join("rows.jsonl");
//! # std::fs::write(&rows, fleet_tune::testing::lines(32)).unwrap();
//! # let mut settings = fleet_tune::testing::short(dir);
//! # settings.per_device_train_batch_size = 4;
//! // `model`: a directory with config.json, model.safetensors, tokenizer.json; `rows`: a file such as rows.jsonl.
//! let mut tuned = SmoLora::new(&model, rows)?.with_config(settings).train()?.save()?;
//! println!("{}", tuned.inference("the cat")?);
//! # Ok(())
//! # }
//! ```
//!
//! Below that one object are its parts: a `Backend` (where is computed, and in which numbers), a `Model` with its `AdapterManager`, a `Trainer`
//! of texts and rows or of preferences, a `Curriculum` of topics in their order, a `DpoPipeline`, a `Dataset` with what is known of its quality, a
//! `MemoryManager`. Errors are one line that says what happened to which thing, and what to do.

mod adapters;
mod backend;
mod chats;
mod config;
mod curriculum;
mod dataset;
mod job_file;
mod lora;
mod memory;
mod model;
mod pipeline;
mod result;
mod smolora;
#[doc(hidden)]
pub mod testing;
mod trainer;

pub use adapters::AdapterManager;
pub use backend::{Backend, BackendConfig, Device, Dtype};
pub use config::{DpoConfig, SftConfig, TrainingConfig};
pub use curriculum::{Curriculum, CurriculumResult, Topic, TopicResult};
pub use dataset::{Dataset, Quality};
pub use lora::LoraConfig;
pub use memory::{MemoryManager, MemoryUsage};
pub use model::{Forward, Model};
pub use pipeline::DpoPipeline;
pub use result::TrainingResult;
pub use smolora::SmoLora;
pub use trainer::Trainer;

pub use fleet_common::events::{EventBody, Level};
pub use fleet_common::exit::Fault;
pub use fleet_common::job::{Bias, Dpo, EarlyStopping, PreferenceLoss, Schedule, Watched};
pub use fleet_data::{Pipeline, Processor, Report, TextCleaning};
pub use fleet_learn::adapter::{Combination, Combined};
pub use fleet_learn::{Error, Result};
pub use fleet_rank::generate::{End, Generated, Sampling, Settings};
pub use fleet_rank::merge::Merged;
