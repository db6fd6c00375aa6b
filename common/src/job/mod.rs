//! A training job as fleet understands it: every field decided, nothing contradictory.
//!
//! A `Job` is made only by parsing a job file (`job::load`) or by reading back the canonical JSON that `Job::to_json`
//! wrote, which is how it travels and is stored. Its fields are valid together; what depends on the machine or the data (does
//! the file exist, are there enough slots) is checked where it is known.

mod adapter;
mod dpo;
mod early_stopping;
mod elsewhere;
mod error;
mod fields;
mod formats;
mod idle;
mod load;
mod model;
mod ranks;
mod reference;
mod render;
mod rows;
mod run_name;
mod set;
mod settings;
pub mod suggest;
mod value;
mod vocabulary;

pub use adapter::{Adapter, Bias, Init, Quantization, Targets};
pub use dpo::{Dpo, PreferenceLoss};
pub use early_stopping::{EarlyStopping, Watched};
pub use error::{JobFileError, Warning};
pub use fields::keys;
pub use load::{RANKS_MAX, READABLE, VOCAB_MIN, load, of_data, parse_toml};
pub use ranks::{Asked, RanksError, Shape};
pub use reference::reference;
pub use rows::{BadRows, ChatTemplate, LossOn, ROW_FIELDS, RowFormat, Rows};

use crate::ids::Rank;
use crate::model::{Family, Object};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// A valid job. Aliases of its fields exist only in job files.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Job {
    pub task_name: String,
    /// Names the run and its directory below `output_dir`.
    pub run_name: String,
    /// Absolute. Checkpoints lie in `output_dir/checkpoints/run_name/`.
    pub output_dir: PathBuf,
    /// The directory in which the job file's relative paths were resolved.
    pub working_dir: PathBuf,
    pub seed: u64,
    pub strategy: Strategy,
    pub devices: Devices,
    /// `None`: what `fleet submit --nodes` says, else one.
    pub num_nodes: Option<u32>,
    pub device: Device,
    #[serde(default)]
    pub executor: Executor,
    pub precision: Precision,
    /// Sequences per rank in one micro-batch.
    pub batch_size: u32,
    pub accumulate_grad_batches: u32,
    #[serde(default)]
    pub activation_checkpointing: ActivationCheckpointing,
    /// How far embeddings are moved at random in training (NEFTune, arXiv:2310.05914): each number by at most this, divided by the square root of
    /// all numbers of its sequence.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub neftune_noise_alpha: Option<f64>,
    /// Under fsdp, where weights are gathered: a block's go after its forward and are gathered again for its backward. Else they stay for the step.
    #[serde(default = "yes")]
    pub reshard_after_forward: bool,
    /// The optimizer's state and the weights that it updates are in the memory of the host, not of the device.
    #[serde(default)]
    pub offload_optimizer: bool,
    /// What carries the bytes between ranks on several nodes.
    #[serde(default)]
    pub transport: Transport,
    /// What ranks on several nodes send each other is encrypted.
    #[serde(default = "yes")]
    pub transport_encryption: bool,
    /// Tokens in one sequence; a window of this length gives `max_seq_len - 1` predictions.
    pub max_seq_len: u32,
    pub epochs: u32,
    /// Optimizer steps; wins over `epochs` where present.
    pub max_steps: Option<u64>,
    /// Emit a step event every this many optimizer steps.
    pub logging_steps: u64,
    /// Record the run's series in the cluster's history.
    pub log_to_db: bool,
    /// Stop the job after this many seconds.
    pub max_time_s: Option<u64>,
    /// Threads that compute in each rank; `None`: cores of the node divided by its ranks, at least 1.
    pub threads_per_rank: Option<u32>,
    /// Each rank writes beside this file what it did when. Absolute.
    #[serde(default)]
    pub trace: Option<PathBuf>,
    pub model: Model,
    /// Trained in the place of the model, which then stays as it is.
    #[serde(default)]
    pub adapter: Option<Adapter>,
    /// Pairs of answers are learnt, not texts.
    #[serde(default)]
    pub dpo: Option<Dpo>,
    /// How the matrices of a model are kept that stays as it is.
    #[serde(default)]
    pub quantization: Option<Quantization>,
    pub tokenizer: Tokenizer,
    pub data: Data,
    pub optimizer: Optimizer,
    pub checkpoint: Checkpoint,
    pub eval: Eval,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub early_stopping: Option<EarlyStopping>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Transport {
    #[default]
    Tcp,
    /// From one UDP port for each rank; always encrypted.
    Quic,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Strategy {
    /// One rank: plain; more: what fits, by the memory of the nodes.
    Auto,
    /// Data-parallel.
    Ddp,
    /// Gradients and optimizer state are sharded over all ranks.
    Fsdp,
    /// They are sharded over the ranks of each host, and the hosts are data-parallel.
    Hsdp,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Devices {
    /// As many ranks as `fleet launch -n` or `fleet submit -n` asks for, else one on each node.
    Auto,
    /// So many ranks on each node.
    Count(u32),
    /// A rank for each of these, on each node.
    Ids(Vec<u32>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Device {
    Auto,
    Cpu,
    Cuda,
    Mps,
}

/// What computes a model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Executor {
    /// What suits the device.
    #[default]
    Auto,
    /// fleet's own forward and backward, on the CPU.
    Cpu,
    /// libtorch's operations and autograd, on any device.
    Torch,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Precision {
    #[serde(rename = "32")]
    Fp32,
    /// fp32 master weights, bf16 copy for the products.
    #[serde(rename = "bf16-mixed")]
    Bf16Mixed,
    /// fp32 master weights, fp16 copy for the products, losses that are scaled.
    #[serde(rename = "16-mixed")]
    Fp16Mixed,
    /// Weights, gradients and moments in bf16.
    #[serde(rename = "bf16-true")]
    Bf16True,
}

fn yes() -> bool {
    true
}

/// Of which blocks nothing is kept between forward and backward but what they read: they are computed a second time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ActivationCheckpointing {
    #[default]
    None,
    Blocks,
    /// So many, from the first on.
    First(u32),
}

impl ActivationCheckpointing {
    /// How many of a model's `blocks`.
    pub fn of(self, blocks: usize) -> usize {
        match self {
            ActivationCheckpointing::None => 0,
            ActivationCheckpointing::Blocks => blocks,
            ActivationCheckpointing::First(count) => blocks.min(count as usize),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Model {
    /// Fresh weights of this shape: what its family's `config.json` says, `model_type` and every default included.
    New(Object),
    /// Weights, config.json and tokenizer.json from a Hugging Face directory. Absolute path.
    Pretrained(PathBuf),
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Tokenizer {
    /// Train a byte-level BPE of the model's `vocab_size` on the training documents.
    Train { vocab_size: u32 },
    /// A given `tokenizer.json`. Absolute path.
    File(PathBuf),
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Data {
    /// Files and directories. Absolute paths, in the order given.
    pub paths: Vec<PathBuf>,
    /// Globs, relative to a directory in `paths`, of the files to take from it. A file named in `paths` is always taken.
    pub include: Vec<String>,
    /// Globs of the files and folders to leave out. Hidden files and `target` are always left out.
    pub exclude: Vec<String>,
    /// Field of a JSONL or CSV row that holds the text.
    pub text_field: String,
    /// Share of the documents held out for evaluation, `0.0..1.0`.
    pub validation_fraction: f64,
    pub clean: Clean,
    /// Of each path, how often what it has is trained on in an epoch; empty where that is once.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub weights: Vec<f64>,
    /// Of plain text.
    #[serde(default, skip_serializing_if = "BadRows::stops")]
    pub bad_rows: BadRows,
    /// `None`: plain text is learnt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rows: Option<Rows>,
}

impl Data {
    /// Nobody said which files of a folder are to be read.
    pub fn takes_all_kinds(&self) -> bool {
        self.include == load::READABLE || self.include == rows::READABLE
    }
}

/// Cleaning, in this order. All off by default.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Clean {
    pub remove_html: bool,
    pub normalize_whitespace: bool,
    /// Documents of fewer characters are dropped.
    pub min_chars: usize,
    /// So are those that are at least so similar to one before them, `0.0..=1.0`, of which 1 is equal but for case and punctuation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub near_duplicates: Option<f64>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Optimizer {
    pub learning_rate: f64,
    pub schedule: Schedule,
    /// Steps of linear rise from 0. `None`: 50, and no more than a tenth of the run, which is none where that has fewer than ten steps.
    pub warmup_steps: Option<u64>,
    /// The cosine ends at this share of `learning_rate`.
    pub min_lr_ratio: f64,
    pub weight_decay: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    /// Gradients are scaled down to this norm; 0 turns clipping off.
    pub max_grad_norm: f64,
}

impl Optimizer {
    /// The warm-up of a job that says nothing, in a run that is long enough.
    pub const WARMUP_STEPS: u64 = 50;

    /// Steps of the warm-up in a run of `total`. Below ten steps a tenth is none: the first step of a warm-up has rate 0 and would be lost.
    pub fn warmup(&self, total: u64) -> u64 {
        match self.warmup_steps {
            Some(steps) if steps <= total => steps,
            Some(_) => total / 10,
            None => Optimizer::WARMUP_STEPS.min(total / 10),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Schedule {
    Cosine,
    Linear,
    Constant,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Checkpoint {
    /// Save every this many steps, and at the end; 0: only at the end.
    pub save_steps: u64,
    /// Keep this many newest checkpoints.
    pub save_total_limit: u32,
    pub resume: Resume,
    /// Whether checkpoints of another run, where this one begins, may be removed as soon as it has one of its own.
    #[serde(default)]
    pub overwrite: bool,
    /// Whether the one of the best evaluation is saved and stays, too.
    #[serde(default)]
    pub keep_best: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Resume {
    /// Start from the model's fresh or pretrained weights.
    No,
    /// The newest valid checkpoint of this run, if there is one.
    Latest,
    /// This checkpoint. Absolute path.
    Path(PathBuf),
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Eval {
    /// Evaluate every this many steps, before the first step and at the end; 0: never.
    pub eval_steps: u64,
    /// Sequences per rank in one evaluation batch, at most `Job::batch_size`.
    pub batch_size: u32,
    /// Evaluate on at most this many windows; `None`: all.
    pub max_eval_examples: Option<u64>,
}

impl Job {
    /// Canonical JSON: how a job travels and is stored.
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).expect("a Job holds only strings, numbers and UTF-8 paths")
    }

    /// Reads what `to_json` wrote. Numbers of up to 15 digits come back bit for bit, longer ones to the last bit but one.
    pub fn from_json(text: &str) -> Result<Job, serde_json::Error> {
        serde_json::from_str(text)
    }

    /// With what is taken where the job says nothing, as far as that hangs on no data: loading it runs the same. What an adapter is follows from its
    /// model's `family`.
    pub fn spelled_out(&self, family: Option<&Family>) -> Job {
        let warmup = self.max_steps.map(|steps| self.optimizer.warmup(steps));
        Job {
            adapter: match (&self.adapter, family) {
                (Some(adapter), Some(family)) => Some(adapter.spelled_out(family)),
                (adapter, _) => adapter.clone(),
            },
            optimizer: Optimizer {
                warmup_steps: self.optimizer.warmup_steps.or(warmup),
                ..self.optimizer.clone()
            },
            ..self.clone()
        }
    }

    /// The files and directories that it reads.
    pub fn inputs(&self) -> Vec<PathBuf> {
        let model = match &self.model {
            Model::Pretrained(dir) => Some(dir),
            Model::New(_) => None,
        };
        let tokenizer = match &self.tokenizer {
            Tokenizer::File(path) => Some(path),
            Tokenizer::Train { .. } => None,
        };
        let adapter = self.adapter.as_ref().and_then(|adapter| adapter.path.as_ref());
        model.into_iter().chain(adapter).chain(tokenizer).chain(&self.data.paths).cloned().collect()
    }

    /// `output_dir/checkpoints/run_name`.
    pub fn checkpoint_dir(&self) -> PathBuf {
        self.output_dir.join("checkpoints").join(&self.run_name)
    }

    /// Where a rank writes its part of the trace, if there shall be one: the file's name with `.rank-N` behind it.
    pub fn trace_of(&self, rank: Rank) -> Option<PathBuf> {
        let mut name = self.trace.clone()?.into_os_string();
        name.push(format!(".rank-{rank}"));
        Some(name.into())
    }
}

#[cfg(test)]
mod tests;
