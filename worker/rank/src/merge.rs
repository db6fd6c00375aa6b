//! `fleet-rank merge` and `unmerge`: one model of a model and its adapters, and back.

use crate::host_model::{HostModel, read_weights};
use fleet_checkpoint::{
    CONFIG_FILE, Dtype, ModelDir, TOKENIZER_FILE, Tensors, Unfinished, of_another_base, rewrite,
};
use fleet_data::chat::{CHAT_TEMPLATE, end_token};
use fleet_data::model_dir::{GENERATION_CONFIG, GivenTokenizer, read_object};
use fleet_learn::adapter::Adapter;
use fleet_learn::model::ending_with;
use fleet_learn::{Error, Result};
use std::collections::BTreeSet;
use std::fmt;
use std::path::{Path, PathBuf};

/// Tokens on which both are compared.
const PROBE: usize = 32;

/// What was written.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Merged {
    pub output: PathBuf,
    /// Parameters that are others than in the model.
    pub changed: usize,
    /// Between the logits of the model with its adapters, in fp32, and those of what is one, as a share of the largest.
    pub difference: f64,
    #[serde(skip)]
    is_undone: bool,
}

/// Writes `model` with `adapters` in its weights, in the types that these have, to the new directory `output`. What is in few bits is widened: PEFT packs the sum again, which
/// loses most of what the adapter added. Reads it again and computes with it: where it computes
/// something else than the model with its adapters does, more than its numbers' type explains, nothing is left.
pub fn merge(model: &Path, adapters: &[PathBuf], output: &Path) -> Result<Merged> {
    is_new(output)?;
    let (given, flat) = read_weights(model, adapters)?;
    let changed = changed(&given, adapters)?;
    rewrite(&given, &changed, &flat, output)?;
    checked(output, changed.len(), || {
        take_template(adapters, output)?;
        Ok([Model::Given(Box::new(given), flat), Model::Read(output, &[])])
    })
}

/// Writes what `model` was before `adapters` became part of its weights to the new directory `output`, and checks it as `merge` does: with the adapters it has to compute
/// what `model` computes.
pub fn unmerge(model: &Path, adapters: &[PathBuf], output: &Path) -> Result<Merged> {
    is_new(output)?;
    let (given, mut flat) = read_weights(model, &[])?;
    if given.is_quantised() {
        return Err(Error::Input(format!(
            "{}: its weights are quantised, and fleet adapter merge makes no such model of one; take the base model",
            model.display()
        )));
    }
    for adapter in adapters {
        Adapter::open(adapter, &given)?.take_out(&given.layout, &mut flat)?;
    }
    let changed = changed(&given, adapters)?;
    rewrite(&given, &changed, &flat, output)?;
    drop((given, flat));
    let models = || Ok([Model::Read(model, &[]), Model::Read(output, adapters)]);
    Ok(Merged { is_undone: true, ..checked(output, changed.len(), models)? })
}

/// Refuses an adapter that says that it was trained beside another model: merged into this one it would be lost without a word.
pub fn belong_together(model: &Path, adapters: &[PathBuf]) -> Result<()> {
    for adapter in adapters {
        if let Some(line) = of_another_base(adapter, model)? {
            return Err(Error::Input(format!("{line} (--force)")));
        }
    }
    Ok(())
}

pub(crate) fn is_new(output: &Path) -> Result<()> {
    match output.symlink_metadata().is_ok() {
        true => {
            Err(Error::Input(format!("--output {} is there already; name a new directory", output.display())))
        }
        false => Ok(()),
    }
}

/// Of the layout, the numbers of what adapters change.
fn changed(model: &ModelDir, adapters: &[PathBuf]) -> Result<Vec<usize>> {
    let mut changed = BTreeSet::new();
    for adapter in adapters {
        changed.extend(Adapter::open(adapter, model)?.changed());
    }
    Ok(changed.into_iter().collect())
}

/// One of the two that are compared.
enum Model<'a> {
    Given(Box<ModelDir>, Vec<f32>),
    Read(&'a Path, &'a [PathBuf]),
}

impl Model<'_> {
    fn logits(self) -> Result<Vec<f32>> {
        let (model, flat) = match self {
            Model::Given(model, flat) => (*model, flat),
            Model::Read(dir, adapters) => read_weights(dir, adapters)?,
        };
        let positions = PROBE.min(model.decoder.max_positions);
        let vocab = model.decoder.vocab_size as i64;
        let ids: Vec<i64> = (0..positions as i64).map(|at| (at * 7919 + 13) % vocab).collect();
        let threads = std::thread::available_parallelism().map_or(1, |n| n.get() as u32);
        HostModel::new(model, flat, threads, positions)?.logits(&ids, ids.len())
    }
}

/// Of what was written to `output`; where both models differ by more than the type of its numbers explains, it is removed.
fn checked<'a>(
    output: &Path,
    changed: usize,
    models: impl FnOnce() -> Result<[Model<'a>; 2]>,
) -> Result<Merged> {
    let unfinished = Unfinished::new(output);
    let compared = (|| {
        let [before, after] = models()?;
        let (difference, bound) =
            (difference(&before.logits()?, &after.logits()?), bound(&Tensors::of_model(output)?));
        match difference <= bound {
            true => Ok(difference),
            false => Err(Error::Input(format!(
                "what was made computes something else than what it was made of: logits differ by {difference:.1e} of the largest, and {bound:.0e} is what its numbers' type \
                 explains; use model and adapters apart, with --adapter, or a model in fp32"
            ))),
        }
    })();
    let difference = compared?;
    unfinished.whole();
    Ok(Merged { output: output.to_owned(), changed, difference, is_undone: false })
}

/// The chat template of the last adapter that has one: the model was asked with it. Transformers finds in the generation's settings where its answers end.
fn take_template(adapters: &[PathBuf], output: &Path) -> Result<()> {
    let mut templates = adapters.iter().rev().map(|adapter| adapter.join(CHAT_TEMPLATE));
    let Some(template) = templates.find(|template| template.is_file()) else { return Ok(()) };
    std::fs::copy(&template, output.join(CHAT_TEMPLATE)).map_err(|e| {
        Error::Environment(format!("cannot copy {} to {}: {e}", template.display(), output.display()))
    })?;
    let settings = |name: &str| read_object(&output.join(name)).map_err(|e| Error::Input(e.to_string()));
    let config = settings(CONFIG_FILE)?.unwrap_or_default();
    let generation = settings(GENERATION_CONFIG)?.unwrap_or_default();
    let (source, tokenizer) = (std::fs::read_to_string(&template), output.join(TOKENIZER_FILE));
    // Without a tokenizer of its own there is nothing to ask.
    let (Ok(source), Ok(given)) = (source, GivenTokenizer::open(&tokenizer, u32::MAX)) else { return Ok(()) };
    let Some(end) = end_token(&source, given.special.named.clone(), &given.tokenizer) else { return Ok(()) };
    let generation = ending_with(generation, &config, &[Some(end)]);
    let path = output.join(GENERATION_CONFIG);
    let bytes = serde_json::to_vec_pretty(&generation).expect("an object that was read can be written");
    std::fs::write(&path, bytes)
        .map_err(|e| Error::Environment(format!("cannot write {}: {e}", path.display())))
}

/// The largest, as a share of the largest number; one that is no number is beyond all bounds.
fn difference(a: &[f32], b: &[f32]) -> f64 {
    let largest = a.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
    let most = a
        .iter()
        .zip(b)
        .fold(0.0f32, |most, (a, b)| if (a - b).is_nan() { f32::INFINITY } else { most.max((a - b).abs()) });
    f64::from(most) / f64::from(largest.max(f32::MIN_POSITIVE))
}

/// By how much logits may differ because weights are rounded to what the files have.
fn bound(tensors: &Tensors) -> f64 {
    let of = |name: &str| {
        tensors.get(name).map_or(0.0, |tensor| match tensor.dtype {
            Dtype::BF16 => 5e-2,
            Dtype::F16 => 1e-2,
            _ => 1e-4,
        })
    };
    tensors.names().map(of).fold(0.0, f64::max)
}

impl fmt::Display for Merged {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Merged { output, changed, difference, is_undone } = self;
        let same = match is_undone {
            false => "the logits of what is one are those of the model with its adapters",
            true => {
                "with the adapters beside it its logits are those of the model that they were taken out of"
            }
        };
        write!(
            f,
            "{}: {changed} parameters changed; {same} within {difference:.1e} of the largest",
            output.display()
        )
    }
}
