//! One adapter of several, each with a weight, as PEFT's `add_weighted_adapter` makes it. It needs no model.

use super::config::{ADAPTER_CONFIG, AdapterConfig};
use super::{ADAPTER_MODEL, Found, tensors_of};
use crate::error::{Error, Result};
use fleet_checkpoint::{
    ADAPTER_BASE_FILE, AdapterBase, CheckpointError, Dtype, Tensor, TensorRef, Tensors, Unfinished,
    new_directory, read_numbers,
};
use fleet_common::model::Object;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Path, PathBuf};

/// What a check may differ by, as a share of the largest number: what rounding to fp32 explains.
const ROUNDING: f64 = 1e-5;

/// How matrices become one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Combination {
    /// One below the other: what is added is exactly the weighted sum. Ranks add up.
    Cat,
    /// Each is the sum of those of all, with the roots of the weights. The rank stays, and is to be the same.
    Linear,
}

/// What was written.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Combined {
    pub output: PathBuf,
    pub modules: usize,
    pub rank: usize,
    /// Between what the new matrices add and what those did that they were made of, as a share of the largest of these; for `Cat` alone.
    pub difference: Option<f64>,
}

struct Given {
    path: PathBuf,
    weight: f64,
    config: AdapterConfig,
    tensors: Tensors,
}

/// Two matrices as a file has them, `a: [rank, inputs]` and `b: [outputs, rank]`, or those beside an embedding, which have the same shapes there.
#[derive(Clone, Debug, PartialEq)]
struct Pair {
    names: [String; 2],
    rank: usize,
    a: Vec<f32>,
    b: Vec<f32>,
}

/// Writes an adapter that does what `adapters`, directories with weights, do together, to the new directory `output`, and reads it again.
pub fn combine(adapters: &[(PathBuf, f64)], how: Combination, output: &Path) -> Result<Combined> {
    let given: Vec<Given> = adapters.iter().map(Given::open).collect::<Result<_>>()?;
    let ranks: Vec<usize> = given.iter().map(|given| given.config.largest_rank()).collect();
    let (Some(first), Some(rank)) = (given.first(), ranks.first()) else {
        return Err(Error::Input("give the adapters that are to be one, as --adapter DIR=WEIGHT".into()));
    };
    let rank = match how {
        Combination::Cat => ranks.iter().sum(),
        Combination::Linear if ranks.iter().any(|other| other != rank) => {
            return Err(Error::Input(format!(
                "adapters that are summed have one rank, and these have {}; take --type cat",
                ranks.iter().map(usize::to_string).collect::<Vec<_>>().join(", ")
            )));
        }
        Combination::Linear => *rank,
    };
    let mut modules: BTreeMap<String, Vec<(Pair, f64)>> = BTreeMap::new();
    let mut kept: BTreeMap<String, Tensor> = BTreeMap::new();
    for given in &given {
        given.read(&mut modules, &mut kept)?;
    }
    let mut pairs = BTreeMap::new();
    for (module, parts) in &modules {
        pairs.insert(
            module.clone(),
            Pair::of(parts, how, rank).map_err(|why| first.refuse(&format!("{module}: {why}")))?,
        );
    }
    write(&config(&given, rank, pairs.keys()), &pairs, &kept, rank, same_base(adapters), output)?;
    let unfinished = Unfinished::new(output);
    let difference = check(&modules, &pairs, how, output)?;
    unfinished.whole();
    Ok(Combined { output: output.to_owned(), modules: pairs.len(), rank, difference })
}

/// The model beside which these were trained, as far as they say so (those of PEFT do not), where it is one.
fn same_base(adapters: &[(PathBuf, f64)]) -> Option<AdapterBase> {
    let mut bases = adapters.iter().filter_map(|(dir, _)| AdapterBase::read(dir));
    let first = bases.next()?;
    bases.all(|base| base.weights_sample_sha256 == first.weights_sample_sha256).then_some(first)
}

/// Refuses adapters that say that they were trained beside different models.
pub fn can_combine(adapters: &[(PathBuf, f64)]) -> Result<()> {
    let bases: Vec<(&PathBuf, AdapterBase)> =
        adapters.iter().filter_map(|(dir, _)| Some((dir, AdapterBase::read(dir)?))).collect();
    let differs =
        |(_, base): &&(&PathBuf, AdapterBase)| base.weights_sample_sha256 != bases[0].1.weights_sample_sha256;
    match bases.iter().find(differs) {
        None => Ok(()),
        Some((dir, base)) => Err(Error::Input(format!(
            "the adapters {} and {} were trained beside different models ({} and {}), and the sum would suit none; combine those of one model, unless these are the same one \
             quantised or in another type (--force)",
            bases[0].0.display(),
            dir.display(),
            bases[0].1.path,
            base.path
        ))),
    }
}

impl Given {
    fn open((path, weight): &(PathBuf, f64)) -> Result<Given> {
        let (path, weight) = (path.clone(), *weight);
        let given = Given { config: AdapterConfig::read(&path)?, tensors: tensors_of(&path)?, path, weight };
        match given.config.use_dora {
            true => {
                Err(given
                    .refuse("it has magnitudes (DoRA), which have no sum; merge it into the model instead"))
            }
            false => Ok(given),
        }
    }

    fn refuse(&self, what: &str) -> Error {
        Error::Input(format!("{}: {what}", self.path.join(ADAPTER_MODEL).display()))
    }

    /// Adds its pairs, each with its weight and scale, and what PEFT has beside those of embeddings.
    fn read<'a>(
        &'a self,
        modules: &mut BTreeMap<String, Vec<(Pair, f64)>>,
        kept: &mut BTreeMap<String, Tensor<'a>>,
    ) -> Result<()> {
        let mut found = BTreeMap::new();
        for name in self.tensors.names() {
            match Found::place(&mut found, name) {
                Some(place) => *place = self.tensors.get(name),
                None => return Err(self.refuse(&format!("{name} is of no kind that can be summed"))),
            }
        }
        for (module, found) in found {
            if let Some(weight) = found.weight {
                let is_base = weight.name.ends_with(".base_layer.weight");
                let other = kept.entry(weight.name.to_owned()).or_insert(weight);
                if !is_base || other.shape != weight.shape || other.data()? != weight.data()? {
                    return Err(self.refuse(&format!(
                        "{} takes the place of the model's own, which has no sum; merge the adapter into the model instead",
                        weight.name
                    )));
                }
            }
            let pair = match (found.a.zip(found.b), found.embedding_a.zip(found.embedding_b), found.bias) {
                (Some(pair), None, None) | (None, Some(pair), None) => pair,
                (None, None, None) => continue,
                (_, _, Some(_)) => {
                    return Err(self.refuse(&format!(
                        "{module} has a bias, which has no sum; merge the adapter into the model instead"
                    )));
                }
                _ => return Err(self.refuse(&format!("{module} has more than two matrices, or one alone"))),
            };
            let pair = Pair::read(pair, self.config.rank(module)).map_err(|why| self.refuse(&why))?;
            let weight = self.weight * self.config.scale(module);
            modules.entry(module.to_owned()).or_default().push((pair, weight));
        }
        Ok(())
    }
}

impl Pair {
    fn read((a, b): (Tensor, Tensor), rank: usize) -> std::result::Result<Pair, String> {
        let numbers = |tensor: &Tensor| {
            let mut numbers = vec![0.0; tensor.shape.iter().product()];
            read_numbers(tensor, 0, &mut numbers).map_err(|e| e.to_string())?;
            match numbers.iter().all(|x| x.is_finite()) {
                true => Ok(numbers),
                false => Err(format!("{} holds values that are NaN or infinite", tensor.name)),
            }
        };
        match (a.shape, b.shape) {
            ([rank_of_a, _], [_, rank_of_b]) if *rank_of_a == rank && *rank_of_b == rank => {}
            _ => {
                return Err(format!(
                    "{} and {} are {:?} and {:?}, and the rank is {rank}",
                    a.name, b.name, a.shape, b.shape
                ));
            }
        }
        let names = [a.name, b.name].map(str::to_owned);
        Ok(Pair { names, rank, a: numbers(&a)?, b: numbers(&b)? })
    }

    /// Those of `parts`, each with its factor, with zeros up to `rank`.
    fn of(parts: &[(Pair, f64)], how: Combination, rank: usize) -> std::result::Result<Pair, String> {
        let (first, _) = &parts[0];
        let (inputs, outputs) = (first.inputs(), first.outputs());
        let mut made = Pair {
            names: first.names.clone(),
            rank,
            a: vec![0.0; rank * inputs],
            b: vec![0.0; outputs * rank],
        };
        let mut start = 0;
        for (part, factor) in parts {
            if (part.inputs(), part.outputs()) != (inputs, outputs) {
                return Err("the adapters are of different models".into());
            }
            let [of_a, of_b] = match how {
                Combination::Cat => [*factor, 1.0],
                Combination::Linear if *factor < 0.0 => {
                    return Err("a root of a negative weight is none; take --type cat".into());
                }
                Combination::Linear => [factor.sqrt(); 2],
            };
            let to = made.a[start * inputs..].iter_mut();
            to.zip(&part.a).for_each(|(to, x)| *to += of_a as f32 * x);
            for (to, from) in made.b.chunks_exact_mut(rank).zip(part.b.chunks_exact(part.rank)) {
                to[start..].iter_mut().zip(from).for_each(|(to, x)| *to += of_b as f32 * x);
            }
            if how == Combination::Cat {
                start += part.rank;
            }
        }
        Ok(made)
    }

    fn inputs(&self) -> usize {
        self.a.len() / self.rank
    }

    fn outputs(&self) -> usize {
        self.b.len() / self.rank
    }

    /// `b a x`.
    fn times(&self, x: &[f64]) -> Vec<f64> {
        let dot = |row: &[f32], x: &[f64]| row.iter().zip(x).map(|(a, x)| f64::from(*a) * x).sum::<f64>();
        let low: Vec<f64> = self.a.chunks_exact(self.inputs()).map(|row| dot(row, x)).collect();
        self.b.chunks_exact(self.rank).map(|row| dot(row, &low)).collect()
    }
}

/// The first one's, for the new matrices.
fn config<'a>(given: &[Given], rank: usize, modules: impl Iterator<Item = &'a String>) -> Object {
    let mut config = given[0].config.json.clone();
    let targets = |given: &Given| given.config.json.get("target_modules").and_then(Value::as_array).cloned();
    let layers = |given: &Given| given.config.json.get("layers_to_transform").cloned().unwrap_or_default();
    let lists: Option<Vec<Vec<Value>>> = given.iter().map(targets).collect();
    let alike = given.iter().all(|other| layers(other) == layers(&given[0]));
    match lists.filter(|_| alike) {
        Some(lists) => {
            let names: BTreeSet<String> =
                lists.concat().iter().filter_map(Value::as_str).map(str::to_owned).collect();
            config.insert("target_modules".into(), json!(names));
        }
        None => {
            config.insert("target_modules".into(), json!(modules.collect::<Vec<_>>()));
            config.insert("layers_to_transform".into(), Value::Null);
        }
    }
    for (key, value) in [
        ("r", json!(rank)),
        ("lora_alpha", json!(rank)),
        ("rank_pattern", json!({})),
        ("alpha_pattern", json!({})),
        ("use_rslora", json!(false)),
        ("exclude_modules", Value::Null),
    ] {
        config.insert(key.into(), value);
    }
    config
}

fn write(
    config: &Object,
    pairs: &BTreeMap<String, Pair>,
    kept: &BTreeMap<String, Tensor>,
    rank: usize,
    base: Option<AdapterBase>,
    output: &Path,
) -> Result<()> {
    let bytes = |numbers: &[f32]| numbers.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
    let mut tensors: BTreeMap<&str, (Dtype, Vec<usize>, Vec<u8>)> = BTreeMap::new();
    for pair in pairs.values() {
        let [a, b] = &pair.names;
        tensors.insert(a, (Dtype::F32, vec![rank, pair.inputs()], bytes(&pair.a)));
        tensors.insert(b, (Dtype::F32, vec![pair.outputs(), rank], bytes(&pair.b)));
    }
    for (name, tensor) in kept {
        tensors.insert(name, (tensor.dtype, tensor.shape.to_vec(), tensor.data()?));
    }
    let refs: Vec<TensorRef> = tensors
        .iter()
        .map(|(name, (dtype, shape, data))| TensorRef { name, dtype: *dtype, shape, first: 0, data })
        .collect();
    let text = serde_json::to_vec_pretty(config).expect("an object of JSON has a text");
    Ok(new_directory::<CheckpointError>(output, |part| {
        part.write_safetensors(ADAPTER_MODEL, &refs)?;
        part.write_bytes(ADAPTER_CONFIG, &text)?;
        base.map_or(Ok(()), |base| part.write_bytes(ADAPTER_BASE_FILE, &base.to_bytes()))
    })?)
}

/// What the file adds to a probe of each module, beside what it is to add.
fn check(
    modules: &BTreeMap<String, Vec<(Pair, f64)>>,
    pairs: &BTreeMap<String, Pair>,
    how: Combination,
    output: &Path,
) -> Result<Option<f64>> {
    let mut read = BTreeMap::new();
    let made = Given::open(&(output.to_owned(), 1.0))?;
    made.read(&mut read, &mut BTreeMap::new())?;
    let mut most = 0.0f64;
    for (module, pair) in pairs {
        let [(of_file, factor)] = &read[module][..] else { unreachable!("a file has a module once") };
        if of_file != pair || *factor != 1.0 {
            return Err(made.refuse(&format!("{module} is not what was written; try again")));
        }
        if how == Combination::Linear {
            continue;
        }
        let x: Vec<f64> =
            (0..pair.inputs()).map(|at| ((at * 7919 + 13) % 1000) as f64 / 500.0 - 1.0).collect();
        // What cancels leaves the rounding of what it is made of.
        let (mut wanted, mut sizes) = (vec![0.0; pair.outputs()], vec![f64::MIN_POSITIVE; pair.outputs()]);
        for (part, factor) in &modules[module] {
            for ((sum, size), y) in wanted.iter_mut().zip(&mut sizes).zip(part.times(&x)) {
                *sum += factor * y;
                *size += (factor * y).abs();
            }
        }
        let largest = sizes.iter().copied().fold(0.0, f64::max);
        let apart =
            pair.times(&x).iter().zip(&wanted).map(|(y, wanted)| (y - wanted).abs()).fold(0.0, f64::max);
        most = most.max(apart / largest);
    }
    match most <= ROUNDING {
        true => Ok((how == Combination::Cat).then_some(most)),
        false => Err(made.refuse(&format!("it adds something else than its parts, {most:.1e} of the largest apart; their numbers are too far from each other for fp32"))),
    }
}

impl fmt::Display for Combined {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{}: {} modules of rank {}", self.output.display(), self.modules, self.rank)?;
        match self.difference {
            Some(difference) => {
                write!(f, "; it adds what its parts add within {difference:.1e} of the largest")
            }
            None => Ok(()),
        }
    }
}
