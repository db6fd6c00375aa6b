//! What is known of a job, and the one way in which it ends.

use super::{Context, Effect, State};
use crate::cluster::history::HistoryRow;
use fleet_common::events::{CheckpointRecord, DataStats, Event, EventBody, JobError, Outcome};
use fleet_common::exit::Fault;
use fleet_common::ids::{Generation, JobId, NodeId};
use fleet_common::protocol::{JobState, Work};
use serde::{Deserialize, Serialize};

/// Events of one job that are kept; beyond it lines of output are dropped and only the rest is kept (a year of steps fits).
pub const LOGGED_EVENTS_MAX: u64 = 1_000_000;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct JobRecord {
    pub name: String,
    pub world_size: u32,
    /// Until the job is final; afterwards it is in the history.
    pub work: Option<Work>,
    pub keep_checkpoints: u32,
    pub state: JobState,
    pub submitted_unix_ms: u64,
    pub finished_unix_ms: Option<u64>,
    pub placement: Option<Placement>,
    pub stop: Option<Stop>,
    /// Events in the history.
    pub events: u64,
    pub progress: Progress,
    pub data: Option<DataStats>,
    /// Valid checkpoints, oldest first, at most `keep_checkpoints`.
    pub checkpoints: Vec<RecordedCheckpoint>,
    pub error: Option<JobError>,
}

/// Where a job's gang is, and how far its stream of events has come.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Placement {
    pub node: NodeId,
    pub generation: Generation,
    /// Number of the next event of this generation.
    pub next_seq: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Stop {
    AfterCheckpoint,
    Now,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    pub step: u64,
    pub total_steps: u64,
    pub loss: Option<f64>,
    pub eval_loss: Option<f64>,
    pub tokens_per_s: Option<f64>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RecordedCheckpoint {
    pub record: CheckpointRecord,
    pub unix_ms: u64,
}

impl JobRecord {
    pub fn generation(&self) -> Generation {
        self.placement.map_or(0, |at| at.generation)
    }

    /// Puts an event into the history and what it tells into the record.
    pub(crate) fn record(&mut self, id: JobId, event: Event, context: &mut Context) {
        match &event.body {
            EventBody::DataReady(stats) => self.data = Some(stats.clone()),
            EventBody::Started { step, .. } => {
                self.progress.step = *step;
                if self.state == JobState::Starting {
                    self.state = JobState::Running;
                }
            }
            EventBody::Step(step) => {
                self.progress.step = step.step;
                self.progress.total_steps = step.total_steps;
                self.progress.loss = Some(step.loss);
                self.progress.tokens_per_s = Some(step.tokens_per_s);
            }
            EventBody::Eval(evaluation) => self.progress.eval_loss = Some(evaluation.loss),
            EventBody::Checkpoint(checkpoint) => {
                self.checkpoints.retain(|known| known.record.path != checkpoint.path);
                self.checkpoints
                    .push(RecordedCheckpoint { record: checkpoint.clone(), unix_ms: event.unix_ms });
                let surplus = self.checkpoints.len().saturating_sub(self.keep_checkpoints.max(1) as usize);
                self.checkpoints.drain(..surplus);
            }
            EventBody::CheckpointFailed { .. } | EventBody::Memory { .. } => {}
            EventBody::Log { .. } if self.events >= LOGGED_EVENTS_MAX => return,
            EventBody::Log { .. } => {}
            EventBody::Finished(outcome) => self.close(outcome, context.unix_ms),
        }
        self.events += 1;
        context.history.push(HistoryRow::Event { job: id, index: self.events, event });
    }

    fn close(&mut self, outcome: &Outcome, unix_ms: u64) {
        self.finished_unix_ms = Some(unix_ms);
        self.work = None;
        match outcome {
            Outcome::Succeeded { steps, final_loss, tokens_per_s } => {
                self.state = JobState::Succeeded;
                self.progress.step = *steps;
                self.progress.loss = final_loss.or(self.progress.loss);
                self.progress.tokens_per_s = Some(*tokens_per_s);
            }
            Outcome::Stopped { steps } => {
                self.state = JobState::Cancelled;
                self.progress.step = *steps;
            }
            Outcome::Failed(error) => {
                self.state = JobState::Failed;
                self.error = Some(error.clone());
            }
        }
    }
}

impl State {
    /// Ends a job by decision of the cluster. Its history gets the `Finished` event that no agent will send.
    pub(crate) fn finish(&mut self, id: JobId, outcome: Outcome, context: &mut Context) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let event = Event { unix_ms: context.unix_ms, body: EventBody::Finished(outcome) };
        job.record(id, event, context);
        context.effects.extend([Effect::Job(id), Effect::Plan]);
        if let Some(at) = job.placement {
            context.effects.push(Effect::Node(at.node));
        }
    }

    /// Nothing more will be heard from the node: its jobs fail.
    pub(crate) fn give_up_node(&mut self, node: NodeId, why: &str, context: &mut Context) {
        let name = self.node_name(node);
        let jobs: Vec<_> = self.active_jobs(node).map(|(id, _)| id).collect();
        for id in jobs {
            self.finish(id, Outcome::Failed(node_error(name.clone(), why.to_owned())), context);
        }
    }
}

/// The error of a job whose node failed it.
pub(crate) fn node_error(node: String, message: String) -> JobError {
    JobError {
        fault: Fault::Job,
        rank: None,
        node: Some(node),
        signal: None,
        exit_code: None,
        message,
        last_lines: Vec::new(),
    }
}
