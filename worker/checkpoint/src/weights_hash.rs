//! Which weights a model directory has: a hash of their files.

use crate::CheckpointError;
use crate::tensors::files_of;
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// Bytes that are read at a time.
const CHUNK: usize = 1 << 20;

/// SHA-256, in hex, of names and contents of the files that hold a model's weights, in their order. It reads them whole.
pub fn weights_sha256(dir: &Path) -> Result<String, CheckpointError> {
    let (mut all, mut chunk) = (Sha256::new(), vec![0; CHUNK]);
    for path in files_of(dir)?.0 {
        let failed = |e| CheckpointError::read(&path, e);
        let (mut file, mut one) = (File::open(&path).map_err(failed)?, Sha256::new());
        loop {
            match file.read(&mut chunk).map_err(failed)? {
                0 => break,
                read => one.update(&chunk[..read]),
            }
        }
        all.update(path.file_name().unwrap_or_default().as_encoded_bytes());
        all.update(one.finalize());
    }
    Ok(hex::encode(all.finalize()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // in a test an unwrap is an assertion
mod tests {
    use super::*;

    #[test]
    fn other_bytes_are_other_weights() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("model.safetensors");
        let mut of = |bytes: &[u8]| {
            std::fs::write(&file, bytes).unwrap();
            weights_sha256(dir.path()).unwrap()
        };
        let (one, two) = (of(b"one"), of(b"two"));
        assert_eq!((one.len(), one == two, one == of(b"one")), (64, false, true));
        assert!(weights_sha256(&dir.path().join("none")).is_err());
    }
}
