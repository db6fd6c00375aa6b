//! The directory of a run: one process writes there at a time, and what another run left there is not touched unasked.

use crate::error::is_full_disk;
use crate::manifest::free_bytes;
use crate::search::{self, Found};
use crate::writer::{TEMPORARY, create_dir_durably, sync_dir};
use crate::{CheckpointError, verify};
use nix::fcntl::OFlag;
use std::collections::BTreeMap;
use std::fs::{self, File, TryLockError};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
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
    /// The last step that it can save, where that is known.
    pub until: Option<u64>,
    /// What the job reads, which may not go.
    pub reads: &'a [PathBuf],
}

/// A directory of checkpoints that this process writes to until it drops this. Others are kept out by a lock, where the file system
/// has locks.
#[derive(Debug)]
pub struct RunDir {
    owner: Owner,
    /// What was made for it, the deepest first; it goes again if nothing is ever written there.
    made: Vec<PathBuf>,
    /// The newest serial that was there before; what is newer was written, and hashed, by this process.
    before: u64,
    /// Older ones whose files were read: whether they are whole.
    read: BTreeMap<PathBuf, bool>,
    /// Manifests of what was removed and not told of yet.
    removed: Vec<String>,
    /// The step whose checkpoint stays.
    spared: Option<u64>,
    _lock: File,
}

/// Whose checkpoints lie in a directory, and what it may put in the place of others.
#[derive(Clone, Debug)]
pub(crate) struct Owner {
    pub dir: PathBuf,
    pub run: String,
    overwrite: bool,
}

impl Owner {
    /// A run that overwrites nothing.
    pub fn of(dir: &Path, run: &str) -> Owner {
        Owner { dir: dir.to_owned(), run: run.to_owned(), overwrite: false }
    }

    /// Whether a checkpoint of this run may take the place of what lies at `target`: one of its own, or one that was passed over as
    /// damaged when the run was continued from an older one.
    pub fn may_replace(&self, target: &Path) -> bool {
        let found = Found::at(target.to_owned());
        search::is_replaceable(target)
            && found.unreadable.is_none()
            && (self.overwrite || found.manifest.is_none() || self.owns(&found))
    }

    fn owns(&self, found: &Found) -> bool {
        found.run() == Some(self.run.as_str())
    }
}

impl RunDir {
    /// Takes the directory, after a look whether anything can be written there. Refused where another process writes, and where
    /// checkpoints of another run lie that this one neither continues nor may overwrite. Waits up to two seconds for the lock.
    pub fn claim(claim: &Claim) -> Result<RunDir, CheckpointError> {
        let unwritable = |source| {
            let source = obstacle(claim.dir).map_or(source, io::Error::other);
            CheckpointError::Unwritable { path: claim.dir.to_owned(), source }
        };
        let Some((lock, made)) = lock(claim.dir).map_err(unwritable)? else {
            return Err(CheckpointError::Busy(claim.dir.to_owned()));
        };
        let mut claimed = RunDir {
            owner: Owner { dir: claim.dir.to_owned(), run: claim.run.to_owned(), overwrite: claim.overwrite },
            made,
            before: 0,
            read: BTreeMap::new(),
            removed: Vec::new(),
            spared: None,
            _lock: lock,
        };
        let probed = probe(claim.dir);
        let unreadable = |e| CheckpointError::read(claim.dir, e);
        let found = search::by_age(claim.dir).map_err(unreadable)?;
        claimed.before = found.iter().map(|found| found.serial).max().unwrap_or(0);
        let continued = claim.resumed.and_then(|path| found.iter().find(|found| same_dir(&found.path, path)));
        let mut step = None;
        if let Some((continued, manifest)) =
            continued.and_then(|found| Some((found, found.manifest.as_ref()?)))
        {
            manifest.run.clone_into(&mut claimed.owner.run);
            claimed.read.insert(continued.path.clone(), true); // who continues it has verified it
            step = Some(manifest.step);
        }
        if let Err(source) = probed
            && !(is_full_disk(&source) && claimed.can_make_room(&found, continued))
        {
            return Err(unwritable(source));
        }
        let others: Vec<&Found> =
            found.iter().filter(|found| found.is_fleets() && !claimed.owns(found)).collect();
        let saves =
            |at: u64| step.is_none_or(|step| at > step) && claim.until.is_none_or(|until| at <= until);
        let in_place = |found: &&&Found| saves(found.step());
        if let Some(at) = found.iter().position(|found| found.unreadable.is_some() && saves(found.step())) {
            return Err(found.into_iter().nth(at).and_then(|found| found.unreadable).expect("found by it"));
        }
        // Damaged ones are passed over, and replaced.
        let ahead: Vec<&&Found> =
            others.iter().filter(|found| found.manifest.is_some()).filter(in_place).collect();
        if let (Some(first), Some(step), Some(resumed), false) =
            (ahead.first(), step, claim.resumed, claim.overwrite)
        {
            return Err(CheckpointError::Ahead {
                dir: claim.dir.to_owned(),
                step,
                count: ahead.len(),
                first: first.name(),
                resumed: resumed.to_owned(),
            });
        }
        if let (Some(newest), None, false) = (others.last(), step, claim.overwrite) {
            return Err(CheckpointError::Occupied {
                dir: claim.dir.to_owned(),
                count: others.len(),
                newest: newest.name(),
                is_whole: others.iter().any(|found| found.seems_whole()),
            });
        }
        if let Some(path) = search::in_the_way(claim.dir, step).map_err(unreadable)? {
            return Err(CheckpointError::InTheWay(path));
        }
        if claim.overwrite {
            others.iter().try_for_each(|found| is_unused(&found.path, claim.reads))?;
        }
        Ok(claimed)
    }

    /// Whether older checkpoints of this run would go for a new one, as `make_room` removes them.
    fn can_make_room(&self, found: &[Found], continued: Option<&Found>) -> bool {
        let older = |other: &&Found| continued.is_some_and(|continued| other.serial < continued.serial);
        found.iter().filter(older).any(|found| self.owns(found))
    }

    pub(crate) fn owner(&self) -> &Owner {
        &self.owner
    }

    pub fn path(&self) -> &Path {
        &self.owner.dir
    }

    /// The name that its checkpoints bear.
    pub fn run(&self) -> &str {
        &self.owner.run
    }

    /// Bytes that may still be written here, where the file system tells.
    pub fn free_bytes(&self) -> Option<u64> {
        free_bytes(&self.owner.dir)
    }

    /// Keeps the checkpoint of this step, whatever else goes, and lets the one go that was kept before. Where it is not there, nothing changes.
    pub fn spare(&mut self, step: u64) {
        let found = search::by_age(&self.owner.dir).unwrap_or_default();
        if found.iter().any(|found| found.step() == step && self.owns(found) && found.seems_whole()) {
            self.spared = Some(step);
        }
    }

    /// Removes the oldest checkpoints of this run so that `keep` whole ones remain, counting up to and including the one of `committed`,
    /// which is known to be good and is never removed; newer ones are not touched, nor those of other runs unless they may be overwritten:
    /// then all of them go, but not for the checkpoint of a run that was stopped. Returns what was removed.
    pub fn rotate(
        &mut self,
        keep: u32,
        committed: u64,
        stopped: bool,
    ) -> Result<Vec<PathBuf>, CheckpointError> {
        let (mut whole, mut doomed) = (1, Vec::new());
        for found in self.older(committed)?.into_iter().rev() {
            if !self.owns(&found) {
                doomed.extend((self.owner.overwrite && !stopped && found.may_go()).then_some(found.path));
            } else if whole >= keep {
                doomed.extend((!self.spares(&found)).then_some(found.path));
            } else if self.is_whole(&found) {
                whole += 1;
            }
        }
        doomed.reverse();
        self.remove(doomed)
    }

    /// Removes the oldest checkpoints until `bytes` are free that were not: first those that may be overwritten, then this run's own that are
    /// older than the one of `committed`. One that is known to be good stays: that one, else the newest whole one. Returns what was removed.
    pub fn make_room(&mut self, bytes: u64, committed: Option<u64>) -> Result<Vec<PathBuf>, CheckpointError> {
        let failed = |source| CheckpointError::Rotation { path: self.owner.dir.clone(), rest: None, source };
        let all = search::by_age(&self.owner.dir).map_err(failed)?;
        let own = committed.map_or(Ok(Vec::new()), |committed| self.older(committed))?;
        let has_good = committed.is_some_and(|committed| self.good(&all, committed).is_some());
        let spared = all.iter().rfind(|found| !has_good && found.seems_whole());
        let others = all.iter().filter(|found| self.owner.overwrite && found.may_go() && !self.owns(found));
        let others = others.filter(|found| spared.is_none_or(|spared| spared.path != found.path));
        let (mut freed, mut doomed) = (0, Vec::new());
        let own = own.iter().filter(|found| self.owns(found) && !self.spares(found));
        for found in others.chain(own) {
            if freed < bytes {
                freed += found.manifest.as_ref().filter(|_| found.seems_whole()).map_or(0, |m| m.bytes());
                doomed.push(found.path.clone());
            }
        }
        self.remove(doomed)
    }

    /// Takes back the checkpoint of `step`, which was published here and not on all disks. It was never recorded.
    pub fn withdraw(&mut self, step: u64) -> Result<(), CheckpointError> {
        self.remove(vec![crate::step_dir(&self.owner.dir, step)]).map(drop)
    }

    /// Removes the checkpoint at `path` with this manifest, of which it is recorded that newer ones have taken its place, on a node where its run
    /// writes no more. Whether it is gone by this: where somebody writes to the directory it is left to them.
    pub fn retire(path: &Path, manifest_sha256: &str) -> Result<bool, CheckpointError> {
        let Some(dir) = path.parent() else { return Ok(false) };
        let is_it = || crate::manifest_sha256(path).is_ok_and(|found| found == manifest_sha256);
        let failed = |source| CheckpointError::Rotation { path: path.to_owned(), rest: None, source };
        if !is_it() {
            return Ok(false);
        }
        let Some((lock, made)) = lock(dir).map_err(failed)? else { return Ok(false) };
        let owner = Owner::of(dir, "");
        let (read, removed) = (BTreeMap::new(), Vec::new());
        let mut held = RunDir { owner, made, before: 0, read, removed, spared: None, _lock: lock };
        match is_it() {
            true => held.remove(vec![path.to_owned()]).map(|_| true),
            false => Ok(false),
        }
    }

    fn spares(&self, found: &Found) -> bool {
        self.spared == Some(found.step())
    }

    /// Oldest first. None where the one of `committed` was not written here: then nothing is known to be good, and nothing may be removed.
    fn older(&self, committed: u64) -> Result<Vec<Found>, CheckpointError> {
        let failed = |source| CheckpointError::Rotation { path: self.owner.dir.clone(), rest: None, source };
        let mut found = search::by_age(&self.owner.dir).map_err(failed)?;
        found.truncate(self.good(&found, committed).unwrap_or(0));
        Ok(found)
    }

    /// Where the one of `committed` stands, if this run wrote it and it is whole.
    fn good(&self, found: &[Found], committed: u64) -> Option<usize> {
        let good = crate::step_dir(&self.owner.dir, committed);
        found.iter().position(|found| found.path == good && self.owns(found) && found.seems_whole())
    }

    fn is_whole(&mut self, found: &Found) -> bool {
        let was_read = || verify(&found.path).is_ok();
        found.seems_whole()
            && (found.serial > self.before || *self.read.entry(found.path.clone()).or_insert_with(was_read))
    }

    /// Hashes of the manifests, in hex, of the checkpoints that were removed since this was asked last, also of those beside which others
    /// could not be.
    pub fn take_removed(&mut self) -> Vec<String> {
        std::mem::take(&mut self.removed)
    }

    /// As many as can be. Returns what was removed.
    fn remove(&mut self, doomed: Vec<PathBuf>) -> Result<Vec<PathBuf>, CheckpointError> {
        let (mut removed, mut failed) = (Vec::new(), None);
        for path in doomed {
            let manifest = crate::manifest_sha256(&path);
            match self.remove_one(&path) {
                Ok(()) => {
                    self.removed.extend(manifest);
                    removed.push(path);
                }
                Err(error) => failed = failed.or(Some(error)),
            }
        }
        if !removed.is_empty() {
            let path = || self.owner.dir.clone();
            sync_dir(&self.owner.dir).map_err(|source| CheckpointError::Rotation {
                path: path(),
                rest: None,
                source,
            })?;
        }
        failed.map_or(Ok(removed), Err)
    }

    /// At no moment is half a checkpoint called one; where nothing of it could be removed it has its name again.
    fn remove_one(&self, path: &Path) -> Result<(), CheckpointError> {
        let failed = |rest, source| CheckpointError::Rotation { path: path.to_owned(), rest, source };
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let hidden = self.owner.dir.join(format!("{TEMPORARY}removed-{name}-{}", std::process::id()));
        let found = Found::at(path.to_owned());
        let missing = |dir: &Path| found.manifest.as_ref().map(|manifest| manifest.missing(dir));
        let before = missing(path);
        fs::rename(path, &hidden).map_err(|source| failed(None, source))?;
        let Err(source) = fs::remove_dir_all(&hidden) else { return Ok(()) };
        let is_as_it_was = before.is_some()
            && Found::at(hidden.clone()).manifest == found.manifest
            && missing(&hidden) == before;
        match is_as_it_was && !path.exists() && fs::rename(&hidden, path).is_ok() {
            true => Err(failed(None, source)),
            false => Err(failed(Some(hidden), source)),
        }
    }

    fn owns(&self, found: &Found) -> bool {
        self.owner.owns(found)
    }
}

impl Drop for RunDir {
    /// The file of the lock is removed while it is held, and with it the directories that were made for nothing. What cannot be removed
    /// does no harm.
    fn drop(&mut self) {
        let _ = fs::remove_file(self.owner.dir.join(LOCK));
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
            // Whatever lies there under that name is not followed or waited for.
            let flags = (OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK).bits();
            let file =
                File::options().write(true).create(true).truncate(false).custom_flags(flags).open(&path);
            Ok((file?, new))
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
    match fs::symlink_metadata(path) {
        Ok(there) => Ok((there.dev(), there.ino()) == (opened.dev(), opened.ino())),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(e),
    }
}

/// Makes a directory with a file in it, as a checkpoint is, and removes both.
fn probe(dir: &Path) -> io::Result<()> {
    let temporary = dir.join(format!("{TEMPORARY}probe-{}", std::process::id()));
    let _ = search::remove(&temporary); // of a dead process that had this one's number
    fs::create_dir(&temporary)?;
    let written = File::create_new(temporary.join("probe")).and_then(|mut file| {
        file.write_all(&[0; PROBE_BYTES])?;
        file.sync_all()
    });
    fs::remove_dir_all(&temporary).and(written)
}

/// What is where a directory should be, the topmost of those that lead to `dir`, or in the place of its lock.
fn obstacle(dir: &Path) -> Option<String> {
    let wrong = |path: &Path| {
        let there = fs::symlink_metadata(path).ok()?;
        match fs::metadata(path) {
            Ok(found) if found.is_dir() => None,
            Ok(_) => Some(format!("{} is not a directory", path.display())),
            Err(_) if there.is_symlink() => {
                let target = fs::read_link(path).unwrap_or_default();
                Some(format!("{} is a link to {}, which is not there", path.display(), target.display()))
            }
            Err(_) => None,
        }
    };
    let above: Vec<&Path> = dir.ancestors().filter(|path| !path.as_os_str().is_empty()).collect();
    let lock = dir.join(LOCK);
    above.into_iter().rev().find_map(wrong).or_else(|| {
        let there = fs::symlink_metadata(&lock).ok()?;
        (!there.is_file()).then(|| format!("{} is not a file that fleet made; remove it", lock.display()))
    })
}

/// Refuses where the job reads something of this checkpoint, or all that is in a folder which holds it.
fn is_unused(checkpoint: &Path, reads: &[PathBuf]) -> Result<(), CheckpointError> {
    let Ok(doomed) = fs::canonicalize(checkpoint) else { return Ok(()) };
    let reads_it = |path: &Path| {
        // The files of a model may be links.
        let within = fs::read_dir(path).into_iter().flatten().flatten().map(|entry| entry.path());
        let mut real = within.chain([path.to_owned()]).filter_map(|path| fs::canonicalize(path).ok());
        real.any(|path| path.starts_with(&doomed))
    };
    match reads.iter().find(|path| reads_it(path)) {
        Some(path) => Err(CheckpointError::InUse { path: path.clone(), checkpoint: checkpoint.to_owned() }),
        None => Ok(()),
    }
}

fn same_dir(a: &Path, b: &Path) -> bool {
    match (fs::canonicalize(a), fs::canonicalize(b)) {
        (Ok(a), Ok(b)) => a == b,
        _ => false,
    }
}
