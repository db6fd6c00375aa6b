//! Eight lanes of AVX2 with FMA. Every method is one or a few intrinsics.

use super::{Eight, Vector};
use std::arch::x86_64::*;

#[derive(Clone, Copy)]
pub struct F32x8(__m256);

/// Intrinsics need the CPU's word for it, and `Vector` gives that word for all methods at once.
macro_rules! cpu {
    ($($code:tt)*) => {
        // SAFETY: only `simd_fn!` names this type, in code that runs where AVX2 and FMA were detected (see `Vector`);
        // pointers are the caller's promise.
        unsafe { $($code)* }
    };
}

/// All bits of the first `count` lanes.
#[inline(always)]
fn first(count: usize) -> __m256i {
    cpu!({
        let lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        _mm256_cmpgt_epi32(_mm256_set1_epi32(count as i32), lanes)
    })
}

impl Vector for F32x8 {
    const LANES: usize = 8;
    type Eight = Self;

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        cpu!(F32x8(_mm256_loadu_ps(from)))
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        cpu!(_mm256_storeu_ps(to, self.0))
    }
    #[inline(always)]
    unsafe fn stream(self, to: *mut f32) {
        cpu!(_mm256_stream_ps(to, self.0))
    }
    #[inline(always)]
    fn streamed() {
        cpu!(_mm_sfence())
    }
    #[inline(always)]
    unsafe fn load_part(from: *const f32, count: usize, fill: f32) -> Self {
        cpu!({
            let mask = first(count);
            let values = _mm256_maskload_ps(from, mask);
            F32x8(_mm256_blendv_ps(_mm256_set1_ps(fill), values, _mm256_castsi256_ps(mask)))
        })
    }
    #[inline(always)]
    unsafe fn store_part(self, to: *mut f32, count: usize) {
        cpu!(_mm256_maskstore_ps(to, first(count), self.0))
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self {
        cpu!({
            let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
            F32x8(_mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide)))
        })
    }
    #[inline(always)]
    unsafe fn store_bf16(self, to: *mut u16) {
        cpu!({
            let bits = _mm256_castps_si256(self.0);
            let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
            let rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
            let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x0040_0000));
            let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(self.0, self.0));
            let high = _mm256_srli_epi32::<16>(_mm256_blendv_epi8(rounded, quiet, nan));
            let packed = _mm256_permute4x64_epi64::<0b1000>(_mm256_packus_epi32(high, high));
            _mm_storeu_si128(to.cast(), _mm256_castsi256_si128(packed));
        })
    }
    #[inline(always)]
    unsafe fn look_up(table: &[f32; 16], codes: *const u8) -> Self {
        cpu!({
            let bytes = _mm_cvtsi32_si128(codes.cast::<i32>().read_unaligned());
            let pairs = _mm_unpacklo_epi8(_mm_srli_epi16::<4>(bytes), bytes);
            let codes = _mm256_cvtepu8_epi32(pairs);
            // A permutation goes by the low three bits of each code; the fourth chooses the half of the table.
            let low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table.as_ptr()), codes);
            let high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table.as_ptr().add(8)), codes);
            F32x8(_mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32::<28>(codes))))
        })
    }
    #[inline(always)]
    fn prefetch(at: *const f32) {
        cpu!(_mm_prefetch::<_MM_HINT_T0>(at.cast()))
    }
    #[inline(always)]
    fn splat(value: f32) -> Self {
        cpu!(F32x8(_mm256_set1_ps(value)))
    }
    #[inline(always)]
    fn add(self, other: Self) -> Self {
        cpu!(F32x8(_mm256_add_ps(self.0, other.0)))
    }
    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        cpu!(F32x8(_mm256_sub_ps(self.0, other.0)))
    }
    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        cpu!(F32x8(_mm256_mul_ps(self.0, other.0)))
    }
    #[inline(always)]
    fn div(self, other: Self) -> Self {
        cpu!(F32x8(_mm256_div_ps(self.0, other.0)))
    }
    #[inline(always)]
    fn mul_add(self, a: Self, b: Self) -> Self {
        cpu!(F32x8(_mm256_fmadd_ps(self.0, a.0, b.0)))
    }
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        cpu!(F32x8(_mm256_max_ps(self.0, other.0)))
    }
    #[inline(always)]
    fn min(self, other: Self) -> Self {
        cpu!(F32x8(_mm256_min_ps(self.0, other.0)))
    }
    #[inline(always)]
    fn sqrt(self) -> Self {
        cpu!(F32x8(_mm256_sqrt_ps(self.0)))
    }
    #[inline(always)]
    fn round(self) -> Self {
        cpu!(F32x8(_mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(self.0)))
    }
    #[inline(always)]
    fn exp2_whole(self) -> Self {
        cpu!({
            let biased = _mm256_add_epi32(_mm256_cvtps_epi32(self.0), _mm256_set1_epi32(127));
            F32x8(_mm256_castsi256_ps(_mm256_slli_epi32::<23>(biased)))
        })
    }
    #[inline(always)]
    fn zero_where_less(self, limit: Self, value: Self) -> Self {
        cpu!(F32x8(_mm256_andnot_ps(_mm256_cmp_ps::<_CMP_LT_OQ>(self.0, limit.0), value.0)))
    }
    #[inline(always)]
    fn sum(self) -> f32 {
        cpu!({
            let four = _mm_add_ps(_mm256_castps256_ps128(self.0), _mm256_extractf128_ps::<1>(self.0));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
        })
    }
    #[inline(always)]
    fn max_lane(self) -> f32 {
        cpu!({
            let four = _mm_max_ps(_mm256_castps256_ps128(self.0), _mm256_extractf128_ps::<1>(self.0));
            let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps::<1>(two, two)))
        })
    }
}

impl Eight for F32x8 {
    #[inline(always)]
    fn transpose(rows: [Self; 8]) -> [Self; 8] {
        cpu!({
            let [F32x8(a), F32x8(b), F32x8(c), F32x8(d), F32x8(e), F32x8(f), F32x8(g), F32x8(h)] = rows;
            // Pairs of rows, then fours, within each half; then the halves change places.
            let pairs = |a, b| (_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
            let fours = |low, high| {
                (_mm256_shuffle_ps::<0b0100_0100>(low, high), _mm256_shuffle_ps::<0b1110_1110>(low, high))
            };
            let ((ab0, ab1), (cd0, cd1), (ef0, ef1), (gh0, gh1)) =
                (pairs(a, b), pairs(c, d), pairs(e, f), pairs(g, h));
            let ((p0, p1), (p2, p3)) = (fours(ab0, cd0), fours(ab1, cd1));
            let ((q0, q1), (q2, q3)) = (fours(ef0, gh0), fours(ef1, gh1));
            let low = |p, q| F32x8(_mm256_permute2f128_ps::<0x20>(p, q));
            let high = |p, q| F32x8(_mm256_permute2f128_ps::<0x31>(p, q));
            [
                low(p0, q0),
                low(p1, q1),
                low(p2, q2),
                low(p3, q3),
                high(p0, q0),
                high(p1, q1),
                high(p2, q2),
                high(p3, q3),
            ]
        })
    }
}
