//! How bitsandbytes keeps a weight of few bits in a model's safetensors, as transformers writes them: which tensors stand for it, of what type
//! and shape, and what the small ones say. The numbers of the large ones are left where they are.
//!
//! | tensor | four bits | eight bits |
//! |---|---|---|
//! | `NAME` | U8 `[n / 2, 1]`, two codes to a byte | I8 `[rows, cols]` |
//! | `NAME.absmax` | F32 `[blocks]`, or U8 where scales are quantised again | |
//! | `NAME.quant_map` | F32 `[16]` | |
//! | `NAME.nested_absmax`, `NAME.nested_quant_map` | F32 `[blocks / 256]` and `[256]`, of scales that are quantised again | |
//! | `NAME.quant_state.bitsandbytes__nf4` (or `fp4`) | U8: a JSON object | |
//! | `SCB`, `weight_format` in place of the name's `weight` | | F32 `[rows]`, U8 scalar: 0, row by row |

use crate::{CheckpointError, Dtype, Tensor, Tensors};
use serde::Deserialize;

/// A weight `[rows, cols]` as bitsandbytes keeps it.
#[derive(Clone, Debug, PartialEq)]
pub struct QuantisedWeight {
    /// Of the weight; those of its other tensors follow from it.
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
}

#[derive(Clone, Debug, PartialEq)]
pub struct FourBitForm {
    pub kind: FourBitKind,
    /// Numbers that share a scale.
    pub block: usize,
    /// Of the weight before, in PyTorch's words.
    pub dtype: String,
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

/// A tensor that stands for a part of a weight.
#[derive(Clone, Debug, PartialEq)]
pub struct QuantisedPart {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    /// Of the small ones; codes and scales are the caller's.
    pub data: Option<Vec<u8>>,
}

/// Scales that share a scale themselves: what bitsandbytes always takes. Its maps have as many numbers.
const NESTED_BLOCK: usize = 256;
/// A state is a JSON object of some 200 bytes.
const STATE_MAX: usize = 1 << 16;

impl FourBitKind {
    const ALL: [FourBitKind; 2] = [FourBitKind::Nf4, FourBitKind::Fp4];

    fn name(self) -> &'static str {
        match self {
            FourBitKind::Nf4 => "nf4",
            FourBitKind::Fp4 => "fp4",
        }
    }
}

/// What the JSON object of a weight says.
#[derive(Deserialize)]
struct State {
    quant_type: String,
    blocksize: usize,
    dtype: String,
    shape: Vec<usize>,
    nested_blocksize: Option<usize>,
    nested_dtype: Option<String>,
    nested_offset: Option<f64>,
}

impl QuantisedWeight {
    /// The weight of this name, if these tensors keep it so: all that belongs to it is there, and of the types and shapes that it says.
    pub fn find(tensors: &Tensors, name: &str) -> Result<Option<QuantisedWeight>, CheckpointError> {
        let Some(codes) = tensors.get(name) else { return Ok(None) };
        let refuse = |what: String| CheckpointError::Tensors { path: codes.path(), what };
        let state = |kind: FourBitKind| tensors.get(&state_name(name, kind)).map(|state| (kind, state));
        let weight = match FourBitKind::ALL.into_iter().find_map(state) {
            Some((kind, state)) => four_bit(tensors, name, kind, &state).map_err(|e| e.or(&refuse))?,
            None if codes.dtype == Dtype::I8 => int8(name, &codes).map_err(&refuse)?,
            None => return Ok(None),
        };
        for part in weight.parts() {
            let there = tensors.get(&part.name);
            let Some(there) = there else {
                return Err(refuse(format!("{name} is quantised, and {} is not there", part.name)));
            };
            let mut what = None;
            if (there.dtype, there.shape) != (part.dtype, &part.shape[..]) && part.name != weight.state_name()
            {
                what = Some(format!(
                    "{:?} {:?}, not {:?} {:?}",
                    there.dtype, there.shape, part.dtype, part.shape
                ));
            } else if part.name.ends_with("weight_format") && Some(there.data()?) != part.data {
                what = Some(
                    "of a format that is not row by row; save the model with a newer bitsandbytes".into(),
                );
            }
            if let Some(what) = what {
                return Err(refuse(format!("{} is {what}, as {name} asks for", part.name)));
            }
        }
        Ok(Some(weight))
    }

    /// All tensors that stand for the weight, by name.
    pub fn parts(&self) -> Vec<QuantisedPart> {
        let name = &self.name;
        let part = |name: String, dtype, shape: &[usize], data| QuantisedPart {
            name,
            dtype,
            shape: shape.to_vec(),
            data,
        };
        let numbers = self.rows * self.cols;
        let QuantisedForm::FourBit(form) = &self.form else {
            let beside = |what: &str| format!("{}{what}", name.strip_suffix("weight").unwrap_or(name));
            return vec![
                part(beside("SCB"), Dtype::F32, &[self.rows], None),
                part(name.clone(), Dtype::I8, &[self.rows, self.cols], None),
                part(beside("weight_format"), Dtype::U8, &[], Some(vec![0])),
            ];
        };
        let blocks = numbers.div_ceil(form.block);
        let floats = |numbers: &[f32]| Some(numbers.iter().flat_map(|v| v.to_le_bytes()).collect());
        let of = |what: &str| format!("{name}.{what}");
        let scales = if form.nested.is_some() { Dtype::U8 } else { Dtype::F32 };
        let state = self.state(form);
        let mut parts = vec![
            part(name.clone(), Dtype::U8, &[numbers.div_ceil(2), 1], None),
            part(of("absmax"), scales, &[blocks], None),
        ];
        if let Some(nested) = &form.nested {
            parts.push(part(of("nested_absmax"), Dtype::F32, &[blocks.div_ceil(NESTED_BLOCK)], None));
            parts.push(part(of("nested_quant_map"), Dtype::F32, &[NESTED_BLOCK], floats(&nested.map[..])));
        }
        parts.push(part(of("quant_map"), Dtype::F32, &[16], floats(&form.map)));
        parts.push(part(state_name(name, form.kind), Dtype::U8, &[state.len()], Some(state.into_bytes())));
        parts
    }

    /// Empty where there is none.
    fn state_name(&self) -> String {
        match &self.form {
            QuantisedForm::FourBit(form) => state_name(&self.name, form.kind),
            QuantisedForm::Int8 => String::new(),
        }
    }

    /// As Python writes it.
    fn state(&self, form: &FourBitForm) -> String {
        let nested = form.nested.as_ref().map_or(String::new(), |nested| {
            format!(
                r#", "nested_blocksize": {NESTED_BLOCK}, "nested_dtype": "float32", "nested_offset": {:?}"#,
                f64::from(nested.offset)
            )
        });
        format!(
            r#"{{"quant_type": "{}", "blocksize": {}, "dtype": "{}", "shape": [{}, {}]{nested}}}"#,
            form.kind.name(),
            form.block,
            form.dtype,
            self.rows,
            self.cols
        )
    }
}

fn state_name(name: &str, kind: FourBitKind) -> String {
    format!("{name}.quant_state.bitsandbytes__{}", kind.name())
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

fn four_bit(
    tensors: &Tensors,
    name: &str,
    kind: FourBitKind,
    state: &Tensor,
) -> Result<QuantisedWeight, Wrong> {
    let wrong = |what: String| Wrong::Words(format!("{}: {what}", state.name));
    if state.len() > STATE_MAX {
        return Err(wrong(format!("{} bytes are no description of a weight", state.len())));
    }
    let said: State = serde_json::from_slice(&state.data()?)
        .map_err(|e| wrong(format!("it is no description of a weight as bitsandbytes writes it ({e})")))?;
    let [rows, cols] = said.shape[..] else {
        return Err(wrong(format!("the shape {:?} is not that of a matrix", said.shape)));
    };
    if rows.checked_mul(cols).is_none_or(|numbers| numbers > isize::MAX as usize) {
        return Err(wrong(format!("the shape {:?} is beyond any memory", said.shape)));
    }
    if said.quant_type != kind.name() {
        return Err(wrong(format!("it says {:?}", said.quant_type)));
    }
    if !said.blocksize.is_power_of_two() || !(32..=4096).contains(&said.blocksize) {
        return Err(wrong(format!(
            "blocks of {} numbers; they have a power of two from 32 to 4096",
            said.blocksize
        )));
    }
    let nested = match said.nested_offset {
        None => None,
        Some(offset) => {
            let dtype = said.nested_dtype.unwrap_or_default();
            if said.nested_blocksize != Some(NESTED_BLOCK) || dtype != "float32" {
                return Err(wrong(format!(
                    "scales in blocks of {} in {dtype}; fleet reads {NESTED_BLOCK} in float32",
                    said.nested_blocksize.unwrap_or_default()
                )));
            }
            let map = Box::new(map(tensors, format!("{name}.nested_quant_map"))?);
            Some(NestedScales { offset: offset as f32, map })
        }
    };
    let map = map(tensors, format!("{name}.quant_map"))?;
    let form = FourBitForm { kind, block: said.blocksize, dtype: said.dtype, map, nested };
    Ok(QuantisedWeight { name: name.into(), rows, cols, form: QuantisedForm::FourBit(form) })
}

fn map<const N: usize>(tensors: &Tensors, name: String) -> Result<[f32; N], Wrong> {
    let tensor = tensors.get(&name).ok_or_else(|| Wrong::Words(format!("{name} is not there")))?;
    if (tensor.dtype, tensor.shape) != (Dtype::F32, &[N]) {
        return Err(Wrong::Words(format!("{name} is {:?} {:?}, not F32 [{N}]", tensor.dtype, tensor.shape)));
    }
    let bytes = tensor.data()?;
    Ok(std::array::from_fn(|i| f32::from_le_bytes(bytes.as_chunks().0[i])))
}

fn int8(name: &str, codes: &Tensor) -> Result<QuantisedWeight, String> {
    let [rows, cols] = codes.shape[..] else {
        return Err(format!("{name} is I8 {:?}; fleet reads matrices of I8", codes.shape));
    };
    Ok(QuantisedWeight { name: name.into(), rows, cols, form: QuantisedForm::Int8 })
}

#[cfg(test)]
mod tests;
