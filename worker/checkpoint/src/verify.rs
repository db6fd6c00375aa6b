//! Reads a checkpoint to its last byte and holds it against its manifest.

use crate::CheckpointError;
use crate::flat::NAMED;
use crate::manifest::{Manifest, ManifestFile, Piece};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Bytes read at a time.
const CHUNK: usize = 1 << 20;

/// Threads that read and hash; more than this no disk serves.
const THREADS_MAX: usize = 16;

/// Checks that `dir` is a checkpoint of fleet and that every byte is what it was written as. Reads all of it.
pub fn verify(dir: &Path) -> Result<Manifest, CheckpointError> {
    let manifest = Manifest::read(dir)?;
    if let Some(partial) = partial(dir, &manifest) {
        return Err(partial);
    }
    look_at(dir, &manifest).into_iter().next().map_or(Ok(manifest), Err)
}

/// The same, with everything that is wrong: each file, and each tensor in it. What lies on other disks is one error, the last.
pub fn inspect(dir: &Path) -> Result<(Manifest, Vec<CheckpointError>), CheckpointError> {
    let manifest = Manifest::read(dir)?;
    let mut wrong = look_at(dir, &manifest);
    wrong.extend(partial(dir, &manifest));
    Ok((manifest, wrong))
}

/// Says what of a checkpoint lies on other disks, if anything does.
pub(crate) fn partial(dir: &Path, manifest: &Manifest) -> Option<CheckpointError> {
    let elsewhere = manifest.elsewhere(dir);
    let mut by_host: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for name in &elsewhere {
        let host = manifest.files.get(*name).and_then(|file| manifest.disks.get(file.disk as usize));
        by_host.entry(host.map_or("another host", String::as_str)).or_default().push(name);
    }
    let told = by_host.into_iter().map(|(host, mut names)| {
        let more = names.len().saturating_sub(NAMED);
        names.truncate(NAMED);
        let and = if more > 0 { format!(" and {more} more") } else { String::new() };
        format!("on {host} were written {}{and}", names.join(", "))
    });
    let what = told.collect::<Vec<_>>().join("; ");
    (!elsewhere.is_empty()).then(|| CheckpointError::Partial { path: dir.to_owned(), what })
}

/// All that is wrong with what was written to the disks of which something is here.
fn look_at(dir: &Path, manifest: &Manifest) -> Vec<CheckpointError> {
    let elsewhere = manifest.elsewhere(dir);
    let mut by_file = manifest.pieces_by_file();
    let (mut wrong, mut checks) = (Vec::new(), Vec::new());
    for (name, expected) in manifest.files.iter().filter(|(name, _)| !elsewhere.contains(name.as_str())) {
        let pieces = by_file.remove(name.as_str()).unwrap_or_default();
        match open(dir, name, expected, manifest) {
            Ok(file) => checks.push((name, expected, pieces, file)),
            Err(error) => wrong.push(error),
        }
    }
    let mut parts: Vec<Check> = Vec::new();
    for (name, expected, pieces, file) in &checks {
        parts.push(Check {
            name,
            file,
            tensor: None,
            ranges: outside(expected.bytes, pieces),
            sha256: &expected.sha256,
        });
        parts.extend(pieces.iter().map(|(tensor, piece)| {
            let range = piece.offset..piece.offset + piece.bytes;
            Check { name, file, tensor: Some(tensor), ranges: vec![range], sha256: &piece.sha256 }
        }));
    }
    wrong.extend(check_all(dir, manifest, &parts));
    wrong
}

/// Bytes of a file that are under one hash.
struct Check<'a> {
    name: &'a str,
    file: &'a File,
    tensor: Option<&'a str>,
    ranges: Vec<Range<u64>>,
    sha256: &'a str,
}

/// What of a file is in no piece.
fn outside(bytes: u64, pieces: &[(&str, &Piece)]) -> Vec<Range<u64>> {
    let mut ranges = Vec::new();
    let mut free = 0;
    for (_, piece) in pieces {
        ranges.push(free..piece.offset);
        free = piece.offset + piece.bytes;
    }
    ranges.push(free..bytes);
    ranges.retain(|range| !range.is_empty());
    ranges
}

fn open(
    dir: &Path,
    name: &str,
    expected: &ManifestFile,
    manifest: &Manifest,
) -> Result<File, CheckpointError> {
    let path = dir.join(name);
    let damaged = |what: String| CheckpointError::damaged(dir, format!("{} {what}", manifest.named(name)));
    let file = match File::open(&path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Err(damaged("is missing".into())),
        Err(e) => return Err(CheckpointError::read(&path, e)),
    };
    let bytes = file.metadata().map_err(|e| CheckpointError::read(&path, e))?.len();
    match bytes == expected.bytes {
        true => Ok(file),
        false => Err(damaged(format!("has {bytes} bytes and should have {}", expected.bytes))),
    }
}

/// What is wrong, in the order of `checks`, each tensor of a file once.
fn check_all(dir: &Path, manifest: &Manifest, checks: &[Check]) -> Vec<CheckpointError> {
    let next = AtomicUsize::new(0);
    let wrong = Mutex::new(Vec::new());
    let work = || {
        let mut chunk = vec![0u8; CHUNK];
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            let Some(check) = checks.get(number) else { return };
            let error = match check.hash(&mut chunk) {
                Ok(found) if found == check.sha256 => continue,
                Ok(_) => changed(dir, manifest, check.name, check.tensor),
                Err(e) => CheckpointError::read(&dir.join(check.name), e),
            };
            wrong.lock().expect("a thread that panics ends the check").push((number, error));
        }
    };
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 1..cores.min(THREADS_MAX).min(checks.len()) {
            scope.spawn(work);
        }
        work();
    });
    let mut wrong = wrong.into_inner().expect("all threads have ended well");
    wrong.sort_by_key(|(number, _)| *number);
    wrong.dedup_by_key(|(number, _)| (checks[*number].name, checks[*number].tensor));
    wrong.into_iter().map(|(_, error)| error).collect()
}

impl Check<'_> {
    fn hash(&self, chunk: &mut [u8]) -> io::Result<String> {
        let mut hasher = Sha256::new();
        for range in &self.ranges {
            let mut at = range.start;
            while at < range.end {
                let size = (range.end - at).min(chunk.len() as u64) as usize;
                self.file.read_exact_at(&mut chunk[..size], at)?;
                hasher.update(&chunk[..size]);
                at += size as u64;
            }
        }
        Ok(hex::encode(hasher.finalize()))
    }
}

pub(crate) fn changed(dir: &Path, manifest: &Manifest, file: &str, tensor: Option<&str>) -> CheckpointError {
    let what = contents_of(manifest, file, tensor);
    CheckpointError::damaged(dir, format!("{what} have changed since it was written"))
}

/// What lies in a file, or of one tensor there, for people.
pub(crate) fn contents_of(manifest: &Manifest, file: &str, tensor: Option<&str>) -> String {
    let of = tensor.map_or(String::new(), |tensor| format!("the tensor {tensor} in "));
    format!("the contents of {of}{}", manifest.named(file))
}
