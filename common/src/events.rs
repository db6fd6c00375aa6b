//! What happens in a running job, in the order in which it happened.
//!
//! One ordered stream per generation of a job: ranks tell their agent, the agent numbers the events from 1 and sends them until the
//! coordinator has committed them through raft, so that none is lost or doubled when a process in between dies.

use crate::exit::Fault;
use crate::ids::{Generation, JobId, Rank};
use serde::{Deserialize, Serialize};

/// An event with the wall clock of its node, in milliseconds since 1970.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Event {
    pub unix_ms: u64,
    pub body: EventBody,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum EventBody {
    /// The token cache is there; the ranks start.
    DataReady(DataStats),
    /// All ranks have loaded the model and met; training starts at `step`.
    Started {
        step: u64,
        parameters: u64,
        device: String,
    },
    Step(Step),
    Eval(Evaluation),
    /// A checkpoint is durable on disk. It becomes valid by being committed.
    Checkpoint(CheckpointRecord),
    /// Saving failed; training goes on, the last valid checkpoint stays.
    CheckpointFailed {
        step: u64,
        error: String,
    },
    /// A line that a rank, or with `rank: None` the agent, wrote.
    Log {
        rank: Option<Rank>,
        level: Level,
        line: String,
    },
    /// Resident and proportional set size of each rank of one node, in MiB, from `first_rank` on.
    Memory {
        first_rank: Rank,
        rss_mib: Vec<u64>,
        pss_mib: Vec<u64>,
    },
    /// The last event of a generation.
    Finished(Outcome),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    Info,
    Warn,
    Error,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DataStats {
    pub documents: u64,
    pub train_windows: u64,
    pub validation_windows: u64,
    pub train_tokens: u64,
    /// Bytes of UTF-8 text per token of the validation part, to turn nats per token into bits per byte.
    pub validation_bytes_per_token: f64,
    pub vocab_size: u32,
    /// Read from an earlier build of the same data.
    pub cached: bool,
    pub seconds: f64,
}

/// After an optimizer step. `loss` is the mean over the tokens of the global batch, in nats.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Step {
    /// 1 after the first optimizer step.
    pub step: u64,
    pub total_steps: u64,
    pub epoch: f64,
    pub loss: f64,
    pub lr: f64,
    /// Before clipping.
    pub grad_norm: f64,
    /// Of all ranks, over the steps since the last event.
    pub tokens_per_s: f64,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    pub step: u64,
    /// Mean over the validation tokens, in nats.
    pub loss: f64,
    pub bits_per_byte: f64,
    pub tokens: u64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CheckpointRecord {
    pub step: u64,
    /// Absolute path on the node.
    pub path: String,
    /// SHA-256 of the manifest, which holds the hash of every file, in hex.
    pub manifest_sha256: String,
    pub bytes: u64,
    pub loss: f64,
    /// How many ranks wrote it.
    pub writers: u32,
    /// Every file but the manifest.
    pub shards: Vec<Shard>,
}

/// A file of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shard {
    /// Which of the writers wrote it.
    pub writer: Rank,
    pub name: String,
    pub bytes: u64,
    /// In hex.
    pub sha256: String,
}

/// How a generation of a job ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Outcome {
    Succeeded {
        steps: u64,
        final_loss: Option<f64>,
        tokens_per_s: f64,
    },
    /// Stopped on request, after a checkpoint where there was time for one.
    Stopped {
        steps: u64,
    },
    Failed(JobError),
}

/// Why a job failed, with the culprit named where there is one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct JobError {
    pub fault: Fault,
    pub rank: Option<Rank>,
    pub node: Option<String>,
    pub signal: Option<i32>,
    pub exit_code: Option<i32>,
    /// One line: what happened to which thing, and what to do.
    pub message: String,
    /// The rank's last log lines.
    pub last_lines: Vec<String>,
}

/// Events `first_seq..first_seq + events.len()` of one generation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EventBatch {
    pub job: JobId,
    pub generation: Generation,
    pub first_seq: u64,
    pub events: Vec<Event>,
}
