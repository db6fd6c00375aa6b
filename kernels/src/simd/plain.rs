//! Eight lanes without intrinsics: what the compiler makes of arrays (SSE2, NEON).

use super::{Eight, Vector};
use crate::Element;
use half::bf16;

#[derive(Clone, Copy)]
pub struct F32x8([f32; 8]);

impl F32x8 {
    #[inline(always)]
    fn zip(self, other: F32x8, f: impl Fn(f32, f32) -> f32) -> F32x8 {
        F32x8(std::array::from_fn(|i| f(self.0[i], other.0[i])))
    }
}

impl Vector for F32x8 {
    const LANES: usize = 8;
    type Eight = Self;

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller's promise; an array of f32 has their alignment.
        F32x8(unsafe { *from.cast() })
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller's promise.
        unsafe { *to.cast() = self.0 }
    }
    #[inline(always)]
    unsafe fn stream(self, to: *mut f32) {
        // SAFETY: the caller's promise.
        unsafe { self.store(to) }
    }
    #[inline(always)]
    fn streamed() {}
    #[inline(always)]
    unsafe fn load_part(from: *const f32, count: usize, fill: f32) -> Self {
        // SAFETY: the caller's promise.
        F32x8(std::array::from_fn(|i| if i < count { unsafe { *from.add(i) } } else { fill }))
    }
    #[inline(always)]
    unsafe fn store_part(self, to: *mut f32, count: usize) {
        for (i, value) in self.0.into_iter().enumerate().take(count) {
            // SAFETY: the caller's promise.
            unsafe { *to.add(i) = value }
        }
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self {
        // SAFETY: the caller's promise.
        let bits: [u16; 8] = unsafe { *from.cast() };
        F32x8(bits.map(|b| f32::from_bits(u32::from(b) << 16)))
    }
    #[inline(always)]
    unsafe fn store_bf16(self, to: *mut u16) {
        let bits = self.0.map(|v| <bf16 as Element>::from_f32(v).to_bits());
        // SAFETY: the caller's promise.
        unsafe { *to.cast() = bits }
    }
    #[inline(always)]
    unsafe fn look_up(table: &[f32; 16], codes: *const u8) -> Self {
        // SAFETY: the caller's promise.
        let bytes: [u8; 4] = unsafe { *codes.cast() };
        F32x8(std::array::from_fn(|i| table[usize::from(bytes[i / 2] >> (4 - i % 2 * 4) & 15)]))
    }
    #[inline(always)]
    fn prefetch(_at: *const f32) {}
    #[inline(always)]
    fn splat(value: f32) -> Self {
        F32x8([value; 8])
    }
    #[inline(always)]
    fn add(self, other: Self) -> Self {
        self.zip(other, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        self.zip(other, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        self.zip(other, |a, b| a * b)
    }
    #[inline(always)]
    fn div(self, other: Self) -> Self {
        self.zip(other, |a, b| a / b)
    }
    #[inline(always)]
    fn mul_add(self, a: Self, b: Self) -> Self {
        if cfg!(target_arch = "aarch64") {
            F32x8(std::array::from_fn(|i| self.0[i].mul_add(a.0[i], b.0[i])))
        } else {
            self.mul(a).add(b)
        }
    }
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        self.zip(other, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn min(self, other: Self) -> Self {
        self.zip(other, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    fn sqrt(self) -> Self {
        F32x8(self.0.map(f32::sqrt))
    }
    #[inline(always)]
    fn round(self) -> Self {
        // Adding 1.5 * 2^23 leaves no room for a fraction, so the addition rounds.
        const MAGIC: f32 = 12_582_912.0;
        F32x8(self.0.map(|v| (v + MAGIC) - MAGIC))
    }
    #[inline(always)]
    fn exp2_whole(self) -> Self {
        F32x8(self.0.map(|v| f32::from_bits(((v as i32).wrapping_add(127) as u32) << 23)))
    }
    #[inline(always)]
    fn zero_where_less(self, limit: Self, value: Self) -> Self {
        F32x8(std::array::from_fn(|i| if self.0[i] < limit.0[i] { 0.0 } else { value.0[i] }))
    }
    #[inline(always)]
    fn sum(self) -> f32 {
        let v = self.0;
        ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]))
    }
    #[inline(always)]
    fn max_lane(self) -> f32 {
        self.0.into_iter().fold(f32::NEG_INFINITY, |a, b| if a > b { a } else { b })
    }
}

impl Eight for F32x8 {
    #[inline(always)]
    fn transpose(rows: [Self; 8]) -> [Self; 8] {
        std::array::from_fn(|i| F32x8(std::array::from_fn(|j| rows[j].0[i])))
    }
}
