//! Where the time of steps went, as the log and the summary tell it.

use super::Trainer;
use super::slow_host::SlowHost;
use crate::agent_link::AgentLink;
use crate::error::Result;
use crate::stopwatch::Phase;
use fleet_collectives::Op;
use fleet_common::events::{EventBody, Level, Times};
use std::iter::Sum;
use std::time::Duration;

/// Steps whose communication is kept one by one until it is told; where there are more, neighbours are added up.
const KEPT_MAX: usize = 512;

/// What was told of the stopwatch.
pub(super) struct Breakdown {
    /// Its sums when it was told last.
    told: [u64; 6],
    step: u64,
    /// Its sums after the last step.
    before: [u64; 6],
    /// For how long this rank computed in that step.
    pub computed: Duration,
    /// Seconds of communication of this rank, step by step, since it was told last.
    communicated: Vec<f64>,
    /// So many steps are added up in each of them.
    folded: u64,
    hosts: usize,
    slow_host: SlowHost,
    /// The slow link that was named last: from host, to host.
    slow_link: Option<(usize, usize)>,
}

impl Breakdown {
    /// Of a run of `ranks` on `hosts`, as many on each.
    pub fn new(ranks: usize, hosts: usize) -> Breakdown {
        Breakdown {
            told: [0; 6],
            step: 0,
            before: [0; 6],
            computed: Duration::ZERO,
            communicated: Vec::new(),
            folded: 1,
            hosts,
            slow_host: SlowHost::new(ranks / hosts),
            slow_link: None,
        }
    }

    /// From here on, after `step`.
    pub fn begin(&mut self, sums: [u64; 6], step: u64) {
        (self.told, self.before, self.step) = (sums, sums, step);
    }

    /// `step` is over.
    pub fn after_step(&mut self, sums: [u64; 6], step: u64) {
        let before = std::mem::replace(&mut self.before, sums);
        self.computed = Duration::from_nanos(computed(&sums) - computed(&before));
        let at = Phase::Communication as usize;
        let seconds = (sums[at] - before[at]) as f64 / 1e9;
        match self.communicated.last_mut().filter(|_| !(step - self.step - 1).is_multiple_of(self.folded)) {
            Some(last) => *last += seconds,
            None => self.communicated.push(seconds),
        }
        if self.communicated.len() > KEPT_MAX {
            self.communicated = self.communicated.chunks(2).map(|two| two.iter().sum()).collect();
            self.folded *= 2;
        }
    }

    /// Seconds for each step since it was told last, and how many steps these are.
    fn take(&mut self, sums: [u64; 6], step: u64) -> ([f64; 6], u64) {
        let steps = step - self.step;
        let each = std::array::from_fn(|at| (sums[at] - self.told[at]) as f64 / 1e9 / steps.max(1) as f64);
        (self.told, self.step, self.folded) = (sums, step, 1);
        (each, steps)
    }
}

/// Of the parts of a step, that in which a rank needs no other.
fn computed<N: Copy + Sum>(parts: &[N; 6]) -> N {
    let with = Phase::OF_A_STEP.into_iter().zip(parts);
    with.filter(|(phase, _)| !matches!(phase, Phase::Communication | Phase::Checkpoint))
        .map(|(_, part)| *part)
        .sum()
}

impl Trainer {
    /// Rank 0 names a link between hosts that is slow, each once. A collective call.
    pub(super) fn tell_slow_link(&mut self, link: &mut AgentLink) -> Result<()> {
        let Some(slow) = self.learner.gang().slow_link()? else { return Ok(()) };
        let hosts = Some((slow.from_host, slow.to_host));
        if self.rank == 0 && std::mem::replace(&mut self.breakdown.slow_link, hosts) != hosts {
            link.log(Level::Warn, slow.to_string());
        }
        Ok(())
    }

    /// Rank 0 tells the means over all ranks, and which host is slow. A collective call.
    pub(super) fn tell_times(&mut self, link: &mut AgentLink) -> Result<()> {
        let step = self.state.step;
        // The greatest of negative numbers is that of the least.
        let mut least: Vec<f64> = self.breakdown.communicated.drain(..).map(|seconds| -seconds).collect();
        let (seconds, steps) = self.breakdown.take(self.watch.sums(), step);
        let hosts = self.breakdown.hosts;
        // Of each host what its ranks have computed, after the parts of a step.
        let mut sums = seconds.to_vec();
        sums.resize(seconds.len() + hosts, 0.0);
        sums[seconds.len() + self.rank as usize * hosts / self.world as usize] = computed(&seconds);
        let gang = self.learner.gang();
        gang.all_reduce_f64(&mut sums, Op::Sum)?;
        gang.all_reduce_f64(&mut least, Op::Max)?;
        if self.rank != 0 {
            return Ok(());
        }
        let (parts, computed) = sums.split_at(seconds.len());
        let mean = |phase: Phase| parts[phase as usize] / self.world as f64;
        let all = mean(Phase::Communication);
        let communication_s = all.min(-least.iter().sum::<f64>() / steps.max(1) as f64);
        let times = Times {
            step,
            steps,
            data_s: mean(Phase::Data),
            forward_s: mean(Phase::Forward),
            backward_s: mean(Phase::Backward),
            communication_s,
            waiting_s: all - communication_s,
            optimizer_s: mean(Phase::Optimizer),
            checkpoint_s: mean(Phase::Checkpoint),
        };
        let of_host: Vec<f64> = computed.iter().map(|sum| sum * hosts as f64 / self.world as f64).collect();
        if let Some(line) = self.breakdown.slow_host.look(step, steps, times.step_s(), &of_host) {
            link.log(Level::Warn, line);
        }
        link.event(EventBody::Times(times));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_told_is_of_the_steps_since_it_was_told_last() {
        let second = 1_000_000_000;
        let mut breakdown = Breakdown::new(1, 1);
        breakdown.begin([5 * second; 6], 10);
        assert_eq!(breakdown.take([7 * second; 6], 14), ([0.5; 6], 4));
        breakdown.after_step([8 * second; 6], 15);
        assert_eq!(breakdown.computed, Duration::from_secs(4 * 3));
        assert_eq!(breakdown.communicated, [3.0]);
        assert_eq!(breakdown.take([10 * second; 6], 15), ([3.0; 6], 1));
    }

    #[test]
    fn communication_is_kept_step_by_step_within_a_limit() {
        let second = 1_000_000_000;
        let mut breakdown = Breakdown::new(1, 1);
        breakdown.begin([0; 6], 7);
        for step in 1..=4 * KEPT_MAX as u64 + 1 {
            breakdown.after_step([step * second; 6], 7 + step);
        }
        let kept = &breakdown.communicated;
        assert!(kept.len() <= KEPT_MAX && kept.len() > KEPT_MAX / 2, "{}", kept.len());
        assert_eq!(kept.iter().sum::<f64>(), 4.0 * KEPT_MAX as f64 + 1.0);
        assert_eq!((kept[0], kept[1]), (8.0, 8.0));
    }
}
