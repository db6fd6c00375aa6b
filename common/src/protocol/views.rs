//! What the cluster shows of itself.

use super::{CoordinatorAddress, Files, Member, Role, Wish};
use crate::events::{CheckpointRecord, DataStats, JobError, Stall};
use crate::ids::{Generation, JobId, NodeId, ReplicaId};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ClusterView {
    pub cluster_id: String,
    pub leader: Option<ReplicaId>,
    pub term: u64,
    pub commit_index: u64,
    pub applied_index: u64,
    pub nodes: u32,
    pub jobs_running: u32,
    pub jobs_queued: u32,
    /// Why the coordinator refuses writes, if it does (full disk).
    pub read_only: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NodeView {
    pub node: NodeId,
    pub name: String,
    pub connected: bool,
    pub slots: u32,
    pub slots_used: u32,
    /// Silent for so long that its jobs were given up.
    pub lost: bool,
    /// Gets no more work.
    pub drained: bool,
    pub labels: BTreeMap<String, String>,
    /// Where other nodes reach it.
    pub host: String,
    pub device: String,
    pub version: String,
    /// Since the last heartbeat; `None` when none was heard by this leader.
    pub heard_ms_ago: Option<u64>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct JobView {
    pub job: JobId,
    pub name: String,
    pub state: JobState,
    /// A sentence: why it waits, what it does, how it ended.
    pub reason: String,
    pub world_size: u32,
    pub wish: Wish,
    /// Where its ranks are, in rank order.
    pub parts: Vec<PartView>,
    pub generation: Generation,
    pub submitted_unix_ms: u64,
    pub finished_unix_ms: Option<u64>,
    pub step: u64,
    pub total_steps: u64,
    pub loss: Option<f64>,
    pub eval_loss: Option<f64>,
    pub tokens_per_s: Option<f64>,
    /// Of all its ranks, shared pages counted once.
    pub memory_mib: Option<u64>,
    /// While it stands still.
    pub stall: Option<Stall>,
    pub events: u64,
    pub checkpoint: Option<CheckpointRecord>,
    pub error: Option<JobError>,
    pub data: Option<DataStats>,
    /// Canonical JSON of the job; empty for a program. Only in answers to `Request::Job`.
    pub job_json: String,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PartView {
    pub node: NodeId,
    pub name: String,
    pub ranks: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum JobState {
    Queued,
    /// The gang was assigned to a node.
    Starting,
    Running,
    /// Asked to stop.
    Stopping,
    Succeeded,
    Failed,
    Cancelled,
}

impl JobState {
    pub fn is_final(self) -> bool {
        matches!(self, JobState::Succeeded | JobState::Failed | JobState::Cancelled)
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CheckpointView {
    pub job: JobId,
    pub run_name: String,
    /// Its shards are only in answers to `Request::Checkpoint`.
    pub checkpoint: CheckpointRecord,
    pub unix_ms: u64,
    /// Where it lies.
    pub places: Vec<CheckpointPlace>,
}

/// A node that has a checkpoint, or files of it, on its disk.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CheckpointPlace {
    pub node: NodeId,
    pub name: String,
    pub files: Files,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CoordinatorView {
    pub address: CoordinatorAddress,
    pub name: String,
    pub version: String,
    /// Counts for majorities; a learner is still being brought up to date.
    pub voter: bool,
    pub leads: bool,
    /// How far its log agrees with the leader's; `None` where the answer does not come from the leader.
    pub matched_index: Option<u64>,
    /// Heard by the leader within the last election timeout.
    pub alive: Option<bool>,
    /// It refuses writes because its disk cannot take them; `None` where that is not known.
    pub read_only: Option<bool>,
    /// Its disk, or another one's, was put back to an older state: what was said of it last.
    pub alarm: Option<String>,
}

/// How the cluster's CA stands.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AuthorityView {
    /// SHA-256 of its certificate, in hex.
    pub ca_sha256: String,
    /// The CA that is to replace it.
    pub next: Option<NextAuthorityView>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NextAuthorityView {
    /// SHA-256 of its certificate, in hex.
    pub ca_sha256: String,
    pub since_unix_ms: u64,
    /// It issues, and members trust both.
    pub moving: bool,
    /// Coordinators that do not have its key yet.
    pub without_key: Vec<ReplicaId>,
    /// Workers and clients that have not shown a certificate of it: how many, and the first of them.
    pub not_moved: u64,
    pub first_not_moved: Vec<Member>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TokenView {
    pub id: String,
    pub role: Role,
    pub expires_unix_ms: u64,
    pub uses_left: u32,
}

/// One who is let in, and can be cut off.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MemberView {
    pub member: Member,
    pub role: Role,
    /// Empty where it has not said one: a coordinator that never came.
    pub name: String,
    /// When it was let in, where that is known: not of a node, nor of the first coordinator.
    pub joined_unix_ms: Option<u64>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DecisionView {
    /// Decisions are counted from 1.
    pub number: u64,
    pub unix_ms: u64,
    pub why: String,
}

/// How much is kept of what has ended, and how much there is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RetentionView {
    /// What ended longer ago is removed, in seconds.
    pub age_s: u64,
    /// The oldest of what has ended is removed where there is more than this.
    pub bytes_max: u64,
    /// Of all rows that are kept, as they are counted: what RocksDB needs besides is not in it.
    pub bytes: u64,
    /// Jobs, runs and the like that have ended and are kept.
    pub ended: u64,
    /// Those that were removed.
    pub removed: u64,
    /// When the newest of those had ended.
    pub removed_unix_ms: Option<u64>,
}
