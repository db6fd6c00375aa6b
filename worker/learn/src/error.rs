//! Why a rank cannot go on: one line each, with whose fault it is.

use crate::strategy::Report;
use fleet_checkpoint::CheckpointError;
use fleet_collectives::CollectiveError;
use fleet_common::events::FailureKind;
use fleet_common::exit::Fault;
use fleet_common::ids::Rank;
use fleet_data::DataError;

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
    /// A step computed something that is no number; on which rank, where it was not on all; and what else all ranks know of it.
    #[error("{message}")]
    NoNumber { message: String, culprit: Option<Rank>, report: Option<Report> },
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    #[error(transparent)]
    Data(#[from] DataError),
    #[error(transparent)]
    Collective(#[from] CollectiveError),
}

impl Error {
    /// `what` became what it should not be at `step`.
    pub(crate) fn no_number(what: &str, step: u64, culprit: Option<Rank>) -> Error {
        let message = format!(
            "{what} at step {step}; lower learning_rate, raise warmup_steps, or look at the data of that step"
        );
        Error::NoNumber { message, culprit, report: None }
    }

    /// The same, of a step that went so.
    pub(crate) fn with_report(self, report: Report) -> Error {
        match self {
            Error::NoNumber { message, culprit, .. } => {
                Error::NoNumber { message, culprit, report: Some(report) }
            }
            other => other,
        }
    }

    /// The same, with what it means for the loss scale.
    pub(crate) fn with_reason(self, reason: &str) -> Error {
        match self {
            Error::NoNumber { message, culprit, report } => {
                Error::NoNumber { message: format!("{message}; {reason}"), culprit, report }
            }
            other => other,
        }
    }

    pub fn fault(&self) -> Fault {
        match self {
            Error::Input(_) => Fault::Input,
            Error::Environment(_) => Fault::Environment,
            Error::Job(_) | Error::NoNumber { .. } | Error::Collective(_) => Fault::Job,
            Error::Checkpoint(e) => e.fault(),
            Error::Data(e) => e.fault(),
        }
    }

    /// The rank to blame for what rank `rank` met: of what ranks do together it can be another one.
    pub fn culprit(&self, rank: Rank) -> Rank {
        match self {
            Error::Collective(e) => e.culprit().map_or(rank, |culprit| culprit as Rank),
            Error::NoNumber { culprit, .. } => culprit.unwrap_or(rank),
            _ => rank,
        }
    }

    /// What it says to rank `rank`, which met it.
    pub fn kind(&self, rank: Rank) -> FailureKind {
        match self {
            Error::Collective(CollectiveError::Aborted { .. }) => FailureKind::Told,
            _ if self.culprit(rank) != rank => FailureKind::Peer,
            _ => FailureKind::Rank,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fleet_collectives::Abort;

    #[test]
    fn in_a_collective_the_rank_that_did_not_come_is_to_blame_and_otherwise_the_one_that_reports() {
        let (operation, doing) = ("all_reduce #4".to_owned(), "it is loading data since 901.0 s".to_owned());
        let late = CollectiveError::Deadline { rank: 3, operation, seconds: 900.0, doing };
        let told = CollectiveError::Aborted { abort: Abort::RankDied(3) };
        let stopped = CollectiveError::Aborted { abort: Abort::Stopped };
        let [late, told, stopped] = [late, told, stopped].map(Error::from);
        let own = Error::Job("the loss became NaN".into());
        let all = [late, told, stopped, own].map(|e| (e.culprit(1), e.kind(1)));
        use FailureKind::{Peer, Rank, Told};
        assert_eq!(all, [(3, Peer), (3, Told), (1, Told), (1, Rank)]);
    }
}
