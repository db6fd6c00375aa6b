//! `coordinator backup` and `coordinator restore`: all that a cluster has recorded, in one file.
//!
//! A backup holds the CA's key, because a cluster without it is none: the file is made 0600 and says so in its first line. It is
//! read from the disk of a replica that may be running. A restore makes a cluster of one, with the old cluster's id and CA and a new
//! replica, from which others are joined; the replicas of before are removed for ever.

use super::custody::Custody;
use super::{Options, setup};
use crate::archive::{self, FORMAT, Header, Record, Writer};
use crate::cluster::commands::COMMAND_LEVEL;
use crate::cluster::members::{ReplicaRecord, Standing};
use crate::raft::disk::{Batch, Disk, Durability, Table};
use crate::raft::image;
use crate::raft::memory::MemoryDisk;
use crate::raft::replica::Replica;
use crate::raft::rocks::RocksDisk;
use anyhow::{Context, Result, anyhow, bail};
use fleet_common::files;
use fleet_common::ids::ReplicaId;
use fleet_common::net::ClusterCa;
use fleet_common::protocol::{CoordinatorAddress, Member};
use std::fs::{File, OpenOptions};
use std::io::{BufReader, BufWriter};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;
use tracing::info;

/// Bytes of rows in one record.
const ROWS_BYTES: usize = 1 << 20;
/// Above every key.
const END_OF_KEYS: [u8; 64] = [0xFF; 64];
/// A running coordinator may remove a file in the moment in which it is read.
const ATTEMPTS: usize = 5;

/// What a backup has, for its report.
#[derive(Debug, PartialEq, Eq)]
pub struct Summary {
    pub cluster_id: String,
    pub log_index: u64,
    pub rows: u64,
}

/// Writes a backup of a coordinator's data directory. It may be running.
pub fn backup(data_dir: &Path, out: &Path) -> Result<Summary> {
    let mut last = anyhow!("nothing was tried");
    for _ in 0..ATTEMPTS {
        match attempt(data_dir, out) {
            Ok(summary) => return Ok(summary),
            Err(error) => last = error,
        }
    }
    Err(last)
}

fn attempt(data_dir: &Path, out: &Path) -> Result<Summary> {
    let custody = Custody::load(&data_dir.join("cluster"))?
        .with_context(|| format!("{} holds no cluster", data_dir.display()))?;
    let ca = custody.present();
    let disk = RocksDisk::open_read_only(&data_dir.join("raft"))
        .with_context(|| format!("cannot read the log in {}", data_dir.display()))?;
    let Applied { position, state, replayed } = applied(&disk)?;
    let header = Header {
        format: FORMAT,
        cluster_id: ca.cluster_id().to_owned(),
        log_index: position.0,
        made_unix_ms: unix_ms(),
        note: "contains the private key of the cluster's CA: keep it as secret as that".to_owned(),
    };
    let mut name = out.file_name().context("--out names a file")?.to_owned();
    name.push(".part");
    let part = out.with_file_name(name);
    let cannot = || format!("cannot write {}", part.display());
    remove_stale(&part).with_context(cannot)?;
    // Made here and now: a file that lay there would keep its owner and its mode.
    let file = OpenOptions::new().write(true).create_new(true).mode(files::SECRET).open(&part);
    let mut writer = Writer::new(BufWriter::new(file.with_context(cannot)?));
    writer.header(&header).with_context(cannot)?;
    for ca in std::iter::once(ca).chain(custody.next()) {
        writer.record(&Record::Ca { der: ca.der().to_vec(), key: ca.key() }).with_context(cannot)?;
    }
    writer.record(&Record::State { index: position.0, term: position.1, state }).with_context(cannot)?;
    let mut rows = 0;
    // What the replay wrote is the same as what the disk has of it; the disk may not have all.
    for source in [&disk as &dyn Disk, replayed.as_ref()] {
        for table in Table::HISTORY {
            rows += write_rows(source, table, &mut writer).with_context(cannot)?;
        }
    }
    writer.record(&Record::End).with_context(cannot)?;
    let written = writer.finish().and_then(|out| Ok(out.into_inner()?.sync_all()?));
    written.with_context(cannot)?;
    std::fs::rename(&part, out).with_context(|| format!("cannot write {}", out.display()))?;
    let directory = out.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let synced = File::open(directory).and_then(|directory| directory.sync_all());
    synced.with_context(|| format!("cannot sync {}", directory.display()))?;
    Ok(Summary { cluster_id: header.cluster_id, log_index: header.log_index, rows })
}

/// Removes what an earlier attempt left; anything else that has this name stays, and is an error.
fn remove_stale(part: &Path) -> Result<()> {
    let found = match std::fs::symlink_metadata(part) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        found => found?,
    };
    let ours = found.file_type().is_file() && found.uid() == nix::unistd::geteuid().as_raw();
    if !ours {
        bail!("it is there already and no file of an earlier backup; remove it or choose another --out");
    }
    Ok(std::fs::remove_file(part)?)
}

/// All that is committed.
struct Applied {
    /// Index and term of the last entry.
    position: (u64, u64),
    /// Encoded.
    state: Vec<u8>,
    /// What the log's entries added to the history.
    replayed: Arc<MemoryDisk>,
}

/// Replays the log in memory: a running replica's disk is not touched.
fn applied(disk: &RocksDisk) -> Result<Applied> {
    let memory = Arc::new(MemoryDisk::default());
    for table in [Table::Meta, Table::Log] {
        let mut batch = Batch::default();
        disk.scan(table, &[], &END_OF_KEYS, &mut |key, value| {
            batch.put(table, key, value.to_vec());
            true
        })?;
        memory.write(&batch, Durability::Written)?;
    }
    let mut replica = Replica::open(memory.clone(), 0)?.context("the log is empty")?;
    replica.process(&mut |_| {})?;
    let state = image::encode(replica.state())?;
    Ok(Applied { position: (replica.applied_index(), replica.term()), state, replayed: memory })
}

fn write_rows(disk: &dyn Disk, table: Table, writer: &mut Writer<BufWriter<File>>) -> Result<u64> {
    let (mut rows, mut bytes, mut count) = (Vec::new(), 0, 0);
    let mut failed = Ok(());
    disk.scan(table, &[], &END_OF_KEYS, &mut |key, value| {
        bytes += key.len() + value.len();
        count += 1;
        rows.push((key.to_vec(), value.to_vec()));
        if bytes >= ROWS_BYTES {
            bytes = 0;
            failed =
                writer.record(&Record::Rows { table: table.name().into(), rows: std::mem::take(&mut rows) });
        }
        failed.is_ok()
    })?;
    failed?;
    if !rows.is_empty() {
        writer.record(&Record::Rows { table: table.name().into(), rows })?;
    }
    Ok(count)
}

/// Makes a cluster of one in an empty directory from a backup. The first start makes its credentials.
pub fn restore(file: &Path, options: &Options) -> Result<Summary> {
    let dir = &options.data_dir;
    let _lock = setup::lock_empty(dir)?;
    let damaged = || format!("{} cannot be restored", file.display());
    let open = || Ok(BufReader::new(File::open(file)?));
    let header = open().and_then(|mut input| archive::verify(&mut input)).with_context(damaged)?;
    // Whole and unchanged: only now is anything written.
    let disk = Arc::new(RocksDisk::open(&dir.join("raft"))?);
    let (mut cas, mut state, mut rows) = (Vec::new(), None, 0);
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
    Replica::restore(disk, id.0, position, state, rand::random())?;
    Custody::begin(&dir.join("cluster"), ca, cas)?;
    identity.store(&dir.join("identity"))?;
    info!("{} has cluster {} as it was at entry {}", dir.display(), header.cluster_id, header.log_index);
    Ok(Summary { cluster_id: header.cluster_id, log_index: header.log_index, rows })
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

fn unix_ms() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_millis() as u64
}
