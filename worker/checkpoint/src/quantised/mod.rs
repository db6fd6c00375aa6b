//! How a model's safetensors have a weight of few bits, as transformers writes them: which tensors stand for it, of what type and shape, and
//! what the small ones say. The numbers of the large ones are left where they are.
//!
//! | bitsandbytes | four bits | eight bits |
//! |---|---|---|
//! | `NAME` | U8 `[n / 2, 1]`, two codes to a byte | I8 `[rows, cols]` |
//! | `NAME.absmax` | F32 `[blocks]`, or U8 where scales are quantised again | |
//! | `NAME.quant_map` | F32 `[16]` | |
//! | `NAME.nested_absmax`, `NAME.nested_quant_map` | F32 `[blocks / 256]` and `[256]`, of scales that are quantised again | |
//! | `NAME.quant_state.bitsandbytes__nf4` (or `fp4`) | U8: a JSON object | |
//! | `SCB`, `weight_format` in place of the name's `weight` | | F32 `[rows]`, U8 scalar: 0, row by row |
//!
//! | hqq, in place of the name's `weight` | |
//! |---|---|
//! | `W_q` | codes: U8, or I32 for three bits, `[lines / codes of a cell, line]` |
//! | `scale`, `zero` | of each group, F32, BF16 or F16 |
//! | `shape`, `axis`, `group_size`, `packing`, ... | numbers, and texts as U8 |

mod bitsandbytes;
mod hqq;

use crate::{CheckpointError, Dtype, Tensor, Tensors};
use fleet_common::model::Packer;

/// A weight `[rows, cols]` in few bits.
#[derive(Clone, Debug, PartialEq)]
pub struct QuantisedWeight {
    /// Of the weight; those of its tensors follow from it.
    pub name: String,
    pub rows: usize,
    pub cols: usize,
    pub form: QuantisedForm,
}

#[derive(Clone, Debug, PartialEq)]
pub enum QuantisedForm {
    FourBit(FourBitForm),
    /// A scale for each row.
    Int8,
    Hqq(HqqForm),
}

#[derive(Clone, Debug, PartialEq)]
pub struct FourBitForm {
    pub kind: FourBitKind,
    /// Numbers that share a scale.
    pub block: usize,
    /// Of the weight before, and of what codes stand for: F32, BF16 or F16.
    pub dtype: Dtype,
    /// What codes stand for. Whoever multiplies compares it with what it computes with.
    pub map: [f32; 16],
    pub nested: Option<NestedScales>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FourBitKind {
    Nf4,
    Fp4,
}

/// Scales that are quantised again.
#[derive(Clone, Debug, PartialEq)]
pub struct NestedScales {
    pub offset: f32,
    pub map: Box<[f32; NESTED_BLOCK]>,
}

/// Scales that share a scale themselves: what bitsandbytes always takes. Its maps have as many numbers.
const NESTED_BLOCK: usize = 256;

#[derive(Clone, Debug, PartialEq)]
pub struct HqqForm {
    /// That a code takes: 1, 2, 3, 4 or 8.
    pub bits: usize,
    /// Numbers that share a scale and a zero.
    pub group: usize,
    /// Along which the numbers of a group lie: 0, one in each of as many equal parts of the matrix, or 1, side by side.
    pub axis: usize,
    /// Of scales and zeros, and so of what codes stand for: F32, BF16 or F16.
    pub dtype: Dtype,
}

/// A tensor that stands for a part of a weight.
#[derive(Clone, Debug, PartialEq)]
pub struct QuantisedPart {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    /// Of the small ones; codes and scales are the caller's.
    pub data: Option<Vec<u8>>,
}

impl QuantisedPart {
    fn new(name: String, dtype: Dtype, shape: &[usize], data: Option<Vec<u8>>) -> QuantisedPart {
        QuantisedPart { name, dtype, shape: shape.to_vec(), data }
    }

    fn bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.bitsize() / 8
    }
}

impl QuantisedWeight {
    /// The weight of this name, if these tensors keep it so: all that belongs to it is there, and of the types and shapes that it says.
    pub fn find(tensors: &Tensors, name: &str) -> Result<Option<QuantisedWeight>, CheckpointError> {
        let codes = [Some(name.to_owned()), hqq::codes(name)];
        let Some(codes) = codes.iter().flatten().find_map(|name| tensors.get(name)) else { return Ok(None) };
        let refuse = |what: String| CheckpointError::Quantised { path: codes.path(), what };
        let found = match codes.name == name {
            true => bitsandbytes::find(tensors, &codes),
            false => hqq::find(tensors, name, &codes),
        };
        let Some(weight) = found.map_err(|wrong| wrong.or(&refuse))? else { return Ok(None) };
        for part in weight.parts() {
            let there = tensors.get(&part.name);
            // What small tensors say was read, and some versions of hqq say less.
            if there.is_none() && part.data.is_some() && matches!(weight.form, QuantisedForm::Hqq(_)) {
                continue;
            }
            let Some(there) = there else {
                return Err(refuse(format!("{name} is quantised, and {} is not there", part.name)));
            };
            if let Some(what) = weight.wrong(&part, &there)? {
                return Err(refuse(format!("{} is {what}, as {name} asks for", part.name)));
            }
        }
        Ok(Some(weight))
    }

    /// What a part is that it should not be.
    fn wrong(&self, part: &QuantisedPart, there: &Tensor) -> Result<Option<String>, CheckpointError> {
        // Codes may be stored as numbers of any type that fill as many bytes.
        let is_viewed = part.name == self.codes() && !matches!(self.form, QuantisedForm::Int8);
        let fits = match is_viewed {
            true => there.len() == part.bytes(),
            false => (there.dtype, there.shape) == (part.dtype, &part.shape[..]),
        };
        let says_itself = part.data.is_some() && !part.name.ends_with("weight_format");
        Ok(match fits || says_itself {
            false => {
                Some(format!("{:?} {:?}, not {:?} {:?}", there.dtype, there.shape, part.dtype, part.shape))
            }
            true if part.data.is_some() && !says_itself && Some(there.data()?) != part.data => {
                Some("of a format that is not row by row; save the model with a newer bitsandbytes".into())
            }
            true => None,
        })
    }

    /// Who packed it, with the bits of a code.
    pub fn packer(&self) -> Packer {
        match &self.form {
            QuantisedForm::FourBit(_) => Packer::Bitsandbytes { bits: Some(4) },
            QuantisedForm::Int8 => Packer::Bitsandbytes { bits: Some(8) },
            QuantisedForm::Hqq(form) => Packer::Hqq { bits: Some(form.bits as u64) },
        }
    }

    /// All tensors that stand for the weight, by name.
    pub fn parts(&self) -> Vec<QuantisedPart> {
        match &self.form {
            QuantisedForm::FourBit(form) => bitsandbytes::four_bit_parts(self, form),
            QuantisedForm::Int8 => bitsandbytes::int8_parts(self),
            QuantisedForm::Hqq(form) => hqq::parts(self, form),
        }
    }

    /// The type of what codes stand for, where that is said: F32, BF16 or F16.
    pub fn dtype(&self) -> Option<Dtype> {
        match &self.form {
            QuantisedForm::FourBit(form) => Some(form.dtype),
            QuantisedForm::Int8 => None,
            QuantisedForm::Hqq(form) => Some(form.dtype),
        }
    }

    /// The tensor with the codes.
    pub fn codes(&self) -> String {
        let of_hqq = matches!(self.form, QuantisedForm::Hqq(_)).then(|| hqq::codes(&self.name)).flatten();
        of_hqq.unwrap_or_else(|| self.name.clone())
    }

    /// The one with a scale for each block, row or group.
    pub fn scales(&self) -> String {
        match self.form {
            QuantisedForm::FourBit(_) => format!("{}.absmax", self.name),
            QuantisedForm::Int8 => self.beside("SCB"),
            QuantisedForm::Hqq(_) => self.beside("scale"),
        }
    }

    /// The one with scales of scales.
    pub fn nested_scales(&self) -> String {
        format!("{}.nested_absmax", self.name)
    }

    /// The one with the zeros of groups.
    pub fn zeros(&self) -> String {
        self.beside("zero")
    }

    /// In the place of the name's `weight`.
    fn beside(&self, what: &str) -> String {
        format!("{}{what}", self.name.strip_suffix("weight").unwrap_or(&self.name))
    }
}

/// What is wrong: with a file, or with what it says.
enum Wrong {
    File(CheckpointError),
    Words(String),
}

impl Wrong {
    fn or(self, refuse: &dyn Fn(String) -> CheckpointError) -> CheckpointError {
        match self {
            Wrong::File(e) => e,
            Wrong::Words(what) => refuse(what),
        }
    }
}

impl From<CheckpointError> for Wrong {
    fn from(e: CheckpointError) -> Wrong {
        Wrong::File(e)
    }
}

/// Types of weights, and what PyTorch calls them.
const TYPES: [(Dtype, &str); 3] =
    [(Dtype::F32, "float32"), (Dtype::BF16, "bfloat16"), (Dtype::F16, "float16")];

fn dtype_of(said: &str) -> Result<Dtype, String> {
    let found = TYPES.into_iter().find(|(_, name)| *name == said);
    found
        .map(|(dtype, _)| dtype)
        .ok_or_else(|| format!("numbers in {said:?}; fleet reads float32, bfloat16 and float16"))
}

fn dtype_name(dtype: Dtype) -> &'static str {
    TYPES.into_iter().find(|(of, _)| *of == dtype).map_or("float32", |(_, name)| name)
}

/// A matrix of this shape can be in memory.
fn check_shape(rows: usize, cols: usize) -> Result<(), String> {
    match rows.checked_mul(cols).is_none_or(|numbers| numbers > isize::MAX as usize) {
        true => Err(format!("the shape {:?} is beyond any memory", [rows, cols])),
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests;
