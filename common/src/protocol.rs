//! The messages between fleet's processes. All are bincode in length-prefixed frames (`codec`).
//!
//! | protocol (ALPN) | from -> to | stream |
//! |---|---|---|
//! | `fleet-join/1` | anyone with a token -> coordinator, clients' socket | one `JoinRequest`, one `JoinReply`; the only thing open without a certificate |
//! | `fleet/1`, role client | `fleet` -> coordinator, clients' socket | bidirectional streams of requests, one after another on each: `ClientFrame`, then one `Reply` (or many for `Watch`, which is the last of its stream) |
//! | `fleet/1`, role worker | agent -> coordinator, members' socket | one long bidirectional stream: `FromAgent` up, `ToAgent` down |
//! | `fleet-agent/1` | agent -> agent | bidirectional streams: one `Fetch`, one `Fetched`, then the bytes of a file of a checkpoint |
//! | `fleet/1`, role coordinator | coordinator -> coordinator, members' socket | unidirectional streams of `PeerMessage` behind a `PeerHello`: one for raft, one for what is large |
//! | inherited Unix socket | agent <-> rank | `ToRank` down, `FromRank` up |
//! | stdout of a worker | worker -> `fleet launch` | a line of JSON when it is registered; then `Printed`, where it runs a program |

use crate::codec::{self, Versioned};
use crate::events::EventBatch;
use crate::ids::{Generation, JobId, NodeId, ParseIdError, Rank, ReplicaId, UserId};
use crate::net::{Authorities, PrivateKey};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

mod checkpoints;
mod client;
mod environment;
mod output;
mod ranks;
mod records;
mod views;

pub use checkpoints::*;
pub use client::*;
pub use environment::*;
pub use output::*;
pub use ranks::*;
pub use records::*;
pub use views::*;

/// Raised when a message changes its shape; both sides refuse another one.
pub const PROTOCOL_VERSION: u32 = 10;

/// The first message of each stream between coordinators.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerHello {
    pub version: u32,
    /// Drawn when the sender's process began: connections to an earlier one are dead, though nothing has said so yet.
    pub process: u64,
}

impl Versioned for PeerHello {
    fn version(bytes: &[u8]) -> Option<u32> {
        codec::head(bytes)
    }
}

// ---- joining ----------------------------------------------------------------------------------------------------------

/// What somebody is let do. A certificate says one of the first three.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    Coordinator,
    Worker,
    Client,
    /// Of a token: it makes a client that is also let do an operator's work. That is in the cluster's records and not in the certificate.
    Admin,
}

impl Role {
    /// What stands in the certificate of who joined with a token of this role.
    pub fn in_certificate(self) -> Role {
        match self {
            Role::Admin => Role::Client,
            role => role,
        }
    }
}

/// Whom a certificate names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Member {
    Coordinator(ReplicaId),
    Worker(NodeId),
    Client(UserId),
}

impl Member {
    pub fn role(self) -> Role {
        match self {
            Member::Coordinator(_) => Role::Coordinator,
            Member::Worker(_) => Role::Worker,
            Member::Client(_) => Role::Client,
        }
    }
}

impl fmt::Display for Member {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Member::Coordinator(replica) => replica.fmt(f),
            Member::Worker(node) => node.fmt(f),
            Member::Client(user) => user.fmt(f),
        }
    }
}

impl FromStr for Member {
    type Err = ParseIdError;
    /// Only with its prefix, which tells the role: `replica-2`, `node-1`, `user-5`.
    fn from_str(text: &str) -> Result<Self, ParseIdError> {
        match text.split_once('-') {
            Some(("replica", _)) => text.parse().map(Member::Coordinator),
            Some(("node", _)) => text.parse().map(Member::Worker),
            Some(("user", _)) => text.parse().map(Member::Client),
            _ => Err(ParseIdError::new(text, "node-1")),
        }
    }
}

/// Where a coordinator is reached, each as HOST:PORT.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CoordinatorAddress {
    pub replica: ReplicaId,
    /// By clients, and by those who join.
    pub client: String,
    /// By the other coordinators and by agents.
    pub member: String,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct JoinRequest {
    pub version: u32,
    pub token_id: String,
    pub token_secret: String,
    /// DER of a PKCS#10 request signed by the joiner's own key. The CA takes only the public key from it.
    pub csr_der: Vec<u8>,
    /// A wish, shown in listings; the CA decides the identity.
    pub name: String,
}

impl Versioned for JoinRequest {
    fn version(bytes: &[u8]) -> Option<u32> {
        codec::head(bytes)
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum JoinReply {
    Accepted(Box<Admission>),
    Refused(Refusal),
}

/// All that a new member needs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Admission {
    pub member: Member,
    pub certificate_der: Vec<u8>,
    pub authorities: Authorities,
    pub coordinators: Vec<CoordinatorAddress>,
    /// Certificate (DER) and key of each CA, which every coordinator has. For nobody else.
    pub cas: Vec<(Vec<u8>, PrivateKey)>,
}

// ---- agents -----------------------------------------------------------------------------------------------------------

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum FromAgent {
    /// First on every connection.
    Hello(AgentHello),
    Heartbeat {
        unix_ms: u64,
    },
    /// Sent again from the first unacknowledged event after a reconnect.
    Events(EventBatch),
    /// A new certificate over the same key is wanted, because the agent's ends soon or the CA is another one. DER of a PKCS#10 request.
    Renew {
        csr_der: Vec<u8>,
    },
    /// The answer to `ToAgent::ReadOutput`: a piece of a rank's output, or why there is none, in one line.
    Output {
        ticket: u64,
        result: Result<OutputPiece, String>,
    },
    /// With these of what `ToAgent::Superseded` told the node has done what it could: hashes of their manifests.
    Removed {
        manifests: Vec<String>,
    },
}

impl Versioned for FromAgent {
    /// Of a greeting, which is the first of its variants and begins with the version.
    fn version(bytes: &[u8]) -> Option<u32> {
        let (variant, version) = codec::head::<(u32, u32)>(bytes)?;
        (variant == 0).then_some(version)
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AgentHello {
    pub version: u32,
    pub name: String,
    pub slots: u32,
    pub device: String,
    /// Version of the worker program.
    pub program_version: String,
    /// What jobs may ask for, such as `gpu` = `h200`.
    pub labels: BTreeMap<String, String>,
    /// Where other nodes reach this one: a name or an address, without a port.
    pub host: String,
    /// Of UDP, where the agents of other nodes fetch checkpoints; 0: nowhere.
    pub checkpoint_port: u16,
    /// Drawn when the worker's process began: tells it from another one that holds a copy of its certificate.
    pub process: u64,
    /// Gangs that this agent knows: running, or ended with events not yet acknowledged.
    pub gangs: Vec<(JobId, Generation)>,
    /// Gangs that were started here and of which nothing more will be heard: an earlier process of this worker had started them, or
    /// their events do not fit what the cluster has recorded. No process of them lives any more.
    pub lost: Vec<(JobId, Generation)>,
    /// Earlier processes of this worker whose records it has: what they started is in `lost`, or its end was recorded.
    pub earlier: Vec<u64>,
}

/// Processes in `AgentHello::earlier`.
pub const EARLIER_MAX: usize = 64;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum ToAgent {
    Welcome {
        node: NodeId,
    },
    /// Idempotent: an agent that has this generation already does nothing.
    StartGang(Gang),
    /// Idempotent. `now: false` stops after a checkpoint.
    StopGang {
        job: JobId,
        generation: Generation,
        now: bool,
    },
    /// Events up to `seq` are committed. After a `Finished` event is, the agent forgets the gang.
    EventsCommitted {
        job: JobId,
        generation: Generation,
        seq: u64,
    },
    /// The coordinator has a different idea of the stream: send again from `next_seq`.
    ResendEvents {
        job: JobId,
        generation: Generation,
        next_seq: u64,
    },
    /// The answer to a heartbeat, with its time.
    Heard {
        unix_ms: u64,
    },
    /// Where the coordinators are: after the welcome, and when it has changed.
    Coordinators(Vec<CoordinatorAddress>),
    /// The answer to `Renew`, and who is to be trusted from now on.
    Certificate {
        certificate_der: Vec<u8>,
        authorities: Authorities,
    },
    /// The connection ends for this reason; reconnecting does not help if `fatal`.
    Refused {
        message: String,
        fatal: bool,
    },
    /// Which CAs are to be trusted has changed, or may have: an agent whose `Authorities::mark` is another one renews its certificate.
    Authorities {
        mark: [u8; 32],
    },
    /// A piece of what a rank printed, please. At most `OUTPUT_ASKED_MAX` of these are unanswered on a connection.
    ReadOutput(OutputWish),
    /// Where all ranks of a gang on several nodes can be called, in rank order: every node of it is told the same, once all can. Idempotent.
    MeetPeers {
        job: JobId,
        generation: Generation,
        peers: Vec<Peer>,
    },
    /// All checkpoints that other nodes may read here, in place of those that were told before on this connection.
    Lend(Vec<Loan>),
    /// All checkpoints that this node need not keep, in place of those that were told before on this connection.
    Superseded(Vec<Superseded>),
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Gang {
    pub job: JobId,
    pub generation: Generation,
    /// Ranks of the whole job.
    pub world_size: u32,
    /// This node's ranks are `first_rank..first_rank + ranks`.
    pub first_rank: Rank,
    pub ranks: u32,
    /// Nodes of the job, and which of them this is.
    pub nodes: u32,
    pub node_index: u32,
    /// Where the ranks of a program on several nodes meet; those on one node meet as they like, and those that train are told by `MeetPeers`.
    pub meeting: Option<Meeting>,
    /// The agent ends the gang when it has run for so long.
    pub max_time_ms: Option<u64>,
    /// The recorded checkpoint to go on from: one of an earlier generation, or one that the job names.
    pub resume: Option<ResumePoint>,
    pub work: Work,
}

/// Where rank 0 of a gang listens for the others.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Meeting {
    pub host: String,
    pub port: u16,
}
