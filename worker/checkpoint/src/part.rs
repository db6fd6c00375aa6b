//! What one rank writes of a checkpoint: files of its own, each synced, with a hash for every byte. Where several ranks write, each of
//! them hands its part in to the first one on its disk by a small file in the directory that they write to: no step waits for it.

use crate::manifest::{ManifestFile, PIECE_MAX, Piece};
use crate::writer::{Ticket, temporary_dir};
use crate::{CheckpointError, STATE_FILE, Tensor, TrainerState};
use safetensors::Dtype;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// Handed to the system in one call, in bytes, so that a full disk is noticed early.
const WRITE_CHUNK: usize = 8 << 20;

/// A tensor to write, or a part of one.
#[derive(Clone, Copy, Debug)]
pub struct TensorRef<'a> {
    pub name: &'a str,
    pub dtype: Dtype,
    /// Of the whole tensor.
    pub shape: &'a [usize],
    /// The number of it, in row-major order, with which `data` begins.
    pub first: usize,
    /// Little-endian.
    pub data: &'a [u8],
}

impl TensorRef<'_> {
    fn first_byte(&self) -> usize {
        self.first * self.dtype.bitsize() / 8
    }

    /// In the header of its file: a part says which, as a slice.
    fn entry(&self) -> (Cow<'_, str>, Dtype, Cow<'_, [usize]>, usize) {
        let (bytes, bits) = (self.data.len(), self.dtype.bitsize());
        let whole = self.shape.iter().product::<usize>();
        if whole * bits == bytes * 8 {
            return (self.name.into(), self.dtype, self.shape.into(), bytes);
        }
        let numbers = bytes * 8 / bits;
        let end = self.first + numbers;
        assert!(end <= whole, "numbers up to {end} of tensor {} of shape {:?}", self.name, self.shape);
        (format!("{}[{}:{end}]", self.name, self.first).into(), self.dtype, vec![numbers].into(), bytes)
    }
}

/// What was written, as it goes into the manifest.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Part {
    pub files: BTreeMap<String, ManifestFile>,
    pub tensors: BTreeMap<String, TensorPart>,
}

/// Pieces of one tensor, each with the byte of the tensor that it begins with.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct TensorPart {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub pieces: Vec<(u64, Piece)>,
}

/// What a rank tells the first one on its disk when it has written.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum HandedIn {
    Written(Part),
    /// Whether the disk is full, and a line that says why nothing was written.
    Failed {
        is_full: bool,
        line: String,
    },
}

/// One rank's pen.
#[derive(Debug)]
pub struct PartWriter {
    dir: PathBuf,
    /// Of the checkpoint; none where it is none that is written.
    step: Option<u64>,
    writer: u32,
    pub(crate) part: Part,
}

impl PartWriter {
    /// Rank `writer`'s part of the checkpoint of `step` that the first rank on this disk began in `checkpoint_dir` and tells of with `ticket`.
    pub fn join(checkpoint_dir: &Path, step: u64, ticket: Ticket, writer: u32) -> PartWriter {
        PartWriter::new(temporary_dir(checkpoint_dir, step, ticket), step, writer)
    }

    pub(crate) fn new(dir: PathBuf, step: impl Into<Option<u64>>, writer: u32) -> PartWriter {
        PartWriter { dir, step: step.into(), writer, part: Part::default() }
    }

    /// Writes tensors as a safetensors file, straight from their memory, hashing on a second thread.
    ///
    /// # Panics
    /// If a tensor's bytes do not fit its shape, or two share a name: the caller laid them out.
    pub fn write_safetensors(&mut self, file: &str, tensors: &[TensorRef]) -> Result<(), CheckpointError> {
        let mut ordered: Vec<&TensorRef> = tensors.iter().collect();
        ordered.sort_by_key(|t| std::cmp::Reverse(t.dtype.bitsize())); // keeps every tensor aligned to its elements
        let header = header(ordered.iter().map(|t| t.entry()));
        let mut parts = vec![header.as_slice()];
        parts.extend(ordered.iter().flat_map(|t| t.data.chunks(PIECE_MAX)));
        let (bytes, hashes) = self.write(file, &parts)?;
        let mut hashes = hashes.into_iter();
        let sha256 = hashes.next().expect("the header is the first part");
        self.part.files.insert(file.to_owned(), ManifestFile { bytes, sha256, writer: self.writer, disk: 0 });
        let mut offset = header.len() as u64;
        for tensor in ordered {
            let known = self.part.tensors.entry(tensor.name.to_owned()).or_insert_with(|| TensorPart {
                dtype: tensor.dtype,
                shape: tensor.shape.to_vec(),
                pieces: Vec::new(),
            });
            let mut at = tensor.first_byte() as u64;
            for (data, sha256) in tensor.data.chunks(PIECE_MAX).zip(&mut hashes) {
                let bytes = data.len() as u64;
                known.pieces.push((at, Piece { file: file.to_owned(), offset, bytes, sha256 }));
                (at, offset) = (at + bytes, offset + bytes);
            }
        }
        Ok(())
    }

    /// Copies tensors of other files into one, a piece at a time.
    pub(crate) fn copy_safetensors(&mut self, file: &str, tensors: &[Tensor]) -> Result<(), CheckpointError> {
        let mut ordered: Vec<&Tensor> = tensors.iter().collect();
        ordered.sort_by_key(|t| std::cmp::Reverse(t.dtype.bitsize()));
        let entries = ordered.iter().map(|t| (t.name.into(), t.dtype, t.shape.into(), t.len()));
        let header = header(entries);
        let path = self.dir.join(file);
        let cannot = |e| failed(self.step, &path, e);
        let mut out = File::create_new(&path).map_err(cannot)?;
        out.write_all(&header).map_err(cannot)?;
        let mut offset = header.len() as u64;
        for tensor in ordered {
            let (mut pieces, mut at, mut written) = (Vec::new(), 0, Ok(()));
            tensor.pieces(0..tensor.len(), &mut |data| {
                let (bytes, sha256) = (data.len() as u64, hex::encode(Sha256::digest(data)));
                pieces.push((at, Piece { file: file.to_owned(), offset, bytes, sha256 }));
                (at, offset) = (at + bytes, offset + bytes);
                if written.is_ok() {
                    written = out.write_all(data);
                }
            })?;
            written.map_err(cannot)?;
            let part = TensorPart { dtype: tensor.dtype, shape: tensor.shape.to_vec(), pieces };
            self.part.tensors.insert(tensor.name.to_owned(), part);
        }
        out.sync_all().map_err(cannot)?;
        let sha256 = hex::encode(Sha256::digest(&header));
        let entry = ManifestFile { bytes: offset, sha256, writer: self.writer, disk: 0 };
        self.part.files.insert(file.to_owned(), entry);
        Ok(())
    }

    /// Writes a file of these bytes.
    pub fn write_bytes(&mut self, file: &str, bytes: &[u8]) -> Result<(), CheckpointError> {
        let (bytes, hashes) = self.write(file, &[bytes])?;
        let sha256 = hashes.into_iter().next().expect("there is one part");
        self.part.files.insert(file.to_owned(), ManifestFile { bytes, sha256, writer: self.writer, disk: 0 });
        Ok(())
    }

    /// Writes `trainer_state.json`.
    pub fn write_state(&mut self, state: &TrainerState) -> Result<(), CheckpointError> {
        let json = serde_json::to_vec_pretty(state).expect("a trainer state is plain data");
        self.write_bytes(STATE_FILE, &json)
    }

    /// Tells the first rank that this part is on the disk, or, where that itself has no room, that there is none.
    pub fn hand_in(mut self) -> Result<(), CheckpointError> {
        let part = HandedIn::Written(std::mem::take(&mut self.part));
        let Err(e) = hand_in(&self.dir, self.writer, &part) else { return Ok(()) };
        let error = failed(self.step, &self.dir, e);
        if let HandedIn::Written(part) = part {
            self.part = part;
        }
        self.fail(&error);
        Err(error)
    }

    /// Tells the first rank that there will be no part. What was written of it goes first: it may be what filled the disk.
    pub fn fail(self, error: &CheckpointError) {
        for file in self.part.files.keys() {
            let _ = fs::remove_file(self.dir.join(file)); // the first rank removes the whole directory
        }
        let told = HandedIn::Failed { is_full: error.is_full_disk(), line: error.to_string() };
        if hand_in(&self.dir, self.writer, &told).is_ok() {
            return;
        }
        // An empty file needs no room, and says that there was none.
        if let Err(e) = File::create(self.dir.join(part_file(self.writer))) {
            tracing::warn!("the first rank cannot be told in {}: {e}", self.dir.display());
        }
    }

    /// The number of bytes, and the hash of each of `parts`.
    pub(crate) fn write(&self, name: &str, parts: &[&[u8]]) -> Result<(u64, Vec<String>), CheckpointError> {
        let path = self.dir.join(name);
        std::thread::scope(|scope| {
            let hashes = scope.spawn(|| parts.iter().map(|part| hex::encode(Sha256::digest(part))).collect());
            let write = || {
                let mut out = File::create_new(&path)?;
                for part in parts {
                    part.chunks(WRITE_CHUNK).try_for_each(|chunk| out.write_all(chunk))?;
                }
                out.sync_all()
            };
            if let Err(e) = write() {
                let _ = fs::remove_file(&path); // so that who comes next has its room
                return Err(failed(self.step, &path, e));
            }
            let hashes = hashes.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            Ok((parts.iter().map(|part| part.len() as u64).sum(), hashes))
        })
    }
}

pub(crate) fn failed(step: impl Into<Option<u64>>, path: &Path, source: io::Error) -> CheckpointError {
    let path = path.to_owned();
    match step.into() {
        Some(step) => CheckpointError::Write { step, path, source },
        None => CheckpointError::New { path, source },
    }
}

/// What `writer` has handed in.
pub(crate) fn handed_in(dir: &Path, writer: u32) -> io::Result<Option<HandedIn>> {
    match fs::read(dir.join(part_file(writer))) {
        Ok(bytes) if bytes.is_empty() => {
            Ok(Some(HandedIn::Failed { is_full: true, line: "there was no room to hand its part in".into() }))
        }
        Ok(bytes) => serde_json::from_slice(&bytes).map(Some).map_err(io::Error::other),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e),
    }
}

/// It appears whole. It need not outlive a power cut: what it says goes into the manifest.
fn hand_in(dir: &Path, writer: u32, what: &HandedIn) -> io::Result<()> {
    let (path, beside) = (dir.join(part_file(writer)), dir.join(format!("{}.new", part_file(writer))));
    let written = fs::write(&beside, serde_json::to_vec(what).expect("it is plain data"));
    if let Err(e) = written.and_then(|()| fs::rename(&beside, path)) {
        let _ = fs::remove_file(beside); // so that who comes next has its room
        return Err(e);
    }
    Ok(())
}

pub(crate) fn part_file(writer: u32) -> String {
    format!(".part-{writer:05}")
}

/// Length and JSON header of a safetensors file with these tensors (name, type, shape, bytes) in this order, padded to 8 bytes.
fn header<'a>(tensors: impl Iterator<Item = (Cow<'a, str>, Dtype, Cow<'a, [usize]>, usize)>) -> Vec<u8> {
    let mut entries = serde_json::Map::new();
    entries.insert("__metadata__".into(), serde_json::json!({ "format": "pt" }));
    let mut begin = 0usize;
    for (name, dtype, shape, bytes) in tensors {
        let bits = shape.iter().product::<usize>() * dtype.bitsize();
        assert_eq!(bytes * 8, bits, "bytes of tensor {name} of shape {shape:?}");
        let entry =
            serde_json::json!({ "dtype": dtype, "shape": shape, "data_offsets": [begin, begin + bytes] });
        let known = entries.insert(name.to_string(), entry);
        assert!(known.is_none(), "two tensors are called {name}");
        begin += bytes;
    }
    let mut json = serde_json::to_vec(&entries).expect("a header is plain data");
    json.resize(json.len().next_multiple_of(8), b' ');
    let mut header = (json.len() as u64).to_le_bytes().to_vec();
    header.extend(json);
    header
}
