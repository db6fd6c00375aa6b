//! Vocabulary of fleet: what all its processes agree on. No raft, no torch.

pub mod events;
pub mod exit;
pub mod ids;
pub mod job;
pub mod protocol;
