//! Identifiers. Each is a type of its own, so that a node cannot be passed for a job.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

macro_rules! number_id {
    ($(#[$doc:meta])* $name:ident, $prefix:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub u64);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($prefix, "-{}"), self.0)
            }
        }

        impl FromStr for $name {
            type Err = ParseIdError;
            /// Accepts both `job-7` and `7`.
            fn from_str(text: &str) -> Result<Self, ParseIdError> {
                text.strip_prefix(concat!($prefix, "-"))
                    .unwrap_or(text)
                    .parse()
                    .map($name)
                    .map_err(|_| ParseIdError::new(text, concat!($prefix, "-1")))
            }
        }
    };
}

number_id!(
    /// A job, numbered from 1 in the order in which jobs were submitted.
    JobId,
    "job"
);
number_id!(
    /// A machine that joined the cluster. Never reused.
    NodeId,
    "node"
);
number_id!(
    /// One coordinator of the cluster, and its number within raft. Never reused, not even after a removal.
    ReplicaId,
    "replica"
);
number_id!(
    /// The holder of a client's certificate. Never reused.
    UserId,
    "user"
);
number_id!(
    /// A run that a client records by itself.
    RunId,
    "run"
);
number_id!(
    /// A model that was exported from a checkpoint.
    ExportId,
    "export"
);
number_id!(
    /// A record of what data looked like.
    ProfileId,
    "profile"
);

/// Whether a text reads as some id, also without its prefix. Nobody may be called that: commands take names and ids in one place.
pub fn is_id(text: &str) -> bool {
    fn reads_as<T: FromStr>(text: &str) -> bool {
        text.parse::<T>().is_ok()
    }
    let kinds = [
        reads_as::<JobId>,
        reads_as::<NodeId>,
        reads_as::<ReplicaId>,
        reads_as::<UserId>,
        reads_as::<RunId>,
        reads_as::<ExportId>,
        reads_as::<ProfileId>,
    ];
    kinds.iter().any(|reads| reads(text))
}

/// Counts the starts of one job's gang of ranks; a message from an older generation is refused.
pub type Generation = u64;

/// Global rank of a process within its job, `0..world_size`.
pub type Rank = u32;

/// Identifies one client process, drawn at random by it; with a sequence number it makes a request unique.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ClientId(pub u128);

#[derive(Debug, thiserror::Error)]
#[error("`{text}` is not an id; write it like `{example}`, as the lists of them show it")]
pub struct ParseIdError {
    text: String,
    example: &'static str,
}

impl ParseIdError {
    pub(crate) fn new(text: &str, example: &'static str) -> ParseIdError {
        ParseIdError { text: text.to_owned(), example }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_reads_back_with_and_without_its_prefix() {
        assert_eq!(JobId(7).to_string(), "job-7");
        assert_eq!("job-7".parse::<JobId>().unwrap(), JobId(7));
        assert_eq!("7".parse::<JobId>().unwrap(), JobId(7));
        assert!("node-7".parse::<JobId>().is_err());
    }

    #[test]
    fn what_a_command_would_take_for_an_id_reads_as_one() {
        for id in ["7", "007", "job-7", "node-02", "replica-1", "user-3", "run-1", "export-2", "profile-9"] {
            assert!(is_id(id), "{id}");
        }
        for name in ["", "box", "node", "node-", "node-x", "node-7@node-8", "gpu-7", "7.1", "node-7.local"] {
            assert!(!is_id(name), "{name}");
        }
    }
}
