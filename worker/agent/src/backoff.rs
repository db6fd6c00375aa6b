//! How long to wait before the next attempt: doubling, with jitter so that many agents do not come back at once. Pure.

use rand::Rng;
use std::time::Duration;

const FIRST: Duration = Duration::from_millis(50);
const LONGEST: Duration = Duration::from_secs(2);

#[derive(Debug)]
pub struct Backoff {
    next: Duration,
}

impl Default for Backoff {
    fn default() -> Self {
        Backoff { next: FIRST }
    }
}

impl Backoff {
    /// Between half of the present wait and all of it.
    pub fn wait(&mut self, rng: &mut impl Rng) -> Duration {
        let wait = self.next.mul_f64(rng.random_range(0.5..=1.0));
        self.next = (self.next * 2).min(LONGEST);
        wait
    }

    /// After a success.
    pub fn reset(&mut self) {
        self.next = FIRST;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;

    #[test]
    fn waits_double_up_to_two_seconds_and_start_over_after_a_success() {
        let mut rng = rand::rngs::StdRng::seed_from_u64(1);
        let mut backoff = Backoff::default();
        for limit_ms in [50, 100, 200, 400, 800, 1600, 2000, 2000] {
            let wait = backoff.wait(&mut rng);
            let limit = Duration::from_millis(limit_ms);
            assert!(wait >= limit / 2 && wait <= limit, "{wait:?} of {limit:?}");
        }
        backoff.reset();
        assert!(backoff.wait(&mut rng) <= FIRST);
    }
}
