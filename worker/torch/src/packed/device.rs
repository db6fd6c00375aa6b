//! Codes and scales on a device, as `fleet_kernels::quant` has them, widened there by libtorch's operations to the same numbers.

use crate::{Error, Result};
use fleet_kernels::quant::{
    Codes, Double, FourBit, Hqq, HqqAxis, HqqBits, INT8_STEP, Int8, NESTED_BLOCK, Rounds, Scales,
};
use fleet_learn::adapter::PackedMatrix;
use std::ops::Range;
use tch::{Device, Kind, Tensor};

pub(super) struct OnDevice {
    /// In the order of the model's flat buffer.
    matrices: Vec<Matrix>,
    /// To which they are widened.
    kind: Kind,
}

struct Matrix {
    /// In the model's flat buffer.
    range: Range<usize>,
    rows: i64,
    form: Form,
    /// The type that codes stand for a number of, where that is not fp32.
    rounds: Option<Kind>,
    /// Of each row its number in `form`, where that is another.
    order: Option<Tensor>,
}

/// How a matrix is kept, and its numbers.
enum Form {
    /// NF4 and FP4.
    FourBit {
        /// `[256, 2]`: the two numbers that a byte stands for.
        pairs: Tensor,
        codes: Tensor,
        block: i64,
        /// The map of scales, their codes, their scales, and what is added to all; or scales as they are.
        scales: Nested,
    },
    Int8 {
        codes: Tensor,
        scales: Tensor,
    },
    Hqq {
        /// `[cells, size]`.
        cells: Tensor,
        bits: HqqBits,
        /// `[groups, 1]`.
        scales: Tensor,
        zeros: Tensor,
    },
}

enum Nested {
    Plain(Tensor),
    Double { map: Tensor, codes: Tensor, largest: Tensor, offset: f64 },
}

impl OnDevice {
    /// A copy on `device` of what is in the memory of the host.
    pub fn new(host: &fleet_learn::adapter::Packed, kind: Kind, device: Device) -> Result<OnDevice> {
        let matrix = |PackedMatrix { range, rows, order }: PackedMatrix| {
            let rounds = rows.rounds().map(|rounds| match rounds {
                Rounds::Bf16 => Kind::BFloat16,
                Rounds::F16 => Kind::Half,
            });
            let order = order.map(|order| -> Result<Tensor> {
                let order: Vec<i64> = order.into_iter().map(|row| row as i64).collect();
                Ok(Tensor::f_from_slice(&order)?.f_to_device(device)?)
            });
            let form = Form::new(rows.codes(), device)?;
            Ok(Matrix { range, rows: rows.rows() as i64, form, rounds, order: order.transpose()? })
        };
        Ok(OnDevice { matrices: host.matrices().map(matrix).collect::<Result<_>>()?, kind })
    }

    /// Whether a product's weight is here.
    pub fn has(&self, weight: &Range<usize>) -> bool {
        self.within(weight).next().is_some()
    }

    /// A product's weight, `[outputs, inputs]`, which may be several matrices one below the other.
    pub fn widen(&self, weight: &Range<usize>) -> Result<Tensor> {
        let _guard = tch::no_grad_guard();
        let wide = |matrix: &Matrix| -> Result<Tensor> {
            let columns = matrix.range.len() as i64 / matrix.rows;
            let wide = matrix.form.widen(matrix.range.len() as i64, matrix.rows, matrix.rounds)?;
            let wide = matrix.rounds.map_or(Ok(wide.shallow_clone()), |kind| wide.f_to_kind(kind))?;
            let wide = wide.f_view([matrix.rows, columns])?.f_to_kind(self.kind)?;
            Ok(matrix
                .order
                .as_ref()
                .map_or(Ok(wide.shallow_clone()), |order| wide.f_index_select(0, order))?)
        };
        if self.within(weight).map(|matrix| matrix.range.len()).sum::<usize>() < weight.len() {
            return Err(super::in_part());
        }
        let all = self.within(weight).map(wide).collect::<Result<Vec<Tensor>>>()?;
        match &all[..] {
            [] => Err(Error::of("a matrix in few bits is not there")),
            [one] => Ok(one.shallow_clone()),
            all => Ok(Tensor::f_cat(all, 0)?),
        }
    }

    fn within<'a>(&'a self, weight: &'a Range<usize>) -> impl Iterator<Item = &'a Matrix> {
        let first = self.matrices.partition_point(|matrix| matrix.range.start < weight.start);
        self.matrices.iter().skip(first).take_while(|matrix| matrix.range.end <= weight.end)
    }
}

impl Form {
    fn new(codes: Codes, device: Device) -> Result<Form> {
        let floats =
            |numbers: &[f32]| -> Result<Tensor> { Ok(Tensor::f_from_slice(numbers)?.f_to_device(device)?) };
        let bytes =
            |bytes: &[u8]| -> Result<Tensor> { Ok(Tensor::f_from_slice(bytes)?.f_to_device(device)?) };
        Ok(match codes {
            Codes::FourBit(FourBit { map, block, codes, scales }) => {
                let values = map.values();
                let pairs: Vec<f32> =
                    (0..256).flat_map(|byte| [values[byte >> 4], values[byte & 15]]).collect();
                let scales = match scales {
                    Scales::Plain(scales) => Nested::Plain(floats(scales)?),
                    Scales::Double(Double { codes, largest, map, offset }) => Nested::Double {
                        map: floats(map)?,
                        codes: bytes(codes)?,
                        largest: floats(largest)?,
                        offset: f64::from(offset),
                    },
                };
                let pairs = floats(&pairs)?.f_view([256, 2])?;
                Form::FourBit { pairs, codes: bytes(codes)?, block: block as i64, scales }
            }
            Codes::Int8(Int8 { codes, scales }) => Form::Int8 {
                codes: Tensor::f_from_slice(codes)?.f_to_device(device)?,
                scales: floats(scales)?.f_unsqueeze(1)?,
            },
            Codes::Hqq(Hqq { groups, codes, scales, zeros }) => {
                if groups.axis != HqqAxis::One {
                    return Err(Error::of(
                        "groups of HQQ lie one below the other, which executor = \"cpu\" alone computes; set it",
                    ));
                }
                let cells = match groups.bits.cell() {
                    (_, 1) => bytes(codes)?,
                    _ => {
                        let words = codes.as_chunks::<4>().0.iter().map(|word| i32::from_le_bytes(*word));
                        Tensor::f_from_slice(&words.collect::<Vec<i32>>())?.f_to_device(device)?
                    }
                };
                Form::Hqq {
                    cells: cells.f_view([-1, groups.size as i64])?,
                    bits: groups.bits,
                    scales: floats(scales)?.f_unsqueeze(1)?,
                    zeros: floats(zeros)?.f_unsqueeze(1)?,
                }
            }
        })
    }

    /// All `len` numbers in fp32. What is computed before the last product is rounded to `rounds`.
    fn widen(&self, len: i64, rows: i64, rounds: Option<Kind>) -> Result<Tensor> {
        match self {
            Form::FourBit { pairs, codes, block, scales } => {
                let numbers = pairs.f_index_select(0, &codes.f_to_kind(Kind::Int)?)?.f_view([-1])?;
                let blocks = (len + block - 1) / block;
                // The last block may be shorter.
                let whole = numbers.f_constant_pad_nd([0, blocks * block - numbers.size()[0]])?;
                let scaled = whole.f_view([blocks, *block])?.f_mul(&scales.of(blocks)?.f_unsqueeze(1)?)?;
                Ok(scaled.f_view([-1])?.f_narrow(0, 0, len)?)
            }
            Form::Int8 { codes, scales } => {
                let numbers = codes.f_view([rows, -1])?.f_to_kind(Kind::Float)?;
                Ok(numbers.f_mul(scales)?.f_mul_scalar(f64::from(INT8_STEP))?)
            }
            Form::Hqq { cells, bits, scales, zeros } => {
                let (lines, count) = (bits.cell().0 as i64, bits.count() as i64);
                let line = |number: i64| -> Result<Tensor> {
                    let shifted = cells.f_bitwise_right_shift_tensor_scalar(count * (lines - 1 - number))?;
                    Ok(shifted.f_bitwise_and((1 << count) - 1)?.f_to_kind(Kind::Float)?)
                };
                let all = Tensor::f_cat(&(0..lines).map(line).collect::<Result<Vec<Tensor>>>()?, 0)?;
                let mut less = all.f_narrow(0, 0, scales.size()[0])?.f_sub(zeros)?;
                if let Some(kind) = rounds {
                    less = less.f_to_kind(kind)?.f_to_kind(Kind::Float)?;
                }
                Ok(less.f_mul(scales)?)
            }
        }
    }
}

impl Nested {
    fn of(&self, blocks: i64) -> Result<Tensor> {
        match self {
            Nested::Plain(scales) => Ok(scales.shallow_clone()),
            Nested::Double { map, codes, largest, offset } => {
                let numbers = map.f_index_select(0, &codes.f_to_kind(Kind::Int)?)?;
                let of_scales = largest.f_repeat_interleave_self_int(NESTED_BLOCK as i64, 0, None::<i64>)?;
                Ok(numbers.f_mul(&of_scales.f_narrow(0, 0, blocks)?)?.f_add_scalar(*offset)?)
            }
        }
    }
}
