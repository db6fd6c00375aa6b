//! Half-quadratic quantisation as the package `hqq` has it: a scale and a zero for each group, zeros fitted so that few large errors remain
//! rather than many small ones.

use super::Rounds;
use super::double::{cascade_mean, mean};
use crate::Element;

/// How a flat, row-major matrix is cut into groups, and its codes into bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HqqGroups {
    pub bits: HqqBits,
    pub axis: HqqAxis,
    /// Numbers of a group. Divides those of the matrix.
    pub size: usize,
}

/// Bits of a code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HqqBits {
    One,
    Two,
    /// Ten codes in a word of 32 bits.
    Three,
    Four,
    Eight,
}

/// How the numbers of a group lie in the flat matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HqqAxis {
    /// One for each of `size` equal parts: the matrix as `[size, groups]`.
    Zero,
    /// Side by side: the matrix as `[groups, size]`.
    One,
}

/// Codes of a flat, row-major matrix; a code stands for `(code - zeros[group]) * scales[group]`.
#[derive(Clone, Copy, Debug)]
pub struct Hqq<'a> {
    pub groups: HqqGroups,
    /// Lines of the matrix as [`HqqAxis`] has it, several on top of each other, the first in the highest bits: cell `r` has lines `r`,
    /// `r + step`, `r + 2 step`, ... A cell is a byte, for three bits a little-endian word.
    pub codes: &'a [u8],
    pub scales: &'a [f32],
    pub zeros: &'a [f32],
}

impl HqqBits {
    /// The number of bits, if it is one of these.
    pub fn of(bits: u64) -> Option<HqqBits> {
        Some(match bits {
            1 => HqqBits::One,
            2 => HqqBits::Two,
            3 => HqqBits::Three,
            4 => HqqBits::Four,
            8 => HqqBits::Eight,
            _ => return None,
        })
    }

    /// How many they are.
    pub fn count(self) -> usize {
        match self {
            HqqBits::One => 1,
            HqqBits::Two => 2,
            HqqBits::Three => 3,
            HqqBits::Four => 4,
            HqqBits::Eight => 8,
        }
    }

    /// Codes in a cell, and its bytes.
    pub fn cell(self) -> (usize, usize) {
        match self {
            HqqBits::Three => (10, 4),
            bits => (8 / bits.count(), 1),
        }
    }

    fn largest(self) -> f32 {
        ((1u32 << self.count()) - 1) as f32
    }
}

impl HqqGroups {
    /// Groups of `numbers`: so many scales and zeros there are.
    pub fn count(&self, numbers: usize) -> usize {
        assert!(
            self.size > 0 && numbers.is_multiple_of(self.size),
            "groups of {} do not divide {numbers} numbers",
            self.size
        );
        numbers / self.size
    }

    /// Bytes of the codes of `numbers`.
    ///
    /// # Panics
    /// If the lines do not fill whole bytes, which HQQ does not pack either; the last words of three bits may have room left.
    pub fn bytes(&self, numbers: usize) -> usize {
        let (lines, line) = self.lines(numbers);
        let (codes, bytes) = self.bits.cell();
        assert!(
            bytes > 1 || lines.is_multiple_of(codes),
            "{lines} lines of {} bits do not fill bytes",
            self.bits.count()
        );
        lines.div_ceil(codes) * line * bytes
    }

    /// Lines and their length.
    fn lines(&self, numbers: usize) -> (usize, usize) {
        let groups = self.count(numbers);
        match self.axis {
            HqqAxis::Zero => (self.size, groups),
            HqqAxis::One => (groups, self.size),
        }
    }

    fn group(&self, line: usize, col: usize) -> usize {
        match self.axis {
            HqqAxis::Zero => col,
            HqqAxis::One => line,
        }
    }
}

impl Hqq<'_> {
    pub(super) fn check(&self, numbers: usize) {
        let groups = self.groups.count(numbers);
        assert_eq!((self.scales.len(), self.zeros.len()), (groups, groups), "scales and zeros of groups");
        assert_eq!(self.codes.len(), self.groups.bytes(numbers), "codes of {numbers} numbers");
    }

    pub(super) fn number(&self, at: usize, rounds: Option<Rounds>) -> f32 {
        let mut number = [0.0];
        self.decode(at, rounds, &mut number);
        number[0]
    }

    /// The difference is rounded; the product is left to be.
    #[inline(always)]
    pub(super) fn decode(&self, at: usize, rounds: Option<Rounds>, to: &mut [f32]) {
        let less = |code: f32, zero: f32| rounds.map_or(code - zero, |rounds| rounds.one(code - zero));
        let HqqGroups { bits, axis, size } = self.groups;
        let line_len = if axis == HqqAxis::One { size } else { self.scales.len() };
        let (per_cell, bytes) = bits.cell();
        let step = self.codes.len() / bytes / line_len;
        let (mut line, mut col, mut to) = (at / line_len, at % line_len, to);
        let (mut row, mut shift) = (line % step, bits.count() * (per_cell - 1 - line / step));
        while !to.is_empty() {
            let (piece, rest) = to.split_at_mut((line_len - col).min(to.len()));
            let cells = &self.codes[(row * line_len + col) * bytes..][..piece.len() * bytes];
            unpack(cells, bits, shift, piece);
            match axis {
                HqqAxis::One => {
                    let (scale, zero) = (self.scales[line], self.zeros[line]);
                    piece.iter_mut().for_each(|v| *v = less(*v, zero) * scale);
                }
                HqqAxis::Zero => {
                    let groups = self.scales[col..].iter().zip(&self.zeros[col..]);
                    piece.iter_mut().zip(groups).for_each(|(v, (scale, zero))| *v = less(*v, *zero) * scale);
                }
            }
            (to, line, row, col) = (rest, line + 1, row + 1, 0);
            if row == step {
                (row, shift) = (0, shift.wrapping_sub(bits.count())); // wraps behind the last line alone
            }
        }
    }
}

#[inline(always)]
fn unpack(cells: &[u8], bits: HqqBits, shift: usize, to: &mut [f32]) {
    let mask = (1u32 << bits.count()) - 1;
    match bits {
        HqqBits::Three => {
            for (to, cell) in to.iter_mut().zip(cells.as_chunks::<4>().0) {
                *to = (u32::from_le_bytes(*cell) >> shift & mask) as f32;
            }
        }
        _ => to.iter_mut().zip(cells).for_each(|(to, cell)| *to = (u32::from(*cell) >> shift & mask) as f32),
    }
}

/// Largest scale, and the smallest spread that has one, before the scale is inverted.
const SCALE_MAX: f32 = 2e4;
const SPREAD_MIN: f32 = 1e-4;

/// Codes, scales and zeros of `x`, whose lengths [`HqqGroups`] says, as `hqq` 0.2.8 finds them on the CPU with its default optimiser: up to
/// twenty rounds in which zeros move to where the error shrunk by `|error|^-0.3 / 10` is least, while the mean error falls. All of `x`
/// are finite. Powers are rounded differently than PyTorch's, so that zeros may differ in their last bits.
pub fn quantise_hqq<T: Element>(
    x: &[T],
    groups: HqqGroups,
    codes: &mut [u8],
    scales: &mut [f32],
    zeros: &mut [f32],
) {
    let count = groups.count(x.len());
    assert_eq!((scales.len(), zeros.len()), (count, count), "quantise: scales and zeros");
    assert_eq!(codes.len(), groups.bytes(x.len()), "quantise: codes");
    let mut wide = vec![0.0; x.len()];
    crate::convert(x, &mut wide);
    let (_, line_len) = groups.lines(x.len());
    let grid = Grid { groups, line_len, largest: groups.bits.largest() };
    grid.spread(&wide, scales, zeros);
    grid.fit(&wide, scales, zeros);
    let nearest: Vec<u8> = grid
        .numbers(&wide)
        .map(|(x, group)| grid.code(x, scales[group], zeros[group]) as u8) // 0..=255
        .collect();
    pack(&nearest, groups.bits, line_len, codes);
    scales.iter_mut().for_each(|scale| *scale = 1.0 / *scale);
}

/// The groups of one matrix while its zeros are looked for. Scales are the inverse of those that are kept.
struct Grid {
    groups: HqqGroups,
    line_len: usize,
    largest: f32,
}

impl Grid {
    /// Each number with its group.
    fn numbers<'a>(&'a self, x: &'a [f32]) -> impl Iterator<Item = (f32, usize)> + 'a {
        x.chunks(self.line_len).enumerate().flat_map(move |(line, numbers)| {
            numbers.iter().enumerate().map(move |(col, x)| (*x, self.groups.group(line, col)))
        })
    }

    fn code(&self, x: f32, scale: f32, zero: f32) -> f32 {
        (x * scale + zero).round_ties_even().clamp(0.0, self.largest)
    }

    /// From the smallest to the largest of each group.
    fn spread(&self, x: &[f32], scales: &mut [f32], zeros: &mut [f32]) {
        let (least, most) = (zeros, scales);
        least.fill(f32::INFINITY);
        most.fill(f32::NEG_INFINITY);
        for (x, group) in self.numbers(x) {
            least[group] = least[group].min(x);
            most[group] = most[group].max(x);
        }
        for (least, most) in least.iter_mut().zip(most) {
            let spread = *most - *least;
            let scale = if spread <= SPREAD_MIN { 1.0 } else { 1.0 / spread * self.largest };
            (*most, *least) = (scale.min(SCALE_MAX), -*least * scale.min(SCALE_MAX));
        }
    }

    fn fit(&self, x: &[f32], scales: &[f32], zeros: &mut [f32]) {
        const ROUNDS: usize = 20;
        let mut best = f32::INFINITY;
        let (mut errors, mut wanted) = (vec![0.0; x.len()], vec![0.0; x.len()]);
        for _ in 0..ROUNDS {
            for (((x, group), error), wanted) in self.numbers(x).zip(&mut errors).zip(&mut wanted) {
                let (scale, zero) = (scales[group], zeros[group]);
                let code = self.code(x, scale, zero);
                let off = x - (code - zero) / scale;
                *error = off.abs();
                *wanted = code - (x - shrunk(off)) * scale;
            }
            self.means(&wanted, zeros);
            let error = mean(&errors);
            if error >= best {
                return;
            }
            best = error;
        }
    }

    /// The mean of each group.
    fn means(&self, x: &[f32], to: &mut [f32]) {
        match self.groups.axis {
            HqqAxis::One => to.iter_mut().zip(x.chunks(self.line_len)).for_each(|(to, x)| *to = mean(x)),
            HqqAxis::Zero => {
                let mut column = vec![0.0; self.groups.size];
                for (col, to) in to.iter_mut().enumerate() {
                    let numbers = x[col..].iter().step_by(self.line_len);
                    column.iter_mut().zip(numbers).for_each(|(to, x)| *to = *x);
                    *to = cascade_mean(&column);
                }
            }
        }
    }
}

/// How much is taken from an error, as a share of its power.
const INVERSE_BETA: f32 = 0.1;

/// `sign(x) max(|x| - |x|^-0.3 / beta, 0)`.
fn shrunk(x: f32) -> f32 {
    let amount = x.abs();
    let power = f64::from(amount).powf(f64::from(-0.3f32)) as f32;
    let left = (amount - INVERSE_BETA * power).max(0.0);
    if x == 0.0 { 0.0 } else { left.copysign(x) }
}

fn pack(codes: &[u8], bits: HqqBits, line_len: usize, cells: &mut [u8]) {
    let (per_cell, bytes) = bits.cell();
    let step = cells.len() / bytes / line_len.max(1);
    cells.fill(0);
    for (line, codes) in codes.chunks(line_len.max(1)).enumerate() {
        let shift = bits.count() * (per_cell - 1 - line / step);
        let cells = cells[line % step * line_len * bytes..].chunks_exact_mut(bytes);
        for (code, cell) in codes.iter().zip(cells) {
            for (to, part) in cell.iter_mut().zip((u32::from(*code) << shift).to_le_bytes()) {
                *to |= part;
            }
        }
    }
}
