//! The data directory: what is in it, and how it comes to be on the first start.
//!
//! | path | what |
//! |---|---|
//! | `lock` | held while a coordinator runs |
//! | `cluster/` | the CA's certificate and key (0600) |
//! | `raft/` | RocksDB: log, state, history |
//! | `identity/` | this coordinator's certificate and key |
//! | `joining.json` | after `coordinator join`, until its log has begun |
//! | `coordinators.json` | where the coordinators were when it last knew |
//! | `client/` | a client's certificate and key, for `fleet` on this machine |
//! | `tokens/` | `worker.token`, `client.token` (0600) |
//! | `endpoint.json` | where it listens |

use super::Options;
use crate::cluster::State;
use crate::cluster::commands::COMMAND_LEVEL;
use crate::cluster::members::{ReplicaRecord, Standing};
use crate::raft::replica::Replica;
use crate::raft::rocks::RocksDisk;
use anyhow::{Context, Result, bail};
use fleet_common::endpoint::Endpoint;
use fleet_common::files;
use fleet_common::ids::ReplicaId;
use fleet_common::net::{ClusterCa, Identity, Joined};
use fleet_common::protocol::{CoordinatorAddress, Member};
use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;
use tracing::info;

/// The first replica of a new cluster.
const FOUNDER: ReplicaId = ReplicaId(1);
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// A data directory that was opened and checked.
pub struct Opened {
    pub lock: File,
    pub ca: ClusterCa,
    pub replica: ReplicaId,
    pub identity: Identity,
    pub disk: Arc<RocksDisk>,
    pub begin: Begin,
    /// Where others were.
    pub coordinators: Vec<CoordinatorAddress>,
    dir: PathBuf,
}

/// How the replica of this start comes to be.
pub enum Begin {
    Continue(Box<Replica<RocksDisk>>),
    /// A new cluster.
    Found,
    /// A new replica of a cluster that there is.
    Join,
}

fn raft_dir(dir: &Path) -> PathBuf {
    dir.join("raft")
}

fn joining(dir: &Path) -> PathBuf {
    dir.join("joining.json")
}

/// Takes the directory's lock and opens what is in it. A directory without a cluster gets a new one, unless one is expected.
pub fn open(options: &Options) -> Result<Opened> {
    let dir = &options.data_dir;
    if !options.expect_existing {
        files::create_dir(dir)?;
    }
    let lock = lock(dir)?;
    let (cluster_dir, identity_dir, raft_dir) = (dir.join("cluster"), dir.join("identity"), raft_dir(dir));
    let now = SystemTime::now();
    let known = ClusterCa::load(&cluster_dir)?;
    if known.is_none() && raft_dir.exists() {
        bail!(
            "{} has a cluster's log but not its CA; restore {} from a backup",
            dir.display(),
            cluster_dir.display()
        );
    }
    if options.expect_existing && (known.is_none() || (!raft_dir.exists() && !joining(dir).exists())) {
        bail!(
            "{} has no cluster, and --expect-existing says that there must be one; check --data-dir, or restore a backup with `coordinator restore`",
            dir.display()
        );
    }
    let ca = match known {
        Some(ca) => ca,
        None => {
            let ca = ClusterCa::create(&hex::encode(rand::random::<[u8; 8]>()), now)?;
            ca.store(&cluster_dir)?;
            info!("made a new cluster {} in {}", ca.cluster_id(), dir.display());
            ca
        }
    };
    let identity = Identity::load(&identity_dir)?;
    if identity.as_ref().is_some_and(|identity| identity.cluster_id != ca.cluster_id()) {
        bail!("the identity in {} is of another cluster; remove it", identity_dir.display());
    }
    let (disk, found) = open_log(&raft_dir)?;
    let (begin, replica) = match (found, &identity) {
        (Some(replica), _) => {
            let id = ReplicaId(replica.id());
            (Begin::Continue(Box::new(replica)), id)
        }
        (None, Some(Identity { member: Member::Coordinator(id), .. })) if joining(dir).exists() => {
            (Begin::Join, *id)
        }
        (None, Some(_)) => bail!(
            "the log in {} is gone; set {} aside and join the cluster anew with `coordinator join`, or restore a backup",
            raft_dir.display(),
            dir.display()
        ),
        (None, None) => (Begin::Found, FOUNDER),
    };
    if let Begin::Continue(found) = &begin
        && found.state().cluster_id() != ca.cluster_id()
    {
        let log = found.state().cluster_id();
        bail!("the log in {} belongs to cluster {log}, the CA to {}", raft_dir.display(), ca.cluster_id());
    }
    let member = Member::Coordinator(replica);
    let identity = match identity {
        Some(identity) if identity.member != member => {
            bail!(
                "the identity in {} is {}, the log {replica}'s; they do not belong together",
                identity_dir.display(),
                identity.member
            )
        }
        Some(identity) if identity.remaining(now).is_zero() => {
            // It holds the CA itself.
            let renewed = ca.reissue(&identity, now, options.certificate_life)?;
            renewed.store_certificate(&identity_dir)?;
            renewed
        }
        Some(identity) => identity,
        None => ca.issue(member, &name(options, replica), now, options.certificate_life)?,
    };
    let coordinators = load_coordinators(dir)?;
    Ok(Opened { lock, ca, replica, identity, disk, begin, coordinators, dir: dir.clone() })
}

/// A damaged log is an error here: the replica must not take part any more.
pub fn open_log(raft_dir: &Path) -> Result<(Arc<RocksDisk>, Option<Replica<RocksDisk>>)> {
    let advice = || format!("cannot open the log in {}", raft_dir.display());
    let disk = Arc::new(RocksDisk::open(raft_dir).with_context(advice)?);
    let replica = Replica::open(disk.clone(), rand::random()).with_context(advice)?;
    Ok((disk, replica))
}

pub fn name(options: &Options, replica: ReplicaId) -> String {
    options.name.clone().unwrap_or_else(|| format!("coordinator-{}", replica.0))
}

impl Opened {
    /// The replica, begun where it is new. From then on the directory is one that continues.
    pub fn begin(
        self,
        address: &CoordinatorAddress,
        name: &str,
    ) -> Result<(File, ClusterCa, Identity, Replica<RocksDisk>)> {
        let Opened { lock, ca, replica: id, identity, disk, begin, dir, .. } = self;
        let replica = match begin {
            Begin::Continue(replica) => *replica,
            Begin::Found => {
                let state = first_state(ca.cluster_id(), address.clone(), name);
                Replica::create(disk, id.0, &[id.0], state, rand::random())?
            }
            Begin::Join => Replica::join(disk, id.0, ca.cluster_id(), rand::random())?,
        };
        // After the log: an identity without one is a log that was lost.
        let identity_dir = dir.join("identity");
        if Identity::load(&identity_dir)?.is_none() {
            identity.store(&identity_dir)?;
        }
        if joining(&dir).exists() {
            fs::remove_file(joining(&dir))
                .with_context(|| format!("cannot remove {}", joining(&dir).display()))?;
        }
        Ok((lock, ca, identity, replica))
    }
}

/// A new cluster's state with this coordinator in it.
fn first_state(cluster_id: &str, address: CoordinatorAddress, name: &str) -> State {
    let replica = address.replica;
    let record = ReplicaRecord {
        address,
        name: name.to_owned(),
        version: VERSION.to_owned(),
        level: COMMAND_LEVEL,
        joined_unix_ms: 0,
        standing: Standing::Voter,
    };
    State::founded(cluster_id.to_owned(), BTreeMap::from([(replica, record)]))
}

/// Keeps what a cluster gave to a new coordinator. The next start begins its log.
pub fn store_joined(dir: &Path, joined: &Joined) -> Result<()> {
    let ca = joined.ca.as_ref().context("the cluster did not send its CA")?;
    ca.store(&dir.join("cluster"))?;
    store_coordinators(dir, &joined.coordinators)?;
    files::write_atomic(&joining(dir), b"{}\n", files::PUBLIC)?;
    joined.identity.store(&dir.join("identity"))?;
    Ok(())
}

/// Takes the lock of a directory that must not have a cluster yet.
pub fn lock_empty(dir: &Path) -> Result<File> {
    files::create_dir(dir)?;
    let lock = lock(dir)?;
    for name in ["cluster", "identity", "raft"] {
        if dir.join(name).exists() {
            bail!(
                "{} has a coordinator already; start it with `coordinator start`, or choose another --data-dir",
                dir.display()
            );
        }
    }
    Ok(lock)
}

pub fn store_coordinators(dir: &Path, coordinators: &[CoordinatorAddress]) -> Result<()> {
    let text = serde_json::to_string_pretty(coordinators)? + "\n";
    Ok(files::write_atomic(&dir.join("coordinators.json"), text.as_bytes(), files::PUBLIC)?)
}

fn load_coordinators(dir: &Path) -> Result<Vec<CoordinatorAddress>> {
    let path = dir.join("coordinators.json");
    let Some(text) = files::read_optional(&path)? else { return Ok(Vec::new()) };
    serde_json::from_str(&text).with_context(|| format!("{} is damaged; remove it", path.display()))
}

/// What is remembered of the last start, to listen where others look.
pub fn last_endpoint(dir: &Path) -> Option<Endpoint> {
    Endpoint::load(dir).ok().flatten()
}

pub fn lock(dir: &Path) -> Result<File> {
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
