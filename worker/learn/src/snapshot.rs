//! What one rank writes of a checkpoint: a copy, so that training goes on while it is written.
//!
//! Weights are shared out as whole tensors among the ranks on rank 0's disk, so that others read the directory as a model; of the optimizer's
//! state each rank has just what it keeps, on whichever disk.

use crate::error::{Error, Result};
use crate::machine;
use crate::shim::buffers::{Number, as_bytes};
use crate::shim::pages;
use crate::strategy::Slot;
use crate::zeros::{Part, zeros};
use fleet_checkpoint::{
    CheckpointError, Dtype, PartWriter, TensorRef, model_file, optimizer_file, stored, stored_shape, writers,
};
use fleet_common::model::{Layout, Parameter};
use fleet_kernels as kernels;
use half::bf16;
use std::ops::Range;

/// By PyTorch's names.
pub(crate) const MOMENTS: [(Slot, &str); 2] = [(Slot::Moment1, "exp_avg"), (Slot::Moment2, "exp_avg_sq")];

pub(crate) fn moment_name(parameter: &str, suffix: &str) -> String {
    format!("{parameter}.{suffix}")
}

/// Why there is nothing to write.
pub(crate) fn not_copied(error: &Error) -> CheckpointError {
    CheckpointError::Device(error.to_string())
}

/// Its memory is used again from one checkpoint to the next.
pub struct Snapshot {
    /// What this rank writes of the weights, and into which file.
    weights: Vec<Parameter>,
    model_file: String,
    /// What it keeps of the optimizer's state.
    kept: Vec<Kept>,
    optimizer_file: String,
    /// The weights, then both moments, each in their order.
    numbers: Numbers,
}

/// As files have them.
enum Numbers {
    F32(Vec<f32>),
    Bf16(Vec<bf16>),
}

/// A rank among those that write.
#[derive(Clone, Copy, Debug)]
pub struct Share {
    pub rank: usize,
    /// Ranks that write weights, the first ones: those on rank 0's disk, so that there the directory is a whole model.
    pub models: usize,
    /// Ranks that write optimizer state, the first ones.
    pub optimizers: usize,
    /// Ranks that take memory for a copy on its host.
    pub here: usize,
    /// The one file that all weights go to.
    pub file: Option<&'static str>,
}

/// Numbers of a parameter that this rank keeps.
struct Kept {
    name: String,
    shape: Vec<usize>,
    /// The first of them, counted in the parameter.
    first: usize,
    /// In the flat buffer.
    range: Range<usize>,
}

/// Copies ranges of the flat buffer, one after the other.
pub type CopyOut<'a> = dyn FnMut(Slot, &[Range<usize>], &mut [f32]) -> Result<()> + 'a;

impl Snapshot {
    /// For a rank which keeps the ranges `kept` of the flat buffer. `dtype` is F32 or BF16.
    pub fn new((layout, dtype): (&Layout, Dtype), kept: &[Range<usize>], share: Share) -> Result<Snapshot> {
        let Share { rank, optimizers, here, file, .. } = share;
        let models = if file.is_some() { 1 } else { share.models };
        let sizes: Vec<usize> = layout.parameters.iter().map(|p| p.range.len()).collect();
        let weights: Vec<Parameter> = layout
            .parameters
            .iter()
            .zip(writers(&sizes, models))
            .filter(|(_, writer)| *writer == rank)
            .map(|(p, _)| p.clone())
            .collect();
        let kept: Vec<Kept> = layout
            .parameters
            .iter()
            .flat_map(|p| kept.iter().filter_map(|range| Kept::of(p, range)))
            .collect();
        let count = |ranges: &mut dyn Iterator<Item = usize>| ranges.sum::<usize>();
        let len = count(&mut weights.iter().map(|p| p.range.len()))
            + MOMENTS.len() * count(&mut kept.iter().map(|kept| kept.range.len()));
        // Where the system promises more than there is, it ends who takes it.
        let bytes = len * if dtype == Dtype::BF16 { size_of::<bf16>() } else { size_of::<f32>() };
        if bytes.saturating_mul(here) > machine::available_bytes() {
            return Err(Part::Snapshot.short(bytes));
        }
        Ok(Snapshot {
            weights,
            model_file: file.map_or_else(|| model_file(rank, models.min(sizes.len())), str::to_owned),
            kept,
            optimizer_file: optimizer_file(rank, optimizers),
            numbers: match dtype {
                Dtype::BF16 => Numbers::Bf16(zeros(len, Part::Snapshot)?),
                _ => Numbers::F32(zeros(len, Part::Snapshot)?),
            },
        })
    }

    /// Takes its memory before the first copy, which else does so page by page: that takes five times as long as the copy.
    pub fn take_memory(&mut self) {
        match &mut self.numbers {
            Numbers::F32(all) => pages::take(all),
            Numbers::Bf16(all) => pages::take(all),
        }
    }

    /// Copies the state as it is now.
    pub fn take(&mut self, copy: &mut CopyOut) -> Result<()> {
        let weights: Vec<Range<usize>> = self.weights.iter().map(|p| p.range.clone()).collect();
        let kept: Vec<Range<usize>> = self.kept.iter().map(|kept| kept.range.clone()).collect();
        let slots = [(Slot::Weights, &weights), (Slot::Moment1, &kept), (Slot::Moment2, &kept)];
        let mut start = 0;
        for (slot, ranges) in slots {
            let end = start + ranges.iter().map(Range::len).sum::<usize>();
            match &mut self.numbers {
                Numbers::F32(all) => copy(slot, ranges, &mut all[start..end])?,
                Numbers::Bf16(all) => {
                    let mut wide = zeros::<f32>(end - start, Part::Snapshot)?;
                    copy(slot, ranges, &mut wide)?;
                    kernels::convert(&wide, &mut all[start..end]);
                }
            }
            start = end;
        }
        Ok(())
    }

    /// Writes what was copied. The copy is then as files have it.
    pub fn write(&mut self, part: &mut PartWriter) -> Result<(), CheckpointError> {
        let Snapshot { weights, model_file, kept, optimizer_file, numbers } = self;
        let files = Files { weights, model_file, kept, optimizer_file };
        match numbers {
            Numbers::F32(all) => files.write(all, Dtype::F32, part),
            Numbers::Bf16(all) => files.write(all, Dtype::BF16, part),
        }
    }
}

/// What a rank writes, and where.
struct Files<'a> {
    weights: &'a [Parameter],
    model_file: &'a str,
    kept: &'a [Kept],
    optimizer_file: &'a str,
}

impl Files<'_> {
    /// `numbers` are then as files have them.
    fn write<T: Number + Default>(
        &self,
        numbers: &mut [T],
        dtype: Dtype,
        part: &mut PartWriter,
    ) -> Result<(), CheckpointError> {
        let mut at = 0;
        for p in self.weights {
            let numbers = &mut numbers[at..at + p.range.len()];
            if let std::borrow::Cow::Owned(ordered) = stored(p, numbers) {
                numbers.copy_from_slice(&ordered);
            }
            at += p.range.len();
        }
        let mut rest = &numbers[..];
        let mut next = |len: usize| {
            let (now, later) = rest.split_at(len);
            rest = later;
            as_bytes(now)
        };
        let shapes: Vec<Vec<usize>> = self.weights.iter().map(stored_shape).collect();
        let of_weights = self.weights.iter().zip(&shapes);
        let weights: Vec<TensorRef> = of_weights
            .map(|(p, shape)| TensorRef { name: &p.name, dtype, shape, first: 0, data: next(p.range.len()) })
            .collect();
        if !weights.is_empty() {
            part.write_safetensors(self.model_file, &weights)?;
        }
        let names = MOMENTS.map(|(_, suffix)| {
            self.kept.iter().map(|kept| moment_name(&kept.name, suffix)).collect::<Vec<String>>()
        });
        let named = names.iter().flat_map(|names| names.iter().zip(self.kept));
        let moments: Vec<TensorRef> = named
            .map(|(name, kept)| TensorRef {
                name,
                dtype,
                shape: &kept.shape,
                first: kept.first,
                data: next(kept.range.len()),
            })
            .collect();
        part.write_safetensors(self.optimizer_file, &moments)
    }
}

impl Kept {
    /// What of `p` lies in `range`; never what is between parameters.
    fn of(p: &Parameter, range: &Range<usize>) -> Option<Kept> {
        let range = range.start.max(p.range.start)..range.end.min(p.range.end);
        (!range.is_empty()).then(|| Kept {
            name: p.name.clone(),
            shape: p.shape.clone(),
            first: range.start - p.range.start,
            range,
        })
    }
}
