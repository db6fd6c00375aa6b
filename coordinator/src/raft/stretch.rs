//! Reading a table of the history whose rows may be damaged: stretch by stretch, and on behind what cannot be read.
//!
//! A row is damaged when its seal is broken, and so are all rows of a block that the disk does not give out; which those were is then
//! not known.

use super::disk::{Disk, DiskError, Table};
use super::seal;

/// Above every key.
pub const END_OF_KEYS: [u8; 64] = [0xFF; 64];

pub type Row = (Vec<u8>, Vec<u8>);

/// Rows that follow each other, with their values sealed.
#[derive(Debug, PartialEq, Eq)]
pub struct Stretch {
    pub rows: Vec<Row>,
    pub end: End,
}

/// What comes after a stretch.
#[derive(Debug, PartialEq, Eq)]
pub enum End {
    OfTable,
    /// More rows than were wanted.
    Full,
    /// Something that cannot be read, and why.
    Damage(String),
}

/// The rows behind `after`, or from the first one on where that is empty: until there are so many bytes, but at least one. An error is
/// about the disk as a whole.
pub fn read(
    disk: &(impl Disk + ?Sized),
    table: Table,
    after: &[u8],
    bytes_max: usize,
) -> Result<Stretch, DiskError> {
    let (mut rows, mut bytes, mut end) = (Vec::new(), 0, End::OfTable);
    let scanned = disk.scan(table, &behind(after), &END_OF_KEYS, &mut |key, value| {
        if bytes >= bytes_max {
            end = End::Full;
        } else if seal::open(table, key, value).is_none() {
            end = End::Damage(broken(table, key));
        } else {
            bytes += key.len() + value.len();
            rows.push((key.to_vec(), value.to_vec()));
        }
        end == End::OfTable
    });
    match scanned {
        Ok(()) => Ok(Stretch { rows, end }),
        Err(DiskError::Failed(why)) => Ok(Stretch { rows, end: End::Damage(why) }),
        Err(error) => Err(error),
    }
}

/// Rows of a table of the history that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Damage {
    pub table: Table,
    pub why: String,
}

/// In words.
pub fn broken(table: Table, key: &[u8]) -> String {
    format!("row {} of table {} is damaged", hex::encode(key), table.name())
}

/// The first key that can be read after a stretch that ended in damage behind `after`; `None` where there is none. Where the disk does
/// not even say which keys are there it is looked for in steps that double, so a few good rows between two damaged blocks may be
/// passed over.
pub fn next_readable(
    disk: &(impl Disk + ?Sized),
    table: Table,
    after: &[u8],
) -> Result<Option<Vec<u8>>, DiskError> {
    let mut bad = number(after);
    let mut step = if after.len() > 8 { 1 } else { 1 << 64 };
    // A probe that succeeds, and the row that it found.
    let (mut good, mut found) = loop {
        let probe = bad.saturating_add(step);
        match first(disk, table, &probe.to_be_bytes())? {
            Probe::Row(key) => break (probe, Some(key)),
            Probe::Nothing => break (probe, None),
            Probe::Broken(key) if number(&key) > bad => bad = number(&key),
            Probe::Broken(_) | Probe::Unreadable if probe == u128::MAX => return Ok(None),
            Probe::Broken(_) | Probe::Unreadable => {
                bad = probe;
                step = step.saturating_mul(2);
            }
        }
    };
    while good - bad > 1 {
        let middle = bad + (good - bad) / 2;
        match first(disk, table, &middle.to_be_bytes())? {
            Probe::Row(key) => (good, found) = (middle, Some(key)),
            Probe::Nothing => (good, found) = (middle, None),
            Probe::Broken(_) | Probe::Unreadable => bad = middle,
        }
    }
    Ok(found)
}

enum Probe {
    Row(Vec<u8>),
    Nothing,
    /// The key can be read and its row cannot.
    Broken(Vec<u8>),
    Unreadable,
}

fn first(disk: &(impl Disk + ?Sized), table: Table, from: &[u8]) -> Result<Probe, DiskError> {
    let mut probe = Probe::Nothing;
    let scanned = disk.scan(table, from, &END_OF_KEYS, &mut |key, value| {
        let whole = seal::open(table, key, value).is_some();
        probe = if whole { Probe::Row(key.to_vec()) } else { Probe::Broken(key.to_vec()) };
        false
    });
    match scanned {
        Ok(()) => Ok(probe),
        Err(DiskError::Failed(_)) => Ok(Probe::Unreadable),
        Err(error) => Err(error),
    }
}

/// The least key that is greater, or the least of all.
fn behind(after: &[u8]) -> Vec<u8> {
    let mut from = after.to_vec();
    if !after.is_empty() {
        from.push(0);
    }
    from
}

/// A key that sorts right before this one, among keys of one or two numbers.
pub fn before(key: &[u8]) -> Vec<u8> {
    number(key).saturating_sub(1).to_be_bytes().to_vec()
}

/// Keys are one or two numbers of eight bytes: as one number that sorts like them.
fn number(key: &[u8]) -> u128 {
    let mut bytes = [0; 16];
    let length = key.len().min(16);
    bytes[..length].copy_from_slice(&key[..length]);
    u128::from_be_bytes(bytes)
}

#[cfg(test)]
mod tests {
    use super::super::disk::{Batch, Durability};
    use super::super::memory::MemoryDisk;
    use super::*;
    use crate::cluster::history::key;

    fn events() -> MemoryDisk {
        let disk = MemoryDisk::default();
        let mut batch = Batch::default();
        for n in 0..40u64 {
            let key = key(&[n / 10, n % 10]);
            batch.put(Table::Events, &key, seal::seal(Table::Events, &key, vec![n as u8; 100]));
        }
        disk.write(&batch, Durability::Written).unwrap();
        disk
    }

    fn numbers(stretch: &Stretch) -> Vec<u8> {
        stretch.rows.iter().map(|(_, value)| value[0]).collect()
    }

    #[test]
    fn what_is_damaged_ends_a_stretch_and_the_next_one_begins_behind_it() {
        let disk = events();
        let all = read(&disk, Table::Events, &[], usize::MAX).unwrap();
        assert_eq!((numbers(&all), all.end), ((0..40).collect(), End::OfTable));
        let some = read(&disk, Table::Events, &key(&[1, 3]), 300).unwrap();
        assert_eq!((numbers(&some), some.end), (vec![14, 15, 16], End::Full));
        for row in [17, 18, 25] {
            disk.rot(Table::Events, row, 77);
        }
        let mut seen = Vec::new();
        let (mut after, mut gaps) = (Vec::new(), 0);
        loop {
            let stretch = read(&disk, Table::Events, &after, usize::MAX).unwrap();
            seen.extend(numbers(&stretch));
            let End::Damage(why) = &stretch.end else { break };
            assert!(why.contains("of table events is damaged"), "{why}");
            gaps += 1;
            let last = stretch.rows.last().map_or(after.clone(), |(key, _)| key.clone());
            let next = next_readable(&disk, Table::Events, &last).unwrap().unwrap();
            // Read on from this one.
            after = before(&next);
        }
        assert_eq!((gaps, seen), (2, (0..40).filter(|n| ![17, 18, 25].contains(n)).collect()));
        disk.rot(Table::Events, 39, 5);
        assert_eq!(next_readable(&disk, Table::Events, &key(&[3, 8])).unwrap(), None);
    }
}
