//! From the files of several ranks to one file of weights and one of the optimizer's state.

use crate::manifest::{FORMAT, Manifest};
use crate::names::{is_of_model, is_of_optimizer};
use crate::part::PartWriter;
use crate::tensors::{Tensor, Tensors};
use crate::writer::{TEMPORARY, sync_dir, whole};
use crate::{
    ADAPTER_FILE, CheckpointError, MANIFEST_FILE, MODEL_FILE, MODEL_INDEX_FILE, OPTIMIZER_FILE, verify,
};
use std::fs;
use std::io;
use std::path::Path;

/// Writes the checkpoint `from` to the new directory `to` as one rank would have written it. It stays a checkpoint, of the same run and step.
/// Holds one piece of a tensor in memory at a time.
pub fn consolidate(from: &Path, to: &Path) -> Result<Manifest, CheckpointError> {
    let manifest = verify(from)?;
    let failed = |source| CheckpointError::Copy { path: to.to_owned(), source };
    if fs::symlink_metadata(to).is_ok() {
        return Err(failed(io::Error::from(io::ErrorKind::AlreadyExists)));
    }
    let Some(name) = to.file_name() else { return Err(failed(io::Error::from(io::ErrorKind::InvalidInput))) };
    let parent = to.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let temporary = parent.join(format!("{TEMPORARY}{}-{}", name.to_string_lossy(), std::process::id()));
    fs::create_dir(&temporary).map_err(failed)?;
    let written = write(from, &manifest, &temporary).and_then(|manifest| {
        sync_dir(&temporary)
            .and_then(|()| fs::rename(&temporary, to))
            .and_then(|()| sync_dir(parent))
            .map_err(failed)?;
        Ok(manifest)
    });
    if written.is_err() {
        let _ = fs::remove_dir_all(&temporary); // the error says why it is of no use
    }
    written
}

fn write(from: &Path, manifest: &Manifest, to: &Path) -> Result<Manifest, CheckpointError> {
    let mut part = PartWriter::new(to.to_owned(), manifest.step, 0);
    let is_adapter = manifest.files.contains_key(ADAPTER_FILE);
    match is_adapter {
        true => part.copy_safetensors(ADAPTER_FILE, &all(&Tensors::of_file(from, ADAPTER_FILE)?))?,
        false => part.copy_safetensors(MODEL_FILE, &all(&Tensors::of_model(from)?))?,
    }
    if manifest.files.keys().any(|name| is_of_optimizer(name)) {
        part.copy_safetensors(OPTIMIZER_FILE, &all(&Tensors::of_optimizer(from)?))?;
    }
    let is_written = |name: &str| {
        is_of_model(name) || [MODEL_INDEX_FILE, ADAPTER_FILE].contains(&name) || is_of_optimizer(name)
    };
    for name in manifest.files.keys().filter(|name| !is_written(name)) {
        let path = from.join(name);
        let bytes = fs::read(&path).map_err(|e| CheckpointError::read(&path, e))?;
        part.write_bytes(name, &bytes)?;
    }
    let files = std::mem::take(&mut part.part.files);
    let tensors = std::mem::take(&mut part.part.tensors);
    let tensors = tensors.into_iter().map(|(name, tensor)| Some((name, whole(tensor).ok()?)));
    let tensors = tensors.collect::<Option<_>>().expect("each was copied from its first byte to its last");
    let whole = Manifest {
        format: FORMAT.into(),
        world_size: 1,
        disks: Vec::new(),
        files,
        tensors,
        ..manifest.clone()
    };
    let json = serde_json::to_vec(&whole).expect("a manifest is plain data");
    part.write(MANIFEST_FILE, &[&json])?;
    Ok(whole)
}

fn all(tensors: &Tensors) -> Vec<Tensor<'_>> {
    tensors.names().filter_map(|name| tensors.get(name)).collect()
}
