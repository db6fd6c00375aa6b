//! Whether this process may use the tiles of AMX.

use std::arch::x86_64::*;

/// The CPU has tiles and multiplies bf16 in them, the kernel saves them, and lets this process (all its threads) use them.
pub fn allowed() -> bool {
    is_x86_feature_detected!("xsave") && in_cpu() && saved() && granted()
}

/// CPUID leaf 7: AMX-BF16 and AMX-TILE.
fn in_cpu() -> bool {
    const BF16_AND_TILE: u32 = 1 << 22 | 1 << 24;
    __cpuid(0).eax >= 7 && __cpuid_count(7, 0).edx & BF16_AND_TILE == BF16_AND_TILE
}

/// XCR0: the kernel saves the tiles' configuration and data when it changes threads.
fn saved() -> bool {
    const CONFIGURATION_AND_DATA: u64 = 1 << 17 | 1 << 18;
    // SAFETY: detection of `xsave` includes the kernel's consent to XGETBV.
    unsafe { _xgetbv(0) & CONFIGURATION_AND_DATA == CONFIGURATION_AND_DATA }
}

/// Linux grants the room for tiles once per process, on request.
fn granted() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_ulong = 0x1023;
    const TILE_DATA: libc::c_ulong = 18;
    // SAFETY: the call takes two numbers and writes no memory of ours.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA) == 0 }
}
