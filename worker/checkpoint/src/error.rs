//! What can be wrong with a checkpoint, each in one line that names the path and the cure.

use fleet_common::exit::Fault;
use std::io;
use std::path::{Path, PathBuf};

#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// Writing failed: disk full, no permission. Nothing is left behind, older checkpoints are untouched.
    #[error(
        "checkpoint of step {step} was not saved: cannot write {path}: {source}{}",
        full_disk_hint(source)
    )]
    Write {
        step: u64,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// A copy of a checkpoint, elsewhere. Nothing is left behind.
    #[error("cannot write a checkpoint to {path}: {source}{}", full_disk_hint(source))]
    Copy {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// A model or an adapter that is made of others. Nothing is left behind.
    #[error("cannot write {path}: {source}{}; nothing is left of it", full_disk_hint(source))]
    New {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// Another rank did not write its part. Nothing is left behind, older checkpoints are untouched.
    #[error("checkpoint of step {step} was not saved by rank {rank}: {line}")]
    Peer { step: u64, rank: u32, is_full: bool, line: String },
    /// Nothing is left behind, older checkpoints are untouched.
    #[error("the numbers to be saved cannot be copied: {0}")]
    Device(String),
    #[error("cannot read {path}: {source}")]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// One that may be whole.
    #[error(
        "the checkpoint {path} cannot be read now: {source}; make it readable, or move it away, and start again"
    )]
    Unreadable {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// One that is whole for the version of fleet that wrote it.
    #[error(
        "the checkpoint {path} was written by another version of fleet: {what}; continue it with that version, or move it away"
    )]
    OtherVersion { path: PathBuf, what: String },
    #[error(
        "there is no checkpoint at {0}; check the path, write \"latest\" for the newest one that is there, or leave `resume_from_checkpoint` out to start anew"
    )]
    Missing(PathBuf),
    /// Not written by fleet.
    #[error("{path} is not a fleet checkpoint: {what}")]
    Foreign { path: PathBuf, what: String },
    /// Written by fleet, but not as it was.
    #[error("the checkpoint {path} is damaged: {what}; resume from an older one")]
    Damaged { path: PathBuf, what: String },
    /// As it was written to one of several disks.
    #[error(
        "the checkpoint {path} is here only in part: {what}; `fleet checkpoints show` names the nodes that have them, and a job that continues \
         it fetches them"
    )]
    Partial { path: PathBuf, what: String },
    #[error("{path} is not a usable safetensors file: {what}")]
    Tensors { path: PathBuf, what: String },
    /// Weights in few bits that do not say what they should.
    #[error(
        "{path} is not a usable file of weights in few bits: {what}; copy it again, or quantise the model as it was before (fleet quantise)"
    )]
    Quantised { path: PathBuf, what: String },
    /// A model directory that fleet cannot run, or whose weights do not fit its description.
    #[error("{path}: {what}")]
    Model { path: PathBuf, what: String },
    /// Found before anything is trained.
    #[error(
        "checkpoints cannot be written to {path}: {source}; set output_dir to a directory that this user may write to, with room"
    )]
    Unwritable {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// Old checkpoints that should go do not. All that is saved stays, but for one of which a part is removed: it is not called a checkpoint.
    #[error("cannot remove {path}: {source}{}", rest.as_ref().map_or(String::new(), |rest| format!("; what is left of it lies in {}", rest.display())))]
    Rotation {
        path: PathBuf,
        rest: Option<PathBuf>,
        #[source]
        source: io::Error,
    },
    /// Another process holds the directory's lock.
    #[error(
        "another job is writing its checkpoints to {0}; wait for its end, or give this one another run_name"
    )]
    Busy(PathBuf),
    /// A run that would begin where another one's checkpoints lie.
    #[error("{dir} holds checkpoints of another run ({count}, the newest {newest}{}", ways_out(*is_whole))]
    Occupied { dir: PathBuf, count: usize, newest: String, is_whole: bool },
    /// A run that continues would have to save in their place.
    #[error(
        "{dir} holds checkpoints of another run after step {step} ({count}, such as {first}), where this one would save: move them away, set \
         overwrite = true to replace them, or give this run another run_name and resume_from_checkpoint = {resumed:?}"
    )]
    Ahead { dir: PathBuf, step: u64, count: usize, first: String, resumed: PathBuf },
    /// What lies where this run may have to write a checkpoint, and is none.
    #[error(
        "{0} is not a checkpoint that fleet wrote, and this run may write one there; move it away, or set another run_name"
    )]
    InTheWay(PathBuf),
    /// What the job reads would be removed while it runs.
    #[error(
        "the job reads {path}, which overwrite = true would remove with {checkpoint}; set another run_name"
    )]
    InUse { path: PathBuf, checkpoint: PathBuf },
    /// `latest` found checkpoints, and all are damaged.
    #[error(
        "none of the checkpoints in {dir} ({count}) is whole ({}): begin anew, with another run_name or with \
         overwrite = true", newest.what()
    )]
    NoneWhole { dir: PathBuf, count: usize, newest: Box<CheckpointError> },
    /// A good checkpoint of another run.
    #[error("the checkpoint does not fit this job: {0}")]
    Incompatible(String),
}

impl CheckpointError {
    /// A disk that fails or is full is the environment's; everything else was named by the user.
    pub fn fault(&self) -> Fault {
        match self {
            CheckpointError::Write { .. }
            | CheckpointError::Copy { .. }
            | CheckpointError::New { .. }
            | CheckpointError::Peer { .. }
            | CheckpointError::Device(_)
            | CheckpointError::Unwritable { .. }
            | CheckpointError::Rotation { .. }
            | CheckpointError::Unreadable { .. }
            | CheckpointError::Read { .. } => Fault::Environment,
            _ => Fault::Input,
        }
    }

    /// Whether there was no room for a checkpoint.
    pub fn is_full_disk(&self) -> bool {
        match self {
            CheckpointError::Write { source, .. } => is_full_disk(source),
            CheckpointError::Peer { is_full, .. } => *is_full,
            _ => false,
        }
    }

    /// What is wrong with which, without what to do about it.
    fn what(&self) -> String {
        match self {
            CheckpointError::Damaged { path, what }
            | CheckpointError::Partial { path, what }
            | CheckpointError::Foreign { path, what } => {
                format!("{}: {what}", path.file_name().unwrap_or_default().display())
            }
            other => other.to_string(),
        }
    }

    pub(crate) fn read(path: &Path, source: io::Error) -> Self {
        CheckpointError::Read { path: path.to_owned(), source }
    }

    pub(crate) fn damaged(path: &Path, what: impl Into<String>) -> Self {
        CheckpointError::Damaged { path: path.to_owned(), what: what.into() }
    }

    pub(crate) fn foreign(path: &Path, what: impl Into<String>) -> Self {
        CheckpointError::Foreign { path: path.to_owned(), what: what.into() }
    }
}

pub(crate) fn is_full_disk(source: &io::Error) -> bool {
    matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

fn full_disk_hint(source: &io::Error) -> &'static str {
    if is_full_disk(source) { "; make room" } else { "" }
}

fn ways_out(is_whole: bool) -> &'static str {
    match is_whole {
        true => {
            "): set resume_from_checkpoint = \"latest\" to continue it, another run_name to leave it as it is, or overwrite = true to \
             replace it"
        }
        false => {
            "), none of them whole: set another run_name to leave them as they are, or overwrite = true to replace them"
        }
    }
}
