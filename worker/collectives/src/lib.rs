//! Collective operations of a gang of ranks, over byte slices and element types; it knows no tensors and links no libtorch.
//!
//! `Collective` is what the training engine sees. `Solo` is the gang of one. `ShmCollective` serves the ranks of one host through a
//! memory segment that the agent makes (`Segment`) and the ranks inherit.

mod collective;
mod error;
pub mod shm;
mod solo;

pub use collective::{Activity, Collective, DType, Keep, Op, PART_ALIGN, part};
pub use error::{CollectiveError, Result};
pub use shm::memory::{Common, PerRank};
#[cfg(target_os = "linux")]
pub use shm::{Abort, AbortHandle, Doing, RANKS_MAX, RankReport, Segment, ShmCollective};
pub use solo::Solo;
