//! `fleet-rank logits`: what a model of any family computes for given tokens.

use crate::host_model::read_weights;
use fleet_common::capability::CUDA_DRIVER;
use fleet_common::model::Positions;
use fleet_learn::zeros::{Part, reserve};
use fleet_learn::{Error, Result};
use fleet_torch::{FlatWeights, Numbers, TorchExecutor, device};
use safetensors::tensor::{Dtype, TensorView};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use tch::{Device, Kind, Tensor};

/// Most bytes of logits: beyond, they are no file that anybody compares.
const BYTES_MAX: usize = 16 << 30;

/// What to compute, and where to write it.
pub struct Wanted {
    pub model: PathBuf,
    /// What changes it, as PEFT writes it.
    pub adapters: Vec<PathBuf>,
    pub ids: PathBuf,
    pub out: PathBuf,
    /// auto, cpu, cuda.
    pub device: String,
    pub bf16: bool,
}

/// Writes the tensor `logits`, `[sequences, tokens, vocabulary]` in fp32.
pub fn write(wanted: &Wanted) -> Result<()> {
    let out = Out::new(wanted)?;
    let (model, flat) = read_weights(&wanted.model, &wanted.adapters)?;
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
    let precision = if wanted.bf16 { Numbers::BF16_MIXED } else { Numbers::FP32 };
    let mut executor = TorchExecutor::new(model.decoder.clone(), model.wiring(), device, precision);
    let failed = |error: fleet_torch::Error| {
        Error::Environment(format!("the model cannot be computed on {device:?}: {error}"))
    };
    let mut weights = FlatWeights::new(model.layout.len, device, precision).map_err(failed)?;
    weights.set(0, &flat).and_then(|()| weights.refresh()).map_err(failed)?;
    drop(flat);
    let mut numbers = Vec::new();
    reserve(&mut numbers, bytes, Part::Logits)?;
    for sequence in ids.chunks(len) {
        let logits = compute(&mut executor, &weights, sequence).map_err(failed)?;
        logits.iter().for_each(|x| numbers.extend(x.to_le_bytes()));
    }
    out.write(&[sequences, len, vocab], &numbers)
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

/// The device of this name, which has shown that it computes. `auto` says why a machine's GPU does not.
pub(crate) fn device_of(name: &str) -> Result<Device> {
    if name == "cpu" {
        return Ok(Device::Cpu);
    }
    match (device::open("cuda:0"), name) {
        (Ok(device), _) => Ok(device),
        (Err(why), "auto") => {
            if Path::new(CUDA_DRIVER).exists() {
                eprintln!("warning: {why}: computing on the CPU");
            }
            Ok(Device::Cpu)
        }
        (Err(why), _) => Err(Error::Environment(format!("{why}; leave --device out to compute on the CPU"))),
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

/// Where the logits go. Looked at before anything is computed, and whole or not there afterwards.
struct Out<'a> {
    named: &'a Path,
    /// What links lead to.
    place: PathBuf,
    /// A pipe or a device, which takes bytes and is not replaced.
    takes_bytes: bool,
}

impl Out<'_> {
    fn new(wanted: &Wanted) -> Result<Out<'_>> {
        let named = wanted.out.as_path();
        let refuse =
            |what: String| Error::Input(format!("--out {}: {what}; name another file", named.display()));
        let failed = |e: std::io::Error| Error::Environment(format!("cannot write {}: {e}", named.display()));
        let place = end_of_links(named).map_err(failed)?;
        let there = std::fs::metadata(&place).ok();
        if there.as_ref().is_some_and(|there| there.is_dir()) {
            return Err(refuse("it is a directory".into()));
        }
        let directory = directory(&place);
        if !directory.is_dir() {
            return Err(refuse(format!("there is no directory {}", directory.display())));
        }
        let is_it = |path: &Path| {
            let (Some(a), Ok(b)) = (&there, std::fs::metadata(path)) else { return false };
            (a.dev(), a.ino()) == (b.dev(), b.ino())
        };
        let takes_bytes = there.as_ref().is_some_and(|there| !there.is_file());
        if !takes_bytes && is_it(&wanted.ids) {
            return Err(refuse("it is the file of --ids".into()));
        }
        let of_model = std::fs::read_dir(&wanted.model).into_iter().flatten().flatten();
        if let Some(file) = of_model.map(|entry| entry.path()).find(|path| is_it(path)) {
            return Err(refuse(format!("it is {}, a file of the model", file.display())));
        }
        let within = |model: PathBuf| directory.canonicalize().is_ok_and(|directory| directory == model);
        if wanted.model.canonicalize().is_ok_and(within) {
            return Err(refuse("what lies in the model's directory is read as a part of it".into()));
        }
        Ok(Out { named, place, takes_bytes })
    }

    fn write(self, shape: &[usize], numbers: &[u8]) -> Result<()> {
        let failed = |e: &dyn std::fmt::Display| {
            Error::Environment(format!("cannot write {}: {e}", self.named.display()))
        };
        let view = TensorView::new(Dtype::F32, shape.to_vec(), numbers).map_err(|e| failed(&e))?;
        let tensors = [("logits", view)];
        if self.takes_bytes {
            let bytes = safetensors::serialize(tensors, None).map_err(|e| failed(&e))?;
            return std::fs::write(&self.place, bytes).map_err(|e| failed(&e));
        }
        let name = self.place.file_name().unwrap_or_default().to_string_lossy();
        let temporary = directory(&self.place).join(format!(".{name}.{}.tmp", std::process::id()));
        let written = safetensors::serialize_to_file(tensors, None, &temporary).map_err(|e| failed(&e));
        let placed = written.and_then(|()| std::fs::rename(&temporary, &self.place).map_err(|e| failed(&e)));
        placed.inspect_err(|_| {
            let _ = std::fs::remove_file(&temporary); // the error of writing is the one to tell
        })
    }
}

fn directory(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Links are followed as far as they lead, also where nothing is there yet.
fn end_of_links(path: &Path) -> std::io::Result<PathBuf> {
    let mut path = path.to_owned();
    for _ in 0..LINKS_MAX {
        match std::fs::read_link(&path) {
            Ok(target) => {
                let target = directory(&path).join(target);
                // What stands for an open file, such as a pipe, leads to no name.
                if path.exists() && !target.exists() {
                    return Ok(path);
                }
                path = target;
            }
            Err(_) => return Ok(path),
        }
    }
    Err(std::io::Error::other("its links lead in a circle"))
}

/// As many as Linux follows.
const LINKS_MAX: usize = 40;
