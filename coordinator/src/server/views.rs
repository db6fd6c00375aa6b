//! What the cluster shows of itself: the state and the observations in the words of the protocol. Holds no secrets.

use super::Shared;
use crate::cluster::State;
use crate::planner::{self, Observed};
use fleet_common::ids::{JobId, NodeId};
use fleet_common::protocol::{
    CheckpointView, ClusterView, JobState, JobView, NodeView, Refusal, RefusalKind, Work,
};

pub async fn cluster(shared: &Shared) -> Result<ClusterView, Refusal> {
    let counted = shared.handle.read(|state| {
        let in_state = |wanted: fn(JobState) -> bool| {
            state.jobs().values().filter(|job| wanted(job.state)).count() as u32
        };
        let running =
            in_state(|state| matches!(state, JobState::Starting | JobState::Running | JobState::Stopping));
        (state.nodes().len() as u32, running, in_state(|state| state == JobState::Queued))
    });
    let (nodes, jobs_running, jobs_queued) = counted.await?;
    let status = shared.handle.status();
    Ok(ClusterView {
        cluster_id: shared.ca.cluster_id().to_owned(),
        leader: status.leader,
        term: status.term,
        commit_index: status.commit_index,
        applied_index: status.applied_index,
        nodes,
        jobs_running,
        jobs_queued,
        read_only: status.read_only,
    })
}

pub async fn nodes(shared: &Shared) -> Result<Vec<NodeView>, Refusal> {
    let (observed, now_ms) = (observed(shared), shared.roster.now_ms());
    shared
        .handle
        .read(move |state| {
            let used = state.slots_in_use();
            let view = |(id, node): (&NodeId, &crate::cluster::members::NodeRecord)| {
                let seen = observed.nodes.get(id);
                NodeView {
                    node: *id,
                    name: node.name.clone(),
                    connected: seen.is_some_and(|seen| seen.connected),
                    slots: node.slots,
                    slots_used: used.get(id).copied().unwrap_or_default(),
                    device: node.device.clone(),
                    version: node.version.clone(),
                    heard_ms_ago: seen.map(|seen| now_ms.saturating_sub(seen.heard_ms)),
                }
            };
            state.nodes().iter().map(view).collect()
        })
        .await
}

pub async fn jobs(shared: &Shared) -> Result<Vec<JobView>, Refusal> {
    let observed = observed(shared);
    shared
        .handle
        .read(move |state| state.jobs().keys().filter_map(|id| job_view(state, &observed, *id)).collect())
        .await
}

/// With the job's own JSON, if it is a training job.
pub async fn job(shared: &Shared, id: JobId) -> Result<JobView, Refusal> {
    let observed = observed(shared);
    let view = shared.handle.read(move |state| job_view(state, &observed, id)).await?;
    let mut view = view.ok_or_else(|| no_such_job(id))?;
    let work = shared.history.work(id).map_err(|error| super::driver::unavailable(error.to_string()))?;
    if let Some(Work::Train { job_json }) = work {
        view.job_json = job_json;
    }
    Ok(view)
}

pub async fn checkpoints(shared: &Shared, only: Option<JobId>) -> Result<Vec<CheckpointView>, Refusal> {
    shared
        .handle
        .read(move |state| {
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
        })
        .await?
}

pub fn no_such_job(id: JobId) -> Refusal {
    Refusal { kind: RefusalKind::NotFound, message: format!("there is no {id}; `fleet jobs` lists them") }
}

fn observed(shared: &Shared) -> Observed {
    shared.roster.observed(shared.handle.status().leading_since)
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
