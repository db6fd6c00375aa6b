//! `coordinator restore`: a cluster of one from a backup, with the old cluster's id and CA and a new replica.
//!
//! All of it is made in `restoring/` in the data directory and moved to its place when it is whole. `restoring.json` is there from before
//! the first of it to after the last, and says whether it is whole: an interrupted restore is then finished by the next start, and
//! begun anew by the next restore where it is not.

use super::backup::{Summary, unix_ms};
use super::custody::Custody;
use super::{Options, setup};
use crate::archive::{self, Record};
use crate::cluster::commands::COMMAND_LEVEL;
use crate::cluster::members::{ReplicaRecord, Standing};
use crate::raft::disk::{Batch, Disk, Durability, Table};
use crate::raft::image;
use crate::raft::replica::Replica;
use crate::raft::rocks::RocksDisk;
use anyhow::{Context, Result, bail};
use fleet_common::files;
use fleet_common::ids::ReplicaId;
use fleet_common::net::ClusterCa;
use fleet_common::protocol::{CoordinatorAddress, Member};
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io::{self, BufReader};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;
use tracing::{info, warn};

/// What a restore makes, in the order in which it is moved: the mark before what it is about.
const PARTS: [&str; 4] = ["raft.mark", "raft", "cluster", "identity"];

/// How far a restore came.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Restoring {
    whole: bool,
}

fn marker(dir: &Path) -> PathBuf {
    dir.join("restoring.json")
}

fn place(dir: &Path) -> PathBuf {
    dir.join("restoring")
}

fn how_far(dir: &Path) -> Result<Option<Restoring>> {
    let path = marker(dir);
    let Some(text) = files::read_optional(&path)? else { return Ok(None) };
    let how_far = serde_json::from_str(&text);
    how_far.map(Some).with_context(|| {
        format!("{} is damaged; set {} aside and restore the backup anew", path.display(), dir.display())
    })
}

fn mark(dir: &Path, whole: bool) -> Result<()> {
    let text = serde_json::to_string(&Restoring { whole })? + "\n";
    Ok(files::write_atomic(&marker(dir), text.as_bytes())?)
}

/// A restore was interrupted here before it was whole.
pub fn is_unfinished(dir: &Path) -> Result<bool> {
    Ok(how_far(dir)?.is_some_and(|restoring| !restoring.whole))
}

/// Puts what was made whole into its place, also where that was interrupted. The caller holds the directory's lock.
pub fn finish(dir: &Path) -> Result<()> {
    if how_far(dir)? != Some(Restoring { whole: true }) {
        return Ok(());
    }
    let place = place(dir);
    for part in PARTS {
        let (from, to) = (place.join(part), dir.join(part));
        match fs::rename(&from, &to) {
            // It was moved before.
            Err(error) if error.kind() == io::ErrorKind::NotFound && to.exists() => {}
            moved => moved.with_context(|| format!("cannot move {} to {}", from.display(), to.display()))?,
        }
    }
    sync(dir)?;
    remove(&place, |place| fs::remove_dir(place))?;
    remove(&marker(dir), |marker| fs::remove_file(marker))
}

/// Takes the directory for a new restore. What an earlier one left is removed; anything else that is in the way stays, and is an error.
fn begin(dir: &Path) -> Result<PathBuf> {
    let place = place(dir);
    if how_far(dir)?.is_some() {
        warn!("a restore was interrupted in {}; it begins anew", dir.display());
        remove(&place, |place| fs::remove_dir_all(place))?;
    } else if fs::symlink_metadata(&place).is_ok() {
        bail!(
            "{} is there already and is of no restore; remove it or choose another --data-dir",
            place.display()
        );
    }
    mark(dir, false)?;
    files::create_dir(&place)?;
    Ok(place)
}

fn remove(path: &Path, remove: impl FnOnce(&Path) -> io::Result<()>) -> Result<()> {
    match remove(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed.with_context(|| format!("cannot remove {}", path.display())),
    }
}

fn sync(directory: &Path) -> Result<()> {
    let synced = File::open(directory).and_then(|directory| directory.sync_all());
    synced.with_context(|| format!("cannot sync {}", directory.display()))
}

/// Makes a cluster of one in an empty directory from a backup. The first start makes its credentials.
pub fn restore(file: &Path, options: &Options) -> Result<Summary> {
    let dir = &options.data_dir;
    let _lock = setup::lock_for_restore(dir)?;
    let damaged = || format!("{} cannot be restored", file.display());
    let open = || Ok(BufReader::new(File::open(file)?));
    let header = open().and_then(|mut input| archive::verify(&mut input)).with_context(damaged)?;
    // Whole and unchanged: only now is anything written.
    let place = begin(dir)?;
    let disk = Arc::new(RocksDisk::open(&place.join("raft"))?);
    let (mut cas, mut state, mut rows, mut left_out) = (Vec::new(), None, 0, Vec::new());
    let mut take = |record| {
        match record {
            Record::Ca { der, key } => cas.push(ClusterCa::from_parts(der, &key)?),
            Record::State { index, term, state: encoded } => {
                state = Some(((index, term), image::decode(&encoded)?));
            }
            Record::Rows { table, rows: some } => {
                let known = Table::HISTORY.into_iter().find(|known| known.name() == table);
                let table = known
                    .with_context(|| format!("it has rows of a table {table}, made by a newer fleet"))?;
                let mut batch = Batch::default();
                rows += some.len() as u64;
                some.into_iter().for_each(|(key, value)| batch.put(table, &key, value));
                disk.write(&batch, Durability::Written)?;
            }
            Record::LeftOut(gap) => left_out.push(gap),
            Record::End => {}
        }
        Ok(())
    };
    open().and_then(|mut input| archive::read(&mut input, &mut take)).with_context(damaged)?;
    let Some((position, state)) = state.filter(|_| !cas.is_empty()) else {
        bail!("{}: parts are missing", damaged())
    };
    let id = state.restored_replica();
    let name = setup::name(options, id);
    // The one that the state of then calls the CA comes first: its replica may have been a step behind or ahead on its disk.
    let present = cas.iter().position(|ca| ca.der() == state.cas().der).unwrap_or(0);
    let ca = cas.swap_remove(present);
    let identity = ca.issue(Member::Coordinator(id), &name, SystemTime::now(), options.certificate_life)?;
    let key = identity.key_hash().map_err(anyhow::Error::msg)?;
    let held: Vec<&[u8]> = cas.iter().map(ClusterCa::der).collect();
    let state = state.restored(record(id, &name), key, &held);
    // Synced, and with it all rows before.
    drop(Replica::restore(disk, id.0, position, state, rand::random())?);
    Custody::begin(&place.join("cluster"), ca, cas)?;
    identity.store(&place.join("identity"))?;
    sync(&place)?;
    mark(dir, true)?;
    finish(dir)?;
    info!("{} has cluster {} as it was at entry {}", dir.display(), header.cluster_id, header.log_index);
    Ok(Summary { cluster_id: header.cluster_id, log_index: header.log_index, rows, left_out })
}

/// Its address is told when it listens.
fn record(replica: ReplicaId, name: &str) -> ReplicaRecord {
    ReplicaRecord {
        address: CoordinatorAddress { replica, client: String::new(), member: String::new() },
        name: name.to_owned(),
        version: setup::VERSION.to_owned(),
        level: COMMAND_LEVEL,
        joined_unix_ms: unix_ms(),
        standing: Standing::Voter,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn make(dir: &Path) {
        for part in PARTS {
            fs::create_dir_all(dir.join(part)).unwrap();
            fs::write(dir.join(part).join("content"), part).unwrap();
        }
    }

    fn is_in_place(dir: &Path) -> bool {
        let content = |part: &str| fs::read_to_string(dir.join(part).join("content"));
        PARTS.iter().all(|part| content(part).is_ok_and(|content| content == *part))
    }

    #[test]
    fn what_was_whole_is_put_in_its_place_wherever_that_was_interrupted() {
        for moved in 0..=PARTS.len() {
            let dir = tempfile::tempdir().unwrap();
            let dir = dir.path();
            make(&begin(dir).unwrap());
            finish(dir).unwrap();
            assert!(place(dir).exists() && is_unfinished(dir).unwrap(), "it is not whole");
            mark(dir, true).unwrap();
            for part in &PARTS[..moved] {
                fs::rename(place(dir).join(part), dir.join(part)).unwrap();
            }
            finish(dir).unwrap();
            assert!(is_in_place(dir) && !place(dir).exists() && !marker(dir).exists(), "{moved} were moved");
            finish(dir).unwrap();
        }
    }

    #[test]
    fn only_what_a_restore_left_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let foreign = place(dir.path()).join("mine");
        fs::create_dir_all(&foreign).unwrap();
        let why = begin(dir.path()).unwrap_err().to_string();
        assert!(
            why.contains("is of no restore") && foreign.exists() && !marker(dir.path()).exists(),
            "{why}"
        );
        fs::remove_dir_all(place(dir.path())).unwrap();
        make(&begin(dir.path()).unwrap());
        let place = begin(dir.path()).unwrap();
        assert_eq!(fs::read_dir(place).unwrap().count(), 0, "an interrupted restore begins anew");
    }
}
