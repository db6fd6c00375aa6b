//! What coordinators say to each other. Raft's own messages are only one kind; changes, questions and observations travel beside
//! them, so that any coordinator can serve anybody.
//!
//! Nothing here is relied on to arrive: raft sends again by itself, everything else is sent again by who waits for it.

use super::repairs::{RowsTold, RowsWanted};
use crate::cluster::Command;
use crate::raft::landmark::Landmark;
use crate::raft::marks::Mark;
use crate::raft::replica::Ticket;
use crate::raft::transfer::{Chunk, Fetch};
use fleet_common::ids::{NodeId, ReplicaId};
use fleet_common::net::{KeyHash, PrivateKey};
use fleet_common::protocol::{CoordinatorAddress, OutputPiece, OutputWish, Refusal, Reply, Request};
use serde::{Deserialize, Serialize};

/// Nodes in one report: 10,000 agents at one coordinator, all heard since the last report, twice over.
pub const SIGHTINGS_MAX: usize = 20_000;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum PeerMessage {
    /// A message of raft, in its own encoding.
    Raft(#[serde(with = "fleet_common::bytes")] Vec<u8>),
    /// Please propose this, you lead. There is no answer when it is: it comes back under the same ticket when the sender applies it.
    Propose {
        ticket: Ticket,
        command: Box<Command>,
    },
    /// Please answer this query, you lead.
    Query {
        ticket: Ticket,
        request: Box<Request>,
    },
    /// What became of a `Propose` that was not taken, or of a `Query`.
    Told {
        ticket: Ticket,
        told: Told,
    },
    Observations(Report),
    /// The report was taken; only what changes from now on need be told.
    ObservationsTaken {
        seq: u64,
    },
    /// What the sender has seen of all coordinators' disks; `asks` for the same.
    Marks {
        marks: Vec<(ReplicaId, Mark)>,
        asks: bool,
    },
    /// What the sender has committed; what have you in its place?
    ComparePast(Landmark),
    /// That; `None` where the log here does not reach, on either side.
    Past(Option<Landmark>),
    /// The sender stops for this reason, which concerns all.
    Stops {
        why: String,
    },
    /// A piece of the receiver's snapshot, please.
    Fetch(Fetch),
    Chunk(Box<Chunk>),
    /// Rows of the history that cannot be read here, please.
    FetchRows(RowsWanted),
    Rows(Box<RowsTold>),
    /// The key of the CA with this certificate (DER), please.
    WantCa {
        der: Vec<u8>,
    },
    /// Goes only to a coordinator whose own key is the one in the cluster's records.
    Ca {
        der: Vec<u8>,
        key: PrivateKey,
    },
    /// The coordinators that the sender knows, each with the hash of its key: for one that was away when some of them joined.
    Coordinators(Vec<(CoordinatorAddress, KeyHash)>),
    /// Of what a rank printed.
    Output {
        ticket: Ticket,
        said: OutputSaid,
    },
    /// The sender is asked over HTTP at this address. Said to those of whom the cluster's record has at least `SERVES_LEVEL`.
    Serves {
        http: String,
    },
}

/// Of the coordinators that understand `PeerMessage::Serves`.
pub const SERVES_LEVEL: u32 = 6;

/// What coordinators say to each other of ranks' output.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum OutputSaid {
    /// A piece of it, please, if you hold the agent of this node. The ticket in the wish is not looked at.
    Wanted { node: NodeId, wish: OutputWish },
    /// The agent's answer.
    Answered(Box<Result<OutputPiece, String>>),
    /// The agent is not held here.
    Elsewhere,
    /// It is, and has enough to do.
    Busy,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Told {
    Reply(Box<Reply>),
    Refused(Refusal),
    /// The asked one does not lead.
    Elsewhere,
}

/// What a coordinator has seen of the agents that it holds. Times are ages, because no two clocks agree.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    pub seq: u64,
    /// All that the sender holds; what it told before does not count any more.
    pub whole: bool,
    pub nodes: Vec<Sighting>,
    /// The sender has no room for writes, so leadership should not go there.
    pub read_only: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sighting {
    pub node: NodeId,
    /// Its agent is connected to the sender.
    pub connected: bool,
    pub heard_ms_ago: u64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use fleet_common::codec::{decode, encode};

    #[test]
    fn raft_s_bytes_travel_in_one_piece() {
        let message = PeerMessage::Raft(vec![7; 300]);
        let encoded = encode(&message).unwrap();
        assert_eq!(encoded.len(), 1 + 3 + 300);
        assert_eq!(decode::<PeerMessage>(&encoded).unwrap(), message);
        assert!(decode::<PeerMessage>(&encoded[..200]).is_err());
    }
}
