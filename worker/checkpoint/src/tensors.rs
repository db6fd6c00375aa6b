//! Reads safetensors: one file, or a directory with `model.safetensors` or its sharded index. A tensor's bytes are read when they are asked
//! for, and a file that is not as it was when it was opened is an error: nothing else keeps a user from writing it meanwhile.

use crate::flat::NAMED;
use crate::{CheckpointError, MODEL_FILE};
use fleet_common::files::stand_in;
use safetensors::Dtype;
use safetensors::tensor::Metadata;
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

const INDEX_FILE: &str = "model.safetensors.index.json";

/// Shards of one model; ten thousand of 5 GB are beyond any model.
const SHARDS_MAX: usize = 10_000;

/// Bytes of a header; the safetensors library refuses longer ones too.
const HEADER_MAX: u64 = 100_000_000;

/// Bytes of a file that tell what it is.
const HEAD: u64 = 256;

/// Bytes that are read at a time where they are only looked at.
const CHUNK: usize = 1 << 20;

/// The tensors of a model, by name.
#[derive(Debug)]
pub struct Tensors {
    files: Vec<Shard>,
    index: BTreeMap<String, Entry>,
}

#[derive(Debug)]
struct Entry {
    file: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    /// In the file.
    begin: u64,
    end: u64,
}

/// A tensor of a file: row-major, little-endian.
#[derive(Clone, Copy, Debug)]
pub struct Tensor<'a> {
    pub dtype: Dtype,
    pub shape: &'a [usize],
    file: &'a Shard,
    begin: u64,
    end: u64,
}

impl Tensors {
    /// `path` is a safetensors file, or a directory as Hugging Face writes it.
    pub fn open(path: &Path) -> Result<Tensors, CheckpointError> {
        let mut tensors = Tensors { files: Vec::new(), index: BTreeMap::new() };
        let (files, placed) = files_of(path)?;
        for file in &files {
            tensors.add(file)?;
        }
        let is_there = |(name, file): &(&String, &String)| {
            tensors.index.get(*name).is_some_and(|entry| files[entry.file].ends_with(file))
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
                path: path.join(INDEX_FILE),
                what: format!(
                    "it places {named}{more}, and there they are not; fetch or write the model again"
                ),
            });
        }
        Ok(tensors)
    }

    pub fn get(&self, name: &str) -> Option<Tensor<'_>> {
        self.index.get(name).map(|e| Tensor {
            dtype: e.dtype,
            shape: &e.shape,
            file: &self.files[e.file],
            begin: e.begin,
            end: e.end,
        })
    }

    /// In alphabetical order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.index.keys().map(String::as_str)
    }

    pub fn len(&self) -> usize {
        self.index.len()
    }

    pub fn is_empty(&self) -> bool {
        self.index.is_empty()
    }

    fn add(&mut self, path: &Path) -> Result<(), CheckpointError> {
        let (shard, header) = Shard::open(path)?;
        let bad = |what: String| CheckpointError::Tensors { path: path.to_owned(), what };
        let metadata: Metadata =
            serde_json::from_slice(&header).map_err(|e| bad(format!("its header: {e}")))?;
        let data = (header.len() + size_of::<u64>()) as u64;
        let mut whole = data;
        for (name, info) in metadata.tensors() {
            let [begin, end] = [info.data_offsets.0, info.data_offsets.1].map(|at| data + at as u64);
            whole = whole.max(end);
            let entry =
                Entry { file: self.files.len(), dtype: info.dtype, shape: info.shape.clone(), begin, end };
            if self.index.insert(name.clone(), entry).is_some() {
                return Err(bad(format!("the tensor {name} is in two files")));
            }
        }
        if whole != shard.state.len {
            return Err(bad(format!(
                "its header tells of {whole} bytes and it has {}; it was not copied or fetched to its end",
                shard.state.len
            )));
        }
        self.files.push(shard);
        Ok(())
    }
}

impl Tensor<'_> {
    pub fn len(&self) -> usize {
        (self.end - self.begin) as usize
    }

    pub fn is_empty(&self) -> bool {
        self.end == self.begin
    }

    /// All of its bytes.
    pub fn data(&self) -> Result<Vec<u8>, CheckpointError> {
        self.bytes(0..self.len())
    }

    pub fn bytes(&self, range: Range<usize>) -> Result<Vec<u8>, CheckpointError> {
        assert!(range.end <= self.len(), "within the tensor");
        let mut bytes = vec![0; range.len()];
        self.file.read(self.begin + range.start as u64, &mut bytes)?;
        Ok(bytes)
    }

    /// Calls `each` with its bytes in `range`, piece by piece.
    pub(crate) fn pieces(
        &self,
        range: Range<usize>,
        each: &mut dyn FnMut(&[u8]),
    ) -> Result<(), CheckpointError> {
        for from in range.clone().step_by(CHUNK) {
            each(&self.bytes(from..range.end.min(from + CHUNK))?);
        }
        Ok(())
    }

    /// Whether both are the same numbers in the same shape.
    pub(crate) fn equals(&self, other: &Tensor) -> Result<bool, CheckpointError> {
        if (self.dtype, self.shape) != (other.dtype, other.shape) {
            return Ok(false);
        }
        for from in (0..self.len()).step_by(CHUNK) {
            let range = from..self.len().min(from + CHUNK);
            if self.bytes(range.clone())? != other.bytes(range)? {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

/// A file and how it was when it was opened.
#[derive(Debug)]
struct Shard {
    path: PathBuf,
    file: File,
    state: State,
}

#[derive(Debug, PartialEq, Eq)]
struct State {
    len: u64,
    modified: (i64, i64),
}

impl State {
    fn of(file: &File) -> io::Result<State> {
        let found = file.metadata()?;
        Ok(State { len: found.len(), modified: (found.mtime(), found.mtime_nsec()) })
    }
}

impl Shard {
    /// With the bytes of its header.
    fn open(path: &Path) -> Result<(Shard, Vec<u8>), CheckpointError> {
        let failed = |e| CheckpointError::read(path, e);
        let bad = |what: String| CheckpointError::Tensors { path: path.to_owned(), what };
        // Opening a FIFO would wait for who never comes.
        if std::fs::metadata(path).is_ok_and(|found| !found.is_file()) {
            return Err(bad("it is no file".into()));
        }
        let file = File::open(path).map_err(failed)?;
        let state = State::of(&file).map_err(failed)?;
        let shard = Shard { path: path.to_owned(), file, state };
        let mut first = vec![0; shard.state.len.min(HEAD) as usize];
        shard.read(0, &mut first)?;
        if let Some(pointer) = stand_in(&first) {
            return Err(bad(format!("it is {}; {}", pointer.name, pointer.cure)));
        }
        let Some(len) = first.first_chunk().map(|len| u64::from_le_bytes(*len)) else {
            return Err(bad(format!("it has {} bytes", first.len())));
        };
        if len > HEADER_MAX || len > shard.state.len - size_of::<u64>() as u64 {
            return Err(bad("its header is longer than it".into()));
        }
        let mut header = vec![0; len as usize];
        shard.read(size_of::<u64>() as u64, &mut header)?;
        Ok((shard, header))
    }

    fn read(&self, at: u64, out: &mut [u8]) -> Result<(), CheckpointError> {
        let failed = |e| CheckpointError::read(&self.path, e);
        let read = self.file.read_exact_at(out, at);
        if State::of(&self.file).map_err(failed)? != self.state {
            return Err(CheckpointError::Tensors {
                path: self.path.clone(),
                what: "it changed while it was being read; start again when it is complete".into(),
            });
        }
        read.map_err(failed)
    }
}

/// The files of a model, and what its index says of where each tensor is.
fn files_of(path: &Path) -> Result<(Vec<PathBuf>, BTreeMap<String, String>), CheckpointError> {
    if !path.is_dir() {
        return Ok((vec![path.to_owned()], BTreeMap::new()));
    }
    let index = path.join(INDEX_FILE);
    if !index.exists() {
        let single = path.join(MODEL_FILE);
        if !single.exists() {
            let but = instead_of_weights(path).map(|what| format!(", but {what}")).unwrap_or_default();
            let what = format!("the directory has neither {MODEL_FILE} nor {INDEX_FILE}{but}");
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
            "has an adapter ({name}), which is no model by itself; merge it into its base model (peft: merge_and_unload(), then \
             save_pretrained)"
        ));
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
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn arbitrary_files_never_panic(
            length in prop_oneof![0u64..400, any::<u64>()], json in "[{}\\[\\]\":,a-z0-9F_ ]{0,200}", data in 0usize..50
        ) {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("x.safetensors");
            let bytes = [&length.to_le_bytes()[..], json.as_bytes(), &vec![0; data]].concat();
            std::fs::write(&path, bytes).unwrap();
            let _ = Tensors::open(&path);
        }

        #[test]
        fn arbitrary_indexes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = shard_names(&bytes);
        }

        #[test]
        fn headers_with_other_numbers_never_panic(
            shape in proptest::collection::vec(any::<u64>(), 0..4), begin: u64, end: u64, dtype in "F32|BF16|F4|I64|X"
        ) {
            let header = format!(r#"{{"w":{{"dtype":"{dtype}","shape":{shape:?},"data_offsets":[{begin},{end}]}}}}"#);
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("x.safetensors");
            let bytes = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &[0; 8]].concat();
            std::fs::write(&path, bytes).unwrap();
            if let Ok(tensors) = Tensors::open(&path) {
                tensors.get("w").unwrap();
            }
        }
    }

    #[test]
    fn an_index_names_files_beside_it_only() {
        assert_eq!(
            shard_names(br#"{"weight_map":{"b":"2.st","a":"1.st","c":"2.st"}}"#).unwrap().0,
            ["1.st", "2.st"]
        );
        assert!(
            shard_names(br#"{"weight_map":{"b":"../2.st"}}"#).unwrap_err().contains("outside its directory")
        );
        assert!(shard_names(br#"{"weight_map":{}}"#).is_err());
    }
}
