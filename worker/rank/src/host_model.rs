//! A model directory in this machine's memory, computed on its CPU.

use fleet_checkpoint::{CheckpointError, MANIFEST_FILE, ModelDir, Reading};
use fleet_common::job::Quantization;
use fleet_cpu::{Cache, CpuExecutor, Network, workers};
use fleet_kernels::{self as kernels, all_finite};
use fleet_learn::adapter::{Adapter, AdapterConfig, AdapterFile, FewBits, Frozen, Kept, Trained, read_wide};
use fleet_learn::model::Model;
use fleet_learn::zeros::{Part, zeros};
use fleet_learn::{Error, HostWeights, Result};
use half::bf16;
use std::cell::OnceCell;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Numbers of a matrix in few bits that are widened at a time for a prompt.
const WIDENED: usize = 1 << 20;

pub struct HostModel {
    pub model: Model,
    given: ModelDir,
    executor: CpuExecutor<f32>,
    numbers: Numbers,
}

/// How its weights are kept.
enum Numbers {
    /// In fp32; adapters become part of them.
    Wide {
        weights: Vec<f32>,
        /// The same in bf16, where that holds all of them exactly: a model that was written so. Made for the first token that is decoded.
        compact: OnceCell<Option<Vec<bf16>>>,
    },
    /// Matrices in few bits, which nothing changes: an adapter computes beside them.
    Packed { frozen: Box<Frozen<f32>>, beside: Option<Arc<Beside>> },
}

/// Adapters that were opened for a model, as it can take them.
pub enum Changes {
    Merged(Vec<Adapter>),
    Beside(Option<Arc<Beside>>),
}

/// An adapter that computes beside a model.
pub struct Beside {
    trained: Trained,
    numbers: Vec<f32>,
}

impl Beside {
    fn open(dir: &Path, model: &Model, given: &ModelDir) -> Result<Beside> {
        let trained = Trained::of_file(dir, model, given)?;
        let file = AdapterFile::open(dir, &trained.layout)?;
        let mut numbers = zeros(trained.layout.len, Part::Weights)?;
        for p in &trained.layout.parameters {
            let mut reading = Reading::default();
            file.read_part(p, 0, &mut numbers[p.range.clone()], &mut reading);
            reading.run(1)?;
        }
        match all_finite(&numbers) {
            true => Ok(Beside { trained, numbers }),
            false => Err(Error::Input(format!(
                "{}: it holds values that are NaN or infinite; use an older checkpoint",
                dir.display()
            ))),
        }
    }
}

impl Numbers {
    fn weights(&self) -> HostWeights<'_, f32> {
        match self {
            Numbers::Wide { weights, .. } => HostWeights::flat(weights, &[]),
            Numbers::Packed { frozen, beside: None } => frozen.weights(),
            Numbers::Packed { frozen, beside: Some(beside) } => {
                HostWeights::flat(&beside.numbers, &[]).beside(frozen.weights(), &beside.trained)
            }
        }
    }
}

impl HostModel {
    /// For sequences of as many tokens as the model was made for, in fp32.
    pub fn open(dir: &Path, threads: u32) -> Result<HostModel> {
        let (given, weights) = read_weights(dir, &[])?;
        let positions = given.decoder.max_positions;
        HostModel::new(given, weights, threads, positions)
    }

    /// For sequences of at most `positions` tokens, and texts that go on from such a one token by token.
    pub fn new(given: ModelDir, weights: Vec<f32>, threads: u32, positions: usize) -> Result<HostModel> {
        HostModel::of(given, Numbers::Wide { weights, compact: OnceCell::new() }, threads, positions)
    }

    /// The same, of matrices that stay in few bits where the files have them so, or where `quantization` says so.
    pub fn packed(
        dir: &Path,
        quantization: Option<Quantization>,
        threads: u32,
        positions: usize,
    ) -> Result<HostModel> {
        let given = open_model(dir)?;
        if given.is_quantised() && quantization.is_some() {
            return Err(Error::Input(format!(
                "{}: its weights are quantised already, and are taken as they are; leave --quantization out",
                dir.display()
            )));
        }
        let few = FewBits::of(&given, quantization)?;
        if few.is_empty() {
            let weights = flat_weights(&given, dir)?;
            return HostModel::new(given, weights, threads, positions);
        }
        let mut alone = fleet_collectives::Solo::new(0);
        let frozen = Frozen::read(&given, Kept::Fp32, &few, &mut alone, threads as usize)?;
        let numbers = Numbers::Packed { frozen: Box::new(frozen), beside: None };
        HostModel::of(given, numbers, threads, positions)
    }

    fn of(given: ModelDir, numbers: Numbers, threads: u32, positions: usize) -> Result<HostModel> {
        let model = Model::of_dir(&given);
        let network = Network::new(given.decoder.clone(), given.wiring(), positions);
        let executor = CpuExecutor::new(network, workers(threads)?).widening(WIDENED);
        Ok(HostModel { model, given, executor, numbers })
    }

    /// Adapters that change the model, one after the other.
    pub fn adapters(&self, dirs: &[PathBuf]) -> Result<Changes> {
        if matches!(self.numbers, Numbers::Wide { .. }) {
            let opened = dirs.iter().map(|dir| open_adapter(dir, &self.given));
            return Ok(Changes::Merged(opened.collect::<Result<_>>()?));
        }
        Ok(Changes::Beside(match dirs {
            [] => None,
            [dir] => {
                check_adapter(dir)?;
                Some(Arc::new(Beside::open(dir, &self.model, &self.given)?))
            }
            [_, second, ..] => {
                let is_dora = |dir: &PathBuf| AdapterConfig::read(dir).is_ok_and(|config| config.use_dora);
                let cure = match dirs.iter().any(is_dora) {
                    true => {
                        "one of them has magnitudes (DoRA), which have no sum: make one model of all with fleet adapter merge"
                    }
                    false => "make one of them with fleet adapter combine",
                };
                return Err(Error::Input(format!(
                    "{}: one adapter computes beside weights in few bits, and this is another one; {cure}",
                    second.display()
                )));
            }
        }))
    }

    /// Puts adapters in the place of those that change the model now. What they change of weights in fp32 is read again.
    pub fn change(&mut self, from: &Changes, to: &Changes) -> Result<()> {
        match (&mut self.numbers, to) {
            (Numbers::Wide { weights, compact }, Changes::Merged(to)) => {
                let from: &[Adapter] = if let Changes::Merged(from) = from { from } else { &[] };
                let changed: BTreeSet<usize> = from.iter().flat_map(Adapter::changed).collect();
                for p in changed.into_iter().map(|number| &self.given.layout.parameters[number]) {
                    read_wide(&self.given, p, &mut weights[p.range.clone()])?;
                }
                to.iter().try_for_each(|adapter| adapter.merge(&self.given.layout, weights))?;
                *compact = OnceCell::new();
            }
            (Numbers::Packed { beside, .. }, Changes::Beside(to)) => {
                beside.clone_from(to);
                self.executor.forget();
            }
            _ => unreachable!("adapters were opened for this model"),
        }
        Ok(())
    }

    pub fn cache(&self) -> Cache<f32> {
        Cache::new(self.executor.network())
    }

    /// From now on for sequences of at most `positions` tokens.
    pub fn made_for(&mut self, positions: usize) {
        self.executor.made_for(positions);
    }

    /// `[t, v]` logits of whole sequences of `seq` tokens.
    pub fn logits(&mut self, ids: &[i64], seq: usize) -> Result<Vec<f32>> {
        self.executor.logits(self.numbers.weights(), ids, seq)
    }

    /// Runs a prompt of any length; `[v]` logits of the token after it.
    pub fn prefill(&mut self, ids: &[i64], cache: &mut Cache<f32>) -> Result<Vec<f32>> {
        self.executor.made_for(ids.len());
        self.executor.prefill(self.numbers.weights(), ids, cache)
    }

    /// `[n, v]` logits of the tokens after `ids`, one of each text: the same bits as each alone would have.
    pub fn decode(&mut self, ids: &[i64], caches: &mut [&mut Cache<f32>]) -> Result<Vec<f32>> {
        let weights = self.numbers.weights();
        let compact = match &self.numbers {
            Numbers::Wide { weights, compact: made } => made.get_or_init(|| compact(weights)).as_deref(),
            Numbers::Packed { .. } => None,
        };
        self.executor.decode(weights.with_compact(compact), ids, caches)
    }
}

/// `None` where a number would be rounded, or where there is no memory for it.
fn compact(weights: &[f32]) -> Option<Vec<bf16>> {
    if weights.iter().any(|x| x.to_bits() as u16 != 0) {
        return None;
    }
    let mut compact = zeros(weights.len(), Part::Weights).ok()?;
    kernels::convert(weights, &mut compact);
    Some(compact)
}

/// The flat weights of a directory, in fp32 also where the files have few bits, with these adapters, which make part of them one after the other.
/// All are numbers.
pub fn read_weights(dir: &Path, adapters: &[PathBuf]) -> Result<(ModelDir, Vec<f32>)> {
    let model = open_model(dir)?;
    let mut flat = flat_weights(&model, dir)?;
    for adapter in adapters {
        open_adapter(adapter, &model)?.merge(&model.layout, &mut flat)?;
    }
    Ok((model, flat))
}

/// The model in a directory, which is checked by its manifest where it has one. Optimizer state may lie on other disks.
pub fn open_model(dir: &Path) -> Result<ModelDir> {
    let mut elsewhere = None;
    if dir.join(MANIFEST_FILE).exists() {
        for wrong in fleet_checkpoint::inspect(dir)?.1 {
            match wrong {
                CheckpointError::Partial { .. } => elsewhere = Some(wrong),
                wrong => return Err(wrong.into()),
            }
        }
    }
    Ok(ModelDir::open(dir).map_err(|error| elsewhere.unwrap_or(error))?)
}

fn flat_weights(model: &ModelDir, dir: &Path) -> Result<Vec<f32>> {
    let mut flat = zeros(model.layout.len, Part::Weights)?;
    for p in &model.layout.parameters {
        let numbers = &mut flat[p.range.clone()];
        read_wide(model, p, numbers)?;
        if !all_finite(numbers) {
            return Err(Error::Input(format!(
                "{}: {} holds values that are NaN or infinite; restore the weights, or use an older checkpoint",
                dir.display(),
                p.name
            )));
        }
    }
    Ok(flat)
}

/// An adapter for this model, which is checked by its manifest where it has one.
pub fn open_adapter(dir: &Path, model: &ModelDir) -> Result<Adapter> {
    check_adapter(dir)?;
    Adapter::open(dir, model)
}

fn check_adapter(dir: &Path) -> Result<()> {
    if dir.join(MANIFEST_FILE).exists() {
        let mut wrong = fleet_checkpoint::inspect(dir)?.1.into_iter();
        let wrong = wrong.find(|wrong| !matches!(wrong, CheckpointError::Partial { .. }));
        wrong.map_or(Ok(()), Err)?;
    }
    Ok(())
}
