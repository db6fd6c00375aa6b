//! What is recorded of runs: series of numbers, exports of models, profiles of data.

use crate::ids::{ExportId, JobId, ParseIdError, ProfileId, RunId};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// Points in one `RecordMetrics`: far below a frame with names of the longest kind.
pub const POINTS_MAX: usize = 1_000;

/// Something with series of numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum RunKey {
    /// A training job; its series are its steps and evaluations.
    Job(JobId),
    /// A run that a client records by itself.
    Own(RunId),
}

impl fmt::Display for RunKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RunKey::Job(job) => job.fmt(f),
            RunKey::Own(run) => run.fmt(f),
        }
    }
}

impl FromStr for RunKey {
    type Err = ParseIdError;
    /// Only with its prefix, `job-7` or `run-3`.
    fn from_str(text: &str) -> Result<Self, ParseIdError> {
        match text.split_once('-') {
            Some(("job", _)) => text.parse().map(RunKey::Job),
            Some(("run", _)) => text.parse().map(RunKey::Own),
            _ => Err(ParseIdError::new(text, "run-1")),
        }
    }
}

/// A value of a series.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Point {
    /// Name of the series, such as `loss`.
    pub series: String,
    pub step: u64,
    pub value: f64,
    pub unix_ms: u64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunView {
    pub run: RunKey,
    pub name: String,
    pub state: RunState,
    pub started_unix_ms: u64,
    pub finished_unix_ms: Option<u64>,
    pub points: u64,
    /// The newest value of each series, by name.
    pub last: Vec<(String, f64)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RunState {
    Open,
    Succeeded,
    Failed,
}

/// A model was written in another format from a checkpoint.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NewExport {
    /// The checkpoint: its job and step.
    pub job: JobId,
    pub step: u64,
    /// Such as `onnx` or `gguf`.
    pub format: String,
    /// Where it lies.
    pub path: String,
    pub bytes: u64,
    /// Of the file, in hex.
    pub sha256: String,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ExportView {
    pub export: ExportId,
    pub unix_ms: u64,
    /// Of the checkpoint that it was made from, in hex.
    pub manifest_sha256: String,
    pub record: NewExport,
}

/// What data looked like when a run used it, feature by feature, so that later data can be compared with it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NewProfile {
    pub run: RunKey,
    pub name: String,
    pub features: Vec<Feature>,
}

/// The distribution of one quantity.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Feature {
    pub name: String,
    pub samples: u64,
    pub mean: f64,
    pub std_dev: f64,
    /// Bounds of the histogram's bins, rising; one more than there are bins.
    pub edges: Vec<f64>,
    pub counts: Vec<u64>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ProfileView {
    pub profile: ProfileId,
    pub unix_ms: u64,
    pub record: NewProfile,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_is_a_job_or_a_client_s_own() {
        for run in [RunKey::Job(JobId(7)), RunKey::Own(RunId(3))] {
            assert_eq!(run.to_string().parse::<RunKey>().unwrap(), run);
        }
        assert!("7".parse::<RunKey>().is_err());
    }
}
