//! Where the time of steps went, as the log and the summary tell it.

use super::Trainer;
use crate::agent_link::AgentLink;
use crate::error::Result;
use crate::stopwatch::Phase;
use fleet_collectives::Op;
use fleet_common::events::{EventBody, Level, Times};
use std::time::Duration;

/// What was told of the stopwatch.
#[derive(Default)]
pub(super) struct Breakdown {
    /// Its sums when it was told last.
    told: [u64; 6],
    step: u64,
    /// What had been computed after the last step.
    all_computed: u64,
    /// For how long this rank computed in that step.
    pub computed: Duration,
    /// The slow link that was named last: from host, to host.
    slow: Option<(usize, usize)>,
}

impl Breakdown {
    /// From here on, after `step`.
    pub fn begin(sums: [u64; 6], step: u64) -> Breakdown {
        let (all_computed, computed) = (computed(&sums), Duration::ZERO);
        Breakdown { told: sums, step, all_computed, computed, slow: None }
    }

    pub fn after_step(&mut self, sums: [u64; 6]) {
        let all = computed(&sums);
        self.computed = Duration::from_nanos(all - std::mem::replace(&mut self.all_computed, all));
    }

    /// Seconds for each step since it was told last, and how many steps these are.
    fn take(&mut self, sums: [u64; 6], step: u64) -> ([f64; 6], u64) {
        let steps = step - self.step;
        let each = std::array::from_fn(|at| (sums[at] - self.told[at]) as f64 / 1e9 / steps.max(1) as f64);
        (self.told, self.step) = (sums, step);
        (each, steps)
    }
}

/// Of what the stopwatch has, that in which a rank needs no other.
fn computed(sums: &[u64; 6]) -> u64 {
    let with = Phase::OF_A_STEP.into_iter().zip(sums);
    with.filter(|(phase, _)| !matches!(phase, Phase::Communication | Phase::Checkpoint))
        .map(|(_, ns)| ns)
        .sum()
}

impl Trainer {
    /// Rank 0 names a link between hosts that is slow, each once. A collective call.
    pub(super) fn tell_slow_link(&mut self, link: &mut AgentLink) -> Result<()> {
        let Some(slow) = self.learner.gang().slow_link()? else { return Ok(()) };
        let hosts = Some((slow.from_host, slow.to_host));
        if self.rank == 0 && std::mem::replace(&mut self.breakdown.slow, hosts) != hosts {
            link.log(Level::Warn, slow.to_string());
        }
        Ok(())
    }

    /// Rank 0 tells the means over all ranks. A collective call.
    pub(super) fn tell_times(&mut self, link: &mut AgentLink) -> Result<()> {
        let step = self.state.step;
        let (mut seconds, steps) = self.breakdown.take(self.watch.sums(), step);
        self.learner.gang().all_reduce_f64(&mut seconds, Op::Sum)?;
        let [data_s, forward_s, backward_s, communication_s, optimizer_s, checkpoint_s] =
            seconds.map(|sum| sum / self.world as f64);
        if self.rank == 0 {
            link.event(EventBody::Times(Times {
                step,
                steps,
                data_s,
                forward_s,
                backward_s,
                communication_s,
                optimizer_s,
                checkpoint_s,
            }));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_told_is_of_the_steps_since_it_was_told_last() {
        let second = 1_000_000_000;
        let mut breakdown = Breakdown::begin([5 * second; 6], 10);
        assert_eq!(breakdown.take([7 * second; 6], 14), ([0.5; 6], 4));
        breakdown.after_step([8 * second; 6]);
        assert_eq!(breakdown.computed, Duration::from_secs(4 * 3));
        assert_eq!(breakdown.take([10 * second; 6], 15), ([3.0; 6], 1));
    }
}
