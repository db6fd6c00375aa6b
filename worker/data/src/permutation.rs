//! A seeded shuffle of `0..n` that is computed per element, in constant memory: a Feistel network with cycle walking.

/// Rounds of the network; four make it a good permutation, two more cost nothing that is seen.
const ROUNDS: u64 = 6;

/// A bijection on `0..n`, chosen by a key. The same on every machine and for ever.
#[derive(Clone, Copy, Debug)]
pub struct Permutation {
    n: u64,
    /// Bits of one half; the network works on `0..4^half_bits`, the smallest such range that holds `0..n`.
    half_bits: u32,
    key: u64,
}

impl Permutation {
    pub fn new(n: u64, seed: u64, epoch: u64) -> Permutation {
        let bits = u64::BITS - n.saturating_sub(1).leading_zeros();
        Permutation { n, half_bits: bits.div_ceil(2).max(1), key: mix(mix(seed).wrapping_add(epoch)) }
    }

    /// Where position `i < n` goes.
    pub fn at(&self, i: u64) -> u64 {
        assert!(i < self.n, "position {i} of a permutation of {}", self.n);
        let mut x = i;
        loop {
            x = self.network(x);
            if x < self.n {
                return x; // outside, walk on along the cycle; at most four steps are expected
            }
        }
    }

    fn network(&self, x: u64) -> u64 {
        let mask = (1u64 << self.half_bits) - 1;
        let (mut left, mut right) = (x >> self.half_bits, x & mask);
        for round in 0..ROUNDS {
            let f = mix(self.key ^ (right | round << 56)) & mask;
            (left, right) = (right, left ^ f);
        }
        left << self.half_bits | right
    }
}

/// The finaliser of splitmix64 on the next state: a fixed, well-mixed bijection of 64 bits.
pub(crate) fn mix(x: u64) -> u64 {
    let mut z = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_element_appears_once(n in 1u64..3000, seed: u64, epoch in 0u64..1000) {
            let permutation = Permutation::new(n, seed, epoch);
            let mut seen: Vec<u64> = (0..n).map(|i| permutation.at(i)).collect();
            seen.sort_unstable();
            prop_assert!(seen.into_iter().eq(0..n));
        }

        #[test]
        fn large_ranges_stay_in_range(n in 1u64..=1 << 55, seed: u64, share in 0.0f64..1.0) {
            let i = ((n - 1) as f64 * share) as u64;
            prop_assert!(Permutation::new(n, seed, 0).at(i.min(n - 1)) < n);
        }
    }

    #[test]
    fn neighbours_are_scattered() {
        let n = 10_000;
        let permutation = Permutation::new(n, 7, 0);
        let kept = (1..n).filter(|&i| permutation.at(i).abs_diff(permutation.at(i - 1)) < 10).count();
        assert!(kept < 60, "{kept} of 10000 neighbours stay within 10; a fair shuffle keeps about 19");
        let in_place = (0..n).filter(|&i| permutation.at(i) == i).count();
        assert!(in_place < 8, "{in_place} fixed points; a fair shuffle has about 1");
    }
}
