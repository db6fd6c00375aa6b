//! The disk of a real replica: RocksDB with little memory and one column family per table.

use super::disk::{Batch, Disk, DiskError, Durability, Op, Table};
use rocksdb::{
    BlockBasedOptions, Cache, ColumnFamilyDescriptor, DB, DBRecoveryMode, Direction, Error, IteratorMode,
    LogLevel, Options, ReadOptions, WriteBatch, WriteOptions,
};
use std::path::{Path, PathBuf};
use std::sync::{PoisonError, RwLock, RwLockReadGuard};

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

/// What RocksDB says where there is no room, and where the file system was made read-only (by the kernel after an error, or by hand).
const UNWRITABLE: [&str; 5] =
    ["No space left", "NoSpace", "Disk quota exceeded", "Space limit reached", "Read-only file system"];

/// Invariant: `db` is `None` only while `recover` failed to open it again.
pub struct RocksDisk {
    path: PathBuf,
    db: RwLock<Option<DB>>,
}

impl RocksDisk {
    /// Opens or creates the database in this directory.
    pub fn open(path: &Path) -> Result<Self, DiskError> {
        let db = open(path)?;
        Ok(RocksDisk { path: path.to_owned(), db: RwLock::new(Some(db)) })
    }

    /// A look at the database as it is at this moment. Another process may have it open and go on writing.
    pub fn open_read_only(path: &Path) -> Result<Self, DiskError> {
        let (mut options, families) = options();
        options.create_if_missing(false);
        options.create_missing_column_families(false);
        let db = DB::open_cf_descriptors_read_only(&options, path, families, false);
        let db = db.map_err(|error| classify(path, &error))?;
        Ok(RocksDisk { path: path.to_owned(), db: RwLock::new(Some(db)) })
    }

    fn read(&self) -> RwLockReadGuard<'_, Option<DB>> {
        self.db.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn with<T>(&self, act: impl FnOnce(&DB) -> Result<T, DiskError>) -> Result<T, DiskError> {
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
}

impl Disk for RocksDisk {
    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Vec<u8>>, DiskError> {
        self.with(|db| db.get_cf(family(db, table)?, key).map_err(|error| self.error(error)))
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
        self.with(|db| {
            let mut options = ReadOptions::default();
            options.set_iterate_upper_bound(to);
            let mode = IteratorMode::From(from, Direction::Forward);
            for row in db.iterator_cf_opt(family(db, table)?, options, mode) {
                let (key, value) = row.map_err(|error| self.error(error))?;
                if !visit(&key, &value) {
                    break;
                }
            }
            Ok(())
        })
    }

    fn write(&self, batch: &Batch, durability: Durability) -> Result<(), DiskError> {
        self.with(|db| {
            let mut native = WriteBatch::default();
            for op in &batch.ops {
                match op {
                    Op::Put { table, key, value } => native.put_cf(family(db, *table)?, key, value),
                    Op::DeleteRange { table, from, to } => {
                        native.delete_range_cf(family(db, *table)?, from, to)
                    }
                }
            }
            let mut options = WriteOptions::default();
            options.set_sync(durability == Durability::Synced);
            db.write_opt(native, &options).map_err(|error| self.error(error))
        })
    }

    /// Drops the files that have nothing else: a compaction, which needs room itself, does the rest in its time.
    fn reclaim(&self, table: Table, from: &[u8], to: &[u8]) -> Result<(), DiskError> {
        self.with(|db| {
            db.delete_file_in_range_cf(family(db, table)?, from, to).map_err(|error| self.error(error))
        })
    }

    /// RocksDB refuses all writes after one that could not be made, until it is opened again.
    fn recover(&self) -> Result<(), DiskError> {
        let mut db = self.db.write().unwrap_or_else(PoisonError::into_inner);
        *db = None;
        *db = Some(open(&self.path)?);
        Ok(())
    }
}

fn open(path: &Path) -> Result<DB, DiskError> {
    let (options, families) = options();
    DB::open_cf_descriptors(&options, path, families).map_err(|error| classify(path, &error))
}

fn options() -> (Options, Vec<ColumnFamilyDescriptor>) {
    let mut options = Options::default();
    options.create_if_missing(true);
    options.create_missing_column_families(true);
    options.set_paranoid_checks(true);
    // A record cut off at the end was never acknowledged; damage before the end is an error and not a shorter log.
    options.set_wal_recovery_mode(DBRecoveryMode::TolerateCorruptedTailRecords);
    options.set_db_write_buffer_size(WRITE_BUFFERS);
    options.set_max_total_wal_size(WAL_MAX);
    options.set_max_open_files(OPEN_FILES);
    options.set_max_background_jobs(2);
    options.set_skip_stats_update_on_db_open(true);
    options.set_stats_dump_period_sec(0);
    options.set_log_level(LogLevel::Error);
    options.set_keep_log_file_num(1);
    let cache = Cache::new_lru_cache(BLOCK_CACHE);
    let families = Table::ALL.map(|table| {
        let mut blocks = BlockBasedOptions::default();
        blocks.set_block_cache(&cache);
        blocks.set_cache_index_and_filter_blocks(true);
        let mut options = Options::default();
        options.set_block_based_table_factory(&blocks);
        options.set_write_buffer_size(WRITE_BUFFER);
        options.set_target_file_size_base(SORTED_FILE);
        options.set_max_bytes_for_level_base(FIRST_LEVEL);
        options.set_max_compaction_bytes(COMPACTION_MAX);
        ColumnFamilyDescriptor::new(table.name(), options)
    });
    (options, families.into())
}

fn family(db: &DB, table: Table) -> Result<&rocksdb::ColumnFamily, DiskError> {
    db.cf_handle(table.name()).ok_or_else(|| DiskError::Failed(format!("table {} is missing", table.name())))
}

/// RocksDB tells causes in text only.
fn classify(path: &Path, error: &Error) -> DiskError {
    let text = error.to_string();
    let what = format!("{}: {text}", path.display());
    if may_pass(&text) { DiskError::Unwritable(what) } else { DiskError::Failed(what) }
}

fn may_pass(text: &str) -> bool {
    UNWRITABLE.iter().any(|mark| text.contains(mark))
}

#[cfg(test)]
mod tests {
    use super::super::conformance::{self, Kind};
    use super::super::replica::Replica;
    use super::*;
    use crate::cluster::State;
    use raft::eraftpb::{Message, MessageType};
    use std::sync::Arc;

    struct OnDisk {
        dir: tempfile::TempDir,
        count: u32,
    }

    impl Kind for OnDisk {
        type Disk = RocksDisk;

        fn empty(&mut self) -> RocksDisk {
            self.count += 1;
            RocksDisk::open(&self.dir.path().join(self.count.to_string())).unwrap()
        }

        /// A copy of the files while they are open is what a killed process leaves: nothing of it is closed or flushed.
        fn killed(&mut self, disk: RocksDisk) -> RocksDisk {
            let copied = |to: &Path| -> std::io::Result<()> {
                std::fs::create_dir(to)?;
                for file in std::fs::read_dir(&disk.path)? {
                    let file = file?;
                    std::fs::copy(file.path(), to.join(file.file_name()))?;
                }
                Ok(())
            };
            // Files that are not needed any more go while others are copied, which a kill cannot see.
            let copy = (0..9).find_map(|_| {
                self.count += 1;
                let to = self.dir.path().join(self.count.to_string());
                copied(&to).ok().map(|()| to)
            });
            RocksDisk::open(&copy.unwrap()).unwrap()
        }

        fn without_power(&mut self, _: RocksDisk) -> Option<RocksDisk> {
            None
        }

        /// Only a file system of its own could be filled: `tests/tests/cluster.rs` does that.
        fn fill(&mut self, _: &RocksDisk, _: bool) -> bool {
            false
        }
    }

    #[test]
    fn behaves_as_a_disk() {
        conformance::check(&mut OnDisk { dir: tempfile::tempdir().unwrap(), count: 0 });
    }

    #[test]
    fn what_was_written_is_there_after_opening_again() {
        let dir = tempfile::tempdir().unwrap();
        let mut batch = Batch::default();
        batch.put(Table::Works, b"k", b"v".to_vec());
        RocksDisk::open(dir.path()).unwrap().write(&batch, Durability::Synced).unwrap();
        let disk = RocksDisk::open(dir.path()).unwrap();
        assert_eq!(disk.get(Table::Works, b"k").unwrap(), Some(b"v".to_vec()));
        disk.recover().unwrap();
        assert_eq!(disk.get(Table::Works, b"k").unwrap(), Some(b"v".to_vec()));
    }

    #[test]
    fn a_disk_without_room_or_read_only_is_not_a_broken_one() {
        assert!(may_pass("IO error: No space left on device: While appending to file: /d/raft/000012.log"));
        assert!(may_pass(
            "IO error: While open a file for appending: /d/raft/000013.sst: Read-only file system"
        ));
        assert!(!may_pass("Corruption: block checksum mismatch"));
        assert!(!may_pass("IO error: While fsync: /d/raft/000012.log: Input/output error"));
    }

    #[test]
    fn a_replica_that_forgot_stays_out_after_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let open = || Arc::new(RocksDisk::open(dir.path()).unwrap());
        let mut replica = Replica::create(open(), 1, &[1, 2, 3], State::new("test".into()), 7).unwrap();
        let mut heartbeat = Message { to: 1, from: 2, term: 5, commit: 9, ..Message::default() };
        heartbeat.set_msg_type(MessageType::MsgHeartbeat);
        replica.step(heartbeat).unwrap();
        let stopped = replica.process(&mut |_| {}).unwrap_err().to_string();
        drop(replica);
        assert_eq!(Replica::open(open(), 7).err().unwrap().to_string(), stopped);
    }

    #[test]
    fn what_is_removed_gives_its_room_back_without_a_compaction_of_all() {
        let dir = tempfile::tempdir().unwrap();
        let disk = RocksDisk::open(dir.path()).unwrap();
        let bytes = || -> u64 {
            let files = std::fs::read_dir(dir.path()).unwrap().flatten();
            files.map(|file| file.metadata().map_or(0, |found| found.len())).sum()
        };
        let key = |job: u64, index: u64| [job.to_be_bytes(), index.to_be_bytes()].concat();
        // Not to be compressed: every row has other bytes.
        let mut state = 0x9E37_79B9_7F4A_7C15_u64;
        for job in 1..=200 {
            let mut batch = Batch::default();
            for index in 0..100 {
                let noise = std::iter::repeat_with(|| {
                    state = state.wrapping_mul(0x5851_F42D_4C95_7F2D).wrapping_add(1);
                    (state >> 56) as u8
                });
                batch.put(Table::Events, &key(job, index), noise.take(4_000).collect());
            }
            disk.write(&batch, Durability::Written).unwrap();
        }
        let full = bytes();
        assert!(full > 70 << 20, "{} MiB", full >> 20);
        let (from, to) = (1u64.to_be_bytes(), 190u64.to_be_bytes());
        let mut batch = Batch::default();
        batch.delete_range(Table::Events, &from, &to);
        disk.write(&batch, Durability::Synced).unwrap();
        // Files of the level to which they are written first go when they come to the next one.
        let begun = std::time::Instant::now();
        while bytes() > full / 2 {
            assert!(begun.elapsed().as_secs() < 60, "{} of {} MiB are left", bytes() >> 20, full >> 20);
            disk.reclaim(Table::Events, &from, &to).unwrap();
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        assert_eq!(disk.get(Table::Events, &key(189, 99)).unwrap(), None);
        assert!(disk.get(Table::Events, &key(190, 0)).unwrap().is_some());
        let mut left = 0;
        disk.scan(Table::Events, &[], &[0xFF; 17], &mut |_, _| {
            left += 1;
            true
        })
        .unwrap();
        assert_eq!(left, 11 * 100);
    }

    #[test]
    fn a_second_opening_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let _first = RocksDisk::open(dir.path()).unwrap();
        assert!(matches!(RocksDisk::open(dir.path()), Err(DiskError::Failed(_))));
    }
}
