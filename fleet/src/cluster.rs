//! Which cluster a command talks to, and as whom.

use crate::failure::Failure;
use crate::places;
use fleet_common::endpoint::Endpoint;
use fleet_common::files;
use fleet_common::ids::ReplicaId;
use fleet_common::net::{Identity, IdentityError, NetError};
use fleet_common::protocol::CoordinatorAddress;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::time::Duration;

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
    /// A login, whose directory says it.
    Login(PathBuf, Login),
}

/// `cluster.json` beside the identity that `fleet login` stored.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Login {
    /// Of all coordinators, for clients.
    pub addresses: Vec<String>,
}

impl Login {
    pub fn store(&self, dir: &Path) -> Result<(), Failure> {
        let file = dir.join(LOGIN);
        let text = serde_json::to_string_pretty(self).map_err(|e| Failure::environment(e.to_string()))?;
        files::write_atomic(&file, text.as_bytes()).map_err(|e| Failure::io("write", &file, &e))
    }
}

const LOGIN: &str = "cluster.json";
/// Who is asked for what may be the only one that is known, and gone soon.
const ASK_AGAIN_AFTER: Duration = Duration::from_secs(30);

impl Cluster {
    /// `wish` is `--cluster` or FLEET_CLUSTER: a data directory, HOST:PORT, or the name of a login or a local launch. Without it the newest
    /// local launch. What has a slash is a directory; a name without one is a directory only if nothing else is called so, since anybody
    /// could make one where somebody else stands.
    pub fn find(wish: Option<&str>) -> Result<Cluster, Failure> {
        let Some(wish) = wish else {
            let newest = places::running()?.into_iter().next();
            let known: Vec<String> = logins()?.into_iter().map(|(name, _)| name).collect();
            return newest
                .map(|launch| Cluster::in_data_dir(&launch.data_dir))
                .ok_or_else(|| Failure::unreachable(nowhere(known)));
        };
        if wish.contains('/') || [".", ".."].contains(&wish) {
            return Ok(Cluster::in_data_dir(Path::new(wish)));
        }
        if let Some((name, login)) = logins()?
            .into_iter()
            .find(|(name, login)| name == wish || login.addresses.iter().any(|a| a == wish))
        {
            let dir = places::logins_dir()?.join(&name);
            return Ok(Cluster { addresses: Addresses::Login(dir.clone(), login), client_dir: dir });
        }
        if let Some(launch) = places::running()?.into_iter().find(|launch| launch.name == wish) {
            return Ok(Cluster::in_data_dir(&launch.data_dir));
        }
        let local = places::running()?.into_iter().find(|launch| {
            Endpoint::load(&launch.data_dir).ok().flatten().is_some_and(|endpoint| endpoint.quic == wish)
        });
        if let Some(launch) = local {
            return Ok(Cluster::in_data_dir(&launch.data_dir));
        }
        if Path::new(wish).is_dir() {
            return Ok(Cluster::in_data_dir(Path::new(wish)));
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
            Addresses::Login(_, login) => Ok(login.addresses.clone()),
            Addresses::DataDir(dir) => {
                match Endpoint::load(dir).map_err(|e| Failure::unreachable(e.to_string()))? {
                    // The one on this machine first.
                    Some(Endpoint { quic, coordinators, .. }) => {
                        let others = coordinators.into_iter().filter(|other| *other != quic);
                        Ok(std::iter::once(quic.clone()).chain(others).collect())
                    }
                    None => Err(Failure::unreachable(format!(
                        "{} has no endpoint.json: no coordinator has listened there; start one with `coordinator start --data-dir {}`",
                        dir.display(),
                        dir.display()
                    ))),
                }
            }
        }
    }

    /// Of a coordinator on this machine.
    pub fn data_dir(&self) -> Option<&Path> {
        match &self.addresses {
            Addresses::DataDir(dir) => Some(dir),
            Addresses::Login(..) => None,
        }
    }

    pub fn has_several(&self) -> bool {
        self.addresses().is_ok_and(|addresses| addresses.len() > 1)
    }

    /// Whether what is known of a cluster elsewhere is so old that it should be asked for.
    pub fn wants_addresses(&self) -> bool {
        let Addresses::Login(dir, _) = &self.addresses else { return false };
        let age =
            dir.join(LOGIN).metadata().and_then(|file| file.modified()).ok().and_then(|at| at.elapsed().ok());
        age.is_none_or(|age| age > ASK_AGAIN_AFTER)
    }

    /// Keeps where the coordinators are. What cannot be kept is asked for again.
    pub fn learn(&mut self, known: Vec<CoordinatorAddress>) {
        if let Addresses::Login(dir, login) = &mut self.addresses
            && !known.is_empty()
        {
            login.addresses = known.into_iter().map(|address| address.client).collect();
            let _ = login.store(dir);
        }
    }

    /// What to do where another cluster answers.
    pub fn with_the_way_out(&self, error: NetError) -> Failure {
        let NetError::OtherCluster(what) = error else { return error.into() };
        let cure = match &self.addresses {
            Addresses::Login(dir, login) => format!(
                "if the cluster was made anew, log in again: `fleet login {} --name {} --token-file FILE`",
                login.addresses.first().map_or("HOST:PORT", String::as_str),
                dir.file_name().unwrap_or_default().display()
            ),
            Addresses::DataDir(dir) => format!(
                "the coordinator of {dir} does not listen there any more; start it with `coordinator start --data-dir {dir}`",
                dir = dir.display()
            ),
        };
        Failure::input(format!("{what}; {cure}"))
    }

    pub fn identity(&self) -> Result<Identity, NoIdentity> {
        match Identity::load(&self.client_dir) {
            Ok(Some(identity)) => Ok(identity),
            Ok(None) => Err(NoIdentity::Other(Failure::unreachable(format!(
                "{} has no client credential; has its coordinator started?",
                self.client_dir.display()
            )))),
            Err(error) => Err(match &error {
                IdentityError::DamagedCa { fingerprint: Some(fingerprint), .. } => {
                    NoIdentity::DamagedCa { fingerprint: fingerprint.clone(), failure: error.into() }
                }
                _ => NoIdentity::Other(error.into()),
            }),
        }
    }
}

/// Why a client's identity cannot be used.
pub enum NoIdentity {
    /// The file of CAs, which a coordinator can show again.
    DamagedCa {
        fingerprint: String,
        failure: Failure,
    },
    Other(Failure),
}

impl From<NoIdentity> for Failure {
    fn from(none: NoIdentity) -> Failure {
        match none {
            NoIdentity::DamagedCa { failure, .. } | NoIdentity::Other(failure) => failure,
        }
    }
}

/// The process of a replica that runs on this machine, if it is one of those of this data directory.
pub fn local_pid(dir: &Path, cluster_id: &str, replica: ReplicaId) -> Option<u32> {
    let below = std::fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut endpoints =
        std::iter::once(dir.to_owned()).chain(below).filter_map(|dir| Endpoint::load(&dir).ok()?);
    let endpoint =
        endpoints.find(|endpoint| endpoint.cluster_id == cluster_id && endpoint.replica == replica)?;
    endpoint.running()
}

/// Nobody has said which cluster, and no local launch runs.
fn nowhere(mut logins: Vec<String>) -> String {
    logins.sort();
    let named = match logins.is_empty() {
        true => "a coordinator's data directory, or the name of a `fleet login`".to_owned(),
        false => format!("{}, or a coordinator's data directory", logins.join(", ")),
    };
    format!("no `fleet launch` runs on this machine; name a cluster with --cluster or FLEET_CLUSTER: {named}")
}

/// All that `fleet login` stored, by their names.
pub fn logins() -> Result<Vec<(String, Login)>, Failure> {
    let entries = std::fs::read_dir(places::logins_dir()?).into_iter().flatten().flatten();
    let logins = entries.filter_map(|entry| {
        let login = serde_json::from_slice(&std::fs::read(entry.path().join(LOGIN)).ok()?).ok()?;
        Some((entry.file_name().into_string().ok()?, login))
    });
    Ok(logins.collect())
}
