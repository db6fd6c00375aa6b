//! A file with tensors, and whether it is still what it was when it was opened.

use crate::CheckpointError;
use crate::manifest::Manifest;
use crate::verify::partial;
use fleet_common::files::stand_in;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

/// Bytes of a header; the safetensors library refuses longer ones too.
const HEADER_MAX: u64 = 100_000_000;

/// Bytes of a file that tell what it is.
const HEAD: u64 = 256;

/// A file and how it was when it was opened.
#[derive(Debug)]
pub(crate) struct Shard {
    pub path: PathBuf,
    file: File,
    state: State,
}

#[derive(Debug, PartialEq, Eq)]
struct State {
    len: u64,
    modified: (i64, i64),
}

impl State {
    fn of(file: &File) -> io::Result<State> {
        let found = file.metadata()?;
        Ok(State { len: found.len(), modified: (found.mtime(), found.mtime_nsec()) })
    }
}

impl Shard {
    /// In bytes.
    pub fn len(&self) -> u64 {
        self.state.len
    }

    fn open(path: &Path) -> Result<Shard, CheckpointError> {
        // Opening a FIFO would wait for who never comes.
        if std::fs::metadata(path).is_ok_and(|found| !found.is_file()) {
            return Err(CheckpointError::Tensors { path: path.to_owned(), what: "it is no file".into() });
        }
        let failed = |e| CheckpointError::read(path, e);
        let file = File::open(path).map_err(failed)?;
        let state = State::of(&file).map_err(failed)?;
        Ok(Shard { path: path.to_owned(), file, state })
    }

    /// One that `manifest` names.
    pub fn of_checkpoint(dir: &Path, name: &str, manifest: &Manifest) -> Result<Shard, CheckpointError> {
        let damaged =
            |what: String| CheckpointError::damaged(dir, format!("{} {what}", manifest.named(name)));
        let shard = match Shard::open(&dir.join(name)) {
            Err(CheckpointError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                let partial =
                    manifest.elsewhere(dir).contains(name).then(|| partial(dir, manifest)).flatten();
                return Err(partial.unwrap_or_else(|| damaged("is missing".into())));
            }
            other => other?,
        };
        match manifest.files.get(name).map(|file| file.bytes) {
            Some(bytes) if bytes != shard.state.len => {
                Err(damaged(format!("has {} bytes and should have {bytes}", shard.state.len)))
            }
            _ => Ok(shard),
        }
    }

    /// With the bytes of its header.
    pub fn with_header(path: &Path) -> Result<(Shard, Vec<u8>), CheckpointError> {
        let bad = |what: String| CheckpointError::Tensors { path: path.to_owned(), what };
        let shard = Shard::open(path)?;
        let mut first = vec![0; shard.state.len.min(HEAD) as usize];
        shard.read(0, &mut first)?;
        if let Some(pointer) = stand_in(&first) {
            return Err(bad(format!("it is {}; {}", pointer.name, pointer.cure)));
        }
        let Some(len) = first.first_chunk().map(|len| u64::from_le_bytes(*len)) else {
            return Err(bad(format!("it has {} bytes", first.len())));
        };
        if len > HEADER_MAX || len > shard.state.len - size_of::<u64>() as u64 {
            return Err(bad("its header is longer than it".into()));
        }
        let mut header = vec![0; len as usize];
        shard.read(size_of::<u64>() as u64, &mut header)?;
        Ok((shard, header))
    }

    /// Fills `out` with what lies from byte `at` on.
    pub fn read(&self, at: u64, out: &mut [u8]) -> Result<(), CheckpointError> {
        let failed = |e| CheckpointError::read(&self.path, e);
        let read = self.file.read_exact_at(out, at);
        if State::of(&self.file).map_err(failed)? != self.state {
            return Err(CheckpointError::Tensors {
                path: self.path.clone(),
                what: "it changed while it was being read; start again when it is complete".into(),
            });
        }
        read.map_err(failed)
    }
}
