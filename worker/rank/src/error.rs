//! Why a rank cannot go on: one line each, with whose fault it is.

use fleet_checkpoint::CheckpointError;
use fleet_collectives::CollectiveError;
use fleet_common::exit::Fault;

pub type Result<T, E = Error> = std::result::Result<T, E>;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The job or a model directory cannot be used.
    #[error("{0}")]
    Input(String),
    /// The machine cannot do it.
    #[error("{0}")]
    Environment(String),
    /// Training went wrong.
    #[error("{0}")]
    Job(String),
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    #[error(transparent)]
    Collective(#[from] CollectiveError),
}

impl Error {
    pub fn fault(&self) -> Fault {
        match self {
            Error::Input(_) => Fault::Input,
            Error::Environment(_) => Fault::Environment,
            Error::Job(_) | Error::Collective(_) => Fault::Job,
            Error::Checkpoint(e) => e.fault(),
        }
    }
}
