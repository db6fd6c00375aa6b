//! How much of a gang's output goes to the coordinators. They keep it on every one of their disks; the rest stays in the ranks' files
//! on the node. Pure: the time is an argument.

use std::time::Duration;

/// What one gang's output may take, in bytes as `line_cost` counts them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rates {
    /// In the long run.
    pub per_s: u64,
    /// At once, after a silence.
    pub burst: u64,
    /// Of one start of a job, on one node.
    pub total: u64,
}

impl Rates {
    /// A screenful each second, and some thousand lines when a program begins or fails.
    pub const USUAL: Rates = Rates { per_s: 64 << 10, burst: 2 << 20, total: 64 << 20 };
    /// All of it: for a cluster that serves one job and ends with it.
    pub const UNLIMITED: Rates = Rates { per_s: u64::MAX, burst: u64::MAX, total: u64::MAX };

    /// The usual ones at another rate; 0 for all.
    pub fn of(per_s: u64) -> Rates {
        match per_s {
            0 => Rates::UNLIMITED,
            _ => Rates { per_s, burst: Rates::USUAL.burst.max(per_s), ..Rates::USUAL },
        }
    }
}

/// A token bucket with two positions: once it is empty it stays shut until an eighth of it has come back, so that what is kept are
/// passages that can be read and not every hundredth line.
#[derive(Debug)]
pub struct Budget {
    rates: Rates,
    /// Bytes that may go at once.
    level: u64,
    /// When it was reckoned.
    at: Duration,
    /// Of the total.
    left: u64,
    open: bool,
}

impl Budget {
    pub fn new(rates: Rates) -> Budget {
        Budget { rates, level: rates.burst, at: Duration::ZERO, left: rates.total, open: true }
    }

    /// Takes `cost` bytes out, if they are there.
    pub fn admits(&mut self, cost: u64, now: Duration) -> bool {
        self.refill(now);
        self.open |= self.level >= self.rates.burst / 8;
        self.open &= cost <= self.level && cost <= self.left;
        if self.open {
            self.level -= cost;
            self.left -= cost;
        }
        self.open
    }

    /// It will never open again for more than a few words.
    pub fn is_spent(&self) -> bool {
        !self.open && self.left < self.rates.burst / 8
    }

    fn refill(&mut self, now: Duration) {
        let micros = now.saturating_sub(self.at).as_micros();
        let come = micros.saturating_mul(u128::from(self.rates.per_s)) / 1_000_000;
        // A fraction of a byte is waited for, not lost.
        if come > 0 {
            self.level =
                self.level.saturating_add(u64::try_from(come).unwrap_or(u64::MAX)).min(self.rates.burst);
            self.at = now;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const RATES: Rates = Rates { per_s: 1_000, burst: 8_000, total: 100_000 };

    fn seconds(s: f64) -> Duration {
        Duration::from_secs_f64(s)
    }

    #[test]
    fn after_a_burst_it_opens_again_for_a_passage() {
        let mut budget = Budget::new(RATES);
        assert!((0..8).all(|_| budget.admits(1_000, seconds(0.0))));
        assert!(!budget.admits(1_000, seconds(0.1)));
        assert!(!budget.admits(10, seconds(0.9)), "shut, though ten bytes are there");
        assert!(budget.admits(10, seconds(1.1)));
        assert!(budget.admits(900, seconds(1.1)), "and open for what has come back");
        assert!(!budget.admits(900, seconds(1.1)));
    }

    #[test]
    fn the_total_is_for_ever() {
        let mut budget = Budget::new(RATES);
        let taken = (0..10_000).filter(|s| budget.admits(1_000, seconds(f64::from(*s)))).count();
        assert_eq!(taken, 100);
        assert!(budget.is_spent());
        let mut unlimited = Budget::new(Rates::of(0));
        assert!((0..1_000).all(|_| unlimited.admits(1 << 40, Duration::ZERO)));
    }

    #[test]
    fn many_small_steps_of_time_are_as_much_as_one_large_one() {
        let mut budget = Budget::new(RATES);
        assert!(budget.admits(8_000, Duration::ZERO));
        let opened = (0..2_000_000).step_by(37).find(|at| budget.admits(1, Duration::from_micros(*at)));
        assert!((1_000_000..1_100_000).contains(&opened.unwrap()), "{opened:?}");
    }

    proptest! {
        #[test]
        fn never_more_than_the_burst_and_the_rate(
            lines in prop::collection::vec((0u64..3_000, 1u64..5_000), 0..300),
        ) {
            let mut budget = Budget::new(RATES);
            let (mut at, mut taken) = (0, 0);
            for (after_ms, cost) in lines {
                at += after_ms;
                taken += if budget.admits(cost, Duration::from_millis(at)) { cost } else { 0 };
                prop_assert!(taken <= RATES.burst + RATES.per_s * at / 1_000 && taken <= RATES.total);
            }
        }
    }
}
