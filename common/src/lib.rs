//! Vocabulary of fleet: what all its processes agree on. No raft, no torch.

pub mod arguments;
pub mod bytes;
pub mod capability;
pub mod codec;
pub mod endpoint;
pub mod events;
pub mod exit;
pub mod files;
pub mod home;
pub mod http;
pub mod ids;
pub mod job;
pub mod lines;
pub mod link;
pub mod mapped;
pub mod metrics;
pub mod model;
pub mod net;
pub mod parent;
pub mod process;
pub mod protocol;
pub mod signals;
pub mod telemetry;
pub mod terminal;
