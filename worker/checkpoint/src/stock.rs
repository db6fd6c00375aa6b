//! A checkpoint on this disk that is read from elsewhere: its own files and nothing else.

use crate::manifest::{Manifest, is_manifest, manifest_bytes};
use crate::{CheckpointError, MANIFEST_FILE};
use nix::fcntl::OFlag;
use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

#[derive(Debug)]
pub struct Stock {
    dir: PathBuf,
    manifest: Manifest,
}

impl Stock {
    /// The checkpoint in `dir`, if it is the one whose manifest has this hash.
    pub fn open(dir: &Path, manifest_sha256: &str) -> Result<Stock, CheckpointError> {
        let bytes = manifest_bytes(dir)?;
        if !is_manifest(&bytes, manifest_sha256) {
            return Err(CheckpointError::damaged(dir, "another checkpoint lies there"));
        }
        Ok(Stock { dir: dir.to_owned(), manifest: Manifest::of_bytes(dir, &bytes)? })
    }

    /// A file of it from byte `from` on, and how many there are. What is not in the manifest is not there; links are not followed. The error is
    /// one line.
    pub fn read(&self, name: &str, from: u64) -> Result<(File, u64), String> {
        let expected = match self.manifest.files.get(name) {
            Some(file) => Some(file.bytes),
            None if name == MANIFEST_FILE => None,
            None => return Err(format!("it has no file `{}`", name.escape_default())),
        };
        let named = self.manifest.named(name);
        let open = || {
            let flags = (OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK).bits();
            let mut file = File::options().read(true).custom_flags(flags).open(self.dir.join(name))?;
            let found = file.metadata()?;
            if !found.is_file() {
                return Err(io::Error::other("it is not a file"));
            }
            file.seek(SeekFrom::Start(from))?;
            Ok((file, found.len()))
        };
        match open() {
            Ok((_, bytes)) if expected.is_some_and(|expected| expected != bytes) => {
                Err(format!("{named} has {bytes} bytes and should have {}", expected.unwrap_or_default()))
            }
            Ok((file, bytes)) => Ok((file, bytes.saturating_sub(from))),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Err(format!("{named} is missing")),
            Err(e) => Err(format!("{named} cannot be read: {e}")),
        }
    }
}
