//! Element-wise reduction of several buffers, in the order given, in one pass over memory.
//!
//! Plain Rust that the compiler vectorises, compiled three times (baseline, AVX2, AVX-512) and chosen by the CPU at run time. All
//! three give the same bits: each element is reduced by itself, in order, without reassociation or contraction.

#![allow(unsafe_code)]

use crate::dtype::{DType, Op};

/// Elements reduced at a time: their accumulators stay in the L1 cache while the sources stream by.
const TILE: usize = 1024;

trait Element: Copy {
    /// What is summed: wider than the element where rounding every step would lose bits.
    type Wide: Copy;
    const ZERO: Self::Wide;
    fn widen(self) -> Self::Wide;
    fn narrow(wide: Self::Wide) -> Self;
    fn sum(a: Self::Wide, b: Self::Wide) -> Self::Wide;
    fn max(a: Self::Wide, b: Self::Wide) -> Self::Wide;
}

macro_rules! float {
    ($type:ty) => {
        impl Element for $type {
            type Wide = $type;
            const ZERO: $type = 0.0;
            #[inline(always)]
            fn widen(self) -> $type {
                self
            }
            #[inline(always)]
            fn narrow(wide: $type) -> $type {
                wide
            }
            #[inline(always)]
            fn sum(a: $type, b: $type) -> $type {
                a + b
            }
            #[inline(always)]
            fn max(a: $type, b: $type) -> $type {
                if b > a || b.is_nan() { b } else { a }
            }
        }
    };
}

macro_rules! integer {
    ($type:ty) => {
        impl Element for $type {
            type Wide = $type;
            const ZERO: $type = 0;
            #[inline(always)]
            fn widen(self) -> $type {
                self
            }
            #[inline(always)]
            fn narrow(wide: $type) -> $type {
                wide
            }
            #[inline(always)]
            fn sum(a: $type, b: $type) -> $type {
                a.wrapping_add(b)
            }
            #[inline(always)]
            fn max(a: $type, b: $type) -> $type {
                if b > a { b } else { a }
            }
        }
    };
}

float!(f32);
float!(f64);
integer!(i32);
integer!(i64);
integer!(u64);
integer!(u8);

/// The bits of a bfloat16.
#[derive(Clone, Copy)]
struct Bf16(u16);

impl Element for Bf16 {
    type Wide = f32;
    const ZERO: f32 = 0.0;
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.0) << 16)
    }
    /// Rounds to nearest, ties to even; NaN stays NaN. Without branches, so that it vectorises.
    #[inline(always)]
    fn narrow(wide: f32) -> Bf16 {
        let bits = wide.to_bits();
        let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
        let quiet = (bits >> 16) | 0x40;
        Bf16(if wide.is_nan() { quiet as u16 } else { rounded as u16 })
    }
    #[inline(always)]
    fn sum(a: f32, b: f32) -> f32 {
        a + b
    }
    #[inline(always)]
    fn max(a: f32, b: f32) -> f32 {
        <f32 as Element>::max(a, b)
    }
}

/// The bits of an IEEE half.
#[derive(Clone, Copy)]
struct F16(u16);

impl Element for F16 {
    type Wide = f32;
    const ZERO: f32 = 0.0;
    /// Exact. Without branches, so that it vectorises: exponents are moved by a product, which is right for subnormals too.
    #[inline(always)]
    fn widen(self) -> f32 {
        let magnitude = u32::from(self.0 & 0x7fff) << 13;
        let finite = f32::from_bits(magnitude) * f32::from_bits((127 + 112) << 23);
        let bits = if magnitude >= 0x7c00 << 13 { magnitude | 0x7f80_0000 } else { finite.to_bits() };
        f32::from_bits(bits | u32::from(self.0 & 0x8000) << 16)
    }
    /// Rounds to nearest, ties to even; NaN stays NaN. Subnormals are rounded by the adder, at the place where their last bit is.
    #[inline(always)]
    fn narrow(wide: f32) -> F16 {
        const LAST_PLACE: f32 = 0.5;
        let sign = wide.to_bits() & 0x8000_0000;
        let magnitude = wide.to_bits() ^ sign;
        let odd = (magnitude >> 13) & 1;
        let normal = magnitude.wrapping_sub(112 << 23).wrapping_add(0xfff + odd) >> 13;
        let subnormal = (f32::from_bits(magnitude) + LAST_PLACE).to_bits().wrapping_sub(LAST_PLACE.to_bits());
        let finite = if magnitude < 113 << 23 { subnormal } else { normal };
        let special = if magnitude > 0x7f80_0000 { 0x7e00 } else { 0x7c00 };
        let half = if magnitude >= (127 + 16) << 23 { special } else { finite };
        F16((half | sign >> 16) as u16)
    }
    #[inline(always)]
    fn sum(a: f32, b: f32) -> f32 {
        a + b
    }
    #[inline(always)]
    fn max(a: f32, b: f32) -> f32 {
        <f32 as Element>::max(a, b)
    }
}

/// The contract of `reduce`.
#[inline(always)]
unsafe fn tiles<E: Element, const SUM: bool>(sources: &[*const u8], results: &[*mut u8], elements: usize) {
    let mut wide = [E::ZERO; TILE];
    let mut done = 0;
    while done < elements {
        let count = TILE.min(elements - done);
        let wide = &mut wide[..count];
        for (number, source) in sources.iter().enumerate() {
            // SAFETY: the caller vouches for `elements` readable elements.
            let source = unsafe { source.cast::<E>().add(done) };
            for (i, wide) in wide.iter_mut().enumerate() {
                // SAFETY: as above; `read_unaligned` because buffers need no alignment.
                let next = unsafe { source.add(i).read_unaligned() }.widen();
                *wide = match (number, SUM) {
                    (0, _) => next,
                    (_, true) => E::sum(*wide, next),
                    (_, false) => E::max(*wide, next),
                };
            }
        }
        for result in results {
            // SAFETY: the caller vouches for `elements` writable elements.
            let result = unsafe { result.cast::<E>().add(done) };
            for (i, wide) in wide.iter().enumerate() {
                // SAFETY: as above. A source that is also a result was read before this tile is written.
                unsafe { result.add(i).write_unaligned(E::narrow(*wide)) }
            }
        }
        done += count;
    }
}

#[inline(always)]
unsafe fn every_type(sources: &[*const u8], results: &[*mut u8], elements: usize, dtype: DType, op: Op) {
    // SAFETY: the caller's contract, handed on.
    unsafe {
        match (dtype, op) {
            (DType::F32, Op::Sum) => tiles::<f32, true>(sources, results, elements),
            (DType::F32, Op::Max) => tiles::<f32, false>(sources, results, elements),
            (DType::Bf16, Op::Sum) => tiles::<Bf16, true>(sources, results, elements),
            (DType::Bf16, Op::Max) => tiles::<Bf16, false>(sources, results, elements),
            (DType::F16, Op::Sum) => tiles::<F16, true>(sources, results, elements),
            (DType::F16, Op::Max) => tiles::<F16, false>(sources, results, elements),
            (DType::F64, Op::Sum) => tiles::<f64, true>(sources, results, elements),
            (DType::F64, Op::Max) => tiles::<f64, false>(sources, results, elements),
            (DType::I32, Op::Sum) => tiles::<i32, true>(sources, results, elements),
            (DType::I32, Op::Max) => tiles::<i32, false>(sources, results, elements),
            (DType::I64, Op::Sum) => tiles::<i64, true>(sources, results, elements),
            (DType::I64, Op::Max) => tiles::<i64, false>(sources, results, elements),
            (DType::U64, Op::Sum) => tiles::<u64, true>(sources, results, elements),
            (DType::U64, Op::Max) => tiles::<u64, false>(sources, results, elements),
            (DType::U8, Op::Sum) => tiles::<u8, true>(sources, results, elements),
            (DType::U8, Op::Max) => tiles::<u8, false>(sources, results, elements),
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn avx2(sources: &[*const u8], results: &[*mut u8], elements: usize, dtype: DType, op: Op) {
    // SAFETY: the caller's contract, handed on.
    unsafe { every_type(sources, results, elements, dtype, op) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn avx512(sources: &[*const u8], results: &[*mut u8], elements: usize, dtype: DType, op: Op) {
    // SAFETY: the caller's contract, handed on.
    unsafe { every_type(sources, results, elements, dtype, op) }
}

/// Reduces `elements` elements of all `sources`, in their order, into every one of `results`.
///
/// # Safety
/// There is at least one source; each source is readable and each result writable for `elements` elements; a result is one of the
/// sources or overlaps none; nobody else writes to the sources or uses the results meanwhile.
pub(crate) unsafe fn reduce(
    sources: &[*const u8],
    results: &[*mut u8],
    elements: usize,
    dtype: DType,
    op: Op,
) {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512dq")
        {
            // SAFETY: the CPU has these instructions; the rest is the caller's contract.
            return unsafe { avx512(sources, results, elements, dtype, op) };
        }
        if is_x86_feature_detected!("avx2") {
            // SAFETY: the CPU has these instructions; the rest is the caller's contract.
            return unsafe { avx2(sources, results, elements, dtype, op) };
        }
    }
    // SAFETY: the caller's contract, handed on.
    unsafe { every_type(sources, results, elements, dtype, op) }
}

/// Which operand of a reduction is the first; sums of floats do not hang on it, which of two NaNs or zeros is kept does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum First {
    Own,
    Received,
}

/// `own` becomes the reduction of `own` and `received`, which have the same length of whole elements.
pub(crate) fn reduce_into(own: &mut [u8], received: &[u8], dtype: DType, op: Op, first: First) {
    assert!(own.len() == received.len() && own.len().is_multiple_of(dtype.size()), "operands of a reduction");
    let result = own.as_mut_ptr();
    let sources = match first {
        First::Own => [result.cast_const(), received.as_ptr()],
        First::Received => [received.as_ptr(), result.cast_const()],
    };
    // SAFETY: both have the length that was checked; the result is one of the sources, and borrowed by this call alone.
    unsafe { reduce(&sources, &[result], own.len() / dtype.size(), dtype, op) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::{bf16, f16};
    use proptest::prelude::*;

    fn run(buffers: &[Vec<u8>], dtype: DType, op: Op) -> Vec<u8> {
        let mut out = vec![0u8; buffers[0].len()];
        let sources: Vec<*const u8> = buffers.iter().map(|b| b.as_ptr()).collect();
        // SAFETY: every buffer has the length of the first; `out` overlaps none.
        unsafe { reduce(&sources, &[out.as_mut_ptr()], out.len() / dtype.size(), dtype, op) };
        out
    }

    proptest! {
        #[test]
        fn f32_sums_in_rank_order(values in prop::collection::vec(prop::array::uniform3(any::<f32>()), 0..3000)) {
            let buffers: Vec<Vec<u8>> =
                (0..3).map(|r| values.iter().flat_map(|v| v[r].to_ne_bytes()).collect()).collect();
            let sum = run(&buffers, DType::F32, Op::Sum);
            for (v, got) in values.iter().zip(sum.chunks_exact(4)) {
                let want = (v[0] + v[1]) + v[2];
                let got = f32::from_ne_bytes(got.try_into().unwrap());
                prop_assert!(want.to_bits() == got.to_bits() || want.is_nan() && got.is_nan());
            }
        }

        #[test]
        fn bf16_sums_in_f32_and_rounds_as_half_does(values in prop::collection::vec(any::<[u16; 2]>(), 0..3000)) {
            let buffers: Vec<Vec<u8>> =
                (0..2).map(|r| values.iter().flat_map(|v| v[r].to_ne_bytes()).collect()).collect();
            let sum = run(&buffers, DType::Bf16, Op::Sum);
            for (v, got) in values.iter().zip(sum.chunks_exact(2)) {
                let want = bf16::from_f32(bf16::from_bits(v[0]).to_f32() + bf16::from_bits(v[1]).to_f32());
                let got = bf16::from_bits(u16::from_ne_bytes(got.try_into().unwrap()));
                prop_assert!(want.to_bits() == got.to_bits() || want.is_nan() && got.is_nan());
            }
        }
    }

    #[test]
    fn halves_are_widened_and_rounded_as_half_does() {
        for bits in 0..=u16::MAX {
            let (ours, theirs) = (F16(bits).widen(), f16::from_bits(bits).to_f32());
            assert!(ours.to_bits() == theirs.to_bits() || ours.is_nan() && theirs.is_nan(), "{bits:#x}");
        }
        // All signs and exponents, and mantissas on both sides of every tie.
        for top in 0..=u16::MAX {
            for bottom in [0, 1, 0x0fff, 0x1000, 0x1001, 0x8000, 0xffff] {
                let wide = f32::from_bits(u32::from(top) << 16 | bottom);
                let (ours, theirs) = (F16::narrow(wide).0, f16::from_f32(wide));
                assert!(ours == theirs.to_bits() || wide.is_nan() && theirs.is_nan(), "{wide:e}: {ours:#x}");
            }
        }
    }

    #[test]
    fn the_first_operand_is_the_one_that_was_asked_for() {
        let zeros = |first| {
            let mut own = (-0f32).to_ne_bytes();
            reduce_into(&mut own, &0f32.to_ne_bytes(), DType::F32, Op::Max, first);
            f32::from_ne_bytes(own).is_sign_negative()
        };
        assert_eq!([zeros(First::Own), zeros(First::Received)], [true, false]);
    }

    #[test]
    fn max_keeps_a_nan_and_integers_wrap() {
        let floats = |v: [f32; 3]| v.iter().flat_map(|x| x.to_ne_bytes()).collect::<Vec<u8>>();
        let out = run(&[floats([1.0, f32::NAN, 2.0]), floats([3.0, 5.0, f32::NAN])], DType::F32, Op::Max);
        let out: Vec<f32> = out.chunks_exact(4).map(|b| f32::from_ne_bytes(b.try_into().unwrap())).collect();
        assert_eq!(out[0], 3.0);
        assert!(out[1].is_nan() && out[2].is_nan());
        let out = run(&[u64::MAX.to_ne_bytes().to_vec(), 2u64.to_ne_bytes().to_vec()], DType::U64, Op::Sum);
        assert_eq!(out, 1u64.to_ne_bytes());
        let out = run(&[(-3i64).to_ne_bytes().to_vec(), 2i64.to_ne_bytes().to_vec()], DType::I64, Op::Max);
        assert_eq!(out, 2i64.to_ne_bytes());
    }

    #[test]
    fn every_version_gives_the_same_bits_in_place_and_unaligned() {
        let elements = 2 * TILE + 37;
        let make = |salt: u32| -> Vec<u8> {
            let value = |i: u32| (i.wrapping_mul(2_654_435_761).wrapping_add(salt) as f32).sin();
            std::iter::once(0).chain((0..elements as u32).flat_map(|i| value(i).to_ne_bytes())).collect()
        };
        let first = run(&[make(1)[1..].to_vec(), make(2)[1..].to_vec()], DType::F32, Op::Sum);
        let (mut a, mut b) = (make(1), make(2));
        let (pa, pb) = (a[1..].as_mut_ptr(), b[1..].as_mut_ptr());
        // SAFETY: both are results and sources, of `elements` elements each.
        unsafe { every_type(&[pa, pb], &[pa, pb], elements, DType::F32, Op::Sum) };
        assert_eq!(a[1..], first);
        assert_eq!(b[1..], first);
    }
}
