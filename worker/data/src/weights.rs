//! How often what has a weight is trained on in an epoch.

/// A weight of 2 is twice, one of 0.5 once for half of what has it, one of 2.5 twice and a third time for half of it. Which half follows from
/// the hash of each.
pub(crate) fn times(weight: f64, hash: u64) -> u8 {
    let share = f64::from(hash as u32) / (f64::from(u32::MAX) + 1.0);
    (weight.floor() + f64::from(u8::from(share < weight.fract()))) as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_weight_is_how_often_on_average() {
        let hashes = || (0..10_000u64).map(|i| i.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(17));
        for weight in [1.0, 0.25, 2.5, 100.0] {
            let all: u64 = hashes().map(|hash| u64::from(times(weight, hash))).sum();
            assert!((all as f64 / 10_000.0 - weight).abs() < 0.02, "{weight}: {all}");
        }
        assert!(hashes().all(|hash| times(1.0, hash) == 1));
    }
}
