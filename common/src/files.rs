//! Files that are whole or absent after a crash, and private from their first byte where they hold a secret.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};

/// Mode of files that anyone may read.
pub const PUBLIC: u32 = 0o644;
/// Mode of files that hold a secret.
pub const SECRET: u32 = 0o600;

/// Writes a file under another name with this mode, syncs it, renames it over `path` and syncs the directory, which must exist.
/// Errors name the path.
pub fn write_atomic(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    // Two threads of one process may write the same file; the last rename wins.
    static COUNTER: AtomicU32 = AtomicU32::new(0);
    let unique = COUNTER.fetch_add(1, Ordering::Relaxed);
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}-{unique}.tmp", std::process::id()));
    let temporary = path.with_file_name(name);
    let written = write_new(&temporary, bytes, mode).and_then(|()| fs::rename(&temporary, path));
    if let Err(error) = written {
        let _ = fs::remove_file(&temporary);
        return Err(named(path, "write", error));
    }
    let directory = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(directory).and_then(|d| d.sync_all()).map_err(|error| named(directory, "sync", error))
}

/// Reads a text file; `None` where there is none. Errors name the path.
pub fn read_optional(path: &Path) -> io::Result<Option<String>> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(named(path, "read", error)),
    }
}

/// Creates a directory and its parents. Errors name the path.
pub fn create_dir(path: &Path) -> io::Result<()> {
    fs::create_dir_all(path).map_err(|error| named(path, "create", error))
}

fn write_new(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

fn named(path: &Path, verb: &str, error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("cannot {verb} {}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_file_is_replaced_whole_with_its_mode_and_leaves_nothing_beside_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        write_atomic(&path, b"old and longer", PUBLIC).unwrap();
        write_atomic(&path, b"new", SECRET).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn an_error_names_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("absent/key");
        let error = write_atomic(&path, b"x", SECRET).unwrap_err();
        assert!(error.to_string().contains("absent/key"), "{error}");
        assert_eq!(read_optional(&path).unwrap(), None);
    }
}
