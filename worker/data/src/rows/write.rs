//! The files of a cache of rows: all tokens one after the other, a bit for each that says whether it carries loss, and for each part an
//! index of its items.

use crate::DataError;
use crate::cache::{LOSS, ROW_TOKENS};
use crate::windows::Width;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

/// Where a sequence stands: its first token, and how many there are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Span {
    pub start: u64,
    pub len: u32,
}

/// How much is written.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(super) struct Written {
    tokens: u64,
    /// Bits of the byte that is not full yet.
    bits: u8,
}

impl Written {
    /// How many bytes of each file that are.
    pub fn files(self, width: Width) -> [(&'static str, u64); 2] {
        [(ROW_TOKENS, self.tokens * width.bytes() as u64), (LOSS, self.tokens / 8)]
    }
}

/// Writes sequences as they come.
pub(super) struct Writer {
    tokens: Hashed,
    loss: Hashed,
    width: Width,
    written: Written,
}

impl Writer {
    /// Goes on behind what is written, of which all must be there.
    pub fn open(dir: &Path, width: Width, written: Written) -> Result<Writer, DataError> {
        let [tokens, loss] = written.files(width).map(|(name, bytes)| Hashed::open(&dir.join(name), bytes));
        Ok(Writer { tokens: tokens?, loss: loss?, width, written })
    }

    /// What is on the disk then.
    pub fn sync(&mut self) -> Result<Written, DataError> {
        self.tokens.sync()?;
        self.loss.sync()?;
        Ok(self.written)
    }

    pub fn add(&mut self, ids: &[u32], learnt: &[bool]) -> Result<Span, DataError> {
        let mut bytes = Vec::with_capacity(ids.len() * self.width.bytes());
        self.width.encode(ids, &mut bytes);
        self.tokens.write(&bytes)?;
        bytes.clear();
        let Written { tokens, bits } = &mut self.written;
        let start = *tokens;
        for learnt in learnt {
            *bits |= u8::from(*learnt) << (*tokens % 8);
            *tokens += 1;
            if tokens.is_multiple_of(8) {
                bytes.push(std::mem::take(bits));
            }
        }
        self.loss.write(&bytes)?;
        Ok(Span { start, len: ids.len() as u32 })
    }

    /// SHA-256 of both files, which are on the disk then.
    pub fn finish(mut self) -> Result<(String, String), DataError> {
        if !self.written.tokens.is_multiple_of(8) {
            self.loss.write(&[self.written.bits])?;
        }
        Ok((self.tokens.finish()?, self.loss.finish()?))
    }
}

struct Hashed {
    path: PathBuf,
    file: BufWriter<File>,
    hasher: Sha256,
}

impl Hashed {
    /// With its first `len` bytes.
    fn open(path: &Path, len: u64) -> Result<Hashed, DataError> {
        let open = || {
            let mut file = File::options().create(true).read(true).append(true).open(path)?;
            file.set_len(len)?;
            let mut hasher = Sha256::new();
            io::copy(&mut file, &mut hasher)?;
            Ok(Hashed { path: path.to_owned(), file: BufWriter::new(file), hasher })
        };
        open().map_err(|source| failed(path, source))
    }

    fn sync(&mut self) -> Result<(), DataError> {
        let synced = self.file.flush().and_then(|()| self.file.get_ref().sync_all());
        synced.map_err(|source| failed(&self.path, source))
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), DataError> {
        self.hasher.update(bytes);
        self.file.write_all(bytes).map_err(|source| failed(&self.path, source))
    }

    fn finish(self) -> Result<String, DataError> {
        let Hashed { path, file, hasher } = self;
        let synced =
            file.into_inner().map_err(io::IntoInnerError::into_error).and_then(|file| file.sync_all());
        synced.map_err(|source| failed(&path, source))?;
        Ok(hex::encode(hasher.finalize()))
    }
}

fn failed(path: &Path, source: io::Error) -> DataError {
    DataError::Write { path: path.to_owned(), source }
}

/// An index: for each item, and once more at the end, the number of its first sequence; then of each sequence its first token and its
/// length; all of 8 bytes, little-endian.
pub(super) fn index(items: &[Vec<Span>]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut first = 0u64;
    for item in items {
        bytes.extend(first.to_le_bytes());
        first += item.len() as u64;
    }
    bytes.extend(first.to_le_bytes());
    for span in items.iter().flatten() {
        bytes.extend(span.start.to_le_bytes());
        bytes.extend(u64::from(span.len).to_le_bytes());
    }
    bytes
}
