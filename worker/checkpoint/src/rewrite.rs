//! A model directory with other numbers in some of its tensors, and everything else as it was.

use crate::flat::{ModelDir, stored};
use crate::names::{is_of_model, is_of_optimizer};
use crate::part::{PartWriter, TensorRef};
use crate::writer::{TEMPORARY, sync_dir};
use crate::{CheckpointError, Dtype, MANIFEST_FILE, STATE_FILE};
use half::{bf16, f16};
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;
use zerocopy::IntoBytes;

/// Writes `model` to the new directory `to`: the parameters of `changed` with what `flat` has of them, in the type that they had, the other tensors
/// and all other files as they are. What is there of a run, its state and manifest, stays behind. Holds one file of weights in memory.
pub fn rewrite(model: &ModelDir, changed: &[usize], flat: &[f32], to: &Path) -> Result<(), CheckpointError> {
    new_directory(to, |part| write(model, changed, flat, part))
}

/// Makes the directory `to`, which is not there, with what `write` puts into it: all of that, or nothing.
pub fn new_directory(
    to: &Path,
    write: impl FnOnce(&mut PartWriter) -> Result<(), CheckpointError>,
) -> Result<(), CheckpointError> {
    let failed = |source| CheckpointError::Copy { path: to.to_owned(), source };
    if fs::symlink_metadata(to).is_ok() {
        return Err(failed(io::Error::from(io::ErrorKind::AlreadyExists)));
    }
    let Some(name) = to.file_name() else { return Err(failed(io::Error::from(io::ErrorKind::InvalidInput))) };
    let parent = to.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let temporary = parent.join(format!("{TEMPORARY}{}-{}", name.to_string_lossy(), std::process::id()));
    fs::create_dir(&temporary).map_err(failed)?;
    let written = write(&mut PartWriter::new(temporary.clone(), 0, 0)).and_then(|()| {
        sync_dir(&temporary)
            .and_then(|()| fs::rename(&temporary, to))
            .and_then(|()| sync_dir(parent))
            .map_err(failed)
    });
    if written.is_err() {
        let _ = fs::remove_dir_all(&temporary); // the error says why it is of no use
    }
    written
}

fn write(
    model: &ModelDir,
    changed: &[usize],
    flat: &[f32],
    part: &mut PartWriter,
) -> Result<(), CheckpointError> {
    let mut numbers: BTreeMap<&str, &[f32]> = BTreeMap::new();
    let mut ordered = Vec::new();
    for p in changed.iter().map(|number| &model.layout.parameters[*number]) {
        ordered.push((p, stored(p, &flat[p.range.clone()])));
    }
    for (p, values) in &ordered {
        numbers.extend(model.tensors_of(p).map(|tensor| (tensor.name, &values[..])));
    }
    for (file, tensors) in model.tensors_by_file() {
        let data = tensors.iter().map(|tensor| match numbers.get(tensor.name) {
            Some(values) => Ok(narrowed(tensor.dtype, values)),
            None => tensor.data(),
        });
        let data: Vec<Vec<u8>> = data.collect::<Result<_, _>>()?;
        let refs = tensors.iter().zip(&data).map(|(tensor, data)| TensorRef {
            name: tensor.name,
            dtype: tensor.dtype,
            shape: tensor.shape,
            first: 0,
            data,
        });
        part.write_safetensors(&file, &refs.collect::<Vec<_>>())?;
    }
    for entry in fs::read_dir(model.path()).map_err(|e| CheckpointError::read(model.path(), e))? {
        let entry = entry.map_err(|e| CheckpointError::read(model.path(), e))?;
        let name = entry.file_name();
        let Some(name) = name.to_str().filter(|name| is_companion(name)) else { continue };
        if entry.path().is_file() {
            let bytes = fs::read(entry.path()).map_err(|e| CheckpointError::read(&entry.path(), e))?;
            part.write_bytes(name, &bytes)?;
        }
    }
    Ok(())
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
