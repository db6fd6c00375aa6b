//! Writes one checkpoint: into a hidden directory, synced, then renamed. Whatever fails on the way, nothing is left behind.
//!
//! Each rank writes files of its own (`part.rs`). Rank 0 makes the directory, waits until all have handed in what they wrote, holds together
//! what they say, and publishes it. Only it decides that there is a checkpoint.

use crate::manifest::{FORMAT, Manifest, ManifestTensor};
use crate::names::is_shard_of_model;
use crate::part::{HandedIn, Part, PartWriter, TensorPart, failed, handed_in, part_file};
use crate::run_dir::Owner;
use crate::{CheckpointError, MANIFEST_FILE, MODEL_INDEX_FILE, RunDir, TensorRef, TrainerState, search};
use fleet_common::events::{CheckpointRecord, Shard};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Directories that are being written or removed begin with this; no reader looks at them.
pub(crate) const TEMPORARY: &str = ".tmp-";

/// Between two looks at what the others have handed in.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// Names the directory that a checkpoint is written to, for all ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ticket {
    pub serial: u64,
    /// The process of rank 0.
    pub pid: u32,
}

impl Ticket {
    /// As they are summed with those of ranks that have none: zeros.
    pub fn numbers(self) -> [f64; 3] {
        [self.pid, (self.serial >> 32) as u32, self.serial as u32].map(f64::from)
    }

    /// `None` where nobody had one.
    pub fn of_numbers([pid, high, low]: [f64; 3]) -> Option<Ticket> {
        let serial = ((high as u64) << 32) | low as u64;
        (pid > 0.0).then_some(Ticket { serial, pid: pid as u32 })
    }
}

/// A checkpoint being written, in the hands of rank 0. Dropped before `finish`, it removes what was written.
#[derive(Debug)]
pub struct Writer {
    owner: Owner,
    temporary: PathBuf,
    step: u64,
    ticket: Ticket,
    strategy: String,
    world_size: u32,
    own: PartWriter,
    finished: bool,
}

/// `<checkpoint_dir>/step-00000100`.
pub fn step_dir(checkpoint_dir: &Path, step: u64) -> PathBuf {
    checkpoint_dir.join(format!("step-{step:08}"))
}

/// The serial tells it from what an earlier one may have left there for good.
pub(crate) fn temporary_dir(checkpoint_dir: &Path, step: u64, ticket: Ticket) -> PathBuf {
    checkpoint_dir.join(format!("{TEMPORARY}step-{step:08}-{}-{}", ticket.serial, ticket.pid))
}

impl Writer {
    /// Starts the checkpoint of `step` (optimizer steps done) in `dir`. What dead writers left there is removed.
    pub fn begin(dir: &RunDir, step: u64) -> Result<Writer, CheckpointError> {
        let place = dir.path();
        search::remove_leftovers(place, true).map_err(|e| failed(step, place, e))?;
        let serial = search::highest_serial(place).map_err(|e| failed(step, place, e))? + 1;
        let ticket = Ticket { serial, pid: std::process::id() };
        let temporary = temporary_dir(place, step, ticket);
        fs::create_dir(&temporary).map_err(|e| failed(step, &temporary, e))?;
        Ok(Writer {
            owner: dir.owner().clone(),
            own: PartWriter::new(temporary.clone(), step, 0),
            temporary,
            step,
            ticket,
            strategy: String::new(),
            world_size: 1,
            finished: false,
        })
    }

    /// Written by `world_size` ranks, which keep their numbers as `strategy` says.
    pub fn of(mut self, strategy: &str, world_size: u32) -> Writer {
        (self.strategy, self.world_size) = (strategy.to_owned(), world_size);
        self
    }

    /// For `PartWriter::join`.
    pub fn ticket(&self) -> Ticket {
        self.ticket
    }

    /// Rank 0's own part.
    pub fn part(&mut self) -> &mut PartWriter {
        &mut self.own
    }

    /// As `PartWriter`, into rank 0's part.
    pub fn write_safetensors(&mut self, file: &str, tensors: &[TensorRef]) -> Result<(), CheckpointError> {
        self.own.write_safetensors(file, tensors)
    }

    pub fn write_bytes(&mut self, file: &str, bytes: &[u8]) -> Result<(), CheckpointError> {
        self.own.write_bytes(file, bytes)
    }

    pub fn write_state(&mut self, state: &TrainerState) -> Result<(), CheckpointError> {
        self.own.write_state(state)
    }

    /// Writes index and manifest, syncs the directory, renames it into place (replacing a checkpoint of the same step) and syncs the parent.
    /// `loss` is the training loss of the last step, in nats.
    pub fn finish(self, loss: f64) -> Result<CheckpointRecord, CheckpointError> {
        self.finish_together(loss, &|| true)
    }

    /// The same when the parts of all ranks are there; they are waited for while `wait` says so.
    pub fn finish_together(
        mut self,
        loss: f64,
        wait: &dyn Fn() -> bool,
    ) -> Result<CheckpointRecord, CheckpointError> {
        let tensors = self.collect(wait)?;
        self.write_index(&tensors)?;
        let manifest = Manifest {
            format: FORMAT.to_owned(),
            step: self.step,
            serial: self.ticket.serial,
            loss: loss.is_finite().then_some(loss),
            run: self.owner.run.clone(),
            strategy: std::mem::take(&mut self.strategy),
            world_size: self.world_size,
            files: std::mem::take(&mut self.own.part.files),
            tensors,
        };
        manifest.check().map_err(|what| self.inconsistent(format!("its {MANIFEST_FILE} {what}")))?;
        let bytes = serde_json::to_vec(&manifest).expect("a manifest is plain data");
        let (_, hashes) = self.own.write(MANIFEST_FILE, &[&bytes])?;
        let target = step_dir(&self.owner.dir, self.step);
        if !self.owner.may_replace(&target) {
            let taken = io::Error::new(
                io::ErrorKind::AlreadyExists,
                "it is not a checkpoint of this run; move it away",
            );
            return Err(self.failed(&target, taken));
        }
        sync_dir(&self.temporary).map_err(|e| self.failed(&self.temporary, e))?;
        publish(&self.temporary, &target).map_err(|e| self.failed(&target, e))?;
        self.finished = true;
        sync_dir(&self.owner.dir).map_err(|e| self.failed(&self.owner.dir, e))?;
        let path = fs::canonicalize(&target).unwrap_or(target);
        let by_file = manifest.pieces_by_file();
        let shards = manifest.files.iter().map(|(name, file)| Shard {
            writer: file.writer,
            name: name.clone(),
            bytes: file.bytes,
            sha256: manifest.file_sha256(file, by_file.get(name.as_str()).map_or(&[], Vec::as_slice)),
        });
        Ok(CheckpointRecord {
            step: self.step,
            path: path.to_string_lossy().into_owned(),
            manifest_sha256: hashes.into_iter().next().expect("there is one part"),
            bytes: manifest.bytes(),
            loss,
            writers: self.world_size,
            shards: shards.collect(),
        })
    }

    /// The tensors of all parts, each whole; their files are put to rank 0's own.
    fn collect(
        &mut self,
        wait: &dyn Fn() -> bool,
    ) -> Result<BTreeMap<String, ManifestTensor>, CheckpointError> {
        let mut tensors = std::mem::take(&mut self.own.part.tensors);
        for rank in 1..self.world_size {
            let Part { files, tensors: more } = self.part_of(rank, wait)?;
            fs::remove_file(self.temporary.join(part_file(rank)))
                .map_err(|e| self.failed(&self.temporary, e))?;
            for (name, file) in files {
                if file.writer != rank || self.own.part.files.insert(name.clone(), file).is_some() {
                    return Err(
                        self.inconsistent(format!("rank {rank} has written {name}, as another one has"))
                    );
                }
            }
            for (name, tensor) in more {
                match tensors.get_mut(&name) {
                    Some(known) if (known.dtype, &known.shape) == (tensor.dtype, &tensor.shape) => {
                        known.pieces.extend(tensor.pieces);
                    }
                    Some(_) => {
                        return Err(
                            self.inconsistent(format!("rank {rank} has another {name} than the others"))
                        );
                    }
                    None => drop(tensors.insert(name, tensor)),
                }
            }
        }
        let whole = |(name, tensor): (String, TensorPart)| {
            let tensor = whole(tensor).map_err(|what| self.inconsistent(format!("{what} of {name}")))?;
            Ok((name, tensor))
        };
        tensors.into_iter().map(whole).collect()
    }

    fn part_of(&self, rank: u32, wait: &dyn Fn() -> bool) -> Result<Part, CheckpointError> {
        loop {
            match handed_in(&self.temporary, rank).map_err(|e| self.failed(&self.temporary, e))? {
                Some(HandedIn::Written(part)) => return Ok(part),
                Some(HandedIn::Failed { is_full, line }) => {
                    return Err(CheckpointError::Peer { step: self.step, rank, is_full, line });
                }
                None if wait() => std::thread::sleep(LOOK_EVERY),
                None => {
                    let line = "its part did not come".to_owned();
                    return Err(CheckpointError::Peer { step: self.step, rank, is_full: false, line });
                }
            }
        }
    }

    /// Tells transformers which of several files has each weight.
    fn write_index(&mut self, tensors: &BTreeMap<String, ManifestTensor>) -> Result<(), CheckpointError> {
        let place = |(name, tensor): (&String, &ManifestTensor)| {
            let piece = tensor.pieces.first().filter(|piece| is_shard_of_model(&piece.file))?;
            Some((name.clone(), piece.file.clone()))
        };
        let weight_map: BTreeMap<String, String> = tensors.iter().filter_map(place).collect();
        if weight_map.is_empty() {
            return Ok(());
        }
        let total: u64 = weight_map.keys().filter_map(|name| tensors[name].bytes()).sum();
        let index = serde_json::json!({ "metadata": { "total_size": total }, "weight_map": weight_map });
        let json = serde_json::to_vec_pretty(&index).expect("an index is plain data");
        self.own.write_bytes(MODEL_INDEX_FILE, &json)
    }

    fn failed(&self, path: &Path, source: io::Error) -> CheckpointError {
        failed(self.step, path, source)
    }

    fn inconsistent(&self, what: String) -> CheckpointError {
        self.failed(&self.temporary, io::Error::new(io::ErrorKind::InvalidData, what))
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        if !self.finished
            && let Err(e) = fs::remove_dir_all(&self.temporary)
        {
            tracing::warn!("cannot remove the unfinished checkpoint {}: {e}", self.temporary.display());
        }
    }
}

/// A tensor whose pieces, in their order, leave nothing out and hold nothing twice; else what is wrong.
pub(crate) fn whole(mut tensor: TensorPart) -> Result<ManifestTensor, String> {
    tensor.pieces.sort_by_key(|(at, _)| *at);
    let mut next = 0;
    for (at, piece) in &tensor.pieces {
        match *at {
            at if at > next => return Err(format!("nobody has written bytes {next}..{at}")),
            at if at < next => return Err(format!("two ranks have written bytes {at}..{next}")),
            _ => next += piece.bytes,
        }
    }
    let pieces = tensor.pieces.into_iter().map(|(_, piece)| piece).collect();
    Ok(ManifestTensor { dtype: tensor.dtype, shape: tensor.shape, pieces })
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
pub(crate) fn publish(temporary: &Path, target: &Path) -> io::Result<()> {
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
