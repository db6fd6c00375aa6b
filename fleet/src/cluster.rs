//! Which cluster a command talks to, and as whom.

use crate::failure::Failure;
use crate::places;
use fleet_common::endpoint::Endpoint;
use fleet_common::net::Identity;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// A cluster that can be talked to.
#[derive(Clone, Debug)]
pub struct Cluster {
    addresses: Addresses,
    /// Holds the client's identity and the numbers of its changes.
    pub client_dir: PathBuf,
}

#[derive(Clone, Debug)]
enum Addresses {
    /// Where a coordinator on this machine listens is read anew for every attempt: it may have been restarted.
    DataDir(PathBuf),
    Fixed(Vec<String>),
}

/// `cluster.json` beside the identity that `fleet login` stored.
#[derive(Debug, Serialize, Deserialize)]
pub struct Login {
    pub addresses: Vec<String>,
}

impl Cluster {
    /// `wish` is `--cluster` or FLEET_CLUSTER: a data directory, HOST:PORT, or the name of a login or a local launch. Without it the newest
    /// local launch.
    pub fn find(wish: Option<&str>) -> Result<Cluster, Failure> {
        let Some(wish) = wish else {
            let newest = places::running().into_iter().next();
            return newest.map(|launch| Cluster::in_data_dir(&launch.data_dir)).ok_or_else(|| {
                Failure::unreachable(
                    "no `fleet launch` runs on this machine; start one, or name a cluster with --cluster (a data directory, HOST:PORT or a name)",
                )
            });
        };
        if wish.contains('/') || Path::new(wish).is_dir() {
            return Ok(Cluster::in_data_dir(Path::new(wish)));
        }
        if let Some(launch) = places::running().into_iter().find(|launch| launch.name == wish) {
            return Ok(Cluster::in_data_dir(&launch.data_dir));
        }
        if let Some(cluster) = logins()
            .into_iter()
            .find(|(name, login)| name == wish || login.addresses.iter().any(|a| a == wish))
        {
            return Ok(Cluster {
                addresses: Addresses::Fixed(cluster.1.addresses),
                client_dir: places::login_dir(&cluster.0),
            });
        }
        let local = places::running().into_iter().find(|launch| {
            Endpoint::load(&launch.data_dir).ok().flatten().is_some_and(|endpoint| endpoint.quic == wish)
        });
        if let Some(launch) = local {
            return Ok(Cluster::in_data_dir(&launch.data_dir));
        }
        Err(Failure::input(if wish.contains(':') {
            format!(
                "no credential for {wish}; make a token there with `fleet token create --role client` and run `fleet login {wish} --token-file FILE`"
            )
        } else {
            format!(
                "no cluster `{wish}` is known; give a coordinator's data directory, HOST:PORT, or a name given to `fleet login`"
            )
        }))
    }

    /// The cluster of the coordinator that has this data directory.
    pub fn in_data_dir(dir: &Path) -> Cluster {
        Cluster { addresses: Addresses::DataDir(dir.to_owned()), client_dir: dir.join("client") }
    }

    pub fn addresses(&self) -> Result<Vec<String>, Failure> {
        match &self.addresses {
            Addresses::Fixed(addresses) => Ok(addresses.clone()),
            Addresses::DataDir(dir) => {
                match Endpoint::load(dir).map_err(|e| Failure::unreachable(e.to_string()))? {
                    Some(endpoint) => Ok(vec![endpoint.quic]),
                    None => Err(Failure::unreachable(format!(
                        "{} has no endpoint.json: no coordinator has listened there; start one with `coordinator start --data-dir {}`",
                        dir.display(),
                        dir.display()
                    ))),
                }
            }
        }
    }

    pub fn identity(&self) -> Result<Identity, Failure> {
        Identity::load(&self.client_dir)?.ok_or_else(|| {
            Failure::unreachable(format!(
                "{} has no client credential; has its coordinator started?",
                self.client_dir.display()
            ))
        })
    }
}

fn logins() -> Vec<(String, Login)> {
    let entries = std::fs::read_dir(places::state_dir().join("clusters")).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| {
            let login =
                serde_json::from_slice(&std::fs::read(entry.path().join("cluster.json")).ok()?).ok()?;
            Some((entry.file_name().into_string().ok()?, login))
        })
        .collect()
}
