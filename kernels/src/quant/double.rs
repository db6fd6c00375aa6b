//! The scales of blocks: plain, or themselves in 8 bits (double quantisation of QLoRA, as bitsandbytes has it).

use std::sync::OnceLock;

/// A scale for each block.
#[derive(Clone, Copy, Debug)]
pub enum Scales<'a> {
    Plain(&'a [f32]),
    Double(Double<'a>),
}

/// Scales in 8 bits: `map[codes[i]] * largest[i / 256] + offset`.
#[derive(Clone, Copy, Debug)]
pub struct Double<'a> {
    pub codes: &'a [u8],
    /// One for each [`NESTED_BLOCK`] of the codes.
    pub largest: &'a [f32],
    /// What codes stand for, ascending; see [`dynamic_map`].
    pub map: &'a [f32; 256],
    /// The mean of the scales.
    pub offset: f32,
}

/// Codes of scales that share a scale themselves.
pub const NESTED_BLOCK: usize = 256;

impl Scales<'_> {
    pub(super) fn check(&self, blocks: usize) {
        match self {
            Scales::Plain(scales) => assert_eq!(scales.len(), blocks, "scales of {blocks} blocks"),
            Scales::Double(double) => {
                assert_eq!(double.codes.len(), blocks, "codes of the scales of {blocks} blocks");
                assert_eq!(double.largest.len(), blocks.div_ceil(NESTED_BLOCK), "scales of the scales");
            }
        }
    }

    #[inline(always)]
    pub(super) fn scale(&self, block: usize) -> f32 {
        match self {
            Scales::Plain(scales) => scales[block],
            Scales::Double(double) => {
                double.map[usize::from(double.codes[block])] * double.largest[block / NESTED_BLOCK]
                    + double.offset
            }
        }
    }
}

/// The signed dynamic map of 8 bits (arXiv:1511.04561): 0, 1, and for each of seven powers of ten twice as many fractions as for the one below.
pub fn dynamic_map() -> &'static [f32; 256] {
    static MAP: OnceLock<[f32; 256]> = OnceLock::new();
    MAP.get_or_init(|| {
        let mut map = [0.0; 256];
        map[1] = 1.0;
        let mut at = 2;
        for exponent in 0..7 {
            let steps = 1 << exponent;
            let power = 10f64.powi(exponent - 6) as f32;
            let bounds: Vec<f32> = (0..=steps).map(|i| bound(i, steps)).collect();
            for pair in bounds.windows(2) {
                let fraction = power * ((pair[0] + pair[1]) / 2.0);
                (map[at], map[at + 1]) = (fraction, -fraction);
                at += 2;
            }
        }
        map.sort_by(f32::total_cmp);
        map
    })
}

/// The `i`th of `steps` equal steps from 0.1 to 1, counted from the nearer end as PyTorch does.
fn bound(i: i32, steps: i32) -> f32 {
    let step = (1.0 - 0.1) / steps as f32;
    if i < (steps + 1) / 2 { step.mul_add(i as f32, 0.1) } else { (-step).mul_add((steps - i) as f32, 1.0) }
}

/// Quantises the scales of blocks: codes (as many), `largest` (one for each [`NESTED_BLOCK`]), and the offset, which is returned. As
/// bitsandbytes 0.50 has it on x86, where a number's code is found in steps of 1 / 32767.5; its offset is PyTorch's mean in one thread. More
/// threads add in another order, and PyTorch takes them from 32768 scales on: there the last bit of the offset may differ.
pub fn double_quantise(scales: &[f32], codes: &mut [u8], largest: &mut [f32]) -> f32 {
    assert_eq!(codes.len(), scales.len(), "double_quantise: codes");
    assert_eq!(largest.len(), scales.len().div_ceil(NESTED_BLOCK), "double_quantise: scales of the scales");
    let offset = mean(scales);
    let map = dynamic_map();
    let blocks = scales.chunks(NESTED_BLOCK).zip(codes.chunks_mut(NESTED_BLOCK));
    for ((scales, codes), largest) in blocks.zip(largest) {
        *largest = scales.iter().fold(0.0, |largest, v| (v - offset).abs().max(largest));
        if *largest == 0.0 {
            codes.fill(0);
            continue;
        }
        let inverse = 1.0 / *largest;
        for (scale, code) in scales.iter().zip(codes) {
            let value = ((scale - offset) * inverse).clamp(-1.0, 1.0);
            let step = ((value + 1.0) * 0.5).mul_add(65535.0, 0.5) as u16;
            let value = -1.0 + 2.0 * f32::from(step) / 65535.0;
            let bounds = map.windows(2).take_while(|pair| 0.5 * (pair[0] + pair[1]) < value);
            *code = bounds.count() as u8; // fewer than 256 pairs
        }
    }
    offset
}

/// Lanes in which PyTorch adds.
const LANES: usize = 8;

/// PyTorch's mean of one row in one thread.
pub(super) fn mean(x: &[f32]) -> f32 {
    let sum = if x.len() < LANES {
        row_sum::<1>(x.as_chunks().0)[0]
    } else {
        let (vectors, rest) = x.as_chunks::<LANES>();
        let rest = rest.iter().fold(0.0, |sum, v| sum + v);
        row_sum(vectors).into_iter().fold(rest, |sum, v| sum + v)
    };
    sum / x.len() as f32
}

/// PyTorch's mean of one column.
pub(super) fn cascade_mean(x: &[f32]) -> f32 {
    let [[sum]] = cascade_sum::<1, 1>(x.as_chunks::<1>().0.as_chunks().0);
    sum / x.len() as f32
}

/// Four sums side by side.
fn row_sum<const N: usize>(x: &[[f32; N]]) -> [f32; N] {
    const STREAMS: usize = 4;
    let (rows, rest) = x.as_chunks::<STREAMS>();
    let [first, others @ ..] = cascade_sum(rows);
    let first = rest.iter().fold(first, add);
    others.iter().fold(first, add)
}

/// Sums of sums, in four levels, so that no sum has many terms.
fn cascade_sum<const N: usize, const S: usize>(rows: &[[[f32; N]; S]]) -> [[f32; N]; S] {
    const LEVELS: usize = 4;
    let power = (rows.len().next_power_of_two().trailing_zeros() as usize / LEVELS).max(4);
    let mut levels = [[[0.0f32; N]; S]; LEVELS];
    let whole = rows.len() >> power << power;
    for (i, row) in rows.iter().enumerate() {
        add_all(&mut levels[0], row);
        let done = i + 1;
        if done <= whole && done.is_multiple_of(1 << power) {
            for level in 1..LEVELS {
                let below = std::mem::replace(&mut levels[level - 1], [[0.0; N]; S]);
                add_all(&mut levels[level], &below);
                if done & (((1 << power) - 1) << (level * power)) != 0 {
                    break;
                }
            }
        }
    }
    let [mut sum, others @ ..] = levels;
    others.iter().for_each(|level| add_all(&mut sum, level));
    sum
}

fn add<const N: usize>(mut a: [f32; N], b: &[f32; N]) -> [f32; N] {
    a.iter_mut().zip(b).for_each(|(a, b)| *a += b);
    a
}

fn add_all<const N: usize, const S: usize>(to: &mut [[f32; N]; S], from: &[[f32; N]; S]) {
    to.iter_mut().zip(from).for_each(|(to, from)| *to = add(*to, from));
}
