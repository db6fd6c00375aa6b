//! Whether a gang stands still, for whom it waits, and what is said of that. Pure: looks at its ranks and the time go in, lines come out.
//!
//! How long may a rank let the others wait? In a step: as long as a step usually takes, and `MARGIN`. A step that takes twice its time on one
//! rank is no stall then: its peers wait for the second half only. Where nobody waits, the whole gang has twice the time. What has no usual
//! time (the start, the first step, evaluation, saving) may last as long as the rank computes, and a minute without; reading and writing of
//! large files computes little, but not nothing. A process that a signal or a debugger has stopped does nothing of this, and needs no
//! patience. Every stall must be seen in two looks, with no call made in between: a machine that was suspended shows long waits in the first.

use fleet_collectives::{Activity, Doing, RankReport};
use std::collections::VecDeque;
use std::time::Duration;

/// Between two looks at the ranks.
pub const LOOK_PERIOD: Duration = Duration::from_secs(1);
/// Nobody is told of a shorter wait.
const MARGIN: Duration = Duration::from_secs(2);
/// For a rank that does not compute, in what has no usual time.
const PATIENCE: Duration = Duration::from_secs(60);
/// After a stall is over, before the next one is told: a gang that limps does not fill the log.
const PAUSE: Duration = Duration::from_secs(30);
/// Steps of which the usual time is the median.
const STEPS: usize = 9;
/// Ticks of computing below which a process does nothing: a tenth of a second.
const IDLE_TICKS: u64 = 10;
/// Ranks of which a line says what they do.
const DETAILS_MAX: usize = 4;

/// One rank, as it was at one moment.
#[derive(Clone, Debug)]
pub struct Sight {
    pub report: RankReport,
    pub pid: u32,
    /// By a signal or a debugger.
    pub stopped: bool,
    /// Time that it has computed so far, in the kernel's ticks.
    pub cpu: u64,
}

/// What is to be told.
#[derive(Clone, Debug, PartialEq)]
pub enum Told {
    /// It stands still, or does so yet.
    Stalls(String),
    GoesOn(String),
}

/// Watches one gang.
#[derive(Debug, Default)]
pub struct Watch {
    /// How long the last steps took, the newest last.
    steps: VecDeque<Duration>,
    /// The last of them.
    step: u64,
    /// Of each rank: what it had computed, and when that was last seen to have grown.
    computed: Vec<(u64, Duration)>,
    /// All calls made up to the last look, if it showed a stall.
    seen: Option<u64>,
    /// When the stall that was told began, and how long it must last to be told again.
    told: Option<(Duration, Duration)>,
    not_before: Duration,
}

struct Stall<'a> {
    blamed: Vec<&'a Sight>,
    waiting: Vec<&'a Sight>,
    lasts: Duration,
}

impl Watch {
    /// `sights` are all ranks of the gang, in their order.
    pub fn look(&mut self, now: Duration, sights: &[Sight]) -> Option<Told> {
        self.learn(now, sights);
        let calls = sights.iter().map(|sight| sight.report.calls).sum();
        let Some(stall) = self.stall(now, sights) else {
            self.seen = None;
            let (began, _) = self.told.take()?;
            self.not_before = now + PAUSE;
            let seconds = now.saturating_sub(began).as_secs();
            return Some(Told::GoesOn(format!("the ranks go on after {seconds} s")));
        };
        let again = self.seen.replace(calls) == Some(calls);
        let due = match self.told {
            None => again && now >= self.not_before,
            Some((_, next)) => stall.lasts >= next,
        };
        if !due {
            return None;
        }
        let began = now.saturating_sub(stall.lasts);
        self.told = Some((self.told.map_or(began, |(began, _)| began), stall.lasts * 2));
        Some(Told::Stalls(stall.to_string()))
    }

    fn learn(&mut self, now: Duration, sights: &[Sight]) {
        self.computed.resize(sights.len(), (0, now));
        for ((before, at), sight) in self.computed.iter_mut().zip(sights) {
            if sight.cpu.saturating_sub(*before) >= IDLE_TICKS {
                (*before, *at) = (sight.cpu, now);
            }
        }
        let newest = sights.iter().map(|sight| &sight.report).max_by_key(|report| report.step);
        if let Some(report) = newest.filter(|report| report.step > self.step)
            && let Some(took) = report.last_step
        {
            self.step = report.step;
            self.steps.push_back(took);
            if self.steps.len() > STEPS {
                self.steps.pop_front();
            }
        }
    }

    /// How long a step takes, once one has been seen that tells.
    fn usual(&self) -> Option<Duration> {
        let mut steps: Vec<Duration> = self.steps.iter().copied().collect();
        steps.sort_unstable();
        steps.get(steps.len() / 2).copied()
    }

    fn stall<'a>(&self, now: Duration, sights: &'a [Sight]) -> Option<Stall<'a>> {
        let still = sights.iter().map(still_for).min()?;
        let all = |lasts| Stall { blamed: sights.iter().collect(), waiting: Vec::new(), lasts };
        if sights.iter().all(|sight| sight.stopped) {
            return (still >= MARGIN).then(|| all(still));
        }
        // The call that the ones in front wait in; who was stopped may still be in an earlier one.
        let Some(call) = sights.iter().filter_map(waits_in).map(|(call, _)| call).max() else {
            return sights.iter().all(|sight| self.is_late(sight, still, 2, now)).then(|| all(still));
        };
        let in_front = |sight: &&Sight| waits_in(sight).is_some_and(|(its, _)| its == call);
        let (waiting, others): (Vec<_>, Vec<_>) =
            sights.iter().partition(|sight| in_front(sight) && !sight.stopped);
        let lasts = waiting.iter().filter_map(|sight| waits_in(sight)).map(|(_, since)| since).max()?;
        // Who has made that call and computes on is not waited for, unless nobody else is left.
        let mut missing: Vec<_> = others.iter().filter(|sight| sight.report.calls < call).copied().collect();
        if missing.is_empty() {
            missing = others;
        }
        missing.retain(|sight| self.is_late(sight, lasts, 1, now));
        (!missing.is_empty()).then_some(Stall { blamed: missing, waiting, lasts })
    }

    /// Whether the rank has let the others wait for too long.
    fn is_late(&self, sight: &Sight, waited: Duration, steps: u32, now: Duration) -> bool {
        let in_step = match &sight.report.doing {
            Doing::NotAttached => false,
            Doing::Inside { during, .. } => during.is_some_and(is_of_a_step),
            Doing::Outside { activity, .. } => activity.is_some_and(|(activity, _)| is_of_a_step(activity)),
        };
        match self.usual().filter(|_| in_step) {
            _ if sight.stopped => waited >= MARGIN,
            Some(usual) => waited >= usual * steps + MARGIN,
            None => {
                let computed = self.computed.get(sight.report.rank);
                waited >= PATIENCE && computed.is_some_and(|(_, at)| now.saturating_sub(*at) >= PATIENCE)
            }
        }
    }
}

fn is_of_a_step(activity: Activity) -> bool {
    match activity {
        Activity::LoadingData | Activity::Forward | Activity::Backward | Activity::Optimizer => true,
        Activity::Starting | Activity::Evaluating | Activity::Saving => false,
    }
}

/// The call that the rank waits in, and since when.
fn waits_in(sight: &Sight) -> Option<(u64, Duration)> {
    match sight.report.doing {
        Doing::Inside { call, since, .. } => Some((call, since)),
        _ => None,
    }
}

/// How long nothing was seen of the rank.
fn still_for(sight: &Sight) -> Duration {
    match sight.report.doing {
        Doing::NotAttached => Duration::ZERO,
        Doing::Inside { since, .. } => since,
        Doing::Outside { since, activity } => activity.map_or(since, |(_, noted)| noted.min(since)),
    }
}

impl std::fmt::Display for Stall<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let seconds = self.lasts.as_secs();
        let several = self.blamed.len() > 1;
        let about = |sight: &&Sight| match several {
            true => format!("rank {}: {}", sight.report.rank, what(sight)),
            false => what(sight),
        };
        let mut about: Vec<String> = self.blamed.iter().take(DETAILS_MAX).map(about).collect();
        if self.blamed.len() > DETAILS_MAX {
            about.push("...".to_owned());
        }
        let about = about.join("; ");
        let Some(first) = self.waiting.first() else {
            return write!(f, "all ranks stand still for {seconds} s ({about})");
        };
        let (has, them) = if several { ("have", "them") } else { ("has", "it") };
        let wait = if self.waiting.len() > 1 { "wait" } else { "waits" };
        write!(
            f,
            "{} {has} not come to {} for {seconds} s ({about}); {} {wait} for {them}",
            names(&self.blamed),
            place(first),
            names(&self.waiting)
        )
    }
}

/// `process 4711, in backward since 4 s`.
fn what(sight: &Sight) -> String {
    let doing = match &sight.report.doing {
        _ if sight.stopped => "stopped by a signal or a debugger".to_owned(),
        Doing::NotAttached => "not yet started".to_owned(),
        Doing::Inside { operation, .. } => format!("in {operation}"),
        Doing::Outside { activity: Some((activity, since)), .. } => {
            format!("{activity} since {} s", since.as_secs())
        }
        Doing::Outside { since, activity: None } => format!("silent since {} s", since.as_secs()),
    };
    format!("process {}, {doing}", sight.pid)
}

/// Where a rank that waits does so.
fn place(sight: &Sight) -> String {
    let step = sight.report.step;
    match &sight.report.doing {
        Doing::Inside { during: Some(Activity::Starting), .. } => "the start".to_owned(),
        Doing::Inside { during: Some(Activity::Evaluating), .. } => "the end of the evaluation".to_owned(),
        Doing::Inside { operation, .. } if operation.starts_with("barrier") => {
            format!("the end of step {step}")
        }
        _ => format!("the reduction of step {step}"),
    }
}

/// `rank 1`, `ranks 0, 2 and 3`.
fn names(sights: &[&Sight]) -> String {
    let mut ranks: Vec<String> = sights.iter().map(|sight| sight.report.rank.to_string()).collect();
    let last = ranks.pop().unwrap_or_default();
    match ranks.is_empty() {
        true => format!("rank {last}"),
        false => format!("ranks {} and {last}", ranks.join(", ")),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // in a test an unwrap is an assertion
mod tests {
    use super::*;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn sight(rank: usize, calls: u64, doing: Doing) -> Sight {
        let report = RankReport { rank, doing, calls, step: 12, last_step: Some(ms(500)) };
        Sight { report, pid: 100 + rank as u32, stopped: false, cpu: 0 }
    }

    fn waits(rank: usize, call: u64, since: Duration) -> Sight {
        let (operation, during) = (format!("reduce #{call}"), Some(Activity::Backward));
        sight(rank, call, Doing::Inside { operation, call, since, during })
    }

    fn does(rank: usize, calls: u64, activity: Activity, since: Duration) -> Sight {
        sight(rank, calls, Doing::Outside { since, activity: Some((activity, since)) })
    }

    fn stopped(sight: Sight) -> Sight {
        Sight { stopped: true, ..sight }
    }

    /// Looks every second for `seconds` at what `at` shows then, and gives what was told, each with its second.
    fn told(
        watch: &mut Watch,
        from: u64,
        seconds: u64,
        at: impl Fn(Duration) -> Vec<Sight>,
    ) -> Vec<(u64, Told)> {
        let look = |second: u64| {
            let sights = at(Duration::from_secs(second - from));
            watch.look(Duration::from_secs(second), &sights).map(|told| (second, told))
        };
        (from..from + seconds).filter_map(look).collect()
    }

    fn seconds(told: &[(u64, Told)]) -> Vec<u64> {
        told.iter().map(|(second, _)| *second).collect()
    }

    fn line(told: &(u64, Told)) -> &str {
        match &told.1 {
            Told::Stalls(line) | Told::GoesOn(line) => line,
        }
    }

    /// A step takes half a second: one is late after two and a half.
    #[test]
    fn the_rank_that_does_not_come_is_named_at_growing_intervals_until_it_goes_on() {
        let mut watch = Watch::default();
        let stands =
            |t| vec![waits(0, 8, t), does(1, 7, Activity::Backward, t), waits(2, 8, t), waits(3, 8, t)];
        let all = told(&mut watch, 0, 40, stands);
        assert_eq!(seconds(&all), [4, 8, 16, 32]);
        assert_eq!(
            line(&all[0]),
            "rank 1 has not come to the reduction of step 12 for 4 s (process 101, in backward since 4 s); ranks 0, 2 and 3 wait for it"
        );
        let goes = |_| vec![waits(0, 9, ms(10)), does(1, 8, Activity::Backward, ms(10))];
        let over = told(&mut watch, 40, 20, goes);
        assert_eq!((seconds(&over), line(&over[0])), (vec![40], "the ranks go on after 40 s"));
        // The next one soon after that is not told before a pause.
        assert_eq!(seconds(&told(&mut watch, 60, 20, stands)), [70]);
    }

    #[test]
    fn a_slow_step_is_no_stall() {
        let mut watch = Watch::default();
        let usual = |_| {
            let slow = |sight: Sight| {
                let report = RankReport { last_step: Some(ms(10_000)), ..sight.report };
                Sight { report, ..sight }
            };
            vec![slow(waits(0, 8, ms(1))), slow(does(1, 7, Activity::Backward, ms(1)))]
        };
        told(&mut watch, 0, 1, usual);
        // Twice the time on one rank, then on all of them.
        let one = |t| vec![waits(0, 8, t), does(1, 7, Activity::Forward, t)];
        assert_eq!(told(&mut watch, 1, 11, one), []);
        let all = |t| vec![does(0, 8, Activity::Forward, t), does(1, 8, Activity::Forward, t)];
        assert_eq!(told(&mut watch, 20, 21, all), []);
        let much = told(&mut watch, 50, 30, all);
        assert_eq!(seconds(&much), [73]);
        assert_eq!(
            line(&much[0]),
            "all ranks stand still for 23 s (rank 0: process 100, in forward since 23 s; rank 1: process 101, in forward since 23 s)"
        );
    }

    #[test]
    fn what_has_no_usual_time_may_last_while_the_rank_computes() {
        for activity in [Activity::Starting, Activity::Evaluating, Activity::Saving] {
            let mut watch = Watch::default();
            let computes = |t: Duration| {
                vec![waits(0, 8, t), Sight { cpu: t.as_secs() * 100, ..does(1, 7, activity, t) }]
            };
            assert_eq!(told(&mut watch, 0, 600, computes), [], "{activity}");
            // A disk that hangs.
            let hangs = |t: Duration| vec![waits(0, 8, t), does(1, 7, activity, t)];
            assert_eq!(seconds(&told(&mut watch, 600, 70, hangs)), [661], "{activity}");
        }
        // The first step: nothing is known of the others.
        let first = |sight: Sight| {
            let report = RankReport { last_step: None, step: 1, ..sight.report };
            Sight { report, ..sight }
        };
        let mut watch = Watch::default();
        let slow = |t: Duration| {
            vec![
                first(waits(0, 8, t)),
                first(Sight { cpu: t.as_secs() * 100, ..does(1, 7, Activity::Forward, t) }),
            ]
        };
        assert_eq!(told(&mut watch, 0, 600, slow), []);
        let alone = |t: Duration| {
            vec![first(sight(0, 0, Doing::NotAttached)), first(does(1, 0, Activity::Starting, t))]
        };
        assert_eq!(told(&mut Watch::default(), 0, 600, alone), []);
    }

    #[test]
    fn a_process_that_is_stopped_is_named_soon_whatever_it_was_doing() {
        for activity in [Activity::Forward, Activity::Evaluating, Activity::Saving] {
            let mut watch = Watch::default();
            let all = told(&mut watch, 0, 6, |t| vec![waits(0, 8, t), stopped(does(1, 7, activity, t))]);
            assert_eq!(seconds(&all), [3]);
            assert!(line(&all[0]).contains("rank 1 has not come"), "{all:?}");
            assert!(line(&all[0]).contains("process 101, stopped by a signal or a debugger"), "{all:?}");
        }
        // It was stopped while it waited itself, in an earlier call; or in this very one.
        for call in [7, 8] {
            let waiter =
                told(&mut Watch::default(), 0, 5, |t| vec![stopped(waits(0, call, t)), waits(1, 8, t)]);
            assert_eq!(seconds(&waiter), [3]);
            assert!(line(&waiter[0]).starts_with("rank 0 has not come"), "{waiter:?}");
        }
    }

    #[test]
    fn where_all_are_stopped_nobody_is_blamed() {
        let all = told(&mut Watch::default(), 0, 5, |t| {
            vec![stopped(waits(0, 8, t)), stopped(does(1, 7, Activity::Forward, t))]
        });
        assert_eq!(seconds(&all), [3]);
        assert!(
            line(&all[0]).starts_with("all ranks stand still for 3 s (rank 0: process 100, stopped"),
            "{all:?}"
        );
    }

    #[test]
    fn who_has_made_the_call_and_computes_on_is_not_blamed() {
        let all = told(&mut Watch::default(), 0, 5, |t| {
            vec![waits(0, 8, t), does(1, 7, Activity::Backward, t), does(2, 9, Activity::Backward, t)]
        });
        assert!(line(&all[0]).starts_with("rank 1 has not come"), "{all:?}");
    }

    #[test]
    fn a_long_wait_in_one_look_alone_is_none() {
        let mut watch = Watch::default();
        let long =
            |calls| vec![waits(0, calls + 1, ms(3_600_000)), does(1, calls, Activity::Backward, ms(1))];
        assert_eq!(watch.look(ms(0), &long(7)), None);
        assert_eq!(watch.look(ms(1_000), &long(8)), None);
    }
}
