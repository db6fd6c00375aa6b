//! Which host computes longer than the others, and what is said of that. Agents compare the ranks of a node; this compares the nodes of a run.
//! Pure: what was computed goes in, lines come out.

use fleet_collectives::straggler::{FINE, SLOW, STEPS_MIN, WINDOW_MIN, slowest, times_as_long};

/// Looks at the hosts of one run, all of which have equally many ranks.
#[derive(Debug)]
pub(super) struct SlowHost {
    /// Ranks of each.
    ranks: usize,
    window: Window,
    /// Which was slow in the last window, and since which step.
    suspect: Option<(usize, u64)>,
    /// It was so in two.
    named: Option<usize>,
}

#[derive(Debug, Default)]
struct Window {
    steps: u64,
    /// All steps together.
    seconds: f64,
    /// What a rank of each host has computed of them.
    computed: Vec<f64>,
}

impl SlowHost {
    pub fn new(ranks: usize) -> SlowHost {
        SlowHost { ranks, window: Window::default(), suspect: None, named: None }
    }

    /// `steps` steps up to `step` took `step_s` seconds each, of which a rank of each host has computed for so many.
    pub fn look(&mut self, step: u64, steps: u64, step_s: f64, computed_s: &[f64]) -> Option<String> {
        let window = &mut self.window;
        window.steps += steps;
        window.seconds += steps as f64 * step_s;
        window.computed.resize(computed_s.len(), 0.0);
        for (sum, seconds) in window.computed.iter_mut().zip(computed_s) {
            *sum += steps as f64 * seconds;
        }
        if window.steps < STEPS_MIN || window.seconds < WINDOW_MIN.as_secs_f64() {
            return None;
        }
        let over = std::mem::take(window);
        let means: Vec<f64> = over.computed.iter().map(|sum| sum / over.steps as f64).collect();
        self.judge(&means, step + 1 - over.steps)
    }

    fn judge(&mut self, means: &[f64], since: u64) -> Option<String> {
        if let Some(host) = self.named {
            let is_fine = times_as_long(means, host) < FINE;
            self.named = self.named.filter(|_| !is_fine);
            return is_fine.then(|| format!("{} is as fast as the others again", self.name(host)));
        }
        let before = self.suspect.take();
        let (host, times) = slowest(means).filter(|(_, times)| *times >= SLOW)?;
        let Some((_, since)) = before.filter(|(before, _)| *before == host) else {
            self.suspect = Some((host, since));
            return None;
        };
        self.named = Some(host);
        Some(format!("{} is {times:.1} times as slow as the others since step {since}", self.name(host)))
    }

    fn name(&self, host: usize) -> String {
        let first = host * self.ranks;
        match self.ranks {
            1 => format!("node {host} of the run (rank {first})"),
            ranks => format!("node {host} of the run (ranks {first} to {})", first + ranks - 1),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A run whose steps take half a second: six are a window.
    struct Run(SlowHost, u64);

    impl Run {
        fn go_on(&mut self, steps: u64, computed_s: &[f64]) -> Vec<String> {
            let Run(watch, from) = self;
            let said =
                (*from + 1..=*from + steps).filter_map(|step| watch.look(step, 1, 0.5, computed_s)).collect();
            *from += steps;
            said
        }
    }

    #[test]
    fn a_slow_host_is_named_once_and_again_when_it_is_fast() {
        let mut run = Run(SlowHost::new(4), 100);
        assert!(run.go_on(60, &[0.1, 0.11, 0.09]).is_empty());
        let line = "node 1 of the run (ranks 4 to 7) is 2.0 times as slow as the others since step 161";
        assert_eq!(run.go_on(60, &[0.1, 0.2, 0.1]), [line]);
        assert!(run.go_on(60, &[0.1, 0.14, 0.1]).is_empty(), "not yet fast");
        let line = "node 1 of the run (ranks 4 to 7) is as fast as the others again";
        assert_eq!(run.go_on(60, &[0.1, 0.11, 0.1]), [line]);
    }

    #[test]
    fn one_slow_window_or_a_run_on_one_host_is_no_matter() {
        let mut run = Run(SlowHost::new(1), 0);
        for _ in 0..4 {
            assert!(run.go_on(6, &[0.1, 0.4]).is_empty());
            assert!(run.go_on(54, &[0.1, 0.1]).is_empty());
        }
        assert!(Run(SlowHost::new(2), 0).go_on(60, &[0.1]).is_empty());
    }
}
