//! A replica of the control plane.
//!
//! `cluster` decides (pure), `archive` is the file of a backup (pure), `raft` makes decisions durable and agreed, `control` is a whole coordinator without the world (pure), `server`
//! talks to the world.

pub mod archive;
pub mod cluster;
pub mod control;
pub mod http;
pub mod planner;
pub mod raft;
pub mod requests;
#[cfg(feature = "rocksdb")]
pub mod server;
pub mod targets;
pub mod views;
