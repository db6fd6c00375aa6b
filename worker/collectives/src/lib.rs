//! Collective operations of a gang of ranks, over byte slices and element types; it knows no tensors and links no libtorch.
//!
//! `Gang`, `Exchange` and `SharedHost` are what the training engine sees. `Solo` is the gang of one. `ShmCollective` serves the ranks of one
//! host through a memory segment that the agent makes (`Segment`) and the ranks inherit. `nccl` exchanges what lies on CUDA devices.

mod abort;
pub mod algorithm;
mod call;
mod collective;
pub mod cost;
mod dtype;
mod error;
#[cfg(target_os = "linux")]
mod host;
mod memory;
pub mod nccl;
pub mod net;
mod posts;
pub mod shm;
mod solo;
pub mod straggler;

pub use abort::Abort;
pub use collective::{
    Activity, Exchange, Gang, Gather, Keep, PART_ALIGN, Pace, Parts, Posted, SharedHost, Ticket, part,
};
pub use dtype::{DType, Op};
pub use error::{CollectiveError, Result};
#[cfg(target_os = "linux")]
pub use host::{HostAbortHandle, HostCollective};
pub use memory::{Common, PerRank};
#[cfg(target_os = "linux")]
pub use shm::{AbortHandle, Computed, Doing, Exchanged, RANKS_MAX, RankReport, Segment, ShmCollective};
pub use solo::Solo;
