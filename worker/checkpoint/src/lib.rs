//! Checkpoints on disk: written whole or not at all, by one rank or by several, every byte covered by a hash, read back range by range.
//!
//! ```text
//! <checkpoint_dir>/step-00000100/
//!   model-00001-of-00002.safetensors      weights under Hugging Face names, whole tensors; model.safetensors where one rank writes
//!   model-00002-of-00002.safetensors
//!   model.safetensors.index.json          which of them has which
//!   config.json                           Hugging Face model description
//!   tokenizer.json
//!   ...                                   what else belongs to them: generation_config.json, tokenizer_config.json, a chat template
//!   optimizer-00001-of-00002.safetensors  what each rank keeps of AdamW's state; optimizer.safetensors where one rank writes
//!   optimizer-00002-of-00002.safetensors
//!   trainer_state.json                    step, cursor, seed, what the run was made of
//!   manifest.json                         every file, every tensor and its pieces, hashes; written last
//! ```
//!
//! Each rank writes files of its own, at the same time as the others. Weights are cut between tensors, not within them, although a rank may
//! keep just a range of each: so the directory is a model as transformers reads it. Nobody else reads the optimizer's state, so each
//! rank writes just what it keeps: parts of tensors, under names such as `model.norm.weight.exp_avg[0:64]`. The manifest puts them together;
//! readers go by it and never by who wrote what, so any number of ranks and any strategy takes any checkpoint. Padding of the flat buffer
//! belongs to no tensor and is never written.
//!
//! Hosts without a common file system write each to its own disk (`disks.rs`), to a directory of the same path. The manifest, the same on all of
//! them, says which file lies on which disk. All that is no optimizer state lies on disk 0, rank 0's: there the directory is a whole model.
//! The checkpoint appears in three steps, each of which all disks have behind them before any begins the next: files written and synced; manifest
//! written, directory synced; renamed. Only then does it count.
//!
//! `<checkpoint_dir>/.lock` is held by the process that writes there. A directory `step-*` appears by one rename, after everything in it was synced. It never speaks to the cluster: that a
//! checkpoint counts is decided elsewhere, when its record is committed.

mod adapter_base;
mod arrival;
mod consolidate;
mod diff;
mod disks;
mod error;
mod flat;
mod manifest;
mod names;
mod part;
mod quantised;
mod reading;
mod resume;
mod rewrite;
mod run_dir;
mod search;
mod shard;
mod state;
mod stock;
mod tensors;
mod unfinished;
mod verify;
mod weights_hash;
mod writer;

pub use adapter_base::{ADAPTER_BASE_FILE, AdapterBase, of_another_base, of_fewer_bits};
pub use arrival::{Arrival, ArrivingFile, Unfit};
pub use consolidate::consolidate;
pub use diff::{Difference, Differs, diff};
pub use disks::{Disks, Mark, MarkOf};
pub use error::CheckpointError;
pub use flat::{ModelDir, read_parameter, read_part, stored, stored_shape};
pub use manifest::{
    MANIFEST_MAX, Manifest, ManifestFile, ManifestTensor, Piece, is_manifest, manifest_sha256,
};
pub use names::{
    ADAPTER_FILE, CONFIG_FILE, MANIFEST_FILE, MODEL_FILE, MODEL_INDEX_FILE, OPTIMIZER_FILE, STATE_FILE,
    TOKENIZER_FILE, model_file, optimizer_file, writers,
};
pub use part::{PartWriter, TensorRef};
pub use quantised::{
    FourBitForm, FourBitKind, HqqForm, NestedScales, QuantisedForm, QuantisedPart, QuantisedWeight,
};
pub use reading::{Reading, read_numbers};
pub use resume::{can_begin, continued, take_what_is_gone};
pub use rewrite::{NewTensor, new_directory, remake, rewrite};
pub use run_dir::{Claim, RunDir};
pub use safetensors::Dtype;
pub use search::{Search, latest, steps as checkpoint_steps};
pub use state::{Best, LossScale, Patience, TrainerState};
pub use stock::Stock;
pub use tensors::{Tensor, Tensors};
pub use unfinished::{Unfinished, remove_unfinished};
pub use verify::{inspect, verify};
pub use weights_hash::{weights_sample_sha256, weights_sha256};
pub use writer::{Ticket, Writer, step_dir};
