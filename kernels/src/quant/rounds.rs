//! Types of fewer bits than f32 in which the numbers that codes stand for are meant.

/// What numbers are rounded to, ties to even.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rounds {
    Bf16,
    F16,
}

/// The smallest number of f16 that has all of its bits, as bits of an f32.
const F16_NORMAL: u32 = 113 << 23;
const F16_MAX: f32 = 65504.0;

impl Rounds {
    /// Finite numbers.
    #[inline(always)]
    pub fn all(self, numbers: &mut [f32]) {
        match self {
            Rounds::Bf16 => numbers.iter_mut().for_each(|x| *x = bf16(*x)),
            Rounds::F16 => numbers.iter_mut().for_each(|x| *x = f16(*x)),
        }
    }

    /// A finite number.
    #[inline(always)]
    pub(super) fn one(self, number: f32) -> f32 {
        match self {
            Rounds::Bf16 => bf16(number),
            Rounds::F16 => f16(number),
        }
    }
}

#[inline(always)]
fn bf16(x: f32) -> f32 {
    let bits = x.to_bits();
    f32::from_bits(bits.wrapping_add(0x7fff + (bits >> 16 & 1)) & !0xffff)
}

/// Without a branch, so that it is done for several numbers at once.
#[inline(always)]
fn f16(x: f32) -> f32 {
    let (sign, amount) = (x.to_bits() & 1 << 31, x.to_bits() & !(1 << 31));
    let normal = f32::from_bits((amount + 0xfff + (amount >> 13 & 1)) & !0x1fff);
    // Numbers below are multiples of 2^-24, which are the last bits of those between 0.5 and 1.
    let small = f32::from_bits(amount) + 0.5 - 0.5;
    let rounded = if amount < F16_NORMAL { small } else { normal };
    let rounded = if rounded > F16_MAX { f32::INFINITY } else { rounded };
    f32::from_bits(rounded.to_bits() | sign)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_rounded_as_by_the_types_themselves() {
        let near_f16 = (0..0x7c00u16).map(|bits| half::f16::from_bits(bits).to_f32());
        let beside = near_f16.flat_map(|x| {
            let step = half::f16::from_f32(x).to_bits();
            let half_way = (x + half::f16::from_bits(step + 1).to_f32()) / 2.0;
            [x, half_way, half_way.next_down(), half_way.next_up()]
        });
        let spread =
            (0..200_000u32).map(|i| f32::from_bits(i.wrapping_mul(21_401))).filter(|x| x.is_finite());
        for x in beside.chain(spread).filter(|x| x.is_finite()).flat_map(|x| [x, -x]) {
            let (is, wanted) = (Rounds::F16.one(x), half::f16::from_f32(x).to_f32());
            assert_eq!(is.to_bits(), wanted.to_bits(), "{x:e}: {is:e} {wanted:e}");
            let (is, wanted) = (Rounds::Bf16.one(x), half::bf16::from_f32(x).to_f32());
            assert_eq!(is.to_bits(), wanted.to_bits(), "{x:e}: {is:e} {wanted:e}");
        }
    }
}
