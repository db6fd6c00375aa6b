//! `fleet config`: the job as fleet understands it, with every default. What it prints is a job file.

use super::{JobArgs, load_job};
use crate::failure::Failure;
use crate::out;
use fleet_common::exit;

/// Print a job as fleet understands it, with every default
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    job: JobArgs,
    /// Print JSON instead of TOML
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> Result<u8, Failure> {
    let job = load_job(&args.job.job, &args.job.sets)?;
    match args.json {
        true => out::json(&job.to_file().into()),
        false => out::lines(job.to_toml().trim_end()),
    }
    Ok(exit::SUCCEEDED)
}
