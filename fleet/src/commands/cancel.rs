//! `fleet cancel`: stops a job.

use super::{OutputArgs, Target, connect, done, jobs, submit};
use crate::client::block_on;
use crate::failure::Failure;
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
    let Args { job, now, output } = args;
    let ended = block_on(async {
        done(client.change(Request::Cancel { job, now }).await?)?;
        // There is nothing to stop where it had ended.
        let view = match output.json {
            true => None,
            false => submit::job_view(&mut client, job).await.ok(),
        };
        Ok(view.filter(|view| view.state.is_final()))
    })?;
    let said = match ended {
        Some(view) => format!("{job} has ended: {}", jobs::state_name(view.state)),
        None => format!("{job} is being stopped"),
    };
    output.say(&json!({"job": job.to_string(), "now": now, "accepted": true}), &said);
    Ok(exit::SUCCEEDED)
}
