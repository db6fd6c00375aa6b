//! Writes one checkpoint: into a hidden directory, synced, then renamed. Whatever fails on the way, nothing is left behind.

use crate::manifest::{FORMAT, Manifest, ManifestFile};
use crate::{CheckpointError, MANIFEST_FILE, RunDir, STATE_FILE, TrainerState, search};
use fleet_common::events::{CheckpointRecord, Shard};
use safetensors::Dtype;
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, HashSet};
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// Directories that are being written or removed begin with this; no reader looks at them.
pub(crate) const TEMPORARY: &str = ".tmp-";

/// Handed to the system in one call, in bytes, so that a full disk is noticed early.
const WRITE_CHUNK: usize = 8 << 20;

/// A tensor to write. `data` holds `shape`'s elements in row-major order, little-endian.
#[derive(Clone, Copy, Debug)]
pub struct TensorRef<'a> {
    pub name: &'a str,
    pub dtype: Dtype,
    pub shape: &'a [usize],
    pub data: &'a [u8],
}

/// A checkpoint being written. Dropped before `finish`, it removes what it wrote.
#[derive(Debug)]
pub struct Writer<'a> {
    dir: &'a RunDir,
    temporary: PathBuf,
    step: u64,
    serial: u64,
    files: BTreeMap<String, ManifestFile>,
    finished: bool,
}

/// `<checkpoint_dir>/step-00000100`.
pub fn step_dir(checkpoint_dir: &Path, step: u64) -> PathBuf {
    checkpoint_dir.join(format!("step-{step:08}"))
}

impl<'a> Writer<'a> {
    /// Starts the checkpoint of `step` (optimizer steps done) in `dir`. What dead writers left there is removed.
    pub fn begin(dir: &'a RunDir, step: u64) -> Result<Writer<'a>, CheckpointError> {
        let fail = |path: &Path, source| CheckpointError::Write { step, path: path.to_owned(), source };
        let place = dir.path();
        search::remove_leftovers(place).map_err(|e| fail(place, e))?;
        let serial = search::highest_serial(place).map_err(|e| fail(place, e))? + 1;
        // The serial tells it from what an earlier one may have left here for good.
        let temporary = place.join(format!("{TEMPORARY}step-{step:08}-{serial}-{}", std::process::id()));
        fs::create_dir(&temporary).map_err(|e| fail(&temporary, e))?;
        Ok(Writer { dir, temporary, step, serial, files: BTreeMap::new(), finished: false })
    }

    /// Writes tensors as a safetensors file, straight from their memory, hashing on a second thread.
    ///
    /// # Panics
    /// If a tensor's bytes do not match its shape, or two share a name: the caller laid them out.
    pub fn write_safetensors(&mut self, file: &str, tensors: &[TensorRef]) -> Result<(), CheckpointError> {
        let mut ordered: Vec<&TensorRef> = tensors.iter().collect();
        ordered.sort_by_key(|t| std::cmp::Reverse(t.dtype.bitsize())); // keeps every tensor aligned to its elements
        let header = header(&ordered);
        let mut parts = vec![header.as_slice()];
        parts.extend(ordered.iter().map(|t| t.data));
        self.write_parts(file, &parts)
    }

    /// Writes a file of these bytes.
    pub fn write_bytes(&mut self, file: &str, bytes: &[u8]) -> Result<(), CheckpointError> {
        self.write_parts(file, &[bytes])
    }

    /// Writes `trainer_state.json`.
    pub fn write_state(&mut self, state: &TrainerState) -> Result<(), CheckpointError> {
        let json = serde_json::to_vec_pretty(state).expect("a trainer state is plain data");
        self.write_bytes(STATE_FILE, &json)
    }

    /// Writes the manifest, syncs the directory, renames it into place (replacing a checkpoint of the same step) and syncs the
    /// parent. `loss` is the training loss of the last step, in nats.
    pub fn finish(mut self, loss: f64) -> Result<CheckpointRecord, CheckpointError> {
        let manifest = Manifest {
            format: FORMAT.to_owned(),
            step: self.step,
            serial: self.serial,
            loss: loss.is_finite().then_some(loss),
            run: self.dir.run().to_owned(),
            files: std::mem::take(&mut self.files),
        };
        let bytes = serde_json::to_vec_pretty(&manifest).expect("a manifest is plain data");
        let manifest_sha256 = self.write_file(MANIFEST_FILE, &[&bytes])?.sha256;
        let target = step_dir(self.dir.path(), self.step);
        if !self.dir.may_replace(&target) {
            let taken = io::Error::new(
                io::ErrorKind::AlreadyExists,
                "it is not a checkpoint of this run; move it away",
            );
            return Err(self.failed(&target, taken));
        }
        sync_dir(&self.temporary).map_err(|e| self.failed(&self.temporary, e))?;
        publish(&self.temporary, &target).map_err(|e| self.failed(&target, e))?;
        self.finished = true;
        sync_dir(self.dir.path()).map_err(|e| self.failed(self.dir.path(), e))?;
        let shards = manifest.files.iter().map(|(name, file)| Shard {
            writer: 0,
            name: name.clone(),
            bytes: file.bytes,
            sha256: file.sha256.clone(),
        });
        let path = fs::canonicalize(&target).unwrap_or(target);
        Ok(CheckpointRecord {
            step: self.step,
            path: path.to_string_lossy().into_owned(),
            manifest_sha256,
            bytes: manifest.bytes(),
            loss,
            // Whatever their number, rank 0 writes for all.
            writers: 1,
            shards: shards.collect(),
        })
    }

    fn write_parts(&mut self, file: &str, parts: &[&[u8]]) -> Result<(), CheckpointError> {
        let entry = self.write_file(file, parts)?;
        self.files.insert(file.to_owned(), entry);
        Ok(())
    }

    fn write_file(&self, name: &str, parts: &[&[u8]]) -> Result<ManifestFile, CheckpointError> {
        let path = self.temporary.join(name);
        std::thread::scope(|scope| {
            let hash = scope.spawn(|| {
                let mut hasher = Sha256::new();
                parts.iter().for_each(|part| hasher.update(part));
                hex::encode(hasher.finalize())
            });
            let write = || {
                let mut out = File::create_new(&path)?;
                for part in parts {
                    part.chunks(WRITE_CHUNK).try_for_each(|chunk| out.write_all(chunk))?;
                }
                out.sync_all()
            };
            write().map_err(|e| self.failed(&path, e))?;
            let sha256 = hash.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            Ok(ManifestFile { bytes: parts.iter().map(|part| part.len() as u64).sum(), sha256 })
        })
    }

    fn failed(&self, path: &Path, source: io::Error) -> CheckpointError {
        CheckpointError::Write { step: self.step, path: path.to_owned(), source }
    }
}

impl Drop for Writer<'_> {
    fn drop(&mut self) {
        if !self.finished
            && let Err(e) = fs::remove_dir_all(&self.temporary)
        {
            tracing::warn!("cannot remove the unfinished checkpoint {}: {e}", self.temporary.display());
        }
    }
}

/// Length and JSON header of a safetensors file with these tensors in this order, padded to 8 bytes.
fn header(tensors: &[&TensorRef]) -> Vec<u8> {
    let mut names = HashSet::new();
    let mut entries = serde_json::Map::new();
    entries.insert("__metadata__".into(), serde_json::json!({ "format": "pt" }));
    let mut begin = 0usize;
    for tensor in tensors {
        let bits = tensor.shape.iter().product::<usize>() * tensor.dtype.bitsize();
        assert_eq!(
            tensor.data.len() * 8,
            bits,
            "bytes of tensor {} of shape {:?}",
            tensor.name,
            tensor.shape
        );
        assert!(names.insert(tensor.name), "two tensors are called {}", tensor.name);
        let end = begin + tensor.data.len();
        let entry =
            serde_json::json!({ "dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [begin, end] });
        entries.insert(tensor.name.to_owned(), entry);
        begin = end;
    }
    let mut json = serde_json::to_vec(&entries).expect("a header is plain data");
    json.resize(json.len().next_multiple_of(8), b' ');
    let mut header = (json.len() as u64).to_le_bytes().to_vec();
    header.extend(json);
    header
}

/// Makes a directory and the missing ones above it so that they are still there after a power cut. Returns those, the deepest first.
pub(crate) fn create_dir_durably(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let missing: Vec<PathBuf> = dir
        .ancestors()
        .take_while(|d| !d.as_os_str().is_empty() && !d.exists())
        .map(Path::to_owned)
        .collect();
    fs::create_dir_all(dir)?;
    let above = missing.iter().filter_map(|d| d.parent()).filter(|d| !d.as_os_str().is_empty());
    above.into_iter().try_for_each(sync_dir)?;
    Ok(missing)
}

pub(crate) fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

/// Makes `temporary` appear as `target` in one step, also where a checkpoint of that name is there already.
fn publish(temporary: &Path, target: &Path) -> io::Result<()> {
    if !target.exists() {
        return fs::rename(temporary, target);
    }
    exchange(temporary, target)?;
    // Now the one that was replaced. The new one is in its place, whatever becomes of it.
    if let Err(e) = fs::remove_dir_all(temporary) {
        tracing::warn!("cannot remove {}, a checkpoint that was replaced: {e}", temporary.display());
    }
    Ok(())
}

#[cfg(target_os = "linux")]
fn exchange(a: &Path, b: &Path) -> io::Result<()> {
    use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
    match renameat2(AT_FDCWD, a, AT_FDCWD, b, RenameFlags::RENAME_EXCHANGE) {
        Err(nix::errno::Errno::EINVAL | nix::errno::Errno::ENOSYS) => exchange_in_two_renames(a, b),
        other => Ok(other?),
    }
}

#[cfg(not(target_os = "linux"))]
fn exchange(a: &Path, b: &Path) -> io::Result<()> {
    exchange_in_two_renames(a, b)
}

/// For systems and file systems without an atomic exchange; `a` is temporary, and so is the name between.
fn exchange_in_two_renames(a: &Path, b: &Path) -> io::Result<()> {
    let between = a.with_file_name(format!("{TEMPORARY}replaced-{}", std::process::id()));
    fs::rename(b, &between)?;
    fs::rename(a, b)?;
    fs::rename(&between, a)
}
