//! Picks the next token from its logits. A pure function of the logits, the settings and a counter-based random number.

/// How to pick.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// 0: always the likeliest.
    pub temperature: f64,
    /// Only among this many likeliest; 0: all.
    pub top_k: usize,
    /// Only among the likeliest that together have this probability; 1: all.
    pub top_p: f64,
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Sampling {
        Sampling { temperature: 0.8, top_k: 50, top_p: 1.0, seed: 0 }
    }
}

impl Sampling {
    /// The token number `position` of the text.
    pub fn pick(&self, logits: &[f32], position: u64) -> usize {
        let best =
            || (0..logits.len()).max_by(|a, b| logits[*a].total_cmp(&logits[*b]).then(b.cmp(a))).unwrap_or(0);
        if self.temperature <= 0.0 {
            return best();
        }
        let mut order: Vec<usize> = (0..logits.len()).collect();
        let by_logit = |a: &usize, b: &usize| logits[*b].total_cmp(&logits[*a]).then(a.cmp(b));
        if self.top_k > 0 && self.top_k < order.len() {
            order.select_nth_unstable_by(self.top_k - 1, by_logit);
            order.truncate(self.top_k);
        }
        order.sort_unstable_by(by_logit);
        let top = f64::from(logits[order[0]]);
        let weights: Vec<f64> =
            order.iter().map(|i| ((f64::from(logits[*i]) - top) / self.temperature).exp()).collect();
        let total: f64 = weights.iter().sum();
        let mut kept = 0.0;
        let mut count = 0;
        for weight in &weights {
            kept += weight;
            count += 1;
            if kept >= self.top_p * total {
                break;
            }
        }
        let mut left = uniform(self.seed, position) * kept;
        for (index, weight) in order.iter().zip(&weights).take(count) {
            left -= weight;
            if left < 0.0 {
                return *index;
            }
        }
        order[count - 1]
    }
}

/// In `[0, 1)`.
fn uniform(seed: u64, counter: u64) -> f64 {
    let mut z = seed
        .wrapping_mul(0x9e37_79b9_7f4a_7c15)
        .wrapping_add((counter + 1).wrapping_mul(0xd1b5_4a32_d192_ed03));
    for _ in 0..2 {
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^= z >> 31;
    }
    (z >> 11) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOGITS: [f32; 4] = [1.0, 3.0, 2.0, 0.0];

    fn shares(sampling: Sampling) -> [f64; 4] {
        let mut counts = [0.0; 4];
        (0..20_000).for_each(|i| counts[sampling.pick(&LOGITS, i)] += 1.0 / 20_000.0);
        counts
    }

    #[test]
    fn draws_follow_the_softmax() {
        let plain = Sampling { temperature: 1.0, top_k: 0, top_p: 1.0, seed: 3 };
        let total: f64 = LOGITS.iter().map(|l| f64::from(*l).exp()).sum();
        for (share, logit) in shares(plain).iter().zip(LOGITS) {
            assert!((share - f64::from(logit).exp() / total).abs() < 0.01, "{share}");
        }
        assert_ne!(
            (0..50).map(|i| plain.pick(&LOGITS, i)).collect::<Vec<_>>(),
            (0..50).map(|i| Sampling { seed: 4, ..plain }.pick(&LOGITS, i)).collect::<Vec<_>>()
        );
    }

    #[test]
    fn limits_cut_the_tail() {
        let base = Sampling { temperature: 1.0, top_k: 0, top_p: 1.0, seed: 3 };
        assert_eq!(
            shares(Sampling { temperature: 0.0, ..base })[1],
            shares(Sampling { top_k: 1, ..base })[1]
        );
        let two = shares(Sampling { top_k: 2, ..base });
        assert!(two[0] == 0.0 && two[3] == 0.0 && two[2] > 0.2);
        // 0.64 and 0.24 of the probability: 0.7 needs both, 0.6 only the first.
        assert_eq!(shares(Sampling { top_p: 0.7, ..base })[0], 0.0);
        assert!(shares(Sampling { top_p: 0.6, ..base })[1] > 0.9999);
    }
}
