//! `fleet submit`: gives a job to a running cluster.

use super::{JobArgs, OutputArgs, connect, load_job};
use crate::client::{Client, Flow, block_on, unexpected};
use crate::failure::Failure;
use crate::report::{End, Report, Style};
use crate::{out, places};
use fleet_common::exit;
use fleet_common::ids::JobId;
use fleet_common::protocol::{JobState, JobView, Reply, Request, SubmitJob, Work};
use serde_json::json;

/// Give a job to a running cluster
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    job: JobArgs,
    /// Ranks to start; without it the job's `devices`, else one
    #[arg(short = 'n', long = "ranks", alias = "nproc-per-node", value_name = "N")]
    ranks: Option<u32>,
    /// Show the job's progress and end as it ends
    #[arg(long)]
    wait: bool,
    #[command(flatten)]
    output: OutputArgs,
}

pub fn run(args: Args, cluster: Option<&str>) -> Result<u8, Failure> {
    let started_unix_ms = places::unix_ms();
    let mut job = load_job(&args.job.job, &args.job.sets)?;
    let (world_size, warning) = job.settle_ranks(args.ranks)?;
    if let Some(warning) = warning {
        out::note(&format!("warning: {warning}"));
    }
    let work = Work::Train { job_json: job.to_json() };
    let mut client = connect(cluster)?;
    block_on(async {
        let job = submit(&mut client, SubmitJob { world_size, work }).await?;
        if !args.wait {
            match args.output.json {
                true => out::json(&json!({"job": job.to_string(), "ranks": world_size})),
                false => out::line(&job.to_string()),
            }
            return Ok(exit::SUCCEEDED);
        }
        let mut report = Report::new(Style::of_training(args.output.json), Some(started_unix_ms));
        report.submitted(&job.to_string(), world_size);
        follow(&mut client, job, &mut report).await
    })
}

pub async fn submit(client: &mut Client, request: SubmitJob) -> Result<JobId, Failure> {
    match client.change(Request::Submit(request)).await? {
        Reply::Submitted { job } => Ok(job),
        other => Err(unexpected(&other)),
    }
}

/// Shows a job to its end.
async fn follow(client: &mut Client, job: JobId, report: &mut Report) -> Result<u8, Failure> {
    let watched = client
        .watch(job, 1, true, |event| {
            report.event(&event);
            std::future::ready(Flow::Continue)
        })
        .await;
    let end = match watched {
        Ok(()) => job_view(client, job).await,
        Err(failure) => Err(failure),
    };
    match end {
        Ok(view) => {
            let code = exit_code(&view);
            report.finish(End::Job(Box::new(view)));
            Ok(code)
        }
        Err(Failure { code, message }) => {
            report.finish(End::Failed { message, code });
            Ok(code)
        }
    }
}

pub async fn job_view(client: &mut Client, job: JobId) -> Result<JobView, Failure> {
    match client.ask(Request::Job(job)).await? {
        Reply::Job(view) => Ok(*view),
        other => Err(unexpected(&other)),
    }
}

/// The exit code for a job that has ended.
pub fn exit_code(view: &JobView) -> u8 {
    match (view.state, &view.error) {
        (JobState::Succeeded, _) => exit::SUCCEEDED,
        (_, Some(error)) => error.fault.exit_code(),
        _ => exit::JOB_FAILED,
    }
}
