//! `fleet jobs`: the jobs of a cluster.

use super::{OutputArgs, Target, connect, pages, say_what_was_removed};
use crate::client::{Client, block_on, unexpected};
use crate::failure::Failure;
use crate::{json, out, places, text};
use fleet_common::exit;
use fleet_common::protocol::{JobState, JobView, Reply, Request};

/// List the cluster's jobs
#[derive(clap::Args)]
pub struct Args {
    /// All there ever were, and not only the unfinished and the newest
    #[arg(long)]
    all: bool,
    #[command(flatten)]
    output: OutputArgs,
}

pub fn run(args: Args, cluster: Target<'_>) -> Result<u8, Failure> {
    let mut client = connect(cluster)?;
    let jobs = match args.all {
        true => block_on(everything(&mut client))?,
        false => block_on(list(&mut client))?,
    };
    match args.output.json {
        true => out::json(&jobs.iter().map(json::job).collect()),
        false => {
            print(&jobs);
            if args.all {
                block_on(async {
                    say_what_was_removed(&mut client).await;
                    Ok(())
                })?;
            }
        }
    }
    Ok(exit::SUCCEEDED)
}

pub async fn list(client: &mut Client) -> Result<Vec<JobView>, Failure> {
    match client.ask(Request::Jobs { all: None }).await? {
        Reply::Jobs(jobs) => Ok(jobs.items),
        other => Err(unexpected(&other)),
    }
}

/// Oldest first.
async fn everything(client: &mut Client) -> Result<Vec<JobView>, Failure> {
    let ask = |page| Request::Jobs { all: Some(page) };
    let mut jobs = pages(client, usize::MAX, ask, |reply| match reply {
        Reply::Jobs(listing) => Ok(listing),
        other => Err(other),
    })
    .await?;
    jobs.reverse();
    Ok(jobs)
}

pub fn print(jobs: &[JobView]) {
    let rows: Vec<_> = jobs
        .iter()
        .map(|job| {
            let of = if job.total_steps > 0 { format!("/{}", job.total_steps) } else { String::new() };
            vec![
                job.job.to_string(),
                job.name.clone(),
                state_name(job.state).to_owned(),
                job.world_size.to_string(),
                format!("{}{of}", job.step),
                text::loss(job.loss),
                text::loss(job.eval_loss),
                stall(job).unwrap_or_else(|| job.reason.clone()),
            ]
        })
        .collect();
    out::table(&["JOB", "NAME", "STATE", "RANKS", "STEP", "LOSS", "EVAL", "WHY"], &rows);
}

/// For whom a job waits that stands still.
pub fn stall(job: &JobView) -> Option<String> {
    let stall = job.stall.as_ref()?;
    let seconds = places::unix_ms().saturating_sub(stall.since_unix_ms) / 1_000;
    Some(format!("held up for {}: {}", text::clock(seconds), stall.what))
}

pub fn state_name(state: JobState) -> &'static str {
    match state {
        JobState::Queued => "queued",
        JobState::Starting => "starting",
        JobState::Running => "running",
        JobState::Stopping => "stopping",
        JobState::Succeeded => "succeeded",
        JobState::Failed => "failed",
        JobState::Cancelled => "cancelled",
    }
}
