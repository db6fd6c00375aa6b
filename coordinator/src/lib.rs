//! A replica of the control plane.
//!
//! `cluster` decides (pure), `raft` makes decisions durable and agreed, `server` talks to the world.

pub mod cluster;
pub mod planner;
pub mod raft;
#[cfg(feature = "rocksdb")]
pub mod server;
