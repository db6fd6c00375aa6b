//! `fleet checkpoints`: the checkpoints that were recorded as valid.

use super::{OutputArgs, Target, connect};
use crate::client::{Client, block_on, unexpected};
use crate::failure::Failure;
use crate::{json, out, places, text};
use fleet_common::exit;
use fleet_common::ids::JobId;
use fleet_common::protocol::{CheckpointView, Files, Page, Reply, Request};
use std::collections::BTreeSet;

/// List valid checkpoints, or show one with its files
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(clap::Subcommand)]
enum Action {
    /// List them, of the newest jobs first
    Ls {
        /// Only this job's
        job: Option<JobId>,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Show one with its files and their hashes
    Show {
        job: JobId,
        step: u64,
        #[command(flatten)]
        output: OutputArgs,
    },
}

pub fn run(args: Args, cluster: Target<'_>) -> Result<u8, Failure> {
    let mut client = connect(cluster)?;
    match args.action {
        Action::Ls { job, output } => {
            let checkpoints = block_on(list(&mut client, job))?;
            match output.json {
                true => out::json(&checkpoints.iter().map(json::checkpoint).collect()),
                false => print(&checkpoints),
            }
        }
        Action::Show { job, step, output } => {
            let view = match block_on(client.ask(Request::Checkpoint { job, step }))? {
                Reply::Checkpoint(view) => *view,
                other => return Err(unexpected(&other)),
            };
            match output.json {
                true => out::json(&json::checkpoint(&view)),
                false => print_one(&view),
            }
        }
    }
    Ok(exit::SUCCEEDED)
}

pub async fn list(client: &mut Client, job: Option<JobId>) -> Result<Vec<CheckpointView>, Failure> {
    let (mut all, mut page) = (Vec::new(), Page::default());
    loop {
        match client.ask(Request::Checkpoints { job, page }).await? {
            Reply::Checkpoints(listing) => {
                all.extend(listing.items);
                match listing.next {
                    Some(_) => page.before = listing.next,
                    None => return Ok(all),
                }
            }
            other => return Err(unexpected(&other)),
        }
    }
}

fn print(checkpoints: &[CheckpointView]) {
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
                nodes_with(view, |_| true),
                view.checkpoint.path.clone(),
            ]
        })
        .collect();
    out::table(&["JOB", "RUN", "STEP", "LOSS", "SIZE", "SAVED", "NODES", "PATH"], &rows);
}

/// On whose disks files lie of which this holds.
fn nodes_with(view: &CheckpointView, has: impl Fn(Files) -> bool) -> String {
    let names = view.places.iter().filter(|place| has(place.files)).map(|place| place.name.as_str());
    let names: BTreeSet<&str> = names.collect();
    let names: Vec<&str> = names.into_iter().collect();
    if names.is_empty() { "-".to_owned() } else { names.join(",") }
}

fn print_one(view: &CheckpointView) {
    print(std::slice::from_ref(view));
    out::line(&format!("sha256 of the manifest: {}", view.checkpoint.manifest_sha256));
    let rows: Vec<_> = view
        .checkpoint
        .shards
        .iter()
        .map(|shard| {
            vec![
                shard.name.clone(),
                shard.writer.to_string(),
                nodes_with(view, |files| files.has(shard.writer)),
                format!("{}B", text::short(shard.bytes)),
                shard.sha256.clone(),
            ]
        })
        .collect();
    out::table(&["FILE", "RANK", "NODES", "SIZE", "SHA256"], &rows);
}
