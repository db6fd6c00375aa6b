//! What every disk must do. Both implementations pass it, so that what the simulator proves holds for the real one, but for what a
//! test cannot do to a real disk: take its power away.

use super::disk::{Batch, Disk, DiskError, Durability, Renewal, Table};

/// A kind of disk, as this suite handles it.
pub trait Kind {
    type Disk: Disk;

    /// One that was never written to.
    fn empty(&mut self) -> Self::Disk;

    /// What the next process finds after this one was killed.
    fn killed(&mut self, disk: Self::Disk) -> Self::Disk;

    /// What a machine finds after a power failure. `None` where a test cannot take the power away.
    fn without_power(&mut self, disk: Self::Disk) -> Option<Self::Disk>;

    /// A copy of it as it is.
    fn copied(&mut self, disk: &Self::Disk) -> Self::Disk;

    /// What the next process finds after the rows of a copy were put in the place of this disk's, whose mark stays.
    fn put_back(&mut self, disk: Self::Disk, copy: &Self::Disk) -> Self::Disk;

    /// Lets the disk be full or not; false where a test cannot.
    fn fill(&mut self, disk: &Self::Disk, full: bool) -> bool;
}

/// Checks a kind of disk. Panics with what differs.
pub fn check<K: Kind>(kind: &mut K) {
    tables_are_apart(&kind.empty());
    scans_are_ordered_and_bounded(&kind.empty());
    batches_apply_in_order(&kind.empty());
    bytes_are_bytes(&kind.empty());
    what_was_written_outlives_the_process(kind);
    what_was_synced_outlives_the_power(kind);
    a_full_disk_takes_nothing_and_keeps_all(kind);
    what_was_synced_and_is_gone_is_missed(kind);
    a_table_is_made_anew(kind);
}

fn rows(disk: &dyn Disk, table: Table, from: &[u8], to: &[u8]) -> Vec<(Vec<u8>, Vec<u8>)> {
    let mut found = Vec::new();
    let scanned = disk.scan(table, from, to, &mut |key, value| {
        found.push((key.to_vec(), value.to_vec()));
        true
    });
    assert_eq!(scanned, Ok(()));
    found
}

fn put(disk: &dyn Disk, table: Table, key: &[u8], value: &[u8], durability: Durability) {
    let mut batch = Batch::default();
    batch.put(table, key, value.to_vec());
    assert_eq!(disk.write(&batch, durability), Ok(()));
}

fn tables_are_apart(disk: &dyn Disk) {
    for table in Table::ALL {
        put(disk, table, b"k", table.name().as_bytes(), Durability::Written);
    }
    for table in Table::ALL {
        assert_eq!(disk.get(table, b"k"), Ok(Some(table.name().as_bytes().to_vec())));
        assert_eq!(disk.get(table, b"absent"), Ok(None));
    }
    let mut batch = Batch::default();
    batch.delete_range(Table::Log, b"a", b"z");
    assert_eq!(disk.write(&batch, Durability::Synced), Ok(()));
    assert_eq!(disk.get(Table::Log, b"k"), Ok(None));
    assert_eq!(disk.get(Table::Events, b"k"), Ok(Some(b"events".to_vec())));
}

fn scans_are_ordered_and_bounded(disk: &dyn Disk) {
    for n in [5u64, 1, 300, 2, 256] {
        put(disk, Table::Log, &n.to_be_bytes(), &[n as u8], Durability::Written);
    }
    let keys = |from: u64, to: u64| -> Vec<u64> {
        let found = rows(disk, Table::Log, &from.to_be_bytes(), &to.to_be_bytes());
        found.iter().map(|(key, _)| key.iter().fold(0, |n, byte| n << 8 | u64::from(*byte))).collect()
    };
    assert_eq!(keys(0, u64::MAX), [1, 2, 5, 256, 300]);
    assert_eq!(keys(2, 300), [2, 5, 256]);
    assert_eq!(keys(3, 5), [0u64; 0]);
    assert_eq!(keys(5, 3), [0u64; 0]);
    let mut seen = 0;
    let stopped = disk.scan(Table::Log, &[], &[255], &mut |_, _| {
        seen += 1;
        seen < 2
    });
    assert_eq!((stopped, seen), (Ok(()), 2));
}

fn batches_apply_in_order(disk: &dyn Disk) {
    put(disk, Table::Log, b"b", b"old", Durability::Synced);
    let mut batch = Batch::default();
    batch.put(Table::Log, b"a", b"gone".to_vec());
    batch.delete_range(Table::Log, b"a", b"c");
    batch.put(Table::Log, b"b", b"new".to_vec());
    batch.put(Table::Log, b"c", b"1".to_vec());
    batch.put(Table::Log, b"c", b"2".to_vec());
    assert_eq!(disk.write(&batch, Durability::Synced), Ok(()));
    let expected = [(b"b".to_vec(), b"new".to_vec()), (b"c".to_vec(), b"2".to_vec())];
    assert_eq!(rows(disk, Table::Log, b"", b"z"), expected);
    assert_eq!(disk.write(&Batch::default(), Durability::Synced), Ok(()));
}

/// A batch over several tables that puts rows, replaces one and deletes another.
fn round(n: u8) -> Batch {
    let mut batch = Batch::default();
    for table in Table::ALL {
        batch.put(table, &[n], vec![n; 100]);
        batch.put(table, b"last", vec![n]);
        batch.delete_range(table, &[n - 1], &[n]);
    }
    batch
}

/// The newest round whose rows are there, which must be all of its rows and no others.
fn whole_round(disk: &dyn Disk) -> u8 {
    let last =
        disk.get(Table::Meta, b"last").expect("what was written can be read").map_or(0, |value| value[0]);
    for table in Table::ALL {
        let expected = match last {
            0 => Vec::new(),
            n => vec![(vec![n], vec![n; 100]), (b"last".to_vec(), vec![n])],
        };
        assert_eq!(rows(disk, table, b"", &[0xFF]), expected, "{}", table.name());
    }
    last
}

fn what_was_written_outlives_the_process<K: Kind>(kind: &mut K) {
    let mut disk = kind.empty();
    for n in 1..6 {
        let durability = if n % 2 == 0 { Durability::Synced } else { Durability::Written };
        assert_eq!(disk.write(&round(n), durability), Ok(()));
        disk = kind.killed(disk);
        assert_eq!(whole_round(&disk), n);
    }
}

/// A synced write makes all before it durable; of those after it a prefix is there, each whole.
fn what_was_synced_outlives_the_power<K: Kind>(kind: &mut K) {
    let disk = kind.empty();
    for (n, durability) in [(1, Durability::Written), (2, Durability::Synced), (3, Durability::Written)] {
        assert_eq!(disk.write(&round(n), durability), Ok(()));
    }
    if let Some(after) = kind.without_power(disk) {
        assert!((2..=3).contains(&whole_round(&after)));
        assert_eq!(after.write(&round(4), Durability::Synced), Ok(()));
    }
}

fn a_full_disk_takes_nothing_and_keeps_all<K: Kind>(kind: &mut K) {
    let disk = kind.empty();
    assert_eq!(disk.write(&round(1), Durability::Synced), Ok(()));
    if !kind.fill(&disk, true) {
        return;
    }
    for durability in [Durability::Written, Durability::Synced] {
        let written = disk.write(&round(2), durability);
        assert!(matches!(written, Err(DiskError::Unwritable(_))), "{written:?}");
        assert_eq!(whole_round(&disk), 1);
    }
    kind.fill(&disk, false);
    assert_eq!(disk.recover(), Ok(()));
    assert_eq!(disk.write(&round(2), Durability::Synced), Ok(()));
    assert_eq!(whole_round(&kind.killed(disk)), 2);
}

/// An older copy in the place of the disk is found out, for good; whatever was not synced may be missing.
fn what_was_synced_and_is_gone_is_missed<K: Kind>(kind: &mut K) {
    let mut disk = kind.empty();
    assert_eq!(disk.lost(), None);
    for n in 1..4 {
        assert_eq!(disk.write(&round(n), Durability::Synced), Ok(()));
    }
    let copy = kind.copied(&disk);
    assert_eq!((copy.lost(), whole_round(&copy)), (None, 3));
    disk = kind.put_back(disk, &copy);
    assert_eq!(disk.lost(), None, "nothing was written since");
    assert_eq!(disk.write(&round(4), Durability::Written), Ok(()));
    disk = kind.killed(disk);
    assert_eq!((disk.lost(), whole_round(&disk)), (None, 4));
    disk = kind.put_back(disk, &copy);
    assert_eq!((disk.lost(), whole_round(&disk)), (None, 3), "what was not synced is not promised");
    assert_eq!(disk.write(&round(4), Durability::Synced), Ok(()));
    disk = kind.put_back(disk, &copy);
    for _ in 0..2 {
        assert!(disk.lost().is_some(), "round 4 was synced and is gone");
        // What is written to it, such as that it is damaged, does not make up for it.
        put(&disk, Table::Meta, b"damage", b"said", Durability::Synced);
        assert_eq!(disk.get(Table::Meta, b"damage"), Ok(Some(b"said".to_vec())));
        disk = kind.killed(disk);
    }
}

/// What is written meanwhile goes to both; until it is finished the old one counts, also after a kill.
fn a_table_is_made_anew<K: Kind>(kind: &mut K) {
    let pairs = |keys: &[u8]| keys.iter().map(|key| (vec![*key], b"row".to_vec())).collect::<Vec<_>>();
    let mut disk = kind.empty();
    for table in [Table::Events, Table::Works] {
        put(&disk, table, b"a", b"row", Durability::Synced);
    }
    for finishes in [false, true] {
        for step in [Renewal::Begin(Table::Works), Renewal::Begin(Table::Events), Renewal::Rows(pairs(b"b"))]
        {
            assert_eq!(disk.renew(step), Ok(()));
        }
        put(&disk, Table::Events, b"c", b"row", Durability::Written);
        put(&disk, Table::Events, b"d", b"row", Durability::Written);
        let mut batch = Batch::default();
        batch.delete_range(Table::Events, b"d", b"e");
        assert_eq!(disk.write(&batch, Durability::Written), Ok(()));
        assert_eq!(rows(&disk, Table::Events, b"", b"z"), pairs(b"ac"));
        if finishes {
            assert_eq!(disk.renew(Renewal::Finish), Ok(()));
            assert_eq!(disk.renew(Renewal::Finish), Ok(()), "nothing was begun");
        }
        disk = kind.killed(disk);
        assert_eq!(rows(&disk, Table::Events, b"", b"z"), pairs(if finishes { b"bc" } else { b"ac" }));
        assert_eq!(rows(&disk, Table::Works, b"", b"z"), pairs(b"a"));
        assert_eq!((disk.lost(), disk.damaged()), (None, None));
    }
}

fn bytes_are_bytes(disk: &dyn Disk) {
    let large = vec![0xA5; 3 << 20];
    put(disk, Table::Meta, &[0, 255, 0], &[], Durability::Written);
    put(disk, Table::Meta, &[0, 255], &large, Durability::Synced);
    assert_eq!(disk.get(Table::Meta, &[0, 255, 0]), Ok(Some(Vec::new())));
    assert_eq!(disk.get(Table::Meta, &[0, 255]), Ok(Some(large)));
    assert_eq!(disk.recover(), Ok(()));
    assert_eq!(disk.get(Table::Meta, &[0, 255, 0]), Ok(Some(Vec::new())));
}
