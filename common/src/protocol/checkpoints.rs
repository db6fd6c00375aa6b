//! Checkpoints that go from the disk of one node to another's, from agent to agent (ALPN `fleet-agent/1`).

use super::PROTOCOL_VERSION;
use crate::codec::{self, Versioned};
use crate::ids::{NodeId, Rank};
use crate::net::KeyHash;
use serde::{Deserialize, Serialize};

/// The recorded checkpoint that a gang goes on from, and who has it. The same for every node of a generation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResumePoint {
    pub step: u64,
    /// Absolute: where it lies on each node that has it, and where it is put on one that has not.
    pub path: String,
    /// Of the manifest, in hex, which has the hash of everything else.
    pub manifest_sha256: String,
    pub holders: Vec<Holder>,
}

/// A node that has a checkpoint, or files of it, on its disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    pub node: NodeId,
    pub name: String,
    /// Where its agent is asked, `HOST:PORT` over UDP; `None` where it cannot be.
    pub address: Option<String>,
    /// By which it is known there.
    pub key: KeyHash,
    pub files: Files,
}

/// Which files of a checkpoint a node has, besides the manifest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Files {
    All,
    /// What `ranks` ranks from `first` on have written.
    Of {
        first: Rank,
        ranks: u32,
    },
}

impl Files {
    /// Whether what this rank wrote is among them.
    pub fn has(self, writer: Rank) -> bool {
        match self {
            Files::All => true,
            Files::Of { first, ranks } => writer.checked_sub(first).is_some_and(|at| at < ranks),
        }
    }
}

/// A checkpoint that another node may read here.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Loan {
    pub to: NodeId,
    /// By which that node is known.
    pub key: KeyHash,
    /// Where it lies here.
    pub path: String,
    pub manifest_sha256: String,
}

/// A checkpoint that a node need not keep: newer ones have been recorded in its place.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Superseded {
    /// Where it lies there.
    pub path: String,
    pub manifest_sha256: String,
}

/// One on each stream; answered by a `Fetched`, and after `Fetched::Comes` by those bytes, raw.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fetch {
    pub version: u32,
    /// Which checkpoint.
    pub manifest_sha256: String,
    /// A name in its manifest, or the manifest's own.
    pub file: String,
    /// The first byte that is wanted.
    pub from: u64,
}

impl Fetch {
    pub fn new(manifest_sha256: &str, file: &str, from: u64) -> Fetch {
        let (manifest_sha256, file) = (manifest_sha256.to_owned(), file.to_owned());
        Fetch { version: PROTOCOL_VERSION, manifest_sha256, file, from }
    }
}

impl Versioned for Fetch {
    fn version(bytes: &[u8]) -> Option<u32> {
        codec::head(bytes)
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Fetched {
    /// So many bytes follow: the rest of the file.
    Comes { bytes: u64 },
    /// Not now: the cluster has not told this node to lend it, or too much is lent already. To be asked again.
    Later(String),
    /// This node has not got it. In one line.
    Missing(String),
}

/// Bytes of an encoded `Fetch` or `Fetched`.
pub const FETCH_MAX: usize = 4 << 10;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_has_what_its_ranks_wrote() {
        let second = Files::Of { first: 2, ranks: 2 };
        assert_eq!([0, 1, 2, 3, 4].map(|rank| second.has(rank)), [false, false, true, true, false]);
        assert!(Files::All.has(7));
        assert!(!Files::Of { first: 0, ranks: 0 }.has(0));
    }
}
