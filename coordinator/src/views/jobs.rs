//! Jobs and their checkpoints.

use super::{View, not_found, removed, unreadable};
use crate::cluster::State;
use crate::cluster::checkpoints::Held;
use crate::cluster::records::{JobRecord, RecordedCheckpoint};
use crate::planner::{Outlook, ended};
use crate::raft::disk::{Disk, Table};
use crate::raft::history::History;
use fleet_common::events::EventBody;
use fleet_common::ids::JobId;
use fleet_common::protocol::{
    CheckpointPlace, CheckpointView, JobView, Listing, PAGE_MAX, Page, PartView, Refusal, VariableView, Work,
};
use std::ops::Range;

/// Finished jobs in the short list.
const RECENT: usize = 50;

fn no_such_job(state: &State, id: JobId, unix_ms: u64) -> Refusal {
    match id.0 > 0 && id.0 <= state.last_job() {
        true => removed(state, &id.to_string(), unix_ms),
        false => not_found(format!("there is no {id}; `fleet jobs` lists them")),
    }
}

/// How many events of a job are recorded, and whether no more will come.
pub fn events_of<D: Disk + ?Sized>(
    state: &State,
    history: &History<D>,
    id: JobId,
    unix_ms: u64,
) -> Result<(u64, bool), Refusal> {
    if let Some(job) = state.jobs().get(&id) {
        return Ok((job.events, job.state.is_final()));
    }
    let job: Option<JobRecord> = history.row(Table::Jobs, id.0).map_err(unreadable)?;
    job.map(|job| (job.events, true)).ok_or_else(|| no_such_job(state, id, unix_ms))
}

/// A job, from memory or from the history.
pub fn job_record<D: Disk + ?Sized>(
    state: &State,
    history: &History<D>,
    id: JobId,
    unix_ms: u64,
) -> Result<JobRecord, Refusal> {
    if let Some(job) = state.jobs().get(&id) {
        return Ok(job.clone());
    }
    let job = history.row(Table::Jobs, id.0).map_err(unreadable)?;
    job.ok_or_else(|| no_such_job(state, id, unix_ms))
}

impl<D: Disk + ?Sized> View<'_, D> {
    /// The unfinished jobs and the newest finished ones, in the order of their numbers.
    pub(super) fn present_jobs(&self) -> Listing<JobView> {
        let outlook = self.outlook();
        let jobs = self.state.jobs();
        let finished = jobs.values().filter(|job| job.state.is_final()).count();
        let mut skip = finished.saturating_sub(RECENT);
        let shown = jobs.iter().filter(|(_, job)| {
            let old = job.state.is_final() && skip > 0;
            skip -= usize::from(old);
            !old
        });
        Listing { items: shown.map(|(id, job)| self.show(&outlook, *id, job)).collect(), next: None }
    }

    /// All jobs there ever were, newest first.
    pub(super) fn all_jobs(&self, page: Page) -> Result<Listing<JobView>, Refusal> {
        let outlook = self.outlook();
        let remembered = |numbers: Range<u64>| {
            let jobs = self.state.jobs().range(JobId(numbers.start)..JobId(numbers.end));
            jobs.map(|(id, job)| (id.0, self.show(&outlook, *id, job))).collect()
        };
        let show = |id, job: JobRecord| Some(self.show(&outlook, JobId(id), &job));
        self.page(page, self.state.last_job(), Table::Jobs, remembered, show)
    }

    /// With the job's own JSON, if it is a training job.
    pub(super) fn job(&self, id: JobId) -> Result<JobView, Refusal> {
        let job = self.record(id)?;
        let mut view = self.show(&self.outlook(), id, &job);
        if let Some(Work::Train { job_json }) = self.history.work(id).map_err(unreadable)? {
            view.job_json = job_json;
        }
        Ok(view)
    }

    /// Of one that has ended as the history has it: without the values of secrets. Whether the asker may see those was looked at before.
    pub(super) fn environment(&self, id: JobId, values: bool) -> Result<Vec<VariableView>, Refusal> {
        let in_state = self.state.jobs().get(&id).and_then(|job| job.work.clone());
        let work = match in_state {
            Some(work) => work,
            None => self
                .history
                .work(id)
                .map_err(unreadable)?
                .ok_or_else(|| no_such_job(self.state, id, self.unix_ms))?,
        };
        Ok(work.environment().iter().map(|variable| variable.view(values)).collect())
    }

    pub(super) fn checkpoints(
        &self,
        only: Option<JobId>,
        page: Page,
    ) -> Result<Listing<CheckpointView>, Refusal> {
        if let Some(id) = only {
            let job = self.record(id)?;
            return Ok(Listing { items: self.checkpoints_of(id, &job), next: None });
        }
        // A job has few; one without any is passed over.
        let some =
            |id, job: &JobRecord| Some(self.checkpoints_of(JobId(id), job)).filter(|few| !few.is_empty());
        let jobs = self.page(
            Page { max: page.max.min(PAGE_MAX / 4), ..page },
            self.state.last_job(),
            Table::Jobs,
            |numbers| {
                let jobs = self.state.jobs().range(JobId(numbers.start)..JobId(numbers.end));
                jobs.filter_map(|(id, job)| Some((id.0, some(id.0, job)?))).collect()
            },
            |id, job: JobRecord| some(id, &job),
        )?;
        Ok(Listing { items: jobs.items.into_iter().flatten().collect(), next: jobs.next })
    }

    /// With its shards.
    pub(super) fn checkpoint(&self, id: JobId, step: u64) -> Result<CheckpointView, Refusal> {
        let job = self.record(id)?;
        let known = job.checkpoints.iter().rev().find(|known| known.record.step == step);
        let known = known.ok_or_else(|| {
            not_found(format!(
                "{id} has no checkpoint of step {step}; `fleet checkpoints ls {id}` lists them"
            ))
        })?;
        let mut view = self.checkpoint_view(id, &job, known);
        let events = self.history.events(id, known.event, 1).map_err(unreadable)?;
        if let Some((_, event)) = events.into_iter().next()
            && let EventBody::Checkpoint(whole) = event.body
        {
            view.checkpoint = whole;
        }
        Ok(view)
    }

    pub(super) fn record(&self, id: JobId) -> Result<JobRecord, Refusal> {
        job_record(self.state, self.history, id, self.unix_ms)
    }

    fn outlook(&self) -> Outlook {
        Outlook::new(self.state, self.observed, self.unix_ms)
    }

    fn show(&self, outlook: &Outlook, id: JobId, job: &JobRecord) -> JobView {
        let reason = match job.state.is_final() {
            true => ended(job),
            false => outlook.explain(self.state, self.observed, id),
        };
        let parts = job.placement.iter().flat_map(|at| &at.parts).map(|part| PartView {
            node: part.node,
            name: self.state.node_name(part.node),
            ranks: part.ranks,
        });
        JobView {
            job: id,
            name: job.name.clone(),
            state: job.state,
            reason,
            world_size: job.world_size,
            wish: job.wish.clone(),
            parts: parts.collect(),
            generation: job.generation,
            submitted_unix_ms: job.submitted_unix_ms,
            finished_unix_ms: job.finished_unix_ms,
            step: job.progress.step,
            total_steps: job.progress.total_steps,
            loss: job.progress.loss,
            eval_loss: job.progress.eval_loss,
            tokens_per_s: job.progress.tokens_per_s,
            memory_mib: job.memory_mib(),
            stall: job.stall().cloned(),
            events: job.events,
            checkpoint: job.checkpoints.last().map(|known| known.record.clone()),
            error: job.error.clone(),
            data: job.data.clone(),
            job_json: String::new(),
        }
    }
    fn checkpoints_of(&self, id: JobId, job: &JobRecord) -> Vec<CheckpointView> {
        job.checkpoints.iter().map(|known| self.checkpoint_view(id, job, known)).collect()
    }

    fn checkpoint_view(&self, id: JobId, job: &JobRecord, known: &RecordedCheckpoint) -> CheckpointView {
        let place = |held: &Held| {
            let (node, name, files) = (held.node, self.state.node_name(held.node), held.files);
            CheckpointPlace { node, name, files }
        };
        CheckpointView {
            job: id,
            run_name: job.name.clone(),
            checkpoint: known.record.clone(),
            unix_ms: known.unix_ms,
            places: known.held.iter().map(place).collect(),
        }
    }
}
