//! A model's tensors, as Hugging Face names and stores them, in and out of the flat buffer of `fleet_common::model::Layout`. Every refusal
//! names the tensor.

use crate::reading::{Reading, read_numbers, size_of_one, widen};
use crate::{CONFIG_FILE, CheckpointError, Dtype, QuantisedWeight, Tensor, Tensors};
use fleet_common::files::stand_in;
use fleet_common::job::Job;
use fleet_common::model::{
    Decoder, Family, Layout, Object, Packer, Parameter, QUANTIZATION_CONFIG, Role, Stored, Wiring,
};
use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// Tensors that are named in a refusal; the rest is counted.
pub(crate) const NAMED: usize = 10;

/// A model directory as Hugging Face writes it, opened and checked.
#[derive(Debug)]
pub struct ModelDir {
    path: PathBuf,
    pub config: Object,
    pub decoder: Decoder,
    pub layout: Layout,
    pub family: &'static Family,
    tensors: Tensors,
    /// What the files have in few bits, by where it begins in the flat buffer.
    quantised: BTreeMap<usize, QuantisedWeight>,
}

impl ModelDir {
    /// Reads `config.json` and checks name, shape and type of every tensor that it asks for. Where it ties the head to the embedding and
    /// the weights have two different ones, they are not tied, as in transformers 5.
    pub fn open(path: &Path) -> Result<ModelDir, CheckpointError> {
        let file = path.join(CONFIG_FILE);
        let refuse = |path: &Path, what: String| CheckpointError::Model { path: path.to_owned(), what };
        if !path.is_dir() {
            return Err(refuse(path, fleet_common::model::no_such_model(path).into()));
        }
        if std::fs::metadata(&file).is_ok_and(|found| !found.is_file()) {
            return Err(refuse(&file, "is no file".into()));
        }
        let bytes = std::fs::read(&file).map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound => refuse(
                &file,
                format!(
                    "there is no such file; a model directory holds config.json, model.safetensors and tokenizer.json{}",
                    crate::tensors::instead_of_weights(path).map(|what| format!(", and this one {what}")).unwrap_or_default()
                ),
            ),
            _ => CheckpointError::read(&file, e),
        })?;
        if let Some(pointer) = stand_in(&bytes) {
            return Err(refuse(&file, format!("is {}; {}", pointer.name, pointer.cure)));
        }
        let config = fleet_common::model::parse_object(&bytes)
            .map_err(|e| refuse(&file, format!("is not a JSON object ({e})")))?;
        let packer = Packer::of_config(&config).map_err(|what| refuse(&file, what))?;
        let mut described = config.clone();
        described.remove(QUANTIZATION_CONFIG);
        let (family, mut decoder) = Family::of_config(&described).map_err(|what| refuse(&file, what))?;
        let tensors = Tensors::of_model(path)?;
        let mut model = ModelDir {
            path: path.to_owned(),
            config,
            layout: Wiring::new(&decoder, family).layout,
            decoder: decoder.clone(),
            tensors,
            family,
            quantised: BTreeMap::new(),
        };
        if decoder.tied
            && let (Some(a), Some(b)) = (model.get(&model.embedding()), model.get(&model.head()))
            && !a.equals(&b)?
        {
            decoder.tied = false;
            model.layout = Wiring::new(&decoder, family).layout;
            model.decoder = decoder;
        }
        if let Some(packer) = packer {
            model.quantised = model.find_quantised()?;
            if let Some(other) = model.quantised.values().find(|weight| !packer.fits(weight.packer())) {
                let what = format!(
                    "{QUANTIZATION_CONFIG} says {packer}, and {} is in {}; put back the file that belongs to these weights",
                    other.name,
                    other.packer()
                );
                return Err(refuse(&file, what));
            }
            if model.quantised.is_empty() {
                let what = format!(
                    "{QUANTIZATION_CONFIG} says that the weights are quantised, and none of them is; take the key out of the file"
                );
                return Err(refuse(&file, what));
            }
        }
        if packer.is_none()
            && let Some(part) = model.tensors.names().find(|name| is_of_codes(name))
        {
            let what = format!(
                "{part} is in the weights, as bitsandbytes or hqq writes it beside codes, and config.json has no {QUANTIZATION_CONFIG}; put it back"
            );
            return Err(refuse(&file, what));
        }
        model.check()?;
        Ok(model)
    }

    /// That of a job in `path`. Refused where the job asks for what weights in few bits do not allow.
    pub fn of_job(path: &Path, job: &Job) -> Result<ModelDir, CheckpointError> {
        let model = ModelDir::open(path)?;
        let what = match (model.is_quantised(), &job.adapter, job.quantization) {
            (true, None, _) => {
                "its weights are quantised, and training them needs more bits than they have: a step of the optimizer is smaller than the distance from one code to the next; train an adapter beside them (give the job an `[adapter]`), or take the model as it was before"
            }
            (true, _, Some(_)) => {
                "its weights are quantised already, and are taken as they are; leave `quantization` out of the job, or take the model as it was before"
            }
            _ => return Ok(model),
        };
        Err(CheckpointError::Model { path: path.to_owned(), what: what.into() })
    }

    fn find_quantised(&self) -> Result<BTreeMap<usize, QuantisedWeight>, CheckpointError> {
        let mut found = BTreeMap::new();
        for p in self.layout.parameters.iter().filter(|p| p.role == Role::Weight) {
            let names = [Some(p.name.as_str()), p.name.strip_prefix(self.family.prefix)];
            for name in names.into_iter().flatten() {
                if let Some(weight) = QuantisedWeight::find(&self.tensors, name)? {
                    found.insert(p.range.start, weight);
                    break;
                }
            }
        }
        Ok(found)
    }

    /// Whether the files have any weight in few bits.
    pub fn is_quantised(&self) -> bool {
        !self.quantised.is_empty()
    }

    /// How the files have a parameter in few bits, if they do. Its rows are ordered as they are in files, and a row has what goes into one output,
    /// also where files of this family else have such matrices transposed.
    pub fn quantised(&self, p: &Parameter) -> Option<&QuantisedWeight> {
        self.quantised.get(&p.range.start)
    }

    /// One of the tensors that stand for a weight in few bits.
    ///
    /// # Panics
    /// If it is not there: all of them were when the directory was opened.
    pub fn part(&self, name: &str) -> Tensor<'_> {
        self.tensors.get(name).expect("it was found when the directory was opened")
    }

    /// The type in which the files have a parameter, or in which what stands for it is meant.
    pub fn dtype(&self, p: &Parameter) -> Option<Dtype> {
        match self.quantised(p) {
            Some(weight) => weight.dtype(),
            None => self.find(p).map(|tensor| tensor.dtype),
        }
    }

    /// What each part of the decoder reads of the flat buffer.
    pub fn wiring(&self) -> Wiring {
        Wiring::new(&self.decoder, self.family)
    }

    /// The name of the matrix of tokens.
    pub fn embedding(&self) -> String {
        format!("{}.weight", self.family.names.embedding)
    }

    fn head(&self) -> String {
        format!("{}.weight", self.family.names.head)
    }

    /// The parameter that files name so, with or without the family's prefix, and its number in the layout. Of a tied pair either name is the
    /// embedding's.
    pub fn parameter(&self, name: &str) -> Option<(usize, &Parameter)> {
        let tied = self.decoder.tied && name == self.head();
        let name = if tied { &self.embedding() } else { name };
        let is = |p: &Parameter| p.name == name || p.name.strip_prefix(self.family.prefix) == Some(name);
        self.layout.parameters.iter().enumerate().find(|(_, p)| is(p))
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The tensors that have the parameter's numbers: of a tied pair some writers keep both.
    pub fn tensors_of(&self, p: &Parameter) -> impl Iterator<Item = Tensor<'_>> {
        let is_tied = self.decoder.tied && p.name == self.embedding();
        [self.get(&p.name), is_tied.then(|| self.get(&self.head())).flatten()].into_iter().flatten()
    }

    pub(crate) fn tensors_by_file(&self) -> Vec<(String, Vec<Tensor<'_>>)> {
        self.tensors.by_file()
    }

    /// By its name, or without the prefix that some writers leave out.
    fn get(&self, name: &str) -> Option<Tensor<'_>> {
        self.tensors.get(name).or_else(|| self.tensors.get(name.strip_prefix(self.family.prefix)?))
    }

    /// A parameter's tensor. Of a tied pair writers keep one, some of them the head.
    fn find(&self, parameter: &Parameter) -> Option<Tensor<'_>> {
        let is_tied = self.decoder.tied && parameter.name == self.embedding();
        let other = || is_tied.then(|| self.get(&self.head())).flatten();
        self.get(&parameter.name).or_else(other)
    }

    fn check(&self) -> Result<(), CheckpointError> {
        let (mut wrong, mut missing) = (Vec::new(), Vec::new());
        for p in &self.layout.parameters {
            if let Some(weight) = self.quantised(p) {
                if p.shape != [weight.rows, weight.cols] {
                    let is = [weight.rows, weight.cols];
                    wrong.push(format!(
                        "{} stands for {is:?}, config.json asks for {:?}",
                        weight.codes(),
                        p.shape
                    ));
                }
                continue;
            }
            let wanted = stored_shape(p);
            match self.find(p) {
                None if p.name == self.head() => wrong.push(format!(
                    "the weights lack {}; if the embedding is also the head, set tie_word_embeddings to true in its config.json",
                    p.name
                )),
                None => missing.push(p.name.as_str()),
                Some(t) if t.shape != wanted => {
                    wrong.push(format!("{} is {:?}, config.json asks for {wanted:?}", p.name, t.shape));
                }
                Some(t) if !matches!(t.dtype, Dtype::F32 | Dtype::BF16 | Dtype::F16) => {
                    wrong.push(format!("{} is {:?}; fleet reads F32, BF16 and F16", p.name, t.dtype));
                }
                Some(_) => {}
            }
        }
        if !missing.is_empty() {
            let more = missing.len().saturating_sub(NAMED);
            let and = if more > 0 { format!(" and {more} more") } else { String::new() };
            missing.truncate(NAMED);
            let names = missing.join(", ");
            wrong.insert(0, format!("the weights lack {names}{and}; they do not belong to this config.json"));
        }
        wrong.extend(
            self.left_over().map(|name| {
                format!("{name} is in the weights, and config.json describes a model without it")
            }),
        );
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

    /// Tensors of the decoder that the description leaves out: anything in a block or of the head, and the bias of a matrix that it has. What else a
    /// file holds, such as other heads, has no part in the decoder, nor have tables that some writers keep.
    fn left_over(&self) -> impl Iterator<Item = &str> {
        const TABLES: [&str; 4] = [".inv_freq", ".attn.bias", ".attn.masked_bias", ".attention.masked_bias"];
        let known: BTreeSet<&str> = self.layout.parameters.iter().map(|p| p.name.as_str()).collect();
        let stems: BTreeSet<&str> = known.iter().filter_map(|name| stem(name)).collect();
        let before_number = self.family.names.layer.split("{}").next().unwrap_or_default();
        let head = self.head();
        let of_head = format!("{}.", self.family.names.head);
        let parts: BTreeSet<String> =
            self.quantised.values().flat_map(QuantisedWeight::parts).map(|part| part.name).collect();
        self.tensors.names().filter(move |name| {
            let whole = match name.starts_with(self.family.prefix) || name.starts_with(&of_head) {
                true => (*name).to_owned(),
                false => format!("{}{name}", self.family.prefix),
            };
            if known.contains(whole.as_str()) || whole == head || parts.contains(*name) {
                return false;
            }
            let number = whole
                .strip_prefix(before_number)
                .and_then(|rest| rest.split('.').next()?.parse::<usize>().ok());
            let is_table = TABLES.iter().any(|end| name.ends_with(end));
            number.is_some_and(|number| number >= self.decoder.layers || !is_table)
                || whole.starts_with(&of_head)
                || stem(&whole).is_some_and(|stem| stems.contains(stem))
        })
    }

    /// Has numbers of a parameter, from its number `first` on, read in fp32.
    pub fn read_part<'a>(
        &'a self,
        p: &'a Parameter,
        first: usize,
        out: &'a mut [f32],
        reading: &mut Reading<'a>,
    ) {
        if self.quantised(p).is_some() {
            let what =
                format!("{} is quantised, and cannot be trained itself; train an adapter beside it", p.name);
            return reading.job(move || Err(CheckpointError::Model { path: self.path.clone(), what }));
        }
        read_part(p, self.find(p).expect("it was found when the directory was opened"), first, out, reading);
    }

    /// All parameters, in fp32. `flat` is as long as the layout.
    pub fn read(&self, flat: &mut [f32]) -> Result<(), CheckpointError> {
        assert_eq!(flat.len(), self.layout.len, "the flat buffer of this layout");
        self.layout.parameters.iter().try_for_each(|p| {
            let mut reading = Reading::default();
            self.read_part(p, 0, &mut flat[p.range.clone()], &mut reading);
            reading.run(1)
        })
    }

    /// Other tensors of the same names and shapes, such as gradients, in a flat buffer.
    pub fn in_flat<'t>(
        &self,
        tensor: &dyn Fn(&str) -> Option<Tensor<'t>>,
    ) -> Result<Vec<f32>, CheckpointError> {
        let mut flat = vec![0.0; self.layout.len];
        for p in &self.layout.parameters {
            if let Some(tensor) = tensor(&p.name) {
                copy(p, &tensor, 0, &mut flat[p.range.clone()])?;
            }
        }
        Ok(flat)
    }
}

/// Has numbers of a parameter, from its number `first` on, read in fp32 from a tensor that is stored as its files have it.
pub fn read_part<'a>(
    p: &'a Parameter,
    tensor: Tensor<'a>,
    first: usize,
    out: &'a mut [f32],
    reading: &mut Reading<'a>,
) {
    match p.stored {
        Stored::AsIs => reading.numbers(tensor, first, out),
        _ => reading.job(move || copy(p, &tensor, first, out)),
    }
}

/// The name of a layer without what it is of it.
fn stem(name: &str) -> Option<&str> {
    name.strip_suffix(".weight").or_else(|| name.strip_suffix(".bias"))
}

/// All numbers of a parameter, of a tensor that is stored as its files have it.
pub fn read_parameter(p: &Parameter, tensor: &Tensor, out: &mut [f32]) -> Result<(), CheckpointError> {
    copy(p, tensor, 0, out)
}

/// Numbers of a parameter from its number `first` on.
fn copy(p: &Parameter, tensor: &Tensor, first: usize, out: &mut [f32]) -> Result<(), CheckpointError> {
    let dtype = tensor.dtype;
    if p.stored != Stored::AsIs {
        let data = tensor.data()?;
        let numbers = out.iter_mut().enumerate();
        numbers.for_each(|(at, x)| *x = number(dtype, &data, stored_index(p, first + at)));
        return Ok(());
    }
    read_numbers(tensor, first, out)
}

/// A parameter's numbers as a file of its family has them; a view where they lie in the flat buffer as they do there.
pub fn stored<'a, T: Copy + Default>(p: &Parameter, values: &'a [T]) -> Cow<'a, [T]> {
    if p.stored == Stored::AsIs {
        return Cow::Borrowed(values);
    }
    let mut out = vec![T::default(); values.len()];
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

fn number(dtype: Dtype, data: &[u8], at: usize) -> f32 {
    let size = size_of_one(dtype);
    let mut one = [0.0];
    widen(dtype, &data[size * at..][..size], &mut one);
    one[0]
}
/// Whether a tensor is what packers write beside codes, or hqq's codes.
fn is_of_codes(name: &str) -> bool {
    [".absmax", ".SCB", ".W_q"].into_iter().any(|end| name.ends_with(end))
}
