//! What one replica has at a position of its log, so that another can tell whether it has the same. Index and term alone do not say so: when a
//! majority has forgotten a term, it is given a second time, and raft takes the entries of both for the same.

use super::log::Position;
use prost::Message;
use raft::eraftpb::Entry;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Landmark {
    pub at: Position,
    /// SHA-256 of the entry. Commands carry their proposer's ticket, so no two are alike.
    pub sha256: [u8; 32],
}

impl Landmark {
    pub fn of(entry: &Entry) -> Landmark {
        let at = Position { index: entry.index, term: entry.term };
        Landmark { at, sha256: Sha256::digest(entry.encode_to_vec()).into() }
    }
}
