//! Writes one checkpoint: into a hidden directory, synced, then renamed. Whatever fails on the way, nothing is left behind.
//!
//! Each rank writes files of its own (`part.rs`). The first rank on a disk makes the directory there and waits until those that write to it have
//! handed in what they wrote (`collect`). Of several disks each then takes in what was written to the others (`handed`, `take_in`), so that all
//! write the same manifest (`prepare`), and when all have it, each publishes (`publish`). Who calls this sees to it that all are as far; rank 0
//! decides that there is a checkpoint.

use crate::manifest::{FORMAT, Manifest, ManifestTensor};
use crate::names::is_shard_of_model;
use crate::part::{HandedIn, Part, PartWriter, TensorPart, failed, handed_in, part_file};
use crate::run_dir::Owner;
use crate::{
    CheckpointError, Disks, MANIFEST_FILE, MODEL_INDEX_FILE, RunDir, TensorRef, TrainerState, search,
};
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
    /// The process that made the directory.
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

/// A checkpoint being written, in the hands of the first rank on a disk. Dropped before it is published, it removes what was written.
#[derive(Debug)]
pub struct Writer {
    owner: Owner,
    temporary: PathBuf,
    step: u64,
    ticket: Ticket,
    /// Of the manifest: the highest of all disks'.
    serial: u64,
    strategy: String,
    /// The first ranks, that write.
    writers: u32,
    disks: Disks,
    /// This one.
    disk: usize,
    own: PartWriter,
    /// Once it is prepared.
    record: Option<CheckpointRecord>,
    published: bool,
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
            serial,
            strategy: String::new(),
            writers: 1,
            disks: Disks::one(1),
            disk: 0,
            record: None,
            published: false,
        })
    }

    /// Written by `writers` ranks, which keep their numbers as `strategy` says.
    pub fn of(mut self, strategy: &str, writers: u32) -> Writer {
        (self.strategy, self.writers) = (strategy.to_owned(), writers);
        self.disks = Disks::one(writers as usize);
        self
    }

    /// On several disks, of which `disk` is this one. Before anything is written.
    pub fn among(mut self, disks: Disks, disk: usize) -> Writer {
        let lead = disks.lead(disk) as u32;
        self.own = PartWriter::new(self.temporary.clone(), self.step, lead);
        (self.disks, self.disk) = (disks, disk);
        self
    }

    /// For `PartWriter::join`.
    pub fn ticket(&self) -> Ticket {
        self.ticket
    }

    /// The serial of the checkpoint, which must be higher than those on all disks.
    pub fn numbered(&mut self, serial: u64) {
        self.serial = serial;
    }

    /// This rank's own part.
    pub fn part(&mut self) -> &mut PartWriter {
        &mut self.own
    }

    /// As `PartWriter`, into this rank's part.
    pub fn write_safetensors(&mut self, file: &str, tensors: &[TensorRef]) -> Result<(), CheckpointError> {
        self.own.write_safetensors(file, tensors)
    }

    pub fn write_bytes(&mut self, file: &str, bytes: &[u8]) -> Result<(), CheckpointError> {
        self.own.write_bytes(file, bytes)
    }

    pub fn write_state(&mut self, state: &TrainerState) -> Result<(), CheckpointError> {
        self.own.write_state(state)
    }

    /// Collects, prepares and publishes, on one disk.
    pub fn finish(self, loss: f64) -> Result<CheckpointRecord, CheckpointError> {
        self.finish_together(loss, &|| true)
    }

    /// The same when the parts of all ranks are there; they are waited for while `wait` says so.
    pub fn finish_together(
        mut self,
        loss: f64,
        wait: &dyn Fn() -> bool,
    ) -> Result<CheckpointRecord, CheckpointError> {
        self.collect(wait)?;
        self.prepare(loss)?;
        self.publish()
    }

    /// Takes the parts of the other ranks on this disk, which are waited for while `wait` says so.
    pub fn collect(&mut self, wait: &dyn Fn() -> bool) -> Result<(), CheckpointError> {
        let lead = self.disks.lead(self.disk) as u32;
        for rank in self.writers_on(self.disk).filter(move |rank| *rank != lead) {
            let part = self.part_of(rank, wait)?;
            fs::remove_file(self.temporary.join(part_file(rank)))
                .map_err(|e| self.failed(&self.temporary, e))?;
            self.merge(part, &[rank])?;
        }
        let disk = self.disk as u32;
        self.own.part.files.values_mut().for_each(|file| file.disk = disk);
        if self.disk == 0 { self.write_index() } else { Ok(()) }
    }

    /// What was written to this disk, for those of the other ones.
    pub fn handed(&self) -> Vec<u8> {
        serde_json::to_vec(&(&self.owner.run, &self.own.part)).expect("a part is plain data")
    }

    /// What was written to another disk, as `handed` has it there.
    pub fn take_in(&mut self, disk: usize, handed: &[u8]) -> Result<(), CheckpointError> {
        let unreadable = |e| self.inconsistent(format!("what {} says: {e}", self.disks.name(disk)));
        let (run, part): (String, Part) = serde_json::from_slice(handed).map_err(unreadable)?;
        if run != self.owner.run {
            let host = self.disks.name(disk);
            return Err(self.inconsistent(format!(
                "on {host} it is one of the run {run}, and here of {}",
                self.owner.run
            )));
        }
        let writers: Vec<u32> = self.writers_on(disk).collect();
        if let Some((name, _)) = part.files.iter().find(|(_, file)| file.disk as usize != disk) {
            return Err(
                self.inconsistent(format!("{name} is on another disk than {}", self.disks.name(disk)))
            );
        }
        self.merge(part, &writers)
    }

    /// Writes the manifest and syncs the directory. `loss` is the training loss of the last step, in nats.
    pub fn prepare(&mut self, loss: f64) -> Result<(), CheckpointError> {
        let tensors = std::mem::take(&mut self.own.part.tensors).into_iter().map(|(name, tensor)| {
            let tensor = whole(tensor).map_err(|what| self.inconsistent(format!("{what} of {name}")))?;
            Ok((name, tensor))
        });
        let tensors = tensors.collect::<Result<BTreeMap<_, _>, CheckpointError>>()?;
        let disks = match self.disks.written(self.writers as usize) {
            1 => Vec::new(),
            several => (0..several).map(|disk| self.disks.name(disk).to_owned()).collect(),
        };
        let manifest = Manifest {
            format: FORMAT.to_owned(),
            step: self.step,
            serial: self.serial,
            loss: loss.is_finite().then_some(loss),
            run: self.owner.run.clone(),
            strategy: std::mem::take(&mut self.strategy),
            world_size: self.writers,
            disks,
            files: std::mem::take(&mut self.own.part.files),
            tensors,
        };
        manifest.check().map_err(|what| self.inconsistent(format!("its {MANIFEST_FILE} {what}")))?;
        let bytes = serde_json::to_vec(&manifest).expect("a manifest is plain data");
        let (_, hashes) = self.own.write(MANIFEST_FILE, &[&bytes])?;
        sync_dir(&self.temporary).map_err(|e| self.failed(&self.temporary, e))?;
        let target = step_dir(&self.owner.dir, self.step);
        let by_file = manifest.pieces_by_file();
        let shards = manifest.files.iter().map(|(name, file)| Shard {
            writer: file.writer,
            name: name.clone(),
            bytes: file.bytes,
            sha256: manifest.file_sha256(file, by_file.get(name.as_str()).map_or(&[], Vec::as_slice)),
        });
        self.record = Some(CheckpointRecord {
            step: self.step,
            path: target.to_string_lossy().into_owned(),
            manifest_sha256: hashes.into_iter().next().expect("there is one part"),
            bytes: manifest.bytes(),
            loss,
            writers: self.writers,
            disks: self.disks.of_hosts().to_vec(),
            shards: shards.collect(),
        });
        Ok(())
    }

    /// Renames the directory into its place, where it replaces a checkpoint of the same step, and syncs the parent.
    ///
    /// # Panics
    /// If it is not prepared.
    pub fn publish(mut self) -> Result<CheckpointRecord, CheckpointError> {
        let mut record = self.record.take().expect("it is prepared");
        let target = step_dir(&self.owner.dir, self.step);
        if !self.owner.may_replace(&target) {
            let taken = io::Error::new(
                io::ErrorKind::AlreadyExists,
                "it is not a checkpoint of this run; move it away",
            );
            return Err(self.failed(&target, taken));
        }
        publish(&self.temporary, &target).map_err(|e| self.failed(&target, e))?;
        self.published = true;
        sync_dir(&self.owner.dir).map_err(|e| self.failed(&self.owner.dir, e))?;
        record.path = fs::canonicalize(&target).unwrap_or(target).to_string_lossy().into_owned();
        Ok(record)
    }

    /// Those that write to a disk.
    fn writers_on(&self, disk: usize) -> impl Iterator<Item = u32> + use<> {
        let ranks = self.disks.ranks(disk).filter(|rank| *rank < self.writers as usize);
        ranks.map(|rank| rank as u32).collect::<Vec<_>>().into_iter()
    }

    /// Puts what these ranks wrote to the rest.
    fn merge(&mut self, part: Part, by: &[u32]) -> Result<(), CheckpointError> {
        let Part { files, tensors } = part;
        for (name, file) in files {
            let rank = file.writer;
            if !by.contains(&rank) || self.own.part.files.insert(name.clone(), file).is_some() {
                return Err(self.inconsistent(format!("rank {rank} has written {name}, as another one has")));
            }
        }
        for (name, tensor) in tensors {
            match self.own.part.tensors.get_mut(&name) {
                Some(known) if (known.dtype, &known.shape) == (tensor.dtype, &tensor.shape) => {
                    known.pieces.extend(tensor.pieces);
                }
                Some(_) => {
                    let rank = by.first().copied().unwrap_or_default();
                    return Err(self.inconsistent(format!("rank {rank} has another {name} than the others")));
                }
                None => drop(self.own.part.tensors.insert(name, tensor)),
            }
        }
        Ok(())
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
    fn write_index(&mut self) -> Result<(), CheckpointError> {
        let tensors = &self.own.part.tensors;
        let place = |(name, tensor): (&String, &TensorPart)| {
            let (_, piece) = tensor.pieces.first().filter(|(_, piece)| is_shard_of_model(&piece.file))?;
            Some((name.clone(), piece.file.clone()))
        };
        let weight_map: BTreeMap<String, String> = tensors.iter().filter_map(place).collect();
        if weight_map.is_empty() {
            return Ok(());
        }
        let bytes = |name: &String| tensors[name].pieces.iter().map(|(_, piece)| piece.bytes).sum::<u64>();
        let total: u64 = weight_map.keys().map(bytes).sum();
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
        if !self.published
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
