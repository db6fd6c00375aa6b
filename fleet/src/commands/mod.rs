//! One command per file, and what they share.

pub mod adapter;
pub mod cancel;
pub mod checkpoint;
pub mod checkpoints;
pub mod config;
pub mod coordinators;
pub mod dashboard;
pub mod drain;
pub mod eval;
pub mod events;
pub mod exports;
pub mod fields;
pub mod generate;
pub mod jobs;
pub mod local_runs;
pub mod login;
pub mod logits;
pub mod logs;
pub mod members;
pub mod nodes;
pub mod plan;
pub mod plot;
pub mod profiles;
pub mod quantise;
pub mod report;
pub mod retention;
pub mod revoke;
pub mod runs;
pub mod secrets;
pub mod serve;
pub mod status;
pub mod submit;
pub mod token;
pub mod top;
pub mod web;

use crate::client::{Client, block_on, unexpected};
use crate::cluster::Cluster;
use crate::failure::Failure;
use crate::{meant, out, places, text};
use fleet_common::job::Job;
use fleet_common::protocol::{Listing, PAGE_MAX, Page, Reply, Request};
use serde_json::Value;
use std::path::{Path, PathBuf};

/// Which cluster is asked, and how.
#[derive(Clone, Copy)]
pub struct Target<'a> {
    pub name: Option<&'a str>,
    /// What one coordinator has will do.
    pub stale: bool,
}

/// How the answer is printed.
#[derive(clap::Args)]
pub struct OutputArgs {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

impl OutputArgs {
    /// One answer, as it was wished for.
    pub fn say(&self, json: &Value, text: &str) {
        match self.json {
            true => out::json(json),
            false => out::line(text),
        }
    }
}

/// The change was made.
pub fn done(reply: Reply) -> Result<(), Failure> {
    match reply {
        Reply::Done => Ok(()),
        other => Err(unexpected(&other)),
    }
}

/// How much of a long list to print, newest first.
#[derive(clap::Args)]
pub struct ListArgs {
    /// How many
    #[arg(short = 'n', long, default_value_t = 50)]
    lines: usize,
    #[command(flatten)]
    output: OutputArgs,
}

/// The newest `count` items of a list that comes in pages.
pub async fn pages<T>(
    client: &mut Client,
    count: usize,
    ask: impl Fn(Page) -> Request,
    take: impl Fn(Reply) -> Result<Listing<T>, Reply>,
) -> Result<Vec<T>, Failure> {
    let (mut items, mut before) = (Vec::new(), None);
    while items.len() < count {
        let max = u32::try_from(count - items.len()).unwrap_or(PAGE_MAX).min(PAGE_MAX);
        let listing =
            take(client.ask(ask(Page { before, max })).await?).map_err(|other| unexpected(&other))?;
        items.extend(listing.items);
        before = listing.next;
        if before.is_none() {
            break;
        }
    }
    Ok(items)
}

/// The end of a list was shown: says so on stderr where there was more once.
pub async fn say_what_was_removed(client: &mut Client) {
    if let Ok(Reply::Retention(view)) = client.ask(Request::Retention).await
        && let Some(at) = view.removed_unix_ms
    {
        let age = text::age(places::unix_ms().saturating_sub(at));
        out::note(&format!(
            "what ended {age} ago or before was removed; `fleet retention` says how much is kept"
        ));
    }
}

/// Prints the newest items of such a list.
pub fn list<T>(
    client: &mut Client,
    args: &ListArgs,
    ask: impl Fn(Page) -> Request,
    take: impl Fn(Reply) -> Result<Listing<T>, Reply>,
    json: impl Fn(&T) -> Value,
    print: impl Fn(&[T]),
) -> Result<(), Failure> {
    let items = block_on(pages(client, args.lines, ask, take))?;
    match args.output.json {
        true => out::json(&items.iter().map(json).collect()),
        false => {
            print(&items);
            if items.len() < args.lines {
                block_on(async {
                    say_what_was_removed(client).await;
                    Ok(())
                })?;
            }
        }
    }
    Ok(())
}

/// A client of the wished cluster, or of the newest local launch. Talks to nobody yet.
pub fn connect(cluster: Target<'_>) -> Result<Client, Failure> {
    Ok(Client::new(Cluster::find(cluster.name)?).stale(cluster.stale))
}

/// A job file and what is laid over it.
#[derive(clap::Args)]
pub struct JobArgs {
    /// Job file: .toml, .yaml or .json
    pub job: PathBuf,
    /// Replace a setting of the job file, such as --set data.path=FILE
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub sets: Vec<String>,
}

/// Reads a job in the current directory and prints its warnings.
pub fn load_job(path: &Path, sets: &[String]) -> Result<Job, Failure> {
    let here = std::env::current_dir()
        .map_err(|e| Failure::environment(format!("the current directory cannot be used: {e}")))?;
    let (job, warnings) = meant::load_job(path, sets, &here)?;
    for warning in warnings {
        out::note(&format!("warning: {warning}"));
    }
    Ok(job)
}
