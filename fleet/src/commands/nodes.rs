//! `fleet nodes`: the machines of a cluster.

use super::{OutputArgs, Target, connect};
use crate::client::{Client, block_on, unexpected};
use crate::failure::Failure;
use crate::{json, out, text};
use fleet_common::exit;
use fleet_common::ids::NodeId;
use fleet_common::protocol::{NodeView, Reply, Request};

/// List the cluster's machines
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    output: OutputArgs,
}

pub fn run(args: Args, cluster: Target<'_>) -> Result<u8, Failure> {
    let mut client = connect(cluster)?;
    let nodes = block_on(list(&mut client))?;
    match args.output.json {
        true => out::json(&nodes.iter().map(json::node_view).collect()),
        false => print(&nodes),
    }
    Ok(exit::SUCCEEDED)
}

pub async fn list(client: &mut Client) -> Result<Vec<NodeView>, Failure> {
    match client.ask(Request::Nodes).await? {
        Reply::Nodes(nodes) => Ok(nodes),
        other => Err(unexpected(&other)),
    }
}

pub fn print(nodes: &[NodeView]) {
    lines(nodes).iter().for_each(|line| out::line(line));
}

pub fn lines(nodes: &[NodeView]) -> Vec<String> {
    let rows: Vec<_> = nodes
        .iter()
        .map(|node| {
            vec![
                node.node.to_string(),
                node.name.clone(),
                state(node),
                format!("{}/{}", node.slots_used, node.slots),
                node.device.clone(),
                node.heard_ms_ago.map_or("-".to_owned(), |ms| format!("{} ago", text::age(ms))),
                labels(node),
                node.version.clone(),
            ]
        })
        .collect();
    out::columns(&["NODE", "NAME", "STATE", "SLOTS", "DEVICE", "HEARD", "LABELS", "VERSION"], &rows)
}

fn state(node: &NodeView) -> String {
    let state = match (node.connected, node.lost) {
        (true, _) => "connected",
        (false, true) => "lost",
        (false, false) => "away",
    };
    if node.drained { format!("{state}, drained") } else { state.to_owned() }
}

fn labels(node: &NodeView) -> String {
    let labels: Vec<String> = node.labels.iter().map(|(name, value)| format!("{name}={value}")).collect();
    if labels.is_empty() { "-".to_owned() } else { labels.join(",") }
}

/// The node of this number or name.
pub async fn find(client: &mut Client, wish: &str) -> Result<NodeId, Failure> {
    let nodes = list(client).await?;
    let mut named = nodes.iter().filter(|node| node.name == wish || node.node.to_string() == wish);
    match (named.next(), named.next()) {
        (Some(node), None) => Ok(node.node),
        (Some(_), Some(_)) => {
            Err(Failure::input(format!("several nodes are called {wish}; use a number from `fleet nodes`")))
        }
        (None, _) => wish
            .parse()
            .map_err(|_| Failure::input(format!("there is no node {wish}; `fleet nodes` lists them"))),
    }
}
