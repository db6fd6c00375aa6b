//! The disk of a real replica: RocksDB with little memory and one column family per table.
//!
//! A table that was made anew is in a family of a higher generation. Where there are two of a table, the older one counts: the other
//! one was not finished.

use super::disk::{Batch, Disk, DiskError, Durability, Op, Renewal, Table};
use super::disk_mark::Mark;
use super::seal;
use fleet_common::metrics::coordinator::RAFT_FSYNC_SECONDS;
use prometheus::Histogram;
use rocksdb::{
    BlockBasedOptions, Cache, ColumnFamily, ColumnFamilyDescriptor, DB, DBRecoveryMode, Direction, Error,
    IteratorMode, LogLevel, Options, ReadOptions, WriteBatch, WriteOptions,
};
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};
use std::time::Instant;

/// Memory for writes that are not yet in a sorted file, over all tables.
const WRITE_BUFFERS: usize = 8 << 20;
/// One table's share of it; with it goes the size of a write-ahead log file that is allocated ahead.
const WRITE_BUFFER: usize = 2 << 20;
/// The write-ahead log is cut when it is longer than this, which bounds the time to open.
const WAL_MAX: u64 = 8 << 20;
/// Blocks of sorted files kept in memory, over all tables.
const BLOCK_CACHE: usize = 8 << 20;
/// Sorted files held open.
const OPEN_FILES: i32 = 64;
/// Bytes of one sorted file, of the first sorted level, and of what one compaction takes in: it writes as much before it removes, which
/// has to fit into the reserve of a disk that is nearly full.
const SORTED_FILE: u64 = 16 << 20;
const FIRST_LEVEL: u64 = 32 << 20;
const COMPACTION_MAX: u64 = 64 << 20;

/// In RocksDB's default family, where no table is: synced writes so far. RocksDB's own numbers fall when a family is dropped that had the last of them.
const WRITES_KEY: &[u8] = b"writes";

/// What RocksDB says where there is no room, and where the file system was made read-only (by the kernel after an error, or by hand).
const UNWRITABLE: [&str; 5] =
    ["No space left", "NoSpace", "Disk quota exceeded", "Space limit reached", "Read-only file system"];

/// Invariants: `db` is `None` only while `recover` failed to open it again; `mark` is there unless nothing is written, or something is
/// lost, which nothing that is written later makes up for.
pub struct RocksDisk {
    path: PathBuf,
    db: RwLock<Option<Open>>,
    mark: Mutex<Option<Mark>>,
    lost: Option<String>,
    /// Tables of the history whose files RocksDB came upon as damaged when it merged them, which it must not try again.
    damaged: Mutex<BTreeMap<Table, String>>,
    syncs: Histogram,
}

/// An open database.
struct Open {
    db: DB,
    /// Of each table's family, by its place in `Table::ALL`.
    generations: [u32; Table::ALL.len()],
    /// A table in waiting, and its generation.
    renewed: Option<(Table, u32)>,
    cache: Cache,
}

impl Open {
    fn generation(&self, table: Table) -> u32 {
        self.generations[place(table)]
    }

    /// Synced writes so far, as a row tells that is written with each of them.
    fn writes(&self) -> Result<u64, String> {
        let Some(row) = self.db.get(WRITES_KEY).map_err(|error| error.to_string())? else { return Ok(0) };
        let count = seal::open(Table::Meta, WRITES_KEY, &row).and_then(|bytes| bytes.try_into().ok());
        count.map(u64::from_le_bytes).ok_or_else(|| "the row that counts its writes is damaged".into())
    }

    fn family(&self, table: Table) -> Result<&ColumnFamily, DiskError> {
        self.named(table, self.generation(table))
    }

    fn named(&self, table: Table, generation: u32) -> Result<&ColumnFamily, DiskError> {
        let name = family_name(table, generation);
        self.db.cf_handle(&name).ok_or_else(|| DiskError::Failed(format!("table {name} is missing")))
    }

    /// All that what is written to a table goes to.
    fn families(&self, table: Table) -> Result<[Option<&ColumnFamily>; 2], DiskError> {
        let renewed = self.renewed.filter(|(renewed, _)| *renewed == table);
        let renewed = renewed.map(|(table, generation)| self.named(table, generation)).transpose()?;
        Ok([Some(self.family(table)?), renewed])
    }
}

impl RocksDisk {
    /// Opens or creates the database in this directory, with its mark beside it. One that is not there although its mark is makes no new
    /// one.
    pub fn open(path: &Path) -> Result<Self, DiskError> {
        let beside = Mark::path(path);
        let is_new = !path.join("CURRENT").exists();
        let mark = match Mark::open(&beside) {
            Ok(Some(mark)) if is_new && mark.reached() > 0 => {
                return Err(DiskError::Failed(format!(
                    "the database in {} is gone; {} says that it had come to write {}",
                    path.display(),
                    beside.display(),
                    mark.reached()
                )));
            }
            Ok(None) if is_new => Mark::create(&beside).map(Some),
            found => found,
        };
        let mark = readable(mark)?;
        let db = open(path, &BTreeMap::new())?;
        let has = db.writes();
        let lost = lost(&has, &beside, mark.as_ref().map(|mark| mark.as_ref().map(Mark::reached)));
        let mut mark = mark.ok().flatten().filter(|_| lost.is_none());
        if let (Some(mark), Ok(has)) = (&mut mark, has) {
            mark.catch_up(has);
        }
        Ok(RocksDisk::of(path, db, mark, lost))
    }

    fn of(path: &Path, db: Open, mark: Option<Mark>, lost: Option<String>) -> RocksDisk {
        let (db, mark) = (RwLock::new(Some(db)), Mutex::new(mark));
        RocksDisk {
            path: path.to_owned(),
            db,
            mark,
            lost,
            damaged: Mutex::default(),
            syncs: RAFT_FSYNC_SECONDS.histogram(),
        }
    }

    /// A look at the database as it is at this moment. Another process may have it open and go on writing.
    pub fn open_read_only(path: &Path) -> Result<Self, DiskError> {
        RocksDisk::look(path, &options())
    }

    /// What is left of a database that does not open: its write-ahead log up to what is damaged in it, and its other files.
    pub fn salvage(path: &Path) -> Result<Self, DiskError> {
        let whole = RocksDisk::open_read_only(path);
        let Err(DiskError::Failed(why)) = whole else { return whole };
        let mut options = options();
        options.set_paranoid_checks(false);
        options.set_wal_recovery_mode(DBRecoveryMode::PointInTime);
        options.set_track_and_verify_wals_in_manifest(false);
        let left = RocksDisk::look(path, &options).map_err(|_| DiskError::Failed(why.clone()))?;
        Ok(RocksDisk { lost: Some(why), ..left })
    }

    fn look(path: &Path, options: &Options) -> Result<Self, DiskError> {
        // First the mark: what is written meanwhile makes the database longer.
        let beside = Mark::path(path);
        let reached = readable(Mark::read(&beside))?;
        let mut options = options.clone();
        options.create_if_missing(false);
        options.create_missing_column_families(false);
        let (generations, _) = generations(&options, path)?;
        let cache = Cache::new_lru_cache(BLOCK_CACHE);
        let families = descriptors(&generations, &cache, &BTreeMap::new());
        let db = DB::open_cf_descriptors_read_only(&options, path, families, false);
        let db = db.map_err(|error| classify(path, &error))?;
        let open = Open { db, generations, renewed: None, cache };
        let lost = lost(&open.writes(), &beside, reached.as_ref().copied());
        Ok(RocksDisk::of(path, open, None, lost))
    }

    /// How long synced writes took.
    pub fn syncs(&self) -> &Histogram {
        &self.syncs
    }

    fn read(&self) -> RwLockReadGuard<'_, Option<Open>> {
        self.db.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn with<T>(&self, act: impl FnOnce(&Open) -> Result<T, DiskError>) -> Result<T, DiskError> {
        match self.read().as_ref() {
            Some(db) => act(db),
            None => {
                Err(DiskError::Unwritable(format!("{} could not be opened again yet", self.path.display())))
            }
        }
    }

    fn error(&self, error: Error) -> DiskError {
        classify(&self.path, &error)
    }

    fn damages(&self) -> MutexGuard<'_, BTreeMap<Table, String>> {
        self.damaged.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does what may fail because RocksDB came upon damage when it merged files: it refuses all writes from then on. If those were files of
    /// the history, of which nothing that is written depends, they are left alone and it is tried again.
    fn in_spite_of_damage(&self, act: impl Fn() -> Result<(), DiskError>) -> Result<(), DiskError> {
        match act() {
            Err(DiskError::Failed(why)) if self.sets_aside(&why)? => act(),
            done => done,
        }
    }

    fn sets_aside(&self, why: &str) -> Result<bool, DiskError> {
        let Some(file) = damaged_file(why) else { return Ok(false) };
        let table = self.with(|open| {
            let files = open.db.live_files().map_err(|error| self.error(error))?;
            let family = files.into_iter().find(|found| found.name.trim_start_matches('/') == file);
            let names = |table: &Table| family_name(*table, open.generation(*table));
            Ok(family.and_then(|found| {
                Table::HISTORY.into_iter().find(|table| names(table) == found.column_family_name)
            }))
        })?;
        let Some(table) = table else { return Ok(false) };
        if self.damages().insert(table, why.to_owned()).is_some() {
            return Ok(false);
        }
        self.recover()?;
        Ok(true)
    }

    fn write_once(&self, batch: &Batch, durability: Durability) -> Result<(), DiskError> {
        self.with(|open| {
            let mut native = WriteBatch::default();
            for op in &batch.ops {
                let (Op::Put { table, .. } | Op::DeleteRange { table, .. }) = op;
                for family in open.families(*table)?.into_iter().flatten() {
                    match op {
                        Op::Put { key, value, .. } => native.put_cf(family, key, value),
                        Op::DeleteRange { from, to, .. } => native.delete_range_cf(family, from, to),
                    }
                }
            }
            let mut options = WriteOptions::default();
            options.set_sync(durability == Durability::Synced);
            // Held over the write: what the mark says then is synced.
            let mut mark = self.mark.lock().unwrap_or_else(PoisonError::into_inner);
            let mark = mark.as_mut().filter(|_| durability == Durability::Synced);
            if let Some(mark) = &mark {
                let count = (mark.reached() + 1).to_le_bytes().to_vec();
                native.put(WRITES_KEY, seal::seal(Table::Meta, WRITES_KEY, count));
            }
            let begun = Instant::now();
            open.db.write_opt(native, &options).map_err(|error| self.error(error))?;
            let kept = mark.map_or(Ok(()), |mark| mark.advance(mark.reached() + 1));
            if durability == Durability::Synced {
                self.syncs.observe(begun.elapsed().as_secs_f64());
            }
            kept.map_err(|error| unmarked(&Mark::path(&self.path), &error))
        })
    }

    fn renew_once(&self, step: &Renewal) -> Result<(), DiskError> {
        let mut guard = self.db.write().unwrap_or_else(PoisonError::into_inner);
        let Some(open) = guard.as_mut() else {
            drop(guard);
            return self.with(|_| Ok(()));
        };
        if let (Renewal::Begin(_) | Renewal::Drop, Some((table, generation))) = (step, open.renewed) {
            let dropped = open.db.drop_cf(&family_name(table, generation));
            dropped.map_err(|error| self.error(error))?;
            open.renewed = None;
        }
        match (step, open.renewed) {
            (Renewal::Begin(table), None) => {
                let generation = open.generation(*table) + 1;
                let options = family_options(&open.cache, false);
                let made = open.db.create_cf(family_name(*table, generation), &options);
                made.map_err(|error| self.error(error))?;
                open.renewed = Some((*table, generation));
            }
            (Renewal::Rows(rows), Some((table, generation))) => {
                let mut native = WriteBatch::default();
                let family = open.named(table, generation)?;
                rows.iter().for_each(|(key, value)| native.put_cf(family, key, value));
                open.db.write(native).map_err(|error| self.error(error))?;
            }
            (Renewal::Finish, Some((table, generation))) => {
                let flushed = open.db.flush_cf(open.named(table, generation)?);
                flushed.map_err(|error| self.error(error))?;
                let old = family_name(table, open.generation(table));
                open.db.drop_cf(&old).map_err(|error| self.error(error))?;
                open.generations[place(table)] = generation;
                open.renewed = None;
                self.damages().remove(&table);
            }
            _ => {}
        }
        Ok(())
    }
}

impl Disk for RocksDisk {
    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Vec<u8>>, DiskError> {
        self.with(|open| open.db.get_cf(open.family(table)?, key).map_err(|error| self.error(error)))
    }

    fn scan(
        &self,
        table: Table,
        from: &[u8],
        to: &[u8],
        visit: &mut dyn FnMut(&[u8], &[u8]) -> bool,
    ) -> Result<(), DiskError> {
        if from >= to {
            return Ok(());
        }
        self.with(|open| {
            let mut options = ReadOptions::default();
            options.set_iterate_upper_bound(to);
            let mode = IteratorMode::From(from, Direction::Forward);
            for row in open.db.iterator_cf_opt(open.family(table)?, options, mode) {
                let (key, value) = row.map_err(|error| self.error(error))?;
                if !visit(&key, &value) {
                    break;
                }
            }
            Ok(())
        })
    }

    fn write(&self, batch: &Batch, durability: Durability) -> Result<(), DiskError> {
        self.in_spite_of_damage(|| self.write_once(batch, durability))
    }

    fn renew(&self, step: Renewal) -> Result<(), DiskError> {
        self.in_spite_of_damage(|| self.renew_once(&step))
    }

    fn damaged(&self) -> Option<(Table, String)> {
        self.damages().first_key_value().map(|(table, why)| (*table, why.clone()))
    }

    /// Drops the files that have nothing else: a compaction, which needs room itself, does the rest in its time.
    fn reclaim(&self, table: Table, from: &[u8], to: &[u8]) -> Result<(), DiskError> {
        self.with(|open| {
            let reclaimed = open.db.delete_file_in_range_cf(open.family(table)?, from, to);
            reclaimed.map_err(|error| self.error(error))
        })
    }

    /// RocksDB refuses all writes after one that could not be made, until it is opened again.
    fn recover(&self) -> Result<(), DiskError> {
        let mut db = self.db.write().unwrap_or_else(PoisonError::into_inner);
        *db = None;
        let opened = open(&self.path, &self.damages())?;
        let mark = self.mark.lock().unwrap_or_else(PoisonError::into_inner);
        let reached = mark.as_ref().map(Mark::reached);
        if let Some(lost) =
            reached.and_then(|reached| lost(&opened.writes(), &Mark::path(&self.path), Ok(Some(reached))))
        {
            return Err(DiskError::Failed(lost));
        }
        *db = Some(opened);
        Ok(())
    }

    fn lost(&self) -> Option<String> {
        self.lost.clone()
    }
}

/// What the mark knows and the database does not have.
fn lost(has: &Result<u64, String>, mark: &Path, reached: Result<Option<u64>, &io::Error>) -> Option<String> {
    let mark = mark.display();
    let has = match has {
        Ok(has) => *has,
        Err(why) => return Some(why.clone()),
    };
    match reached {
        Ok(Some(reached)) if has >= reached => None,
        Ok(Some(reached)) => Some(format!(
            "it ends at write {has} and had come to {reached}, as {mark} says: files of it are gone or cut off, or it is an older copy"
        )),
        Ok(None) => Some(format!("{mark} is gone, which says how far it had come")),
        Err(error) => Some(format!("how far it had come cannot be read: {error}")),
    }
}

/// A mark that is damaged tells nothing; one that cannot be read at the moment is no reason to give a replica up.
fn readable<T>(mark: io::Result<T>) -> Result<io::Result<T>, DiskError> {
    match mark {
        Err(error) if error.kind() != io::ErrorKind::InvalidData => Err(may_pass_or_not(error.to_string())),
        mark => Ok(mark),
    }
}

/// The batch is durable, but what promises it is not written. It may be written again.
fn unmarked(path: &Path, error: &io::Error) -> DiskError {
    may_pass_or_not(format!("cannot write {}: {error}", path.display()))
}

/// Those that are damaged are not merged.
fn open(path: &Path, damaged: &BTreeMap<Table, String>) -> Result<Open, DiskError> {
    let options = options();
    let (generations, unfinished) = match path.join("CURRENT").exists() {
        true => generations(&options, path)?,
        false => ([0; Table::ALL.len()], Vec::new()),
    };
    let cache = Cache::new_lru_cache(BLOCK_CACHE);
    let mut families = descriptors(&generations, &cache, damaged);
    // It opens with all of its families or not at all.
    families.extend(
        unfinished.iter().map(|name| ColumnFamilyDescriptor::new(name, family_options(&cache, false))),
    );
    let db = DB::open_cf_descriptors(&options, path, families).map_err(|error| classify(path, &error));
    let mut db = db?;
    for name in &unfinished {
        db.drop_cf(name).map_err(|error| classify(path, &error))?;
    }
    Ok(Open { db, generations, renewed: None, cache })
}

/// The generation of each table that counts, and the families that were not finished.
fn generations(options: &Options, path: &Path) -> Result<([u32; Table::ALL.len()], Vec<String>), DiskError> {
    let names = DB::list_cf(options, path).map_err(|error| classify(path, &error))?;
    let (mut counts, mut unfinished) = ([0; Table::ALL.len()], Vec::new());
    for table in Table::ALL {
        let generation = |name: &String| match name.strip_prefix(table.name())? {
            "" => Some(0),
            rest => rest.strip_prefix('.')?.parse::<u32>().ok(),
        };
        let mut found: Vec<u32> = names.iter().filter_map(generation).collect();
        found.sort_unstable();
        counts[place(table)] = found.first().copied().unwrap_or_default();
        unfinished.extend(found.iter().skip(1).map(|generation| family_name(table, *generation)));
    }
    Ok((counts, unfinished))
}

fn descriptors(
    generations: &[u32; Table::ALL.len()],
    cache: &Cache,
    damaged: &BTreeMap<Table, String>,
) -> Vec<ColumnFamilyDescriptor> {
    let describe = |table: Table| {
        let options = family_options(cache, damaged.contains_key(&table));
        ColumnFamilyDescriptor::new(family_name(table, generations[place(table)]), options)
    };
    Table::ALL.map(describe).into()
}

fn family_name(table: Table, generation: u32) -> String {
    match generation {
        0 => table.name().to_owned(),
        _ => format!("{}.{generation}", table.name()),
    }
}

/// In `Table::ALL`.
fn place(table: Table) -> usize {
    Table::ALL.iter().position(|known| *known == table).unwrap_or_default()
}

fn family_options(cache: &Cache, is_damaged: bool) -> Options {
    let mut blocks = BlockBasedOptions::default();
    blocks.set_block_cache(cache);
    blocks.set_cache_index_and_filter_blocks(true);
    let mut options = Options::default();
    options.set_block_based_table_factory(&blocks);
    options.set_write_buffer_size(WRITE_BUFFER);
    options.set_target_file_size_base(SORTED_FILE);
    options.set_max_bytes_for_level_base(FIRST_LEVEL);
    options.set_max_compaction_bytes(COMPACTION_MAX);
    options.set_disable_auto_compactions(is_damaged);
    options
}

fn options() -> Options {
    let mut options = Options::default();
    options.create_if_missing(true);
    options.create_missing_column_families(true);
    options.set_paranoid_checks(true);
    // A record cut off at the end was never acknowledged; damage before the end is an error and not a shorter log.
    options.set_wal_recovery_mode(DBRecoveryMode::TolerateCorruptedTailRecords);
    // A write-ahead log before the newest one that is gone or shorter is an error too; the newest one is the mark's to miss.
    options.set_track_and_verify_wals_in_manifest(true);
    options.set_db_write_buffer_size(WRITE_BUFFERS);
    options.set_max_total_wal_size(WAL_MAX);
    options.set_max_open_files(OPEN_FILES);
    options.set_max_background_jobs(2);
    options.set_skip_stats_update_on_db_open(true);
    options.set_stats_dump_period_sec(0);
    options.set_log_level(LogLevel::Error);
    options.set_keep_log_file_num(1);
    options
}

/// The name of the sorted file of which RocksDB says that it is damaged.
fn damaged_file(why: &str) -> Option<&str> {
    if !why.contains("Corruption") {
        return None;
    }
    let end = why.find(".sst")? + ".sst".len();
    let begin = why[..end].rfind(['/', ' ']).map_or(0, |at| at + 1);
    Some(&why[begin..end])
}

/// RocksDB tells causes in text only.
fn classify(path: &Path, error: &Error) -> DiskError {
    may_pass_or_not(format!("{}: {error}", path.display()))
}

fn may_pass_or_not(what: String) -> DiskError {
    if may_pass(&what) { DiskError::Unwritable(what) } else { DiskError::Failed(what) }
}

fn may_pass(text: &str) -> bool {
    UNWRITABLE.iter().any(|mark| text.contains(mark))
}

#[cfg(test)]
mod tests;
