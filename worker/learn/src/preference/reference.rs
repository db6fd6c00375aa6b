//! With what a model that learns preferences is compared, where that is not the model beside which its adapter is trained: the losses of all answers
//! as they are before the first step. They come along with every checkpoint, so that nothing is measured twice, and nobody has to keep what they
//! were measured of.

use crate::batch::TokenBatch;
use crate::engine::Learner;
use crate::error::{Error, Result};
use crate::executor::Which;
use crate::objective::{NextToken, Objective};
use fleet_checkpoint::{Dtype, Tensors};
use fleet_collectives::Op;
use fleet_data::{TokenCache, Windows};
use safetensors::tensor::TensorView;
use std::path::Path;

/// Of each pair the losses of the chosen answer and of the rejected one.
#[derive(Clone, Debug, PartialEq)]
pub struct Reference {
    pub train: Vec<[f64; 2]>,
    pub validation: Vec<[f64; 2]>,
}

/// As it lies in a checkpoint.
pub const REFERENCE_FILE: &str = "reference_logps.safetensors";

/// Batches of one rank between two looks at how far all are.
const ROUND: usize = 64;
/// Numbers in one sum of all ranks.
const SUM_MAX: usize = 1 << 16;

/// This rank's part in measuring.
pub struct Share {
    pub rank: usize,
    pub world: usize,
    /// Pairs of one pass.
    pub batch_size: usize,
}

impl Reference {
    /// Of the learner's weights as they are now, or of the model beside which it trains an adapter. `goes_on` hears of how many pairs how many are
    /// measured, and says whether to go on; none where any rank does not. A collective call.
    pub fn measure(
        learner: &mut dyn Learner,
        which: Which,
        cache: &TokenCache,
        share: &Share,
        goes_on: &mut dyn FnMut(u64, u64) -> bool,
    ) -> Result<Option<Reference>> {
        let all = cache.train().len() + cache.validation().len();
        let mut part = |windows: &Windows, before: u64| {
            let mut measured = vec![[0.0; 2]; windows.len() as usize];
            let (world, rank) = (share.world as u64, share.rank as u64);
            let mine = windows.len() * rank / world..windows.len() * (rank + 1) / world;
            let most = windows.len().div_ceil(world).div_ceil((share.batch_size * ROUND) as u64);
            let mut left = mine.step_by(share.batch_size);
            for round in 0..most {
                let starts: Vec<u64> = left.by_ref().take(ROUND).collect();
                let end = windows.len() * (rank + 1) / world;
                let of = |first: u64| first..(first + share.batch_size as u64).min(end);
                let batch = |first: &u64| {
                    let batch = NextToken.batch(windows, &mut of(*first));
                    TokenBatch { noise: None, ..batch }.filled()
                };
                let batches: Vec<TokenBatch> = starts.iter().map(batch).collect();
                for (first, losses) in starts.iter().zip(learner.losses(&batches, which)?) {
                    for (pair, losses) in of(*first).zip(losses.chunks_exact(2)) {
                        measured[pair as usize] = [losses[0], losses[1]];
                    }
                }
                let stops = !goes_on(before + windows.len() * (round + 1) / most, all);
                let mut any = [f64::from(u8::from(stops))];
                learner.gang().all_reduce_f64(&mut any, Op::Max)?;
                if any[0] > 0.0 {
                    return Ok(None);
                }
            }
            for numbers in measured.as_flattened_mut().chunks_mut(SUM_MAX) {
                learner.gang().all_reduce_f64(numbers, Op::Sum)?;
            }
            Ok::<_, Error>(Some(measured))
        };
        let Some(train) = part(cache.train(), 0)? else { return Ok(None) };
        let validation = part(cache.validation(), cache.train().len())?;
        Ok(validation.map(|validation| Reference { train, validation }))
    }

    /// What a checkpoint has of it; nothing where it has none.
    pub fn read(checkpoint: &Path, cache: &TokenCache) -> Result<Option<Reference>> {
        let path = checkpoint.join(REFERENCE_FILE);
        if !path.exists() {
            return Ok(None);
        }
        let tensors = Tensors::open(&path)?;
        let part = |name: &str, pairs: u64| {
            let numbers = |side: &str| {
                let tensor = tensors
                    .get(&format!("{name}.ref_{side}_logps"))
                    .filter(|tensor| tensor.dtype == Dtype::F64 && tensor.shape == [pairs as usize]);
                let tensor = tensor.ok_or_else(|| {
                    Error::Input(format!("{}: not of the {pairs} pairs of the job's {name} data; put the data back as it was, or begin a new run", path.display()))
                })?;
                Ok::<_, Error>(
                    tensor.data()?.as_chunks().0.iter().map(|b| -f64::from_le_bytes(*b)).collect::<Vec<_>>(),
                )
            };
            let pairs = numbers("chosen")?.into_iter().zip(numbers("rejected")?);
            Ok::<_, Error>(pairs.map(|(chosen, rejected)| [chosen, rejected]).collect())
        };
        Ok(Some(Reference {
            train: part("train", cache.train().len())?,
            validation: part("validation", cache.validation().len())?,
        }))
    }

    /// Log-probabilities by TRL's names, `train.ref_chosen_logps` `[pairs]` and so on, in F64.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut tensors = Vec::new();
        for (name, part) in [("train", &self.train), ("validation", &self.validation)] {
            for (at, side) in ["chosen", "rejected"].into_iter().enumerate() {
                let bytes: Vec<u8> = part.iter().flat_map(|pair| (-pair[at]).to_le_bytes()).collect();
                tensors.push((format!("{name}.ref_{side}_logps"), part.len(), bytes));
            }
        }
        let views = tensors.iter().map(|(name, pairs, bytes)| {
            let view = TensorView::new(safetensors::Dtype::F64, vec![*pairs], bytes);
            (name, view.expect("eight bytes for each number"))
        });
        safetensors::serialize(views, None).expect("names, shapes and sizes fit")
    }
}
