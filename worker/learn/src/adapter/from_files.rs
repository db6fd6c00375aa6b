//! Weights in few bits as a model's files have them.

use super::form::{Form, Parts, PartsMut};
use super::packed::widen_matrix;
use crate::error::{Error, Result};
use crate::zeros::{Part, zeros};
use fleet_checkpoint::{ModelDir, QuantisedForm, QuantisedWeight, Reading, Tensor, read_numbers};
use fleet_common::model::Parameter;
use fleet_kernels::all_finite;

/// Takes a weight as the files have it.
pub(super) fn copy(dir: &ModelDir, weight: &QuantisedWeight, to: PartsMut) -> Result<()> {
    let floats = |name: String, to: &mut [f32]| {
        let tensor = dir.part(&name);
        read_numbers(&tensor, 0, to)?;
        let wrong = match &weight.form {
            _ if !all_finite(to) => "values that are NaN or infinite",
            // They are the largest of absolute values.
            QuantisedForm::FourBit(_) | QuantisedForm::Int8 if to.iter().any(|scale| *scale < 0.0) => {
                "scales below 0"
            }
            _ => return Ok(()),
        };
        Err(Error::Input(format!(
            "{}: {name} holds {wrong}; restore the weights, or quantise the model as it was before (fleet quantise)",
            dir.path().display()
        )))
    };
    match &weight.form {
        QuantisedForm::FourBit(form) => {
            bytes(&dir.part(&weight.codes()), to.codes)?;
            let Some(nested) = &form.nested else { return floats(weight.scales(), to.floats) };
            bytes(&dir.part(&weight.scales()), to.scales)?;
            let (largest, behind) = to.floats.split_at_mut(to.floats.len() - 1 - nested.map.len());
            behind[0] = nested.offset;
            behind[1..].copy_from_slice(&nested.map[..]);
            floats(weight.nested_scales(), largest)
        }
        QuantisedForm::Int8 => {
            let mut codes = to.signed.iter_mut();
            dir.part(&weight.codes()).pieces(0..weight.rows * weight.cols, &mut |piece| {
                codes.by_ref().zip(piece).for_each(|(code, byte)| *code = byte.cast_signed());
            })?;
            floats(weight.scales(), to.floats)
        }
        QuantisedForm::Hqq(_) => {
            bytes(&dir.part(&weight.codes()), to.codes)?;
            let (scales, zeros) = to.floats.split_at_mut(to.floats.len() / 2);
            floats(weight.scales(), scales)?;
            floats(weight.zeros(), zeros)
        }
    }
}

fn bytes(tensor: &Tensor, to: &mut [u8]) -> Result<()> {
    let mut at = 0;
    tensor.pieces(0..to.len(), &mut |piece| {
        to[at..at + piece.len()].copy_from_slice(piece);
        at += piece.len();
    })?;
    Ok(())
}

/// A parameter of the model in `dir` in fp32, also where the files have it in few bits.
pub fn read_wide(dir: &ModelDir, p: &Parameter, out: &mut [f32]) -> Result<()> {
    let Some(weight) = dir.quantised(p) else {
        let mut reading = Reading::default();
        dir.read_part(p, 0, out, &mut reading);
        return Ok(reading.run(1)?);
    };
    let form = Form::of_dir(dir, weight)?;
    let lengths = form.lengths(weight.rows, weight.cols);
    let mut codes: Vec<u8> = zeros(lengths.codes, Part::Weights)?;
    let mut signed: Vec<i8> = zeros(lengths.signed, Part::Weights)?;
    let (mut scales, mut floats) = (vec![0; lengths.scales], vec![0.0; lengths.floats]);
    let to = PartsMut { codes: &mut codes, signed: &mut signed, scales: &mut scales, floats: &mut floats };
    copy(dir, weight, to)?;
    let from = Parts { codes: &codes, signed: &signed, scales: &scales, floats: &floats };
    widen_matrix(p, form, from, out);
    Ok(())
}
