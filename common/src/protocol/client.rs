//! What clients ask and what they are answered.

use super::{Role, views::*};
use crate::events::Event;
use crate::ids::{ClientId, JobId};
use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ClientFrame {
    pub version: u32,
    /// With `seq`, makes a change happen once however often it is sent. Queries ignore both.
    pub client: ClientId,
    /// Rises with every new change; the same on a retry.
    pub seq: u64,
    /// A query may be answered from what this coordinator has, which may be old, without asking the others.
    pub stale: bool,
    pub request: Request,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Request {
    Submit(SubmitJob),
    /// The first stops with a checkpoint, `now` at once.
    Cancel {
        job: JobId,
        now: bool,
    },
    CreateToken {
        role: Role,
        ttl_s: u64,
        uses: u32,
    },
    ClusterStatus,
    Nodes,
    Jobs,
    Job(JobId),
    Checkpoints {
        job: Option<JobId>,
    },
    /// The job's events from the `from`-th on (1 is the first); the stream stays open until the job's `Finished` event was sent if `follow`.
    Watch {
        job: JobId,
        from: u64,
        follow: bool,
    },
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SubmitJob {
    /// Ranks to start.
    pub world_size: u32,
    pub work: Work,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Work {
    /// `Job::to_json`.
    Train { job_json: String },
    /// Any program, as torchrun would run it.
    Program(Program),
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Program {
    /// Program and arguments; found by the agent in `PATH` of `env` or relative to `working_dir`.
    pub argv: Vec<String>,
    pub working_dir: String,
    /// The whole environment, before RANK and the like are set.
    pub env: Vec<(String, String)>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Reply {
    Submitted {
        job: JobId,
    },
    CancelAccepted,
    Token {
        text: String,
    },
    Cluster(ClusterView),
    Nodes(Vec<NodeView>),
    Jobs(Vec<JobView>),
    Job(Box<JobView>),
    Checkpoints(Vec<CheckpointView>),
    /// One item of a `Watch`; `index` counts the job's events from 1 over all generations.
    Event {
        index: u64,
        event: Event,
    },
    /// The end of a `Watch`.
    EndOfEvents,
    Refused(Refusal),
}

/// One line, and what kind of refusal it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    pub kind: RefusalKind,
    pub message: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum RefusalKind {
    /// The request cannot be carried out as it is.
    Invalid,
    NotFound,
    /// The certificate's role does not allow it.
    Forbidden,
    /// Not now: no leader, disk full. Try again.
    Unavailable,
}
