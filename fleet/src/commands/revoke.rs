//! `fleet revoke`: cuts a machine or a person off for ever.

use super::{OutputArgs, Target, connect, done};
use crate::client::block_on;
use crate::failure::Failure;
use fleet_common::exit;
use fleet_common::protocol::{Member, Request};
use serde_json::json;

/// Cut a node or a client off: its certificate opens nothing any more
#[derive(clap::Args)]
pub struct Args {
    /// Whom, such as node-3 or user-5
    member: Member,
    #[command(flatten)]
    output: OutputArgs,
}

pub fn run(args: Args, cluster: Target<'_>) -> Result<u8, Failure> {
    let mut client = connect(cluster)?;
    done(block_on(client.change(Request::Revoke(args.member)))?)?;
    let json = json!({"member": args.member.to_string(), "revoked": true});
    args.output.say(&json, &format!("{} is cut off", args.member));
    Ok(exit::SUCCEEDED)
}
