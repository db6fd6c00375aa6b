//! The database on real files: losses, bad blocks, tables made anew, room.

use super::super::conformance::{self, Kind};
use super::super::replica::Replica;
use super::super::stretch::{self, End, Row, Stretch};
use super::*;
use crate::cluster::State;
use crate::cluster::history::key;
use raft::eraftpb::{Message, MessageType};
use std::sync::Arc;

struct OnDisk {
    dir: tempfile::TempDir,
    count: u32,
}

impl OnDisk {
    fn next(&mut self) -> PathBuf {
        self.count += 1;
        self.dir.path().join(self.count.to_string())
    }

    /// A copy of the files while they are open is what a killed process leaves: nothing of it is closed or flushed. Files that are
    /// not needed any more go while others are copied, which a kill cannot see.
    fn copied_files(&mut self, from: &Path, mark: &Path) -> PathBuf {
        let copy = (0..9).find_map(|_| {
            let to = self.next();
            copy_files(from, &to).ok().map(|()| to)
        });
        let copy = copy.unwrap();
        std::fs::copy(mark, Mark::path(&copy)).unwrap();
        copy
    }
}

fn copy_files(from: &Path, to: &Path) -> io::Result<()> {
    std::fs::create_dir(to)?;
    for file in std::fs::read_dir(from)? {
        let file = file?;
        std::fs::copy(file.path(), to.join(file.file_name()))?;
    }
    Ok(())
}

impl Kind for OnDisk {
    type Disk = RocksDisk;

    fn empty(&mut self) -> RocksDisk {
        RocksDisk::open(&self.next()).unwrap()
    }

    fn killed(&mut self, disk: RocksDisk) -> RocksDisk {
        self.copied(&disk)
    }

    fn copied(&mut self, disk: &RocksDisk) -> RocksDisk {
        RocksDisk::open(&self.copied_files(&disk.path, &Mark::path(&disk.path))).unwrap()
    }

    fn put_back(&mut self, disk: RocksDisk, copy: &RocksDisk) -> RocksDisk {
        RocksDisk::open(&self.copied_files(&copy.path, &Mark::path(&disk.path))).unwrap()
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

/// A closed database with several write-ahead logs, all of which it needs, and how many rounds were written to it.
fn with_logs(dir: &Path) -> (PathBuf, u64) {
    std::fs::create_dir_all(dir).unwrap();
    let raft = dir.join("raft");
    let disk = RocksDisk::open(&raft).unwrap();
    let mut rounds = 0u64;
    while files(&raft, "log").len() < 3 {
        rounds += 1;
        let mut batch = Batch::default();
        batch.put(Table::Meta, b"last", rounds.to_be_bytes().to_vec());
        batch.put(Table::Log, &rounds.to_be_bytes(), vec![7; 100_000]);
        disk.write(&batch, Durability::Synced).unwrap();
    }
    let mut batch = Batch::default();
    batch.put(Table::Meta, b"last", rounds.to_be_bytes().to_vec());
    disk.write(&batch, Durability::Synced).unwrap();
    (raft, rounds)
}

/// The files of this kind, oldest first.
fn files(dir: &Path, kind: &str) -> Vec<PathBuf> {
    let all = std::fs::read_dir(dir).unwrap().map(|file| file.unwrap().path());
    let mut found: Vec<PathBuf> =
        all.filter(|path| path.extension().is_some_and(|found| found == kind)).collect();
    found.sort();
    found
}

/// Why a database does not open, or what it misses.
fn complaint(raft: &Path) -> Option<String> {
    match RocksDisk::open(raft) {
        Ok(disk) => {
            let looked = RocksDisk::open_read_only(raft).map(|disk| disk.lost());
            let (lost, looked) = (disk.lost(), looked.unwrap());
            assert_eq!(lost, looked, "a look finds the same");
            lost
        }
        Err(error) => Some(error.to_string()),
    }
}

#[test]
fn a_database_that_lost_files_is_found_out_whichever_they_are() {
    type Loss = fn(&Path);
    let losses: [(&str, Loss); 6] = [
        ("all logs", |raft| files(raft, "log").iter().for_each(|log| std::fs::remove_file(log).unwrap())),
        ("the newest log", |raft| std::fs::remove_file(files(raft, "log").last().unwrap()).unwrap()),
        ("the oldest log", |raft| std::fs::remove_file(&files(raft, "log")[0]).unwrap()),
        ("the end of the newest log", |raft| {
            let log = std::fs::OpenOptions::new().write(true).open(files(raft, "log").last().unwrap());
            let log = log.unwrap();
            log.set_len(log.metadata().unwrap().len() / 2).unwrap();
        }),
        ("all files", |raft| {
            std::fs::remove_dir_all(raft).unwrap();
            std::fs::create_dir(raft).unwrap();
        }),
        ("the mark", |raft| std::fs::remove_file(Mark::path(raft)).unwrap()),
    ];
    for (what, lose) in losses {
        let dir = tempfile::tempdir().unwrap();
        let (raft, rounds) = with_logs(dir.path());
        let whole = RocksDisk::open(&raft).unwrap();
        assert_eq!(whole.lost(), None);
        let last = whole.get(Table::Meta, b"last").unwrap();
        assert_eq!(last, Some(rounds.to_be_bytes().to_vec()));
        drop(whole);
        let (raft, _) = with_logs(&dir.path().join("again"));
        lose(&raft);
        for time in ["first", "second"] {
            assert!(complaint(&raft).is_some(), "without {what}, {time} time");
        }
    }
}

#[test]
fn a_database_that_was_only_killed_or_moved_misses_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (raft, _) = with_logs(dir.path());
    assert_eq!(complaint(&raft), None);
    let moved = dir.path().join("elsewhere");
    std::fs::rename(&raft, &moved).unwrap();
    std::fs::rename(Mark::path(&raft), Mark::path(&moved)).unwrap();
    assert_eq!(complaint(&moved), None);
}

/// So many rows of about a kilobyte, in order.
fn rows(numbers: std::ops::Range<u64>) -> Vec<Row> {
    let row = |n: u64| {
        let key = key(&[1, n]);
        let content = format!("row {n:05} ").repeat(100).into_bytes();
        (key.clone(), seal::seal(Table::Events, &key, content))
    };
    numbers.map(row).collect()
}

fn put(disk: &RocksDisk, rows: &[Row]) {
    let mut batch = Batch::default();
    rows.iter().for_each(|(key, value)| batch.put(Table::Events, key, value.clone()));
    disk.write(&batch, Durability::Synced).unwrap();
}

/// Moves what is in memory to a sorted file.
fn flush(disk: &RocksDisk) {
    disk.with(|open| {
        open.db.flush_cf(open.family(Table::Events)?).unwrap();
        Ok(())
    })
    .unwrap();
}

/// A database whose events are in a sorted file that has a wrong byte in the middle of row 1000.
fn with_a_bad_block(raft: &Path) {
    let disk = RocksDisk::open(raft).unwrap();
    put(&disk, &rows(0..2_000));
    flush(&disk);
    drop(disk);
    let mark = b"row 01000 row 01000";
    let spoilt = files(raft, "sst").into_iter().filter(|file| {
        let mut bytes = std::fs::read(file).unwrap();
        let Some(at) = bytes.windows(mark.len()).position(|window| window == mark) else { return false };
        bytes[at] ^= 1;
        std::fs::write(file, bytes).unwrap();
        true
    });
    assert_eq!(spoilt.count(), 1);
}

fn all(disk: &RocksDisk) -> Stretch {
    stretch::read(disk, Table::Events, &[], usize::MAX).unwrap()
}

#[test]
fn a_bad_block_costs_its_own_rows_and_what_lies_behind_is_found() {
    let dir = tempfile::tempdir().unwrap();
    let raft = dir.path().join("raft");
    with_a_bad_block(&raft);
    for disk in [RocksDisk::open(&raft).unwrap(), RocksDisk::open_read_only(&raft).unwrap()] {
        assert!(matches!(disk.get(Table::Events, &key(&[1, 1_000])), Err(DiskError::Failed(_))));
        assert!(disk.get(Table::Events, &key(&[1, 900])).unwrap().is_some());
        let before = all(&disk);
        assert!(matches!(&before.end, End::Damage(why) if why.contains("Corruption")), "{:?}", before.end);
        let last = &before.rows.last().unwrap().0;
        let next = stretch::next_readable(&disk, Table::Events, last).unwrap().unwrap();
        let behind = stretch::read(&disk, Table::Events, &stretch::before(&next), usize::MAX).unwrap();
        assert_eq!(behind.end, End::OfTable);
        let there = before.rows.len() + behind.rows.len();
        // Blocks are of four kilobytes.
        assert!((1_990..2_000).contains(&there), "{there} of 2000 rows are left");
    }
}

#[test]
fn damage_that_is_met_while_files_are_merged_does_not_stop_the_log() {
    let dir = tempfile::tempdir().unwrap();
    let raft = dir.path().join("raft");
    with_a_bad_block(&raft);
    let disk = RocksDisk::open(&raft).unwrap();
    put(&disk, &rows(0..2));
    flush(&disk);
    assert_eq!(disk.damaged(), None);
    disk.with(|open| {
        open.db.compact_range_cf(open.family(Table::Events)?, None::<&[u8]>, None::<&[u8]>);
        Ok(())
    })
    .unwrap();
    put(&disk, &rows(2_000..2_001));
    let (table, why) = disk.damaged().unwrap();
    assert!(table == Table::Events && why.contains(".sst"), "{why}");
    for n in 2_001..2_010 {
        put(&disk, &rows(n..n + 1));
        flush(&disk);
    }
    assert!(disk.get(Table::Events, &key(&[1, 2_009])).unwrap().is_some());
}

#[test]
fn a_table_is_made_anew_beside_the_damaged_one() {
    let dir = tempfile::tempdir().unwrap();
    let raft = dir.path().join("raft");
    with_a_bad_block(&raft);
    let disk = RocksDisk::open(&raft).unwrap();
    for step in [Renewal::Begin(Table::Events), Renewal::Rows(rows(0..9))] {
        disk.renew(step).unwrap();
    }
    // One that is interrupted changes nothing.
    drop(disk);
    let disk = RocksDisk::open(&raft).unwrap();
    assert!(matches!(all(&disk).end, End::Damage(_)));
    for step in [Renewal::Begin(Table::Events), Renewal::Drop, Renewal::Begin(Table::Events)] {
        disk.renew(step).unwrap();
    }
    disk.renew(Renewal::Rows(rows(0..1_500))).unwrap();
    put(&disk, &rows(2_000..2_002));
    disk.renew(Renewal::Rows(rows(1_500..2_000))).unwrap();
    assert!(matches!(all(&disk).end, End::Damage(_)), "not yet");
    disk.renew(Renewal::Finish).unwrap();
    put(&disk, &rows(2_002..2_003));
    assert_eq!(all(&disk), Stretch { rows: rows(0..2_003), end: End::OfTable });
    drop(disk);
    for disk in [RocksDisk::open(&raft).unwrap(), RocksDisk::open_read_only(&raft).unwrap()] {
        assert_eq!(all(&disk), Stretch { rows: rows(0..2_003), end: End::OfTable });
        assert_eq!(disk.lost(), None);
    }
    // A second time.
    let disk = RocksDisk::open(&raft).unwrap();
    for step in [Renewal::Begin(Table::Events), Renewal::Rows(rows(0..5)), Renewal::Finish] {
        disk.renew(step).unwrap();
    }
    drop(disk);
    assert_eq!(all(&RocksDisk::open(&raft).unwrap()), Stretch { rows: rows(0..5), end: End::OfTable });
}

#[test]
fn a_table_made_anew_after_the_last_write_went_to_it_is_no_loss() {
    let dir = tempfile::tempdir().unwrap();
    let raft = dir.path().join("raft");
    let disk = RocksDisk::open(&raft).unwrap();
    for n in 0..9 {
        put(&disk, &rows(n..n + 1));
        disk.renew(Renewal::Begin(Table::Events)).unwrap();
        disk.renew(Renewal::Rows(rows(0..n))).unwrap();
        disk.renew(Renewal::Finish).unwrap();
        let opened = dir.path().join(format!("{n}"));
        copy_files(&raft, &opened).unwrap();
        std::fs::copy(Mark::path(&raft), Mark::path(&opened)).unwrap();
        assert_eq!(complaint(&opened), None, "after {n}");
    }
    drop(disk);
    assert_eq!(complaint(&raft), None);
}

#[test]
fn what_was_written_is_there_after_opening_again() {
    let dir = tempfile::tempdir().unwrap();
    let mut batch = Batch::default();
    batch.put(Table::Works, b"k", b"v".to_vec());
    RocksDisk::open(&dir.path().join("raft")).unwrap().write(&batch, Durability::Synced).unwrap();
    let disk = RocksDisk::open(&dir.path().join("raft")).unwrap();
    assert_eq!(disk.get(Table::Works, b"k").unwrap(), Some(b"v".to_vec()));
    disk.recover().unwrap();
    assert_eq!(disk.get(Table::Works, b"k").unwrap(), Some(b"v".to_vec()));
}

#[test]
fn a_disk_without_room_or_read_only_is_not_a_broken_one() {
    assert!(may_pass("IO error: No space left on device: While appending to file: /d/raft/000012.log"));
    assert!(may_pass("IO error: While open a file for appending: /d/raft/000013.sst: Read-only file system"));
    assert!(!may_pass("Corruption: block checksum mismatch"));
    assert!(!may_pass("IO error: While fsync: /d/raft/000012.log: Input/output error"));
}

#[test]
fn a_replica_that_forgot_stays_out_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let open = || Arc::new(RocksDisk::open(&dir.path().join("raft")).unwrap());
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
    let _first = RocksDisk::open(&dir.path().join("raft")).unwrap();
    assert!(matches!(RocksDisk::open(&dir.path().join("raft")), Err(DiskError::Failed(_))));
}
