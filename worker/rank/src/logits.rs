//! `fleet-rank logits`: what a model of any family computes for given tokens.

use crate::host_model::read_weights;
use fleet_common::model::Positions;
use fleet_learn::{Error, Result};
use fleet_torch::{FlatWeights, Numbers, TorchExecutor, device};
use safetensors::tensor::{Dtype, TensorView};
use std::path::{Path, PathBuf};
use tch::{Device, Kind, Tensor};

/// Most bytes of logits: beyond, they are no file that anybody compares.
const BYTES_MAX: usize = 16 << 30;

/// What to compute, and where to write it.
pub struct Wanted {
    pub model: PathBuf,
    pub ids: PathBuf,
    pub out: PathBuf,
    /// auto, cpu, cuda.
    pub device: String,
    pub bf16: bool,
}

/// Writes the tensor `logits`, `[sequences, tokens, vocabulary]` in fp32.
pub fn write(wanted: &Wanted) -> Result<()> {
    let (model, flat) = read_weights(&wanted.model)?;
    let (ids, sequences) = read_ids(&wanted.ids)?;
    let refuse = |what: String| Error::Input(format!("{}: {what}", wanted.ids.display()));
    let (vocab, len) = (model.decoder.vocab_size, ids.len() / sequences);
    if let Some(id) = ids.iter().find(|id| **id >= vocab as u64) {
        return Err(refuse(format!("token {id} is beyond the model's vocabulary of {vocab}")));
    }
    if matches!(model.decoder.positions, Positions::Learned { .. }) && len > model.decoder.max_positions {
        return Err(refuse(format!(
            "a sequence of {len} tokens, and the model has positions for {}; shorten it",
            model.decoder.max_positions
        )));
    }
    let bytes = ids.len().saturating_mul(4 * vocab);
    if bytes > BYTES_MAX {
        return Err(refuse(format!("its logits would have {} GiB; give fewer tokens", bytes >> 30)));
    }
    let device = device_of(&wanted.device)?;
    let numbers = if wanted.bf16 { Numbers::BF16_MIXED } else { Numbers::FP32 };
    let mut executor = TorchExecutor::new(model.decoder.clone(), model.layout.clone(), device, numbers);
    let failed = |error: fleet_torch::Error| {
        Error::Environment(format!("the model cannot be computed on {device:?}: {error}"))
    };
    let mut weights = FlatWeights::new(model.layout.len, device, numbers.products).map_err(failed)?;
    weights.set(0, &flat).and_then(|()| weights.refresh()).map_err(failed)?;
    drop(flat);
    let mut out = Vec::with_capacity(bytes);
    for sequence in ids.chunks(len) {
        let logits = compute(&mut executor, &weights, sequence).map_err(failed)?;
        logits.iter().for_each(|x| out.extend(x.to_le_bytes()));
    }
    save(&wanted.out, &[sequences, len, vocab], &out)
}

fn compute(
    executor: &mut TorchExecutor,
    weights: &FlatWeights,
    sequence: &[u64],
) -> std::result::Result<Vec<f32>, fleet_torch::Error> {
    let ids: Vec<i64> = sequence.iter().map(|id| *id as i64).collect();
    let ids = Tensor::f_from_slice(&ids)?.f_view([1, -1])?.f_to_device(executor.network.device)?;
    let logits = executor.logits(weights.view(), &ids)?.f_to_device(Device::Cpu)?.f_to_kind(Kind::Float)?;
    Ok(Vec::<f32>::try_from(&logits.f_contiguous()?.f_view([-1])?)?)
}

pub(crate) fn device_of(name: &str) -> Result<Device> {
    match (name, if name == "cpu" { Err(String::new()) } else { device::cuda_devices() }) {
        ("cpu", _) => Ok(Device::Cpu),
        (_, Ok(_)) => Ok(Device::Cuda(0)),
        ("cuda", Err(why)) => {
            Err(Error::Environment(format!("{why}; leave --device out to compute on the CPU")))
        }
        (_, Err(_)) => Ok(Device::Cpu),
    }
}

/// Ids of all sequences, one after the other, and how many sequences there are.
fn read_ids(path: &Path) -> Result<(Vec<u64>, usize)> {
    #[derive(serde::Deserialize)]
    #[serde(untagged)]
    enum Ids {
        One(Vec<u64>),
        Several(Vec<Vec<u64>>),
    }
    let refuse = |what: String| Error::Input(format!("{}: {what}", path.display()));
    let bytes = std::fs::read(path).map_err(|e| refuse(format!("cannot be read: {e}")))?;
    let lists = match serde_json::from_slice(&bytes) {
        Ok(Ids::One(ids)) => vec![ids],
        Ok(Ids::Several(lists)) => lists,
        Err(_) => {
            return Err(refuse("is no list of token ids, such as [1, 2, 3] or [[1, 2], [3, 4]]".into()));
        }
    };
    let len = lists.first().map_or(0, Vec::len);
    if len == 0 {
        return Err(refuse("has no token".into()));
    }
    if let Some(at) = lists.iter().position(|list| list.len() != len) {
        let other = lists[at].len();
        return Err(refuse(format!(
            "sequence {} has {other} tokens and the first {len}; give sequences of one length",
            at + 1
        )));
    }
    let sequences = lists.len();
    Ok((lists.concat(), sequences))
}

fn save(path: &Path, shape: &[usize], bytes: &[u8]) -> Result<()> {
    let failed =
        |e: &dyn std::fmt::Display| Error::Environment(format!("cannot write {}: {e}", path.display()));
    let view = TensorView::new(Dtype::F32, shape.to_vec(), bytes).map_err(|e| failed(&e))?;
    safetensors::serialize_to_file([("logits", view)], None, path).map_err(|e| failed(&e))
}
