//! A matrix in few bits for a model's files.

use super::form::{Form, Kind, PartsMut};
use super::from_files::read_wide;
use crate::error::{Error, Result};
use fleet_checkpoint::{
    Dtype, FourBitForm, FourBitKind, HqqForm, ModelDir, NestedScales, NewTensor, QuantisedForm,
    QuantisedWeight, stored,
};
use fleet_common::job::Quantization;
use fleet_common::model::{Parameter, Stored};
use fleet_kernels::all_finite;
use fleet_kernels::quant::{FourBitMap, HqqAxis};
use half::{bf16, f16};
use std::borrow::Cow;

/// The tensors that stand for a parameter of the model in `dir`, which is called `name` in its files.
pub fn quantise_for_files(
    dir: &ModelDir,
    p: &Parameter,
    name: &str,
    quantization: Quantization,
) -> Result<Vec<NewTensor>> {
    let dtype = dir.dtype(p).unwrap_or(Dtype::F32);
    let form = Form::of(quantization, Some(dtype));
    form.check(p)?;
    let mut wide = vec![0.0; p.range.len()];
    read_wide(dir, p, &mut wide)?;
    if matches!(p.stored, Stored::ByHead { .. })
        && let Cow::Owned(ordered) = stored(p, &wide)
    {
        wide = ordered;
    }
    let is_finite = |numbers: &[f32]| match all_finite(numbers) {
        true => Ok(()),
        false => Err(Error::Input(format!(
            "{}: {} holds values that are NaN or infinite, or beyond what its type of few bits can scale; restore the weights, or use another model",
            dir.path().display(),
            p.name
        ))),
    };
    is_finite(&wide)?;
    let (rows, cols) = (p.shape[0], p.shape[1]);
    let lengths = form.lengths(rows, cols);
    let (mut codes, mut signed) = (vec![0u8; lengths.codes], vec![0i8; lengths.signed]);
    let (mut scales, mut floats) = (vec![0u8; lengths.scales], vec![0.0f32; lengths.floats]);
    let to = PartsMut { codes: &mut codes, signed: &mut signed, scales: &mut scales, floats: &mut floats };
    form.quantise(&mut wide, cols, to);
    is_finite(&floats)?;
    let weight = QuantisedWeight { name: name.into(), rows, cols, form: described(form, dtype, &floats) };
    let halves = floats.split_at(floats.len() / 2);
    let parts = weight.parts().into_iter().map(|part| {
        let own = |name: &str| match (&weight.form, name) {
            (QuantisedForm::Int8, name) if name == weight.codes() => {
                signed.iter().map(|code| code.cast_unsigned()).collect()
            }
            (_, name) if name == weight.codes() => codes.clone(),
            (QuantisedForm::Hqq(_), name) if name == weight.zeros() => narrow(halves.1, dtype),
            (QuantisedForm::Hqq(_), _) => narrow(halves.0, dtype),
            (QuantisedForm::FourBit(FourBitForm { nested: Some(nested), .. }), name) => {
                match name == weight.scales() {
                    true => scales.clone(),
                    false => narrow(&floats[..floats.len() - 1 - nested.map.len()], Dtype::F32),
                }
            }
            _ => narrow(&floats, Dtype::F32),
        };
        let data = part.data.unwrap_or_else(|| own(&part.name));
        NewTensor { name: part.name, dtype: part.dtype, shape: part.shape, data }
    });
    Ok(parts.collect())
}

fn described(form: Form, dtype: Dtype, floats: &[f32]) -> QuantisedForm {
    match form.kind {
        Kind::FourBit { map, block, doubled } => {
            let kind = if map == FourBitMap::Nf4 { FourBitKind::Nf4 } else { FourBitKind::Fp4 };
            let nested = doubled.then(|| {
                let (rest, map) = floats.split_last_chunk().expect("the map has a place");
                NestedScales { offset: rest[rest.len() - 1], map: Box::new(*map) }
            });
            QuantisedForm::FourBit(FourBitForm { kind, block, dtype, map: *map.values(), nested })
        }
        Kind::Int8 => QuantisedForm::Int8,
        Kind::Hqq(groups) => {
            let axis = if groups.axis == HqqAxis::Zero { 0 } else { 1 };
            QuantisedForm::Hqq(HqqForm { bits: groups.bits.count(), group: groups.size, axis, dtype })
        }
    }
}

/// Numbers that are of that type already.
fn narrow(numbers: &[f32], dtype: Dtype) -> Vec<u8> {
    match dtype {
        Dtype::BF16 => numbers.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect(),
        Dtype::F16 => numbers.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect(),
        _ => numbers.iter().flat_map(|x| x.to_le_bytes()).collect(),
    }
}
