//! `fleet plan`: what a job needs and how fast it will be, before it runs. `fleet-rank` measures it; this process becomes it.

use super::{JobArgs, load_job};
use crate::failure::Failure;
use crate::{out, programs};
use fleet_common::job::{Asked, Shape};

/// Say what a job needs of this machine's CPU and memory, and how fast it will be, for each strategy and precision
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    job: JobArgs,
    /// Number of ranks; without it as `devices` says, else one
    #[arg(short = 'n', long = "ranks", value_name = "N")]
    ranks: Option<u32>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> Result<u8, Failure> {
    let mut job = load_job(&args.job.job, &args.job.sets)?;
    let (Shape { ranks, nodes }, warning) = job.settle_ranks(Asked { ranks: args.ranks, nodes: None })?;
    if let Some(warning) = warning {
        out::note(&format!("warning: {warning}"));
    }
    if nodes > 1 {
        out::note(&format!(
            "note: this is of {} ranks on one of the job's {nodes} nodes, without what goes between them",
            ranks / nodes
        ));
    }
    let ranks = ranks / nodes;
    let options = vec![("--job", Some(job.to_json().into())), ("--ranks", Some(ranks.to_string().into()))];
    Err(programs::become_rank("plan", options, args.json))
}
