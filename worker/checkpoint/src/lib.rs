//! Checkpoints on disk: written whole or not at all, every byte covered by a hash, read back without copies.
//!
//! ```text
//! <checkpoint_dir>/step-00000100/
//!   model.safetensors      weights under Hugging Face names
//!   config.json            Hugging Face model description
//!   tokenizer.json
//!   ...                    what else belongs to them: generation_config.json, tokenizer_config.json, a chat template
//!   optimizer.safetensors  state of AdamW
//!   trainer_state.json     step, cursor, seed, what the run was made of
//!   manifest.json          length and SHA-256 of every other file; written last
//! ```
//!
//! `<checkpoint_dir>/.lock` is held by the process that writes there. A directory `step-*` appears by one rename, after everything in it was synced. It never speaks to the cluster: that a
//! checkpoint counts is decided elsewhere, when its record is committed.

mod error;
mod flat;
mod manifest;
mod resume;
mod run_dir;
mod search;
mod state;
mod tensors;
mod writer;

pub use error::CheckpointError;
pub use flat::{ModelDir, stored, stored_shape};
pub use manifest::{Manifest, ManifestFile, manifest_sha256, verify};
pub use resume::take_what_is_gone;
pub use run_dir::{Claim, RunDir};
pub use safetensors::Dtype;
pub use search::{Search, latest};
pub use state::TrainerState;
pub use tensors::{Tensor, Tensors};
pub use writer::{TensorRef, Writer, step_dir};

/// Weights, in Hugging Face's names.
pub const MODEL_FILE: &str = "model.safetensors";
pub const CONFIG_FILE: &str = "config.json";
pub const TOKENIZER_FILE: &str = "tokenizer.json";
pub const OPTIMIZER_FILE: &str = "optimizer.safetensors";
pub const STATE_FILE: &str = "trainer_state.json";
pub const MANIFEST_FILE: &str = "manifest.json";
