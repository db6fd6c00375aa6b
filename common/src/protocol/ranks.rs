//! Between an agent and the ranks that it starts.

use super::Rank;
use crate::events::{Event, JobError, Outcome};
use crate::ids::{Generation, JobId};
use crate::net::PrivateKey;
use serde::{Deserialize, Serialize};

/// Environment variable with the number of the inherited socket to the agent.
pub const RANK_SOCKET_ENV: &str = "FLEET_RANK_SOCKET";

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum ToRank {
    /// First.
    Start(Box<RankStart>),
    /// Stop at the next step that all ranks agree on, with a checkpoint.
    Stop,
    /// The checkpoint of this step is recorded: older ones may be rotated away.
    CheckpointCommitted { step: u64 },
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RankStart {
    pub job: JobId,
    pub generation: Generation,
    pub rank: Rank,
    /// Ranks of the whole job.
    pub world_size: u32,
    /// Among the ranks of this host, which are `local_world_size` and follow each other.
    pub local_rank: u32,
    pub local_world_size: u32,
    /// Which of the job's `hosts` this is: they have ranks in this order, and as many each.
    pub host: u32,
    pub hosts: u32,
    /// `Job::to_json`.
    pub job_json: String,
    /// Directory of the token cache (`fleet_data::TokenCache::open`).
    pub cache_dir: String,
    /// The checkpoint to continue from, already verified by the agent.
    pub resume: Option<String>,
    /// The name of a run that begins with this job, for `fleet_checkpoint::Claim`.
    pub run: String,
    /// That compute.
    pub threads: u32,
    /// `cpu`, `cuda:0`, `mps`.
    pub device: String,
    /// Inherited file descriptor of the segment that the ranks of this host share; `None` for one rank.
    pub shm_fd: Option<i32>,
    /// How ranks on other hosts are reached; `None` where there are none.
    pub network: Option<Network>,
}

/// What a rank needs to meet those of other hosts. Made for one generation, and over with it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Network {
    /// All ranks of the job, this one too, in rank order: the same list for each of them.
    pub peers: Vec<Peer>,
    /// This rank's ed25519 key. It never leaves the host.
    pub key: PrivateKey,
    /// Inherited file descriptor of the TCP socket on which the others call this rank. It listens already.
    pub listener_fd: i32,
}

/// Where a rank can be called, and by which key it is known.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Peer {
    /// Ranks with the same number are on one host; from 0 in rank order.
    pub host: u32,
    /// Name or address of its host, without a port.
    pub address: String,
    pub port: u16,
    /// As in `Endpoint`.
    pub key: Vec<u8>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum FromRank {
    /// Passed on by the agent in order. Step, eval and checkpoint events come from rank 0 only.
    Event(Event),
    /// The rank is done and will exit with 0.
    Done(Outcome),
    /// The rank cannot go on and will exit with 1.
    Failed(JobError),
}
