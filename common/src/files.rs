//! Files of fleet's own: whole or absent after a crash, and open to nobody but the user whom fleet runs as, from their first byte.
//!
//! Modes are given where a file is made and do not hang on the umask, which belongs to the programs that a worker starts.

mod claim;
mod kind;
mod new_file;
mod stand_in;

pub use claim::{claim, lock, mend};
pub use kind::Kind;
pub use new_file::NewFile;
pub use stand_in::{StandIn, stand_in};

use nix::sys::stat::Mode;
use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

/// Mode of directories.
const DIR_MODE: u32 = 0o700;
/// Mode of files.
const FILE_MODE: u32 = 0o600;

/// Replaces a file with these bytes, or makes it: see `NewFile`. Its directory must exist. Errors name the path.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = NewFile::create(path)?;
    file.write_all(bytes).map_err(|error| named(path, "write", error))?;
    file.commit()
}

/// How to open a file that is not replaced but written on: a log, a lock. What is made is private.
pub fn private() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.mode(FILE_MODE);
    options
}

/// Reads a text file; `None` where there is none. Errors name the path.
pub fn read_optional(path: &Path) -> io::Result<Option<String>> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(named(path, "read", error)),
    }
}

/// Creates a private directory and its parents; those that exist stay as they are. Errors name the path.
pub fn create_dir(path: &Path) -> io::Result<()> {
    let created = DirBuilder::new().recursive(true).mode(DIR_MODE).create(path);
    created.map_err(|error| named(path, "create", error))
}

/// Makes all that this process creates from now on private, also what libraries create. For a process that starts no programs of
/// others: they would inherit it.
pub fn restrict_process() {
    nix::sys::stat::umask(Mode::from_bits_truncate(0o077));
}

fn named(path: &Path, verb: &str, error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("cannot {verb} {}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn an_error_names_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("absent/key");
        let error = write_atomic(&path, b"x").unwrap_err();
        assert!(error.to_string().contains("absent/key"), "{error}");
        assert_eq!(read_optional(&path).unwrap(), None);
    }

    #[test]
    fn directories_and_opened_files_are_private() {
        let dir = tempfile::tempdir().unwrap();
        let inner = dir.path().join("a/b");
        create_dir(&inner).unwrap();
        private().create(true).append(true).open(inner.join("log")).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(
            [mode(&dir.path().join("a")), mode(&inner), mode(&inner.join("log"))],
            [0o700, 0o700, 0o600]
        );
    }
}
