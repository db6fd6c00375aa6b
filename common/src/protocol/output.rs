//! What ranks printed, whole: it stays in files on their nodes, and travels in pieces to who asks for it. The programs of a `fleet launch`
//! are heard at once.

use crate::ids::{Generation, JobId, Rank};
use serde::{Deserialize, Serialize};

/// Bytes of one piece: heartbeats on the same stream do not wait for longer than half a second at ten megabits.
pub const OUTPUT_PIECE_MAX: usize = 256 << 10;
/// Pieces that are asked of one agent at a time.
pub const OUTPUT_ASKED_MAX: usize = 2;

/// "Read this for me."
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OutputWish {
    /// Comes back with the answer.
    pub ticket: u64,
    pub job: JobId,
    pub generation: Generation,
    /// Counted from 0 on the node.
    pub local_rank: Rank,
    /// Byte of the rank's output, counted from its start.
    pub from: u64,
}

/// A piece of a rank's output.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OutputPiece {
    /// Byte at which it begins: later than what was asked for where what lay there was removed.
    pub start: u64,
    #[serde(with = "crate::bytes")]
    pub bytes: Vec<u8>,
    /// How long the output is by now.
    pub end: u64,
}

/// What a rank of a program has just printed, on its way to the `fleet launch` that shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Printed {
    pub rank: Rank,
    pub stderr: bool,
    #[serde(with = "crate::bytes")]
    pub bytes: Vec<u8>,
}

/// What the only line begins with of a rank that never was its program.
pub const CANNOT_START: &str = "error: cannot start ";
