use super::*;
use crate::cluster::Answer;
use crate::cluster::commands::{
    Change, FinishRun, Forget, RecordExport, RecordMetrics, RecordProfile, SetRetention, StartRun,
};
use crate::cluster::ends::FINISHED_IN_STATE;
use crate::cluster::tests::{Script, checkpoint, export, finished, point, profile, step, why};
use fleet_common::events::{EventBody, Level};
use fleet_common::protocol::RunKey;
use std::collections::BTreeMap;

const DAY: u64 = 24 * 3600 * 1000;

/// A script whose history is kept as a disk would keep it.
struct Kept {
    script: Script,
    rows: BTreeMap<(Table, Vec<u8>), u64>,
    seen: usize,
}

impl Kept {
    fn new() -> Kept {
        Kept { script: Script::with_node(4), rows: BTreeMap::new(), seen: 0 }
    }

    fn limit(&mut self, age_ms: u64, bytes: u64) {
        let set = SetRetention { age_ms: Some(age_ms), bytes: Some(bytes) };
        assert_eq!(self.script.run(Change::SetRetention(set)), Answer::Done);
    }

    fn ended_job(&mut self) -> JobId {
        let job = self.script.submit_training(1);
        self.script.assign(job);
        self.script.tell(job, 1, 1, vec![step(1), checkpoint(5), finished()]);
        job
    }

    /// Takes over what was written and what was removed since.
    fn keep(&mut self, removed: &[Removal]) {
        for row in &self.script.history[self.seen..] {
            self.rows.insert((row.table(), row.key()), ROW_BYTES + row.encoded_len());
        }
        self.seen = self.script.history.len();
        let number = |key: &[u8]| u64::from_be_bytes(key[..8].try_into().unwrap());
        self.rows.retain(|(table, key), _| {
            let gone = |removal: &Removal| {
                removal.table == *table && (removal.from..removal.to).contains(&number(key))
            };
            !removed.iter().any(gone)
        });
    }

    fn forget(&mut self, unix_ms: u64) -> Vec<Removal> {
        self.script.index += 1;
        let change = Change::Forget(Forget);
        let command = crate::cluster::Command { unix_ms, request: None, by: None, why: None, change };
        let applied = self.script.state.apply(self.script.index, command);
        self.keep(&applied.removed);
        applied.removed
    }

    fn jobs(&self) -> Vec<u64> {
        let of_jobs = self.rows.keys().filter(|(table, _)| *table == Table::Works);
        of_jobs.map(|(_, key)| u64::from_be_bytes(key[..8].try_into().unwrap())).collect()
    }

    fn retention(&self) -> &Retention {
        self.script.state.retention()
    }
}

#[test]
fn what_ended_long_ago_is_removed_with_all_that_belongs_to_it_and_nothing_else_is() {
    let mut kept = Kept::new();
    let running = kept.script.submit(1);
    kept.script.assign(running);
    kept.script.tell(running, 1, 1, vec![step(1)]);
    kept.script.now = DAY;
    let old = kept.ended_job();
    kept.script.now = 50 * DAY;
    let new = kept.ended_job();
    assert!(!kept.retention().is_due(91 * DAY - 1));
    assert!(kept.forget(91 * DAY - 1).is_empty());
    assert!(kept.retention().is_due(92 * DAY));
    let removed = kept.forget(92 * DAY);
    assert_eq!(removed.len(), OF_JOBS.len());
    assert!(removed.iter().all(|removal| (removal.from, removal.to) == (old.0, old.0 + 1)));
    assert_eq!(kept.jobs(), [running.0, new.0]);
    assert!(!kept.script.state.jobs().contains_key(&old) && kept.script.state.jobs().contains_key(&new));
    let view = kept.retention().view();
    assert_eq!((view.removed, view.removed_unix_ms, view.ended), (1, Some(DAY), 1));
    // What it left may still be referred to, and an end that comes twice is one.
    assert!(matches!(
        kept.script.run(Change::RecordExport(RecordExport { record: export(old.0, 5) })),
        Answer::ExportRecorded { .. }
    ));
    let cancel = crate::cluster::commands::CancelJob { job: old, stop: crate::cluster::records::Stop::Now };
    assert_eq!(kept.script.run(Change::CancelJob(cancel)), Answer::Done);
}

#[test]
fn the_oldest_goes_where_there_is_too_much() {
    let mut kept = Kept::new();
    for _ in 0..10 {
        kept.ended_job();
    }
    kept.limit(u64::MAX / 2, kept.retention().bytes() / 2);
    kept.forget(1);
    let left = kept.jobs();
    assert!((4..=5).contains(&left.len()) && *left.last().unwrap() == 10, "{left:?}");
    assert!(kept.retention().bytes() <= kept.retention().limits().bytes);
    kept.limit(0, 1);
    kept.forget(1);
    assert!(kept.jobs().is_empty());
    assert_eq!(kept.retention().bytes(), 0, "every byte that was counted in was counted out");
}

#[test]
fn runs_exports_profiles_and_decisions_go_as_well_but_not_an_open_run() {
    let mut kept = Kept::new();
    let job = kept.ended_job();
    for name in ["open", "over"] {
        kept.script.run(Change::StartRun(StartRun { name: name.into() }));
    }
    for run in [1, 2] {
        let points = vec![point("loss", 1, 3.0)];
        kept.script.run(Change::RecordMetrics(RecordMetrics { run: RunId(run), points }));
    }
    kept.script.run(Change::FinishRun(FinishRun { run: RunId(2), succeeded: true }));
    kept.script.run(Change::RecordExport(RecordExport { record: export(job.0, 5) }));
    kept.script.run(Change::RecordProfile(RecordProfile { record: profile(RunKey::Own(RunId(1))) }));
    for day in 1..4 {
        kept.script.now = day * DAY;
        kept.script.decide("because", Change::StartRun(StartRun { name: "r".into() }));
    }
    kept.limit(0, u64::MAX);
    kept.forget(100 * DAY);
    let mut left: Vec<Table> = kept.rows.keys().map(|(table, _)| *table).collect();
    left.dedup();
    // The newest decision is no unit of its own yet.
    assert_eq!(left, [Table::Decisions, Table::Metrics]);
    assert!(
        kept.script.state.runs().contains_key(&RunId(1)) && !kept.script.state.runs().contains_key(&RunId(2))
    );
    let all: u64 = kept.rows.values().sum();
    assert_eq!(kept.retention().bytes(), all, "what is counted is what is there");
}

#[test]
fn the_state_knows_all_that_is_gone_also_behind_the_memory() {
    let mut kept = Kept::new();
    let running = kept.script.submit(1);
    let jobs = FINISHED_IN_STATE as u64 + 20;
    for _ in 0..jobs {
        kept.ended_job();
    }
    kept.keep(&[]);
    let everything = kept.rows.clone();
    kept.limit(u64::MAX / 2, kept.retention().bytes() / 2);
    while kept.retention().is_due(1) {
        kept.forget(1);
    }
    let after = kept.rows.clone();
    assert!(after.len() < everything.len() && kept.jobs().contains(&running.0));
    kept.rows = everything;
    kept.keep(&kept.script.state.removals());
    assert_eq!(kept.rows, after, "a replica that was away ends with the same rows");
}

#[test]
fn one_command_removes_so_many_at_most() {
    let mut kept = Kept::new();
    let jobs = FORGOTTEN_AT_ONCE as u64 + 5;
    for _ in 0..jobs {
        kept.ended_job();
    }
    kept.limit(0, 1);
    kept.forget(1 << 50);
    assert_eq!(kept.jobs().len(), 5);
    assert!(kept.retention().is_due(1 << 50));
}

#[test]
fn a_clock_that_is_late_removes_nothing() {
    let mut kept = Kept::new();
    kept.script.now = 50 * DAY;
    kept.ended_job();
    assert!(!kept.retention().is_due(0) && kept.forget(0).is_empty());
}

#[test]
fn a_run_has_so_many_points_and_no_more() {
    let mut kept = Kept::new();
    kept.script.run(Change::StartRun(StartRun { name: "r".into() }));
    let points: Vec<_> = (0..1_000).map(|n| point(&"s".repeat(60), n, 1.0)).collect();
    let record = || Change::RecordMetrics(RecordMetrics { run: RunId(1), points: points.clone() });
    let mut refused = None;
    for _ in 0..5_000 {
        match kept.script.run(record()) {
            Answer::Done => kept.script.history.clear(),
            other => {
                refused = Some(why(other));
                break;
            }
        }
    }
    assert!(refused.unwrap().contains("256 MiB of points, which is the limit; start another run"));
}

#[test]
fn lines_of_output_are_not_recorded_where_only_unfinished_jobs_fill_the_history() {
    let mut kept = Kept::new();
    let job = kept.script.submit(1);
    kept.script.assign(job);
    kept.limit(u64::MAX / 2, 40_000);
    let line = || EventBody::Log { rank: Some(0), level: Level::Info, line: "x".repeat(1_000) };
    for seq in 0..100 {
        kept.script.tell(job, 1, 2 * seq + 1, vec![line(), step(seq)]);
    }
    let bytes = kept.retention().bytes();
    assert!((50_000..70_000).contains(&bytes), "{bytes}");
    assert_eq!(kept.script.steps_in_history(job).len(), 100, "steps are recorded all the same");
    kept.script.tell(job, 1, 201, vec![finished()]);
    let left_out: u64 = kept
        .script
        .events(job)
        .iter()
        .filter_map(|event| match event.body {
            EventBody::LeftOut { lines, .. } => Some(lines),
            _ => None,
        })
        .sum();
    let lines = kept.script.events(job).iter().filter(|e| matches!(e.body, EventBody::Log { .. })).count();
    assert_eq!(lines as u64 + left_out, 100, "what is left out is counted");
    assert!(kept.script.last_event_is_finished(job));
}
