//! Adapters, as PEFT writes them: small matrices that change a model which itself stays as it is (LoRA, rsLoRA, DoRA, and whole parameters).
//! Those of files become part of the weights (`merge.rs`). One that is trained (`trained.rs`) is a layout of its own beside a model that is
//! frozen (`frozen.rs`): a strategy keeps its numbers as those of any model, and an executor computes with both.

mod combine;
mod config;
mod files;
mod form;
mod from_files;
mod frozen;
mod merge;
mod packed;
mod targets;
mod to_files;
mod trained;

pub use combine::{Combination, Combined, can_combine, combine};
pub use config::{ADAPTER_CONFIG, AdapterConfig};
pub use files::AdapterFile;
pub(crate) use files::plain as plain_name;
pub use from_files::read_wide;
pub use frozen::{Frozen, Kept, bytes as frozen_bytes, read_numbers};
pub use packed::{FewBits, Packed, PackedMatrix, PackedRows};
pub use to_files::quantise_for_files;
pub use trained::{AddedPart, AddedProduct, AddedTable, Trained, TrainedAdapter};

use crate::error::{Error, Result};
use fleet_checkpoint::{ModelDir, Tensor, Tensors, read_parameter, stored_shape};
use fleet_common::model::{Fresh, Parameter, Role, Stored};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

pub use fleet_checkpoint::ADAPTER_FILE as ADAPTER_MODEL;
/// How the names of magnitudes end.
pub(crate) const MAGNITUDE: &str = ".lora_magnitude_vector";
/// What PEFT puts before the names of the model that it wraps.
const WRAPPED: &str = "base_model.model.";
/// Tensors that are named in a refusal.
const NAMED: usize = 10;

/// What changes one model.
#[derive(Debug)]
pub struct Adapter {
    path: PathBuf,
    changes: Vec<Change>,
}

/// What becomes of one parameter.
#[derive(Debug)]
struct Change {
    /// Its number in the layout.
    parameter: usize,
    /// Its numbers before anything is added, where they are others.
    whole: Option<Vec<f32>>,
    added: Option<Added>,
}

/// `b a` times `scale`, `[rows, columns]` as the flat buffer has the parameter.
#[derive(Clone, Debug)]
struct Added {
    rank: usize,
    scale: f32,
    /// `[rows, rank]`.
    b: Vec<f32>,
    /// `[rank, columns]`.
    a: Vec<f32>,
    /// Of each row, its length after the change: DoRA.
    magnitude: Option<Vec<f32>>,
}

/// What the file has of one module.
#[derive(Debug, Default)]
struct Found<'a> {
    weight: Option<Tensor<'a>>,
    bias: Option<Tensor<'a>>,
    a: Option<Tensor<'a>>,
    b: Option<Tensor<'a>>,
    embedding_a: Option<Tensor<'a>>,
    embedding_b: Option<Tensor<'a>>,
    magnitude: Option<Tensor<'a>>,
}

type Pick<'a> = for<'f> fn(&'f mut Found<'a>) -> &'f mut Option<Tensor<'a>>;

impl<'a> Found<'a> {
    /// How names end, and what they are then. Some versions of PEFT write one that others do not.
    const ENDS: [(&'static str, Pick<'a>); 8] = [
        (".lora_A.weight", |found| &mut found.a),
        (".lora_B.weight", |found| &mut found.b),
        (".lora_embedding_A", |found| &mut found.embedding_a),
        (".lora_embedding_B", |found| &mut found.embedding_b),
        (".lora_magnitude_vector", |found| &mut found.magnitude),
        (".lora_magnitude_vector.weight", |found| &mut found.magnitude),
        (".weight", |found| &mut found.weight),
        (".bias", |found| &mut found.bias),
    ];

    /// Where a tensor of this name belongs.
    fn place<'f, 'n>(
        all: &'f mut BTreeMap<&'n str, Found<'a>>,
        name: &'n str,
    ) -> Option<&'f mut Option<Tensor<'a>>> {
        let (end, pick) = Self::ENDS.into_iter().find(|(end, _)| name.ends_with(end))?;
        let module = &name[..name.len() - end.len()];
        let module = [".base_layer", ".modules_to_save"]
            .iter()
            .find_map(|end| module.strip_suffix(end))
            .unwrap_or(module);
        let module = module.strip_prefix(WRAPPED).unwrap_or(module);
        (!module.contains("lora_")).then(|| pick(all.entry(module).or_default()))
    }
}

impl Adapter {
    /// Reads the adapter in `dir` for `model`. Every tensor must have its place there.
    pub fn open(dir: &Path, model: &ModelDir) -> Result<Adapter> {
        let config = AdapterConfig::read(dir)?;
        let path = dir.join(ADAPTER_MODEL);
        let refuse = |what: String| Error::Input(format!("{}: {what}", path.display()));
        let tensors = tensors_of(dir)?;
        let (mut modules, mut misplaced) = (BTreeMap::new(), Vec::new());
        for name in tensors.names() {
            match Found::place(&mut modules, name) {
                Some(place) => *place = tensors.get(name),
                None => misplaced.push(name.to_owned()),
            }
        }
        let mut changes = Vec::new();
        for (module, found) in &modules {
            let parameter = |end: &str| model.parameter(&format!("{module}{end}"));
            if let Some(bias) = found.bias {
                match parameter(".bias") {
                    Some((parameter, p)) => changes.push(Change {
                        parameter,
                        whole: Some(whole(p, &bias).map_err(&refuse)?),
                        added: None,
                    }),
                    None => misplaced.push(bias.name.to_owned()),
                }
            }
            let of_weight =
                [found.weight, found.a, found.b, found.embedding_a, found.embedding_b, found.magnitude];
            if of_weight.iter().all(Option::is_none) {
                continue;
            }
            let Some((number, p)) = parameter(".weight") else {
                misplaced.extend(of_weight.into_iter().flatten().map(|tensor| tensor.name.to_owned()));
                continue;
            };
            let whole = found.weight.map(|tensor| whole(p, &tensor)).transpose().map_err(&refuse)?;
            let added = added(module, found, p, &config).map_err(&refuse)?;
            changes.push(Change { parameter: number, whole, added });
        }
        if !misplaced.is_empty() {
            let more = misplaced.len().saturating_sub(NAMED);
            let and = if more > 0 { format!(" and {more} more") } else { String::new() };
            misplaced.truncate(NAMED);
            return Err(refuse(format!(
                "the model has no place for {}{and}; it is an adapter of another model",
                misplaced.join(", ")
            )));
        }
        if changes.is_empty() {
            return Err(refuse("it changes nothing".into()));
        }
        if model.decoder.tied
            && !are_one(&changes, model.parameter(&model.embedding()).map(|(number, _)| number))
        {
            return Err(refuse(
                "it changes the embedding or the head alone, and in this model both are one matrix (tie_word_embeddings), of which PEFT leaves \
                 the other use as it is; untie the model first"
                    .into(),
            ));
        }
        Ok(Adapter { path: dir.to_owned(), changes })
    }

    /// Of the layout, the numbers of the parameters that it changes.
    pub fn changed(&self) -> impl Iterator<Item = usize> {
        self.changes.iter().map(|change| change.parameter)
    }
}

/// What the adapter in `dir` has.
fn tensors_of(dir: &Path) -> Result<Tensors> {
    let path = dir.join(ADAPTER_MODEL);
    if path.exists() {
        return Ok(Tensors::open(&path)?);
    }
    let what = match dir.join("adapter_model.bin").exists() {
        true => {
            "there is only adapter_model.bin, a pickle; save the adapter again with safe_serialization=True"
        }
        false => "there is no such file",
    };
    Err(Error::Input(format!("{}: {what}", path.display())))
}

/// Whether what becomes of `parameter` is said for both of its names, and alike.
fn are_one(changes: &[Change], parameter: Option<usize>) -> bool {
    let mut of_it = changes.iter().filter(|change| Some(change.parameter) == parameter);
    match (of_it.next(), of_it.next()) {
        (None, _) => true,
        (Some(one), Some(other)) => one.whole == other.whole && one.added.is_none() && other.added.is_none(),
        (Some(_), None) => false,
    }
}

/// A parameter's numbers, all of them others.
fn whole(p: &Parameter, tensor: &Tensor) -> std::result::Result<Vec<f32>, String> {
    let wanted = stored_shape(p);
    if let ([rows, width], [given, of]) = (&wanted[..], tensor.shape)
        && given > rows
        && of == width
    {
        return Err(format!(
            "{} has {given} rows, and the model's {} has {rows}: it was trained with tokens that had been added, and fleet adds none; give the model as it \
             was then, resized and saved by transformers (resize_token_embeddings)",
            tensor.name, p.name
        ));
    }
    has_shape(tensor, &wanted, &p.name)?;
    numbers(p, tensor)
}

fn has_shape(tensor: &Tensor, wanted: &[usize], of: &str) -> std::result::Result<(), String> {
    match tensor.shape == wanted {
        true => Ok(()),
        false => Err(format!(
            "{} is {:?}, and the model's {of} asks for {wanted:?}; it is an adapter of another model",
            tensor.name, tensor.shape
        )),
    }
}

fn numbers(p: &Parameter, tensor: &Tensor) -> std::result::Result<Vec<f32>, String> {
    let mut numbers = vec![0.0; p.range.len()];
    read_parameter(p, tensor, &mut numbers).map_err(|e| e.to_string())?;
    match numbers.iter().all(|x| x.is_finite()) {
        true => Ok(numbers),
        false => Err(format!("{} holds values that are NaN or infinite", tensor.name)),
    }
}

/// A matrix of the adapter, in the order of the flat buffer: its rows stand for those of a parameter that is stored so.
fn matrix(tensor: &Tensor, shape: [usize; 2], stored: Stored) -> std::result::Result<Vec<f32>, String> {
    let [rows, columns] = shape;
    let p = Parameter {
        name: tensor.name.to_owned(),
        shape: vec![rows, columns],
        range: 0..rows * columns,
        unit: 0,
        role: Role::Weight,
        stored,
        fresh: Fresh::Constant(0.0),
        rate: 1.0,
    };
    numbers(&p, tensor)
}

fn added(
    module: &str,
    found: &Found,
    p: &Parameter,
    config: &AdapterConfig,
) -> std::result::Result<Option<Added>, String> {
    let of_lora = [found.a, found.b, found.embedding_a, found.embedding_b, found.magnitude];
    if of_lora.iter().all(Option::is_none) {
        return Ok(None);
    }
    let [rows, columns] = p.shape[..] else { return Err(format!("{module} is no matrix in this model")) };
    let rank = config.rank(module);
    let scale = config.scale(module) as f32;
    let stored = match p.stored {
        Stored::ByHead { .. } => p.stored,
        Stored::AsIs | Stored::Transposed => Stored::AsIs,
    };
    let lacks = |what: &str| format!("{module} has no {what} there; write the adapter again");
    let (a, b) = match (found.a, found.b, found.embedding_a, found.embedding_b) {
        (Some(a), Some(b), None, None) => {
            has_shape(&a, &[rank, columns], &p.name)?;
            has_shape(&b, &[rows, rank], &p.name)?;
            (matrix(&a, [rank, columns], Stored::AsIs)?, matrix(&b, [rows, rank], stored)?)
        }
        // Of an embedding both are transposed: `[rank, rows]` and `[columns, rank]`.
        (None, None, Some(a), Some(b)) => {
            has_shape(&a, &[rank, rows], &p.name)?;
            has_shape(&b, &[columns, rank], &p.name)?;
            (matrix(&b, [rank, columns], Stored::Transposed)?, matrix(&a, [rows, rank], Stored::Transposed)?)
        }
        (None, ..) if found.embedding_a.is_none() => return Err(lacks("lora_A")),
        _ => return Err(lacks("lora_B")),
    };
    let magnitude = match (config.use_dora, found.magnitude) {
        (false, None) => None,
        (true, None) => return Err(lacks("lora_magnitude_vector")),
        (_, Some(_)) if found.embedding_a.is_some() => {
            return Err(format!(
                "{module}: DoRA of an embedding is not in this version of fleet; merge the adapter with PEFT"
            ));
        }
        (_, Some(tensor)) => {
            has_shape(&tensor, &[rows], &p.name)?;
            Some(matrix(&tensor, [rows, 1], stored)?)
        }
    };
    Ok(Some(Added { rank, scale, b, a, magnitude }))
}
