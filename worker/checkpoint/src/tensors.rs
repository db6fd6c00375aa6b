//! Reads safetensors: one file, a directory with `model.safetensors` or its sharded index, or a checkpoint by its manifest. A tensor's bytes
//! are read when they are asked for, and a file that is not as it was when it was opened is an error: nothing else keeps a user from writing
//! it meanwhile.
//!
//! Of a checkpoint the pieces that a range touches are read whole and held against their hashes, so that what a rank takes of a tensor is
//! checked without the rest of it. That costs at most two pieces more than the range has.

use crate::flat::NAMED;
use crate::manifest::{Manifest, PIECE_MAX};
use crate::names::{is_of_model, is_of_optimizer};
use crate::shard::Shard;
use crate::verify::changed;
use crate::{CheckpointError, MODEL_FILE, MODEL_INDEX_FILE, OPTIMIZER_FILE};
use safetensors::Dtype;
use safetensors::tensor::Metadata;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// Shards of one model; ten thousand of 5 GB are beyond any model.
const SHARDS_MAX: usize = 10_000;

/// Bytes that are read at a time where they are only looked at.
const CHUNK: usize = 1 << 20;

/// The tensors of a model, or of an optimizer, by name.
#[derive(Debug)]
pub struct Tensors {
    files: Vec<Shard>,
    index: BTreeMap<String, Entry>,
    /// What the hashes of spans are of.
    checkpoint: Option<(PathBuf, Manifest)>,
}

#[derive(Debug)]
struct Entry {
    dtype: Dtype,
    shape: Vec<usize>,
    /// In the order of its bytes, all of them.
    spans: Vec<Span>,
}

/// Bytes of a tensor that lie together in a file.
#[derive(Debug)]
pub(crate) struct Span {
    file: usize,
    /// In the file.
    pub begin: u64,
    /// In the tensor.
    pub range: Range<usize>,
    /// Hex, where there is a hash of just these.
    pub sha256: Option<String>,
}

/// A tensor: row-major, little-endian.
#[derive(Clone, Copy, Debug)]
pub struct Tensor<'a> {
    pub name: &'a str,
    pub dtype: Dtype,
    pub shape: &'a [usize],
    spans: &'a [Span],
    of: &'a Tensors,
}

impl Tensors {
    /// `path` is a safetensors file, or a directory as Hugging Face writes it.
    pub fn open(path: &Path) -> Result<Tensors, CheckpointError> {
        let mut tensors = Tensors { files: Vec::new(), index: BTreeMap::new(), checkpoint: None };
        let (files, placed) = files_of(path)?;
        for file in &files {
            tensors.add(file)?;
        }
        let is_there = |(name, file): &(&String, &String)| {
            let entry = tensors.index.get(*name);
            entry.is_some_and(|entry| entry.spans.iter().all(|span| files[span.file].ends_with(file)))
        };
        let lost: Vec<String> = placed
            .iter()
            .filter(|place| !is_there(place))
            .map(|(name, file)| format!("{name} in {file}"))
            .collect();
        if !lost.is_empty() {
            let named = lost[..lost.len().min(NAMED)].join(", ");
            let more = match lost.len().saturating_sub(NAMED) {
                0 => String::new(),
                more => format!(" and {more} more"),
            };
            return Err(CheckpointError::Tensors {
                path: path.join(MODEL_INDEX_FILE),
                what: format!(
                    "it places {named}{more}, and there they are not; fetch or write the model again"
                ),
            });
        }
        Ok(tensors)
    }

    /// The weights of a model directory, by its manifest where it is a checkpoint.
    pub fn of_model(dir: &Path) -> Result<Tensors, CheckpointError> {
        if let Some(manifest) = manifest_with_tensors(dir)? {
            return Tensors::of_manifest(dir, manifest, is_of_model);
        }
        let single = dir.join(MODEL_FILE);
        Tensors::open(if single.exists() { &single } else { dir })
    }

    /// Those of one file of a directory, by its manifest where it is a checkpoint.
    pub fn of_file(dir: &Path, name: &str) -> Result<Tensors, CheckpointError> {
        match manifest_with_tensors(dir)? {
            Some(manifest) => Tensors::of_manifest(dir, manifest, |file| file == name),
            None => Tensors::open(&dir.join(name)),
        }
    }

    /// The optimizer state of a checkpoint.
    pub fn of_optimizer(dir: &Path) -> Result<Tensors, CheckpointError> {
        match manifest_with_tensors(dir)? {
            Some(manifest) => Tensors::of_manifest(dir, manifest, is_of_optimizer),
            None => Tensors::open(&dir.join(OPTIMIZER_FILE)),
        }
    }

    /// The tensors of those files for which `is_wanted`.
    fn of_manifest(
        dir: &Path,
        mut manifest: Manifest,
        is_wanted: impl Fn(&str) -> bool,
    ) -> Result<Tensors, CheckpointError> {
        let (mut files, mut index, mut numbers) = (Vec::new(), BTreeMap::new(), BTreeMap::new());
        for (name, tensor) in std::mem::take(&mut manifest.tensors) {
            if !tensor.pieces.iter().any(|piece| is_wanted(&piece.file)) {
                continue;
            }
            let (mut spans, mut at) = (Vec::new(), 0);
            for piece in tensor.pieces {
                let file = match numbers.get(&piece.file) {
                    Some(number) => *number,
                    None => {
                        files.push(Shard::of_checkpoint(dir, &piece.file, &manifest)?);
                        numbers.insert(piece.file, files.len() - 1);
                        files.len() - 1
                    }
                };
                let end = at + piece.bytes as usize;
                spans.push(Span { file, begin: piece.offset, range: at..end, sha256: Some(piece.sha256) });
                at = end;
            }
            index.insert(name, Entry { dtype: tensor.dtype, shape: tensor.shape, spans });
        }
        Ok(Tensors { files, index, checkpoint: Some((dir.to_owned(), manifest)) })
    }

    pub fn get(&self, name: &str) -> Option<Tensor<'_>> {
        let (name, entry) = self.index.get_key_value(name)?;
        Some(Tensor { name, dtype: entry.dtype, shape: &entry.shape, spans: &entry.spans, of: self })
    }

    /// In alphabetical order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.index.keys().map(String::as_str)
    }

    /// Of each file, its name and the tensors that begin there.
    pub(crate) fn by_file(&self) -> Vec<(String, Vec<Tensor<'_>>)> {
        let name = |shard: &Shard| shard.path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let mut files: Vec<(String, Vec<Tensor>)> =
            self.files.iter().map(|shard| (name(shard), Vec::new())).collect();
        for tensor in self.names().filter_map(|name| self.get(name)) {
            let file = tensor.spans.first().map_or(0, |span| span.file);
            files[file].1.push(tensor);
        }
        files
    }

    pub fn len(&self) -> usize {
        self.index.len()
    }

    pub fn is_empty(&self) -> bool {
        self.index.is_empty()
    }

    fn add(&mut self, path: &Path) -> Result<(), CheckpointError> {
        let (shard, header) = Shard::with_header(path)?;
        let bad = |what: String| CheckpointError::Tensors { path: path.to_owned(), what };
        let metadata: Metadata =
            serde_json::from_slice(&header).map_err(|e| bad(format!("its header: {e}")))?;
        let data = (header.len() + size_of::<u64>()) as u64;
        let mut whole = data;
        for (name, info) in metadata.tensors() {
            let (begin, len) = (data + info.data_offsets.0 as u64, info.data_offsets.1 - info.data_offsets.0);
            whole = whole.max(begin + len as u64);
            let span = Span { file: self.files.len(), begin, range: 0..len, sha256: None };
            let entry = Entry { dtype: info.dtype, shape: info.shape.clone(), spans: vec![span] };
            if self.index.insert(name.clone(), entry).is_some() {
                return Err(bad(format!("the tensor {name} is in two files")));
            }
        }
        if whole != shard.len() {
            return Err(bad(format!(
                "its header tells of {whole} bytes and it has {}; it was not copied or fetched to its end",
                shard.len()
            )));
        }
        self.files.push(shard);
        Ok(())
    }
}

/// `None` where a directory is no checkpoint, or an early fleet has written it. Others may have a file of this name too.
fn manifest_with_tensors(dir: &Path) -> Result<Option<Manifest>, CheckpointError> {
    match Manifest::read(dir) {
        Ok(manifest) => Ok((!manifest.tensors.is_empty()).then_some(manifest)),
        Err(e @ CheckpointError::Read { .. }) => Err(e),
        Err(_) => Ok(None),
    }
}

impl<'a> Tensor<'a> {
    pub fn len(&self) -> usize {
        self.spans.last().map_or(0, |span| span.range.end)
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// All of its bytes.
    pub fn data(&self) -> Result<Vec<u8>, CheckpointError> {
        self.bytes(0..self.len())
    }

    pub fn bytes(&self, range: Range<usize>) -> Result<Vec<u8>, CheckpointError> {
        let mut bytes = Vec::with_capacity(range.len());
        self.pieces(range, &mut |piece| bytes.extend_from_slice(piece))?;
        Ok(bytes)
    }

    /// Calls `each` with its bytes in `range`, of whole numbers, piece by piece.
    pub fn pieces(&self, range: Range<usize>, each: &mut dyn FnMut(&[u8])) -> Result<(), CheckpointError> {
        let mut buffer = Vec::new();
        self.spans(range).try_for_each(|(span, within)| self.read(span, within, &mut buffer, each))
    }

    /// Spans of which something lies in `range`, each with what.
    pub(crate) fn spans(
        &self,
        range: Range<usize>,
    ) -> impl Iterator<Item = (&'a Span, Range<usize>)> + use<'a> {
        assert!(range.start <= range.end && range.end <= self.len(), "within the tensor");
        let first = self.spans.partition_point(|span| span.range.end <= range.start);
        let (start, end) = (range.start, range.end);
        let touched = self.spans[first..].iter().take_while(move |span| span.range.start < end);
        touched.map(move |span| {
            let (from, to) = (start.max(span.range.start), end.min(span.range.end));
            (span, from - span.range.start..to - span.range.start)
        })
    }

    pub(crate) fn file(&self, span: &Span) -> &'a Shard {
        &self.of.files[span.file]
    }

    /// The file that it is in, the first of several.
    pub(crate) fn path(&self) -> PathBuf {
        self.spans.first().map_or(PathBuf::new(), |span| self.file(span).path.clone())
    }

    /// What to say where a span is not what its hash is of.
    pub(crate) fn changed(&self, span: &Span) -> CheckpointError {
        let name = self.file(span).path.file_name().unwrap_or_default().to_string_lossy();
        let (dir, manifest) = self.of.checkpoint.as_ref().expect("hashes come from a manifest");
        changed(dir, manifest, &name, Some(self.name))
    }

    /// Calls `each` with what of `span` is `within`. `buffer` is there to be used again.
    fn read(
        &self,
        span: &Span,
        within: Range<usize>,
        buffer: &mut Vec<u8>,
        each: &mut dyn FnMut(&[u8]),
    ) -> Result<(), CheckpointError> {
        let file = self.file(span);
        if let Some(sha256) = &span.sha256 {
            buffer.resize(span.range.len(), 0);
            file.read(span.begin, buffer)?;
            if hex::encode(Sha256::digest(&buffer)) != *sha256 {
                return Err(self.changed(span));
            }
            each(&buffer[within]);
            return Ok(());
        }
        for at in within.clone().step_by(CHUNK) {
            buffer.resize(CHUNK.min(within.end - at), 0);
            file.read(span.begin + at as u64, buffer)?;
            each(buffer);
        }
        Ok(())
    }

    /// Whether both are the same numbers in the same shape.
    pub(crate) fn equals(&self, other: &Tensor) -> Result<bool, CheckpointError> {
        if (self.dtype, self.shape) != (other.dtype, other.shape) {
            return Ok(false);
        }
        for from in (0..self.len()).step_by(PIECE_MAX) {
            let range = from..self.len().min(from + PIECE_MAX);
            if self.bytes(range.clone())? != other.bytes(range)? {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

/// The files of a model, and what its index says of where each tensor is.
fn files_of(path: &Path) -> Result<(Vec<PathBuf>, BTreeMap<String, String>), CheckpointError> {
    if !path.is_dir() {
        return Ok((vec![path.to_owned()], BTreeMap::new()));
    }
    let index = path.join(MODEL_INDEX_FILE);
    if !index.exists() {
        let single = path.join(MODEL_FILE);
        if !single.exists() {
            let but = instead_of_weights(path).map(|what| format!(", but {what}")).unwrap_or_default();
            let what = format!("the directory has neither {MODEL_FILE} nor {MODEL_INDEX_FILE}{but}");
            return Err(CheckpointError::Model { path: path.to_owned(), what });
        }
        return Ok((vec![single], BTreeMap::new()));
    }
    let bytes = std::fs::read(&index).map_err(|e| CheckpointError::read(&index, e))?;
    let (names, placed) =
        shard_names(&bytes).map_err(|what| CheckpointError::Tensors { path: index.clone(), what })?;
    let files: Vec<PathBuf> = names.into_iter().map(|name| path.join(name)).collect();
    match files.iter().find(|file| !file.exists()) {
        Some(missing) => {
            let name = missing.file_name().unwrap_or_default().display();
            Err(CheckpointError::Tensors {
                path: index,
                what: format!("it names {name}, which is not there"),
            })
        }
        None => Ok((files, placed)),
    }
}

/// What a directory without safetensors of its own has instead, and what to do with it.
pub(crate) fn instead_of_weights(dir: &Path) -> Option<String> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let mut names: Vec<String> =
        entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    let find = |is: fn(&str) -> bool| names.iter().find(|name| is(name));
    if let Some(name) = find(|name| name == "adapter_config.json" || name.starts_with("adapter_model")) {
        return Some(format!(
            "has an adapter ({name}), which is no model by itself: give the directory of its base model, and this one with --adapter, or \
             make one model of both with fleet adapter merge"
        ));
    }
    if let Some(name) = names.iter().rfind(|name| name.starts_with("step-")) {
        return Some(format!("has checkpoints of a run, the newest in {}", dir.join(name).display()));
    }
    if let Some(name) =
        find(|name| name.starts_with("pytorch_model") || name.ends_with(".pth") || name.ends_with(".pt"))
    {
        return Some(format!(
            "has {name}, which holds pickled Python objects; write the model with transformers' \
             save_pretrained(DIR, safe_serialization=True)"
        ));
    }
    let name = find(|name| name.ends_with(".gguf"))?;
    Some(format!("has {name}, which llama.cpp reads; fetch the model that it was made from, as safetensors"))
}

/// The files that an index names, in order, each once, and which of them has each tensor.
fn shard_names(index: &[u8]) -> Result<(Vec<String>, BTreeMap<String, String>), String> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let index: Index = serde_json::from_slice(index).map_err(|e| e.to_string())?;
    let mut names: Vec<String> = index.weight_map.values().cloned().collect();
    names.sort();
    names.dedup();
    if names.is_empty() || names.len() > SHARDS_MAX {
        return Err(format!("it names {} files", names.len()));
    }
    match names.iter().find(|n| n.contains(['/', '\\', '\0']) || n.as_str() == "..") {
        Some(name) => Err(format!("it names a file outside its directory: {}", name.escape_default())),
        None => Ok((names, index.weight_map)),
    }
}

#[cfg(test)]
mod tests;
