//! Decisions made durable and agreed: raft-rs over a log store, applied to the cluster's state.
//!
//! `disk` is what a log needs of a disk; `rocks` (with its `disk_mark`) and `memory` are the two there are; `log` keeps raft's log on one; `image` is the state
//! as bytes; `replica` drives raft and the state machine; `transfer` brings snapshots over; `shape` keeps out messages that raft would panic on. No clock, no network, no threads in here.

pub mod conformance;
pub mod disk;
#[cfg(feature = "rocksdb")]
mod disk_mark;
pub mod history;
pub mod image;
pub mod landmark;
pub mod log;
mod logger;
pub mod marks;
pub mod memory;
pub mod replica;
#[cfg(feature = "rocksdb")]
pub mod rocks;
pub mod seal;
pub mod shape;
pub mod stretch;
pub mod transfer;
