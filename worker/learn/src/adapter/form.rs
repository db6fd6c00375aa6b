//! The ways in which a matrix is kept in few bits: what it takes of which buffer, how it is quantised, how it is seen.

use crate::error::{Error, Result};
use fleet_checkpoint::{Dtype, FourBitKind, ModelDir, QuantisedForm, QuantisedWeight};
use fleet_common::job::Quantization;
use fleet_common::model::Parameter;
use fleet_kernels::quant::{
    Codes, Double, FourBit, FourBitMap, Hqq, HqqAxis, HqqBits, HqqGroups, Int8, NESTED_BLOCK, Quantised,
    Rounds, Scales, double_quantise, dynamic_map, quantise_four_bit, quantise_hqq, quantise_int8,
};

/// Numbers that share a scale.
const BLOCK: usize = 64;
/// What scales in eight bits stand for.
const MAP: usize = 256;
/// By how much a file's sixteen numbers may differ from those that are computed with: versions of bitsandbytes divide differently.
const MAP_OFF: f32 = 1e-6;

/// How one matrix is kept.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Form {
    pub kind: Kind,
    /// What codes stand for is of this type.
    pub rounds: Option<Rounds>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Kind {
    /// As bitsandbytes has it; scales are in eight bits where they are `doubled` (`bnb_4bit_use_double_quant`).
    FourBit { map: FourBitMap, block: usize, doubled: bool },
    /// As bitsandbytes has it, a scale for each row.
    Int8,
    /// As the package hqq has it.
    Hqq(HqqGroups),
}

/// What a matrix takes of each buffer, or where it lies there.
#[derive(Clone, Debug, Default)]
pub(super) struct Of<T> {
    pub codes: T,
    pub signed: T,
    /// Scales in eight bits.
    pub scales: T,
    /// Scales, or the scales of scales, their offset and what they stand for; zeros.
    pub floats: T,
}

/// The buffers' parts of one matrix.
pub(super) struct Parts<'a> {
    pub codes: &'a [u8],
    pub signed: &'a [i8],
    pub scales: &'a [u8],
    pub floats: &'a [f32],
}

/// The same to be written.
pub(super) struct PartsMut<'a> {
    pub codes: &'a mut [u8],
    pub signed: &'a mut [i8],
    pub scales: &'a mut [u8],
    pub floats: &'a mut [f32],
}

/// What lies among the floats of scales in eight bits: the largest of each block, their offset, their map.
fn split<T>(floats: &[T]) -> (&[T], &T, &[T; MAP]) {
    let (rest, map) = floats.split_last_chunk().expect("the map has a place");
    let (offset, largest) = rest.split_last().expect("the offset has a place");
    (largest, offset, map)
}

impl Form {
    /// That of a weight of numbers of `dtype`, which is quantised here.
    pub fn of(quantization: Quantization, dtype: Option<Dtype>) -> Form {
        let hqq = |bits| Kind::Hqq(HqqGroups { bits, axis: HqqAxis::One, size: BLOCK });
        let four_bit = |map| Kind::FourBit { map, block: BLOCK, doubled: true };
        let kind = match quantization {
            Quantization::Nf4 => four_bit(FourBitMap::Nf4),
            Quantization::Fp4 => four_bit(FourBitMap::Fp4),
            Quantization::Int8 => Kind::Int8,
            Quantization::Hqq8 => hqq(HqqBits::Eight),
            Quantization::Hqq4 => hqq(HqqBits::Four),
            Quantization::Hqq3 => hqq(HqqBits::Three),
            Quantization::Hqq2 => hqq(HqqBits::Two),
            Quantization::Hqq1 => hqq(HqqBits::One),
        };
        Form { kind, rounds: if kind == Kind::Int8 { None } else { rounds(dtype) } }
    }

    /// That of a weight of files, which may be one that nothing computes with.
    pub fn of_dir(dir: &ModelDir, weight: &QuantisedWeight) -> Result<Form> {
        let kind = match &weight.form {
            QuantisedForm::FourBit(form) => {
                let map = match form.kind {
                    FourBitKind::Nf4 => FourBitMap::Nf4,
                    FourBitKind::Fp4 => FourBitMap::Fp4,
                };
                if map.values().iter().zip(&form.map).any(|(a, b)| !(a - b).abs().le(&MAP_OFF)) {
                    return Err(Error::Input(format!(
                        "{}: {}.quant_map has other numbers than bitsandbytes; quantise the model again",
                        dir.path().display(),
                        weight.name
                    )));
                }
                Kind::FourBit { map, block: form.block, doubled: form.nested.is_some() }
            }
            QuantisedForm::Int8 => Kind::Int8,
            QuantisedForm::Hqq(form) => {
                let bits = HqqBits::of(form.bits as u64).expect("hqq packs no others");
                let axis = if form.axis == 0 { HqqAxis::Zero } else { HqqAxis::One };
                Kind::Hqq(HqqGroups { bits, axis, size: form.group })
            }
        };
        Ok(Form { kind, rounds: rounds(weight.dtype()) })
    }

    /// In a word, as a job names it.
    pub fn name(self) -> String {
        match self.kind {
            Kind::FourBit { map: FourBitMap::Nf4, .. } => "NF4".into(),
            Kind::FourBit { map: FourBitMap::Fp4, .. } => "FP4".into(),
            Kind::Int8 => "INT8".into(),
            Kind::Hqq(groups) => format!("HQQ{}", groups.bits.count()),
        }
    }

    /// Refuses a matrix whose groups do not come out even, as the package hqq does.
    pub fn check(self, p: &Parameter) -> Result<()> {
        match self.kind {
            Kind::Hqq(groups) if !fits(groups, p.range.len()) => Err(Error::Input(format!(
                "{} has {} numbers, which HQQ cannot cut into groups of {BLOCK} that fill bytes; take \"nf4\" or \"int8\"",
                p.name,
                p.range.len()
            ))),
            _ => Ok(()),
        }
    }

    pub fn lengths(self, rows: usize, cols: usize) -> Of<usize> {
        let numbers = rows * cols;
        match self.kind {
            Kind::FourBit { block, doubled, .. } => {
                let (codes, blocks) = (numbers.div_ceil(2), numbers.div_ceil(block));
                match doubled {
                    true => Of {
                        codes,
                        scales: blocks,
                        floats: blocks.div_ceil(NESTED_BLOCK) + 1 + MAP,
                        ..Of::default()
                    },
                    false => Of { codes, floats: blocks, ..Of::default() },
                }
            }
            Kind::Int8 => Of { signed: numbers, floats: rows, ..Of::default() },
            Kind::Hqq(groups) => {
                Of { codes: groups.bytes(numbers), floats: 2 * groups.count(numbers), ..Of::default() }
            }
        }
    }

    /// All of `wide` are finite; they may be rounded.
    pub fn quantise(self, wide: &mut [f32], cols: usize, to: PartsMut) {
        match self.kind {
            Kind::FourBit { map, block, doubled: false } => {
                quantise_four_bit(wide, map, block, to.codes, to.floats);
            }
            Kind::FourBit { map, block, doubled: true } => {
                let mut scales = vec![0.0; to.scales.len()];
                quantise_four_bit(wide, map, block, to.codes, &mut scales);
                let (rest, map) = to.floats.split_last_chunk_mut::<MAP>().expect("the map has a place");
                let (offset, largest) = rest.split_last_mut().expect("the offset has a place");
                *offset = double_quantise(&scales, to.scales, largest);
                map.copy_from_slice(dynamic_map());
            }
            Kind::Int8 => {
                // As bitsandbytes does before.
                Rounds::F16.all(wide);
                quantise_int8(wide, cols, to.signed, to.floats);
            }
            Kind::Hqq(groups) => {
                let (scales, zeros) = to.floats.split_at_mut(to.floats.len() / 2);
                quantise_hqq(wide, groups, to.codes, scales, zeros);
                if let Some(rounds) = self.rounds {
                    rounds.all(to.floats);
                }
            }
        }
    }

    pub fn quantised(self, [rows, cols]: [usize; 2], from: Parts<'_>) -> Quantised<'_> {
        let codes = match self.kind {
            Kind::FourBit { map, block, doubled } => {
                let scales = match doubled {
                    false => Scales::Plain(from.floats),
                    true => {
                        let (largest, offset, map) = split(from.floats);
                        Scales::Double(Double { codes: from.scales, largest, map, offset: *offset })
                    }
                };
                Codes::FourBit(FourBit { map, block, codes: from.codes, scales })
            }
            Kind::Int8 => Codes::Int8(Int8 { codes: from.signed, scales: from.floats }),
            Kind::Hqq(groups) => {
                let (scales, zeros) = from.floats.split_at(from.floats.len() / 2);
                Codes::Hqq(Hqq { groups, codes: from.codes, scales, zeros })
            }
        };
        Quantised::new(codes, rows, cols).rounded(self.rounds)
    }
}

fn rounds(dtype: Option<Dtype>) -> Option<Rounds> {
    match dtype {
        Some(Dtype::BF16) => Some(Rounds::Bf16),
        Some(Dtype::F16) => Some(Rounds::F16),
        _ => None,
    }
}

/// Whether all groups are whole, and lines of them fill bytes. Words of three bits may have room left.
fn fits(groups: HqqGroups, numbers: usize) -> bool {
    let in_a_byte = match groups.bits {
        HqqBits::One => 8,
        HqqBits::Two => 4,
        HqqBits::Four => 2,
        HqqBits::Three | HqqBits::Eight => 1,
    };
    numbers.is_multiple_of(groups.size * in_a_byte)
}
