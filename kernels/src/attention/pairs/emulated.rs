//! Products of pairs as plain loops: the oracle of the others, and a way to test the passes on any CPU.

use super::{Pairs, SIDE};
use crate::simd::{Vector, plain::F32x8};
use crate::{Element, Store, bf16};

pub struct Emulated;

/// The two numbers of a word.
fn numbers(word: u32) -> [f32; 2] {
    [word as u16, (word >> 16) as u16].map(|bits| bf16::from_bits(bits).to_f32())
}

fn word(low: f32, high: f32) -> u32 {
    let bits = [low, high].map(|number| u32::from(<bf16 as Element>::from_f32(number).to_bits()));
    bits[0] | bits[1] << 16
}

fn lanes(vector: F32x8) -> [f32; 8] {
    let mut lanes = [0.0; 8];
    // SAFETY: the array has a number for each lane.
    unsafe { vector.store(lanes.as_mut_ptr()) };
    lanes
}

impl Pairs for Emulated {
    type V = F32x8;

    unsafe fn block(
        &self,
        words: usize,
        (a, a_row): (*const u32, usize),
        b: *const u32,
        mode: Store,
        (c, c_row): (*mut f32, usize),
    ) {
        for (r, column) in (0..SIDE).flat_map(|r| (0..SIDE).map(move |column| (r, column))) {
            // SAFETY: the caller's promise.
            unsafe {
                let to = c.add(r * c_row + column);
                let mut sum = if mode == Store::Add { *to } else { 0.0 };
                for w in 0..words {
                    let (a, b) = (numbers(*a.add(r * a_row + w)), numbers(*b.add(w * SIDE + column)));
                    sum += a[0] * b[0] + a[1] * b[1];
                }
                *to = sum;
            }
        }
    }

    unsafe fn join(&self, first: F32x8, second: F32x8, to: *mut u32) {
        let all = [lanes(first), lanes(second)].concat();
        for (i, pair) in all.chunks_exact(2).enumerate() {
            // SAFETY: the caller's promise.
            unsafe { *to.add(i) = word(pair[0], pair[1]) }
        }
    }

    unsafe fn zip(&self, low: F32x8, high: F32x8, to: *mut u32) {
        for (i, (low, high)) in lanes(low).into_iter().zip(lanes(high)).enumerate() {
            // SAFETY: the caller's promise.
            unsafe { *to.add(i) = word(low, high) }
        }
    }
}
