//! A model's tensors, as Hugging Face names and stores them, in and out of the flat buffer of `fleet_common::model::Layout`. Every refusal
//! names the tensor.

use crate::{CONFIG_FILE, CheckpointError, Dtype, MODEL_FILE, TensorSlice, Tensors};
use fleet_common::model::{Decoder, Family, Layout, Object, Parameter, Stored};
use half::{bf16, f16};
use std::borrow::Cow;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// Tensors that are named in a refusal; the rest is counted.
const NAMED: usize = 10;

/// A model directory as Hugging Face writes it, opened and checked.
#[derive(Debug)]
pub struct ModelDir {
    path: PathBuf,
    pub config: Object,
    pub decoder: Decoder,
    pub layout: Layout,
    pub family: &'static Family,
    tensors: Tensors,
}

impl ModelDir {
    /// Reads `config.json` and checks name, shape and type of every tensor that it asks for. Where it ties the head to the embedding and
    /// the weights have two different ones, they are not tied, as in transformers 5.
    pub fn open(path: &Path) -> Result<ModelDir, CheckpointError> {
        let file = path.join(CONFIG_FILE);
        let refuse = |path: &Path, what: String| CheckpointError::Model { path: path.to_owned(), what };
        if !path.is_dir() {
            return Err(refuse(path, "there is no such model directory; check the path".into()));
        }
        let bytes = std::fs::read(&file).map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound => refuse(
                &file,
                "there is no such file; a model directory holds config.json, model.safetensors and tokenizer.json".into(),
            ),
            _ => CheckpointError::read(&file, e),
        })?;
        let config: Object =
            serde_json::from_slice(&bytes).map_err(|e| refuse(&file, format!("is not a JSON object ({e})")))?;
        let (family, mut decoder) = Family::of_config(&config).map_err(|what| refuse(&file, what))?;
        let single = path.join(MODEL_FILE);
        let tensors = Tensors::open(if single.exists() { &single } else { path })?;
        let mut model = ModelDir {
            path: path.to_owned(),
            config,
            layout: Layout::new(&decoder, family),
            decoder: decoder.clone(),
            tensors,
            family,
        };
        if decoder.tied
            && let (Some(a), Some(b)) = (model.get(&model.embedding()), model.get(&model.head()))
            && ((a.dtype, a.shape) != (b.dtype, b.shape) || a.data != b.data)
        {
            decoder.tied = false;
            model.layout = Layout::new(&decoder, family);
            model.decoder = decoder;
        }
        model.check()?;
        Ok(model)
    }

    fn embedding(&self) -> String {
        format!("{}.weight", self.family.names.embedding)
    }

    fn head(&self) -> String {
        format!("{}.weight", self.family.names.head)
    }

    /// By its name, or without the prefix that some writers leave out.
    fn get(&self, name: &str) -> Option<TensorSlice<'_>> {
        self.tensors.get(name).or_else(|| self.tensors.get(name.strip_prefix(self.family.prefix)?))
    }

    /// A parameter's tensor. Of a tied pair writers keep one, some of them the head.
    fn find(&self, parameter: &Parameter) -> Option<TensorSlice<'_>> {
        let is_tied = self.decoder.tied && parameter.name == self.embedding();
        let other = || is_tied.then(|| self.get(&self.head())).flatten();
        self.get(&parameter.name).or_else(other)
    }

    fn check(&self) -> Result<(), CheckpointError> {
        let mut wrong = Vec::new();
        for p in &self.layout.parameters {
            let wanted = stored_shape(p);
            match self.find(p) {
                None if p.name == self.head() => wrong.push(format!(
                    "the weights lack {}; if the embedding is also the head, set tie_word_embeddings to true in its config.json",
                    p.name
                )),
                None => {
                    wrong.push(format!("the weights lack {}; they do not belong to this config.json", p.name))
                }
                Some(t) if t.shape != wanted => {
                    wrong.push(format!("{} is {:?}, config.json asks for {wanted:?}", p.name, t.shape));
                }
                Some(t) if !matches!(t.dtype, Dtype::F32 | Dtype::BF16 | Dtype::F16) => {
                    wrong.push(format!("{} is {:?}; fleet reads F32, BF16 and F16", p.name, t.dtype));
                }
                Some(_) => {}
            }
        }
        if wrong.is_empty() {
            return Ok(());
        }
        let more = wrong.len().saturating_sub(NAMED);
        wrong.truncate(NAMED);
        let mut what = wrong.join("; ");
        if more > 0 {
            what.push_str(&format!("; and {more} more"));
        }
        Err(CheckpointError::Model { path: self.path.clone(), what })
    }

    /// The part of a parameter that lies in `range` (of the flat buffer), in fp32. `out` is as long as `range`; returns what was filled.
    pub fn read_part<'a>(&self, p: &Parameter, range: &Range<usize>, out: &'a mut [f32]) -> &'a [f32] {
        let (begin, end) = (range.start.max(p.range.start), range.end.min(p.range.end));
        if begin >= end {
            return &[];
        }
        let tensor = self.find(p).expect("it was found when the directory was opened");
        let out = &mut out[begin - range.start..end - range.start];
        copy(p, &tensor, begin - p.range.start, out);
        out
    }

    /// All parameters, in fp32. `flat` is as long as the layout.
    pub fn read(&self, flat: &mut [f32]) {
        assert_eq!(flat.len(), self.layout.len, "the flat buffer of this layout");
        for p in &self.layout.parameters {
            self.read_part(p, &p.range, &mut flat[p.range.clone()]);
        }
    }

    /// Other tensors of the same names and shapes, such as gradients, in a flat buffer.
    pub fn in_flat<'t>(&self, tensor: &dyn Fn(&str) -> Option<TensorSlice<'t>>) -> Vec<f32> {
        let mut flat = vec![0.0; self.layout.len];
        for p in &self.layout.parameters {
            if let Some(tensor) = tensor(&p.name) {
                copy(p, &tensor, 0, &mut flat[p.range.clone()]);
            }
        }
        flat
    }
}

/// Numbers of a parameter from its number `first` on.
fn copy(p: &Parameter, tensor: &TensorSlice, first: usize, out: &mut [f32]) {
    if p.stored != Stored::AsIs {
        let numbers = out.iter_mut().enumerate();
        return numbers.for_each(|(at, x)| *x = number(tensor, stored_index(p, first + at)));
    }
    match tensor.dtype {
        Dtype::F32 => {
            for (x, b) in out.iter_mut().zip(tensor.data[4 * first..].as_chunks::<4>().0) {
                *x = f32::from_le_bytes(*b);
            }
        }
        Dtype::BF16 => {
            for (x, b) in out.iter_mut().zip(tensor.data[2 * first..].as_chunks::<2>().0) {
                *x = bf16::from_le_bytes(*b).to_f32();
            }
        }
        _ => {
            for (x, b) in out.iter_mut().zip(tensor.data[2 * first..].as_chunks::<2>().0) {
                *x = f16::from_le_bytes(*b).to_f32();
            }
        }
    }
}

/// A parameter as a file of its family has it; a view where it lies in the flat buffer as it does there.
pub fn stored<'a>(p: &Parameter, flat: &'a [f32]) -> Cow<'a, [f32]> {
    let values = &flat[p.range.clone()];
    if p.stored == Stored::AsIs {
        return Cow::Borrowed(values);
    }
    let mut out = vec![0.0; values.len()];
    values.iter().enumerate().for_each(|(at, x)| out[stored_index(p, at)] = *x);
    Cow::Owned(out)
}

/// The shape that a file has.
pub fn stored_shape(p: &Parameter) -> Vec<usize> {
    match p.stored {
        Stored::Transposed => p.shape.iter().rev().copied().collect(),
        _ => p.shape.clone(),
    }
}

/// Where in a file the number `at` of a parameter stands.
fn stored_index(p: &Parameter, at: usize) -> usize {
    let width = p.shape.get(1).copied().unwrap_or(1);
    let (row, column) = (at / width, at % width);
    match p.stored {
        Stored::AsIs => at,
        Stored::Transposed => column * p.shape[0] + row,
        Stored::ByHead { heads } => {
            let dim = p.shape[0] / (3 * heads);
            let (part, head, within) = (row / (heads * dim), row / dim % heads, row % dim);
            ((head * 3 + part) * dim + within) * width + column
        }
    }
}

fn number(tensor: &TensorSlice, at: usize) -> f32 {
    match tensor.dtype {
        Dtype::F32 => {
            let b = &tensor.data[4 * at..4 * at + 4];
            f32::from_le_bytes([b[0], b[1], b[2], b[3]])
        }
        Dtype::BF16 => bf16::from_le_bytes([tensor.data[2 * at], tensor.data[2 * at + 1]]).to_f32(),
        _ => f16::from_le_bytes([tensor.data[2 * at], tensor.data[2 * at + 1]]).to_f32(),
    }
}
