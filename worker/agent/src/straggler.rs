//! Which rank is slower than the others, and what is said of that. Ranks of a step end it together, so a slow one shows in how long it computes
//! while the others wait. Pure: looks at the ranks and the time go in, lines come out.
//!
//! Compared are means over windows of several steps, by the rules of `fleet_collectives::straggler`.

use crate::stall::{Sight, Standing, Told};
use fleet_collectives::Computed;
use fleet_collectives::straggler::{FINE, SLOW, STEPS_MIN, WINDOW_MIN, slowest, times_as_long};
use fleet_common::events::Culprit;
use fleet_common::ids::Rank;
use std::time::Duration;

/// It is told again when it has lasted for twice as long as before, and for this long at least.
const AGAIN_MIN: Duration = Duration::from_secs(60);

/// Watches the ranks of one gang on this node.
#[derive(Debug, Default)]
pub struct Straggler {
    /// The number within the job of the first of them.
    first_rank: usize,
    node: String,
    /// When this window began, in which step, and what each rank had computed then.
    window: Option<(Duration, u64, Vec<Computed>)>,
    /// Which rank was slow in the last window.
    suspect: Option<Slow>,
    /// It was so in two.
    named: Option<Named>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Slow {
    rank: usize,
    /// Of the others' time.
    times: f64,
    since: Duration,
    since_step: u64,
}

#[derive(Debug)]
struct Named {
    slow: Slow,
    again_at: Duration,
    standing: Standing,
}

impl Straggler {
    /// Of a gang whose ranks on `node` begin with this one.
    pub fn new(first_rank: Rank, node: &str) -> Straggler {
        Straggler { first_rank: first_rank as usize, node: node.to_owned(), ..Straggler::default() }
    }

    /// `sights` are all ranks of the gang on this node, in their order.
    pub fn look(&mut self, now: Duration, sights: &[Sight]) -> Option<Told> {
        let computed: Vec<Computed> = sights.iter().map(|sight| sight.report.computed).collect();
        // Until all have begun.
        if computed.iter().any(|computed| computed.steps == 0) {
            return None;
        }
        let step = sights.iter().map(|sight| sight.report.step).min().unwrap_or(0);
        let Some((began, began_step, before)) =
            self.window.as_ref().filter(|(.., before)| before.len() == computed.len())
        else {
            self.window = Some((now, step, computed));
            return None;
        };
        let means = means(before, &computed)?;
        if now.saturating_sub(*began) < WINDOW_MIN {
            return None;
        }
        let (since, since_step) = (*began, *began_step);
        let found = slowest(&means).map(|(rank, times)| Slow { rank, times, since, since_step });
        self.window = Some((now, step, computed));
        self.judge(now, found, &means)
    }

    /// Who is slow, while it lasts.
    pub fn standing(&self) -> Option<&Standing> {
        self.named.as_ref().map(|named| &named.standing)
    }

    fn judge(&mut self, now: Duration, found: Option<Slow>, means: &[f64]) -> Option<Told> {
        if let Some(named) = &mut self.named {
            let times = times_as_long(means, named.slow.rank);
            if times < FINE {
                let lasted = now.saturating_sub(named.slow.since).as_secs();
                let rank = self.first_rank + named.slow.rank;
                self.named = None;
                self.suspect = None;
                return Some(Told::GoesOn(format!(
                    "rank {rank} is as fast as the others again, after {lasted} s"
                )));
            }
            named.slow.times = times;
            if now < named.again_at {
                return None;
            }
            named.again_at = now + (now.saturating_sub(named.slow.since)).max(AGAIN_MIN);
            let line = line(&named.slow, self.first_rank, &self.node);
            return Some(Told::Stalls(line));
        }
        let found = found.filter(|found| found.times >= SLOW);
        let before = self.suspect.take();
        let slow = match (before, found) {
            (Some(before), Some(found)) if before.rank == found.rank => Slow { times: found.times, ..before },
            (_, found) => {
                self.suspect = found;
                return None;
            }
        };
        let line = line(&slow, self.first_rank, &self.node);
        let standing = Standing { since: slow.since, what: line.clone(), culprit: Culprit::Slow };
        self.named = Some(Named { slow, again_at: now + AGAIN_MIN, standing });
        Some(Told::Stalls(line))
    }
}

fn line(slow: &Slow, first_rank: usize, node: &str) -> String {
    format!(
        "rank {} on {node} is {:.1} times as slow as the others since step {}",
        first_rank + slow.rank,
        slow.times,
        slow.since_step
    )
}

/// Seconds that each rank has computed for a step, once all have done enough steps.
fn means(before: &[Computed], now: &[Computed]) -> Option<Vec<f64>> {
    let mean = |(before, now): (&Computed, &Computed)| {
        let steps = now.steps.checked_sub(before.steps).filter(|steps| *steps >= STEPS_MIN)?;
        Some(now.time.saturating_sub(before.time).as_secs_f64() / steps as f64)
    };
    before.iter().zip(now).map(mean).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // in a test an unwrap is an assertion
mod tests {
    use super::*;
    use fleet_collectives::{Doing, Exchanged, RankReport};

    /// Steps take as long as the slowest rank computes, in milliseconds; so much of them each rank computes.
    struct Gang {
        watch: Straggler,
        now: Duration,
        step: u64,
        computed: Vec<Duration>,
    }

    impl Gang {
        fn new(ranks: usize) -> Gang {
            let watch = Straggler::new(4, "box-1");
            Gang { watch, now: Duration::ZERO, step: 1, computed: vec![Duration::ZERO; ranks] }
        }

        /// Goes on so for some seconds, and gives what was told.
        fn run(&mut self, seconds: u64, ms: &[u64]) -> Vec<String> {
            let mut told = Vec::new();
            let end = self.now + Duration::from_secs(seconds);
            let takes = Duration::from_millis(*ms.iter().max().unwrap());
            while self.now < end {
                self.now += takes;
                self.step += 1;
                for (computed, ms) in self.computed.iter_mut().zip(ms) {
                    *computed += Duration::from_millis(*ms);
                }
                let sight = |(rank, time): (usize, &Duration)| Sight {
                    report: RankReport {
                        rank,
                        doing: Doing::Outside { since: Duration::ZERO, activity: None },
                        calls: 0,
                        step: self.step,
                        last_step: Some(takes),
                        computed: Computed { steps: self.step - 1, time: *time },
                        exchanged: Exchanged::default(),
                    },
                    pid: 1,
                    stopped: false,
                    cpu: 0,
                };
                let sights: Vec<Sight> = self.computed.iter().enumerate().map(sight).collect();
                if let Some(Told::Stalls(line) | Told::GoesOn(line)) = self.watch.look(self.now, &sights) {
                    told.push(line);
                }
            }
            told
        }
    }

    #[test]
    fn a_slow_rank_is_named_while_it_is_slow_at_growing_intervals_and_no_more_when_it_is_over() {
        let mut gang = Gang::new(4);
        assert_eq!(gang.run(60, &[100, 110, 90, 100]), Vec::<String>::new());
        assert_eq!(gang.watch.standing(), None);
        let told = gang.run(400, &[100, 110, 190, 100]);
        assert_eq!(told.len(), 4, "soon, and after one, two and four minutes: {told:?}");
        assert!(
            told[0].starts_with("rank 6 on box-1 is 1.9 times as slow as the others since step "),
            "{told:?}"
        );
        assert!(told[0].ends_with(|c: char| c.is_ascii_digit()));
        let standing = gang.watch.standing().unwrap();
        assert_eq!(standing.what, told[0]);
        assert!(standing.since >= Duration::from_secs(55) && standing.since <= Duration::from_secs(66));
        let over = gang.run(60, &[100, 110, 105, 100]);
        assert_eq!(over.len(), 1);
        assert!(over[0].starts_with("rank 6 is as fast as the others again, after "), "{over:?}");
        assert_eq!(gang.watch.standing(), None);
    }

    #[test]
    fn neither_one_slow_window_nor_a_little_nor_a_rank_alone_is_told() {
        let mut gang = Gang::new(2);
        assert!(gang.run(30, &[100, 140]).is_empty());
        // Once within a window: a checkpoint's copy, a page that came late.
        for _ in 0..5 {
            assert!(gang.run(1, &[100, 400]).is_empty());
            assert!(gang.run(30, &[100, 100]).is_empty());
        }
        assert!(gang.run(30, &[1, 2]).is_empty(), "a millisecond is no matter");
        assert!(Gang::new(1).run(30, &[100]).is_empty());
    }

    #[test]
    fn of_two_ranks_the_slower_one_is_named() {
        let told = Gang::new(2).run(30, &[300, 100]);
        assert_eq!(told.len(), 1);
        assert!(told[0].starts_with("rank 4 on box-1 is 3.0 times as slow"), "{told:?}");
    }
}
