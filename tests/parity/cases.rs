//! The golden models of every family, and what transformers computes with them (tests/parity/families.py made the files).

#![allow(dead_code, clippy::unwrap_used)] // helpers of tests; each uses a part

use fleet_checkpoint::{ModelDir, Tensors};
use std::path::{Path, PathBuf};

/// In this clone, or where FLEET_GOLDEN says: on a machine that only runs the tests.
pub fn golden() -> PathBuf {
    let here = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/parity/golden/families");
    std::env::var_os("FLEET_GOLDEN").map_or_else(here, PathBuf::from)
}

pub struct Case {
    pub name: String,
    pub model: ModelDir,
    pub expected: Tensors,
}

pub fn cases() -> Vec<Case> {
    let mut dirs: Vec<PathBuf> =
        std::fs::read_dir(golden()).unwrap().map(|e| e.unwrap().path()).filter(|p| p.is_dir()).collect();
    dirs.sort();
    assert!(dirs.len() >= 14, "the golden files were not found");
    dirs.into_iter()
        .map(|dir| Case {
            name: dir.file_name().unwrap().to_string_lossy().into_owned(),
            model: ModelDir::open(&dir).unwrap_or_else(|e| panic!("{e}")),
            expected: Tensors::open(&dir.join("expected.safetensors")).unwrap(),
        })
        .collect()
}

/// A constant of the optimizer.
pub fn hyper(key: &str) -> f64 {
    let json: serde_json::Value =
        serde_json::from_slice(&std::fs::read(golden().join("hyper.json")).unwrap()).unwrap();
    json[key].as_f64().unwrap()
}

impl Case {
    /// Ids, and their shape.
    pub fn ids(&self, name: &str) -> (Vec<i64>, Vec<usize>) {
        let tensor = self.expected.get(name).unwrap();
        let data = tensor.data().unwrap();
        let ids = data.chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap())).collect();
        (ids, tensor.shape.to_vec())
    }

    pub fn f32(&self, name: &str) -> Vec<f32> {
        let tensor = self.expected.get(name).unwrap_or_else(|| panic!("{name}"));
        tensor.data().unwrap().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
    }

    pub fn f64(&self, name: &str) -> Vec<f64> {
        let tensor = self.expected.get(name).unwrap();
        tensor.data().unwrap().chunks_exact(8).map(|b| f64::from_le_bytes(b.try_into().unwrap())).collect()
    }

    /// The model's flat parameters.
    pub fn weights(&self) -> Vec<f32> {
        let mut flat = vec![0.0; self.model.layout.len];
        self.model.read(&mut flat).unwrap();
        flat
    }

    /// Compares flat gradients with those of transformers.
    pub fn check_gradients(&self, flat: &[f32], relative: f32) {
        let wanted = self.model.in_flat(&|name| self.expected.get(&format!("grad.{name}"))).unwrap();
        // That of a key's bias is none but for rounding: scores move together.
        let floor = 1e-3 * largest(&wanted);
        for p in &self.model.layout.parameters {
            let far = apart(&flat[p.range.clone()], &wanted[p.range.clone()], floor);
            assert!(far < relative, "{}: gradient of {} is {far} away", self.name, p.name);
        }
    }
}

/// What each token is to predict: the next one of its sequence.
pub fn targets(ids: &[i64], seq: usize) -> Vec<i64> {
    ids.chunks(seq).flat_map(|ids| ids[1..].iter().copied().chain([-100])).collect()
}

pub fn largest(x: &[f32]) -> f32 {
    x.iter().fold(0f32, |most, x| most.max(x.abs()))
}

/// The largest difference, against the largest number, which is taken for at least `floor`.
pub fn apart(a: &[f32], b: &[f32], floor: f32) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).fold(0f32, |most, (a, b)| most.max((a - b).abs())) / largest(b).max(floor)
}

/// Targets that are the likeliest token.
pub fn hits(logits: &[f32], targets: &[i64]) -> u64 {
    let rows = logits.chunks(logits.len() / targets.len());
    let first_largest = |row: &[f32]| {
        let largest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        row.iter().position(|x| *x == largest).unwrap() as i64
    };
    rows.zip(targets).filter(|(row, target)| first_largest(row) == **target).count() as u64
}
