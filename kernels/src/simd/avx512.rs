//! Sixteen lanes of AVX-512 (F, BW, DQ, VL). Every method is one or a few intrinsics.

use super::Vector;
use std::arch::x86_64::*;

#[derive(Clone, Copy)]
pub struct F32x16(pub __m512);

/// Intrinsics need the CPU's word for it, and `Vector` gives that word for all methods at once.
macro_rules! cpu {
    ($($code:tt)*) => {
        // SAFETY: only `simd_fn!` names this type, in code that runs where these features were detected (see `Vector`);
        // pointers are the caller's promise.
        unsafe { $($code)* }
    };
}

/// A bit for each of the first `count` lanes, fewer than all.
#[inline(always)]
fn first(count: usize) -> __mmask16 {
    (1 << count) - 1
}

impl Vector for F32x16 {
    const LANES: usize = 16;
    type Eight = super::avx2::F32x8;

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        cpu!(F32x16(_mm512_loadu_ps(from)))
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        cpu!(_mm512_storeu_ps(to, self.0))
    }
    #[inline(always)]
    unsafe fn stream(self, to: *mut f32) {
        cpu!(_mm512_stream_ps(to, self.0))
    }
    #[inline(always)]
    fn streamed() {
        cpu!(_mm_sfence())
    }
    #[inline(always)]
    unsafe fn load_part(from: *const f32, count: usize, fill: f32) -> Self {
        cpu!(F32x16(_mm512_mask_loadu_ps(_mm512_set1_ps(fill), first(count), from)))
    }
    #[inline(always)]
    unsafe fn store_part(self, to: *mut f32, count: usize) {
        cpu!(_mm512_mask_storeu_ps(to, first(count), self.0))
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self {
        cpu!({
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
            F32x16(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide)))
        })
    }
    #[inline(always)]
    unsafe fn store_bf16(self, to: *mut u16) {
        cpu!({
            let bits = _mm512_castps_si512(self.0);
            let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
            let rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
            let quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x0040_0000));
            let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(self.0, self.0);
            let high = _mm512_srli_epi32::<16>(_mm512_mask_blend_epi32(nan, rounded, quiet));
            _mm256_storeu_si256(to.cast(), _mm512_cvtepi32_epi16(high));
        })
    }
    #[inline(always)]
    unsafe fn look_up(table: &[f32; 16], codes: *const u8) -> Self {
        cpu!({
            let bytes = _mm_loadl_epi64(codes.cast());
            let pairs = _mm_unpacklo_epi8(_mm_srli_epi16::<4>(bytes), bytes);
            // The permutation goes by the low four bits of each code.
            F32x16(_mm512_permutexvar_ps(_mm512_cvtepu8_epi32(pairs), _mm512_loadu_ps(table.as_ptr())))
        })
    }
    #[inline(always)]
    fn prefetch(at: *const f32) {
        cpu!(_mm_prefetch::<_MM_HINT_T0>(at.cast()))
    }
    #[inline(always)]
    fn splat(value: f32) -> Self {
        cpu!(F32x16(_mm512_set1_ps(value)))
    }
    #[inline(always)]
    fn add(self, other: Self) -> Self {
        cpu!(F32x16(_mm512_add_ps(self.0, other.0)))
    }
    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        cpu!(F32x16(_mm512_sub_ps(self.0, other.0)))
    }
    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        cpu!(F32x16(_mm512_mul_ps(self.0, other.0)))
    }
    #[inline(always)]
    fn div(self, other: Self) -> Self {
        cpu!(F32x16(_mm512_div_ps(self.0, other.0)))
    }
    #[inline(always)]
    fn mul_add(self, a: Self, b: Self) -> Self {
        cpu!(F32x16(_mm512_fmadd_ps(self.0, a.0, b.0)))
    }
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        cpu!(F32x16(_mm512_max_ps(self.0, other.0)))
    }
    #[inline(always)]
    fn min(self, other: Self) -> Self {
        cpu!(F32x16(_mm512_min_ps(self.0, other.0)))
    }
    #[inline(always)]
    fn sqrt(self) -> Self {
        cpu!(F32x16(_mm512_sqrt_ps(self.0)))
    }
    #[inline(always)]
    fn round(self) -> Self {
        cpu!(F32x16(_mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT }>(self.0)))
    }
    #[inline(always)]
    fn exp2_whole(self) -> Self {
        cpu!({
            let biased = _mm512_add_epi32(_mm512_cvtps_epi32(self.0), _mm512_set1_epi32(127));
            F32x16(_mm512_castsi512_ps(_mm512_slli_epi32::<23>(biased)))
        })
    }
    #[inline(always)]
    fn zero_where_less(self, limit: Self, value: Self) -> Self {
        cpu!(F32x16(_mm512_maskz_mov_ps(!_mm512_cmp_ps_mask::<_CMP_LT_OQ>(self.0, limit.0), value.0)))
    }
    #[inline(always)]
    fn sum(self) -> f32 {
        cpu!(_mm512_reduce_add_ps(self.0))
    }
    #[inline(always)]
    fn max_lane(self) -> f32 {
        cpu!(_mm512_reduce_max_ps(self.0))
    }
}
