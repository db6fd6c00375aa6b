//! `fleet coordinators`: the replicas of the control plane.

use super::{OutputArgs, Target, connect, done};
use crate::client::{Client, block_on, unexpected};
use crate::failure::Failure;
use crate::{json, out};
use fleet_common::exit;
use fleet_common::ids::ReplicaId;
use fleet_common::protocol::{CoordinatorView, Reply, Request};
use serde_json::json;

/// List the coordinators, or take one out
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(clap::Subcommand)]
enum Action {
    /// List them
    Ls {
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Take one out for ever; leadership moves away from it first
    Remove {
        /// Which one, such as replica-2
        id: ReplicaId,
        #[command(flatten)]
        output: OutputArgs,
    },
}

pub fn run(args: Args, cluster: Target<'_>) -> Result<u8, Failure> {
    let mut client = connect(cluster)?;
    match args.action {
        Action::Ls { output } => {
            let views = block_on(list(&mut client))?;
            match output.json {
                true => out::json(&views.iter().map(json::coordinator).collect()),
                false => print(&views),
            }
        }
        Action::Remove { id, output } => {
            done(block_on(client.change(Request::RemoveCoordinator(id)))?)?;
            let json = json!({"replica": id.to_string(), "removed": true});
            output.say(&json, &format!("{id} is taken out; set its data directory aside"));
        }
    }
    Ok(exit::SUCCEEDED)
}

pub async fn list(client: &mut Client) -> Result<Vec<CoordinatorView>, Failure> {
    match client.ask(Request::Coordinators).await? {
        Reply::Coordinators(views) => {
            client.learn(views.iter().map(|view| view.address.clone()).collect());
            Ok(views)
        }
        other => Err(unexpected(&other)),
    }
}

pub fn print(views: &[CoordinatorView]) {
    let rows: Vec<_> = views
        .iter()
        .map(|view| {
            vec![
                view.address.replica.to_string(),
                view.name.clone(),
                state(view),
                // nothing is known of one that this leader has not heard
                view.matched_index.filter(|at| *at > 0).map_or("-".to_owned(), |at| at.to_string()),
                view.address.client.clone(),
                view.address.member.clone(),
                view.version.clone(),
            ]
        })
        .collect();
    out::table(&["REPLICA", "NAME", "STATE", "LOG", "CLIENTS", "MEMBERS", "VERSION"], &rows);
    for alarm in views.iter().filter_map(|view| view.alarm.as_ref()) {
        out::line(&format!("alarm: {alarm}"));
    }
}

fn state(view: &CoordinatorView) -> String {
    let state = match (view.leads, view.alive, view.voter) {
        (true, _, _) => "leader",
        (_, Some(false), _) => "away",
        (_, _, true) => "follower",
        (_, _, false) => "learner",
    };
    let disk = if view.read_only == Some(true) { ", read-only" } else { "" };
    let alarm = if view.alarm.is_some() { ", alarm" } else { "" };
    format!("{state}{disk}{alarm}")
}
