//! A model directory that is read to compute with it, and the device to do so.

use crate::error::{Error, Result};
use fleet_checkpoint::{MANIFEST_FILE, ModelDir};
use fleet_kernels::all_finite;
use fleet_torch::device;
use std::path::Path;
use tch::Device;

/// Opens the one in `path`, whose weights are not read yet. A checkpoint of fleet is checked against its manifest.
pub fn open(path: &Path) -> Result<ModelDir> {
    if path.join(MANIFEST_FILE).exists() {
        fleet_checkpoint::verify(path)?;
    }
    Ok(ModelDir::open(path)?)
}

/// The weights of the model in `path`, flat, and finite.
pub fn weights(path: &Path, model: &ModelDir) -> Result<Vec<f32>> {
    let mut flat = vec![0.0; model.layout.len];
    model.read(&mut flat);
    match model.layout.parameters.iter().find(|p| !all_finite(&flat[p.range.clone()])) {
        None => Ok(flat),
        Some(p) => Err(Error::Input(format!(
            "{}: {} holds values that are NaN or infinite; restore the weights, or use an older checkpoint",
            path.display(),
            p.name
        ))),
    }
}

/// What `--device` names: auto, cpu or cuda.
pub fn device(name: &str) -> Result<Device> {
    match (name, if name == "cpu" { Err(String::new()) } else { device::cuda_devices() }) {
        ("cpu", _) => Ok(Device::Cpu),
        (_, Ok(_)) => Ok(Device::Cuda(0)),
        ("cuda", Err(why)) => {
            Err(Error::Environment(format!("{why}; leave --device out to compute on the CPU")))
        }
        (_, Err(_)) => Ok(Device::Cpu),
    }
}
