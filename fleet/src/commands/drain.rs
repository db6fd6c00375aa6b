//! `fleet drain` and `fleet undrain`: a node gets no more work, and gets some again.

use super::{OutputArgs, Target, connect, done, nodes};
use crate::client::block_on;
use crate::failure::Failure;
use fleet_common::exit;
use fleet_common::protocol::Request;
use serde_json::json;

/// Give a node no more work; its jobs run on
#[derive(clap::Args)]
pub struct Args {
    /// A node, by its number or name
    node: String,
    /// Have its jobs save a checkpoint and go back to the queue
    #[arg(long)]
    now: bool,
    #[command(flatten)]
    output: OutputArgs,
}

/// Let a drained node have work again
#[derive(clap::Args)]
pub struct UndrainArgs {
    /// A node, by its number or name
    node: String,
    #[command(flatten)]
    output: OutputArgs,
}

pub fn run(args: Args, cluster: Target<'_>) -> Result<u8, Failure> {
    let mut client = connect(cluster)?;
    block_on(async {
        let node = nodes::find(&mut client, &args.node).await?;
        done(client.change(Request::Drain { node, now: args.now }).await?)?;
        let jobs = if args.now { "its jobs go back to the queue" } else { "its jobs run on" };
        let json = json!({"node": node.to_string(), "drained": true, "now": args.now});
        args.output.say(&json, &format!("{node} gets no more work; {jobs}"));
        Ok(exit::SUCCEEDED)
    })
}

pub fn undo(args: UndrainArgs, cluster: Target<'_>) -> Result<u8, Failure> {
    let mut client = connect(cluster)?;
    block_on(async {
        let node = nodes::find(&mut client, &args.node).await?;
        done(client.change(Request::Undrain(node)).await?)?;
        let json = json!({"node": node.to_string(), "drained": false});
        args.output.say(&json, &format!("{node} may have work again"));
        Ok(exit::SUCCEEDED)
    })
}
