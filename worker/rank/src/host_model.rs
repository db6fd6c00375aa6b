//! A model directory in this machine's memory, computed on its CPU.

use fleet_checkpoint::{CheckpointError, MANIFEST_FILE, ModelDir, Reading};
use fleet_cpu::{Cache, CpuExecutor, Network, workers};
use fleet_kernels::{self as kernels, all_finite};
use fleet_learn::adapter::Adapter;
use fleet_learn::model::Model;
use fleet_learn::zeros::{Part, zeros};
use fleet_learn::{Error, HostWeights, Result};
use half::bf16;
use std::cell::OnceCell;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

pub struct HostModel {
    pub model: Model,
    given: ModelDir,
    executor: CpuExecutor<f32>,
    weights: Vec<f32>,
    /// The same in bf16, where that holds all of them exactly: a model that was written so. Made for the first token that is decoded.
    compact: OnceCell<Option<Vec<bf16>>>,
}

impl HostModel {
    /// For sequences of as many tokens as the model was made for.
    pub fn open(dir: &Path, threads: u32) -> Result<HostModel> {
        let (given, weights) = read_weights(dir, &[])?;
        let positions = given.decoder.max_positions;
        HostModel::new(given, weights, threads, positions)
    }

    /// For sequences of at most `positions` tokens, and texts that go on from such a one token by token.
    pub fn new(given: ModelDir, weights: Vec<f32>, threads: u32, positions: usize) -> Result<HostModel> {
        let model = Model::of_dir(&given);
        let network = Network::new(given.decoder.clone(), given.wiring(), positions);
        let executor = CpuExecutor::new(network, workers(threads)?);
        Ok(HostModel { model, given, executor, compact: OnceCell::new(), weights })
    }

    pub fn dir(&self) -> &ModelDir {
        &self.given
    }

    /// Puts adapters in the place of those that change the weights now. What they change is read again.
    pub fn change(&mut self, from: &[Adapter], to: &[Adapter]) -> Result<()> {
        let changed: BTreeSet<usize> = from.iter().flat_map(Adapter::changed).collect();
        for number in changed {
            let p = &self.given.layout.parameters[number];
            let mut reading = Reading::default();
            self.given.read_part(p, 0, &mut self.weights[p.range.clone()], &mut reading);
            reading.run(1)?;
        }
        to.iter().try_for_each(|adapter| adapter.merge(&self.given.layout, &mut self.weights))?;
        self.compact = OnceCell::new();
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
        self.executor.logits(HostWeights::flat(&self.weights, &[]), ids, seq)
    }

    /// Runs a prompt of any length; `[v]` logits of the token after it.
    pub fn prefill(&mut self, ids: &[i64], cache: &mut Cache<f32>) -> Result<Vec<f32>> {
        self.executor.made_for(ids.len());
        self.executor.prefill(HostWeights::flat(&self.weights, &[]), ids, cache)
    }

    /// `[v]` logits of the token after `id`.
    pub fn decode(&mut self, id: i64, cache: &mut Cache<f32>) -> Result<Vec<f32>> {
        let compact = self.compact.get_or_init(|| compact(&self.weights));
        let weights = HostWeights::flat(&self.weights, &[]).with_compact(compact.as_deref());
        self.executor.decode(weights, id, cache)
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

/// The flat weights of a directory, which is checked by its manifest where it has one, with these adapters, which make part of them one after
/// the other. All are numbers. Optimizer state may lie on other disks.
pub fn read_weights(dir: &Path, adapters: &[PathBuf]) -> Result<(ModelDir, Vec<f32>)> {
    let mut elsewhere = None;
    if dir.join(MANIFEST_FILE).exists() {
        for wrong in fleet_checkpoint::inspect(dir)?.1 {
            match wrong {
                CheckpointError::Partial { .. } => elsewhere = Some(wrong),
                wrong => return Err(wrong.into()),
            }
        }
    }
    let model = ModelDir::open(dir).map_err(|error| elsewhere.unwrap_or(error))?;
    let mut flat = zeros(model.layout.len, Part::Weights)?;
    model.read(&mut flat)?;
    if let Some(p) = model.layout.parameters.iter().find(|p| !all_finite(&flat[p.range.clone()])) {
        return Err(Error::Input(format!(
            "{}: {} holds values that are NaN or infinite; restore the weights, or use an older checkpoint",
            dir.display(),
            p.name
        )));
    }
    for adapter in adapters {
        open_adapter(adapter, &model)?.merge(&model.layout, &mut flat)?;
    }
    Ok((model, flat))
}

/// An adapter for this model, which is checked by its manifest where it has one.
pub fn open_adapter(dir: &Path, model: &ModelDir) -> Result<Adapter> {
    if dir.join(MANIFEST_FILE).exists() {
        let mut wrong = fleet_checkpoint::inspect(dir)?.1.into_iter();
        let wrong = wrong.find(|wrong| !matches!(wrong, CheckpointError::Partial { .. }));
        wrong.map_or(Ok(()), Err)?;
    }
    Adapter::open(dir, model)
}
