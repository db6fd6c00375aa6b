//! `fleet submit`: gives a job to a running cluster.

use super::token::seconds;
use super::{OutputArgs, Target, connect, load_job};
use crate::client::{Client, Flow, block_on, unexpected};
use crate::environment::EnvArgs;
use crate::failure::Failure;
use crate::launch::work::{no_work, work_of};
use crate::report::{End, Report, Style};
use crate::{out, places};
use fleet_common::exit;
use fleet_common::ids::JobId;
use fleet_common::job::{Asked, Shape};
use fleet_common::protocol::{JobState, JobView, Reply, Request, SubmitJob, Wish, Work};
use serde_json::json;
use std::ffi::OsString;
use std::path::PathBuf;

/// Give a job to a running cluster
///
/// With `-- PROGRAM ARGS` the ranks are copies of any program, with RANK, WORLD_SIZE, MASTER_ADDR and the rest as torchrun sets them, and
/// with OMP_NUM_THREADS=1 and PYTHONUNBUFFERED=1 where these are not set, on one node or several. Of the environment here PATH, LD_LIBRARY_PATH, VIRTUAL_ENV, CONDA_*, LANG, LC_*, TZ, TERM, PYTHON*, OMP_*, MKL_*,
/// NCCL_*, TORCH_*, CUDA_* and their like travel; HOME, USER and the devices are the node's; everything else is given with --env.
#[derive(clap::Args)]
pub struct Args {
    /// Job file: .toml, .yaml or .json
    #[arg(conflicts_with = "program")]
    job: Option<PathBuf>,
    /// Replace a setting of the job file, such as --set data.path=FILE
    #[arg(long = "set", value_name = "KEY=VALUE", conflicts_with = "program")]
    sets: Vec<String>,
    /// Any program, in this directory, and with the part of this environment that is known to hold no secrets
    #[arg(last = true, value_name = "PROGRAM")]
    program: Vec<OsString>,
    /// Ranks to start; without it the job's `devices`, else one
    #[arg(short = 'n', long = "ranks", alias = "nproc-per-node", value_name = "N")]
    ranks: Option<u32>,
    /// A name of your own for this submit, with which it can be repeated: the same job under the same name is submitted once
    #[arg(long, value_name = "NAME")]
    id: Option<String>,
    #[command(flatten)]
    env: EnvArgs,
    #[command(flatten)]
    wish: WishArgs,
    /// Show the job's progress and end as it ends
    #[arg(long)]
    wait: bool,
    #[command(flatten)]
    output: OutputArgs,
}

/// Where and when the job may run.
#[derive(clap::Args)]
pub struct WishArgs {
    /// Higher ones start first; among equals the older job
    #[arg(long, default_value_t = 0)]
    priority: i32,
    /// On exactly so many nodes, with as many ranks on each
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    nodes: Option<u32>,
    /// Slots that each rank takes
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    slots_per_rank: u32,
    /// Only on nodes with these labels, such as gpu=h200; several separated by commas
    #[arg(long, value_delimiter = ',', value_name = "NAME=VALUE", value_parser = label)]
    labels: Vec<(String, String)>,
    /// End the job after this long: 30m, 12h, 7d. Lets it go ahead of others where that delays nobody
    #[arg(long, value_parser = seconds)]
    max_time: Option<u64>,
    /// Wait for nodes to join if all that there are could never hold the job
    #[arg(long)]
    queue: bool,
}

impl WishArgs {
    fn wish(&self) -> Wish {
        Wish {
            priority: self.priority,
            nodes: self.nodes,
            slots_per_rank: self.slots_per_rank,
            labels: self.labels.iter().cloned().collect(),
            max_time_s: self.max_time,
            queue: self.queue,
        }
    }
}

fn label(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() && !value.is_empty() => {
            Ok((name.to_owned(), value.to_owned()))
        }
        _ => Err(format!("`{text}` is not a label; write it like gpu=h200")),
    }
}

pub fn run(args: Args, cluster: Target<'_>) -> Result<u8, Failure> {
    let started_unix_ms = places::unix_ms();
    let (world_size, work, nodes) = work(&args)?;
    let wish = Wish { nodes, ..args.wish.wish() };
    let mut client = connect(cluster)?;
    block_on(async {
        let submit_job = SubmitJob { world_size, work, wish };
        let job = match args.id {
            Some(name) => submitted(client.change(Request::SubmitOnce { name, job: submit_job }).await?)?,
            None => submit(&mut client, submit_job).await?,
        };
        if !args.wait {
            match args.output.json {
                true => out::json(&json!({"job": job.to_string(), "ranks": world_size})),
                false => out::line(&job.to_string()),
            }
            return Ok(exit::SUCCEEDED);
        }
        let style = match args.job {
            None if !args.output.json => Style::Program { ranks: world_size },
            _ => Style::of_training(args.output.json),
        };
        let mut report = Report::new(style, Some(started_unix_ms));
        report.submitted(&job.to_string(), world_size);
        follow(&mut client, job, &mut report).await
    })
}

/// What is to be done, by how many ranks, and on how many nodes if that is said.
fn work(args: &Args) -> Result<(u32, Work, Option<u32>), Failure> {
    let Some(path) = &args.job else {
        if args.program.is_empty() {
            return Err(no_work());
        }
        let work = work_of(&args.program, args.env.variables()?)?;
        return Ok((args.ranks.unwrap_or(1), work, args.wish.nodes));
    };
    if !args.env.is_empty() {
        return Err(Failure::input(
            "--env and --env-file are for programs; a training job has no environment of its own",
        ));
    }
    let mut job = load_job(path, &args.sets)?;
    let asked = Asked { ranks: args.ranks, nodes: args.wish.nodes };
    let (Shape { ranks, nodes }, warning) = job.settle_ranks(asked)?;
    if let Some(warning) = warning {
        out::note(&format!("warning: {warning}"));
    }
    Ok((ranks, Work::Train { job_json: job.to_json() }, Some(nodes)))
}

pub async fn submit(client: &mut Client, request: SubmitJob) -> Result<JobId, Failure> {
    submitted(client.change(Request::Submit(request)).await?)
}

fn submitted(reply: Reply) -> Result<JobId, Failure> {
    match reply {
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
