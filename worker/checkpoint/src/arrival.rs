//! A checkpoint that comes from another disk: file after file, each in the order of its bytes. What is written was held against its hash
//! before, and the checkpoint appears by one rename when all of it is there, so that nothing that looks like one is less.

use crate::manifest::{Manifest, Piece, free_bytes};
use crate::run_dir::Owner;
use crate::verify::contents_of;
use crate::writer::{TEMPORARY, create_dir_durably, publish, sync_dir};
use crate::{CheckpointError, MANIFEST_FILE, search};
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// Under way to `target`. Dropped before `finish`, it removes what has come.
#[derive(Debug)]
pub struct Arrival {
    target: PathBuf,
    temporary: PathBuf,
    manifest: Manifest,
    finished: bool,
}

/// One file of it.
#[derive(Debug)]
pub struct ArrivingFile<'a> {
    name: &'a str,
    of: &'a Arrival,
    out: File,
    /// In the order of their bytes, all of them.
    spans: Vec<Span<'a>>,
    /// Whole ones that have come.
    done: usize,
    next: u64,
    /// What has come of a piece that is not whole yet.
    piece: Vec<u8>,
    /// Of what lies in no piece.
    outside: Sha256,
}

#[derive(Debug)]
struct Span<'a> {
    end: u64,
    /// With the name of its tensor.
    piece: Option<(&'a str, &'a Piece)>,
}

/// Why bytes were not taken.
#[derive(Debug)]
pub enum Unfit {
    /// They are not what was written there: what of them, for people. The file goes on at `next`.
    Changed(String),
    /// This disk does not take them.
    Disk(CheckpointError),
}

impl Arrival {
    /// Makes room for the checkpoint with this manifest, whose own hash the caller has compared, at `target`: `.../step-00000100`.
    /// Refused where the disk has not the room, and where something else lies that is not this run's to replace.
    pub fn begin(target: &Path, manifest: &[u8]) -> Result<Arrival, CheckpointError> {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let parsed = Manifest::of_bytes(target, manifest)?;
        let dir = target.parent().unwrap_or(Path::new("."));
        let failed = |source| CheckpointError::Copy { path: target.to_owned(), source };
        create_dir_durably(dir).map_err(failed)?;
        search::remove_leftovers(dir, false).map_err(failed)?;
        let (free, needed) = (free_bytes(dir), parsed.bytes());
        if let Some(free) = free.filter(|free| *free < needed) {
            let what = format!("it takes {needed} bytes, and {free} are free");
            return Err(failed(io::Error::new(io::ErrorKind::StorageFull, what)));
        }
        let name = target.file_name().unwrap_or_default().to_string_lossy();
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let temporary = dir.join(format!("{TEMPORARY}copy-{name}-{number}-{}", std::process::id()));
        fs::create_dir(&temporary).map_err(failed)?;
        let arrival = Arrival { target: target.to_owned(), temporary, manifest: parsed, finished: false };
        arrival.may_replace()?;
        let path = arrival.temporary.join(MANIFEST_FILE);
        let write = || {
            let mut out = File::create_new(&path)?;
            out.write_all(manifest)?;
            out.sync_all()
        };
        write().map_err(failed)?;
        Ok(arrival)
    }

    /// Name, length, and the rank that wrote it, of every file that is to come.
    pub fn files(&self) -> impl Iterator<Item = (&str, u64, u32)> {
        self.manifest.files.iter().map(|(name, file)| (name.as_str(), file.bytes, file.writer))
    }

    pub fn bytes(&self) -> u64 {
        self.manifest.bytes()
    }

    /// Begins with one of `files`.
    pub fn file<'a>(&'a self, name: &'a str) -> Result<ArrivingFile<'a>, CheckpointError> {
        let bytes = self.manifest.files.get(name).map_or(0, |file| file.bytes);
        let mut by_file = self.manifest.pieces_by_file();
        let (mut spans, mut free) = (Vec::new(), 0);
        for (tensor, piece) in by_file.remove(name).unwrap_or_default() {
            if piece.offset > free {
                spans.push(Span { end: piece.offset, piece: None });
            }
            free = piece.offset + piece.bytes;
            spans.push(Span { end: free, piece: Some((tensor, piece)) });
        }
        if bytes > free {
            spans.push(Span { end: bytes, piece: None });
        }
        let out = File::create(self.temporary.join(name)).map_err(|e| self.failed(e))?;
        let (piece, outside) = (Vec::new(), Sha256::new());
        Ok(ArrivingFile { name, of: self, out, spans, done: 0, next: 0, piece, outside })
    }

    /// All files are whole: the checkpoint appears.
    pub fn finish(mut self) -> Result<(), CheckpointError> {
        let missing = self.manifest.files.keys().find(|name| !self.temporary.join(name).exists());
        if let Some(missing) = missing {
            return Err(CheckpointError::damaged(&self.target, format!("{missing} did not come")));
        }
        self.may_replace()?;
        sync_dir(&self.temporary).map_err(|e| self.failed(e))?;
        publish(&self.temporary, &self.target).map_err(|e| self.failed(e))?;
        self.finished = true;
        let dir = self.target.parent().unwrap_or(Path::new("."));
        sync_dir(dir).map_err(|e| self.failed(e))
    }

    fn may_replace(&self) -> Result<(), CheckpointError> {
        let dir = self.target.parent().unwrap_or(Path::new("."));
        match Owner::of(dir, &self.manifest.run).may_replace(&self.target) {
            true => Ok(()),
            false => {
                let what = "something else lies there, which is not a checkpoint of this run; move it away";
                Err(self.failed(io::Error::new(io::ErrorKind::AlreadyExists, what)))
            }
        }
    }

    fn failed(&self, source: io::Error) -> CheckpointError {
        CheckpointError::Copy { path: self.target.clone(), source }
    }
}

impl Drop for Arrival {
    fn drop(&mut self) {
        if !self.finished
            && let Err(e) = fs::remove_dir_all(&self.temporary)
        {
            tracing::warn!("cannot remove {}, what has come of a checkpoint: {e}", self.temporary.display());
        }
    }
}

impl ArrivingFile<'_> {
    /// The byte that is wanted next.
    pub fn next(&self) -> u64 {
        self.next
    }

    /// Takes the bytes from `next` on. Those of a piece are written when it is whole and as its hash says.
    pub fn push(&mut self, mut bytes: &[u8]) -> Result<(), Unfit> {
        while !bytes.is_empty() {
            let Some(Span { end, piece }) = self.spans.get(self.done) else {
                return Err(Unfit::Changed(format!(
                    "{} is longer than it was",
                    self.of.manifest.named(self.name)
                )));
            };
            let (now, later) = bytes.split_at(bytes.len().min((end - self.next) as usize));
            bytes = later;
            self.next += now.len() as u64;
            let whole = self.next == *end;
            match piece {
                None => {
                    self.outside.update(now);
                    self.out.write_all(now).map_err(|e| Unfit::Disk(self.of.failed(e)))?;
                }
                Some((tensor, piece)) => {
                    self.piece.extend_from_slice(now);
                    if whole {
                        if hex::encode(Sha256::digest(&self.piece)) != piece.sha256 {
                            self.piece.clear();
                            self.next = piece.offset;
                            return Err(Unfit::Changed(self.changed(Some(tensor))));
                        }
                        self.out.write_all(&self.piece).map_err(|e| Unfit::Disk(self.of.failed(e)))?;
                        self.piece.clear();
                    }
                }
            }
            self.done += usize::from(whole);
        }
        Ok(())
    }

    /// Whether no byte is wanted any more.
    pub fn is_complete(&self) -> bool {
        self.done == self.spans.len()
    }

    /// Looks at what lies in no piece, and syncs.
    pub fn finish(self) -> Result<(), Unfit> {
        let expected = self.of.manifest.files.get(self.name).map(|file| file.sha256.as_str());
        if !self.is_complete() || Some(hex::encode(self.outside.clone().finalize()).as_str()) != expected {
            return Err(Unfit::Changed(self.changed(None)));
        }
        self.out.sync_all().map_err(|e| Unfit::Disk(self.of.failed(e)))
    }

    fn changed(&self, tensor: Option<&str>) -> String {
        format!("{} have changed since it was written", contents_of(&self.of.manifest, self.name, tensor))
    }
}
