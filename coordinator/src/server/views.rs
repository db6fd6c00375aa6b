//! Queries: answered from a state that has everything which was acknowledged before.

use super::Shared;
use crate::views::{Raft, View, events_of};
use fleet_common::ids::{JobId, ReplicaId};
use fleet_common::protocol::{ClusterView, JobView, Listing, NodeView, Refusal, RefusalKind, Reply, Request};
use std::time::SystemTime;

pub async fn ask(shared: &Shared, request: Request) -> Result<Reply, Refusal> {
    let status = shared.handle.status();
    let observed = shared.roster.observed(status.leading_since);
    let (now_ms, history) = (shared.roster.now_ms(), shared.history.clone());
    let raft = Raft {
        leader: status.leader.map(ReplicaId),
        term: status.term,
        commit_index: status.commit_index,
        applied_index: status.applied_index,
        read_only: status.read_only,
        progress: Vec::new(),
    };
    let unix = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let unix_ms = unix.as_millis() as u64;
    let look = move |state: &_| {
        View { state, observed: &observed, history: &history, raft, now_ms, unix_ms }.answer(&request)
    };
    shared.handle.read(look).await?
}

fn misfit() -> Refusal {
    Refusal { kind: RefusalKind::Unavailable, message: "an answer of another kind".into() }
}

pub async fn cluster(shared: &Shared) -> Result<ClusterView, Refusal> {
    match ask(shared, Request::ClusterStatus).await? {
        Reply::Cluster(view) => Ok(view),
        _ => Err(misfit()),
    }
}

pub async fn nodes(shared: &Shared) -> Result<Vec<NodeView>, Refusal> {
    match ask(shared, Request::Nodes).await? {
        Reply::Nodes(views) => Ok(views),
        _ => Err(misfit()),
    }
}

pub async fn jobs(shared: &Shared) -> Result<Vec<JobView>, Refusal> {
    match ask(shared, Request::Jobs { all: None }).await? {
        Reply::Jobs(Listing { items, .. }) => Ok(items),
        _ => Err(misfit()),
    }
}

pub async fn job(shared: &Shared, id: JobId) -> Result<JobView, Refusal> {
    match ask(shared, Request::Job(id)).await? {
        Reply::Job(view) => Ok(*view),
        _ => Err(misfit()),
    }
}

/// How many events of a job are recorded, and whether no more will come.
pub async fn events(shared: &Shared, id: JobId) -> Result<(u64, bool), Refusal> {
    let history = shared.history.clone();
    shared.handle.read(move |state| events_of(state, &history, id)).await?
}
