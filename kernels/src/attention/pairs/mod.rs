//! Attention in bf16 by products of pairs: the CPU multiplies two bf16 numbers with two others at once, with sums in f32.
//! Probabilities and the gradients of scores are rounded to bf16 before they are multiplied again, as PyTorch's fused
//! attention has it; all else is f32.
//!
//! A *word* is a pair of neighbouring bf16 numbers, the first in its low half. A left operand has rows of words: word w
//! of a row holds its terms 2w and 2w + 1. A right operand lies in panels of [`SIDE`] columns: row w of a panel has for
//! each column the word with these terms. All sizes are padded with zeros to multiples of `SIDE`, and what nobody sees is
//! left out block by block of `SIDE` x `SIDE` scores.

mod backward;
mod forward;
mod layout;
mod view;

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod amx;
#[cfg(target_arch = "x86_64")]
mod dot;
#[cfg(test)]
mod emulated;
#[cfg(test)]
mod tests;

pub use backward::Backward;
pub use forward::Forward;

use crate::simd::{Level, Vector, level};
use crate::{Heads, Store};

/// Rows and columns of one block of a product, and terms that one step of it adds.
const SIDE: usize = 32;
/// Words in one step.
const STEP: usize = SIDE / 2;

/// A CPU's way to multiply pairs. A value of it is the proof that this thread may do so as long as it lives.
pub trait Pairs {
    type V: Vector;

    /// `c = a * b` or `c += a * b` for one block, over `words` words, a multiple of [`STEP`]. `a` has `SIDE` rows that
    /// start `a_row` words apart, `b` is (a part of) a panel, `c` has rows `c_row` numbers apart.
    /// # Safety
    /// That much is readable at `a` and `b`, and readable and writable at `c`.
    unsafe fn block(
        &self,
        words: usize,
        a: (*const u32, usize),
        b: *const u32,
        mode: Store,
        c: (*mut f32, usize),
    );

    /// Rounds the numbers of two vectors to bf16, one vector after the other.
    /// # Safety
    /// `V::LANES` words are writable at `to`.
    unsafe fn join(&self, first: Self::V, second: Self::V, to: *mut u32);

    /// Rounds the numbers of two vectors to bf16: word i has the two numbers of lane i.
    /// # Safety
    /// `V::LANES` words are writable at `to`.
    unsafe fn zip(&self, low: Self::V, high: Self::V, to: *mut u32);
}

/// One pass of attention over the heads of a batch. `run` is always inlined, so that it is compiled for the CPU of `P`.
pub trait Kernel {
    fn run<P: Pairs>(self, pairs: &P);
}

/// Whether this thread multiplies pairs for such heads.
pub fn serve(shape: &Heads) -> bool {
    level() >= Level::Avx512Bf16 && shape.head_dim.is_multiple_of(2)
}

/// Runs a kernel with the best pairs of the CPU, which `serve` said that it has.
#[cfg(target_arch = "x86_64")]
pub fn run(kernel: impl Kernel) {
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")]
    fn compiled<P: Pairs>(pairs: &P, kernel: impl Kernel) {
        kernel.run(pairs);
    }
    let level = level();
    assert!(level >= Level::Avx512Bf16, "pairs at level {level:?}");
    #[cfg(target_os = "linux")]
    if level == Level::Amx {
        // SAFETY: the level says that the CPU has both the tiles and the vectors, and that the process may use them.
        return unsafe { compiled(&amx::Tiles::begin(), kernel) };
    }
    // SAFETY: the level says that the CPU has these vectors.
    unsafe { compiled(&dot::Vectors::begin(), kernel) }
}

#[cfg(not(target_arch = "x86_64"))]
pub fn run(_kernel: impl Kernel) {
    unreachable!("`serve` is false on such a CPU");
}

/// A left operand: `SIDE` rows that start `row` words apart.
#[derive(Clone, Copy)]
struct Left<'a> {
    words: &'a [u32],
    row: usize,
}

/// Where a product goes: `SIDE` rows that start `row` numbers apart.
struct Block<'a> {
    numbers: &'a mut [f32],
    row: usize,
}

/// [`Pairs::block`] with what it reads and writes checked.
#[inline(always)]
fn product<P: Pairs>(pairs: &P, words: usize, a: Left, b: &[u32], mode: Store, c: Block) {
    assert!(words.is_multiple_of(STEP) && words > 0, "product: {words} words");
    assert!((SIDE - 1) * a.row + words <= a.words.len(), "product: left operand");
    assert!(SIDE * words <= b.len(), "product: right operand");
    assert!((SIDE - 1) * c.row + SIDE <= c.numbers.len(), "product: result");
    let (a, c) = ((a.words.as_ptr(), a.row), (c.numbers.as_mut_ptr(), c.row));
    // SAFETY: the assertions above bound the last word and number of each.
    unsafe { pairs.block(words, a, b.as_ptr(), mode, c) }
}
