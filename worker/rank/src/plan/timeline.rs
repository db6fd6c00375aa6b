//! How long a step takes, by how long its parts take: units are computed one after the other, while a thread of the gang carries what goes
//! between hosts, in the order in which it is posted.

/// A step of one rank. Units are in the order of the forward pass, embedding and head among them.
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    pub units: Vec<Unit>,
    pub micro_batches: u32,
    /// Gradients have rooms for two blocks, and for embedding or head, instead of one for each unit.
    pub in_rooms: bool,
    /// Seconds behind the last backward: sums inside of a host, the optimizer.
    pub end: f64,
}

/// Seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Unit {
    pub forward: f64,
    pub backward: f64,
    /// Until its weights are collected from other hosts. Blocks have two rooms in turn; embedding and head stay for the step.
    pub gather: f64,
    /// Until its gradients are summed over hosts, behind the last micro-batch.
    pub reduce: f64,
}

impl Step {
    /// Of one of many steps.
    pub fn seconds(&self) -> f64 {
        let mut run = Run {
            step: self,
            now: 0.0,
            line: 0.0,
            here: vec![None; self.units.len()],
            summed: vec![0.0; self.units.len()],
        };
        // The step before has asked for them at its end.
        (0..self.units.len().min(2)).for_each(|unit| run.post(unit));
        for micro in 1..=self.micro_batches {
            run.micro_batch(micro == self.micro_batches);
        }
        run.now.max(run.line) + self.end
    }
}

struct Run<'a> {
    step: &'a Step,
    /// What is computed has come so far.
    now: f64,
    /// The other thread is free from then on.
    line: f64,
    /// When a unit's weights are on this host; `None` where another one has their room.
    here: Vec<Option<f64>>,
    /// When its gradients are summed.
    summed: Vec<f64>,
}

impl Run<'_> {
    fn micro_batch(&mut self, last_one: bool) {
        let head = self.step.units.len() - 1;
        for unit in 0..head {
            self.need(unit, Some(unit + 1));
            self.now += self.step.units[unit].forward;
        }
        for unit in (0..=head).rev() {
            self.need(unit, unit.checked_sub(1));
            let Unit { forward, backward, .. } = self.step.units[unit];
            // The head is computed forward and back at once.
            self.now += if unit == head { forward + backward } else { backward };
            if last_one {
                self.ready(unit);
            }
        }
    }

    fn need(&mut self, unit: usize, next: Option<usize>) {
        self.post(unit);
        self.now = self.now.max(self.here[unit].unwrap_or(0.0));
        if let Some(next) = next {
            self.post(next);
        }
    }

    fn post(&mut self, unit: usize) {
        let gather = self.step.units[unit].gather;
        if self.here[unit].is_some() || gather == 0.0 {
            return;
        }
        for other in (0..self.here.len()).filter(|other| *other != unit) {
            if self.is_with(unit, other) {
                self.here[other] = None;
            }
        }
        self.line = self.line.max(self.now) + gather;
        self.here[unit] = Some(self.line);
    }

    fn ready(&mut self, unit: usize) {
        self.line = self.line.max(self.now) + self.step.units[unit].reduce;
        self.summed[unit] = self.line;
        let Some(next) = unit.checked_sub(1).filter(|_| self.step.in_rooms) else { return };
        let head = self.here.len() - 1;
        let before = (unit..=head).filter(|other| self.is_with(next, *other) || (next, *other) == (0, head));
        self.now = before.map(|other| self.summed[other]).fold(self.now, f64::max);
    }

    /// Blocks whose rooms are the same.
    fn is_with(&self, one: usize, other: usize) -> bool {
        let block = |unit: usize| unit > 0 && unit + 1 < self.here.len();
        block(one) && block(other) && one % 2 == other % 2
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(blocks: usize, unit: Unit, in_rooms: bool, micro_batches: u32) -> Step {
        let edge = Unit { forward: 0.0, backward: 0.0, ..unit };
        let units = [vec![edge], vec![unit; blocks], vec![edge]].concat();
        Step { units, micro_batches, in_rooms, end: 5.0 }
    }

    fn close(found: f64, want: f64) {
        assert!((found - want).abs() < 1e-9, "{found} instead of {want}");
    }

    const COMPUTED: Unit = Unit { forward: 1.0, backward: 2.0, gather: 0.0, reduce: 0.0 };

    #[test]
    fn without_other_hosts_a_step_is_what_is_computed() {
        close(step(4, COMPUTED, true, 3).seconds(), 3.0 * 12.0 + 5.0);
    }

    #[test]
    fn what_is_shorter_than_computing_is_hidden_but_for_its_end() {
        let unit = Unit { reduce: 0.5, ..COMPUTED };
        // The last block and the embedding are summed behind everything.
        close(step(4, unit, false, 1).seconds(), 12.0 + 0.5 + 0.5 + 5.0);
        close(step(4, unit, false, 2).seconds(), 24.0 + 0.5 + 0.5 + 5.0);
        let gathered = Unit { gather: 0.5, ..COMPUTED };
        // The embedding, and the first block behind it, have nothing to hide beneath; nor has the head.
        let seconds = step(4, gathered, true, 1).seconds();
        assert!(seconds > 12.0 + 5.0 + 0.9 && seconds < 12.0 + 5.0 + 2.1, "{seconds}");
    }

    #[test]
    fn a_slow_line_is_what_a_step_takes() {
        let unit = Unit { reduce: 10.0, ..COMPUTED };
        let ddp = step(4, unit, false, 1).seconds();
        // The head's sum begins with the backward.
        close(ddp, 4.0 + 6.0 * 10.0 + 5.0);
        // With rooms nothing is quicker.
        assert!(step(4, unit, true, 1).seconds() >= ddp);
        let gathered = Unit { gather: 10.0, reduce: 10.0, ..COMPUTED };
        let once = step(4, gathered, true, 1).seconds();
        // Six units forward, and back those two blocks whose rooms others took.
        assert!((145.0..167.0).contains(&once), "{once}");
        // Accumulating sums once and collects blocks again.
        assert!(step(4, gathered, true, 2).seconds() < 2.0 * once - 6.0 * 10.0 + 5.0);
    }
}
