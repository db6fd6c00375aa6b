//! In which tensors two checkpoints, or models, differ.

use crate::manifest::{Manifest, PIECE_MAX};
use crate::names::is_of_optimizer;
use crate::tensors::{Tensor, Tensors};
use crate::{CheckpointError, Dtype, OPTIMIZER_FILE};
use half::{bf16, f16};
use std::collections::BTreeSet;
use std::path::Path;

/// A tensor that is not the same in both.
#[derive(Clone, Debug, PartialEq)]
pub struct Difference {
    pub tensor: String,
    pub what: Differs,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Differs {
    OnlyInFirst,
    OnlyInSecond,
    /// Shape or type, the first one's and the second one's.
    Shape([(Dtype, Vec<usize>); 2]),
    Numbers {
        /// That are not the same.
        count: u64,
        /// Of two numbers; infinite where one of them is NaN.
        largest: f64,
    },
}

/// Compares weights, and the optimizer's states where both directories have one. By name, in alphabetical order.
pub fn diff(a: &Path, b: &Path) -> Result<Vec<Difference>, CheckpointError> {
    let mut found = compare(&Tensors::of_model(a)?, &Tensors::of_model(b)?)?;
    if has_state(a) && has_state(b) {
        found.extend(compare(&Tensors::of_optimizer(a)?, &Tensors::of_optimizer(b)?)?);
    }
    Ok(found)
}

fn has_state(dir: &Path) -> bool {
    let is_named = |manifest: Manifest| manifest.files.keys().any(|file| is_of_optimizer(file));
    Manifest::read(dir).is_ok_and(is_named) || dir.join(OPTIMIZER_FILE).exists()
}

fn compare(a: &Tensors, b: &Tensors) -> Result<Vec<Difference>, CheckpointError> {
    let names: BTreeSet<&str> = a.names().chain(b.names()).collect();
    let mut found = Vec::new();
    for name in names {
        let what = match (a.get(name), b.get(name)) {
            (Some(a), Some(b)) if (a.dtype, a.shape) != (b.dtype, b.shape) => {
                Some(Differs::Shape([a, b].map(|tensor| (tensor.dtype, tensor.shape.to_vec()))))
            }
            (Some(a), Some(b)) => numbers(&a, &b)?,
            (Some(_), None) => Some(Differs::OnlyInFirst),
            (None, _) => Some(Differs::OnlyInSecond),
        };
        found.extend(what.map(|what| Difference { tensor: name.to_owned(), what }));
    }
    Ok(found)
}

fn numbers(a: &Tensor, b: &Tensor) -> Result<Option<Differs>, CheckpointError> {
    let (mut count, mut largest) = (0, 0.0f64);
    let size = (a.dtype.bitsize() / 8).max(1);
    for from in (0..a.len()).step_by(PIECE_MAX) {
        let range = from..a.len().min(from + PIECE_MAX);
        let (a_bytes, b_bytes) = (a.bytes(range.clone())?, b.bytes(range)?);
        if a_bytes == b_bytes {
            continue;
        }
        for (x, y) in a_bytes.chunks_exact(size).zip(b_bytes.chunks_exact(size)).filter(|(x, y)| x != y) {
            let distance = (number(a.dtype, x) - number(a.dtype, y)).abs();
            count += 1;
            largest = largest.max(if distance.is_nan() { f64::INFINITY } else { distance });
        }
    }
    Ok((count > 0).then_some(Differs::Numbers { count, largest }))
}

/// NaN where the type has no numbers that fleet knows.
fn number(dtype: Dtype, bytes: &[u8]) -> f64 {
    match (dtype, bytes) {
        (Dtype::F32, &[a, b, c, d]) => f64::from(f32::from_le_bytes([a, b, c, d])),
        (Dtype::BF16, &[a, b]) => bf16::from_le_bytes([a, b]).to_f64(),
        (Dtype::F16, &[a, b]) => f16::from_le_bytes([a, b]).to_f64(),
        _ => f64::NAN,
    }
}
