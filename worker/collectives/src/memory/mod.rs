//! Buffers that ranks share: owners of a mapping that hand out its address. They synchronise nothing; the collectives do.

#![allow(unsafe_code)]

pub(crate) mod reduce;

use crate::dtype::DType;
use crate::error::{CollectiveError, Result};
use memmap2::{MmapOptions, MmapRaw};
use std::ops::Range;
use std::sync::Arc;

/// One buffer that all ranks of the host see at addresses of their own.
#[derive(Clone, Debug)]
pub struct Common {
    map: Arc<MmapRaw>,
    bytes: usize,
}

/// A buffer for each rank. Each rank works on its own; the collectives reduce across all.
#[derive(Clone, Debug)]
pub struct PerRank {
    map: Arc<MmapRaw>,
    /// Of one rank.
    bytes: usize,
    /// From one rank's buffer to the next; whole pages.
    stride: usize,
    rank: usize,
    ranks: usize,
    /// Offset in the segment: names the buffer in signatures.
    pub(crate) id: u64,
}

fn anonymous(bytes: usize) -> Result<Arc<MmapRaw>> {
    MmapOptions::new()
        .len(bytes.max(1))
        .map_anon()
        .map(|map| Arc::new(map.into()))
        .map_err(|source| CollectiveError::Memory { what: "cannot map a buffer", source: Arc::new(source) })
}

impl Common {
    pub(crate) fn private(bytes: usize) -> Result<Common> {
        Ok(Common { map: anonymous(bytes)?, bytes })
    }

    #[cfg(target_os = "linux")]
    pub(crate) fn new(map: MmapRaw, bytes: usize) -> Common {
        Common { map: Arc::new(map), bytes }
    }

    /// Page-aligned, valid as long as this value or a clone of it lives. Other ranks write there too: access is ordered by the
    /// collectives, as `SharedHost` describes.
    pub fn as_mut_ptr(&self) -> *mut u8 {
        self.map.as_mut_ptr()
    }

    /// A range for a transport to work on, of which this rank's steps touch what no other rank's do.
    #[cfg(target_os = "linux")]
    pub(crate) fn claim(&self, bytes: Range<usize>) -> Claim {
        assert!(bytes.start <= bytes.end && bytes.end <= self.bytes, "a claim outside of the buffer");
        Claim { map: self.map.clone(), bytes }
    }

    /// In bytes.
    pub fn len(&self) -> usize {
        self.bytes
    }

    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Copies into the buffer; panics outside of it.
    pub fn write(&self, offset: usize, data: &[u8]) {
        write(self.as_mut_ptr(), self.bytes, offset, data);
    }

    /// Copies out of the buffer; panics outside of it.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        read(self.as_mut_ptr(), self.bytes, offset, data);
    }
}

impl PerRank {
    pub(crate) fn private(bytes: usize) -> Result<PerRank> {
        Ok(PerRank { map: anonymous(bytes)?, bytes, stride: bytes, rank: 0, ranks: 1, id: 0 })
    }

    /// A buffer of this rank alone, whose ranges are told from those of others by `id`.
    pub(crate) fn registered(bytes: usize, id: u64) -> Result<PerRank> {
        Ok(PerRank { id, ..PerRank::private(bytes)? })
    }

    /// `rank`'s view of one buffer of `bytes` for each of `ranks`, `stride` apart in `map`.
    #[cfg(target_os = "linux")]
    pub(crate) fn new(
        map: MmapRaw,
        bytes: usize,
        stride: usize,
        rank: usize,
        ranks: usize,
        id: u64,
    ) -> PerRank {
        PerRank { map: Arc::new(map), bytes, stride, rank, ranks, id }
    }

    #[cfg(target_os = "linux")]
    pub(crate) fn ranks(&self) -> usize {
        self.ranks
    }

    /// This rank's buffer: page-aligned, valid as long as this value or a clone of it lives. Not to be touched between
    /// `post_reduce` and `finish`.
    pub fn as_mut_ptr(&self) -> *mut u8 {
        self.of(self.rank)
    }

    /// Of one rank's buffer, in bytes.
    pub fn len(&self) -> usize {
        self.bytes
    }

    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Copies into this rank's buffer; panics outside of it.
    pub fn write(&self, offset: usize, data: &[u8]) {
        write(self.as_mut_ptr(), self.bytes, offset, data);
    }

    /// Copies out of this rank's buffer; panics outside of it.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        read(self.as_mut_ptr(), self.bytes, offset, data);
    }

    /// This rank's range for a transport to work on. Whoever posts it leaves it alone until it is done: the contract of `Exchange`.
    pub(crate) fn claim(&self, bytes: Range<usize>) -> Claim {
        assert!(bytes.start <= bytes.end && bytes.end <= self.bytes, "a claim outside of the buffer");
        let first = self.rank * self.stride;
        Claim { map: self.map.clone(), bytes: first + bytes.start..first + bytes.end }
    }

    /// Copies this rank's bytes from `at` on to `to` of `common`; panics outside of either.
    pub(crate) fn copy_to(&self, at: usize, common: &Common, to: Range<usize>) {
        assert!(at <= self.bytes && to.len() <= self.bytes - at, "a copy from outside of a buffer");
        assert!(to.start <= to.end && to.end <= common.bytes, "a copy to outside of a buffer");
        let source = self.as_mut_ptr().wrapping_add(at);
        // SAFETY: both ranges lie inside of their mappings, which are two; whoever copies owns both.
        unsafe { std::ptr::copy_nonoverlapping(source, common.as_mut_ptr().add(to.start), to.len()) }
    }

    pub(crate) fn of(&self, rank: usize) -> *mut u8 {
        self.map.as_mut_ptr().wrapping_add(rank * self.stride)
    }

    /// A range that can be reduced: inside the buffer and of whole elements.
    pub(crate) fn check(&self, bytes: &Range<usize>, dtype: DType) -> Result<()> {
        let inside = bytes.start <= bytes.end && bytes.end <= self.bytes;
        if inside && (bytes.end - bytes.start).is_multiple_of(dtype.size()) {
            return Ok(());
        }
        let message = format!(
            "bytes {}..{} are not whole {dtype} elements of a buffer of {} bytes",
            bytes.start, bytes.end, self.bytes
        );
        Err(CollectiveError::Refused { operation: "reduce", message })
    }
}

/// A range of a buffer that belongs to a transport.
pub(crate) struct Claim {
    map: Arc<MmapRaw>,
    /// In the mapping.
    bytes: Range<usize>,
}

impl Claim {
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    pub fn bytes(&mut self) -> &mut [u8] {
        let start = self.map.as_mut_ptr().wrapping_add(self.bytes.start);
        // SAFETY: inside the mapping, which `map` keeps alive; the one who posted the range has left it to this claim, and no two claims
        // are worked on at once. Other ranks of the host may write other bytes of it, which no step of this rank touches.
        unsafe { std::slice::from_raw_parts_mut(start, self.bytes.len()) }
    }
}

fn write(base: *mut u8, bytes: usize, offset: usize, data: &[u8]) {
    assert!(offset <= bytes && data.len() <= bytes - offset, "write past the end of a shared buffer");
    // SAFETY: the range lies inside the mapping, which `data` (ordinary memory) cannot overlap.
    unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), base.add(offset), data.len()) }
}

fn read(base: *mut u8, bytes: usize, offset: usize, data: &mut [u8]) {
    assert!(offset <= bytes && data.len() <= bytes - offset, "read past the end of a shared buffer");
    // SAFETY: the range lies inside the mapping, which `data` (ordinary memory) cannot overlap.
    unsafe { std::ptr::copy_nonoverlapping(base.add(offset), data.as_mut_ptr(), data.len()) }
}
