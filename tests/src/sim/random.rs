//! The only source of chance in a run: xoshiro256**, seeded through splitmix64. Written here, so that a seed means the same for ever.

use std::ops::Range;

#[derive(Clone, Debug)]
pub struct Random {
    s: [u64; 4],
}

/// One step of splitmix64: turns any number into one that looks like chance.
pub fn mix(n: u64) -> u64 {
    let mut z = n.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

impl Random {
    pub fn new(seed: u64) -> Random {
        let mut state = seed;
        let s = [0; 4].map(|_: u64| {
            state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
            mix(state)
        });
        Random { s }
    }

    #[expect(clippy::should_implement_trait, reason = "it never ends, and an iterator would read worse")]
    pub fn next(&mut self) -> u64 {
        let result = self.s[1].wrapping_mul(5).rotate_left(7).wrapping_mul(9);
        let t = self.s[1] << 17;
        self.s[2] ^= self.s[0];
        self.s[3] ^= self.s[1];
        self.s[1] ^= self.s[2];
        self.s[0] ^= self.s[3];
        self.s[2] ^= t;
        self.s[3] = self.s[3].rotate_left(45);
        result
    }

    /// From `range`, which must not be empty.
    pub fn range(&mut self, range: Range<u64>) -> u64 {
        let width = range.end - range.start;
        range.start + ((u128::from(self.next()) * u128::from(width)) >> 64) as u64
    }

    /// From 0 to `count - 1`.
    pub fn index(&mut self, count: usize) -> usize {
        self.range(0..count as u64) as usize
    }

    /// True `part` times in `whole`.
    pub fn chance(&mut self, part: u64, whole: u64) -> bool {
        self.range(0..whole) < part
    }

    pub fn pick<'a, T>(&mut self, from: &'a [T]) -> Option<&'a T> {
        if from.is_empty() { None } else { from.get(self.index(from.len())) }
    }

    /// A waiting time with this mean, at most ten times it: mostly short, sometimes long.
    pub fn around(&mut self, mean: u64) -> u64 {
        let uniform = (self.next() >> 11) as f64 / (1u64 << 53) as f64;
        ((-(1.0 - uniform).ln()).min(10.0) * mean as f64) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_means_the_same_for_ever() {
        let mut random = Random::new(1);
        let drawn: Vec<u64> = (0..3).map(|_| random.next()).collect();
        assert_eq!(
            drawn,
            [18_001_451_845_637_162_709, 15_091_038_358_276_433_251, 7_540_168_338_507_695_658]
        );
    }

    #[test]
    fn ranges_are_kept() {
        let mut random = Random::new(7);
        let drawn: Vec<u64> = (0..1000).map(|_| random.range(3..6)).collect();
        assert!((3..6).all(|n| drawn.contains(&n)) && drawn.iter().all(|n| (3..6).contains(n)));
        assert!((0..1000).all(|_| random.around(5) <= 50));
    }
}
