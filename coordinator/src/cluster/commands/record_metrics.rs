//! Points of a client's run, many at a time.

use crate::cluster::history::HistoryRow;
use crate::cluster::members::{NAME_MAX, is_plain};
use crate::cluster::runs::SERIES_MAX;
use crate::cluster::{Answer, Context, State};
use fleet_common::ids::RunId;
use fleet_common::protocol::{POINTS_MAX, Point, RunState};
use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RecordMetrics {
    pub run: RunId,
    pub points: Vec<Point>,
}

impl RecordMetrics {
    pub(super) fn apply(self, state: &mut State, context: &mut Context) -> Answer {
        let Some(run) = state.runs.get_mut(&self.run).filter(|run| run.state == RunState::Open) else {
            return Answer::not_found(format!("there is no open {}; start one first", self.run));
        };
        if self.points.is_empty() || self.points.len() > POINTS_MAX {
            return Answer::invalid(format!("send 1 to {POINTS_MAX} points at a time"));
        }
        if let Some(point) = self.points.iter().find(|point| !(1..=NAME_MAX).contains(&point.series.len())) {
            return Answer::invalid(format!(
                "the name of a series has 1 to {NAME_MAX} characters, not {}",
                point.series.len()
            ));
        }
        if self.points.iter().any(|point| !is_plain(&point.series)) {
            return Answer::invalid("the name of a series has control characters");
        }
        if !run.has_room() {
            return Answer::invalid(format!(
                "{} has {} MiB of points, which is the limit; start another run",
                self.run,
                run.bytes >> 20
            ));
        }
        let mut last = run.last.clone();
        last.extend(self.points.iter().map(|point| (point.series.clone(), point.value)));
        if last.len() > SERIES_MAX {
            return Answer::invalid(format!("a run has at most {SERIES_MAX} series; start another run"));
        }
        run.last = last;
        run.batches += 1;
        run.points += self.points.len() as u64;
        run.bytes +=
            context.keep(HistoryRow::Points { run: self.run, batch: run.batches, points: self.points });
        Answer::Done
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::commands::{Change, FinishRun, StartRun};
    use crate::cluster::tests::{Script, point, why};

    fn record(run: u64, points: Vec<Point>) -> Change {
        Change::RecordMetrics(RecordMetrics { run: RunId(run), points })
    }

    #[test]
    fn points_go_to_the_history_and_the_newest_values_stay_at_hand() {
        let mut script = Script::new();
        script.run(Change::StartRun(StartRun { name: "r".into() }));
        script.run(record(1, vec![point("loss", 1, 3.0), point("lr", 1, 0.1)]));
        assert_eq!(script.run(record(1, vec![point("loss", 2, 2.0)])), Answer::Done);
        let run = &script.state.runs()[&RunId(1)];
        assert_eq!((run.batches, run.points, run.last["loss"], run.last["lr"]), (2, 3, 2.0, 0.1));
        let batches = script.history.iter().filter(|row| matches!(row, HistoryRow::Points { .. }));
        assert_eq!(batches.count(), 2);
    }

    #[test]
    fn everything_about_them_is_bounded() {
        let mut script = Script::new();
        script.run(Change::StartRun(StartRun { name: "r".into() }));
        assert!(why(script.run(record(1, vec![]))).contains("1 to 1000 points"));
        assert!(why(script.run(record(1, vec![point("l", 1, 0.0); POINTS_MAX + 1]))).contains("at a time"));
        assert!(why(script.run(record(1, vec![point("", 1, 0.0)]))).contains("name of a series"));
        assert!(why(script.run(record(1, vec![point("a\rb", 1, 0.0)]))).contains("control characters"));
        let many = (0..=SERIES_MAX).map(|n| point(&format!("s{n}"), 1, 0.0)).collect();
        assert!(why(script.run(record(1, many))).contains("another run"));
        assert!(script.state.runs()[&RunId(1)].last.is_empty(), "a refused batch leaves nothing");
        script.run(Change::FinishRun(FinishRun { run: RunId(1), succeeded: true }));
        assert!(why(script.run(record(1, vec![point("l", 1, 0.0)]))).contains("no open run-1"));
    }
}
