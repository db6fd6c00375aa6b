use super::*;
use crate::cluster::commands::{Change, FinishRun, RecordExport, RecordMetrics, RecordProfile, StartRun};
use crate::cluster::ends::FINISHED_IN_STATE;
use crate::cluster::members::{RESTORE_GAP, ReplicaRecord, Standing};
use crate::cluster::tests::{Script, checkpoint, export, finished, point, profile, step};
use crate::raft::disk::{Batch, Durability};
use crate::raft::history::stage;
use crate::raft::memory::MemoryDisk;
use fleet_common::ids::{ExportId, JobId, RunId};
use fleet_common::protocol::{Page, RunKey, RunState};
use std::sync::Arc;

/// What a script left, as the history has it.
struct Kept {
    script: Script,
    history: History<MemoryDisk>,
}

impl Kept {
    fn new(script: Script) -> Kept {
        let disk = Arc::new(MemoryDisk::default());
        let mut batch = Batch::default();
        script.history.iter().for_each(|row| stage(row, &mut batch).unwrap());
        disk.write(&batch, Durability::Written).unwrap();
        Kept { script, history: History::new(disk) }
    }

    fn ask(&self, request: Request) -> Result<Reply, Refusal> {
        let observed = Observed::default();
        let (state, history, raft) = (&self.script.state, &self.history, Raft::default());
        View { state, observed: &observed, history, raft, now_ms: 0, unix_ms: self.script.now }
            .answer(&request)
    }

    /// Numbers of all items of a listing, page after page.
    fn all(&self, max: u32, mut ask: impl FnMut(&Kept, Page) -> (Vec<u64>, Option<u64>)) -> Vec<u64> {
        let (mut numbers, mut before) = (Vec::new(), None);
        loop {
            let (items, next) = ask(self, Page { before, max });
            assert!(items.len() <= max as usize);
            numbers.extend(items);
            match next {
                Some(_) => before = next,
                None => return numbers,
            }
        }
    }
}

/// Training jobs that ended, more than are kept in memory.
fn many_jobs() -> Kept {
    let mut script = Script::with_node(1);
    for _ in 0..FINISHED_IN_STATE as u64 + 30 {
        let job = script.submit_training(1);
        script.assign(job);
        script.tell(job, 1, 1, vec![step(1), checkpoint(5), finished()]);
    }
    script.submit(2);
    Kept::new(script)
}

#[test]
fn all_jobs_are_listed_whether_in_memory_or_not() {
    let kept = many_jobs();
    let last = FINISHED_IN_STATE as u64 + 31;
    let all = kept.all(77, |kept, page| {
        let Ok(Reply::Jobs(jobs)) = kept.ask(Request::Jobs { all: Some(page) }) else { panic!() };
        (jobs.items.iter().map(|view| view.job.0).collect(), jobs.next)
    });
    assert_eq!(all, (1..=last).rev().collect::<Vec<_>>());
    let Ok(Reply::Jobs(present)) = kept.ask(Request::Jobs { all: None }) else { panic!() };
    assert_eq!((present.items.len(), present.items.last().unwrap().job.0), (51, last));
    let Ok(Reply::Job(old)) = kept.ask(Request::Job(JobId(1))) else { panic!() };
    assert_eq!((old.state, old.reason.as_str()), (JobState::Succeeded, "done after 7 steps"));
    assert_eq!(old.job_json, "{}");
    assert_eq!(events_of(&kept.script.state, &kept.history, JobId(1), 0), Ok((3, true)));
    assert!(kept.ask(Request::Job(JobId(last + 1))).unwrap_err().message.contains("no job-"));
}

#[test]
fn a_restored_cluster_lists_what_is_behind_the_gap_of_its_numbers_in_one_page() {
    let mut script = many_jobs().script;
    let (id, last) = (script.state.restored_replica(), script.state.last_job());
    let address = crate::cluster::tests::address(id.0);
    let record = ReplicaRecord {
        address,
        name: "c".into(),
        version: "0".into(),
        level: 1,
        joined_unix_ms: 0,
        standing: Standing::Voter,
    };
    script.state = script.state.restored(record, [5; 32], &[]);
    let new = script.submit(1);
    assert_eq!(new.0, last + RESTORE_GAP + 1);
    let kept = Kept::new(script);
    let page = Page { before: None, max: 50 };
    let Ok(Reply::Jobs(jobs)) = kept.ask(Request::Jobs { all: Some(page) }) else { panic!() };
    let listed: Vec<u64> = jobs.items.iter().map(|view| view.job.0).collect();
    assert_eq!(listed, std::iter::once(new.0).chain((last - 48..=last).rev()).collect::<Vec<_>>());
    let page = Page { before: Some(31), max: 50 };
    let Ok(Reply::Jobs(jobs)) = kept.ask(Request::Jobs { all: Some(page) }) else { panic!() };
    assert_eq!((jobs.items.len(), jobs.next), (30, None));
}

#[test]
fn checkpoints_of_old_jobs_are_there_with_their_shards() {
    let kept = many_jobs();
    let all = kept.all(20, |kept, page| {
        let Ok(Reply::Checkpoints(views)) = kept.ask(Request::Checkpoints { job: None, page }) else {
            panic!()
        };
        assert!(views.items.iter().all(|view| view.checkpoint.shards.is_empty()));
        (views.items.iter().map(|view| view.job.0).collect(), views.next)
    });
    assert_eq!(all.len(), FINISHED_IN_STATE + 30);
    let ask = |step| kept.ask(Request::Checkpoint { job: JobId(3), step });
    let Ok(Reply::Checkpoint(view)) = ask(5) else { panic!() };
    assert_eq!((view.checkpoint.shards.len(), view.checkpoint.writers), (1, 1));
    let refusal = ask(6).unwrap_err().message;
    assert!(
        refusal.contains("no checkpoint of step 6") && refusal.contains("`fleet checkpoints ls job-3`"),
        "{refusal}"
    );
}

#[test]
fn a_run_s_series_come_back_as_they_were_recorded() {
    let mut script = Script::with_node(1);
    script.run(Change::StartRun(StartRun { name: "r".into() }));
    for batch in 0..30 {
        let points = (0..100).map(|n| point("loss", batch * 100 + n, 1.0)).collect();
        script.run(Change::RecordMetrics(RecordMetrics { run: RunId(1), points }));
    }
    script.run(Change::FinishRun(FinishRun { run: RunId(1), succeeded: true }));
    let job = script.submit_training(1);
    script.assign(job);
    script.tell(job, 1, 1, vec![step(1), step(2), finished()]);
    let kept = Kept::new(script);
    let steps = |run| {
        let (mut steps, mut from) = (Vec::new(), 1);
        loop {
            let Ok(Reply::Points { points, next }) = kept.ask(Request::RunMetrics { run, from }) else {
                panic!()
            };
            steps.extend(points.iter().filter(|point| point.series == "loss").map(|point| point.step));
            match next {
                Some(next) => from = next,
                None => return steps,
            }
        }
    };
    assert_eq!(steps(RunKey::Own(RunId(1))), (0..3_000).collect::<Vec<_>>());
    assert_eq!(steps(RunKey::Job(job)), [1, 2]);
    let Ok(Reply::Run(run)) = kept.ask(Request::Run(RunKey::Own(RunId(1)))) else { panic!() };
    assert_eq!(
        (run.state, run.points, &run.last[..]),
        (RunState::Succeeded, 3_000, &[("loss".to_owned(), 1.0)][..])
    );
    assert!(kept.ask(Request::Run(RunKey::Own(RunId(2)))).unwrap_err().message.contains("no run-2"));
}

#[test]
fn exports_profiles_and_decisions_are_listed_newest_first() {
    let mut script = Script::with_node(1);
    let job = script.submit_training(1);
    script.assign(job);
    script.tell(job, 1, 1, vec![checkpoint(5)]);
    for _ in 0..5 {
        script.run(Change::RecordExport(RecordExport { record: export(1, 5) }));
        script.run(Change::RecordProfile(RecordProfile { record: profile(RunKey::Job(job)) }));
        script.decide("because", Change::StartRun(StartRun { name: "r".into() }));
    }
    let kept = Kept::new(script);
    let numbers = |which: fn(Page) -> Request| {
        kept.all(2, |kept, page| match kept.ask(which(page)).unwrap() {
            Reply::Exports(list) => (list.items.iter().map(|item| item.export.0).collect(), list.next),
            Reply::Profiles(list) => (list.items.iter().map(|item| item.profile.0).collect(), list.next),
            Reply::Decisions(list) => (list.items.iter().map(|item| item.number).collect(), list.next),
            Reply::Runs(list) => (list.items.iter().map(|item| item.points + 1).collect(), list.next),
            other => panic!("{other:?}"),
        })
    };
    for which in [Request::Exports, Request::Profiles, Request::Decisions] {
        assert_eq!(numbers(which), [5, 4, 3, 2, 1]);
    }
    assert_eq!(numbers(Request::Runs).len(), 5);
    let Ok(Reply::Export(export)) = kept.ask(Request::Export(ExportId(2))) else { panic!() };
    assert_eq!((export.export, export.record.step, export.manifest_sha256.len()), (ExportId(2), 5, 64));
    assert!(kept.ask(Request::Export(ExportId(6))).is_err());
}

#[test]
fn a_change_is_no_question() {
    let kept = Kept::new(Script::new());
    let refusal = kept.ask(Request::Undrain(fleet_common::ids::NodeId(1))).unwrap_err();
    assert_eq!(refusal.kind, RefusalKind::Invalid);
}
