//! What the cluster shows of itself: the state and the observations in the words of the protocol. Holds no secrets, changes nothing.

use super::asks::{invalid, unavailable};
use super::{Control, Now, Status};
use crate::cluster::State;
use crate::cluster::members::NodeRecord;
use crate::planner::{self, Observed};
use crate::raft::disk::Disk;
use crate::raft::history::History;
use fleet_common::ids::{JobId, NodeId};
use fleet_common::protocol::{
    CheckpointView, ClusterView, JobState, JobView, NodeView, Refusal, RefusalKind, Reply, Request, Work,
};

impl<D: Disk> Control<D> {
    /// The answer to a query, from what is known here and now.
    pub(super) fn query(&self, now: Now, request: &Request) -> Result<Reply, Refusal> {
        let state = self.replica.state();
        match request {
            Request::ClusterStatus => Ok(Reply::Cluster(cluster(state, &self.status()))),
            Request::Nodes => Ok(Reply::Nodes(nodes(state, &self.observed(now), now))),
            Request::Jobs => {
                let observed = self.observed(now);
                let views = state.jobs().keys().filter_map(|id| job_view(state, &observed, *id));
                Ok(Reply::Jobs(views.collect()))
            }
            Request::Job(id) => {
                let view = job_view(state, &self.observed(now), *id).ok_or_else(|| no_such_job(*id))?;
                let work = self.history.work(*id).map_err(|error| unavailable(error.to_string()))?;
                Ok(Reply::Job(Box::new(with_work(view, work))))
            }
            Request::Checkpoints { job } => checkpoints(state, *job).map(Reply::Checkpoints),
            Request::Submit(_)
            | Request::Cancel { .. }
            | Request::CreateToken { .. }
            | Request::Watch { .. } => Err(invalid("this is no question with one answer")),
        }
    }
}

/// How many events of a job are recorded, and whether no more will come.
pub(super) fn events_of<D: Disk>(
    state: &State,
    _history: &History<D>,
    job: JobId,
) -> Result<(u64, bool), Refusal> {
    let record = state.jobs().get(&job).ok_or_else(|| no_such_job(job))?;
    Ok((record.events, record.state.is_final()))
}

fn no_such_job(id: JobId) -> Refusal {
    Refusal { kind: RefusalKind::NotFound, message: format!("there is no {id}; `fleet jobs` lists them") }
}

fn cluster(state: &State, status: &Status) -> ClusterView {
    let in_state =
        |wanted: fn(JobState) -> bool| state.jobs().values().filter(|job| wanted(job.state)).count() as u32;
    ClusterView {
        cluster_id: state.cluster_id().to_owned(),
        leader: status.leader.map(|leader| leader.0),
        term: status.term,
        commit_index: status.commit_index,
        applied_index: status.applied_index,
        nodes: state.nodes().len() as u32,
        jobs_running: in_state(|state| {
            matches!(state, JobState::Starting | JobState::Running | JobState::Stopping)
        }),
        jobs_queued: in_state(|state| state == JobState::Queued),
        read_only: status.read_only.clone(),
    }
}

fn nodes(state: &State, observed: &Observed, now: Now) -> Vec<NodeView> {
    let used = state.slots_in_use();
    let view = |(id, node): (&NodeId, &NodeRecord)| {
        let seen = observed.nodes.get(id);
        NodeView {
            node: *id,
            name: node.name.clone(),
            connected: seen.is_some_and(|seen| seen.connected),
            slots: node.slots,
            slots_used: used.get(id).copied().unwrap_or_default(),
            device: node.device.clone(),
            version: node.version.clone(),
            heard_ms_ago: seen.map(|seen| now.mono_ms.saturating_sub(seen.heard_ms)),
        }
    };
    state.nodes().iter().map(view).collect()
}

fn with_work(mut view: JobView, work: Option<Work>) -> JobView {
    if let Some(Work::Train { job_json }) = work {
        view.job_json = job_json;
    }
    view
}

fn checkpoints(state: &State, only: Option<JobId>) -> Result<Vec<CheckpointView>, Refusal> {
    if let Some(id) = only
        && !state.jobs().contains_key(&id)
    {
        return Err(no_such_job(id));
    }
    let jobs = state.jobs().iter().filter(|(id, _)| only.is_none_or(|only| only == **id));
    let views = jobs.flat_map(|(id, job)| {
        job.checkpoints.iter().map(|checkpoint| CheckpointView {
            job: *id,
            run_name: job.name.clone(),
            checkpoint: checkpoint.record.clone(),
            unix_ms: checkpoint.unix_ms,
        })
    });
    Ok(views.collect())
}

fn job_view(state: &State, observed: &Observed, id: JobId) -> Option<JobView> {
    let job = state.jobs().get(&id)?;
    Some(JobView {
        job: id,
        name: job.name.clone(),
        state: job.state,
        reason: planner::explain(state, observed, id),
        world_size: job.world_size,
        node: job.placement.map(|at| at.node),
        generation: job.generation(),
        submitted_unix_ms: job.submitted_unix_ms,
        finished_unix_ms: job.finished_unix_ms,
        step: job.progress.step,
        total_steps: job.progress.total_steps,
        loss: job.progress.loss,
        eval_loss: job.progress.eval_loss,
        tokens_per_s: job.progress.tokens_per_s,
        events: job.events,
        checkpoint: job.checkpoints.last().map(|checkpoint| checkpoint.record.clone()),
        error: job.error.clone(),
        data: job.data.clone(),
        job_json: String::new(),
    })
}
