//! A new job. It waits until the planner finds a place for it.

use crate::cluster::history::HistoryRow;
use crate::cluster::records::{JobRecord, Progress};
use crate::cluster::{Answer, Context, Effect, State};
use fleet_common::ids::JobId;
use fleet_common::protocol::{JobState, Work};
use serde::{Deserialize, Serialize};

/// Unfinished jobs: bounds what the state holds of them, at most some tens of KiB each.
pub const UNFINISHED_MAX: usize = 1_000;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SubmitJob {
    pub name: String,
    pub world_size: u32,
    pub work: Work,
    pub keep_checkpoints: u32,
    /// Slots of the largest node that the proposer heard; `None` when it heard none yet, then the job waits for one.
    pub largest_node: Option<u32>,
}

impl SubmitJob {
    pub(super) fn apply(self, state: &mut State, context: &mut Context) -> Answer {
        if self.world_size == 0 {
            return Answer::invalid("a job needs at least one rank");
        }
        if let Some(largest) = self.largest_node.filter(|largest| *largest < self.world_size) {
            return Answer::invalid(format!(
                "the job has {} ranks, and the largest node has {largest} slots; ask for fewer ranks or join a larger node",
                self.world_size
            ));
        }
        if state.jobs.values().filter(|job| !job.state.is_final()).count() >= UNFINISHED_MAX {
            return Answer::invalid(format!(
                "{UNFINISHED_MAX} jobs are unfinished, which is the limit; cancel some or wait"
            ));
        }
        state.last_job += 1;
        let job = JobId(state.last_job);
        context.history.push(HistoryRow::Work { job, work: self.work.clone() });
        context.effects.extend([Effect::Plan, Effect::Job(job)]);
        let record = JobRecord {
            name: self.name,
            world_size: self.world_size,
            work: Some(self.work),
            keep_checkpoints: self.keep_checkpoints,
            state: JobState::Queued,
            submitted_unix_ms: context.unix_ms,
            finished_unix_ms: None,
            placement: None,
            stop: None,
            events: 0,
            progress: Progress::default(),
            data: None,
            checkpoints: Vec::new(),
            error: None,
        };
        state.jobs.insert(job, record);
        Answer::Submitted { job }
    }
}

#[cfg(test)]
mod tests {
    use crate::cluster::Answer;
    use crate::cluster::tests::{Script, submit, why};
    use fleet_common::ids::JobId;
    use fleet_common::protocol::JobState;

    #[test]
    fn jobs_are_numbered_and_wait() {
        let mut script = Script::new();
        assert_eq!(script.run(submit(2, None)), Answer::Submitted { job: JobId(1) });
        assert_eq!(script.run(submit(2, None)), Answer::Submitted { job: JobId(2) });
        assert_eq!(script.state.jobs()[&JobId(2)].state, JobState::Queued);
    }

    #[test]
    fn more_ranks_than_the_largest_node_has_are_refused_with_what_there_is() {
        let mut script = Script::new();
        let refusal = why(script.run(submit(8, Some(4))));
        assert!(refusal.contains("8 ranks") && refusal.contains("4 slots"), "{refusal}");
        assert!(script.state.jobs().is_empty());
        assert!(matches!(script.run(submit(4, Some(4))), Answer::Submitted { .. }));
    }
}
