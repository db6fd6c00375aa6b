//! Weights of bitsandbytes: NF4, FP4, LLM.int8().

use super::{
    FourBitForm, FourBitKind, NESTED_BLOCK, NestedScales, QuantisedForm, QuantisedPart, QuantisedWeight,
    Wrong, check_shape, dtype_name, dtype_of,
};
use crate::{Dtype, Tensor, Tensors};
use serde::Deserialize;

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

/// The weight whose codes may be these.
pub fn find(tensors: &Tensors, codes: &Tensor) -> Result<Option<QuantisedWeight>, Wrong> {
    let state = |kind: FourBitKind| tensors.get(&state_name(codes.name, kind)).map(|state| (kind, state));
    match FourBitKind::ALL.into_iter().find_map(state) {
        Some((kind, state)) => four_bit(tensors, codes.name, kind, &state).map(Some),
        None if codes.dtype == Dtype::I8 => int8(codes).map(Some),
        None => Ok(None),
    }
}

pub fn four_bit_parts(weight: &QuantisedWeight, form: &FourBitForm) -> Vec<QuantisedPart> {
    let numbers = weight.rows * weight.cols;
    let blocks = numbers.div_ceil(form.block);
    let floats = |numbers: &[f32]| Some(numbers.iter().flat_map(|v| v.to_le_bytes()).collect());
    let of = |what: &str| format!("{}.{what}", weight.name);
    let scales = if form.nested.is_some() { Dtype::U8 } else { Dtype::F32 };
    let (part, state) = (QuantisedPart::new, state(weight, form));
    let mut parts = vec![
        part(weight.codes(), Dtype::U8, &[numbers.div_ceil(2), 1], None),
        part(weight.scales(), scales, &[blocks], None),
    ];
    if let Some(nested) = &form.nested {
        parts.push(part(weight.nested_scales(), Dtype::F32, &[blocks.div_ceil(NESTED_BLOCK)], None));
        parts.push(part(of("nested_quant_map"), Dtype::F32, &[NESTED_BLOCK], floats(&nested.map[..])));
    }
    parts.push(part(of("quant_map"), Dtype::F32, &[16], floats(&form.map)));
    let name = state_name(&weight.name, form.kind);
    parts.push(part(name, Dtype::U8, &[state.len()], Some(state.into_bytes())));
    parts
}

pub fn int8_parts(weight: &QuantisedWeight) -> Vec<QuantisedPart> {
    let part = QuantisedPart::new;
    vec![
        part(weight.scales(), Dtype::F32, &[weight.rows], None),
        part(weight.codes(), Dtype::I8, &[weight.rows, weight.cols], None),
        part(weight.beside("weight_format"), Dtype::U8, &[], Some(vec![0])),
    ]
}

/// As Python writes it.
fn state(weight: &QuantisedWeight, form: &FourBitForm) -> String {
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
        dtype_name(form.dtype),
        weight.rows,
        weight.cols
    )
}

fn state_name(name: &str, kind: FourBitKind) -> String {
    format!("{name}.quant_state.bitsandbytes__{}", kind.name())
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
    check_shape(rows, cols).map_err(wrong)?;
    let dtype = dtype_of(&said.dtype).map_err(wrong)?;
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
    let form = FourBitForm { kind, block: said.blocksize, dtype, map, nested };
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

fn int8(codes: &Tensor) -> Result<QuantisedWeight, Wrong> {
    let name = codes.name;
    let [rows, cols] = codes.shape[..] else {
        return Err(Wrong::Words(format!("{name} is I8 {:?}; fleet reads matrices of I8", codes.shape)));
    };
    Ok(QuantisedWeight { name: name.into(), rows, cols, form: QuantisedForm::Int8 })
}
