//! Products in the tiles of AMX: 16 rows of 64 bytes each, `TDPBF16PS` between three of them.

use super::{Pairs, SIDE};
use crate::Store;
use crate::simd::avx512::F32x16;
use std::arch::asm;

/// The tiles of this thread, configured as here from `begin` until it is dropped. What lies in them lives no longer than
/// one block.
pub struct Tiles {
    vectors: super::dot::Vectors,
}

/// What `LDTILECFG` reads.
#[repr(C, align(64))]
struct Configuration {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    /// Of each tile.
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

static ALL_WHOLE: Configuration = Configuration {
    palette: 1,
    start_row: 0,
    reserved: [0; 14],
    row_bytes: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
    rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
};

/// Bytes of a panel's row.
const PANEL_ROW: usize = SIDE * size_of::<u32>();

/// An `asm!` that may write every tile.
macro_rules! tiles {
    ($($code:tt)*) => {
        asm!(
            $($code)*
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        )
    };
}

impl Tiles {
    /// # Safety
    /// The level of the machine is AMX.
    pub unsafe fn begin() -> Tiles {
        // SAFETY: the caller's promise; the configuration has the 64 bytes that are read, of a form that the CPU knows.
        unsafe {
            tiles!("ldtilecfg [{}]", in(reg) &ALL_WHOLE,);
            Tiles { vectors: super::dot::Vectors::begin() }
        }
    }
}

impl Drop for Tiles {
    /// Back to the initial state, which costs nothing where threads change, and leaves other users of tiles to configure
    /// their own.
    fn drop(&mut self) {
        // SAFETY: `begin` had the promise that the CPU has tiles.
        unsafe { tiles!("tilerelease",) }
    }
}

impl Pairs for Tiles {
    type V = F32x16;

    /// Two by two tiles of `c` in 0..=3; two of `a` in 4 and 5, two of `b` in 6 and 7.
    #[inline(always)]
    unsafe fn block(
        &self,
        words: usize,
        (a, a_row): (*const u32, usize),
        b: *const u32,
        mode: Store,
        (c, c_row): (*mut f32, usize),
    ) {
        // SAFETY: the caller's promise for a, b and c. `self` says that the configuration is that of `begin`: kernels
        // call nothing else that uses tiles, and the kernel of the system keeps them for each thread. Each tile that is
        // read was written in this block.
        unsafe {
            tiles!(
                "cmp {add}, 0",
                "jne 2f",
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "jmp 3f",
                "2:",
                "tileloadd tmm0, [{c} + {c_row} * 1]",
                "tileloadd tmm1, [{c} + {c_row} * 1 + 64]",
                "tileloadd tmm2, [{c_low} + {c_row} * 1]",
                "tileloadd tmm3, [{c_low} + {c_row} * 1 + 64]",
                "3:",
                "tileloadd tmm4, [{a} + {a_row} * 1]",
                "tileloadd tmm6, [{b} + {b_row} * 1]",
                "tileloadd tmm7, [{b} + {b_row} * 1 + 64]",
                "tileloadd tmm5, [{a_low} + {a_row} * 1]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "add {a}, 64",
                "add {a_low}, 64",
                "add {b}, {step}",
                "sub {words}, 16",
                "jnz 3b",
                "tilestored [{c} + {c_row} * 1], tmm0",
                "tilestored [{c} + {c_row} * 1 + 64], tmm1",
                "tilestored [{c_low} + {c_row} * 1], tmm2",
                "tilestored [{c_low} + {c_row} * 1 + 64], tmm3",
                add = in(reg) usize::from(mode == Store::Add),
                words = inout(reg) words => _,
                a = inout(reg) a => _,
                a_low = inout(reg) a.wrapping_add(16 * a_row) => _,
                a_row = in(reg) a_row * size_of::<u32>(),
                b = inout(reg) b => _,
                b_row = in(reg) PANEL_ROW,
                step = const 16 * PANEL_ROW,
                c = in(reg) c,
                c_low = in(reg) c.wrapping_add(16 * c_row),
                c_row = in(reg) c_row * size_of::<f32>(),
            );
        }
    }

    #[inline(always)]
    unsafe fn join(&self, first: F32x16, second: F32x16, to: *mut u32) {
        // SAFETY: the caller's promise.
        unsafe { self.vectors.join(first, second, to) }
    }

    #[inline(always)]
    unsafe fn zip(&self, low: F32x16, high: F32x16, to: *mut u32) {
        // SAFETY: the caller's promise.
        unsafe { self.vectors.zip(low, high, to) }
    }
}
