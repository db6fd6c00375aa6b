//! `fleet members`: everybody who is let in, and can be cut off.

use super::{OutputArgs, Target, connect};
use crate::client::{block_on, unexpected};
use crate::failure::Failure;
use crate::{out, places, text};
use fleet_common::exit;
use fleet_common::protocol::{MemberView, Reply, Request};
use serde_json::{Value, json};

/// List who is let in: users, nodes and coordinators, by the numbers that `fleet revoke` takes
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    output: OutputArgs,
}

pub fn run(args: Args, cluster: Target<'_>) -> Result<u8, Failure> {
    let mut client = connect(cluster)?;
    let members = match block_on(client.ask(Request::Members))? {
        Reply::Members(members) => members,
        other => return Err(unexpected(&other)),
    };
    if args.output.json {
        out::json(&members.iter().map(value).collect());
        return Ok(exit::SUCCEEDED);
    }
    let now = places::unix_ms();
    let rows: Vec<_> = members
        .iter()
        .map(|view| {
            let joined = view.joined_unix_ms.map(|at| format!("{} ago", text::age(now.saturating_sub(at))));
            vec![
                view.member.to_string(),
                json!(view.role).as_str().unwrap_or_default().to_owned(),
                view.name.clone(),
                joined.unwrap_or_else(|| "-".to_owned()),
            ]
        })
        .collect();
    out::table(&["MEMBER", "ROLE", "NAME", "JOINED"], &rows);
    Ok(exit::SUCCEEDED)
}

fn value(view: &MemberView) -> Value {
    json!({
        "member": view.member.to_string(), "role": view.role, "name": view.name,
        "joined_unix_ms": view.joined_unix_ms,
    })
}
