//! The directory of a run: one process writes there at a time, and what another run left there is not touched unasked.

use crate::CheckpointError;
use crate::search::{self, Found};
use crate::writer::{TEMPORARY, create_dir_durably, sync_dir};
use std::fs::{self, File, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Held by the process that writes here; no reader looks at it.
const LOCK: &str = ".lock";

/// A process that was killed a moment ago still holds its lock; so does one that only looks whether it could write.
const LOCK_WAIT: Duration = Duration::from_secs(2);
const LOCK_POLL: Duration = Duration::from_millis(20);

/// Written and synced to see whether a checkpoint could be.
const PROBE_BYTES: usize = 4096;

/// Who wants to write checkpoints where.
#[derive(Clone, Copy, Debug)]
pub struct Claim<'a> {
    /// Made if missing.
    pub dir: &'a Path,
    /// The name of a run that begins; one that continues a checkpoint of `dir` has that one's name. Never empty.
    pub run: &'a str,
    /// The checkpoint that it continues from.
    pub resumed: Option<&'a Path>,
    /// What other runs left in `dir` may go.
    pub overwrite: bool,
}

/// A directory of checkpoints that this process writes to until it drops this. Others are kept out by a lock, where the file system
/// has locks.
#[derive(Debug)]
pub struct RunDir {
    dir: PathBuf,
    run: String,
    overwrite: bool,
    /// What was made for it, the deepest first; it goes again if nothing is ever written there.
    made: Vec<PathBuf>,
    _lock: File,
}

impl RunDir {
    /// Takes the directory, after a look whether anything can be written there. Refused where another process writes, and where
    /// checkpoints of another run lie that this one neither continues nor may overwrite. Waits up to two seconds for the lock.
    pub fn claim(claim: &Claim) -> Result<RunDir, CheckpointError> {
        let unwritable = |source| CheckpointError::Unwritable { path: claim.dir.to_owned(), source };
        let Some((lock, made)) = lock(claim.dir).map_err(unwritable)? else {
            return Err(CheckpointError::Busy(claim.dir.to_owned()));
        };
        let mut claimed = RunDir {
            dir: claim.dir.to_owned(),
            run: claim.run.to_owned(),
            overwrite: claim.overwrite,
            made,
            _lock: lock,
        };
        probe(claim.dir).map_err(unwritable)?;
        let found = search::by_age(claim.dir).map_err(|e| CheckpointError::read(claim.dir, e))?;
        let continued = claim.resumed.and_then(|path| found.iter().find(|found| same_dir(&found.path, path)));
        match continued.and_then(|found| found.run.as_deref()) {
            Some(run) => run.clone_into(&mut claimed.run),
            None => {
                let others = || found.iter().filter(|found| found.run.as_deref() != Some(claim.run));
                if let (Some(newest), false) = (others().next_back(), claim.overwrite) {
                    return Err(CheckpointError::Occupied {
                        dir: claim.dir.to_owned(),
                        count: others().count(),
                        newest: newest.path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
                    });
                }
            }
        }
        Ok(claimed)
    }

    pub fn path(&self) -> &Path {
        &self.dir
    }

    /// The name that its checkpoints bear.
    pub fn run(&self) -> &str {
        &self.run
    }

    /// Bytes that may still be written here, where the file system tells.
    pub fn free_bytes(&self) -> Option<u64> {
        let found = nix::sys::statvfs::statvfs(&self.dir).ok()?;
        #[allow(clippy::useless_conversion)] // u32 on macOS
        let (blocks, size) = (u64::from(found.blocks_available()), u64::from(found.fragment_size()));
        Some(blocks.saturating_mul(size))
    }

    /// Removes the oldest checkpoints of this run so that `keep` remain, counting up to and including the one of `committed`, which is
    /// known to be good and is never removed; newer ones are not touched, nor those of other runs unless they may be overwritten: then
    /// all of them go. Returns what was removed.
    pub fn rotate(&self, keep: u32, committed: u64) -> Result<Vec<PathBuf>, CheckpointError> {
        let fail =
            |path: &Path, source| CheckpointError::Write { step: committed, path: path.to_owned(), source };
        let mut older = search::by_age(&self.dir).map_err(|e| fail(&self.dir, e))?;
        let good = crate::step_dir(&self.dir, committed);
        let Some(last) = older.iter().position(|found| found.path == good && self.owns(found)) else {
            return Ok(Vec::new()); // not written here: nothing is known to be good, so nothing is removed
        };
        older.truncate(last);
        let own = older.iter().filter(|found| self.owns(found)).count();
        let mut excess = own.saturating_sub(keep.max(1) as usize - 1);
        let mut doomed = Vec::new();
        for found in older {
            if self.owns(&found) {
                if excess > 0 {
                    excess -= 1;
                    doomed.push(found.path);
                }
            } else if self.overwrite {
                doomed.push(found.path);
            }
        }
        for dir in &doomed {
            let name = dir.file_name().unwrap_or_default().to_string_lossy();
            let hidden = self.dir.join(format!("{TEMPORARY}removed-{name}-{}", std::process::id()));
            fs::rename(dir, &hidden).map_err(|e| fail(dir, e))?; // at no moment is half a checkpoint called one
            fs::remove_dir_all(&hidden).map_err(|e| fail(&hidden, e))?;
        }
        if !doomed.is_empty() {
            sync_dir(&self.dir).map_err(|e| fail(&self.dir, e))?;
        }
        Ok(doomed)
    }

    /// Whether a checkpoint of this run may take the place of what lies at `target`: one of its own, or one that was passed over as
    /// damaged when the run was continued from an older one.
    pub(crate) fn may_replace(&self, target: &Path) -> bool {
        let found = Found::at(target.to_owned());
        let is_free = !target.exists();
        is_free || target.is_dir() && (self.overwrite || found.run.is_none() || self.owns(&found))
    }

    fn owns(&self, found: &Found) -> bool {
        found.run.as_deref() == Some(self.run.as_str())
    }
}

impl Drop for RunDir {
    /// The file of the lock is removed while it is held, and with it the directories that were made for nothing. What cannot be removed
    /// does no harm.
    fn drop(&mut self) {
        let _ = fs::remove_file(self.dir.join(LOCK));
        let _ = self.made.iter().try_for_each(fs::remove_dir); // ends at the first that holds something
    }
}

/// The locked file and the directories that were made for it, or `None` where another process kept it. A file system without locks gives
/// it to everybody.
fn lock(dir: &Path) -> io::Result<Option<(File, Vec<PathBuf>)>> {
    let (path, deadline) = (dir.join(LOCK), Instant::now() + LOCK_WAIT);
    let mut made = Vec::new();
    loop {
        let open = || {
            let new = create_dir_durably(dir)?;
            Ok((File::options().write(true).create(true).truncate(false).open(&path)?, new))
        };
        let file = match open() {
            Ok((file, new)) => {
                made = if new.is_empty() { made } else { new };
                file
            }
            // Who held it before took the directory away just now.
            Err(e) if io::Error::kind(&e) == io::ErrorKind::NotFound && Instant::now() < deadline => continue,
            Err(e) => return Err(e),
        };
        let locked = match file.try_lock() {
            Ok(()) => true,
            Err(TryLockError::Error(e)) if e.kind() == io::ErrorKind::Unsupported => true,
            Err(TryLockError::Error(e)) => return Err(e),
            Err(TryLockError::WouldBlock) => false,
        };
        // It may also have taken away the file that was opened here.
        if locked && is_at(&file, &path)? {
            return Ok(Some((file, made)));
        }
        if Instant::now() >= deadline {
            return Ok(None);
        }
        std::thread::sleep(LOCK_POLL);
    }
}

fn is_at(file: &File, path: &Path) -> io::Result<bool> {
    use std::os::unix::fs::MetadataExt;
    let opened = file.metadata()?;
    match fs::metadata(path) {
        Ok(there) => Ok((there.dev(), there.ino()) == (opened.dev(), opened.ino())),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(e),
    }
}

/// Makes a directory with a file in it, as a checkpoint is, and removes both.
fn probe(dir: &Path) -> io::Result<()> {
    let temporary = dir.join(format!("{TEMPORARY}probe-{}", std::process::id()));
    fs::create_dir(&temporary).or_else(|e| match e.kind() {
        io::ErrorKind::AlreadyExists => Ok(()), // of a dead process that had this one's number
        _ => Err(e),
    })?;
    let written = File::create(temporary.join("probe")).and_then(|mut file| {
        file.write_all(&[0; PROBE_BYTES])?;
        file.sync_all()
    });
    fs::remove_dir_all(&temporary).and(written)
}

fn same_dir(a: &Path, b: &Path) -> bool {
    match (fs::canonicalize(a), fs::canonicalize(b)) {
        (Ok(a), Ok(b)) => a == b,
        _ => false,
    }
}
