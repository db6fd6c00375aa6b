//! Numbers in memory that ranks share, seen as slices.
//!
//! Rust's rules stop at the process: that no other rank writes what this one reads is the protocol of `fleet_collectives::SharedHost`
//! (reduce, finish, update the own part, barrier; gather, wait), which the strategies follow. Within the process the borrow checker holds.

#![allow(unsafe_code)]

use fleet_collectives::{Common, PerRank};
pub use number::Number;
use std::marker::PhantomData;
use std::ops::Range;

mod number {
    /// Types of which every bit pattern is a value.
    pub trait Number: Copy + Send + Sync + 'static {}
    impl Number for u8 {}
    impl Number for i8 {}
    impl Number for f32 {}
    impl Number for half::bf16 {}
}

/// One buffer for all ranks of the host: master weights, optimizer state, the bf16 copy.
#[derive(Debug)]
pub struct SharedSlice<T> {
    memory: Common,
    len: usize,
    kind: PhantomData<T>,
}

impl<T: Number> SharedSlice<T> {
    /// `memory` is page-aligned and zeroed, as `SharedHost::allocate_common` gives it.
    pub fn new(memory: Common) -> Self {
        let len = memory.len() / size_of::<T>();
        assert!(memory.as_mut_ptr().cast::<T>().is_aligned(), "shared memory is page-aligned");
        Self { memory, len, kind: PhantomData }
    }

    /// To be posted.
    pub fn memory(&self) -> &Common {
        &self.memory
    }

    /// To be read between a barrier and the next update.
    pub fn all(&self) -> &[T] {
        // SAFETY: the mapping is `len` numbers long and lives as long as `memory`; all bit patterns are values; no rank writes
        // between a barrier and the next update, and this process writes only through `&mut self`.
        unsafe { std::slice::from_raw_parts(self.memory.as_mut_ptr().cast(), self.len) }
    }

    /// A part that no other rank writes. Panics outside of the buffer.
    pub fn part(&self, range: Range<usize>) -> &[T] {
        assert!(range.start <= range.end && range.end <= self.len, "a part inside of the buffer");
        // SAFETY: inside the mapping; this process writes only through `&mut self`, and other ranks write other parts.
        unsafe {
            std::slice::from_raw_parts(self.memory.as_mut_ptr().cast::<T>().add(range.start), range.len())
        }
    }

    /// The part that this rank alone updates. Panics outside of the buffer.
    pub fn part_mut(&mut self, range: Range<usize>) -> &mut [T] {
        assert!(range.start <= range.end && range.end <= self.len, "a part inside of the buffer");
        // SAFETY: inside the mapping; `&mut self` excludes other uses in this process, the partition of `fleet_collectives::part`
        // those in others.
        unsafe {
            std::slice::from_raw_parts_mut(self.memory.as_mut_ptr().cast::<T>().add(range.start), range.len())
        }
    }
}

/// This rank's own numbers, which its peers reduce or read in place: gradients, shards.
pub struct RankSlice<T> {
    memory: PerRank,
    len: usize,
    kind: PhantomData<T>,
}

impl<T: Number> RankSlice<T> {
    /// `memory` is page-aligned and zeroed, as `Exchange::allocate_per_rank` gives it.
    pub fn new(memory: PerRank) -> Self {
        let len = memory.len() / size_of::<T>();
        assert!(memory.as_mut_ptr().cast::<T>().is_aligned(), "shared memory is page-aligned");
        Self { memory, len, kind: PhantomData }
    }

    /// To be posted.
    pub fn memory(&self) -> &PerRank {
        &self.memory
    }

    /// A range that is not posted. Panics outside of the buffer.
    pub fn range(&self, range: Range<usize>) -> &[T] {
        assert!(range.start <= range.end && range.end <= self.len, "a range inside of the buffer");
        // SAFETY: as for `range_mut`; nobody writes while `self` is borrowed.
        unsafe {
            std::slice::from_raw_parts(self.memory.as_mut_ptr().cast::<T>().add(range.start), range.len())
        }
    }

    /// A range that is not posted: until `wait` or `finish` its peers own it. Panics outside of the buffer.
    pub fn range_mut(&mut self, range: Range<usize>) -> &mut [T] {
        assert!(range.start <= range.end && range.end <= self.len, "a range inside of the buffer");
        // SAFETY: inside the mapping, which lives as long as `memory`; all bit patterns are values; `&mut self` excludes other uses in this
        // process; peers write only what was posted, and the strategy does not touch that until it was waited for.
        unsafe {
            std::slice::from_raw_parts_mut(self.memory.as_mut_ptr().cast::<T>().add(range.start), range.len())
        }
    }
}

/// Numbers as the bytes in which they lie in memory: little-endian on every machine fleet runs on.
pub fn as_bytes<T: Number>(numbers: &[T]) -> &[u8] {
    // SAFETY: numbers have no padding, every byte is initialised, and bytes need no alignment.
    unsafe { std::slice::from_raw_parts(numbers.as_ptr().cast(), size_of_val(numbers)) }
}
