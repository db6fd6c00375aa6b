//! How far the cluster is, asked by whoever looks at one coordinator's directory from outside: is that one behind?

use super::setup;
use fleet_common::codec::{read_frame, write_frame};
use fleet_common::net::{self, Identity};
use fleet_common::protocol::{ClientFrame, Reply, Request};
use std::path::Path;
use std::time::Duration;
use tokio::time::timeout;

/// For one coordinator to answer.
const PATIENCE: Duration = Duration::from_secs(3);

/// The last entry that the cluster has committed, as its leader says; or why nobody says it.
pub async fn committed(data_dir: &Path) -> Result<u64, String> {
    let login = Identity::load(&data_dir.join("client")).map_err(|error| error.to_string())?;
    let login = login.ok_or("this directory has no login for `fleet` yet")?;
    let here = setup::last_endpoint(data_dir).map(|endpoint| endpoint.quic);
    let known = setup::load_coordinators(data_dir).map_err(|error| format!("{error:#}"))?;
    // The others first: this one may be the one that is behind.
    let others =
        known.into_iter().map(|address| address.client).filter(|address| Some(address) != here.as_ref());
    let mut why = Vec::new();
    for address in others.collect::<Vec<_>>().into_iter().chain(here.clone()) {
        match timeout(PATIENCE, ask(&address, &login)).await {
            Ok(Ok(committed)) => return Ok(committed),
            Ok(Err(error)) => why.push(format!("{address}: {error}")),
            Err(_) => why.push(format!("{address} does not answer")),
        }
    }
    match why.is_empty() {
        true => Err("no coordinator's address is known here".to_owned()),
        false => Err(why.join("; ")),
    }
}

async fn ask(address: &String, login: &Identity) -> Result<u64, String> {
    let connection = net::connect(std::slice::from_ref(address), login).await.map_err(|e| e.to_string())?;
    let (mut send, mut receive) = connection.open_bi().await.map_err(|error| error.to_string())?;
    let question = ClientFrame::query(Request::ClusterStatus);
    write_frame(&mut send, &question).await.map_err(|error| error.to_string())?;
    match read_frame(&mut receive).await.map_err(|error| error.to_string())? {
        Some(Reply::Cluster(view)) => Ok(view.commit_index),
        Some(Reply::Refused(refusal)) => Err(refusal.message),
        _ => Err("it gave an answer that does not fit".to_owned()),
    }
}
