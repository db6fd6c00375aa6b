//! Submits under names of the users' own: which job each name stands for, so that a script may submit it again.

use fleet_common::ids::JobId;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Names that are remembered, of the newest jobs: ten megabytes at most. Those of unfinished jobs are among them, as there are fewer.
pub const SUBMISSIONS_MAX: usize = 50_000;

/// Invariant: `by_job` has the same as `by_name`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Submissions {
    by_name: BTreeMap<String, Submission>,
    by_job: BTreeMap<JobId, String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Submission {
    pub job: JobId,
    /// SHA-256 of what was asked for, without the values of secrets.
    pub digest: [u8; 32],
}

impl Submissions {
    pub fn get(&self, name: &str) -> Option<Submission> {
        self.by_name.get(name).copied()
    }

    /// Keeps a name that is not known yet. If there is no room the oldest job's is forgotten that is not `unfinished`.
    pub fn keep(&mut self, name: String, submission: Submission, unfinished: impl Fn(JobId) -> bool) {
        while self.by_name.len() >= SUBMISSIONS_MAX {
            let Some(oldest) = self.by_job.keys().copied().find(|job| !unfinished(*job)) else { break };
            if let Some(name) = self.by_job.remove(&oldest) {
                self.by_name.remove(&name);
            }
        }
        self.by_job.insert(submission.job, name.clone());
        self.by_name.insert(name, submission);
    }

    pub fn len(&self) -> usize {
        self.by_name.len()
    }

    pub fn is_empty(&self) -> bool {
        self.by_name.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_names_are_forgotten_but_not_those_of_unfinished_jobs() {
        let mut known = Submissions::default();
        let all = SUBMISSIONS_MAX as u64 + 3;
        for n in 1..=all {
            let submission = Submission { job: JobId(n), digest: [0; 32] };
            known.keep(format!("n{n}"), submission, |job| job == JobId(2));
        }
        assert_eq!(known.len(), SUBMISSIONS_MAX);
        assert!(["n1", "n3", "n4"].iter().all(|name| known.get(name).is_none()));
        assert!(["n2", "n5"].iter().all(|name| known.get(name).is_some()));
        assert_eq!(known.by_job.len(), known.by_name.len());
    }
}
