//! NF4 and FP4 as bitsandbytes has them: sixteen numbers in -1..=1, times the largest amount of a block.

use super::Scales;
use crate::Element;
use crate::simd::{Vector, simd_fn};

/// Which sixteen numbers four bits stand for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FourBitMap {
    /// Quantiles of the normal distribution (QLoRA, arXiv:2305.14314).
    Nf4,
    /// A sign, two bits of exponent and one of fraction.
    Fp4,
}

/// Codes of a flat, row-major matrix.
#[derive(Clone, Copy, Debug)]
pub struct FourBit<'a> {
    pub map: FourBitMap,
    /// Numbers that share a scale: a power of two from 32 to 4096. Blocks go on from row to row; the last one may be shorter.
    pub block: usize,
    /// Two to a byte, the first in its high half.
    pub codes: &'a [u8],
    pub scales: Scales<'a>,
}

const NF4: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];
const FP4: [f32; 16] = [
    0.0,
    0.0625 / 12.0,
    8.0 / 12.0,
    1.0,
    4.0 / 12.0,
    6.0 / 12.0,
    2.0 / 12.0,
    3.0 / 12.0,
    0.0,
    -0.0625 / 12.0,
    -8.0 / 12.0,
    -1.0,
    -4.0 / 12.0,
    -6.0 / 12.0,
    -2.0 / 12.0,
    -3.0 / 12.0,
];

impl FourBitMap {
    /// What each code stands for, before its block's scale.
    pub const fn values(self) -> &'static [f32; 16] {
        match self {
            FourBitMap::Nf4 => &NF4,
            FourBitMap::Fp4 => &FP4,
        }
    }

    /// Codes in the order of their numbers. FP4 has two zeros: that of code 8 is taken for numbers above 0.
    const fn order(self) -> [u8; 16] {
        match self {
            FourBitMap::Nf4 => [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15],
            FourBitMap::Fp4 => [11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3],
        }
    }

    /// Half way between one number and the next.
    fn bounds(self) -> [f32; 15] {
        let sorted = self.order().map(|code| self.values()[usize::from(code)]);
        std::array::from_fn(|i| (sorted[i] + sorted[i + 1]) / 2.0)
    }
}

impl FourBit<'_> {
    pub(super) fn check(&self, numbers: usize) {
        check_block(self.block);
        assert_eq!(self.codes.len(), numbers.div_ceil(2), "codes of {numbers} numbers");
        self.scales.check(numbers.div_ceil(self.block));
    }

    pub(super) fn number(&self, at: usize) -> f32 {
        let byte = self.codes[at / 2];
        let code = if at.is_multiple_of(2) { byte >> 4 } else { byte & 15 };
        self.map.values()[usize::from(code)] * self.scales.scale(at / self.block)
    }

    #[inline(always)]
    pub(super) fn decode<V: Vector>(&self, at: usize, to: &mut [f32]) {
        let table = self.map.values();
        let (head, mut to) = to.split_at_mut((at % 2).min(to.len()));
        for first in head {
            *first = self.number(at);
        }
        // Blocks are even, so that what follows begins with a byte.
        let (mut at, shift) = (at.next_multiple_of(2), self.block.trailing_zeros());
        while !to.is_empty() {
            let left = self.block - (at & (self.block - 1));
            let (piece, rest) = to.split_at_mut(left.min(to.len()));
            let codes = &self.codes[at / 2..][..piece.len().div_ceil(2)];
            let scale = self.scales.scale(at >> shift);
            // A byte that is half of what is left belongs to it.
            let whole = piece.len() / V::LANES * V::LANES;
            let (vectors, left_over) = piece.split_at_mut(whole);
            let (bytes, tail) = codes.split_at(whole / 2);
            for (to, codes) in vectors.chunks_exact_mut(V::LANES).zip(bytes.chunks_exact(V::LANES / 2)) {
                // SAFETY: `to` is one vector long, `codes` half as many bytes.
                unsafe { V::look_up(table, codes.as_ptr()).mul(V::splat(scale)).store(to.as_mut_ptr()) };
            }
            for (i, to) in left_over.iter_mut().enumerate() {
                *to = table[usize::from(tail[i / 2] >> (4 - i % 2 * 4) & 15)] * scale;
            }
            at += left;
            to = rest;
        }
    }
}

fn check_block(block: usize) {
    assert!(block.is_power_of_two() && (32..=4096).contains(&block), "a block of {block} numbers");
}

/// The smallest scale that a short last block gets.
const LEAST: f32 = 1e-38;

/// Codes of `x`, `[x.len() / 2]`, and the largest amount of each block, `[x.len() / block]`, both rounded up, bit for bit as bitsandbytes
/// 0.50 has them on the CPU: ties go to the lower number, a short last block is divided by its scale where whole ones are multiplied by its
/// inverse. All of `x` are finite. A matrix may be cut anywhere between two blocks.
pub fn quantise_four_bit<T: Element>(
    x: &[T],
    map: FourBitMap,
    block: usize,
    codes: &mut [u8],
    scales: &mut [f32],
) {
    check_block(block);
    assert_eq!(codes.len(), x.len().div_ceil(2), "quantise: codes");
    assert_eq!(scales.len(), x.len().div_ceil(block), "quantise: scales");
    let (bounds, order) = (map.bounds(), map.order());
    let (mut scaled, mut ranks) = (vec![0.0f32; block], vec![0u8; block]);
    for ((x, codes), scale) in x.chunks(block).zip(codes.chunks_mut(block / 2)).zip(scales) {
        let (scaled, ranks) = (&mut scaled[..x.len()], &mut ranks[..x.len().next_multiple_of(2)]);
        crate::convert(x, scaled);
        *scale = scaled.iter().fold(0.0, |largest, v| v.abs().max(largest));
        if x.len() == block {
            let inverse = 1.0 / scale.max(LEAST);
            scaled.iter_mut().for_each(|v| *v *= inverse);
        } else {
            *scale = scale.max(LEAST);
            scaled.iter_mut().for_each(|v| *v /= *scale);
        }
        // Half a byte that is left over has the code of zero.
        ranks[x.len()..].fill(ZERO_RANK);
        rank(scaled, &bounds, &mut ranks[..x.len()]);
        for (pair, code) in ranks.chunks_exact(2).zip(codes) {
            *code = order[usize::from(pair[0])] << 4 | order[usize::from(pair[1])];
        }
    }
}

/// Where zero stands in the order of both maps.
const ZERO_RANK: u8 = 7;

simd_fn! {
    /// How many bounds lie below each number.
    fn rank<V>(x: &[f32], bounds: &[f32; 15], to: &mut [u8]) {
        for (x, to) in x.iter().zip(to) {
            *to = bounds.iter().map(|bound| u8::from(x > bound)).sum();
        }
    }
}
