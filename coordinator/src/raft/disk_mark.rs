//! How far a database had come, in a file outside of it. A database that has lost files which it does not miss itself, or that is an
//! older copy, ends before its mark.
//!
//! Written after every synced write, into the file's two slots in turn, so that one is whole whatever happens. It is not synced with
//! each of them, which would cost a second flush: it outlives the process at once, the power after `SYNC_EVERY` writes or when the
//! kernel has written it back (half a minute as a rule). So it never promises more than there was, and after a power failure perhaps less.

use super::disk::Table;
use super::seal;
use fleet_common::files;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Writes after which the mark is synced: a flush in a thousand.
const SYNC_EVERY: u64 = 1_024;
/// The slots are in different pages.
const SLOT_BYTES: usize = 4_096;
const SLOTS: usize = 2;
const KEY: &[u8] = b"mark";
/// A number and its checksum.
const CONTENT_BYTES: usize = 16;

/// Invariant: `reached` never falls.
pub struct Mark {
    file: File,
    reached: u64,
    writes: u64,
}

impl Mark {
    /// Beside the database's directory.
    pub fn path(database: &Path) -> PathBuf {
        let mut name = database.file_name().unwrap_or_default().to_owned();
        name.push(".mark");
        database.with_file_name(name)
    }

    /// That of a new database.
    pub fn create(path: &Path) -> io::Result<Mark> {
        files::write_atomic(path, &[slot(0), slot(0)].concat())?;
        Mark::open(path)?.ok_or_else(|| io::Error::other(format!("{} was just made", path.display())))
    }

    /// `None` where there is none.
    pub fn open(path: &Path) -> io::Result<Option<Mark>> {
        let Some(reached) = Mark::read(path)? else { return Ok(None) };
        let file = files::private().write(true).open(path).map_err(|error| named(path, &error))?;
        Ok(Some(Mark { file, reached, writes: 0 }))
    }

    /// How far the database had come; `None` where there is no mark. Errors name the path.
    pub fn read(path: &Path) -> io::Result<Option<u64>> {
        let bytes = match std::fs::read(path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(named(path, &error)),
        };
        let whole = bytes.chunks(SLOT_BYTES).take(SLOTS).filter_map(|slot| {
            let payload = seal::open(Table::Meta, KEY, slot.get(..CONTENT_BYTES)?)?;
            payload.try_into().ok().map(u64::from_le_bytes)
        });
        let damaged = || io::Error::new(io::ErrorKind::InvalidData, "both of its slots are damaged");
        whole.max().map(Some).ok_or_else(|| named(path, &damaged()))
    }

    pub fn reached(&self) -> u64 {
        self.reached
    }

    /// The database has come further than was noted before its process or its machine ended. Not written before it goes on.
    pub fn catch_up(&mut self, has: u64) {
        self.reached = self.reached.max(has);
    }

    /// The database has come to here, durably.
    pub fn advance(&mut self, reached: u64) -> io::Result<()> {
        if reached <= self.reached {
            return Ok(());
        }
        self.writes += 1;
        let at = (self.writes as usize % SLOTS) * SLOT_BYTES;
        self.file.write_all_at(&slot(reached)[..CONTENT_BYTES], at as u64)?;
        self.reached = reached;
        if self.writes.is_multiple_of(SYNC_EVERY) { self.file.sync_data() } else { Ok(()) }
    }
}

fn slot(reached: u64) -> Vec<u8> {
    let mut slot = seal::seal(Table::Meta, KEY, reached.to_le_bytes().to_vec());
    slot.resize(SLOT_BYTES, 0);
    slot
}

fn named(path: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_whole_slot_counts_and_a_mark_never_goes_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = Mark::path(&dir.path().join("raft"));
        assert_eq!(Mark::read(&path).unwrap(), None);
        let mut mark = Mark::create(&path).unwrap();
        for reached in [3, 7, 9, 8, 9, 12] {
            mark.advance(reached).unwrap();
        }
        assert_eq!(Mark::read(&path).unwrap(), Some(12));
        assert_eq!(Mark::open(&path).unwrap().unwrap().reached(), 12);
        let intact = std::fs::read(&path).unwrap();
        // The write of either slot may be cut off anywhere: the other one is as it was.
        for (torn, left) in [(0, 9), (1, 12)] {
            let mut bytes = intact.clone();
            bytes[torn * SLOT_BYTES + 5] ^= 1;
            std::fs::write(&path, &bytes).unwrap();
            assert!([left, 9].contains(&Mark::read(&path).unwrap().unwrap()), "slot {torn}");
        }
        std::fs::write(&path, [0; 2 * SLOT_BYTES]).unwrap();
        let why = Mark::read(&path).unwrap_err().to_string();
        assert!(why.contains("raft.mark") && why.contains("damaged"), "{why}");
    }
}
