//! `fleet plan`: what a job needs and how fast it will be, before it runs. `fleet-rank` measures it; this process becomes it.

use super::{JobArgs, load_job};
use crate::failure::Failure;
use crate::{out, programs};
use fleet_common::job::{Asked, Shape};
use fleet_common::link::{Latency, Rate};
use std::ffi::OsString;

/// Say what a job needs of memory and how fast it will be on CPUs such as this machine's, for each strategy and precision
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    job: JobArgs,
    /// Number of ranks; without it as `devices` says, else one
    #[arg(short = 'n', long = "ranks", value_name = "N")]
    ranks: Option<u32>,
    /// Spread the ranks evenly over so many nodes, which are all as this machine; without it as `num_nodes` says
    #[arg(long, value_name = "M", value_parser = clap::value_parser!(u32).range(1..))]
    nodes: Option<u32>,
    /// What goes from node to node; without it 10Gbit
    #[arg(long, value_name = "RATE")]
    link: Option<Rate>,
    /// How long it takes from node to node; without it 30us
    #[arg(long, value_name = "TIME")]
    latency: Option<Latency>,
    /// Show instead which algorithms the ranks choose for what they exchange, and what those cost
    #[arg(long)]
    costs: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> Result<u8, Failure> {
    let mut job = load_job(&args.job.job, &args.job.sets)?;
    let asked = Asked { ranks: args.ranks, nodes: args.nodes };
    let (Shape { ranks, nodes }, warning) = job.settle_ranks(asked)?;
    if let Some(warning) = warning {
        out::note(&format!("warning: {warning}"));
    }
    let text = |value: &dyn ToString| Some(OsString::from(value.to_string()));
    let options = vec![
        ("--job", text(&job.to_json())),
        ("--ranks", text(&ranks)),
        ("--nodes", text(&nodes)),
        ("--link", args.link.and_then(|link| text(&link))),
        ("--latency", args.latency.and_then(|latency| text(&latency))),
    ];
    let flags = [args.costs.then_some("--costs"), args.json.then_some("--json")];
    Err(programs::become_rank("plan", options, flags.into_iter().flatten()))
}
