//! Which weights a model directory has: hashes of its tensors, however they are cut into files.

use crate::reading::read_numbers;
use crate::{CheckpointError, Dtype, Tensor, Tensors};
use sha2::{Digest, Sha256};
use std::path::Path;

/// Numbers of a tensor's beginning and end that a sample looks at.
const SAMPLED: usize = 256;

/// SHA-256, in hex, of names, types, shapes and numbers of all tensors, in the order of their names. It reads them whole, one at a time.
pub fn weights_sha256(dir: &Path) -> Result<String, CheckpointError> {
    hash(dir, |tensor, hash| {
        hash.update(tensor.data()?);
        Ok(())
    })
}

/// The same of a few numbers (of codes: bytes) of each tensor: enough to tell one model from another, not to find a change.
pub fn weights_sample_sha256(dir: &Path) -> Result<String, CheckpointError> {
    hash(dir, |tensor, hash| {
        let numbers: usize = tensor.shape.iter().product();
        if !matches!(tensor.dtype, Dtype::F32 | Dtype::BF16 | Dtype::F16) {
            let count = SAMPLED.min(tensor.len());
            for first in [0, tensor.len() - count] {
                hash.update(tensor.bytes(first..first + count)?);
            }
            return Ok(());
        }
        let count = SAMPLED.min(numbers);
        for first in [0, numbers - count] {
            let mut some = vec![0.0; count];
            read_numbers(tensor, first, &mut some)?;
            some.iter().for_each(|x| hash.update(x.to_le_bytes()));
        }
        Ok(())
    })
}

fn hash(
    dir: &Path,
    numbers: impl Fn(&Tensor, &mut Sha256) -> Result<(), CheckpointError>,
) -> Result<String, CheckpointError> {
    let tensors = Tensors::of_model(dir)?;
    let mut all = Sha256::new();
    for tensor in tensors.names().filter_map(|name| tensors.get(name)) {
        all.update(format!("{} {:?} {:?}\n", tensor.name, tensor.dtype, tensor.shape));
        numbers(&tensor, &mut all)?;
    }
    Ok(hex::encode(all.finalize()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // in a test an unwrap is an assertion
mod tests {
    use super::*;
    use safetensors::tensor::TensorView;

    #[test]
    fn other_numbers_are_other_weights_and_other_files_are_not() {
        let dir = tempfile::tempdir().unwrap();
        let write = |path: &str, tensors: &[(&str, Vec<f32>)]| {
            let bytes: Vec<Vec<u8>> =
                tensors.iter().map(|(_, x)| x.iter().flat_map(|x| x.to_le_bytes()).collect()).collect();
            let views = tensors.iter().zip(&bytes).map(|((name, x), bytes)| {
                (*name, TensorView::new(Dtype::F32, vec![x.len()], bytes).unwrap())
            });
            safetensors::serialize_to_file(views, None, &dir.path().join(path)).unwrap();
        };
        let both = || [weights_sha256(dir.path()), weights_sample_sha256(dir.path())].map(Result::unwrap);
        write("model.safetensors", &[("a", vec![1.0; 2000]), ("b", vec![2.0])]);
        let one = both();
        let mut changed = vec![1.0; 2000];
        changed[1000] = 3.0;
        write("model.safetensors", &[("a", changed.clone()), ("b", vec![2.0])]);
        let [all, sample] = both();
        assert!(all != one[0] && sample == one[1] && all.len() == 64);
        changed[1999] = 3.0;
        write("model.safetensors", &[("a", changed), ("b", vec![2.0])]);
        assert_ne!(both()[1], one[1]);

        std::fs::remove_file(dir.path().join("model.safetensors")).unwrap();
        write("one.safetensors", &[("b", vec![2.0])]);
        write("two.safetensors", &[("a", vec![1.0; 2000])]);
        let index = r#"{"weight_map": {"a": "two.safetensors", "b": "one.safetensors"}}"#;
        std::fs::write(dir.path().join("model.safetensors.index.json"), index).unwrap();
        assert_eq!(both(), one);
        assert!(weights_sha256(&dir.path().join("none")).is_err());
    }
}
