//! The data directory: what is in it, and how it comes to be on the first start.
//!
//! | path | what |
//! |---|---|
//! | `lock` | held while a coordinator runs |
//! | `cluster/` | the CA's certificate and key, and those of a CA that is to replace it |
//! | `raft/` | RocksDB: log, state, history |
//! | `raft.mark` | how far `raft/` had come at least, outside of it |
//! | `identity/` | this coordinator's certificate and key |
//! | `joining.json` | from the beginning of `coordinator join` until its log has begun; says whether it got all that it needs |
//! | `founding.json` | from the beginning of a new cluster until its log has begun |
//! | `restoring.json`, `restoring/` | while a backup is restored |
//! | `coordinators.json` | where the coordinators were when it last knew |
//! | `client/` | an admin's certificate and key, for `fleet` on this machine |
//! | `tokens/` | `worker.token`, `client.token` |
//! | `endpoint.json` | where it listens |
//! | `listen.json` | where it was told to |
//!
//! All of it belongs to the user whom the coordinator runs as, and is closed to others.
//!
//! A cluster is founded only where nothing was before, or where its founding was interrupted: a CA alone is no reason.

use super::custody::Custody;
use super::trust::load_mended;
use super::{Options, restore};
use crate::cluster::State;
use crate::cluster::commands::COMMAND_LEVEL;
use crate::cluster::members::{ReplicaRecord, Standing};
use crate::raft::disk::DiskError;
use crate::raft::log::LogError;
use crate::raft::replica::Replica;
use crate::raft::rocks::RocksDisk;
use anyhow::{Context, Result, bail};
use fleet_common::endpoint::Endpoint;
use fleet_common::files::{self, Kind, lock};
use fleet_common::ids::ReplicaId;
use fleet_common::net::{ClusterCa, Identity, Joined};
use fleet_common::protocol::{CoordinatorAddress, Member};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;
use tracing::{info, warn};

/// The first replica of a new cluster.
const FOUNDER: ReplicaId = ReplicaId(1);
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// A data directory that was opened and checked.
pub struct Opened {
    pub lock: File,
    pub custody: Custody,
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

/// How far `coordinator join` came.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Joining {
    complete: bool,
}

fn joining(dir: &Path) -> PathBuf {
    dir.join("joining.json")
}

/// `None` where nobody joined, or where the log has begun since.
fn how_far_joined(dir: &Path) -> Result<Option<Joining>> {
    let path = joining(dir);
    let Some(text) = files::read_optional(&path)? else { return Ok(None) };
    let joined = serde_json::from_str(&text);
    joined
        .map(Some)
        .with_context(|| format!("{} is damaged; set {} aside and join anew", path.display(), dir.display()))
}

fn mark_joining(dir: &Path, complete: bool) -> Result<()> {
    let text = serde_json::to_string(&Joining { complete })? + "\n";
    Ok(files::write_atomic(&joining(dir), text.as_bytes())?)
}

fn founding(dir: &Path) -> PathBuf {
    dir.join("founding.json")
}

/// Takes the directory's lock and opens what is in it. A directory without a cluster gets a new one, unless one is expected.
pub fn open(options: &Options) -> Result<Opened> {
    let dir = &options.data_dir;
    if options.expect_existing && !dir.exists() {
        bail!("{}", not_a_replica(dir));
    }
    claim(dir)?;
    let lock = lock(dir)?;
    has_no_half_restore(dir)?;
    let (cluster_dir, identity_dir, raft_dir) = (dir.join("cluster"), dir.join("identity"), raft_dir(dir));
    let now = SystemTime::now();
    let joined = how_far_joined(dir)?;
    if joined.is_some_and(|joined| !joined.complete) {
        bail!(
            "`coordinator join` was interrupted in {}, which is no coordinator yet; run it again there with a new token",
            dir.display()
        );
    }
    let known = Custody::load(&cluster_dir)?;
    if known.is_none() && raft_dir.exists() {
        bail!(
            "{} has a cluster's log but not its CA; copy {} of another coordinator there, or, where there is none, restore a backup with `coordinator restore`",
            dir.display(),
            cluster_dir.display()
        );
    }
    if options.expect_existing && (known.is_none() || (!raft_dir.exists() && joined.is_none())) {
        bail!("{}", not_a_replica(dir));
    }
    let custody = match known {
        Some(custody) => custody,
        None if joined.is_some() => bail!(
            "{} is gone, which `coordinator join` had written; set {} aside and join anew",
            cluster_dir.display(),
            dir.display()
        ),
        None if identity_dir.exists() && !founding(dir).exists() => bail!(
            "{} has a coordinator's identity but not the cluster's CA; set it aside and join the cluster anew with `coordinator join`, or, where it was the only one, restore a backup with `coordinator restore`",
            dir.display()
        ),
        None => {
            files::write_atomic(&founding(dir), b"{}\n")?;
            let ca = ClusterCa::create(&hex::encode(rand::random::<[u8; 8]>()), now)?;
            info!("made a new cluster {} in {}", ca.cluster_id(), dir.display());
            Custody::begin(&cluster_dir, ca, Vec::new())?
        }
    };
    let ca = custody.present().clone();
    let identity = load_mended(&identity_dir, &custody.authorities())?;
    if identity.as_ref().is_some_and(|identity| identity.cluster_id != ca.cluster_id()) {
        bail!(
            "the identity in {dir} is of another cluster than the CA beside it, {}; set it aside (mv {dir} {dir}.old)",
            ca.cluster_id(),
            dir = identity_dir.display()
        );
    }
    let gone = || {
        format!(
            "the log in {} is gone; set {} aside and join the cluster anew with `coordinator join`, or, where it was the only one, restore a backup with `coordinator restore`",
            raft_dir.display(),
            dir.display()
        )
    };
    if joined.is_none() && identity.is_some() && !raft_dir.join("CURRENT").exists() {
        bail!("{}", gone());
    }
    let (disk, found) = open_log(&raft_dir)?;
    let (begin, replica) = match (found, &identity) {
        (Some(replica), _) => {
            let id = ReplicaId(replica.id());
            (Begin::Continue(Box::new(replica)), id)
        }
        (None, Some(Identity { member: Member::Coordinator(id), .. })) if joined.is_some() => {
            (Begin::Join, *id)
        }
        (None, Some(_)) => bail!("{}", gone()),
        (None, None) if options.expect_existing => bail!("{}", not_a_replica(dir)),
        (None, None) if founding(dir).exists() => (Begin::Found, FOUNDER),
        (None, None) => bail!(
            "{} has the CA of a cluster and neither a log nor an identity; set it aside and join the cluster with `coordinator join`, or, where it was the only one, restore a backup with `coordinator restore`",
            dir.display()
        ),
    };
    if let Begin::Continue(found) = &begin
        && found.state().cluster_id() != ca.cluster_id()
    {
        let log = found.state().cluster_id();
        bail!(
            "the log in {} belongs to cluster {log}, the CA in {} to {}; put back the one that belongs there, or set {} aside and join a cluster anew with `coordinator join`",
            raft_dir.display(),
            cluster_dir.display(),
            ca.cluster_id(),
            dir.display()
        );
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
            renewed.store_renewed(&identity_dir, &identity)?;
            renewed
        }
        Some(identity) => identity,
        None => ca.issue(member, &name(options, replica), now, options.certificate_life)?,
    };
    let coordinators = load_coordinators(dir)?;
    Ok(Opened { lock, custody, replica, identity, disk, begin, coordinators, dir: dir.clone() })
}

fn not_a_replica(dir: &Path) -> String {
    format!(
        "{} has no coordinator of a cluster, and --expect-existing says that there must be one; check --data-dir; if its disk is lost, join a new one with `coordinator join`, or, where it was the only one, restore a backup with `coordinator restore`",
        dir.display()
    )
}

/// A damaged log is an error here: the replica must not take part any more.
pub fn open_log(raft_dir: &Path) -> Result<(Arc<RocksDisk>, Option<Replica<RocksDisk>>)> {
    let advice = || format!("cannot open the log in {}", raft_dir.display());
    let disk = RocksDisk::open(raft_dir).map_err(|error| match error {
        // What its files lack or have wrong does not come back by itself.
        DiskError::Failed(what)
            if ["Corruption", "No such file", "Is a directory"].iter().any(|sign| what.contains(sign)) =>
        {
            LogError::Damaged(what)
        }
        error => error.into(),
    });
    let disk = Arc::new(disk.with_context(advice)?);
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
    ) -> Result<(File, Custody, Identity, Replica<RocksDisk>)> {
        let Opened { lock, custody, replica: id, identity, disk, begin, dir, .. } = self;
        let ca = custody.present();
        let replica = match begin {
            Begin::Continue(replica) => *replica,
            Begin::Found => {
                let key = identity.key_hash().map_err(anyhow::Error::msg)?;
                let state = first_state(ca.cluster_id(), address.clone(), name);
                let state = state.trusting(ca.der().to_vec(), BTreeMap::from([(id, key)]));
                Replica::create(disk, id.0, &[id.0], state, rand::random())?
            }
            Begin::Join => Replica::join(disk, id.0, ca.cluster_id(), rand::random())?,
        };
        // After the log: an identity without one is a log that was lost.
        let identity_dir = dir.join("identity");
        if load_mended(&identity_dir, &custody.authorities())?.is_none() {
            identity.store(&identity_dir)?;
        }
        for marker in [joining(&dir), founding(&dir)] {
            remove_file(&marker)?;
        }
        Ok((lock, custody, identity, replica))
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

/// Marks a directory before anybody is asked to let it in: from now on no start takes it for an empty one.
pub fn begin_joining(dir: &Path) -> Result<()> {
    mark_joining(dir, false)?;
    for name in ["cluster", "identity"] {
        match fs::remove_dir_all(dir.join(name)) {
            Ok(()) => info!("{} is of a join that was interrupted; it begins anew", dir.join(name).display()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => {
                return Err(error).with_context(|| format!("cannot remove {}", dir.join(name).display()));
            }
        }
    }
    Ok(())
}

/// The cluster did not let it in: the directory is as empty as before.
pub fn give_up_joining(dir: &Path) {
    if let Err(error) = remove_file(&joining(dir)) {
        warn!("{error:#}");
    }
}

/// Keeps what a cluster gave to a new coordinator. The next start begins its log. Until all is there it is marked as incomplete.
pub fn store_joined(dir: &Path, joined: &Joined) -> Result<()> {
    let mut cas = joined.cas.iter().map(ClusterCa::again);
    let present = cas.next().context("the cluster did not send its CA")??;
    Custody::begin(&dir.join("cluster"), present, cas.collect::<Result<_, _>>()?)?;
    joined.identity.store(&dir.join("identity"))?;
    store_coordinators(dir, &joined.coordinators)?;
    mark_joining(dir, true)
}

fn remove_file(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// Makes the directory, or closes to others what an older version left open.
fn claim(dir: &Path) -> Result<()> {
    if let Some(was_open) = files::claim(dir, Kind::Coordinator)? {
        warn!("{was_open}; `fleet token ls` and `fleet token revoke` end the tokens");
    }
    Ok(())
}

/// Takes the lock of a directory that must not have a cluster yet. One whose join was interrupted has none.
pub fn lock_empty(dir: &Path) -> Result<File> {
    claim(dir)?;
    let lock = lock(dir)?;
    has_no_half_restore(dir)?;
    if how_far_joined(dir)?.is_some_and(|joined| !joined.complete) && !raft_dir(dir).exists() {
        return Ok(lock);
    }
    has_no_coordinator(dir)?;
    Ok(lock)
}

/// Takes the lock of a directory in which a backup may be restored: one that is empty, or in which a restore was interrupted.
pub fn lock_for_restore(dir: &Path) -> Result<File> {
    claim(dir)?;
    let lock = lock(dir)?;
    restore::finish(dir)?;
    has_no_coordinator(dir)?;
    if joining(dir).exists() {
        bail!(
            "`coordinator join` was interrupted in {}; run it again there, or choose another --data-dir",
            dir.display()
        );
    }
    Ok(lock)
}

fn has_no_coordinator(dir: &Path) -> Result<()> {
    if ["cluster", "identity", "raft", "raft.mark"].iter().any(|name| dir.join(name).exists()) {
        bail!(
            "{dir} has a coordinator already; start it with `coordinator start --data-dir {dir}`, choose another --data-dir, or set this one aside (mv {dir} {dir}.old)",
            dir = dir.display()
        );
    }
    Ok(())
}

/// Ends a restore that was interrupted when all was there.
fn has_no_half_restore(dir: &Path) -> Result<()> {
    restore::finish(dir)?;
    if restore::is_unfinished(dir)? {
        bail!(
            "`coordinator restore` was interrupted in {}, which is no coordinator yet; run it again there",
            dir.display()
        );
    }
    Ok(())
}

pub fn store_coordinators(dir: &Path, coordinators: &[CoordinatorAddress]) -> Result<()> {
    let text = serde_json::to_string_pretty(coordinators)? + "\n";
    Ok(files::write_atomic(&dir.join("coordinators.json"), text.as_bytes())?)
}

pub fn load_coordinators(dir: &Path) -> Result<Vec<CoordinatorAddress>> {
    let path = dir.join("coordinators.json");
    let Some(text) = files::read_optional(&path)? else { return Ok(Vec::new()) };
    serde_json::from_str(&text).with_context(|| format!("{} is damaged; remove it", path.display()))
}

/// What is remembered of the last start, to listen where others look.
pub fn last_endpoint(dir: &Path) -> Option<Endpoint> {
    Endpoint::load(dir).ok().flatten()
}

#[cfg(test)]
mod tests {
    use super::*;
    use fleet_common::net::CERTIFICATE_LIFE;

    /// What `coordinator join` gets from a cluster.
    fn joined() -> Joined {
        let ca = ClusterCa::create("c1", SystemTime::now()).unwrap();
        let member = Member::Coordinator(ReplicaId(4));
        let identity = ca.issue(member, "four", SystemTime::now(), CERTIFICATE_LIFE).unwrap();
        Joined { identity, coordinators: Vec::new(), cas: vec![ca] }
    }

    fn options(dir: &Path, expect_existing: bool) -> Options {
        Options { expect_existing, ..Options::local(dir.to_owned()) }
    }

    fn refusal(dir: &Path, expect_existing: bool) -> String {
        format!("{:#}", open(&options(dir, expect_existing)).map(|_| ()).unwrap_err())
    }

    #[test]
    fn wherever_a_join_is_interrupted_no_cluster_is_founded_and_it_can_be_joined_again() {
        let joined = joined();
        let ca = &joined.cas[0];
        type Step<'a> = &'a dyn Fn(&Path);
        let steps: [Step; 4] = [
            &|dir| begin_joining(dir).unwrap(),
            &|dir| {
                ca.store(&dir.join("cluster")).unwrap();
                // Its certificate comes last.
                fs::remove_file(dir.join("cluster/ca.pem")).unwrap();
            },
            &|dir| ca.store(&dir.join("cluster")).unwrap(),
            &|dir| joined.identity.store(&dir.join("identity")).unwrap(),
        ];
        for done in 1..=steps.len() {
            let dir = tempfile::tempdir().unwrap();
            steps[..done].iter().for_each(|step| step(dir.path()));
            for expect_existing in [false, true] {
                let why = refusal(dir.path(), expect_existing);
                assert!(why.contains("join` was interrupted") && why.contains("new token"), "{done}: {why}");
            }
            assert!(!dir.path().join("raft").exists());
            drop(lock_empty(dir.path()).unwrap());
            begin_joining(dir.path()).unwrap();
            store_joined(dir.path(), &joined).unwrap();
            let opened = open(&options(dir.path(), true)).unwrap();
            assert!(matches!(opened.begin, Begin::Join) && opened.replica == ReplicaId(4), "{done}");
        }
    }

    #[test]
    fn one_that_is_not_let_in_leaves_an_empty_directory() {
        let dir = tempfile::tempdir().unwrap();
        begin_joining(dir.path()).unwrap();
        give_up_joining(dir.path());
        assert!(refusal(dir.path(), true).contains("--expect-existing"));
        let opened = open(&options(dir.path(), false)).unwrap();
        assert!(matches!(opened.begin, Begin::Found));
    }

    #[test]
    fn an_interrupted_founding_goes_on_and_a_ca_alone_founds_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let id = open(&options(dir.path(), false)).unwrap().custody.present().cluster_id().to_owned();
        assert!(refusal(dir.path(), true).contains("--expect-existing"));
        let again = open(&options(dir.path(), false)).unwrap();
        assert!(matches!(again.begin, Begin::Found) && again.custody.present().cluster_id() == id);
        drop(again);
        fs::remove_file(founding(dir.path())).unwrap();
        assert!(refusal(dir.path(), false).contains("neither a log nor an identity"));
    }

    #[test]
    fn a_directory_that_is_not_there_is_not_made_where_one_is_expected() {
        let dir = tempfile::tempdir().unwrap();
        assert!(refusal(&dir.path().join("absent"), true).contains("--expect-existing"));
        assert!(!dir.path().join("absent").exists());
    }
}
