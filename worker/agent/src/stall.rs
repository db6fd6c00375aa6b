//! Whether a gang stands still, for whom it waits, and what is said of that. Pure: looks at its ranks and the time go in, lines come out.
//!
//! How long may a rank let the others wait? In a step: as long as a step usually takes, and `MARGIN`. A step that takes twice its time on one
//! rank is no stall then: its peers wait for the second half only. Where nobody waits, the whole gang has twice the time. What has no usual
//! time (the start, the first step, evaluation, saving) may last as long as the rank computes, and a minute without; reading and writing of
//! large files computes little, but not nothing. A process that a signal or a debugger has stopped does nothing of this, and needs no
//! patience. Every stall must be seen in two looks, with no call made in between: a machine that was suspended shows long waits in the first.
//!
//! Who asks how the job stands is told sooner than the log, after `SOON` in place of `MARGIN`: what he sees goes away again.

use fleet_collectives::{Activity, Doing, RankReport};
use fleet_common::events::Culprit;
use fleet_common::ids::Rank;
use std::collections::VecDeque;
use std::time::Duration;

/// Between two looks at the ranks.
pub const LOOK_PERIOD: Duration = Duration::from_millis(500);
/// No shorter wait is logged.
const MARGIN: Duration = Duration::from_secs(2);
/// Nobody is told of a shorter wait. With two looks after it he is told within two seconds.
const SOON: Duration = Duration::from_millis(900);
/// For a rank that does not compute, in what has no usual time.
const PATIENCE: Duration = Duration::from_secs(60);
/// After a stall is over, before the next one is told: a gang that limps does not fill the log.
const PAUSE: Duration = Duration::from_secs(30);
/// Who asks is told of so many stalls in this time; of more he is told when it is over.
const TOLD_MAX: usize = 10;
const TOLD_WITHIN: Duration = Duration::from_secs(300);
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

/// For whom a gang waits at the time of the last look.
#[derive(Clone, Debug, PartialEq)]
pub struct Standing {
    pub since: Duration,
    /// The same while it waits for the same.
    pub what: String,
    pub culprit: Culprit,
}

/// Watches one gang.
#[derive(Debug, Default)]
pub struct Watch {
    /// The number within the job of the first of its ranks, which are counted from 0 otherwise.
    first_rank: usize,
    /// Ranks of the whole job.
    world_size: usize,
    /// How long the last steps took, the newest last.
    steps: VecDeque<Duration>,
    /// The last of them.
    step: u64,
    /// Of each rank: what it had computed, and when that was last seen to have grown.
    computed: Vec<(u64, Duration)>,
    /// All calls made up to the last look, if it showed a stall.
    seen: Option<u64>,
    /// The same with what it showed, if that has lasted for `SOON`.
    seen_soon: Option<(u64, Standing)>,
    standing: Option<Standing>,
    /// When the stall that was told began, and how long it must last to be told again.
    told: Option<(Duration, Duration)>,
    not_before: Duration,
}

/// What was told of `Standing`: each change once, and of a gang that limps not every one.
#[derive(Debug, Default)]
pub struct Standings {
    told: Option<String>,
    /// When the last ones were told, the oldest first.
    times: VecDeque<Duration>,
}

impl Standings {
    /// What is to be told in place of what was told last, if that is another thing.
    pub fn news(&mut self, standing: Option<&Standing>, now: Duration) -> Option<Option<Standing>> {
        if standing.map(|standing| &standing.what) == self.told.as_ref() {
            return None;
        }
        self.times.retain(|time| now.saturating_sub(*time) < TOLD_WITHIN);
        let standing = standing.filter(|_| self.times.len() < TOLD_MAX).cloned();
        let before =
            std::mem::replace(&mut self.told, standing.as_ref().map(|standing| standing.what.clone()));
        if standing.is_some() {
            self.times.push_back(now);
        }
        (before.is_some() || standing.is_some()).then_some(standing)
    }
}

struct Stall<'a> {
    first_rank: usize,
    /// No other node has ranks of the job.
    is_whole: bool,
    blamed: Vec<&'a Sight>,
    waiting: Vec<&'a Sight>,
    lasts: Duration,
}

impl Watch {
    /// Of a gang of so many ranks, those on this node beginning with `first_rank`.
    pub fn new(first_rank: Rank, world_size: u32) -> Watch {
        let (first_rank, world_size) = (first_rank as usize, world_size as usize);
        Watch { first_rank, world_size, ..Watch::default() }
    }

    /// `sights` are all ranks of the gang on this node, in their order.
    pub fn look(&mut self, now: Duration, sights: &[Sight]) -> Option<Told> {
        self.learn(now, sights);
        let calls = sights.iter().map(|sight| sight.report.calls).sum();
        self.stand(now, calls, sights);
        let Some(stall) = self.stall(now, sights, MARGIN) else {
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

    /// For whom the gang waits, by the last two looks.
    pub fn standing(&self) -> Option<&Standing> {
        self.standing.as_ref()
    }

    fn stand(&mut self, now: Duration, calls: u64, sights: &[Sight]) {
        let stall = self.stall(now, sights, SOON);
        let new = stall.map(|stall| Standing {
            since: now.saturating_sub(stall.lasts),
            what: stall.line(None),
            culprit: stall.culprit(),
        });
        let before = std::mem::replace(&mut self.seen_soon, new.clone().map(|new| (calls, new)));
        let again = before.is_some_and(|(then, _)| then == calls);
        self.standing = match (self.standing.take(), new.filter(|_| again)) {
            (Some(old), Some(new)) if old.what == new.what => Some(old),
            (_, new) => new,
        };
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

    fn stall<'a>(&self, now: Duration, sights: &'a [Sight], margin: Duration) -> Option<Stall<'a>> {
        let still = sights.iter().map(still_for).min()?;
        let first_rank = self.first_rank;
        let is_whole = sights.len() >= self.world_size;
        let blamed = || sights.iter().collect();
        let all = |lasts| Stall { first_rank, is_whole, blamed: blamed(), waiting: Vec::new(), lasts };
        if sights.iter().all(|sight| sight.stopped) {
            return (still >= margin).then(|| all(still));
        }
        // The call that the ones in front wait in; who was stopped may still be in an earlier one.
        let Some(call) = sights.iter().filter_map(waits_in).map(|(call, _)| call).max() else {
            return sights
                .iter()
                .all(|sight| self.is_late(sight, (still, 2), margin, now))
                .then(|| all(still));
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
        missing.retain(|sight| self.is_late(sight, (lasts, 1), margin, now));
        (!missing.is_empty()).then_some(Stall { first_rank, is_whole, blamed: missing, waiting, lasts })
    }

    /// Whether the rank has let the others wait for too long, for more than so many steps.
    fn is_late(
        &self,
        sight: &Sight,
        (waited, steps): (Duration, u32),
        margin: Duration,
        now: Duration,
    ) -> bool {
        let in_step = match &sight.report.doing {
            Doing::NotAttached => false,
            Doing::Inside { during, .. } => during.is_some_and(is_of_a_step),
            Doing::Outside { activity, .. } => activity.is_some_and(|(activity, _)| is_of_a_step(activity)),
        };
        match self.usual().filter(|_| in_step) {
            _ if sight.stopped => waited >= margin,
            Some(usual) => waited >= usual * steps + margin,
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
        f.write_str(&self.line(Some(self.lasts.as_secs())))
    }
}

impl Stall<'_> {
    fn culprit(&self) -> Culprit {
        let seen = |sight: &&Sight| match sight.report.doing {
            _ if sight.stopped => Culprit::Stopped,
            Doing::Outside { .. } => Culprit::Silent,
            Doing::Inside { .. } | Doing::NotAttached => Culprit::Waits,
        };
        self.blamed.iter().map(seen).max().unwrap_or(Culprit::Waits)
    }

    /// With or without the seconds that it lasts, and those of what the ranks do.
    fn line(&self, seconds: Option<u64>) -> String {
        let lasts = seconds.map_or(String::new(), |seconds| format!(" for {seconds} s"));
        let several = self.blamed.len() > 1;
        let about = |sight: &&Sight| match several {
            true => {
                format!("rank {}: {}", self.first_rank + sight.report.rank, what(sight, seconds.is_some()))
            }
            false => what(sight, seconds.is_some()),
        };
        let mut about: Vec<String> = self.blamed.iter().take(DETAILS_MAX).map(about).collect();
        if self.blamed.len() > DETAILS_MAX {
            about.push("...".to_owned());
        }
        let about = about.join("; ");
        let Some(first) = self.waiting.first() else {
            let (who, stand) = match (self.is_whole, several) {
                (true, _) => ("all ranks".to_owned(), "stand"),
                (false, true) => (names(&self.blamed, self.first_rank), "stand"),
                (false, false) => (names(&self.blamed, self.first_rank), "stands"),
            };
            return format!("{who} {stand} still{lasts} ({about})");
        };
        let (has, them) = if several { ("have", "them") } else { ("has", "it") };
        let wait = if self.waiting.len() > 1 { "wait" } else { "waits" };
        format!(
            "{} {has} not come to {}{lasts} ({about}); {} {wait} for {them}",
            names(&self.blamed, self.first_rank),
            place(first),
            names(&self.waiting, self.first_rank)
        )
    }
}

/// `process 4711, in backward since 4 s`, or without the time.
fn what(sight: &Sight, timed: bool) -> String {
    let since = |since: Duration| match timed {
        true => format!(" since {} s", since.as_secs()),
        false => String::new(),
    };
    let doing = match &sight.report.doing {
        _ if sight.stopped => "stopped by a signal or a debugger".to_owned(),
        Doing::NotAttached => "not yet started".to_owned(),
        Doing::Inside { operation, .. } => format!("in {operation}"),
        Doing::Outside { activity: Some((activity, began)), .. } => format!("{activity}{}", since(*began)),
        Doing::Outside { since: silent, activity: None } => format!("silent{}", since(*silent)),
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
fn names(sights: &[&Sight], first_rank: usize) -> String {
    let mut ranks: Vec<String> =
        sights.iter().map(|sight| (first_rank + sight.report.rank).to_string()).collect();
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
    use fleet_collectives::{Computed, Exchanged};

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn sight(rank: usize, calls: u64, doing: Doing) -> Sight {
        let report = RankReport {
            rank,
            doing,
            calls,
            step: 12,
            last_step: Some(ms(500)),
            computed: Computed::default(),
            exchanged: Exchanged::default(),
        };
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

    #[test]
    fn ranks_of_a_later_node_have_their_numbers_within_the_job() {
        let mut watch = Watch::new(4, 6);
        let all = told(&mut watch, 0, 10, |t| vec![waits(0, 8, t), does(1, 7, Activity::Backward, t)]);
        let line = line(&all[0]);
        assert!(line.starts_with("rank 5 has not come") && line.ends_with("rank 4 waits for it"), "{line}");
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
    fn who_asks_sees_within_two_seconds_after_the_usual_time_for_whom_the_gang_waits() {
        let mut watch = Watch::default();
        let stands = |t| vec![waits(0, 8, t), does(1, 7, Activity::Backward, t)];
        let look = |watch: &mut Watch, ms_now: u64, sights: Vec<Sight>| {
            watch.look(ms(ms_now), &sights);
            watch.standing().cloned()
        };
        // A step takes half a second.
        let mut first = None;
        for now in (0..=10_000).step_by(LOOK_PERIOD.as_millis() as usize) {
            if let Some(standing) = look(&mut watch, now, stands(ms(now))) {
                assert_eq!(standing.since, ms(0));
                let what = "rank 1 has not come to the reduction of step 12 (process 101, in backward); rank 0 waits for it";
                assert_eq!((standing.what.as_str(), standing.culprit), (what, Culprit::Silent));
                first.get_or_insert(now);
            }
        }
        assert!(first.is_some_and(|at| at > 500 && at <= 2_500), "{first:?}");
        let goes = vec![waits(0, 9, ms(10)), does(1, 8, Activity::Backward, ms(10))];
        assert_eq!(look(&mut watch, 10_500, goes), None);
        // A long wait in one look alone is none.
        let long = |calls| vec![waits(0, calls + 1, ms(60_000)), does(1, calls, Activity::Backward, ms(1))];
        assert_eq!([look(&mut watch, 11_000, long(9)), look(&mut watch, 11_500, long(10))], [None, None]);
    }

    #[test]
    fn a_gang_that_limps_is_told_of_ten_times_in_five_minutes() {
        let mut standings = Standings::default();
        let standing = Standing { since: ms(0), what: "rank 1".to_owned(), culprit: Culprit::Silent };
        let told = (0..600).filter(|second| {
            let now = Standing { what: format!("{} {second}", standing.what), ..standing.clone() };
            let limps = (second % 2 == 0).then_some(&now);
            matches!(standings.news(limps, Duration::from_secs(*second)), Some(Some(_)))
        });
        assert_eq!(told.count(), 20);
        let now = Duration::from_secs(10_000);
        assert_eq!(standings.news(Some(&standing), now), Some(Some(standing.clone())));
        assert_eq!(standings.news(Some(&standing), now), None);
        assert_eq!(standings.news(None, now), Some(None));
        assert_eq!(standings.news(None, now), None);
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
    fn one_node_of_several_tells_of_its_own_ranks_and_not_that_they_wait_for_others() {
        let of = |stands: fn(Duration) -> Sight| {
            let mut watch = Watch::new(3, 4);
            let all = told(&mut watch, 0, 5, |t| vec![stands(t)]);
            (all, watch.standing().map(|standing| standing.culprit))
        };
        assert_eq!(of(|t| waits(0, 8, t)), (Vec::new(), None), "for whom is seen elsewhere");
        let (all, culprit) = of(|t| stopped(waits(0, 7, t)));
        assert!(line(&all[0]).starts_with("rank 3 stands still for 3 s (process 100, stopped"), "{all:?}");
        assert_eq!(culprit, Some(Culprit::Stopped));
        // Ranks that wait for each other may all wait for another node.
        let mut watch = Watch::new(2, 6);
        told(&mut watch, 0, 70, |t| vec![waits(0, 8, t), waits(1, 7, t)]);
        assert!(watch.standing().is_none_or(|standing| standing.culprit == Culprit::Waits));
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
