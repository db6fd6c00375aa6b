//! Reads safetensors by memory mapping: one file, or a directory with `model.safetensors` or its sharded index.

use crate::{CheckpointError, MODEL_FILE};
use fleet_common::files::stand_in;
use fleet_common::mapped::Mapped;
use safetensors::{Dtype, SafeTensors};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

const INDEX_FILE: &str = "model.safetensors.index.json";

/// Shards of one model; ten thousand of 5 GB are beyond any model.
const SHARDS_MAX: usize = 10_000;

/// The tensors of a model, by name, their bytes paged in as they are touched.
#[derive(Debug)]
pub struct Tensors {
    files: Vec<Mapped>,
    index: BTreeMap<String, Entry>,
}

#[derive(Debug)]
struct Entry {
    file: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    /// In the file.
    begin: usize,
    end: usize,
}

/// A tensor of a mapped file: row-major, little-endian.
#[derive(Clone, Copy, Debug)]
pub struct TensorSlice<'a> {
    pub dtype: Dtype,
    pub shape: &'a [usize],
    pub data: &'a [u8],
}

impl Tensors {
    /// `path` is a safetensors file, or a directory as Hugging Face writes it.
    pub fn open(path: &Path) -> Result<Tensors, CheckpointError> {
        let mut tensors = Tensors { files: Vec::new(), index: BTreeMap::new() };
        for file in files_of(path)? {
            tensors.add(&file)?;
        }
        Ok(tensors)
    }

    pub fn get(&self, name: &str) -> Option<TensorSlice<'_>> {
        self.index.get(name).map(|e| TensorSlice {
            dtype: e.dtype,
            shape: &e.shape,
            data: &self.files[e.file][e.begin..e.end],
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
        let bad = |what: String| CheckpointError::Tensors { path: path.to_owned(), what };
        // Opening a FIFO would wait for who never comes.
        if std::fs::metadata(path).is_ok_and(|found| !found.is_file()) {
            return Err(bad("it is no file".into()));
        }
        let mapped = Mapped::open(path).map_err(|e| CheckpointError::read(path, e))?;
        if let Some(pointer) = stand_in(&mapped) {
            return Err(bad(format!("it is {}; {}", pointer.name, pointer.cure)));
        }
        let (header, metadata) = SafeTensors::read_metadata(&mapped).map_err(|e| bad(e.to_string()))?;
        let data = header + size_of::<u64>();
        for (name, info) in metadata.tensors() {
            let (begin, end) = (data + info.data_offsets.0, data + info.data_offsets.1);
            let entry =
                Entry { file: self.files.len(), dtype: info.dtype, shape: info.shape.clone(), begin, end };
            if self.index.insert(name.clone(), entry).is_some() {
                return Err(bad(format!("the tensor {name} is in two files")));
            }
        }
        self.files.push(mapped);
        Ok(())
    }
}

fn files_of(path: &Path) -> Result<Vec<PathBuf>, CheckpointError> {
    if !path.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    let index = path.join(INDEX_FILE);
    if !index.exists() {
        let single = path.join(MODEL_FILE);
        if !single.exists() {
            let but = instead_of_weights(path).map(|what| format!(", but {what}")).unwrap_or_default();
            let what = format!("the directory has neither {MODEL_FILE} nor {INDEX_FILE}{but}");
            return Err(CheckpointError::Model { path: path.to_owned(), what });
        }
        return Ok(vec![single]);
    }
    let bytes = std::fs::read(&index).map_err(|e| CheckpointError::read(&index, e))?;
    let names = shard_names(&bytes).map_err(|what| CheckpointError::Tensors { path: index.clone(), what })?;
    let files: Vec<PathBuf> = names.into_iter().map(|name| path.join(name)).collect();
    match files.iter().find(|file| !file.exists()) {
        Some(missing) => {
            let name = missing.file_name().unwrap_or_default().display();
            Err(CheckpointError::Tensors {
                path: index,
                what: format!("it names {name}, which is not there"),
            })
        }
        None => Ok(files),
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

/// The files that an index names, in order, each once.
fn shard_names(index: &[u8]) -> Result<Vec<String>, String> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let index: Index = serde_json::from_slice(index).map_err(|e| e.to_string())?;
    let mut names: Vec<String> = index.weight_map.into_values().collect();
    names.sort();
    names.dedup();
    if names.is_empty() || names.len() > SHARDS_MAX {
        return Err(format!("it names {} files", names.len()));
    }
    match names.iter().find(|n| n.contains(['/', '\\', '\0']) || n.as_str() == "..") {
        Some(name) => Err(format!("it names a file outside its directory: {}", name.escape_default())),
        None => Ok(names),
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
            shard_names(br#"{"weight_map":{"b":"2.st","a":"1.st","c":"2.st"}}"#).unwrap(),
            ["1.st", "2.st"]
        );
        assert!(
            shard_names(br#"{"weight_map":{"b":"../2.st"}}"#).unwrap_err().contains("outside its directory")
        );
        assert!(shard_names(br#"{"weight_map":{}}"#).is_err());
    }
}
