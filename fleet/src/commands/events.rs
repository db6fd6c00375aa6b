//! `fleet events`: what the planner decided, and why.

use super::{OutputArgs, Target, connect, pages, say_what_was_removed};
use crate::client::block_on;
use crate::failure::Failure;
use crate::{out, places, text};
use fleet_common::exit;
use fleet_common::protocol::{Reply, Request};
use serde_json::{Value, json};

/// Show what the planner decided and why
#[derive(clap::Args)]
pub struct Args {
    /// How many of the newest
    #[arg(short = 'n', long, default_value_t = 50)]
    lines: usize,
    #[command(flatten)]
    output: OutputArgs,
}

pub fn run(args: Args, cluster: Target<'_>) -> Result<u8, Failure> {
    let mut client = connect(cluster)?;
    let mut decisions = block_on(pages(&mut client, args.lines, Request::Decisions, |reply| match reply {
        Reply::Decisions(listing) => Ok(listing),
        other => Err(other),
    }))?;
    decisions.reverse();
    if args.output.json {
        out::json(&decisions.iter().map(|decision| json!(decision)).collect::<Value>());
        return Ok(exit::SUCCEEDED);
    }
    let now = places::unix_ms();
    for decision in &decisions {
        let age = text::age(now.saturating_sub(decision.unix_ms));
        out::line(&format!("{age:>8} ago  {}", decision.why));
    }
    if decisions.len() < args.lines {
        block_on(async {
            say_what_was_removed(&mut client).await;
            Ok(())
        })?;
    }
    Ok(exit::SUCCEEDED)
}
