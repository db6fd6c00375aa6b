//! Products in vectors by AVX512_BF16: `VDPBF16PS` adds to each of 16 sums the two products of a word.

use super::{Pairs, SIDE};
use crate::Store;
use crate::simd::avx512::F32x16;
use std::arch::x86_64::*;
use std::mem::transmute;

/// The vectors of a CPU with AVX512_BF16.
pub struct Vectors(());

/// Rows whose sums are in registers at the same time: 16 sums, enough to hide the time that one takes.
const ROWS: usize = 8;

impl Vectors {
    /// # Safety
    /// The level of the machine is AVX512_BF16 or better.
    pub unsafe fn begin() -> Vectors {
        Vectors(())
    }
}

impl Pairs for Vectors {
    type V = F32x16;

    #[inline(always)]
    unsafe fn block(
        &self,
        words: usize,
        (a, a_row): (*const u32, usize),
        b: *const u32,
        mode: Store,
        (c, c_row): (*mut f32, usize),
    ) {
        // SAFETY: the caller's promise; `begin` had the promise that the CPU has the instructions.
        unsafe {
            for first in (0..SIDE).step_by(ROWS) {
                let (a, c) = (a.add(first * a_row), c.add(first * c_row));
                let mut sums = [[_mm512_setzero_ps(); 2]; ROWS];
                if mode == Store::Add {
                    for (r, sums) in sums.iter_mut().enumerate() {
                        *sums = [_mm512_loadu_ps(c.add(r * c_row)), _mm512_loadu_ps(c.add(r * c_row + 16))];
                    }
                }
                for w in 0..words {
                    let b = b.add(w * SIDE);
                    let (left, right) = (load(b), load(b.add(16)));
                    for (r, sums) in sums.iter_mut().enumerate() {
                        let a: __m512bh = transmute(_mm512_set1_epi32(*a.add(r * a_row + w).cast()));
                        sums[0] = _mm512_dpbf16_ps(sums[0], a, left);
                        sums[1] = _mm512_dpbf16_ps(sums[1], a, right);
                    }
                }
                for (r, sums) in sums.into_iter().enumerate() {
                    _mm512_storeu_ps(c.add(r * c_row), sums[0]);
                    _mm512_storeu_ps(c.add(r * c_row + 16), sums[1]);
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn join(&self, first: F32x16, second: F32x16, to: *mut u32) {
        // SAFETY: the caller's promise; `begin` had the promise that the CPU has the instructions.
        unsafe {
            _mm512_storeu_si512(
                to.cast(),
                transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(second.0, first.0)),
            )
        }
    }

    #[inline(always)]
    unsafe fn zip(&self, low: F32x16, high: F32x16, to: *mut u32) {
        // SAFETY: as above.
        unsafe {
            let lows_then_highs: __m512i = transmute(_mm512_cvtne2ps_pbh(high.0, low.0));
            // Lane 2i takes number i, lane 2i + 1 number 16 + i.
            let order = _mm512_set_epi16(
                31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19,
                3, 18, 2, 17, 1, 16, 0,
            );
            _mm512_storeu_si512(to.cast(), _mm512_permutexvar_epi16(order, lows_then_highs));
        }
    }
}

/// # Safety
/// 16 words are readable, and the CPU has AVX-512.
#[inline(always)]
unsafe fn load(from: *const u32) -> __m512bh {
    // SAFETY: the caller's promise.
    unsafe { transmute(_mm512_loadu_si512(from.cast())) }
}
