//! What goes into a `Control` and what comes out of it. Everything that happens to a coordinator is an `Input`; everything that it
//! does to the world is an `Action`. The tokio driver and the simulator speak these words and no others.

use super::peer::PeerMessage;
use crate::cluster::Answer;
use crate::cluster::commands::{Change, RedeemToken};
use crate::cluster::session::{RequestId, Stamp};
use crate::raft::replica::ReplicaError;
use fleet_common::ids::{NodeId, ReplicaId, UserId};
use fleet_common::net::PrivateKey;
use fleet_common::protocol::{ClientFrame, CoordinatorAddress, FromAgent, Member, Refusal, Reply, ToAgent};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Between two `Input::Tick`: raft's unit of time. Elections take 10 to 20 of them.
pub const TICK_MS: u64 = 50;
/// `FromAgent::Events` of one session that may be with `Control` and not yet given back by `Action::AgentTaken`. The driver reads
/// no further beyond it; a session that sends more is closed.
pub const AGENT_BATCHES_MAX: usize = 16;
/// Replies of one call that may be with the driver and not yet given back by `Input::Taken`.
pub const REPLIES_MAX: usize = 512;

/// Both clocks of the machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Now {
    /// Never goes back. Deadlines and leases are measured on it; the start does not matter.
    pub mono_ms: u64,
    /// Since 1970, for people and for the expiry of tokens. May jump.
    pub unix_ms: u64,
}

/// An agent's connection, numbered by the driver and never reused.
pub type Session = u64;
/// A request of a client, a joiner or the driver, likewise. All of them share one sequence of numbers.
pub type Call = u64;

/// What this coordinator is. It sees to it that the cluster's records say the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Myself {
    pub address: CoordinatorAddress,
    pub name: String,
    /// Of the program.
    pub version: String,
    /// Where it is asked over HTTP, as HOST:PORT.
    pub http: String,
    /// Other coordinators that were known when this one started; asked while nobody can reach this one: to be let in, and with its address.
    pub seeds: Vec<ReplicaId>,
}

#[derive(Clone, Debug)]
pub enum Input {
    /// Every `TICK_MS`.
    Tick,
    /// From a coordinator whose certificate says that it is `from`.
    Peer {
        from: ReplicaId,
        message: PeerMessage,
    },
    /// The connection to this coordinator has ended; what was sent on it may not have arrived.
    PeerLost(ReplicaId),
    /// This coordinator's certificate is refused there as that of one who was removed. The peer followed `Action::Members`, so the removal
    /// is on its disk.
    RefusedBy(ReplicaId),
    /// A connection whose certificate says that it is `node`.
    AgentConnected {
        session: Session,
        node: NodeId,
    },
    /// Everything but heartbeats. `Events` are given back by `Action::AgentTaken`.
    Agent {
        session: Session,
        message: FromAgent,
    },
    /// Heartbeats, which the driver acknowledges by itself; several may be told as one.
    AgentHeard {
        node: NodeId,
    },
    AgentLost {
        session: Session,
    },
    /// A request of the holder of a client's certificate. Answered by `Action::Reply`.
    Client {
        call: Call,
        caller: Member,
        frame: ClientFrame,
    },
    /// The driver has passed on this many replies of a call.
    Taken {
        call: Call,
        replies: usize,
    },
    /// The caller is gone; nothing more is answered.
    CallLost(Call),
    /// Somebody without a certificate shows a token. Answered by `Action::Joined`.
    Join {
        call: Call,
        redeem: RedeemToken,
        request: RequestId,
    },
    /// A change that only the driver can word, because it holds the secrets (`CreateToken`, `IntroduceCa`), on behalf of a user, or that
    /// it makes on its own. Answered by `Action::Proposed`.
    Propose {
        call: Call,
        request: Stamp,
        by: Option<UserId>,
        change: Change,
    },
    /// Somebody has a certificate whose holder this state does not know. Answered by `Action::Looked`, when the state has everything that
    /// was acknowledged before.
    Look(Call),
    /// The key of the CA with this certificate (DER) is on this coordinator's disk.
    HoldsCa(Vec<u8>),
    /// What may be written, as far as the room on the disk goes.
    Room(Room),
    /// This coordinator is about to be stopped: if it leads, another one shall.
    StepDown,
}

/// How much room there is for writes. The words are for people: why, and what helps.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Room {
    #[default]
    Enough,
    /// The reserve: only what ends something, cuts somebody off or makes room (`Change::frees`).
    Little(String),
    None(String),
}

impl Room {
    pub fn why(&self) -> Option<&str> {
        match self {
            Room::Enough => None,
            Room::Little(why) | Room::None(why) => Some(why),
        }
    }
}

#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// May be lost; must not overtake an earlier one to the same coordinator.
    ToPeer {
        to: ReplicaId,
        message: PeerMessage,
    },
    ToAgent {
        session: Session,
        message: ToAgent,
    },
    /// One `FromAgent::Events` of this session is done with.
    AgentTaken {
        session: Session,
    },
    /// `Control` has forgotten the session. The agent is told `ToAgent::Refused` with these words.
    CloseAgent {
        session: Session,
        message: String,
        fatal: bool,
    },
    /// A `Watch` has many, the last one is `EndOfEvents` or `Refused`; all others have one.
    Reply {
        call: Call,
        reply: Reply,
    },
    /// The driver signs the certificate.
    Joined {
        call: Call,
        result: Result<Admission, Refusal>,
    },
    Proposed {
        call: Call,
        result: Result<Answer, Refusal>,
    },
    Looked {
        call: Call,
        result: Result<(), Refusal>,
    },
    /// Coordinators, their addresses, revocations or CAs have changed: see `Control::state`.
    Members,
    /// These are members from now on.
    Admitted(Vec<Member>),
    /// Another coordinator may have the key of this CA (DER), if it is here: `PeerMessage::Ca`.
    SendCa {
        to: ReplicaId,
        der: Vec<u8>,
    },
    /// The key of a CA, to be put on the disk; `Input::HoldsCa` when it is there.
    KeepCa {
        der: Vec<u8>,
        key: PrivateKey,
    },
    /// A decision and its reason, for the log.
    Decided(String),
    /// What an operator must look at, for the log.
    Alarm(String),
    /// This coordinator was taken out of the cluster. It answers nobody any more; the driver ends the process with these words.
    Removed(String),
}

/// Who may have a certificate, and under which name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Admission {
    pub member: Member,
    pub name: String,
}

/// How this coordinator stands.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Status {
    pub leader: Option<ReplicaId>,
    pub term: u64,
    pub commit_index: u64,
    pub applied_index: u64,
    /// Since when this replica leads, confirmed by a quorum; milliseconds of its monotonic clock.
    pub leading_since_ms: Option<u64>,
    /// Counts for majorities.
    pub voter: bool,
    /// Why writes are refused.
    pub read_only: Option<String>,
    /// What of the history cannot be read here.
    pub damaged: Option<String>,
    /// Tables of the history with rows that cannot be read.
    pub damaged_tables: usize,
    /// Rows of the history that came from another coordinator because they could not be read here.
    pub rows_mended: u64,
    /// Why this coordinator serves nobody any more.
    pub removed: Option<String>,
    /// Messages since the start that cannot be if all coordinators have what they acknowledged.
    pub contradictions: u64,
    /// Why the snapshot that this replica needs is of no use.
    pub unreadable_snapshot: Option<String>,
    /// What one of the coordinators did of that kind and is still in the cluster.
    pub contradicting: Option<String>,
    /// Where each coordinator is asked over HTTP, as far as it has said so since this one started.
    pub http: Arc<BTreeMap<ReplicaId, String>>,
    pub agents: usize,
    pub calls: usize,
}

/// The coordinator cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    #[error(transparent)]
    Replica(#[from] ReplicaError),
}
