//! Collectives between processes and hosts, over connections of which each end knows the other by a key.
//!
//! `rendezvous.rs` says who is where, `meeting.rs` how they come together; `tcp.rs` and `quic.rs` make `Links` of it; `driver.rs` carries out
//! the steps of an algorithm over them, `parting.rs` ends them; `gang.rs` and `calls.rs` are what the engine sees, `posted.rs` its thread;
//! `frame.rs` and `verdict.rs` are what ranks say to each other, and how they find who is to blame; `rate.rs` knows which link is slow.

mod calls;
mod driver;
mod frame;
mod gang;
mod links;
mod meeting;
mod parting;
mod posted;
mod quic;
mod rate;
mod rendezvous;
mod tcp;
mod tls;
mod verdict;

/// What the simulator makes ranks say to each other when they part.
#[doc(hidden)]
pub mod parted {
    pub use super::frame::{Farewell, HEADER};
    pub use super::verdict::{Last, Met, verdict};
    pub use crate::call::Signature;
}

pub use gang::{NetAbortHandle, NetCollective};
pub use rate::SlowLink;
pub use rendezvous::{Key, Listener, PublicKey, RankAddress, Rendezvous};
