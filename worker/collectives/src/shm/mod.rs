//! Collectives of the ranks of one host, through one shared memory segment.
//!
//! Blocking calls go through phases: every rank copies a chunk into its staging half, marks the phase, waits until all have marked it,
//! and reads the others' halves. Two halves in turn make one wait per chunk enough: who marks phase n+1 has read phase n. Posted reductions
//! move nothing: each rank marks that its buffer is complete, and reduces its part of all buffers where they lie.

#[cfg(target_os = "linux")]
mod calls;
#[cfg(target_os = "linux")]
mod gang;
#[cfg(target_os = "linux")]
mod posted;
#[cfg(target_os = "linux")]
mod segment;
#[cfg(target_os = "linux")]
mod trace;
#[cfg(target_os = "linux")]
mod wait;

#[cfg(target_os = "linux")]
pub(crate) use gang::Notes;
#[cfg(target_os = "linux")]
pub use gang::{AbortHandle, ShmCollective};
#[cfg(target_os = "linux")]
pub use segment::{RANKS_MAX, Segment};
#[cfg(target_os = "linux")]
pub use trace::{Computed, Doing, Exchanged, RankReport};
