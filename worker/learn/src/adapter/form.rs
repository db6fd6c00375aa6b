//! The ways in which a matrix is kept in few bits: what it takes of which buffer, how it is quantised, how it is seen.

use crate::error::{Error, Result};
use fleet_common::job::Quantization;
use fleet_common::model::Parameter;
use fleet_kernels::quant::{
    Codes, Double, FourBit, FourBitMap, Hqq, HqqAxis, HqqBits, HqqGroups, Int8, NESTED_BLOCK, Quantised,
    Scales, double_quantise, dynamic_map, quantise_four_bit, quantise_hqq, quantise_int8,
};

/// Numbers that share a scale.
const BLOCK: usize = 64;

#[derive(Clone, Copy, Debug)]
pub(super) enum Form {
    /// As bitsandbytes has it with `bnb_4bit_use_double_quant`.
    FourBit(FourBitMap),
    /// As bitsandbytes has it, a scale for each row.
    Int8,
    /// As the package hqq has it, groups side by side.
    Hqq(HqqGroups),
}

/// What a matrix takes of each buffer, or where it lies there.
#[derive(Clone, Debug, Default)]
pub(super) struct Of<T> {
    pub codes: T,
    pub signed: T,
    /// Scales in eight bits.
    pub scales: T,
    /// Scales, scales of scales, zeros.
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

impl Form {
    pub fn of(quantization: Quantization) -> Form {
        let hqq = |bits| Form::Hqq(HqqGroups { bits, axis: HqqAxis::One, size: BLOCK });
        match quantization {
            Quantization::Nf4 => Form::FourBit(FourBitMap::Nf4),
            Quantization::Fp4 => Form::FourBit(FourBitMap::Fp4),
            Quantization::Int8 => Form::Int8,
            Quantization::Hqq8 => hqq(HqqBits::Eight),
            Quantization::Hqq4 => hqq(HqqBits::Four),
            Quantization::Hqq3 => hqq(HqqBits::Three),
            Quantization::Hqq2 => hqq(HqqBits::Two),
            Quantization::Hqq1 => hqq(HqqBits::One),
        }
    }

    /// Refuses a matrix whose groups do not come out even, as the package hqq does.
    pub fn check(self, p: &Parameter) -> Result<()> {
        match self {
            Form::Hqq(groups) if !fits(groups, p.range.len()) => Err(Error::Input(format!(
                "{} has {} numbers, which HQQ cannot cut into groups of {BLOCK} that fill bytes; write quantization = \"nf4\" or \"int8\"",
                p.name,
                p.range.len()
            ))),
            _ => Ok(()),
        }
    }

    pub fn lengths(self, rows: usize, cols: usize) -> Of<usize> {
        let (numbers, blocks) = (rows * cols, (rows * cols).div_ceil(BLOCK));
        match self {
            Form::FourBit(_) => Of {
                codes: numbers.div_ceil(2),
                scales: blocks,
                // The offset of all stands behind them.
                floats: blocks.div_ceil(NESTED_BLOCK) + 1,
                ..Of::default()
            },
            Form::Int8 => Of { signed: numbers, floats: rows, ..Of::default() },
            Form::Hqq(groups) => {
                let codes = if fits(groups, numbers) { groups.bytes(numbers) } else { numbers };
                Of { codes, floats: 2 * blocks, ..Of::default() }
            }
        }
    }

    /// All of `wide` are finite.
    pub fn quantise(self, wide: &[f32], cols: usize, to: PartsMut) {
        match self {
            Form::FourBit(map) => {
                let mut scales = vec![0.0; to.scales.len()];
                quantise_four_bit(wide, map, BLOCK, to.codes, &mut scales);
                let (offset, largest) = to.floats.split_last_mut().expect("the offset has a place");
                *offset = double_quantise(&scales, to.scales, largest);
            }
            Form::Int8 => quantise_int8(wide, cols, to.signed, to.floats),
            Form::Hqq(groups) => {
                let (scales, zeros) = to.floats.split_at_mut(to.floats.len() / 2);
                quantise_hqq(wide, groups, to.codes, scales, zeros);
            }
        }
    }

    pub fn quantised(self, [rows, cols]: [usize; 2], from: Parts<'_>) -> Quantised<'_> {
        let codes = match self {
            Form::FourBit(map) => {
                let (offset, largest) = from.floats.split_last().expect("the offset has a place");
                let double = Double { codes: from.scales, largest, map: dynamic_map(), offset: *offset };
                Codes::FourBit(FourBit {
                    map,
                    block: BLOCK,
                    codes: from.codes,
                    scales: Scales::Double(double),
                })
            }
            Form::Int8 => Codes::Int8(Int8 { codes: from.signed, scales: from.floats }),
            Form::Hqq(groups) => {
                let (scales, zeros) = from.floats.split_at(from.floats.len() / 2);
                Codes::Hqq(Hqq { groups, codes: from.codes, scales, zeros })
            }
        };
        Quantised::new(codes, rows, cols)
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
