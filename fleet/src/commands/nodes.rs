//! `fleet nodes`: the machines of a cluster.

use super::{OutputArgs, connect};
use crate::client::{Client, block_on, unexpected};
use crate::failure::Failure;
use crate::{json, out, text};
use fleet_common::exit;
use fleet_common::protocol::{NodeView, Reply, Request};

/// List the cluster's machines
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    output: OutputArgs,
}

pub fn run(args: Args, cluster: Option<&str>) -> Result<u8, Failure> {
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
    let rows: Vec<_> = nodes
        .iter()
        .map(|node| {
            vec![
                node.node.to_string(),
                node.name.clone(),
                if node.connected { "connected" } else { "away" }.to_owned(),
                format!("{}/{}", node.slots_used, node.slots),
                node.device.clone(),
                node.heard_ms_ago.map_or("-".to_owned(), |ms| format!("{} ago", text::age(ms))),
                node.version.clone(),
            ]
        })
        .collect();
    out::table(&["NODE", "NAME", "STATE", "SLOTS", "DEVICE", "HEARD", "VERSION"], &rows);
}
