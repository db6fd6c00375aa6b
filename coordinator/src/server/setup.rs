//! The data directory: what is in it, and how it comes to be on the first start.
//!
//! | path | what |
//! |---|---|
//! | `lock` | held while a coordinator runs |
//! | `cluster/` | the CA's certificate and key (0600) |
//! | `raft/` | RocksDB: log, state, history |
//! | `identity/` | this coordinator's certificate and key |
//! | `client/` | a client's certificate and key, for `fleet` on this machine |
//! | `tokens/` | `worker.token`, `client.token` (0600) |
//! | `endpoint.json` | where it listens |

use super::clients::new_token;
use super::joins::CERTIFICATE_VALIDITY;
use super::{Options, Shared};
use crate::cluster::State;
use crate::cluster::commands::COMMAND_LEVEL;
use crate::cluster::members::{ReplicaRecord, Standing};
use crate::raft::disk::Disk;
use crate::raft::replica::Replica;
use crate::raft::rocks::RocksDisk;
use anyhow::{Context, Result, anyhow, bail};
use fleet_common::files;
use fleet_common::ids::ReplicaId;
use fleet_common::net::{ClusterCa, Identity};
use fleet_common::protocol::{CoordinatorAddress, Role};
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions, TryLockError};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;
use tracing::info;

/// The only replica there is.
const REPLICA: u64 = 1;
/// Life of the tokens in the data directory: ten years.
const TOKEN_TTL_S: u64 = 10 * 365 * 24 * 3600;

/// What a start needs, opened and checked.
pub struct Prepared {
    pub lock: File,
    pub ca: ClusterCa,
    pub identity: Identity,
    pub disk: Arc<dyn Disk>,
    pub replica: Replica<RocksDisk>,
    pub raft_dir: PathBuf,
}

pub fn prepare(options: &Options) -> Result<Prepared> {
    let dir = &options.data_dir;
    files::create_dir(dir)?;
    let lock = lock(dir)?;
    let (cluster_dir, raft_dir, identity_dir) = (dir.join("cluster"), dir.join("raft"), dir.join("identity"));

    let known = ClusterCa::load(&cluster_dir)?;
    if known.is_none() && raft_dir.exists() {
        bail!(
            "{} has a cluster's log but not its CA; restore {} from a backup",
            dir.display(),
            cluster_dir.display()
        );
    }
    let now = SystemTime::now();
    let (ca, new) = match known {
        Some(ca) => (ca, false),
        None => {
            let ca = ClusterCa::create(&hex::encode(rand::random::<[u8; 8]>()), now)?;
            ca.store(&cluster_dir)?;
            (ca, true)
        }
    };

    let disk = Arc::new(
        RocksDisk::open(&raft_dir)
            .with_context(|| format!("cannot open the log in {}", raft_dir.display()))?,
    );
    let identity = Identity::load(&identity_dir)?;
    let seed = rand::random();
    let replica = match (Replica::open(disk.clone(), seed)?, &identity) {
        (Some(replica), _) => replica,
        (None, Some(_)) => bail!("the log in {} is gone; restore it from a backup", raft_dir.display()),
        (None, None) => {
            Replica::create(disk.clone(), REPLICA, &[REPLICA], first_state(ca.cluster_id()), seed)?
        }
    };
    if replica.state().cluster_id() != ca.cluster_id() {
        bail!(
            "the log in {} belongs to cluster {}, the CA to {}",
            raft_dir.display(),
            replica.state().cluster_id(),
            ca.cluster_id()
        );
    }
    let identity = match identity {
        Some(identity) if identity.cluster_id == ca.cluster_id() => identity,
        Some(_) => bail!("the identity in {} is of another cluster; remove it", identity_dir.display()),
        None => issue(&ca, &identity_dir, Role::Coordinator, now)?,
    };
    if new {
        info!("made a new cluster {} in {}", ca.cluster_id(), dir.display());
    }
    Ok(Prepared { lock, ca, identity, disk, replica, raft_dir })
}

/// A new cluster's state with this coordinator in it. Its address is told when it is known.
fn first_state(cluster_id: &str) -> State {
    let replica = ReplicaId(REPLICA);
    let record = ReplicaRecord {
        address: CoordinatorAddress { replica, client: String::new(), member: String::new() },
        name: "coordinator-1".to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        level: COMMAND_LEVEL,
        joined_unix_ms: 0,
        standing: Standing::Voter,
    };
    State::founded(cluster_id.to_owned(), BTreeMap::from([(replica, record)]))
}

/// Writes the tokens and the client's identity that are not there yet.
pub async fn write_credentials(dir: &Path, shared: &Shared) -> Result<()> {
    let client_dir = dir.join("client");
    if Identity::load(&client_dir)?.is_none() {
        issue(&shared.ca, &client_dir, Role::Client, SystemTime::now())?;
    }
    files::create_dir(&dir.join("tokens"))?;
    for role in [Role::Worker, Role::Client] {
        let path = token_path(dir, role);
        if files::read_optional(&path)?.is_none() {
            let token = new_token(shared, None, role, TOKEN_TTL_S, u32::MAX)
                .await
                .map_err(|refusal| anyhow!(refusal.message))?;
            files::write_atomic(&path, format!("{token}\n").as_bytes(), files::SECRET)?;
        }
    }
    Ok(())
}

pub fn token_path(dir: &Path, role: Role) -> PathBuf {
    dir.join("tokens").join(if role == Role::Worker { "worker.token" } else { "client.token" })
}

fn issue(ca: &ClusterCa, dir: &Path, role: Role, now: SystemTime) -> Result<Identity> {
    let name = if role == Role::Coordinator { "coordinator-1" } else { "local" };
    let identity = ca.issue(ca.cluster_id(), name, role, None, now, CERTIFICATE_VALIDITY)?;
    identity.store(dir)?;
    Ok(identity)
}

fn lock(dir: &Path) -> Result<File> {
    let path = dir.join("lock");
    let file = OpenOptions::new().create(true).truncate(false).write(true).open(&path);
    let file = file.with_context(|| format!("cannot open {}", path.display()))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => {
            bail!("another coordinator runs on {}; stop it or choose another --data-dir", dir.display())
        }
        Err(TryLockError::Error(error)) => {
            Err(error).with_context(|| format!("cannot lock {}", path.display()))
        }
    }
}
