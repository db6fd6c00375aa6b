//! What the cluster shows of itself: state, observations and history in the words of the protocol. Holds no secrets, changes nothing.
//!
//! Pure but for reading rows of the history, which never change.

mod jobs;
mod members;
mod paging;
mod records;

pub use jobs::{events_of, job_record};

use crate::cluster::State;
use crate::planner::Observed;
use crate::raft::disk::{Disk, DiskError};
use crate::raft::history::History;
use fleet_common::ids::ReplicaId;
use fleet_common::protocol::{ClusterView, JobState, Refusal, RefusalKind, Reply, Request};
use std::collections::BTreeMap;

/// What there is to be seen, at one moment.
pub struct View<'a, D: Disk + ?Sized> {
    pub state: &'a State,
    pub observed: &'a Observed,
    pub history: &'a History<D>,
    pub raft: Raft,
    /// Of the clock that `Observed` uses.
    pub now_ms: u64,
    pub unix_ms: u64,
}

/// How the replica that answers stands.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Raft {
    pub leader: Option<ReplicaId>,
    pub term: u64,
    pub commit_index: u64,
    pub applied_index: u64,
    pub read_only: Option<String>,
    /// What the leader knows of the others: how far their logs are, and whether they were heard of late. Empty elsewhere.
    pub progress: Vec<(ReplicaId, u64, bool)>,
    /// Whether it can write, of those of which that is known: this one, and on the leader those that reported lately.
    pub writers: BTreeMap<ReplicaId, bool>,
    /// Who contradicted what is committed, or stopped for such a reason, and what was said of it.
    pub alarms: BTreeMap<ReplicaId, String>,
}

impl<D: Disk + ?Sized> View<'_, D> {
    /// The answer to a query. Changes and watches are refused.
    pub fn answer(&self, request: &Request) -> Result<Reply, Refusal> {
        Ok(match request {
            Request::ClusterStatus => Reply::Cluster(self.cluster()),
            Request::Coordinators => Reply::Coordinators(self.coordinators()),
            Request::Tokens => Reply::Tokens(self.tokens()),
            Request::Nodes => Reply::Nodes(self.nodes()),
            Request::Jobs { all: None } => Reply::Jobs(self.present_jobs()),
            Request::Jobs { all: Some(page) } => Reply::Jobs(self.all_jobs(*page)?),
            Request::Job(job) => Reply::Job(Box::new(self.job(*job)?)),
            Request::Checkpoints { job, page } => Reply::Checkpoints(self.checkpoints(*job, *page)?),
            Request::Checkpoint { job, step } => Reply::Checkpoint(Box::new(self.checkpoint(*job, *step)?)),
            Request::Decisions(page) => Reply::Decisions(self.decisions(*page)?),
            Request::Runs(page) => Reply::Runs(self.runs(*page)?),
            Request::Run(run) => Reply::Run(Box::new(self.run(*run)?)),
            Request::RunMetrics { run, from } => {
                let (points, next) = self.points(*run, *from)?;
                Reply::Points { points, next }
            }
            Request::Exports(page) => Reply::Exports(self.exports(*page)?),
            Request::Export(export) => Reply::Export(Box::new(self.export(*export)?)),
            Request::Profiles(page) => Reply::Profiles(self.profiles(*page)?),
            Request::Profile(profile) => Reply::Profile(Box::new(self.profile(*profile)?)),
            Request::Position => Reply::Position(self.raft.applied_index),
            Request::Environment { job, values } => Reply::Environment(self.environment(*job, *values)?),
            Request::Authority => Reply::Authority(Box::new(self.authority())),
            Request::Retention => Reply::Retention(self.state.retention().view()),
            Request::Members => Reply::Members(self.members()),
            Request::Submit(_)
            | Request::SetRetention { .. }
            | Request::Output { .. }
            | Request::Cancel { .. }
            | Request::CreateToken { .. }
            | Request::Watch { .. }
            | Request::Addresses
            | Request::Renew { .. }
            | Request::RemoveCoordinator(_)
            | Request::RevokeToken { .. }
            | Request::Revoke(_)
            | Request::Drain { .. }
            | Request::Undrain(_)
            | Request::StartRun { .. }
            | Request::RecordMetrics { .. }
            | Request::FinishRun { .. }
            | Request::RecordExport(_)
            | Request::RecordProfile(_)
            | Request::SubmitOnce { .. }
            | Request::GiveSecrets { .. }
            | Request::RemoveSecrets(_)
            | Request::RotateCa
            | Request::FinishCa { .. }
            | Request::WebLogin { .. } => {
                let message = "this is no question with one answer".to_owned();
                return Err(Refusal { kind: RefusalKind::Invalid, message });
            }
        })
    }

    fn cluster(&self) -> ClusterView {
        let jobs = self.state.jobs();
        let in_state =
            |wanted: fn(JobState) -> bool| jobs.values().filter(|job| wanted(job.state)).count() as u32;
        let runs = |state| matches!(state, JobState::Starting | JobState::Running | JobState::Stopping);
        ClusterView {
            cluster_id: self.state.cluster_id().to_owned(),
            leader: self.raft.leader,
            term: self.raft.term,
            commit_index: self.raft.commit_index,
            applied_index: self.raft.applied_index,
            nodes: self.state.nodes().len() as u32,
            jobs_running: in_state(runs),
            jobs_queued: in_state(|state| state == JobState::Queued),
            read_only: self.raft.read_only.clone(),
        }
    }
}

/// A number that was given out, and nothing is known of it any more: "job-7".
fn removed(state: &State, what: &str, unix_ms: u64) -> Refusal {
    let ago = state.retention().removed_unix_ms().map_or(0, |at| unix_ms.saturating_sub(at));
    not_found(format!(
        "{what} was removed: what ended {} or longer ago is not kept any more, see `fleet retention`",
        match ago / (24 * 3_600_000) {
            0 => format!("{} hours", ago / 3_600_000),
            days => format!("{days} days"),
        }
    ))
}

/// Why something of the history is not shown.
pub fn unreadable(error: DiskError) -> Refusal {
    let message = match error {
        DiskError::Failed(why) => format!(
            "this coordinator's history is damaged there ({why}); it asks the others for what it cannot read: try again, or ask another one with --stale"
        ),
        error => error.to_string(),
    };
    Refusal { kind: RefusalKind::Unavailable, message }
}

fn not_found(message: String) -> Refusal {
    Refusal { kind: RefusalKind::NotFound, message }
}

#[cfg(test)]
mod tests;
