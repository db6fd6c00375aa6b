//! One vector of f32 numbers, in the widths that machines have, and the choice between them at run time.
//!
//! A kernel is written once, generic over [`Vector`], by [`simd_fn!`]; the macro compiles it for every level and calls the
//! best. Plain loops in such a kernel are vectorised by the compiler for the same level.

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod amx;
#[cfg(target_arch = "x86_64")]
pub mod avx2;
#[cfg(target_arch = "x86_64")]
pub mod avx512;
pub mod plain;

use std::cell::Cell;
use std::sync::OnceLock;

/// What the CPU can do. Ordered from least to most.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    Plain,
    /// AVX2 with FMA: 8 lanes.
    Avx2,
    /// AVX-512 F, BW, DQ, VL: 16 lanes.
    Avx512,
    /// And AVX512_BF16: products of pairs of bf16. It is the best level only where they are faster than products in f32.
    Avx512Bf16,
    /// And AMX-BF16, which Linux lets this process use: such products of whole tiles.
    Amx,
}

thread_local!(static LIMIT: Cell<Level> = const { Cell::new(Level::Amx) });

impl Level {
    /// The best level of this machine.
    pub fn best() -> Level {
        static BEST: OnceLock<Level> = OnceLock::new();
        *BEST.get_or_init(detect)
    }

    /// Runs `run` in this thread as on a CPU that can do no more than this: for comparisons.
    pub fn limit(self, run: impl FnOnce()) {
        let before = LIMIT.replace(self);
        run();
        LIMIT.set(before);
    }
}

/// The level that kernels use in this thread.
#[inline]
pub fn level() -> Level {
    LIMIT.get().min(Level::best())
}

#[cfg(target_arch = "x86_64")]
fn detect() -> Level {
    let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
    let avx512 = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl");
    let bf16 = is_x86_feature_detected!("avx512bf16");
    match (avx2, avx512, bf16) {
        (true, true, true) if tiles() => Level::Amx,
        // Sapphire Rapids starts a `VDPBF16PS` every other cycle and two FMA in each: half as many products. Zen 4 and 5
        // start as many of one as of the other: twice as many products.
        (true, true, true) if !made_by_intel() => Level::Avx512Bf16,
        (true, true, _) => Level::Avx512,
        (true, false, _) => Level::Avx2,
        (false, ..) => Level::Plain,
    }
}

#[cfg(target_arch = "x86_64")]
fn made_by_intel() -> bool {
    let id = std::arch::x86_64::__cpuid(0);
    [id.ebx, id.edx, id.ecx].map(u32::to_le_bytes).as_flattened() == b"GenuineIntel"
}

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn tiles() -> bool {
    amx::allowed()
}

#[cfg(all(target_arch = "x86_64", not(target_os = "linux")))]
fn tiles() -> bool {
    false
}

#[cfg(not(target_arch = "x86_64"))]
fn detect() -> Level {
    Level::Plain
}

/// `LANES` numbers of f32. All loads and stores are unaligned.
///
/// The implementations for AVX2 and AVX-512 may only be used in code that is compiled for, and runs on, such a CPU;
/// [`simd_fn!`] sees to both, and nothing else names them.
pub trait Vector: Copy {
    const LANES: usize;
    /// The vector of eight lanes that the same CPU has.
    type Eight: Eight;

    /// # Safety
    /// `LANES` numbers are readable at `from`.
    unsafe fn load(from: *const f32) -> Self;
    /// # Safety
    /// `LANES` numbers are writable at `to`.
    unsafe fn store(self, to: *mut f32);
    /// Writes past the caches. Other threads see it after `streamed`.
    /// # Safety
    /// `LANES` numbers are writable at `to`, whose address is a multiple of their bytes.
    unsafe fn stream(self, to: *mut f32);
    /// Ends a row of `stream`.
    fn streamed();
    /// The first `count` lanes, fewer than `LANES`; the others are `fill`.
    /// # Safety
    /// `count` numbers are readable at `from`.
    unsafe fn load_part(from: *const f32, count: usize, fill: f32) -> Self;
    /// Writes the first `count` lanes, fewer than `LANES`.
    /// # Safety
    /// `count` numbers are writable at `to`.
    unsafe fn store_part(self, to: *mut f32, count: usize);
    /// Widens bf16.
    /// # Safety
    /// `LANES` numbers are readable at `from`.
    unsafe fn load_bf16(from: *const u16) -> Self;
    /// Rounds to the nearest bf16, ties to even; a NaN stays one.
    /// # Safety
    /// `LANES` numbers are writable at `to`.
    unsafe fn store_bf16(self, to: *mut u16);

    /// `table[code]` for codes of four bits, two to a byte, the first in its high half.
    /// # Safety
    /// `LANES / 2` bytes are readable at `codes`.
    unsafe fn look_up(table: &[f32; 16], codes: *const u8) -> Self;

    /// Tells the CPU that the numbers there will be wanted; `at` may be any address.
    fn prefetch(at: *const f32);
    fn splat(value: f32) -> Self;
    fn add(self, other: Self) -> Self;
    fn sub(self, other: Self) -> Self;
    fn mul(self, other: Self) -> Self;
    fn div(self, other: Self) -> Self;
    /// `self * a + b`; one rounding where the CPU has it.
    fn mul_add(self, a: Self, b: Self) -> Self;
    /// `self > other ? self : other`: the other when either is NaN.
    fn max(self, other: Self) -> Self;
    /// `self < other ? self : other`: the other when either is NaN.
    fn min(self, other: Self) -> Self;
    fn sqrt(self) -> Self;
    /// To the nearest whole number, ties to even.
    fn round(self) -> Self;
    /// 2 to the power of `self`, a whole number in -126..=127; 0 for -127.
    fn exp2_whole(self) -> Self;
    /// `self < limit ? 0 : value`.
    fn zero_where_less(self, limit: Self, value: Self) -> Self;
    /// Sum of the lanes.
    fn sum(self) -> f32;
    /// Largest of the lanes.
    fn max_lane(self) -> f32;
}

/// A vector of eight lanes.
pub trait Eight: Vector {
    /// Lane `i` of result `j` is lane `j` of row `i`.
    fn transpose(rows: [Self; 8]) -> [Self; 8];
}

/// Defines a kernel for all levels. The first generic parameter names the vector; it is not part of the signature.
macro_rules! simd_fn {
    (
        $(#[$meta:meta])*
        $vis:vis fn $name:ident<$V:ident $(, $G:ident: $bound:ident)* $(,)?>
        ($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block
    ) => {
        $(#[$meta])*
        #[allow(clippy::too_many_arguments)]
        $vis fn $name<$($G: $bound),*>($($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            fn body<$V: $crate::simd::Vector, $($G: $bound),*>($($arg: $ty),*) $(-> $ret)? $body

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            fn avx2<$($G: $bound),*>($($arg: $ty),*) $(-> $ret)? {
                body::<$crate::simd::avx2::F32x8, $($G),*>($($arg),*)
            }

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
            fn avx512<$($G: $bound),*>($($arg: $ty),*) $(-> $ret)? {
                body::<$crate::simd::avx512::F32x16, $($G),*>($($arg),*)
            }

            match $crate::simd::level() {
                // SAFETY: the level is chosen only when the CPU has these features.
                #[cfg(target_arch = "x86_64")]
                level if level >= $crate::simd::Level::Avx512 => unsafe { avx512::<$($G),*>($($arg),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                $crate::simd::Level::Avx2 => unsafe { avx2::<$($G),*>($($arg),*) },
                _ => body::<$crate::simd::plain::F32x8, $($G),*>($($arg),*),
            }
        }
    };
}
pub(crate) use simd_fn;

/// Runs a test at each level that this machine has, and says which it has not.
#[cfg(test)]
pub fn at_every_level(test: impl Fn()) {
    for level in [Level::Plain, Level::Avx2, Level::Avx512, Level::Avx512Bf16, Level::Amx] {
        if level > Level::best() {
            println!("skipped {level:?}: this CPU has only {:?}", Level::best());
            continue;
        }
        level.limit(&test);
    }
}
