//! Directories that are being made: what stands there before they are whole goes with an error, and with a signal that ends the process.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// Those of this process.
static ALL: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());

/// Attempts to remove a directory to which somebody writes.
const ATTEMPTS: usize = 100;

/// A directory that is removed when this is dropped before it is `whole`.
#[derive(Debug)]
pub struct Unfinished {
    path: PathBuf,
}

impl Unfinished {
    pub fn new(path: &Path) -> Unfinished {
        all(|all| all.insert(path.to_owned()));
        Unfinished { path: path.to_owned() }
    }

    /// It stays.
    pub fn whole(self) {
        all(|all| all.remove(&self.path));
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if all(|all| all.remove(&self.path)) {
            let _ = fs::remove_dir_all(&self.path); // an error says why it is of no use
        }
    }
}

/// Removes all that this process has begun and not finished: it ends now.
pub fn remove_unfinished() {
    all(std::mem::take).iter().for_each(|path| remove(path));
}

/// Others of this process's threads may still write there.
fn remove(path: &Path) {
    let _ = (0..ATTEMPTS).find(|_| fs::remove_dir_all(path).is_ok() || !path.exists());
}

fn all<R>(work: impl FnOnce(&mut BTreeSet<PathBuf>) -> R) -> R {
    work(&mut ALL.lock().unwrap_or_else(PoisonError::into_inner))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_whole_goes() {
        let dir = tempfile::tempdir().unwrap();
        let begin = |name: &str| {
            let path = dir.path().join(name);
            fs::create_dir(&path).unwrap();
            fs::write(path.join("file"), "some").unwrap();
            (Unfinished::new(&path), path)
        };
        let ((whole, one), (dropped, two)) = (begin("one"), begin("two"));
        whole.whole();
        drop(dropped);
        assert!(one.exists() && !two.exists());
        let (held, three) = begin("three");
        assert!(all(|all| all.contains(&three) && !all.contains(&one) && !all.contains(&two)));
        remove(&three);
        drop(held);
        assert!(!three.exists());
    }
}
