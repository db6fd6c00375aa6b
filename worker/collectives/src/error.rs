//! What can go wrong in a collective, each with the rank that is to blame.

use crate::abort::Abort;
use std::sync::Arc;

pub type Result<T> = std::result::Result<T, CollectiveError>;

/// Cloned into every later call of the rank that met it.
#[derive(Clone, Debug, thiserror::Error)]
pub enum CollectiveError {
    #[error("rank {rank} did not enter {operation} within {seconds} s; {doing}")]
    Deadline {
        rank: usize,
        /// With its number: `all_reduce #412`.
        operation: String,
        seconds: f64,
        /// What the late rank did last: `it is loading data since 31.0 s`.
        doing: String,
    },
    /// `rank` is not with the majority, `other` is.
    #[error(
        "rank {rank} called {theirs} where rank {other} called {others}; all ranks must make the same calls"
    )]
    Mismatch { rank: usize, other: usize, theirs: String, others: String },
    /// Another rank met an error, or the agent ended the gang's calls.
    #[error("aborted: {abort}")]
    Aborted { abort: Abort },
    #[error("{operation}: {message}")]
    Refused { operation: &'static str, message: String },
    /// While the gang came together.
    #[error("rank {rank} {what}")]
    Peer { rank: usize, what: String },
    #[error("network: {what}: {source}")]
    Network { what: &'static str, source: Arc<std::io::Error> },
    #[error("the shared segment belongs to generation {segment} of the gang, this rank to {rank}")]
    Generation { segment: u64, rank: u64 },
    #[error("shared memory: {what}: {source}")]
    Memory { what: &'static str, source: Arc<std::io::Error> },
}

impl CollectiveError {
    /// The rank that caused the error, where one is known.
    pub fn culprit(&self) -> Option<usize> {
        match self {
            CollectiveError::Deadline { rank, .. } | CollectiveError::Mismatch { rank, .. } => Some(*rank),
            CollectiveError::Aborted { abort } => abort.culprit(),
            CollectiveError::Peer { rank, .. } => Some(*rank),
            _ => None,
        }
    }
}
