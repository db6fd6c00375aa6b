//! Which numbers are dropped in training: a pure function of the sequence, of what reads it and of the place in it, so that any number of ranks and
//! threads drops the same.

use fleet_kernels::Element;

/// Random bits that decide over one number.
const BITS: u32 = 16;

/// Of one row: token `token` of a sequence with `noise`, as the product whose weight begins at `weight` reads it.
pub fn of_row(noise: u64, weight: usize, token: usize) -> u64 {
    mix(mix(noise ^ mix(weight as u64)).wrapping_add(token as u64))
}

/// Of a sequence of a run's data in one of its steps.
pub fn of_sequence(seed: u64, step: u64, sequence: u64) -> u64 {
    mix(mix(mix(seed).wrapping_add(step)).wrapping_add(sequence))
}

/// Makes about `share` of the numbers zero, and the others larger, so that their sum is expected to stay.
pub fn apply<E: Element>(seed: u64, share: f32, row: &mut [E]) {
    let (below, scale) =
        ((share * (1 << BITS) as f32) as u64, if share < 1.0 { 1.0 / (1.0 - share) } else { 0.0 });
    for (number, four) in row.chunks_mut((u64::BITS / BITS) as usize).enumerate() {
        let mut bits = mix(seed.wrapping_add((number as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15)));
        for x in four {
            let keep = bits & ((1 << BITS) - 1) >= below;
            bits >>= BITS;
            *x = E::from_f32(if keep { x.to_f32() * scale } else { 0.0 });
        }
    }
}

/// The finaliser of splitmix64.
pub(crate) fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_is_dropped_and_the_mean_stays() {
        for share in [0.0f32, 0.05, 0.5, 1.0] {
            let mut row = vec![1.0f32; 100_000];
            apply(of_row(of_sequence(1, 2, 3), 64, 5), share, &mut row);
            let dropped = row.iter().filter(|x| **x == 0.0).count() as f32 / 1e5;
            assert!((dropped - share).abs() < 3e-3, "{share}: {dropped}");
            let mean = row.iter().sum::<f32>() / 1e5;
            assert!((mean - if share < 1.0 { 1.0 } else { 0.0 }).abs() < 1e-2, "{share}: {mean}");
        }
    }

    #[test]
    fn rows_tokens_steps_and_products_differ() {
        let row = |noise, weight, token| {
            let mut row = vec![1.0f32; 64];
            apply(of_row(noise, weight, token), 0.5, &mut row);
            row
        };
        let one = row(of_sequence(1, 2, 3), 0, 0);
        assert_eq!(one, row(of_sequence(1, 2, 3), 0, 0));
        for other in [
            row(of_sequence(1, 3, 3), 0, 0),
            row(of_sequence(1, 2, 4), 0, 0),
            row(of_sequence(1, 2, 3), 64, 0),
        ] {
            assert_ne!(one, other);
        }
        assert_ne!(one, row(of_sequence(1, 2, 3), 0, 1));
    }
}
