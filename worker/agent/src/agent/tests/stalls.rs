//! Gangs that stand still, and who is to blame.

use super::*;
use crate::stall::Sight;
use fleet_collectives::{Activity, Computed, Doing, Exchanged, RankReport};
use fleet_common::events::{JobError, Outcome};

/// The outcome among these actions.
fn failure(actions: &[Action]) -> Option<JobError> {
    let events = actions.iter().filter_map(|action| match action {
        Action::Send(FromAgent::Events(batch)) => Some(&batch.events),
        _ => None,
    });
    events.flatten().find_map(|event| match &event.body {
        EventBody::Finished(Outcome::Failed(error)) => Some(error.clone()),
        _ => None,
    })
}

#[test]
fn a_missed_deadline_is_the_fault_of_the_rank_that_did_not_come() {
    let mut stage = Stage::new(Past::default());
    stage.play(
        "> connected
         > welcome
         > start train 3
         > prepared
         > rank 1 prints stuck
         > rank 0 prints waiting
         > rank 2 was told of 1 all_reduce: aborted: rank 1 did not come to a collective in time
         > rank 0 blames 1 rank 1 did not enter all_reduce #412 within 900 s; it is in backward since 901.0 s
         > rank 0 exits 1
         > rank 2 exits 1
         > wait 500",
    );
    // It stands still, so it was killed.
    assert!(stage.seen.contains(&"kill rank 1".to_owned()), "{:?}", stage.seen);
    stage.agent.handle(stage.now, input(&["rank", "1", "dies", "9"], stage.now));
    let swept = Input::Gang(GANG, GangInput::Swept { left: 0 });
    let error = failure(&stage.agent.handle(stage.now, swept)).unwrap();
    assert_eq!((error.rank, error.signal, error.exit_code), (Some(1), None, None));
    assert!(error.message.starts_with("rank 1 did not enter all_reduce #412"), "{}", error.message);
    assert_eq!(error.last_lines, ["stuck"]);
}

/// How often the agent looks at the ranks in ten seconds.
fn looks(stage: &mut Stage) -> usize {
    let (mut looks, end) = (0, stage.now.mono + Duration::from_secs(10));
    while let Some(at) = stage.agent.deadline().filter(|at| *at <= end) {
        stage.now.mono = at;
        let actions = stage.agent.handle(stage.now, Input::Tick);
        looks += actions.iter().filter(|action| matches!(action, Action::Look(_))).count();
    }
    stage.now.mono = end;
    looks
}

#[test]
fn ranks_are_looked_at_while_they_train_together() {
    let after = |script: &str| {
        let mut stage = Stage::new(Past::default());
        stage.play(script);
        looks(&mut stage)
    };
    assert_eq!(after("> start train 2"), 0, "nothing is trained before the data is there");
    assert_eq!(after("> start train 2\n> prepared"), 20);
    assert_eq!(after("> start train 1\n> prepared"), 0);
    assert_eq!(after("> start program 2"), 0);
    assert_eq!(after("> start train 2\n> prepared\n> rank 1 done 9"), 0, "rank 0 may save for long");
}

#[test]
fn a_stall_is_an_event_of_the_job() {
    let mut stage = Stage::new(Past::default());
    stage.play("> connected\n> welcome\n> start train 2\n> prepared");
    let told = stage.seen.len();
    let look = |seconds: u64, stopped: bool| {
        let since = Duration::from_secs(seconds);
        let sight = |rank: usize, doing, stopped| {
            let report = RankReport {
                rank,
                doing,
                calls: 8 - rank as u64,
                step: 3,
                last_step: None,
                computed: Computed::default(),
                exchanged: Exchanged::default(),
            };
            Sight { report, pid: 100 + rank as u32, stopped, cpu: 0 }
        };
        let (operation, during) = ("reduce #8".to_owned(), Some(Activity::Backward));
        let waits = Doing::Inside { operation, call: 8, since, during };
        let computes = Doing::Outside { since, activity: Some((Activity::Backward, since)) };
        Input::Gang(GANG, GangInput::Looked(vec![sight(0, waits, false), sight(1, computes, stopped)]))
    };
    for second in 1..=4 {
        stage.now.mono = Duration::from_secs(second);
        stage.happen(look(second, true));
    }
    stage.happen(look(0, false));
    assert_eq!(
        stage.seen[told..],
        [
            "send 2: stands still since 0",
            "send 3: `rank 1 has not come to the reduction of step 3 for 3 s (process 101, stopped by a signal or a debugger); rank 0 waits for it`",
            "send 4: `the ranks go on after 4 s`, goes on"
        ]
    );
}
