//! `fleet logs`: what a job's ranks wrote.

use super::{ClusterArgs, jobs};
use crate::client::{Flow, block_on};
use crate::failure::Failure;
use crate::{json, out};
use fleet_common::events::{Event, EventBody};
use fleet_common::exit;
use fleet_common::ids::{JobId, Rank};

/// Print what a job's ranks wrote
#[derive(clap::Args)]
pub struct Args {
    /// A job, such as job-1; without it the newest
    job: Option<JobId>,
    /// Only this rank's lines
    #[arg(long)]
    rank: Option<Rank>,
    /// Go on until the job ends
    #[arg(short, long)]
    follow: bool,
    /// All events, not only lines
    #[arg(long)]
    events: bool,
    #[command(flatten)]
    cluster: ClusterArgs,
}

pub fn run(args: Args) -> Result<u8, Failure> {
    let mut client = args.cluster.client()?;
    block_on(async {
        let job = match args.job {
            Some(job) => job,
            None => {
                let newest = jobs::list(&mut client).await?.into_iter().map(|job| job.job).max();
                newest.ok_or_else(|| Failure::input("the cluster has had no job yet"))?
            }
        };
        let print = |event: Event| {
            if let Some(text) = line(&event, &args) {
                out::line(&text);
            }
            if out::is_closed() { Flow::Stop } else { Flow::Continue }
        };
        client.watch(job, 1, args.follow, print).await?;
        Ok(exit::SUCCEEDED)
    })
}

fn line(event: &Event, args: &Args) -> Option<String> {
    let text = match &event.body {
        EventBody::Log { rank, level, line } => {
            if args.rank.is_some() && args.rank != *rank {
                return None;
            }
            let who = rank.map_or("node".to_owned(), |rank| format!("rank {rank}"));
            format!("[{who}] {}: {line}", json::level_name(*level))
        }
        _ if args.events && args.rank.is_none() => json::event(event).to_string(),
        _ => return None,
    };
    Some(if args.cluster.json { json::event(event).to_string() } else { text })
}
