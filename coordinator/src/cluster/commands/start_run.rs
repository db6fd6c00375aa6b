//! A client begins a run of its own, to record series of numbers in.

use crate::cluster::members::clean_text;
use crate::cluster::runs::{OPEN_RUNS_MAX, RunRecord};
use crate::cluster::{Answer, Context, State};
use fleet_common::ids::RunId;
use fleet_common::protocol::RunState;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StartRun {
    pub name: String,
}

impl StartRun {
    pub(super) fn apply(self, state: &mut State, context: &mut Context) -> Answer {
        if state.runs.values().filter(|run| run.state == RunState::Open).count() >= OPEN_RUNS_MAX {
            return Answer::later(format!("{OPEN_RUNS_MAX} runs are open, which is the limit; finish some"));
        }
        let Some(name) = clean_text(&self.name) else {
            return Answer::invalid("a run needs a name of at most 256 characters");
        };
        state.last_run += 1;
        let run = RunId(state.last_run);
        let record = RunRecord {
            name,
            state: RunState::Open,
            started_unix_ms: context.unix_ms,
            finished_unix_ms: None,
            batches: 0,
            points: 0,
            bytes: 0,
            last: BTreeMap::new(),
        };
        state.runs.insert(run, record);
        Answer::RunStarted { run }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::commands::Change;
    use crate::cluster::tests::{Script, why};

    fn start(name: &str) -> Change {
        Change::StartRun(StartRun { name: name.into() })
    }

    #[test]
    fn runs_are_numbered_and_named() {
        let mut script = Script::new();
        assert_eq!(script.run(start("a")), Answer::RunStarted { run: RunId(1) });
        assert_eq!(script.run(start("a")), Answer::RunStarted { run: RunId(2) });
        assert!(why(script.run(start(" "))).contains("needs a name"));
    }

    #[test]
    fn the_number_of_open_runs_is_bounded() {
        let mut script = Script::new();
        for _ in 0..OPEN_RUNS_MAX {
            script.run(start("a"));
        }
        assert!(why(script.run(start("a"))).contains("finish some"));
    }
}
