//! The two number formats that kernels read and write. Arithmetic is f32, but for products of pairs of bf16 in attention.

use crate::simd::Vector;
use half::bf16;

/// A stored number: `f32`, or `bf16` (rounded to nearest even when written).
pub trait Element:
    lanes::Lanes + Copy + Default + PartialEq + std::fmt::Debug + Send + Sync + 'static
{
    fn to_f32(self) -> f32;
    fn from_f32(value: f32) -> Self;
}

impl Element for f32 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
    #[inline(always)]
    fn from_f32(value: f32) -> f32 {
        value
    }
}

impl Element for bf16 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
    #[inline(always)]
    fn from_f32(value: f32) -> bf16 {
        let bits = value.to_bits();
        let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1));
        let quiet = bits | 0x0040_0000;
        bf16::from_bits((if value.is_nan() { quiet } else { rounded } >> 16) as u16)
    }
}

/// Reads up to one vector from the start of `from`; lanes past its end are `fill`.
#[inline(always)]
pub(crate) fn load_filled<V: Vector, T: Element>(from: &[T], fill: f32) -> V {
    if from.len() >= V::LANES {
        // SAFETY: the slice has a full vector.
        return unsafe { T::load(from.as_ptr()) };
    }
    // SAFETY: so many numbers are in the slice.
    unsafe { T::load_part(from.as_ptr(), from.len(), fill) }
}

/// Reads up to one vector from the start of `from`; lanes past its end are 0.
#[inline(always)]
pub(crate) fn load<V: Vector, T: Element>(from: &[T]) -> V {
    load_filled(from, 0.0)
}

/// Writes a vector, or as much of it as `to` has room for.
#[inline(always)]
pub(crate) fn store<V: Vector, T: Element>(value: V, to: &mut [T]) {
    if to.len() >= V::LANES {
        // SAFETY: the slice has room for a full vector.
        return unsafe { T::store(value, to.as_mut_ptr()) };
    }
    // SAFETY: so many numbers have room in the slice.
    unsafe { T::store_part(value, to.as_mut_ptr(), to.len()) }
}

/// Vectors of each format. Kept out of the public interface, which also closes `Element` to other types.
pub(crate) mod lanes {
    use super::{Element, Vector, bf16};

    /// Lanes of the widest vector.
    const MAX_LANES: usize = 16;

    pub trait Lanes: Sized {
        /// # Safety
        /// `V::LANES` numbers are readable at `from`.
        unsafe fn load<V: Vector>(from: *const Self) -> V;
        /// # Safety
        /// `V::LANES` numbers are writable at `to`.
        unsafe fn store<V: Vector>(value: V, to: *mut Self);
        /// Fewer than a vector; see [`Vector::load_part`].
        /// # Safety
        /// `count` numbers are readable at `from`.
        unsafe fn load_part<V: Vector>(from: *const Self, count: usize, fill: f32) -> V;
        /// Fewer than a vector.
        /// # Safety
        /// `count` numbers are writable at `to`.
        unsafe fn store_part<V: Vector>(value: V, to: *mut Self, count: usize);
        /// The same slice, where these are bf16.
        fn as_bf16(_slice: &[Self]) -> Option<&[bf16]> {
            None
        }
        fn as_bf16_mut(_slice: &mut [Self]) -> Option<&mut [bf16]> {
            None
        }
    }

    impl Lanes for f32 {
        #[inline(always)]
        unsafe fn load<V: Vector>(from: *const f32) -> V {
            // SAFETY: the caller's promise.
            unsafe { V::load(from) }
        }
        #[inline(always)]
        unsafe fn store<V: Vector>(value: V, to: *mut f32) {
            // SAFETY: the caller's promise.
            unsafe { value.store(to) }
        }
        #[inline(always)]
        unsafe fn load_part<V: Vector>(from: *const f32, count: usize, fill: f32) -> V {
            // SAFETY: the caller's promise.
            unsafe { V::load_part(from, count, fill) }
        }
        #[inline(always)]
        unsafe fn store_part<V: Vector>(value: V, to: *mut f32, count: usize) {
            // SAFETY: the caller's promise.
            unsafe { value.store_part(to, count) }
        }
    }

    impl Lanes for bf16 {
        #[inline(always)]
        fn as_bf16(slice: &[bf16]) -> Option<&[bf16]> {
            Some(slice)
        }
        #[inline(always)]
        fn as_bf16_mut(slice: &mut [bf16]) -> Option<&mut [bf16]> {
            Some(slice)
        }
        #[inline(always)]
        unsafe fn load<V: Vector>(from: *const bf16) -> V {
            // SAFETY: the caller's promise; bf16 is a transparent u16.
            unsafe { V::load_bf16(from.cast()) }
        }
        #[inline(always)]
        unsafe fn store<V: Vector>(value: V, to: *mut bf16) {
            // SAFETY: as above.
            unsafe { value.store_bf16(to.cast()) }
        }
        #[inline(always)]
        unsafe fn load_part<V: Vector>(from: *const bf16, count: usize, fill: f32) -> V {
            let mut lanes = [fill; MAX_LANES];
            for (i, lane) in lanes.iter_mut().enumerate().take(count) {
                // SAFETY: the caller's promise.
                *lane = unsafe { (*from.add(i)).to_f32() };
            }
            // SAFETY: the array has at least a full vector.
            unsafe { V::load(lanes.as_ptr()) }
        }
        #[inline(always)]
        unsafe fn store_part<V: Vector>(value: V, to: *mut bf16, count: usize) {
            let mut lanes = [0.0; MAX_LANES];
            // SAFETY: the array has room for a full vector.
            unsafe { value.store(lanes.as_mut_ptr()) };
            for (i, lane) in lanes.into_iter().enumerate().take(count) {
                // SAFETY: the caller's promise.
                unsafe { *to.add(i) = Element::from_f32(lane) };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::{at_every_level, simd_fn};

    simd_fn! {
        fn round_trip<V>(x: &[f32], y: &mut [bf16]) {
            for (x, y) in x.chunks(V::LANES).zip(y.chunks_mut(V::LANES)) {
                store(load::<V, f32>(x), y);
            }
        }
    }

    #[test]
    fn rounds_to_nearest_even_like_half_and_keeps_nan() {
        let tricky = [
            0.0,
            -0.0,
            1.0,
            1.0 + 1.0 / 256.0,
            1.0 + 3.0 / 256.0,
            f32::INFINITY,
            f32::MAX,
            f32::MIN_POSITIVE,
            1e-40,
            -3.3e38,
        ];
        let x: Vec<f32> = tricky
            .into_iter()
            .chain((0..4000u32).map(|i| f32::from_bits(i.wrapping_mul(1_077_351))))
            .collect();
        at_every_level(|| {
            let mut y = vec![bf16::ZERO; x.len()];
            round_trip(&x, &mut y);
            for (x, y) in x.iter().zip(&y) {
                assert_eq!(x.is_nan(), y.is_nan(), "{x}");
                assert!(x.is_nan() || *y == bf16::from_f32(*x), "{x}: {y} is not {}", bf16::from_f32(*x));
                assert!(x.is_nan() || *y == <bf16 as Element>::from_f32(*x));
            }
            let mut nan = [bf16::ZERO; 5];
            round_trip(
                &[f32::from_bits(0x7fff_ffff), f32::from_bits(0xffff_ffff), f32::NAN, 1.0, 2.0],
                &mut nan,
            );
            assert!(nan[..3].iter().all(|v| v.is_nan()) && nan[4] == bf16::from_f32(2.0));
        });
    }
}
