//! `fleet logs`: what happened in a job: the ranks' lines, steps, evaluations, checkpoints.

use super::{OutputArgs, Target, connect, jobs};
use crate::client::{Flow, block_on};
use crate::failure::Failure;
use crate::out;
use crate::report::{Report, Style};
use fleet_common::events::{Event, EventBody};
use fleet_common::exit;
use fleet_common::ids::{JobId, Rank};

/// Print what happened in a job: the ranks' lines, steps, evaluations, checkpoints
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
    #[command(flatten)]
    output: OutputArgs,
}

pub fn run(args: Args, cluster: Target<'_>) -> Result<u8, Failure> {
    let mut client = connect(cluster)?;
    block_on(async {
        let job = match args.job {
            Some(job) => job,
            None => {
                let newest = jobs::list(&mut client).await?.into_iter().map(|job| job.job).max();
                newest.ok_or_else(|| Failure::input("the cluster has had no job yet"))?
            }
        };
        let style = if args.output.json { Style::Json } else { Style::Lines };
        let mut report = Report::new(style, None);
        let print = |event: Event| {
            if args.rank.is_none_or(|rank| is_of(&event, rank)) {
                report.event(&event);
            }
            std::future::ready(if out::is_closed() { Flow::Stop } else { Flow::Continue })
        };
        client.watch(job, 1, args.follow, print).await?;
        Ok(exit::SUCCEEDED)
    })
}

fn is_of(event: &Event, wanted: Rank) -> bool {
    matches!(&event.body, EventBody::Log { rank: Some(rank), .. } if *rank == wanted)
}
