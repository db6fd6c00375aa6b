//! How parts of a gang end, and with the last of them the job, or only this start of it.
//!
//! A gang lives or dies as a whole: when one part ends badly the others are told to stop, with the time that a cancelled job has. Nothing new is
//! started before every part has reported its end or its node was given up.

use super::records::{JobRecord, Part, Placement, Report, Stop, node_error};
use super::{Context, Effect, State};
use crate::cluster::history::HistoryRow;
use fleet_common::events::{Event, EventBody, FailureKind, JobError, Outcome};
use fleet_common::ids::{JobId, NodeId};
use fleet_common::protocol::JobState;

/// Jobs that ended last and are kept in memory with the unfinished ones.
pub const FINISHED_IN_STATE: usize = 1_000;
/// Training jobs older than those of which it is still known which checkpoints they left.
pub const ARCHIVED_MAX: usize = 100_000;

impl State {
    /// No rank of this part of the job is alive any more.
    pub(crate) fn end_part(&mut self, id: JobId, node: NodeId, mut outcome: Outcome, context: &mut Context) {
        let Some(job) = self.jobs.get_mut(&id).filter(|job| !job.state.is_final()) else { return };
        let Some(at) = job.placement.as_mut() else { return };
        let Some(part) = at.parts.iter_mut().find(|part| part.node == node && !part.finished) else { return };
        part.finished = true;
        part.report = Report::default();
        let leads = part.first_rank == 0;
        context.effects.extend([Effect::Job(id), Effect::Plan]);
        let all = at.all_finished();
        let holders = at.resume.iter().flat_map(|resumed| &resumed.held);
        context.effects.extend(holders.map(|held| Effect::Node(held.node)));
        let elsewhere = blamed_elsewhere(at, node, &outcome).and_then(|node| self.nodes.get(&node));
        if let (Some(other), Outcome::Failed(error)) = (elsewhere, &mut outcome) {
            error.node = Some(other.name.clone());
        }
        let ended_well = matches!(outcome, Outcome::Succeeded { .. });
        job.ending = Some(worse(job.ending.take(), outcome, leads));
        if all {
            return self.settle(id, context);
        }
        let failed = matches!(job.ending, Some(Outcome::Failed(_)));
        if !ended_well && (failed || job.stop.is_none()) {
            // Ranks that train have nothing to save without the others.
            let how = if failed && job.trains { Stop::Now } else { Stop::AfterCheckpoint };
            let stop = job.stop.max(Some(how));
            job.state = JobState::Stopping;
            // Parts that end because they were told to have nothing new to tell the others.
            if job.stop != stop {
                job.stop = stop;
                wake_parts(job, context);
            }
        }
    }

    /// A gang cannot go on, though its ranks may live: its parts are told to stop, and with the last of them the job fails for this reason.
    pub(crate) fn break_off(&mut self, id: JobId, error: JobError, context: &mut Context) {
        let Some(job) = self.jobs.get_mut(&id).filter(|job| !job.state.is_final()) else { return };
        if job.placement.is_none() {
            return;
        }
        job.ending = Some(worse(job.ending.take(), Outcome::Failed(error), false));
        job.state = JobState::Stopping;
        job.stop = Some(Stop::Now);
        context.effects.push(Effect::Job(id));
        wake_parts(job, context);
    }

    /// All parts have ended.
    fn settle(&mut self, id: JobId, context: &mut Context) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let outcome = job.ending.take().unwrap_or(Outcome::Stopped { steps: job.progress.step });
        match outcome {
            Outcome::Stopped { .. } if job.requeue => {
                job.state = JobState::Queued;
                job.placement = None;
                job.stop = None;
                job.requeue = false;
                job.note(id, back_in_the_queue(job), context);
                context.effects.push(Effect::Plan);
            }
            outcome => self.finish(id, outcome, context),
        }
    }

    /// Ends a job. Its history gets the only `Finished` event.
    pub(crate) fn finish(&mut self, id: JobId, outcome: Outcome, context: &mut Context) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        let event = Event { unix_ms: context.unix_ms, body: EventBody::Finished(outcome) };
        job.record(id, event, context);
        context.effects.extend([Effect::Job(id), Effect::Plan]);
        wake_parts(job, context);
        self.job_ended(id, context);
        self.wake_superseded(context);
        self.finished.push_back(id);
        while self.finished.len() > FINISHED_IN_STATE {
            if let Some(oldest) = self.finished.pop_front() {
                self.archive(oldest, context);
            }
        }
    }

    /// Moves a job that has ended into the history. What is left of it here is what later records may refer to.
    fn archive(&mut self, id: JobId, context: &mut Context) {
        let Some(record) = self.take_ended(id) else { return };
        // Was reckoned when it ended.
        context.history.push(HistoryRow::Job { job: id, record: Box::new(record) });
    }

    /// Takes a job that has ended out of the memory, but for what later records may refer to.
    pub(super) fn take_ended(&mut self, id: JobId) -> Option<JobRecord> {
        let record = self.jobs.remove(&id)?;
        if record.trains {
            let checkpoints = record.checkpoints.iter();
            let left = checkpoints.map(|known| (known.record.step, known.record.manifest_sha256.clone()));
            self.archived.insert(id, left.collect());
            while self.archived.len() > ARCHIVED_MAX {
                self.archived.pop_first();
            }
        }
        Some(record)
    }

    /// Nothing more will be heard from the node: its parts of jobs have ended.
    pub(crate) fn give_up_node(&mut self, node: NodeId, why: &str, context: &mut Context) {
        let name = self.node_name(node);
        let jobs: Vec<_> = self.active_jobs(node).map(|(id, _)| id).collect();
        for id in jobs {
            let outcome = Outcome::Failed(node_error(name.clone(), why.to_owned()));
            self.end_part(id, node, outcome, context);
        }
    }
}

fn back_in_the_queue(job: &JobRecord) -> String {
    let back = "back in the queue";
    match (job.progress.step, job.checkpoints.last().map(|known| known.record.step)) {
        _ if !job.trains => back.to_owned(),
        (0, _) => format!("{back} before its first step"),
        (step, Some(saved)) if saved == step => format!("{back} after step {step}"),
        (step, Some(saved)) => {
            format!("{back} after step {step}, without a checkpoint of it; goes on from step {saved}")
        }
        (step, None) => format!("{back} after step {step}, without a checkpoint; begins as it did before"),
    }
}

/// The nodes of the job's parts have new orders.
pub(crate) fn wake_parts(job: &JobRecord, context: &mut Context) {
    let parts = job.placement.iter().flat_map(|at| &at.parts);
    context.effects.extend(parts.map(|part| Effect::Node(part.node)));
}

/// The node of another part whose rank this one's end is blamed on.
fn blamed_elsewhere(at: &Placement, here: NodeId, outcome: &Outcome) -> Option<NodeId> {
    let Outcome::Failed(JobError { rank: Some(rank), .. }) = outcome else { return None };
    let has = |part: &&Part| part.first_rank <= *rank && *rank - part.first_rank < part.ranks;
    at.parts.iter().find(has).map(|part| part.node).filter(|node| *node != here)
}

/// A failure counts most: before others the first that a part tells of itself, then what one tells of a peer, then what it was told by the
/// others. After that a stop; how a success looked is for rank 0 to say.
fn worse(known: Option<Outcome>, new: Outcome, leads: bool) -> Outcome {
    let weight = |outcome: &Outcome| match outcome {
        Outcome::Failed(JobError { kind: FailureKind::Told, .. }) => 2,
        Outcome::Failed(JobError { kind: FailureKind::Peer, .. }) => 3,
        Outcome::Failed(_) => 4,
        Outcome::Stopped { .. } => 1,
        Outcome::Succeeded { .. } => 0,
    };
    match known {
        Some(known) if weight(&known) > weight(&new) || (weight(&known) == weight(&new) && !leads) => known,
        Some(known @ Outcome::Failed(_)) if weight(&known) == weight(&new) => known,
        _ => new,
    }
}

#[cfg(test)]
mod tests;
