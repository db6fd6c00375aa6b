//! What happens in a running job, in the order in which it happened.
//!
//! One ordered stream per generation of a job: ranks tell their agent, the agent numbers the events from 1 and sends them until the
//! coordinator has committed them through raft, so that none is lost or doubled when a process in between dies.

use crate::exit::Fault;
use crate::ids::{Generation, JobId, Rank};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// An event with the wall clock of its node, in milliseconds since 1970.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Event {
    pub unix_ms: u64,
    pub body: EventBody,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum EventBody {
    /// The token cache is there; the ranks start, or wait for those of other nodes.
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
    /// Here the gang printed more than the coordinators take: so many lines are only in the files of its nodes.
    LeftOut {
        lines: u64,
        /// Of their text.
        bytes: u64,
    },
    /// For whom the gang waits now, if it stands still: in place of what was told before. It is shown, and not kept.
    Stall(Option<Stall>),
    /// The ranks of one of several nodes can be called, in rank order. For the other ranks of this generation, and not kept.
    Listening(Vec<Endpoint>),
    /// Where the time of the last steps went.
    Times(Times),
    /// What the gang was to go on from cannot be had on this node, and the cluster decides what becomes of it. Not kept as it is.
    CheckpointLost {
        manifest_sha256: String,
        /// Which piece is missing, and who had it, in one line.
        why: String,
    },
    /// Older checkpoints were removed from a disk, for newer ones or for want of room. The cluster's record follows; not kept as it is.
    CheckpointsRemoved {
        /// Of the gang, those that see the disk, by their number in the order of ranks.
        hosts: Vec<u32>,
        /// Hashes of their manifests, in hex.
        manifests: Vec<String>,
    },
    /// What else is known of a step or an evaluation.
    Metrics(Metrics),
}

/// Where a rank listens on its node, and by which key it is known there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoint {
    /// Of TCP.
    pub port: u16,
    /// Public half of an ed25519 key that was made for this rank and generation: a SubjectPublicKeyInfo in DER.
    pub key: Vec<u8>,
}

/// Bytes of a public key, with room to spare: those of ed25519 have 44.
const KEY_MAX: usize = 128;

impl Endpoint {
    /// Somebody could be called there.
    pub fn is_sound(&self) -> bool {
        self.port != 0 && (1..=KEY_MAX).contains(&self.key.len())
    }
}

/// A gang stands still.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stall {
    pub since_unix_ms: u64,
    /// For whom it waits and what those do, in one line.
    pub what: String,
    pub culprit: Culprit,
}

/// What a node sees of those of its ranks for whom a gang waits. Of several nodes the one that sees most tells, which is the last here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Culprit {
    /// They wait in calls themselves, and perhaps for ranks of another node.
    Waits,
    /// They compute longer than the others.
    Slow,
    /// They make no call.
    Silent,
    /// A signal or a debugger has stopped them.
    Stopped,
}

/// Bytes that a line of output counts where there is a budget: its text, and what an event takes besides.
pub fn line_cost(line: &str) -> u64 {
    line.len() as u64 + 64
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
    /// SHA-256 of all that ranks read of the data, in hex: the same on every node of a job.
    pub fingerprint: String,
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

/// Seconds of a step, in parts: means over all ranks and over `steps` steps up to `step`. What a device has not done when the next part begins
/// counts with that one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Times {
    pub step: u64,
    pub steps: u64,
    pub data_s: f64,
    pub forward_s: f64,
    /// With the head's forward.
    pub backward_s: f64,
    /// In which nothing is computed, of the rank that has least of it: it waits for no slower one.
    pub communication_s: f64,
    /// What the others have more of it than that rank: waiting for slower ones.
    pub waiting_s: f64,
    pub optimizer_s: f64,
    /// Copying what is saved, and waiting for an earlier save.
    pub checkpoint_s: f64,
}

impl Times {
    /// The parts, by their names.
    pub fn parts(&self) -> [(&'static str, f64); 7] {
        [
            ("data", self.data_s),
            ("forward", self.forward_s),
            ("backward", self.backward_s),
            ("communication", self.communication_s),
            ("waiting", self.waiting_s),
            ("optimizer", self.optimizer_s),
            ("checkpoint", self.checkpoint_s),
        ]
    }

    /// All parts together.
    pub fn step_s(&self) -> f64 {
        self.parts().iter().map(|(_, seconds)| seconds).sum()
    }

    /// The means over the steps of both.
    pub fn and(&self, other: &Times) -> Times {
        let steps = self.steps + other.steps;
        let of = |times: &Times| times.steps as f64 / steps.max(1) as f64;
        let mean = |mine: f64, theirs: f64| mine * of(self) + theirs * of(other);
        Times {
            step: self.step.max(other.step),
            steps,
            data_s: mean(self.data_s, other.data_s),
            forward_s: mean(self.forward_s, other.forward_s),
            backward_s: mean(self.backward_s, other.backward_s),
            communication_s: mean(self.communication_s, other.communication_s),
            waiting_s: mean(self.waiting_s, other.waiting_s),
            optimizer_s: mean(self.optimizer_s, other.optimizer_s),
            checkpoint_s: mean(self.checkpoint_s, other.checkpoint_s),
        }
    }
}

/// By TRL's names; those of an evaluation begin with `eval_`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Metrics {
    pub step: u64,
    pub values: Vec<(String, f64)>,
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
    /// Of all shards together.
    pub bytes: u64,
    pub loss: f64,
    /// How many ranks wrote it: the first ones.
    pub writers: u32,
    /// Of each host of the gang, in the order of ranks, the disk that it sees: hosts with the same number see the same directory. They are
    /// numbered from 0 in the order in which they come.
    pub disks: Vec<u32>,
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
    /// Of the file, in hex; of one with tensors, that of all its hashes in the manifest.
    pub sha256: String,
}

/// Files of one checkpoint: with names of the longest kind they fit into one command of the log.
pub const SHARDS_MAX: usize = 8_192;
/// Hosts of one gang.
pub const HOSTS_MAX: usize = 4_096;
/// Bytes of a path on a node: what Linux allows.
pub const PATH_MAX: usize = 4_096;

impl CheckpointRecord {
    /// What is wrong with it: every writer must have a shard, every shard a name of its own and a hash, and together they must be all
    /// that was written. The agent asks before it passes a checkpoint on, the cluster before it records it: what is recorded is whole.
    pub fn flaw(&self) -> Option<String> {
        let CheckpointRecord { writers, disks, shards, manifest_sha256, bytes, path, .. } = self;
        let mut next = 0;
        let in_order = disks.iter().all(|disk| {
            let is_known = *disk <= next;
            next = next.max(disk.saturating_add(1));
            is_known
        });
        if disks.is_empty() || disks.len() > HOSTS_MAX || !in_order {
            return Some(format!("the disks of its {} hosts are not numbered as they come", disks.len()));
        }
        if shards.len() > SHARDS_MAX {
            return Some(format!("it names {} files, and {SHARDS_MAX} is the limit", shards.len()));
        }
        if path.is_empty() || path.len() > PATH_MAX || path.contains(char::is_control) {
            return Some(format!("it needs a path of at most {PATH_MAX} bytes without control characters"));
        }
        if !is_sha256(manifest_sha256) {
            return Some(format!("`{}` is not the hash of a manifest", shown(manifest_sha256)));
        }
        let mut names = BTreeSet::new();
        let mut wrote = BTreeSet::new();
        for shard in shards {
            if !is_file_name(&shard.name) || !names.insert(&shard.name) {
                return Some(format!("the name `{}` is wrong or there twice", shown(&shard.name)));
            }
            if !is_sha256(&shard.sha256) {
                return Some(format!("{} has no hash", shard.name));
            }
            if shard.writer >= *writers {
                return Some(format!("{} is by rank {} of {writers}", shard.name, shard.writer));
            }
            wrote.insert(shard.writer);
        }
        if let Some(missing) = (0..*writers).find(|writer| !wrote.contains(writer)) {
            return Some(format!("there is no shard of rank {missing} of {writers}"));
        }
        let sum = shards.iter().fold(0u64, |sum, shard| sum.saturating_add(shard.bytes));
        match (*writers, sum) {
            (0, _) => Some("nobody wrote it".to_owned()),
            (_, sum) if sum != *bytes => {
                Some(format!("its shards have {sum} bytes together, and it has {bytes}"))
            }
            _ => None,
        }
    }
}

/// 64 hexadecimal digits.
pub fn is_sha256(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

fn is_file_name(name: &str) -> bool {
    let wrong = |c: char| c == '/' || c == '\\' || c.is_control();
    !name.is_empty() && name.len() <= 255 && name != "." && name != ".." && !name.contains(wrong)
}

fn shown(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(80).collect()
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

/// How a job failed, for programs that read it; `JobError::message` says it in words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureKind {
    /// A node could not take it on: its settings, its data or the machine are at fault.
    Refused,
    /// A rank was never started.
    NotStarted,
    /// A rank said what is wrong with it.
    Rank,
    /// A rank did not do its part, as another one saw.
    Peer,
    /// A rank was told that what the ranks did together had failed, and nothing else is known.
    Told,
    /// A rank was killed by a signal.
    Signal,
    /// A rank ended with an exit code and without a word.
    ExitCode,
    /// The job had its maximum time.
    Time,
    /// A node was given up, or its worker lost its ranks.
    Node,
}

/// Why a job failed, with the culprit named where there is one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct JobError {
    pub kind: FailureKind,
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

#[cfg(test)]
mod tests {
    use super::*;

    fn whole() -> CheckpointRecord {
        let shard =
            |writer| Shard { writer, name: format!("part-{writer}"), bytes: 10, sha256: "ab".repeat(32) };
        CheckpointRecord {
            step: 7,
            path: "/out/step-7".into(),
            manifest_sha256: "cd".repeat(32),
            bytes: 20,
            loss: 1.0,
            writers: 2,
            disks: vec![0, 1],
            shards: vec![shard(0), shard(1)],
        }
    }

    fn spoiled(spoil: impl Fn(&mut CheckpointRecord)) -> Option<String> {
        let mut record = whole();
        spoil(&mut record);
        record.flaw()
    }

    #[test]
    fn a_manifest_needs_every_shard_once_and_with_its_hash() {
        assert_eq!(spoiled(|_| {}), None);
        let says =
            |what: &str, flaw: Option<String>| assert!(flaw.as_ref().unwrap().contains(what), "{flaw:?}");
        says("no shard of rank 1 of 2", spoiled(|record| record.shards.truncate(1)));
        says("no shard of rank 2 of 3", spoiled(|record| record.writers = 3));
        says("by rank 1 of 1", spoiled(|record| record.writers = 1));
        says("there twice", spoiled(|record| record.shards[1].name = record.shards[0].name.clone()));
        says("`../x` is wrong", spoiled(|record| record.shards[1].name = "../x".into()));
        says("is wrong", spoiled(|record| record.shards[1].name = "a\x1b[2Jb".into()));
        says("has no hash", spoiled(|record| record.shards[0].sha256 = "zz".into()));
        says("not the hash of a manifest", spoiled(|record| record.manifest_sha256.clear()));
        says("its shards have", spoiled(|record| record.bytes = 21));
        says("a path", spoiled(|record| record.path = "x".repeat(PATH_MAX + 1)));
        says("not numbered as they come", spoiled(|record| record.disks = vec![0, 2]));
        says("not numbered as they come", spoiled(|record| record.disks.clear()));
        says("nobody wrote it", spoiled(|record| (record.writers, record.shards) = (0, Vec::new())));
    }
}
