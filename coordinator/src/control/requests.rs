//! The words of clients turned into changes of the state, and its answers into replies. Pure functions.

use super::asks::{invalid, unavailable};
use crate::cluster::Answer;
use crate::cluster::commands::{CancelJob, Change, SubmitJob};
use crate::cluster::records::Stop;
use fleet_common::job::Job;
use fleet_common::protocol::{self, Refusal, Reply, Request, Work};

/// Ranks of one job: what the largest cluster has.
const WORLD_MAX: u32 = 65_536;

pub(super) fn is_query(request: &Request) -> bool {
    match request {
        Request::ClusterStatus
        | Request::Nodes
        | Request::Jobs
        | Request::Job(_)
        | Request::Checkpoints { .. } => true,
        Request::Submit(_) | Request::Cancel { .. } | Request::CreateToken { .. } | Request::Watch { .. } => {
            false
        }
    }
}

/// The change that a request asks for.
pub(super) fn change(request: Request) -> Result<Change, Refusal> {
    match request {
        Request::Submit(job) => submit(job).map(Change::SubmitJob),
        Request::Cancel { job, now } => {
            let stop = if now { Stop::Now } else { Stop::AfterCheckpoint };
            Ok(Change::CancelJob(CancelJob { job, stop }))
        }
        Request::CreateToken { .. } => Err(invalid("a token is made by the server that keeps its secret")),
        Request::ClusterStatus
        | Request::Nodes
        | Request::Jobs
        | Request::Job(_)
        | Request::Checkpoints { .. }
        | Request::Watch { .. } => Err(invalid("this is a question and changes nothing")),
    }
}

fn submit(job: protocol::SubmitJob) -> Result<SubmitJob, Refusal> {
    if job.world_size == 0 || job.world_size > WORLD_MAX {
        return Err(invalid(format!("a job has 1 to {WORLD_MAX} ranks, not {}", job.world_size)));
    }
    let (name, keep_checkpoints) = match &job.work {
        Work::Train { job_json } => {
            let job =
                Job::from_json(job_json).map_err(|error| invalid(format!("this is not a job: {error}")))?;
            (job.run_name.clone(), job.checkpoint.save_total_limit)
        }
        Work::Program(program) => {
            let name = program
                .argv
                .first()
                .ok_or_else(|| invalid("a program has at least its own name as an argument"))?;
            (name.rsplit('/').next().unwrap_or(name).to_owned(), 1)
        }
    };
    Ok(SubmitJob { name, world_size: job.world_size, work: job.work, keep_checkpoints, largest_node: None })
}

/// What a client is told of its change.
pub(super) fn reply(answer: Answer) -> Reply {
    match answer {
        Answer::Submitted { job } => Reply::Submitted { job },
        Answer::Done => Reply::CancelAccepted,
        other => Reply::Refused(refusal_in(other)),
    }
}

/// Why an answer is none of those that were expected.
pub(super) fn refusal_in(answer: Answer) -> Refusal {
    match answer {
        Answer::Rejected(refusal) => refusal,
        other => misfit(&other),
    }
}

pub(super) fn misfit(answer: &impl std::fmt::Debug) -> Refusal {
    unavailable(format!("the cluster gave an answer that does not fit: {answer:?}"))
}
