//! `fleet cancel`: stops a job.

use super::{OutputArgs, Target, connect, done};
use crate::client::block_on;
use crate::failure::Failure;
use crate::out;
use fleet_common::exit;
use fleet_common::ids::JobId;
use fleet_common::protocol::Request;
use serde_json::json;

/// Stop a job after a checkpoint
#[derive(clap::Args)]
pub struct Args {
    /// A job, such as job-1
    job: JobId,
    /// At once, without a checkpoint
    #[arg(long)]
    now: bool,
    #[command(flatten)]
    output: OutputArgs,
}

pub fn run(args: Args, cluster: Target<'_>) -> Result<u8, Failure> {
    let mut client = connect(cluster)?;
    let reply = block_on(client.change(Request::Cancel { job: args.job, now: args.now }))?;
    done(reply)?;
    match args.output.json {
        true => out::json(&json!({"job": args.job.to_string(), "now": args.now, "accepted": true})),
        false => out::line(&format!("{} is being stopped", args.job)),
    }
    Ok(exit::SUCCEEDED)
}
