//! Why a node does not take a gang on.

use super::{Kind, RANKS_MAX};
use crate::agent::{Config, Place};
use crate::verdict;
use fleet_common::events::{FailureKind, JobError};
use fleet_common::exit::Fault;
use fleet_common::protocol::{Gang, Work, listed};

/// Why this node cannot run the gang at all.
pub(super) fn refuse(
    gang: &Gang,
    kind: &Kind,
    unfit: Option<&str>,
    places: &Result<Vec<Place>, String>,
    config: &Config,
) -> Option<JobError> {
    let error =
        |fault, message| Some(verdict::agent_error(FailureKind::Refused, fault, &config.name, message));
    if gang.ranks == 0 || gang.ranks > RANKS_MAX {
        let message = format!("{} ranks were asked for; a node runs 1 to {RANKS_MAX}", gang.ranks);
        return error(Fault::Input, message);
    }
    if gang.first_rank.checked_add(gang.ranks).is_none_or(|end| end > gang.world_size) {
        let message = format!("there are no ranks {}.. of {}", gang.first_rank, gang.world_size);
        return error(Fault::Input, message);
    }
    match (kind, &gang.work) {
        (_, Work::Program(program)) if program.argv.is_empty() => {
            error(Fault::Input, "no program was named".to_owned())
        }
        // They went between its assignment and its start here.
        (_, work) if work.removed().next().is_some() => {
            let names = listed(work.removed());
            error(
                Fault::Input,
                format!("its secrets were removed before it was started ({names}); submit it again"),
            )
        }
        (Kind::Train(_), _) => {
            let reason = unfit.map(str::to_owned).or_else(|| places.clone().err())?;
            error(Fault::Environment, reason)
        }
        _ => None,
    }
}
