//! How a command fails: one line and an exit code.

use fleet_common::exit;
use fleet_common::job::{JobFileError, RanksError};
use fleet_common::net::{IdentityError, NetError, TokenError};
use fleet_common::protocol::{Refusal, RefusalKind};
use std::error::Error;
use std::path::Path;

/// Printed as `error: MESSAGE`; ends the program with `code`.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    pub code: u8,
    pub message: String,
}

impl Failure {
    /// The user's input cannot be used.
    pub fn input(message: impl Into<String>) -> Failure {
        Failure { code: exit::REFUSED_INPUT, message: message.into() }
    }

    /// The machine is not fit: a program is missing, a disk is full.
    pub fn environment(message: impl Into<String>) -> Failure {
        Failure { code: exit::ENVIRONMENT, message: message.into() }
    }

    pub fn unreachable(message: impl Into<String>) -> Failure {
        Failure { code: exit::UNREACHABLE, message: message.into() }
    }

    /// A file operation of fleet's own that failed.
    pub fn io(what: &str, path: &Path, error: &std::io::Error) -> Failure {
        Failure::environment(format!("cannot {what} {}: {error}", path.display()))
    }
}

impl From<JobFileError> for Failure {
    fn from(error: JobFileError) -> Failure {
        // only the reading of the file has a cause below it
        let cause = error.source().map_or(String::new(), |cause| format!(": {cause}"));
        Failure::input(format!("{error}{cause}"))
    }
}

impl From<RanksError> for Failure {
    fn from(error: RanksError) -> Failure {
        Failure::input(error.to_string())
    }
}

impl From<NetError> for Failure {
    fn from(error: NetError) -> Failure {
        Failure { code: error.exit_code(), message: error.to_string() }
    }
}

impl From<IdentityError> for Failure {
    fn from(error: IdentityError) -> Failure {
        Failure::input(error.to_string())
    }
}

impl From<TokenError> for Failure {
    fn from(error: TokenError) -> Failure {
        Failure { code: error.exit_code(), message: error.to_string() }
    }
}

impl From<Refusal> for Failure {
    fn from(refusal: Refusal) -> Failure {
        let code = match refusal.kind {
            RefusalKind::Invalid | RefusalKind::NotFound | RefusalKind::Forbidden | RefusalKind::Spent => {
                exit::REFUSED_INPUT
            }
            RefusalKind::Unavailable => exit::UNREACHABLE,
            RefusalKind::Later => exit::LATER,
            RefusalKind::Undecided | RefusalKind::Forgotten => exit::UNKNOWN,
        };
        Failure { code, message: refusal.message }
    }
}
