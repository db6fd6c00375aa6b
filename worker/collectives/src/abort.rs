//! Why the collectives of a gang were aborted.

use crate::error::CollectiveError;
use std::fmt;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Abort {
    /// Its process ended.
    RankDied(usize),
    /// The job was stopped.
    Stopped,
    /// A rank met an error of its own; its log has it.
    RankFailed(usize),
    /// The others waited for the rank until their deadline.
    RankLate(usize),
    /// The rank made another call than the others.
    RankDiffers(usize),
}

impl Abort {
    /// Never 0.
    pub(crate) fn word(self) -> u64 {
        match self {
            Abort::RankDied(rank) => (1 << 32) | rank as u64,
            Abort::Stopped => 2 << 32,
            Abort::RankFailed(rank) => (3 << 32) | rank as u64,
            Abort::RankLate(rank) => (4 << 32) | rank as u64,
            Abort::RankDiffers(rank) => (5 << 32) | rank as u64,
        }
    }

    pub(crate) fn of(word: u64) -> Abort {
        let rank = word as u32 as usize;
        match word >> 32 {
            1 => Abort::RankDied(rank),
            2 => Abort::Stopped,
            4 => Abort::RankLate(rank),
            5 => Abort::RankDiffers(rank),
            _ => Abort::RankFailed(rank),
        }
    }

    /// What `rank` tells the others that met `error`.
    pub(crate) fn for_error(error: &CollectiveError, rank: usize) -> Abort {
        match error {
            CollectiveError::Deadline { rank, .. } => Abort::RankLate(*rank),
            CollectiveError::Mismatch { rank, .. } => Abort::RankDiffers(*rank),
            CollectiveError::Aborted { abort } => *abort,
            _ => Abort::RankFailed(rank),
        }
    }

    pub(crate) fn culprit(self) -> Option<usize> {
        match self {
            Abort::Stopped => None,
            Abort::RankDied(rank)
            | Abort::RankFailed(rank)
            | Abort::RankLate(rank)
            | Abort::RankDiffers(rank) => Some(rank),
        }
    }
}

impl fmt::Display for Abort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Abort::RankDied(rank) => write!(f, "rank {rank} died"),
            Abort::Stopped => write!(f, "the job was stopped"),
            Abort::RankFailed(rank) => write!(f, "rank {rank} failed in a collective; its log says why"),
            Abort::RankLate(rank) => write!(f, "rank {rank} did not come to a collective in time"),
            Abort::RankDiffers(rank) => write!(f, "rank {rank} made another call than the others"),
        }
    }
}

impl From<Abort> for CollectiveError {
    fn from(abort: Abort) -> CollectiveError {
        CollectiveError::Aborted { abort }
    }
}
