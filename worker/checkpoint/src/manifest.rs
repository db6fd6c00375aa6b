//! The manifest: every file of a checkpoint, every tensor, and a hash for every byte.
//!
//! A tensor is a row of *pieces*, each a range of some file with a hash of its own, in the order of its numbers. Small pieces are what lets a
//! rank read just its range of a tensor and still check every byte that it takes: it reads the pieces that the range touches, whole. What of
//! a file is in no piece (all of a plain file, the header of one with tensors) is under the hash of the file.

use crate::{CheckpointError, Dtype, MANIFEST_FILE, MODEL_FILE, MODEL_INDEX_FILE};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

/// Raised when the layout changes. What is not among `READ` is refused.
pub(crate) const FORMAT: &str = "fleet-checkpoint/3";
/// Before several disks were written to.
const FORMAT_2: &str = "fleet-checkpoint/2";
/// Before several ranks wrote: whole files, without tensors.
const FORMAT_1: &str = "fleet-checkpoint/1";
const READ: [&str; 3] = [FORMAT_1, FORMAT_2, FORMAT];

/// What the formats of all versions begin with.
const FORMATS: &str = "fleet-checkpoint/";

const KEYS_1: [&str; 6] = ["format", "step", "serial", "loss", "run", "files"];
const KEYS_2: [&str; 9] =
    ["format", "step", "serial", "loss", "run", "strategy", "world_size", "files", "tensors"];
const KEYS: [&str; 10] =
    ["format", "step", "serial", "loss", "run", "strategy", "world_size", "disks", "files", "tensors"];

/// No honest manifest is near this many bytes; more is not read. A model of a hundred billion parameters has 150,000 pieces of 150 bytes each.
pub const MANIFEST_MAX: u64 = 64 << 20;

/// As many as a record of a checkpoint may name.
const FILES_MAX: usize = fleet_common::events::SHARDS_MAX;

/// Bytes of a piece: read whole, so not many; listed each, so not few.
pub(crate) const PIECE_MAX: usize = 8 << 20;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// `fleet-checkpoint/3`.
    pub format: String,
    /// Optimizer steps done.
    pub step: u64,
    /// Rises with every checkpoint of a directory; the highest is the newest, also after a run was started over.
    pub serial: u64,
    /// Training loss of the last step, in nats; `None` where it was not a number.
    pub loss: Option<f64>,
    /// The run that wrote it, and whose continuations may remove it. Empty where an early fleet did not say.
    #[serde(default)]
    pub run: String,
    /// Where the numbers lay while they were trained. Empty where an early fleet did not say.
    #[serde(default)]
    pub strategy: String,
    /// Ranks that trained, each of which wrote its part.
    #[serde(default = "one")]
    pub world_size: u32,
    /// Of each disk that was written to the host that it belongs to, by its name or address. Empty where there was one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<String>,
    /// By name, without the manifest itself.
    pub files: BTreeMap<String, ManifestFile>,
    /// By name. Empty where an early fleet wrote whole files.
    #[serde(default)]
    pub tensors: BTreeMap<String, ManifestTensor>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ManifestFile {
    pub bytes: u64,
    /// Of those of its bytes that are in no piece, in hex.
    pub sha256: String,
    /// The rank that wrote it.
    #[serde(default)]
    pub writer: u32,
    /// The disk that it was written to, one of `Manifest::disks`.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub disk: u32,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ManifestTensor {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    /// In the order of its numbers, which they hold once and all.
    pub pieces: Vec<Piece>,
}

/// A range of a file with numbers of one tensor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Piece {
    pub file: String,
    /// In the file, in bytes.
    pub offset: u64,
    pub bytes: u64,
    /// Hex.
    pub sha256: String,
}

fn one() -> u32 {
    1
}

fn is_zero(number: &u32) -> bool {
    *number == 0
}

/// Why a manifest is not taken.
#[derive(Debug)]
pub(crate) enum Flaw {
    Damage(String),
    /// Another version of fleet may read it.
    Version(String),
}

impl ManifestTensor {
    /// `None` where no file could have so many.
    pub fn bytes(&self) -> Option<u64> {
        let bits = self.shape.iter().try_fold(self.dtype.bitsize() as u64, |bits, size| {
            bits.checked_mul(u64::try_from(*size).ok()?)
        })?;
        bits.is_multiple_of(8).then_some(bits / 8)
    }
}

impl Manifest {
    /// Of all files together, in bytes.
    pub fn bytes(&self) -> u64 {
        self.files.values().fold(0u64, |sum, f| sum.saturating_add(f.bytes))
    }

    /// A file and who wrote it, for people.
    pub(crate) fn named(&self, file: &str) -> String {
        match self.files.get(file).filter(|_| self.world_size > 1) {
            Some(ManifestFile { writer, disk, .. }) => match self.disks.get(*disk as usize) {
                Some(host) => format!("{file}, which rank {writer} wrote on {host},"),
                None => format!("{file}, which rank {writer} wrote,"),
            },
            None => file.to_owned(),
        }
    }

    /// The tensors of which something lies in each file, with their pieces there.
    pub(crate) fn pieces_by_file(&self) -> BTreeMap<&str, Vec<(&str, &Piece)>> {
        let mut by_file: BTreeMap<&str, Vec<(&str, &Piece)>> = BTreeMap::new();
        for (name, tensor) in &self.tensors {
            for piece in &tensor.pieces {
                by_file.entry(&piece.file).or_default().push((name, piece));
            }
        }
        by_file.values_mut().for_each(|pieces| pieces.sort_by_key(|(_, piece)| piece.offset));
        by_file
    }

    /// One hash for all of a file: its own where no piece lies in it, else the hash of that one and of the pieces' in their order.
    pub(crate) fn file_sha256(&self, file: &ManifestFile, pieces: &[(&str, &Piece)]) -> String {
        if pieces.is_empty() {
            return file.sha256.clone();
        }
        let mut hasher = Sha256::new();
        hasher.update(&file.sha256);
        pieces.iter().for_each(|(_, piece)| hasher.update(&piece.sha256));
        hex::encode(hasher.finalize())
    }

    /// Files that `dir` has not, or not as long as they should be.
    pub fn missing(&self, dir: &Path) -> BTreeSet<&str> {
        let has =
            |name: &String| std::fs::symlink_metadata(dir.join(name)).ok().filter(|found| found.is_file());
        let is_there =
            |name: &String, file: &ManifestFile| has(name).is_some_and(|found| found.len() == file.bytes);
        let missing = self.files.iter().filter(|(name, file)| !is_there(name, file));
        missing.map(|(name, _)| name.as_str()).collect()
    }

    /// Whether `dir` has all that was written to one of the disks, as far as lengths tell.
    pub(crate) fn fits(&self, dir: &Path) -> bool {
        let missing = self.missing(dir);
        let disks = 0..self.disks.len().max(1) as u32;
        disks.into_iter().any(|disk| {
            let mut of_disk = self.files.iter().filter(|(_, file)| file.disk == disk);
            of_disk.all(|(name, _)| !missing.contains(name.as_str()))
        })
    }

    /// The files of other disks, of which nothing is in `dir`.
    pub fn elsewhere(&self, dir: &Path) -> BTreeSet<&str> {
        let is_here = |disk: u32| {
            let mut of_disk = self.files.iter().filter(|(_, file)| file.disk == disk);
            of_disk.any(|(name, _)| dir.join(name).exists())
        };
        let absent: BTreeSet<u32> = (0..self.disks.len() as u32).filter(|disk| !is_here(*disk)).collect();
        if absent.len() == self.disks.len() {
            return BTreeSet::new();
        }
        let files = self.files.iter().filter(|(_, file)| absent.contains(&file.disk));
        files.map(|(name, _)| name.as_str()).collect()
    }

    pub(crate) fn parse(bytes: &[u8]) -> Result<Manifest, Flaw> {
        let damaged = |e| Flaw::Damage(format!("{MANIFEST_FILE} cannot be read: {e}"));
        // What another version wrote is told from damage before anything else of it is believed.
        let all: serde_json::Map<String, serde_json::Value> =
            serde_json::from_slice(bytes).map_err(damaged)?;
        let format = all.get("format").and_then(|format| format.as_str()).unwrap_or_default().to_owned();
        if !READ.contains(&format.as_str()) && format.starts_with(FORMATS) {
            return Err(Flaw::Version(format!("its format is `{format}` and this fleet reads `{FORMAT}`")));
        }
        let keys: &[&str] = match format.as_str() {
            FORMAT_1 => &KEYS_1,
            FORMAT_2 => &KEYS_2,
            _ => &KEYS,
        };
        if let Some(key) = all.keys().find(|key| !keys.contains(&key.as_str())) {
            let what = format!(
                "its {MANIFEST_FILE} has the key `{}`, which this fleet does not know",
                key.escape_default()
            );
            return Err(Flaw::Version(what));
        }
        let manifest: Manifest = serde_json::from_value(all.into()).map_err(damaged)?;
        if !READ.contains(&manifest.format.as_str()) {
            return Err(Flaw::Damage(format!("its format is `{}`", manifest.format)));
        }
        manifest.check().map_err(|what| Flaw::Damage(format!("{MANIFEST_FILE} {what}")))?;
        Ok(manifest)
    }

    /// That what it says can be: names within the directory, pieces within their files and beside each other, whole tensors.
    pub(crate) fn check(&self) -> Result<(), String> {
        if self.files.len() > FILES_MAX {
            return Err(format!("names {} files", self.files.len()));
        }
        let leaves =
            |name: &&String| matches!(name.as_str(), "" | "." | "..") || name.contains(['/', '\\', '\0']);
        if let Some(name) = self.files.keys().find(leaves) {
            return Err(format!("names a file `{}`", name.escape_default()));
        }
        let disks = self.disks.len().max(1);
        if let Some((name, _)) = self.files.iter().find(|(_, file)| file.disk as usize >= disks) {
            return Err(format!("has `{}` on a disk that it does not name", name.escape_default()));
        }
        for (name, tensor) in &self.tensors {
            let held = tensor.pieces.iter().try_fold(0u64, |sum, piece| sum.checked_add(piece.bytes));
            if held.is_none() || held != tensor.bytes() {
                return Err(format!("has not all of the tensor {}", name.escape_default()));
            }
        }
        for (file, pieces) in self.pieces_by_file() {
            let Some(ManifestFile { bytes, .. }) = self.files.get(file) else {
                return Err(format!("has pieces in `{}`, which it does not name", file.escape_default()));
            };
            let mut free = 0;
            for (name, piece) in pieces {
                let end = piece.offset.checked_add(piece.bytes).filter(|end| end <= bytes);
                if piece.offset < free || piece.bytes > PIECE_MAX as u64 || end.is_none() {
                    return Err(format!("has a piece of {} where there is none", name.escape_default()));
                }
                free = piece.offset + piece.bytes;
            }
        }
        Ok(())
    }

    /// Reads the manifest of a checkpoint directory without checking the files it names.
    pub fn read(dir: &Path) -> Result<Manifest, CheckpointError> {
        Manifest::of_bytes(dir, &manifest_bytes(dir)?)
    }

    /// The manifest of the checkpoint `dir`, which is these bytes.
    pub(crate) fn of_bytes(dir: &Path, bytes: &[u8]) -> Result<Manifest, CheckpointError> {
        Manifest::parse(bytes).map_err(|flaw| match flaw {
            Flaw::Damage(what) => CheckpointError::damaged(dir, what),
            Flaw::Version(what) => CheckpointError::OtherVersion { path: dir.to_owned(), what },
        })
    }
}

/// SHA-256 of the manifest file, in hex: what a `CheckpointRecord` holds.
pub fn manifest_sha256(dir: &Path) -> Result<String, CheckpointError> {
    Ok(hex::encode(Sha256::digest(manifest_bytes(dir)?)))
}

/// Whether these bytes are those of the manifest with this hash, in hex.
pub fn is_manifest(bytes: &[u8], sha256: &str) -> bool {
    hex::encode(Sha256::digest(bytes)) == sha256
}

pub(crate) fn manifest_bytes(dir: &Path) -> Result<Vec<u8>, CheckpointError> {
    let path = dir.join(MANIFEST_FILE);
    let file = match File::open(&path) {
        Ok(file) => file,
        Err(_) if !dir.exists() => return Err(CheckpointError::Missing(dir.to_owned())),
        Err(_) if !dir.is_dir() => {
            let what = "it is a single file (a Lightning .ckpt or a PyTorch .pt holds pickled Python objects, which fleet does not \
                        read); name a directory step-* that fleet wrote";
            return Err(CheckpointError::foreign(dir, what));
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Err(no_manifest(dir)),
        Err(e) => return Err(CheckpointError::read(&path, e)),
    };
    let mut bytes = Vec::new();
    file.take(MANIFEST_MAX + 1).read_to_end(&mut bytes).map_err(|e| CheckpointError::read(&path, e))?;
    if bytes.len() as u64 > MANIFEST_MAX {
        return Err(CheckpointError::damaged(
            dir,
            format!("{MANIFEST_FILE} is larger than {MANIFEST_MAX} bytes"),
        ));
    }
    Ok(bytes)
}

/// Bytes that may still be written where `dir` is, where the file system tells.
pub(crate) fn free_bytes(dir: &Path) -> Option<u64> {
    let found = nix::sys::statvfs::statvfs(dir).ok()?;
    #[allow(clippy::useless_conversion)] // u32 on macOS
    let (blocks, size) = (u64::from(found.blocks_available()), u64::from(found.fragment_size()));
    Some(blocks.saturating_mul(size))
}

/// Says what a directory without a manifest seems to be.
fn no_manifest(dir: &Path) -> CheckpointError {
    let steps = crate::search::by_age(dir).unwrap_or_default();
    if let Some(newest) = steps.iter().rev().find(|found| found.seems_whole()) {
        let what = format!("it holds checkpoints; name one of them, such as {}", newest.name());
        return CheckpointError::foreign(dir, what);
    }
    if !steps.is_empty() {
        return CheckpointError::foreign(dir, "it holds checkpoints, and none of them is whole");
    }
    let weights = [MODEL_FILE, MODEL_INDEX_FILE, "pytorch_model.bin"];
    if let Some(name) = weights.iter().find(|name| dir.join(name).exists()) {
        let what = format!(
            "it has {name} but no {MANIFEST_FILE}, as a Hugging Face model has; to start from its weights set model.path \
             to it and leave resume_from_checkpoint out"
        );
        return CheckpointError::foreign(dir, what);
    }
    CheckpointError::foreign(dir, format!("it has no {MANIFEST_FILE}"))
}

#[cfg(test)]
mod tests;
