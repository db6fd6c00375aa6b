//! `coordinator backup`: all that a cluster has recorded, in one file.
//!
//! A backup holds the CA's key, because a cluster without it is none: the file is made 0600 and says so in its first line. It is
//! read from the disk of a replica that may be running.

use super::custody::Custody;
use crate::archive::{FORMAT, Gap, Header, Record, Writer};
use crate::raft::disk::{Batch, Disk, Durability, Table};
use crate::raft::image;
use crate::raft::log::{DAMAGE_KEY, LogError};
use crate::raft::memory::MemoryDisk;
use crate::raft::replica::Replica;
use crate::raft::rocks::RocksDisk;
use crate::raft::stretch::{self, END_OF_KEYS, End, Stretch};
use anyhow::{Context, Result, anyhow, bail};
use fleet_common::files::NewFile;
use std::io::BufWriter;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// Bytes of rows in one record.
const ROWS_BYTES: usize = 1 << 20;
/// A running coordinator may remove a file in the moment in which it is read.
const ATTEMPTS: usize = 5;
/// For a running coordinator that is only a moment behind.
const CATCHING_UP: Duration = Duration::from_millis(300);

/// What a backup is made of.
#[derive(Clone, Copy)]
pub struct Wanted<'a> {
    pub data_dir: &'a Path,
    pub out: &'a Path,
    /// Leave out what cannot be read.
    pub salvage: bool,
    /// It has to have the entries up to here, which the cluster has committed.
    pub at_least: u64,
}

/// What a backup has, for its report.
#[derive(Debug, PartialEq, Eq)]
pub struct Summary {
    pub cluster_id: String,
    pub log_index: u64,
    pub rows: u64,
    /// What could not be read when it was made.
    pub left_out: Vec<Gap>,
}

/// Writes a backup of a coordinator's data directory. It may be running.
pub fn backup(wanted: Wanted) -> Result<Summary> {
    check_target(wanted)?;
    let mut last = anyhow!("nothing was tried");
    for _ in 0..ATTEMPTS {
        match attempt(wanted) {
            Ok(summary) => return Ok(summary),
            Err(error) => last = error,
        }
        std::thread::sleep(CATCHING_UP);
    }
    Err(last)
}

/// A file of the coordinator itself is not what a backup replaces.
fn check_target(Wanted { data_dir, out, .. }: Wanted) -> Result<()> {
    let (Ok(own), Ok(there)) = (data_dir.canonicalize(), out.canonicalize()) else { return Ok(()) };
    if there.starts_with(own) && there.is_file() {
        let why = format!("{} is a file of the coordinator itself; name another file", out.display());
        return Err(std::io::Error::new(std::io::ErrorKind::InvalidInput, why).into());
    }
    Ok(())
}

fn attempt(wanted: Wanted) -> Result<Summary> {
    let Wanted { data_dir, out, salvage, at_least } = wanted;
    let custody = Custody::load(&data_dir.join("cluster"))?
        .with_context(|| format!("{} holds no cluster", data_dir.display()))?;
    let ca = custody.present();
    let open = if salvage { RocksDisk::salvage } else { RocksDisk::open_read_only };
    let disk = open(&data_dir.join("raft"))
        .with_context(|| format!("cannot read the log in {}", data_dir.display()))?;
    let Applied { position, state, replayed, damage } = applied(&disk, salvage)?;
    if position.0 < at_least {
        bail!(
            "this coordinator is behind by {} entries: it is at entry {} and the cluster at {at_least}; take the backup from another coordinator, or give --allow-behind",
            at_least - position.0,
            position.0
        );
    }
    let mut header = Header {
        format: FORMAT,
        cluster_id: ca.cluster_id().to_owned(),
        log_index: position.0,
        made_unix_ms: unix_ms(),
        note: "contains the private key of the cluster's CA: keep it as secret as that".to_owned(),
    };
    if salvage {
        header.note += "; what could not be read was left out";
    }
    let mut part = Part::create(out)?;
    part.write(|writer| writer.header(&header))?;
    for ca in std::iter::once(ca).chain(custody.next()) {
        part.record(&Record::Ca { der: ca.der().to_vec(), key: ca.key() })?;
    }
    part.record(&Record::State { index: position.0, term: position.1, state })?;
    let (mut rows, mut left_out) = (0, salvage.then(Vec::new));
    if let (Some(why), Some(left_out)) = (damage, &mut left_out) {
        let after = position.0.to_be_bytes().to_vec();
        let gap = Gap { table: Table::Log.name().into(), after, until: None, why };
        part.record(&Record::LeftOut(gap.clone()))?;
        left_out.push(gap);
    }
    // What the replay wrote is the same as what the disk has of it; the disk may not have all.
    for source in [&disk as &dyn Disk, replayed.as_ref()] {
        for table in Table::HISTORY {
            rows += write_rows(source, table, &mut part, &mut left_out)?;
        }
    }
    part.record(&Record::End)?;
    part.finish()?;
    let left_out = left_out.unwrap_or_default();
    Ok(Summary { cluster_id: header.cluster_id, log_index: header.log_index, rows, left_out })
}

/// The file, which is not there before it is whole.
struct Part<'a> {
    out: &'a Path,
    writer: Writer<BufWriter<NewFile>>,
}

impl Part<'_> {
    fn create(out: &Path) -> Result<Part<'_>> {
        Ok(Part { out, writer: Writer::new(BufWriter::new(NewFile::create(out)?)) })
    }

    fn write(&mut self, write: impl FnOnce(&mut Writer<BufWriter<NewFile>>) -> Result<()>) -> Result<()> {
        write(&mut self.writer).with_context(|| format!("cannot write {}", self.out.display()))
    }

    fn record(&mut self, record: &Record) -> Result<()> {
        self.write(|writer| writer.record(record))
    }

    fn finish(self) -> Result<()> {
        let written = self.writer.finish().and_then(|file| Ok(file.into_inner()?));
        let file = written.with_context(|| format!("cannot write {}", self.out.display()))?;
        Ok(file.commit()?)
    }
}

/// All that is committed.
struct Applied {
    /// Index and term of the last entry.
    position: (u64, u64),
    /// Encoded.
    state: Vec<u8>,
    /// What the log's entries added to the history.
    replayed: Arc<MemoryDisk>,
    /// Why more of the log may be missing than is known.
    damage: Option<String>,
}

/// Replays the log in memory: a running replica's disk is not touched. One that is known to have lost something is an error, unless
/// what is left is wanted.
fn applied(disk: &RocksDisk, salvage: bool) -> Result<Applied> {
    let damage = disk.lost();
    if let (Some(why), false) = (&damage, salvage) {
        return Err(LogError::Damaged(why.clone()).into());
    }
    let memory = Arc::new(MemoryDisk::default());
    for table in [Table::Meta, Table::Log] {
        let mut batch = Batch::default();
        disk.scan(table, &[], &END_OF_KEYS, &mut |key, value| {
            if !(salvage && table == Table::Meta && key == DAMAGE_KEY) {
                batch.put(table, key, value.to_vec());
            }
            true
        })?;
        memory.write(&batch, Durability::Written)?;
    }
    let mut replica = Replica::open(memory.clone(), 0)?.context("the log is empty")?;
    replica.process(&mut |_| {})?;
    let state = image::encode(&replica.state().clone().without_secrets())?;
    Ok(Applied { position: (replica.applied_index(), replica.term()), state, replayed: memory, damage })
}

/// Writes a table's rows and returns how many there are. What cannot be read is an error, or left out where that is wanted.
fn write_rows(
    disk: &dyn Disk,
    table: Table,
    part: &mut Part,
    left_out: &mut Option<Vec<Gap>>,
) -> Result<u64> {
    let (mut after, mut count) = (Vec::new(), 0);
    loop {
        let Stretch { rows, end } = stretch::read(disk, table, &after, ROWS_BYTES)?;
        if let Some((last, _)) = rows.last() {
            after.clone_from(last);
            count += rows.len() as u64;
            part.record(&Record::Rows { table: table.name().into(), rows })?;
        }
        let why = match end {
            End::OfTable => return Ok(count),
            End::Full => continue,
            End::Damage(why) => why,
        };
        let Some(left_out) = left_out else {
            bail!(
                "the history is damaged: {why}; take the backup from another coordinator, or give --salvage, which leaves out what cannot be read"
            );
        };
        let until = stretch::next_readable(disk, table, &after)?;
        let gap = Gap { table: table.name().into(), after, until, why };
        part.record(&Record::LeftOut(gap.clone()))?;
        let next = gap.until.clone();
        left_out.push(gap);
        let Some(next) = next else { return Ok(count) };
        // Read from this one on.
        after = stretch::before(&next);
    }
}

pub(super) fn unix_ms() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_millis() as u64
}
