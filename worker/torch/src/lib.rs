//! The torch executor: a decoder, as `fleet_common::model` describes it, built of libtorch's tensors with autograd unit by unit. The same
//! code runs on CUDA, Metal and the CPU; on the CPU it is the test of what runs on the others.

mod adapter;
mod base;
pub mod device;
mod dropout;
mod exact;
mod executor;
mod fused;
mod gathered;
mod head;
mod memory;
mod needs;
mod neftune;
mod network;
mod optimizer;
mod packed;
mod parts;
mod sharded;
mod shim;
mod solo;
mod transport;

pub use base::Base;
pub use executor::TorchExecutor;
pub use memory::{FlatWeights, Gradients, Stored, Tensors, Weights};
pub use needs::{PROGRAM, Pass, activation_bytes, held_bytes, needs};
pub use network::{Network, Numbers};
pub use parts::{Held, Parts, Rooms, Seat};
pub use sharded::{Keeping, Sharded};
pub use solo::Solo;
pub use transport::{AloneTransport, Exchanged, HostTransport, NcclTransport, Room, Transport};

/// What went wrong, in libtorch's words without its stack.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Error(String);

impl Error {
    pub(crate) fn of(what: &str) -> Error {
        Error(what.to_owned())
    }
}

impl From<tch::TchError> for Error {
    fn from(error: tch::TchError) -> Self {
        Error(first_line(&error.to_string()))
    }
}

impl From<Error> for fleet_learn::Error {
    fn from(error: Error) -> Self {
        fleet_learn::Error::Environment(error.0)
    }
}

/// What libtorch appends to its messages is where in its own source it was, and advice for those who debug it.
fn first_line(text: &str) -> String {
    text.lines().find(|line| !line.trim().is_empty()).unwrap_or_default().to_owned()
}

pub type Result<T, E = Error> = std::result::Result<T, E>;
