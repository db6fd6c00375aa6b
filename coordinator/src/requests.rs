//! The words of clients turned into changes of the state, and its answers into replies. Pure functions.

use crate::cluster::Answer;
use crate::cluster::checkpoints::Continues;
use crate::cluster::commands::{
    CancelJob, Change, ChangeSecrets, DrainNode, FinishCa, FinishRun, RecordExport, RecordMetrics,
    RecordProfile, RemoveReplica, RevokeMember, RevokeToken, SetRetention, StartRun, SubmitJob, SubmitOnce,
    UndrainNode,
};
use crate::cluster::records::Stop;
use fleet_common::job::{Job, Resume};
use fleet_common::protocol::{self, Refusal, RefusalKind, Reply, Request, Work};

/// How short and how small a history may be wished for: a slip of the keyboard shall not remove what ended a minute ago.
const RETENTION_AGE_MIN_S: u64 = 3_600;
const RETENTION_AGE_MAX_S: u64 = 100 * 366 * 24 * 3_600;
const RETENTION_BYTES_MIN: u64 = 64 << 20;

/// The change that a request asks for. Not for tokens, whose secret only the server holds, and not for queries.
pub fn change(request: Request) -> Result<Change, Refusal> {
    Ok(match request {
        Request::Submit(job) => Change::SubmitJob(submit(job)?),
        Request::SubmitOnce { name, job } => Change::SubmitOnce(SubmitOnce { id: name, job: submit(job)? }),
        Request::Cancel { job, now } => {
            let stop = if now { Stop::Now } else { Stop::AfterCheckpoint };
            Change::CancelJob(CancelJob { job, stop })
        }
        Request::RemoveCoordinator(replica) => Change::RemoveReplica(RemoveReplica { replica }),
        Request::RevokeToken { id } => Change::RevokeToken(RevokeToken { id }),
        Request::Revoke(member) => Change::RevokeMember(RevokeMember { member }),
        Request::Drain { node, now } => Change::DrainNode(DrainNode { node, now }),
        Request::Undrain(node) => Change::UndrainNode(UndrainNode { node }),
        Request::StartRun { name } => Change::StartRun(StartRun { name }),
        Request::RecordMetrics { run, points } => Change::RecordMetrics(RecordMetrics { run, points }),
        Request::FinishRun { run, succeeded } => Change::FinishRun(FinishRun { run, succeeded }),
        Request::RecordExport(record) => Change::RecordExport(RecordExport { record }),
        Request::RecordProfile(record) => Change::RecordProfile(RecordProfile { record }),
        Request::GiveSecrets { job, values } => {
            Change::ChangeSecrets(ChangeSecrets { job, values: Some(values) })
        }
        Request::RemoveSecrets(job) => Change::ChangeSecrets(ChangeSecrets { job, values: None }),
        Request::FinishCa { force } => Change::FinishCa(FinishCa { force }),
        Request::RotateCa => return Err(invalid("a CA is made by the server that keeps its key")),
        Request::SetRetention { age_s, bytes } => Change::SetRetention(retention(age_s, bytes)?),
        Request::CreateToken { .. } => {
            return Err(invalid("a token is made by the server that keeps its secret"));
        }
        Request::ClusterStatus
        | Request::Nodes
        | Request::Jobs { .. }
        | Request::Job(_)
        | Request::Checkpoints { .. }
        | Request::Watch { .. }
        | Request::Coordinators
        | Request::Addresses
        | Request::Renew { .. }
        | Request::Tokens
        | Request::Decisions(_)
        | Request::Checkpoint { .. }
        | Request::Runs(_)
        | Request::Run(_)
        | Request::RunMetrics { .. }
        | Request::Exports(_)
        | Request::Export(_)
        | Request::Profiles(_)
        | Request::Profile(_)
        | Request::Position
        | Request::Environment { .. }
        | Request::Authority
        | Request::Output { .. }
        | Request::Retention
        | Request::Members
        | Request::WebLogin { .. } => return Err(invalid("this is a question and changes nothing")),
    })
}

fn retention(age_s: Option<u64>, bytes: Option<u64>) -> Result<SetRetention, Refusal> {
    if age_s.is_some_and(|age| !(RETENTION_AGE_MIN_S..=RETENTION_AGE_MAX_S).contains(&age)) {
        return Err(invalid("history is kept for one hour at least, and for a hundred years at most"));
    }
    if bytes.is_some_and(|bytes| bytes < RETENTION_BYTES_MIN) {
        return Err(invalid(format!(
            "{} MiB of history are kept at least, which is the output of one talkative job",
            RETENTION_BYTES_MIN >> 20
        )));
    }
    Ok(SetRetention { age_ms: age_s.map(|age| age * 1_000), bytes })
}

fn submit(job: protocol::SubmitJob) -> Result<SubmitJob, Refusal> {
    let (name, keep_checkpoints, continues) = match &job.work {
        Work::Train { job_json } => {
            let job =
                Job::from_json(job_json).map_err(|error| invalid(format!("this is not a job: {error}")))?;
            let continues = match &job.checkpoint.resume {
                Resume::No => Continues::Nothing,
                Resume::Path(path) => Continues::From(path.to_string_lossy().into_owned()),
                Resume::Latest => Continues::Newest(job.checkpoint_dir().to_string_lossy().into_owned()),
            };
            (job.run_name.clone(), job.checkpoint.save_total_limit, continues)
        }
        Work::Program(program) => {
            let name = program.argv.first();
            let name = name.ok_or_else(|| invalid("a program has at least its own name as an argument"))?;
            (name.rsplit('/').next().unwrap_or(name).to_owned(), 1, Continues::Nothing)
        }
    };
    let protocol::SubmitJob { world_size, work, wish } = job;
    Ok(SubmitJob { name, world_size, work, wish, keep_checkpoints, continues })
}

/// What a client is told of its change.
pub fn reply(answer: Answer) -> Result<Reply, Refusal> {
    match answer {
        Answer::Done => Ok(Reply::Done),
        Answer::Submitted { job } => Ok(Reply::Submitted { job }),
        Answer::RunStarted { run } => Ok(Reply::RunStarted(run)),
        Answer::ExportRecorded { export } => Ok(Reply::ExportRecorded(export)),
        Answer::ProfileRecorded { profile } => Ok(Reply::ProfileRecorded(profile)),
        Answer::Rejected(refusal) => Err(refusal),
        Answer::TokenCreated { .. }
        | Answer::Redeemed { .. }
        | Answer::EventsTaken { .. }
        | Answer::EventsGap { .. } => Err(Refusal {
            kind: RefusalKind::Undecided,
            message: format!("the cluster gave an answer that does not fit: {answer:?}"),
        }),
    }
}

/// For logs and metrics.
pub fn name(request: &Request) -> &'static str {
    match request {
        Request::Submit(_) => "submit",
        Request::Cancel { .. } => "cancel",
        Request::CreateToken { .. } => "create_token",
        Request::ClusterStatus => "cluster_status",
        Request::Nodes => "nodes",
        Request::Jobs { .. } => "jobs",
        Request::Job(_) => "job",
        Request::Checkpoints { .. } => "checkpoints",
        Request::Watch { .. } => "watch",
        Request::Coordinators => "coordinators",
        Request::Addresses => "addresses",
        Request::Renew { .. } => "renew",
        Request::RemoveCoordinator(_) => "remove_coordinator",
        Request::Tokens => "tokens",
        Request::RevokeToken { .. } => "revoke_token",
        Request::Revoke(_) => "revoke",
        Request::Drain { .. } => "drain",
        Request::Undrain(_) => "undrain",
        Request::Decisions(_) => "decisions",
        Request::Checkpoint { .. } => "checkpoint",
        Request::StartRun { .. } => "start_run",
        Request::RecordMetrics { .. } => "record_metrics",
        Request::FinishRun { .. } => "finish_run",
        Request::Runs(_) => "runs",
        Request::Run(_) => "run",
        Request::RunMetrics { .. } => "run_metrics",
        Request::RecordExport(_) => "record_export",
        Request::Exports(_) => "exports",
        Request::Export(_) => "export",
        Request::RecordProfile(_) => "record_profile",
        Request::Profiles(_) => "profiles",
        Request::Profile(_) => "profile",
        Request::Position => "position",
        Request::SubmitOnce { .. } => "submit_once",
        Request::Environment { .. } => "environment",
        Request::GiveSecrets { .. } => "give_secrets",
        Request::RemoveSecrets(_) => "remove_secrets",
        Request::RotateCa => "rotate_ca",
        Request::FinishCa { .. } => "finish_ca",
        Request::Authority => "authority",
        Request::WebLogin { .. } => "web_login",
        Request::Output { .. } => "output",
        Request::Retention => "retention",
        Request::Members => "members",
        Request::SetRetention { .. } => "set_retention",
    }
}

fn invalid(message: impl Into<String>) -> Refusal {
    Refusal { kind: RefusalKind::Invalid, message: message.into() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fleet_common::ids::JobId;
    use fleet_common::protocol::{Program, Wish};

    fn program(argv: &[&str]) -> Request {
        let argv = argv.iter().map(|arg| (*arg).to_owned()).collect();
        let work = Work::Program(Program { argv, working_dir: "/".into(), env: Vec::new() });
        Request::Submit(protocol::SubmitJob { world_size: 1, work, wish: Wish::default() })
    }

    #[test]
    fn a_program_is_called_by_its_file() {
        let Ok(Change::SubmitJob(job)) = change(program(&["/usr/bin/env", "x"])) else { panic!() };
        assert_eq!(job.name, "env");
        assert!(change(program(&[])).is_err());
    }

    #[test]
    fn a_history_that_is_as_good_as_none_is_not_to_be_had_by_a_slip() {
        let set = |age_s, bytes| change(Request::SetRetention { age_s, bytes });
        assert!(set(Some(60), None).unwrap_err().message.contains("one hour"));
        assert!(set(Some(u64::MAX), None).is_err());
        assert!(set(None, Some(1 << 20)).unwrap_err().message.contains("64 MiB"));
        let Ok(Change::SetRetention(set)) = set(Some(86_400), None) else { panic!() };
        assert_eq!((set.age_ms, set.bytes), (Some(86_400_000), None));
    }

    #[test]
    fn a_request_is_a_change_or_a_question() {
        assert!(change(Request::Job(JobId(1))).is_err());
        assert!(!Request::Job(JobId(1)).is_change());
        let undrain = Request::Undrain(fleet_common::ids::NodeId(1));
        assert!(undrain.is_change() && change(undrain).is_ok());
    }
}
