//! What a gang's events tell, kept as numbers for who asks. Nothing is looked at that does not go by anyway.

use fleet_common::events::{EventBody, Step, Times};
use std::ops::AddAssign;

/// Of one gang.
#[derive(Clone, Debug, Default)]
pub struct Figures {
    pub counts: Counts,
    /// The last one that rank 0 told.
    pub step: Option<Step>,
    pub times: Option<Times>,
}

/// What goes on over all gangs of a worker.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Counts {
    pub lines: u64,
    /// Those that the coordinators do not get.
    pub lines_left_out: u64,
    pub checkpoint_bytes: u64,
    /// That checkpoints took from training.
    pub checkpoint_seconds: f64,
}

impl Figures {
    pub fn note(&mut self, event: &EventBody) {
        match event {
            EventBody::Step(step) => self.step = Some(*step),
            EventBody::Times(times) => {
                self.times = Some(*times);
                self.counts.checkpoint_seconds += times.checkpoint_s * times.steps as f64;
            }
            EventBody::Log { .. } => self.counts.lines += 1,
            EventBody::Checkpoint(record) => self.counts.checkpoint_bytes += record.bytes,
            _ => {}
        }
    }
}

impl AddAssign for Counts {
    fn add_assign(&mut self, other: Counts) {
        self.lines += other.lines;
        self.lines_left_out += other.lines_left_out;
        self.checkpoint_bytes += other.checkpoint_bytes;
        self.checkpoint_seconds += other.checkpoint_seconds;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::budget::Rates;
    use crate::stream::EventStream;
    use fleet_common::events::{Event, Level, Outcome};
    use fleet_common::ids::JobId;
    use std::time::Duration;

    #[test]
    fn every_line_is_counted_and_those_are_told_apart_that_are_left_out() {
        let rates = Rates { per_s: 0, burst: 10_000, total: 10_000 };
        let mut stream = EventStream::new(JobId(1), 1, rates);
        let mut push = |body| stream.push(Event { unix_ms: 1, body }, Duration::from_secs(1));
        let times = Times { steps: 4, checkpoint_s: 0.5, ..Times::default() };
        push(EventBody::Times(times));
        for _ in 0..1_000 {
            push(EventBody::Log { rank: Some(0), level: Level::Info, line: "x".repeat(100) });
        }
        push(EventBody::Times(times));
        push(EventBody::Finished(Outcome::Stopped { steps: 8 }));
        let (mut sent, mut left_out) = (0, 0);
        for event in std::iter::from_fn(|| stream.next_batch()).flat_map(|batch| batch.events) {
            match event.body {
                EventBody::Log { .. } => sent += 1,
                EventBody::LeftOut { lines, .. } => left_out += lines,
                _ => {}
            }
        }
        let counts = stream.figures().counts;
        assert_eq!((counts.lines, counts.lines_left_out, counts.checkpoint_seconds), (1_000, left_out, 4.0));
        assert!(left_out > 0 && sent + left_out == 1_000, "{sent} and {left_out}");
    }
}
