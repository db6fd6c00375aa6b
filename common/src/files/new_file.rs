//! A file that is written beside the one that it will replace, and takes its place in one step.

use super::named;
use nix::fcntl::OFlag;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File, TryLockError};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use tempfile::NamedTempFile;

/// Between the file's name and the end of a temporary one there is chance, so that no two writers meet.
const ENDING: &str = ".tmp";
/// Another writer may take a new file for a dead one's before it is locked.
const ATTEMPTS: usize = 10;

/// A private file in the making. Dropped before `commit` it is removed; after a kill the next writer of the same file removes it, which it
/// knows by the lock that ended with its process.
#[derive(Debug)]
pub struct NewFile {
    path: PathBuf,
    temporary: NamedTempFile,
}

impl NewFile {
    /// Begins what will be at `path`. Refuses to replace anything but a regular file of this user's: no device, no directory, no
    /// symbolic link (what that points to may be chosen by somebody else). Errors name the path.
    pub fn create(path: &Path) -> io::Result<NewFile> {
        check_target(path)?;
        let named = |error| named(path, "write", error);
        let name = path.file_name().ok_or_else(|| named(io::ErrorKind::InvalidFilename.into()))?;
        remove_leftovers(directory(path), &beginning(name));
        for _ in 0..ATTEMPTS {
            let mut builder = tempfile::Builder::new();
            let beginning = beginning(name);
            let temporary = builder.prefix(&beginning).suffix(ENDING).tempfile_in(directory(path));
            let temporary = temporary.map_err(named)?;
            if is_locked_and_there(temporary.as_file()).map_err(named)? {
                return Ok(NewFile { path: path.to_owned(), temporary });
            }
        }
        Err(named(io::Error::other("others remove what it begins")))
    }

    /// Syncs the file, puts it in its place and syncs the directory. Errors name the path.
    pub fn commit(self) -> io::Result<()> {
        let NewFile { path, temporary } = self;
        let written = temporary.as_file().sync_all().and_then(|()| check_target(&path));
        let placed = written.and_then(|()| temporary.persist(&path).map_err(|error| error.error));
        placed.map_err(|error| named(&path, "write", error))?;
        let directory = directory(&path);
        let synced = File::open(directory).and_then(|directory| directory.sync_all());
        synced.map_err(|error| named(directory, "sync", error))
    }
}

impl Write for NewFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.temporary.as_file_mut().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.temporary.as_file_mut().flush()
    }
}

fn directory(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

fn beginning(name: &OsStr) -> OsString {
    let mut beginning = OsString::from(".");
    beginning.push(name);
    beginning.push(".");
    beginning
}

fn check_target(path: &Path) -> io::Result<()> {
    let refused = |what: String| {
        let what = format!("{} {what}; name another file", path.display());
        Err(io::Error::new(io::ErrorKind::InvalidInput, what))
    };
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(named(path, "look at", error)),
        Ok(there) if !there.is_file() => {
            refused("is not a regular file, and nothing else is replaced".to_owned())
        }
        Ok(there) if there.uid() != nix::unistd::geteuid().as_raw() => {
            refused(format!("belongs to another user (uid {}) and is not replaced", there.uid()))
        }
        Ok(_) => Ok(()),
    }
}

/// Whether the lock by which others see that its writer lives was taken before any of them looked.
fn is_locked_and_there(file: &File) -> io::Result<bool> {
    match file.try_lock() {
        Err(TryLockError::WouldBlock) => Ok(false),
        // Where there are no locks, nobody takes one and nobody removes anything.
        Err(TryLockError::Error(error)) if error.kind() != io::ErrorKind::Unsupported => Err(error),
        _ => Ok(file.metadata()?.nlink() > 0),
    }
}

/// Removes what writers of the same file that are dead have left. What cannot be removed is in nobody's way.
fn remove_leftovers(directory: &Path, beginning: &OsStr) {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let is_temporary = |name: &OsStr| {
        let (name, beginning) = (name.as_encoded_bytes(), beginning.as_encoded_bytes());
        name.starts_with(beginning) && name.ends_with(ENDING.as_bytes())
    };
    for entry in entries.filter(|entry| is_temporary(&entry.file_name())) {
        // Nothing that lies there under such a name is followed or waited for.
        let flags = (OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK).bits();
        let Ok(file) = File::options().read(true).custom_flags(flags).open(entry.path()) else { continue };
        if file.metadata().is_ok_and(|file| file.is_file()) && file.try_lock().is_ok() {
            let _ = fs::remove_file(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::write_atomic;
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn a_file_is_replaced_whole_and_private_and_leaves_nothing_beside_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        fs::write(&path, "old and longer").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        write_atomic(&path, b"new").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        drop(NewFile::create(&path).unwrap());
        assert_eq!(names(dir.path()), ["key"]);
    }

    #[test]
    fn what_a_killed_writer_left_goes_and_what_a_living_one_writes_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        let mut living = NewFile::create(&path).unwrap();
        living.write_all(b"slow").unwrap();
        // As a kill leaves it: a file without a lock. The other one is of another file.
        fs::write(dir.path().join(".key.aB3dE6.tmp"), "half").unwrap();
        fs::write(dir.path().join(".keys.aB3dE6.tmp"), "half").unwrap();
        write_atomic(&path, b"quick").unwrap();
        assert_eq!(names(dir.path()).len(), 3, "{:?}", names(dir.path()));
        living.commit().unwrap();
        assert_eq!(names(dir.path()), [".keys.aB3dE6.tmp", "key"]);
        assert_eq!(fs::read(&path).unwrap(), b"slow");
    }

    #[test]
    fn many_writers_of_one_file_all_succeed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        std::thread::scope(|scope| {
            for writer in 0..8u8 {
                let path = &path;
                scope.spawn(move || (0..40).for_each(|_| write_atomic(path, &[writer; 100]).unwrap()));
            }
        });
        let last = fs::read(&path).unwrap();
        assert!(last.len() == 100 && last.iter().all(|byte| *byte == last[0]));
        assert_eq!(names(dir.path()), ["key"]);
    }

    #[test]
    fn only_a_regular_file_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let (link, target) = (dir.path().join("link"), dir.path().join("target"));
        fs::write(&target, "mine").unwrap();
        symlink(&target, &link).unwrap();
        fs::create_dir(dir.path().join("dir")).unwrap();
        for path in [Path::new("/dev/null"), &link, &dir.path().join("dir")] {
            let why = write_atomic(path, b"x").unwrap_err();
            assert_eq!(why.kind(), io::ErrorKind::InvalidInput);
            assert!(why.to_string().contains("is not a regular file"), "{why}");
        }
        assert_eq!(fs::read(&target).unwrap(), b"mine");
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
    }
}
