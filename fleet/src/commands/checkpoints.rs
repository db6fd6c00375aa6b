//! `fleet checkpoints`: the checkpoints that were recorded as valid.

use super::{OutputArgs, connect};
use crate::client::{block_on, unexpected};
use crate::failure::Failure;
use crate::{json, out, places, text};
use fleet_common::exit;
use fleet_common::ids::JobId;
use fleet_common::protocol::{Reply, Request};

/// List valid checkpoints
#[derive(clap::Args)]
pub struct Args {
    /// Only this job's
    job: Option<JobId>,
    #[command(flatten)]
    output: OutputArgs,
}

pub fn run(args: Args, cluster: Option<&str>) -> Result<u8, Failure> {
    let mut client = connect(cluster)?;
    let checkpoints = match block_on(client.ask(Request::Checkpoints { job: args.job }))? {
        Reply::Checkpoints(checkpoints) => checkpoints,
        other => return Err(unexpected(&other)),
    };
    if args.output.json {
        out::json(&checkpoints.iter().map(json::checkpoint).collect());
        return Ok(exit::SUCCEEDED);
    }
    let now = places::unix_ms();
    let rows: Vec<_> = checkpoints
        .iter()
        .map(|view| {
            vec![
                view.job.to_string(),
                view.run_name.clone(),
                view.checkpoint.step.to_string(),
                text::loss(Some(view.checkpoint.loss)),
                format!("{}B", text::short(view.checkpoint.bytes)),
                format!("{} ago", text::age(now.saturating_sub(view.unix_ms))),
                view.checkpoint.path.clone(),
            ]
        })
        .collect();
    out::table(&["JOB", "RUN", "STEP", "LOSS", "SIZE", "SAVED", "PATH"], &rows);
    Ok(exit::SUCCEEDED)
}
