//! A client's run is over.

use crate::cluster::{Answer, Context, State};
use fleet_common::ids::RunId;
use fleet_common::protocol::RunState;
use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FinishRun {
    pub run: RunId,
    pub succeeded: bool,
}

impl FinishRun {
    pub(super) fn apply(self, state: &mut State, context: &mut Context) -> Answer {
        let Some(run) = state.runs.get_mut(&self.run).filter(|run| run.state == RunState::Open) else {
            return Answer::not_found(format!("there is no open {}", self.run));
        };
        run.state = if self.succeeded { RunState::Succeeded } else { RunState::Failed };
        run.finished_unix_ms = Some(context.unix_ms);
        state.run_ended(self.run, context);
        Answer::Done
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::commands::{Change, StartRun};
    use crate::cluster::history::HistoryRow;
    use crate::cluster::runs::FINISHED_RUNS_IN_STATE;
    use crate::cluster::tests::{Script, why};

    #[test]
    fn old_runs_move_to_the_history_and_are_still_runs() {
        let mut script = Script::new();
        let runs = FINISHED_RUNS_IN_STATE as u64 + 2;
        for run in 1..=runs {
            script.run(Change::StartRun(StartRun { name: "r".into() }));
            script.run(Change::FinishRun(FinishRun { run: RunId(run), succeeded: run % 2 == 0 }));
        }
        assert_eq!(script.state.runs().len(), FINISHED_RUNS_IN_STATE);
        let moved = script.history.iter().filter_map(|row| match row {
            HistoryRow::Run { run, record } => Some((run.0, record.state)),
            _ => None,
        });
        assert_eq!(moved.collect::<Vec<_>>(), [(1, RunState::Failed), (2, RunState::Succeeded)]);
        assert!(script.state.is_run(fleet_common::protocol::RunKey::Own(RunId(1))));
        assert!(
            why(script.run(Change::FinishRun(FinishRun { run: RunId(1), succeeded: true })))
                .contains("no open")
        );
    }
}
