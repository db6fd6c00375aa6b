//! What is known of a job, and what its events tell about it.

use super::Context;
use super::checkpoints::{Continues, Held, Resumed};
use crate::cluster::history::HistoryRow;
use fleet_common::events::{
    CheckpointRecord, DataStats, Endpoint, Event, EventBody, FailureKind, JobError, Level, Outcome, Stall,
    line_cost,
};
use fleet_common::exit::Fault;
use fleet_common::ids::{Generation, JobId, NodeId, Rank};
use fleet_common::protocol::{JobState, Wish, Work};
use serde::{Deserialize, Serialize};
use std::cmp::Reverse;
use std::path::Path;

/// Events of one job that are kept, and bytes of its lines over all its starts and nodes; beyond it lines of output are left out and
/// only the rest is kept. Agents keep to less by themselves; they are not relied on.
pub const LOGGED_EVENTS_MAX: u64 = 1_000_000;
pub const LOGGED_BYTES_MAX: u64 = 128 << 20;
/// Bytes of all rows of one job: some nine million steps. Beyond it its steps are still shown and only its checkpoints and its end
/// written down.
pub const HISTORY_BYTES_MAX: u64 = 1 << 30;
/// With checkpoints.
const CHECKPOINTED_BYTES_MAX: u64 = 2 * HISTORY_BYTES_MAX;
/// Lines of an error in the state, and characters of each: 1,000 failed jobs have less than 64 MiB of them.
const ERROR_LINES_MAX: usize = 30;
const ERROR_LINE_MAX: usize = 2_000;

/// Invariant: `placement` is there from the assignment to the end of the job or its return to the queue, and with it
/// `generation > 0`. A job that is final has no work and a finish time.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct JobRecord {
    pub name: String,
    pub world_size: u32,
    pub wish: Wish,
    /// A training job, which is a run as well.
    pub trains: bool,
    /// Until the job is final; afterwards it is in the history.
    pub work: Option<Work>,
    pub keep_checkpoints: u32,
    pub state: JobState,
    pub submitted_unix_ms: u64,
    pub finished_unix_ms: Option<u64>,
    /// Starts so far.
    pub generation: Generation,
    pub placement: Option<Placement>,
    pub stop: Option<Stop>,
    /// Stops only to start again: goes back to the queue when every part has ended.
    pub requeue: bool,
    /// How the parts that have ended did: the worst of them.
    pub ending: Option<Outcome>,
    /// Events in the history.
    pub events: u64,
    /// Of its rows in the history.
    pub bytes: u64,
    pub told: Told,
    pub progress: Progress,
    pub data: Option<DataStats>,
    /// Valid checkpoints, oldest first, at most `keep_checkpoints`.
    pub checkpoints: Vec<RecordedCheckpoint>,
    /// What it goes on from while it has none.
    pub continues: Continues,
    /// Checkpoints of other jobs, with the nodes that fetched a copy for this one. They go when it has as many of its own as it keeps.
    pub fetched: Vec<Resumed>,
    /// Manifests of checkpoints that a node could not get, and that are not tried again.
    pub passed_over: Vec<String>,
    pub error: Option<JobError>,
}

/// What a job's agents told of its output.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Told {
    /// Counted against `LOGGED_BYTES_MAX`.
    bytes: u64,
    /// Left out beyond it, and how much of that is said in the history.
    left_out: LeftOut,
    said: LeftOut,
    /// It is said that `HISTORY_BYTES_MAX` is reached.
    is_full: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
struct LeftOut {
    lines: u64,
    bytes: u64,
}

/// Where a job's gang is. Invariants: `parts` is not empty and in rank order; no node is in it twice.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Placement {
    pub generation: Generation,
    pub parts: Vec<Part>,
    pub placed_unix_ms: u64,
    /// Where rank 0 of a program listens, if there are several parts. No other job has it on that node.
    pub port: Option<u16>,
    /// What it goes on from, where the cluster knows that.
    pub resume: Option<Resumed>,
}

/// The ranks of a gang on one node, and how far their stream of events has come.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Part {
    pub node: NodeId,
    pub first_rank: Rank,
    pub ranks: u32,
    /// Number of the next event of this part.
    pub next_seq: u64,
    /// No rank of it is alive any more.
    pub finished: bool,
    /// What its ranks had in memory when that was looked at last, shared pages counted once.
    pub memory_mib: Option<u64>,
    /// For whom its ranks wait.
    pub stall: Option<Stall>,
    pub report: Report,
}

/// What the parts of a training gang on several nodes must say before any of its ranks starts: each of them is then told of all. Gone when
/// the part is over.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Where its ranks can be called, in rank order; empty until it says so.
    pub endpoints: Vec<Endpoint>,
    /// Under which name or address its node was reached then.
    pub address: String,
    /// `DataStats::fingerprint`, once its data are ready.
    pub data: Option<String>,
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
    /// Without its shards and disks, which are in the event.
    pub record: CheckpointRecord,
    /// The job's event that has all of it.
    pub event: u64,
    pub unix_ms: u64,
    /// Where it lies.
    pub held: Vec<Held>,
}

impl Placement {
    pub fn part(&self, node: NodeId) -> Option<&Part> {
        self.parts.iter().find(|part| part.node == node)
    }

    pub fn all_finished(&self) -> bool {
        self.parts.iter().all(|part| part.finished)
    }
}

impl JobRecord {
    /// The part of the gang on `node` that is not over.
    pub fn live_part(&self, node: NodeId) -> Option<&Part> {
        if self.state.is_final() {
            return None;
        }
        self.placement.as_ref()?.part(node).filter(|part| !part.finished)
    }

    /// Names of variables whose values must be given again before it can be started.
    pub fn removed_secrets(&self) -> impl Iterator<Item = &str> {
        self.work.iter().flat_map(Work::removed)
    }

    /// Slots that the job holds, by node.
    pub fn slots(&self) -> impl Iterator<Item = (NodeId, u32)> {
        let parts = match &self.placement {
            Some(at) if !self.state.is_final() => &at.parts[..],
            _ => &[],
        };
        let live = parts.iter().filter(|part| !part.finished);
        live.map(|part| (part.node, part.ranks.saturating_mul(self.wish.slots_per_rank)))
    }

    /// Of all its parts; `None` where no part has said.
    pub fn memory_mib(&self) -> Option<u64> {
        let said = self.placement.iter().flat_map(|at| &at.parts).filter_map(|part| part.memory_mib);
        said.reduce(u64::saturating_add)
    }

    /// For whom it waits, as the node tells that sees most of it, and of several such the first to see it.
    pub fn stall(&self) -> Option<&Stall> {
        let live = self.placement.iter().flat_map(|at| &at.parts).filter(|part| !part.finished);
        let told = live
            .filter(|_| matches!(self.state, JobState::Running | JobState::Stopping))
            .filter_map(|part| part.stall.as_ref());
        told.min_by_key(|stall| (Reverse(stall.culprit), stall.since_unix_ms))
    }

    /// Takes what an agent tells. Lines and measurements are left out where there are too many, or where the history is `overfull`.
    pub(crate) fn tell(&mut self, id: JobId, event: Event, overfull: bool, context: &mut Context) {
        let cost = match &event.body {
            EventBody::Log { line, .. } => line_cost(line),
            EventBody::LeftOut { .. } => line_cost(""),
            EventBody::Memory { rss_mib, pss_mib, .. } => {
                line_cost("") + 8 * (rss_mib.len() + pss_mib.len()) as u64
            }
            EventBody::Finished(_) => return self.record(id, event, context),
            EventBody::Checkpoint(_) if self.bytes < CHECKPOINTED_BYTES_MAX => {
                return self.record(id, event, context);
            }
            _ if self.bytes >= HISTORY_BYTES_MAX => {
                self.follow(&event.body);
                if !std::mem::replace(&mut self.told.is_full, true) {
                    let most = HISTORY_BYTES_MAX >> 30;
                    let line =
                        format!("the history of this job has {most} GiB; its steps are not kept any more");
                    self.note(id, line, context);
                }
                return;
            }
            _ => return self.record(id, event, context),
        };
        // A program says nothing else.
        if !self.trains {
            self.runs();
        }
        if let EventBody::LeftOut { lines: 0, .. } = event.body {
            return;
        }
        let full =
            self.events >= LOGGED_EVENTS_MAX || self.told.bytes.saturating_add(cost) > LOGGED_BYTES_MAX;
        if !full && !overfull {
            self.told.bytes += cost;
            return self.record(id, event, context);
        }
        let left_out = &mut self.told.left_out;
        match event.body {
            EventBody::Log { line, .. } => left_out.add(1, line.len() as u64),
            EventBody::LeftOut { lines, bytes } => left_out.add(lines, bytes),
            _ => return,
        }
        // Said each time that it has doubled: some dozen times, whatever comes.
        if left_out.lines >= self.told.said.lines.saturating_mul(2) {
            self.say_left_out(id, event.unix_ms, context);
        }
    }

    fn say_left_out(&mut self, id: JobId, unix_ms: u64, context: &mut Context) {
        let Told { left_out, said, .. } = self.told;
        if left_out != said {
            let (lines, bytes) = (left_out.lines - said.lines, left_out.bytes - said.bytes);
            self.told.said = left_out;
            self.record(id, Event { unix_ms, body: EventBody::LeftOut { lines, bytes } }, context);
        }
    }

    /// What the job is doing, as an event tells.
    fn follow(&mut self, body: &EventBody) {
        match body {
            EventBody::DataReady(stats) => self.data = Some(stats.clone()),
            EventBody::Started { step, .. } => {
                self.progress.step = *step;
                self.runs();
            }
            EventBody::Step(step) => {
                self.progress.step = step.step;
                self.progress.total_steps = step.total_steps;
                self.progress.loss = Some(step.loss);
                self.progress.tokens_per_s = Some(step.tokens_per_s);
            }
            EventBody::Eval(evaluation) => self.progress.eval_loss = Some(evaluation.loss),
            _ => {}
        }
    }

    /// Puts an event into the history and what it tells into the record.
    pub(crate) fn record(&mut self, id: JobId, mut event: Event, context: &mut Context) {
        self.follow(&event.body);
        match &mut event.body {
            EventBody::Checkpoint(checkpoint) => match checkpoint.flaw() {
                None => self.keep(id, checkpoint.clone(), event.unix_ms, context),
                Some(flaw) => {
                    let (step, error) = (checkpoint.step, format!("its manifest is not whole: {flaw}"));
                    event.body = EventBody::CheckpointFailed { step, error };
                }
            },
            EventBody::Finished(outcome) => {
                self.close(outcome, context.unix_ms);
                self.say_left_out(id, event.unix_ms, context);
            }
            _ => {}
        }
        self.events += 1;
        self.bytes += context.keep(HistoryRow::Event { job: id, index: self.events, event });
    }

    /// A line of the cluster's own in the job's history.
    pub(crate) fn note(&mut self, id: JobId, line: String, context: &mut Context) {
        let body = EventBody::Log { rank: None, level: Level::Info, line };
        self.record(id, Event { unix_ms: context.unix_ms, body }, context);
    }

    fn runs(&mut self) {
        if self.state == JobState::Starting {
            self.state = JobState::Running;
        }
    }

    fn keep(&mut self, id: JobId, mut record: CheckpointRecord, unix_ms: u64, context: &mut Context) {
        let held = self.written_by(&record);
        let here: Vec<NodeId> = held.iter().map(|held| held.node).collect();
        (record.shards, record.disks) = (Vec::new(), Vec::new());
        let path = record.path.clone();
        let mut gone: Vec<RecordedCheckpoint> =
            self.checkpoints.extract_if(.., |known| known.record.path == record.path).collect();
        self.checkpoints.push(RecordedCheckpoint { record, event: self.events + 1, unix_ms, held });
        let keeps = self.keep_checkpoints.max(1) as usize;
        gone.extend(self.checkpoints.drain(..self.checkpoints.len().saturating_sub(keeps)));
        let own = |known: RecordedCheckpoint| Resumed { job: id, record: known.record, held: known.held };
        let mut gone: Vec<Resumed> = gone.into_iter().map(own).collect();
        if self.checkpoints.len() == keeps {
            gone.append(&mut self.fetched);
        }
        // Where the job's ranks write they remove them.
        let dir = Path::new(&path).parent();
        for known in gone.iter_mut().filter(|known| Path::new(&known.record.path).parent() == dir) {
            known.held.retain(|held| !here.contains(&held.node));
        }
        context.superseded.append(&mut gone);
    }

    fn close(&mut self, outcome: &Outcome, unix_ms: u64) {
        self.finished_unix_ms = Some(unix_ms);
        self.work = None;
        self.stop = None;
        self.requeue = false;
        self.ending = None;
        match outcome {
            Outcome::Succeeded { steps, final_loss, tokens_per_s } => {
                self.state = JobState::Succeeded;
                self.progress.step = *steps;
                self.progress.loss = final_loss.or(self.progress.loss);
                self.progress.tokens_per_s = Some(*tokens_per_s);
            }
            Outcome::Stopped { steps } => {
                self.state = JobState::Cancelled;
                // Of ranks that had not begun, it is none of those before.
                self.progress.step = self.progress.step.max(*steps);
            }
            Outcome::Failed(error) => {
                self.state = JobState::Failed;
                self.error = Some(bounded(error));
            }
        }
    }
}

impl LeftOut {
    fn add(&mut self, lines: u64, bytes: u64) {
        self.lines = self.lines.saturating_add(lines);
        self.bytes = self.bytes.saturating_add(bytes);
    }
}

/// What the state keeps of a stall.
pub(crate) fn bounded_stall(stall: &Stall) -> Stall {
    Stall { what: stall.what.chars().take(ERROR_LINE_MAX).collect(), ..*stall }
}

/// What the state keeps of an error; the event in the history has all of it.
fn bounded(error: &JobError) -> JobError {
    let cut = |text: &String, max: usize| text.chars().take(max).collect();
    let skip = error.last_lines.len().saturating_sub(ERROR_LINES_MAX);
    let last_lines = error.last_lines[skip..].iter().map(|line| cut(line, ERROR_LINE_MAX)).collect();
    JobError { message: cut(&error.message, ERROR_LINE_MAX), last_lines, ..error.clone() }
}

/// The error of a job whose node failed it.
pub(crate) fn node_error(node: String, message: String) -> JobError {
    JobError {
        kind: FailureKind::Node,
        fault: Fault::Job,
        rank: None,
        node: Some(node),
        signal: None,
        exit_code: None,
        message,
        last_lines: Vec::new(),
    }
}
