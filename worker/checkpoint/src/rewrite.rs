//! A model directory with other numbers in some of its tensors, and everything else as it was.

use crate::flat::{ModelDir, stored, stored_shape};
use crate::names::{is_of_model, is_of_optimizer};
use crate::part::{PartWriter, TensorRef};
use crate::unfinished::Unfinished;
use crate::writer::{TEMPORARY, sync_dir};
use crate::{CONFIG_FILE, CheckpointError, Dtype, MANIFEST_FILE, MODEL_INDEX_FILE, STATE_FILE, Tensor};
use fleet_common::model::{Object, Parameter, QUANTIZATION_CONFIG};
use half::{bf16, f16};
use serde_json::json;
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;
use std::time::Duration;
use zerocopy::IntoBytes;

/// Writes `model` to the new directory `to`: the parameters of `changed` with what `flat` has of them, in the type that they had, the other tensors
/// and all other files as they are. What is in few bits is widened, to the type of what codes stand for. What is there of a run, its state and manifest,
/// stays behind. Holds one file of weights in memory.
pub fn rewrite(model: &ModelDir, changed: &[usize], flat: &[f32], to: &Path) -> Result<(), CheckpointError> {
    let mut places: BTreeMap<String, Option<(String, &Parameter)>> = BTreeMap::new();
    for (number, p) in model.layout.parameters.iter().enumerate() {
        if let Some(weight) = model.quantised(p) {
            places.extend(weight.parts().into_iter().map(|part| (part.name, None)));
            places.insert(weight.codes(), Some((weight.name.clone(), p)));
        } else if changed.contains(&number) {
            places.extend(model.tensors_of(p).map(|t| (t.name.to_owned(), Some((t.name.to_owned(), p)))));
        }
    }
    let config = model.is_quantised().then(|| {
        let mut config = model.config.clone();
        config.remove(QUANTIZATION_CONFIG);
        config
    });
    remake(model, config.as_ref(), to, &mut |tensor| {
        Ok(places.get(tensor.name).map(|place| {
            let made = place.as_ref().map(|(name, p)| {
                let dtype = model.dtype(p).unwrap_or_else(|| said_dtype(&model.config));
                let data = narrowed(dtype, &stored(p, &flat[p.range.clone()]));
                NewTensor { name: name.clone(), dtype, shape: stored_shape(p), data }
            });
            made.into_iter().collect()
        }))
    })
}

/// The type of a model's weights, by its configuration.
fn said_dtype(config: &Object) -> Dtype {
    let said = ["dtype", "torch_dtype"].iter().find_map(|key| config.get(*key)?.as_str());
    match said {
        Some("bfloat16") => Dtype::BF16,
        Some("float16") => Dtype::F16,
        _ => Dtype::F32,
    }
}

/// A tensor that takes the place of another one.
#[derive(Clone, Debug, PartialEq)]
pub struct NewTensor {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    /// Little-endian.
    pub data: Vec<u8>,
}

/// What comes in the place of a tensor; `None`: it stays as it is.
pub type Replace<'a, E> = dyn FnMut(&Tensor) -> Result<Option<Vec<NewTensor>>, E> + 'a;

/// Writes `model` to the new directory `to` with other tensors in the place of some, and another `config.json` where one is given. Holds one file of
/// weights in memory.
pub fn remake<E: From<CheckpointError>>(
    model: &ModelDir,
    config: Option<&Object>,
    to: &Path,
    replace: &mut Replace<E>,
) -> Result<(), E> {
    new_directory(to, |part| {
        let mut index = Index::default();
        for (file, tensors) in model.tensors_by_file() {
            let mut written = Vec::new();
            for tensor in &tensors {
                let same = || -> Result<_, CheckpointError> {
                    let (name, shape) = (tensor.name.to_owned(), tensor.shape.to_vec());
                    Ok(NewTensor { name, dtype: tensor.dtype, shape, data: tensor.data()? })
                };
                match replace(tensor)? {
                    None => written.push(same()?),
                    Some(others) => written.extend(others),
                }
            }
            let refs = written.iter().map(|t| {
                let NewTensor { name, dtype, shape, data } = t;
                TensorRef { name, dtype: *dtype, shape, first: 0, data }
            });
            part.write_safetensors(&file, &refs.collect::<Vec<_>>())?;
            index.add(&file, &written);
        }
        companions(model, config, index, part)?;
        Ok(())
    })
}

/// Which file has which tensor, as transformers writes it.
#[derive(Default)]
struct Index {
    files: usize,
    bytes: usize,
    map: BTreeMap<String, String>,
}

impl Index {
    fn add(&mut self, file: &str, tensors: &[NewTensor]) {
        self.files += 1;
        self.bytes += tensors.iter().map(|t| t.data.len()).sum::<usize>();
        self.map.extend(tensors.iter().map(|t| (t.name.clone(), file.to_owned())));
    }

    fn json(&self) -> Vec<u8> {
        let json = json!({"metadata": {"total_size": self.bytes}, "weight_map": self.map});
        format!("{json:#}\n").into_bytes()
    }
}

/// All that belongs to a model beside its weights.
fn companions(
    model: &ModelDir,
    config: Option<&Object>,
    index: Index,
    part: &mut PartWriter,
) -> Result<(), CheckpointError> {
    for entry in fs::read_dir(model.path()).map_err(|e| CheckpointError::read(model.path(), e))? {
        let entry = entry.map_err(|e| CheckpointError::read(model.path(), e))?;
        let name = entry.file_name();
        let Some(name) = name.to_str().filter(|name| is_companion(name)) else { continue };
        if !entry.path().is_file() {
            continue;
        }
        let bytes = match (name, config) {
            (CONFIG_FILE, Some(config)) => format!("{:#}\n", json!(config)).into_bytes(),
            (MODEL_INDEX_FILE, Some(_)) => index.json(),
            _ => fs::read(entry.path()).map_err(|e| CheckpointError::read(&entry.path(), e))?,
        };
        part.write_bytes(name, &bytes)?;
    }
    Ok(())
}

/// Makes the directory `to`, which is not there, with what `write` puts into it: all of that, or nothing.
pub fn new_directory<E: From<CheckpointError>>(
    to: &Path,
    write: impl FnOnce(&mut PartWriter) -> Result<(), E>,
) -> Result<(), E> {
    let failed = |source| CheckpointError::New { path: to.to_owned(), source };
    if fs::symlink_metadata(to).is_ok() {
        return Err(failed(io::Error::from(io::ErrorKind::AlreadyExists)).into());
    }
    let Some(name) = to.file_name() else {
        return Err(failed(io::Error::from(io::ErrorKind::InvalidInput)).into());
    };
    let parent = to.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let own = format!("{TEMPORARY}{}-", name.to_string_lossy());
    remove_abandoned(parent, &own);
    let temporary = parent.join(format!("{own}{}", std::process::id()));
    fs::create_dir(&temporary).map_err(failed)?;
    let unfinished = Unfinished::new(&temporary);
    let written = write(&mut PartWriter::new(temporary.clone(), None, 0)).and_then(|()| {
        let placed =
            sync_dir(&temporary).and_then(|()| fs::rename(&temporary, to)).and_then(|()| sync_dir(parent));
        Ok(placed.map_err(failed)?)
    });
    if written.is_ok() {
        unfinished.whole();
    }
    written
}

/// Since when no file was begun in a directory that is taken for abandoned. Long, as its process may be another machine's, which writes a large file.
const ABANDONED: Duration = Duration::from_secs(3600);

/// Removes what processes that were killed have left of the same directory. What cannot be looked at or removed stays.
fn remove_abandoned(parent: &Path, own: &str) {
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        let is_own = entry.file_name().to_str().and_then(|name| name.strip_prefix(own)?.parse::<u32>().ok());
        let written = entry.metadata().and_then(|meta| meta.modified());
        let is_old = written.is_ok_and(|at| at.elapsed().is_ok_and(|age| age > ABANDONED));
        let is_alive =
            |pid: u32| !Path::new("/proc/self").exists() || Path::new(&format!("/proc/{pid}")).exists();
        if is_own.is_some_and(|pid| is_old && !is_alive(pid)) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

/// What belongs to a model beside its weights: not those in other formats, nor what is of a run.
fn is_companion(name: &str) -> bool {
    const WEIGHTS: [&str; 9] =
        [".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack", ".ckpt"];
    !is_of_model(name)
        && !is_of_optimizer(name)
        && !name.starts_with('.')
        && ![MANIFEST_FILE, STATE_FILE].contains(&name)
        && !WEIGHTS.iter().any(|end| name.ends_with(end))
}

fn narrowed(dtype: Dtype, values: &[f32]) -> Vec<u8> {
    match dtype {
        Dtype::BF16 => values.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect(),
        Dtype::F16 => values.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect(),
        _ => values.as_bytes().to_vec(),
    }
}
