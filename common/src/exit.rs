//! Exit codes of every fleet program.

use serde::{Deserialize, Serialize};

pub const SUCCEEDED: u8 = 0;
/// The job failed.
pub const JOB_FAILED: u8 = 1;
/// The input was refused before anything started.
pub const REFUSED_INPUT: u8 = 2;
/// No coordinator could be reached.
pub const UNREACHABLE: u8 = 3;
/// The environment is not fit: libtorch, disk, port.
pub const ENVIRONMENT: u8 = 4;
/// The cluster refused it for now, because it is at one of its limits; nothing was changed.
pub const LATER: u8 = 5;
/// The change may or may not have been made: its answer was lost.
pub const UNKNOWN: u8 = 6;
pub const SIGINT: u8 = 130;
pub const SIGTERM: u8 = 143;

/// Whose fault a failure is; decides the exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fault {
    /// The job ran and failed.
    Job,
    /// The job file or its data cannot be used.
    Input,
    /// libtorch, a disk or a port.
    Environment,
}

impl Fault {
    pub fn exit_code(self) -> u8 {
        match self {
            Fault::Job => JOB_FAILED,
            Fault::Input => REFUSED_INPUT,
            Fault::Environment => ENVIRONMENT,
        }
    }
}
