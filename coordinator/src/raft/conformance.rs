//! What every disk must do. Both implementations pass it, so that what the simulator proves holds for the real one.

use super::disk::{Batch, Disk, Durability, Table};

/// Checks a kind of disk. `open` is called with a number; the same number gives what was left under it, if the kind outlives its
/// handle at all. Panics with what differs.
pub fn check(open: &mut dyn FnMut(u32) -> Box<dyn Disk>) {
    tables_are_apart(open(1).as_ref());
    scans_are_ordered_and_bounded(open(2).as_ref());
    batches_apply_in_order(open(3).as_ref());
    bytes_are_bytes(open(4).as_ref());
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

fn bytes_are_bytes(disk: &dyn Disk) {
    let large = vec![0xA5; 3 << 20];
    put(disk, Table::Meta, &[0, 255, 0], &[], Durability::Written);
    put(disk, Table::Meta, &[0, 255], &large, Durability::Synced);
    assert_eq!(disk.get(Table::Meta, &[0, 255, 0]), Ok(Some(Vec::new())));
    assert_eq!(disk.get(Table::Meta, &[0, 255]), Ok(Some(large)));
    assert_eq!(disk.recover(), Ok(()));
    assert_eq!(disk.get(Table::Meta, &[0, 255, 0]), Ok(Some(Vec::new())));
}
