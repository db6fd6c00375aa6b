//! Tests of the log, on the simulated disk: what a restart finds after any power failure.

use super::super::memory::MemoryDisk;
use super::*;

fn entry(index: u64, term: u64) -> Entry {
    Entry { index, term, data: format!("{index}.{term}").into_bytes(), ..Entry::default() }
}

fn hard(term: u64, commit: u64) -> HardState {
    HardState { term, vote: 1, commit }
}

/// Entries kept behind a snapshot.
const KEEP: u64 = 1_000;
const KEPT: Keep = Keep { entries: KEEP, bytes: u64::MAX };

fn new_log() -> LogStore<MemoryDisk> {
    LogStore::create(Arc::new(MemoryDisk::default()), 1, &[1], b"genesis".to_vec()).unwrap()
}

fn append(log: &mut LogStore<MemoryDisk>, entries: Vec<Entry>, hard: HardState) {
    let staged = log.stage(entries, Some(hard)).unwrap();
    log.write(&staged, Durability::Synced).unwrap();
}

fn reopen(log: &LogStore<MemoryDisk>) -> Result<LogStore<MemoryDisk>, LogError> {
    LogStore::open(Arc::new(log.disk().after_power_failure(0))).map(|log| log.unwrap())
}

fn terms(log: &LogStore<MemoryDisk>) -> Vec<(u64, u64)> {
    let (first, last) = (log.first_index().unwrap(), log.last_index().unwrap());
    let entries = log.entries(first, last + 1, None, GetEntriesContext::empty(false)).unwrap();
    entries.iter().map(|entry| (entry.index, entry.term)).collect()
}

#[test]
fn a_conflicting_tail_is_replaced_in_memory_and_on_disk() {
    let mut log = new_log();
    append(&mut log, vec![entry(2, 1), entry(3, 1), entry(4, 1)], hard(1, 2));
    append(&mut log, vec![entry(3, 2)], hard(2, 3));
    assert_eq!(terms(&log), [(2, 1), (3, 2)]);
    assert_eq!(terms(&reopen(&log).unwrap()), [(2, 1), (3, 2)]);
    assert_eq!(log.term(3).unwrap(), 2);
    assert!(log.term(4).is_err());
}

#[test]
fn an_empty_disk_has_no_log() {
    assert!(LogStore::open(Arc::new(MemoryDisk::default())).unwrap().is_none());
}

#[test]
fn hard_state_and_membership_survive() {
    let mut log = new_log();
    append(&mut log, vec![entry(2, 3)], hard(3, 2));
    let state = reopen(&log).unwrap().initial_state().unwrap();
    assert_eq!((state.hard_state.term, state.hard_state.vote, state.hard_state.commit), (3, 1, 2));
    assert_eq!(state.conf_state.voters, [1]);
}

#[test]
fn a_log_with_less_than_it_promised_does_not_open() {
    let mut log = new_log();
    append(&mut log, (2..8).map(|index| entry(index, 1)).collect(), hard(1, 2));
    for (what, from, to) in [("ends at entry 6", 7u64, 8u64), ("entry 4 is missing", 4, 5)] {
        let disk = log.disk().after_power_failure(0);
        let mut batch = Batch::default();
        batch.delete_range(Table::Log, &from.to_be_bytes(), &to.to_be_bytes());
        disk.write(&batch, Durability::Synced).unwrap();
        let error = LogStore::open(Arc::new(disk)).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains(what), "{error}");
    }
}

#[test]
fn a_log_of_another_format_is_refused_and_not_marked() {
    let log = new_log();
    let mut batch = Batch::default();
    put(&mut batch, FORMAT_KEY, &FormatRow { version: FORMAT + 1, replica: 1 }).unwrap();
    log.disk().write(&batch, Durability::Synced).unwrap();
    let error = reopen(&log).err().unwrap();
    assert_eq!(error, LogError::Format { found: FORMAT + 1 });
    let why = error.to_string();
    assert!(why.contains(&format!("format {}, this program knows {FORMAT}", FORMAT + 1)), "{why}");
}

#[test]
fn damage_that_was_found_is_found_again_even_if_the_disk_is_well_by_then() {
    let mut log = new_log();
    append(&mut log, vec![entry(2, 1), entry(3, 1)], hard(1, 2));
    let disk = Arc::new(log.disk().after_power_failure(0));
    let last = disk.get(Table::Log, &3u64.to_be_bytes()).unwrap().unwrap();
    disk.lose_rows(Table::Log, 1);
    let found = LogStore::open(disk.clone()).err().unwrap();
    assert!(found.to_string().contains("it ends at entry 2 and promised 3"), "{found}");
    let mut batch = Batch::default();
    batch.put(Table::Log, &3u64.to_be_bytes(), last);
    disk.write(&batch, Durability::Synced).unwrap();
    let disk = Arc::new(disk.after_power_failure(0));
    assert_eq!(LogStore::open(disk).err().unwrap(), found);
}

#[test]
fn a_flipped_bit_is_named() {
    let mut log = new_log();
    append(&mut log, vec![entry(2, 1), entry(3, 1)], hard(1, 2));
    let places =
        [(Table::Log, 2u64.to_be_bytes().to_vec(), "entry 2"), (Table::Meta, HARD_KEY.to_vec(), "hard row")];
    for (table, key, named) in places {
        let disk = log.disk().after_power_failure(0);
        let mut value = disk.get(table, &key).unwrap().unwrap();
        value[1] ^= 4;
        let mut batch = Batch::default();
        batch.put(table, &key, value);
        disk.write(&batch, Durability::Synced).unwrap();
        let error = LogStore::open(Arc::new(disk)).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains(named), "{error}");
    }
}

#[test]
fn compaction_drops_the_oldest_entries_and_keeps_the_rest_readable() {
    let mut log = new_log();
    let last = 3 * KEEP;
    append(&mut log, (2..=last).map(|index| entry(index, 1)).collect(), hard(1, last));
    let at = Position { index: last - 5, term: 1 };
    let staged = log.stage_compaction(at, log.conf().clone(), b"later".to_vec(), KEPT).unwrap();
    log.write(&staged, Durability::Synced).unwrap();
    let reopened = reopen(&log).unwrap();
    for log in [&log, &reopened] {
        assert_eq!(log.first_index().unwrap(), last - 5 - KEEP + 1);
        assert_eq!(terms(log).len() as u64, KEEP + 5);
        assert_eq!(log.snapshot_state().unwrap(), b"later");
        assert!(matches!(
            log.entries(2, 3, None, GetEntriesContext::empty(false)),
            Err(raft::Error::Store(StorageError::Compacted))
        ));
    }
}

#[test]
fn the_log_behind_a_snapshot_is_bounded_in_bytes_also_after_a_restart() {
    let mut log = new_log();
    let large = |index: u64| Entry { data: vec![7; 10_000], ..entry(index, 1) };
    append(&mut log, (2..=101).map(large).collect(), hard(1, 50));
    let bytes = log.bytes();
    assert!((1_000_000..1_100_000).contains(&bytes), "{bytes}");
    assert_eq!(reopen(&log).unwrap().bytes(), bytes);
    // Those from the 92nd on are written anew: nothing is counted twice.
    append(&mut log, (92..=101).map(large).collect(), hard(1, 101));
    assert_eq!(log.bytes(), bytes);
    let compact = |log: &mut LogStore<MemoryDisk>, index, bytes| {
        let keep = Keep { entries: KEEP, bytes };
        let at = Position { index, term: 1 };
        let staged = log.stage_compaction(at, log.conf().clone(), b"later".to_vec(), keep).unwrap();
        log.write(&staged, Durability::Synced).unwrap();
    };
    compact(&mut log, 91, 105_000);
    assert_eq!(log.first_index().unwrap(), 82, "ten entries before the snapshot and ten behind it");
    assert_eq!(log.bytes(), bytes / 100 * 20);
    compact(&mut log, 101, 1);
    assert_eq!((log.first_index().unwrap(), log.bytes()), (102, 0));
    append(&mut log, vec![large(102)], hard(1, 101));
    assert_eq!(reopen(&log).unwrap().bytes(), log.bytes());
    assert_eq!(log.bytes(), bytes / 100);
}

#[test]
fn compacting_at_the_very_beginning_keeps_the_log() {
    let mut log = new_log();
    append(&mut log, vec![entry(2, 1), entry(3, 1)], hard(1, 3));
    let staged = log.stage_compaction(GENESIS, log.conf().clone(), b"same".to_vec(), KEPT).unwrap();
    log.write(&staged, Durability::Synced).unwrap();
    assert_eq!(terms(&log), [(2, 1), (3, 1)]);
    assert_eq!(terms(&reopen(&log).unwrap()), [(2, 1), (3, 1)]);
}

#[test]
fn a_leaders_snapshot_replaces_everything() {
    let mut log = new_log();
    append(&mut log, vec![entry(2, 1), entry(3, 1)], hard(1, 2));
    let conf = ConfState { voters: vec![1, 2, 3], ..ConfState::default() };
    let metadata = SnapshotMetadata { conf_state: Some(conf), index: 900, term: 4 };
    let snapshot = Snapshot { data: b"theirs".to_vec(), metadata: Some(metadata) };
    let staged = log.stage_installation(&snapshot, Some(hard(4, 900))).unwrap();
    log.write(&staged, Durability::Synced).unwrap();
    let reopened = reopen(&log).unwrap();
    for log in [&log, &reopened] {
        assert_eq!(
            (log.first_index().unwrap(), log.last_index().unwrap(), log.term(900).unwrap()),
            (901, 900, 4)
        );
        assert_eq!(log.snapshot_state().unwrap(), b"theirs");
        assert_eq!(log.conf().voters, [1, 2, 3]);
    }
}

#[test]
fn entries_outside_the_cache_come_from_the_disk_and_respect_the_size() {
    let mut log = new_log();
    let big = |index| Entry { index, term: 1, data: vec![7; 1 << 20], ..Entry::default() };
    append(&mut log, (2..12).map(big).collect(), hard(1, 2));
    assert!(log.tail.len() < 10);
    let entries = log.entries(2, 12, None, GetEntriesContext::empty(false)).unwrap();
    assert_eq!(entries.iter().map(|entry| entry.index).collect::<Vec<_>>(), (2..12).collect::<Vec<_>>());
    assert_eq!(log.entries(2, 12, 1, GetEntriesContext::empty(false)).unwrap().len(), 1);
    assert_eq!(log.entries(2, 12, 3 << 20, GetEntriesContext::empty(false)).unwrap().len(), 2);
}

#[test]
fn a_full_disk_changes_nothing_and_the_same_write_works_later() {
    let mut log = new_log();
    let staged = log.stage(vec![entry(2, 1)], Some(hard(1, 2))).unwrap();
    log.disk().set_full(true);
    assert!(matches!(log.write(&staged, Durability::Synced), Err(DiskError::Unwritable(_))));
    assert_eq!(log.last_index().unwrap(), 1);
    log.disk().set_full(false);
    log.write(&staged, Durability::Synced).unwrap();
    assert_eq!(terms(&reopen(&log).unwrap()), [(2, 1)]);
}
