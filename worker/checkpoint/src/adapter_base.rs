//! Beside which model an adapter was trained: a small file in its directory, by which another model with the same shapes is told from that one.

use crate::{CheckpointError, weights_sample_sha256};
use serde::{Deserialize, Serialize};
use std::path::Path;

/// In an adapter's directory. Other programs leave it alone.
pub const ADAPTER_BASE_FILE: &str = "adapter_base.json";
const BYTES_MAX: u64 = 1 << 16;

/// What such a file says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AdapterBase {
    /// Where the model lay.
    pub path: String,
    /// `weights_sample_sha256`: it is asked at every start, where the hash of all weights would take as long as reading them.
    pub weights_sample_sha256: String,
    /// In how few bits it was, where the job made it so: `nf4` and the like.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quantization: Option<String>,
}

impl AdapterBase {
    /// That of an adapter which is trained beside the model in `dir`.
    pub fn of(dir: &Path) -> Result<AdapterBase, CheckpointError> {
        let weights_sample_sha256 = weights_sample_sha256(dir)?;
        Ok(AdapterBase {
            path: dir.to_string_lossy().into_owned(),
            weights_sample_sha256,
            quantization: None,
        })
    }

    /// What the adapter in `dir` says; `None` where it says nothing, as those of other programs.
    pub fn read(dir: &Path) -> Option<AdapterBase> {
        let path = dir.join(ADAPTER_BASE_FILE);
        let is_small =
            std::fs::metadata(&path).is_ok_and(|found| found.is_file() && found.len() <= BYTES_MAX);
        is_small.then(|| serde_json::from_slice(&std::fs::read(path).ok()?).ok())?
    }

    pub fn to_bytes(&self) -> Vec<u8> {
        serde_json::to_vec_pretty(self).expect("two texts can be written")
    }
}

/// Says of the adapter in `adapter` that it was trained beside another model than the one in `model`, where it knows.
pub fn of_another_base(adapter: &Path, model: &Path) -> Result<Option<String>, CheckpointError> {
    let Some(base) = AdapterBase::read(adapter) else { return Ok(None) };
    if weights_sample_sha256(model)? == base.weights_sample_sha256 {
        return Ok(None);
    }
    Ok(Some(format!(
        "the adapter {} was trained beside another model ({}) than {}, so what it has learnt may be lost or wrong; take that model, unless this is the same one \
         quantised or in another type",
        adapter.display(),
        base.path,
        model.display()
    )))
}

/// Says of the adapter in `adapter` that it was trained beside fewer bits than its model's files have, where it knows.
pub fn of_fewer_bits(adapter: &Path) -> Option<String> {
    let AdapterBase { path, quantization, .. } = AdapterBase::read(adapter)?;
    let bits = quantization?;
    Some(format!(
        "the adapter {} was trained beside {path} in {bits}, and made up for what that rounds: with the model as its files have it, it computes something else than \
         in training; compare both by `fleet eval`, or keep them apart and generate with --quantization {bits}",
        adapter.display()
    ))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // in a test an unwrap is an assertion
mod tests {
    use super::*;
    use crate::Dtype;
    use safetensors::tensor::TensorView;

    #[test]
    fn another_model_of_the_same_shapes_is_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let model = |name: &str, number: f32| {
            let path = dir.path().join(name);
            std::fs::create_dir(&path).unwrap();
            let bytes = [number; 8].map(f32::to_le_bytes).concat();
            let view = TensorView::new(Dtype::F32, vec![8], &bytes).unwrap();
            safetensors::serialize_to_file([("a", view)], None, &path.join("model.safetensors")).unwrap();
            path
        };
        let (one, same, other) = (model("one", 1.0), model("same", 1.0), model("other", 2.0));
        let adapter = dir.path().join("adapter");
        std::fs::create_dir(&adapter).unwrap();
        assert_eq!(of_another_base(&adapter, &other).unwrap(), None, "it says nothing");
        std::fs::write(adapter.join(ADAPTER_BASE_FILE), AdapterBase::of(&one).unwrap().to_bytes()).unwrap();
        assert_eq!([&one, &same].map(|model| of_another_base(&adapter, model).unwrap()), [None, None]);
        let said = of_another_base(&adapter, &other).unwrap().unwrap();
        assert!(said.contains("/one)") && said.contains("/other,"), "{said}");
        assert_eq!(of_fewer_bits(&adapter), None);
        let packed = AdapterBase { quantization: Some("nf4".into()), ..AdapterBase::of(&one).unwrap() };
        std::fs::write(adapter.join(ADAPTER_BASE_FILE), packed.to_bytes()).unwrap();
        assert!(of_fewer_bits(&adapter).unwrap().contains("/one in nf4,"));
        std::fs::write(adapter.join(ADAPTER_BASE_FILE), "{").unwrap();
        assert_eq!(AdapterBase::read(&adapter), None);
    }
}
