//! Who may write checkpoints to a directory, and what rotation may take away there.

#![allow(clippy::unwrap_used)] // helpers of tests panic as tests do

use fleet_checkpoint::{CheckpointError, Claim, MANIFEST_FILE, Manifest, RunDir, Writer, step_dir};
use fleet_common::exit::Fault;
use std::fs;
use std::path::{Path, PathBuf};

fn claim<'a>(dir: &'a Path, run: &'a str) -> Claim<'a> {
    Claim { dir, run, resumed: None, overwrite: false }
}

fn save(dir: &RunDir, step: u64) -> PathBuf {
    let mut writer = Writer::begin(dir, step).unwrap();
    writer.write_bytes("config.json", dir.run().as_bytes()).unwrap();
    writer.finish(1.5).unwrap().path.into()
}

/// The steps that are there, with the runs that wrote them.
fn steps(dir: &Path) -> Vec<(u64, String)> {
    let mut steps: Vec<(u64, String)> = fs::read_dir(dir)
        .unwrap()
        .filter_map(|entry| Manifest::read(&entry.unwrap().path()).ok())
        .map(|manifest| (manifest.step, manifest.run))
        .collect();
    steps.sort();
    steps
}

fn pairs(expected: &[(u64, &str)]) -> Vec<(u64, String)> {
    expected.iter().map(|(step, run)| (*step, (*run).to_owned())).collect()
}

#[test]
fn rotation_keeps_the_newest_and_never_touches_what_is_not_committed() {
    let dir = tempfile::tempdir().unwrap();
    let run = RunDir::claim(&claim(dir.path(), "a")).unwrap();
    (1..=5).for_each(|step| drop(save(&run, step)));
    let removed = run.rotate(2, 4).unwrap();
    assert_eq!(removed, [step_dir(dir.path(), 1), step_dir(dir.path(), 2)]);
    assert_eq!(steps(dir.path()), pairs(&[(3, "a"), (4, "a"), (5, "a")]));
    assert!(run.rotate(1, 99).unwrap().is_empty(), "a step that is not there protects nothing");
    run.rotate(0, 4).unwrap();
    assert_eq!(steps(dir.path()), pairs(&[(4, "a"), (5, "a")]));
}

#[test]
fn a_run_does_not_begin_where_anothers_checkpoints_lie() {
    let dir = tempfile::tempdir().unwrap();
    let first = RunDir::claim(&claim(dir.path(), "a")).unwrap();
    save(&first, 10);
    save(&first, 20);
    drop(first);
    let refused = RunDir::claim(&claim(dir.path(), "b")).unwrap_err();
    let line = refused.to_string();
    assert_eq!(refused.fault(), Fault::Input);
    for said in
        ["checkpoints of another run (2, the newest step-00000020)", "latest", "run_name", "overwrite"]
    {
        assert!(line.contains(said), "{line}");
    }
    assert_eq!(steps(dir.path()), pairs(&[(10, "a"), (20, "a")]));
    // The same one may begin again: it was stopped before anything of it was recorded.
    RunDir::claim(&claim(dir.path(), "a")).unwrap();
}

#[test]
fn a_run_whose_manifests_cannot_be_read_is_another_one() {
    let dir = tempfile::tempdir().unwrap();
    let first = RunDir::claim(&claim(dir.path(), "a")).unwrap();
    let path = save(&first, 10);
    save(&first, 20);
    fs::write(path.join(MANIFEST_FILE), "{").unwrap();
    let second = step_dir(dir.path(), 20);
    fs::copy(path.join(MANIFEST_FILE), second.join(MANIFEST_FILE)).unwrap();
    save(&first, 20); // a run that was continued from before a damaged one comes to its step again
    assert_eq!(first.rotate(1, 20).unwrap(), [] as [PathBuf; 0], "whose it is cannot be told, so it stays");
    drop(first);
    fs::remove_dir_all(second).unwrap();
    assert!(matches!(RunDir::claim(&claim(dir.path(), "a")), Err(CheckpointError::Occupied { .. })));
}

#[test]
fn who_continues_a_run_goes_on_under_its_name_and_rotates_what_it_left() {
    let dir = tempfile::tempdir().unwrap();
    let first = RunDir::claim(&claim(dir.path(), "a")).unwrap();
    let from = (save(&first, 10), save(&first, 20)).1;
    drop(first);
    let link =
        dir.path().parent().unwrap().join(format!("{}-link", dir.path().file_name().unwrap().display()));
    std::os::unix::fs::symlink(dir.path(), &link).unwrap();
    let through = link.join(from.file_name().unwrap());
    let second = RunDir::claim(&Claim { resumed: Some(&through), ..claim(dir.path(), "b") }).unwrap();
    fs::remove_file(link).unwrap();
    assert_eq!(second.run(), "a");
    save(&second, 30);
    second.rotate(2, 30).unwrap();
    assert_eq!(steps(dir.path()), pairs(&[(20, "a"), (30, "a")]));
}

#[test]
fn who_continues_from_elsewhere_begins_a_run_of_its_own() {
    let (there, here) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let from = save(&RunDir::claim(&claim(there.path(), "a")).unwrap(), 10);
    let resumed = |overwrite| Claim { resumed: Some(&from), overwrite, ..claim(here.path(), "c") };
    save(&RunDir::claim(&claim(here.path(), "b")).unwrap(), 5);
    assert!(matches!(RunDir::claim(&resumed(false)), Err(CheckpointError::Occupied { .. })));
    assert_eq!(RunDir::claim(&resumed(true)).unwrap().run(), "c");
    fs::remove_dir_all(step_dir(here.path(), 5)).unwrap();
    assert_eq!(RunDir::claim(&resumed(false)).unwrap().run(), "c");
    assert_eq!(steps(there.path()), pairs(&[(10, "a")]));
}

#[test]
fn what_may_be_overwritten_goes_with_the_first_recorded_checkpoint_and_not_before() {
    let dir = tempfile::tempdir().unwrap();
    let old = RunDir::claim(&claim(dir.path(), "old")).unwrap();
    save(&old, 10);
    save(&old, 20);
    drop(old);
    let new = RunDir::claim(&Claim { overwrite: true, ..claim(dir.path(), "new") }).unwrap();
    assert_eq!(steps(dir.path()), pairs(&[(10, "old"), (20, "old")]));
    save(&new, 10);
    assert_eq!(steps(dir.path()), pairs(&[(10, "new"), (20, "old")]), "the same step is replaced");
    new.rotate(5, 10).unwrap();
    assert_eq!(steps(dir.path()), pairs(&[(10, "new")]));
}

#[test]
fn one_process_writes_at_a_time() {
    let dir = tempfile::tempdir().unwrap();
    let held = RunDir::claim(&claim(dir.path(), "a")).unwrap();
    let refused = RunDir::claim(&claim(dir.path(), "b")).unwrap_err();
    assert!(matches!(refused, CheckpointError::Busy(_)), "{refused}");
    assert!(refused.to_string().contains("another job is writing"), "{refused}");
    drop(held);
    RunDir::claim(&claim(dir.path(), "b")).unwrap();
}

#[test]
fn a_directory_that_was_claimed_for_nothing_leaves_no_trace() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("out/checkpoints/run");
    drop(RunDir::claim(&claim(&run, "a")).unwrap());
    assert!(!dir.path().join("out").exists());
    fs::create_dir_all(dir.path().join("out/checkpoints")).unwrap();
    drop(RunDir::claim(&claim(&run, "a")).unwrap());
    assert!(dir.path().join("out/checkpoints").exists() && !run.exists());
    save(&RunDir::claim(&claim(&run, "a")).unwrap(), 1);
    assert_eq!(fs::read_dir(&run).unwrap().count(), 1, "the checkpoint and no lock");
}

#[test]
fn of_many_that_want_a_directory_one_has_it_at_a_time() {
    let dir = tempfile::tempdir().unwrap();
    let (run, inside) = (dir.path().join("run"), std::sync::atomic::AtomicU32::new(0));
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                for _ in 0..20 {
                    let claimed = match RunDir::claim(&claim(&run, "a")) {
                        Ok(claimed) => claimed,
                        Err(CheckpointError::Busy(_)) => continue,
                        Err(other) => panic!("{other}"),
                    };
                    assert_eq!(inside.fetch_add(1, std::sync::atomic::Ordering::SeqCst), 0);
                    inside.fetch_sub(1, std::sync::atomic::Ordering::SeqCst);
                    drop(claimed);
                }
            });
        }
    });
}

/// Where a file system has no locks, two runs may both find the directory empty.
#[test]
fn a_checkpoint_of_another_run_that_appeared_meanwhile_is_not_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let elsewhere = tempfile::tempdir().unwrap();
    let run = RunDir::claim(&claim(dir.path(), "a")).unwrap();
    let other = save(&RunDir::claim(&claim(elsewhere.path(), "b")).unwrap(), 5);
    fs::rename(other, step_dir(dir.path(), 5)).unwrap();
    let mut writer = Writer::begin(&run, 5).unwrap();
    writer.write_bytes("config.json", b"{}").unwrap();
    let error = writer.finish(1.0).unwrap_err().to_string();
    assert!(error.contains("it is not a checkpoint of this run"), "{error}");
    save(&run, 6);
    run.rotate(1, 6).unwrap();
    assert_eq!(steps(dir.path()), pairs(&[(5, "b"), (6, "a")]));
}

#[test]
fn leftovers_that_stay_and_files_in_the_way_cost_no_other_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let run = RunDir::claim(&claim(dir.path(), "a")).unwrap();
    fs::write(dir.path().join(".tmp-file"), "a plain file").unwrap();
    fs::write(step_dir(dir.path(), 2), "a file where a checkpoint will be").unwrap();
    save(&run, 1);
    assert!(!dir.path().join(".tmp-file").exists());
    let mut writer = Writer::begin(&run, 2).unwrap();
    writer.write_bytes("config.json", b"{}").unwrap();
    assert!(writer.finish(1.0).unwrap_err().to_string().contains("step-00000002"));
    assert_eq!(fs::read(step_dir(dir.path(), 2)).unwrap(), b"a file where a checkpoint will be");
    save(&run, 3);
    assert_eq!(steps(dir.path()), pairs(&[(1, "a"), (3, "a")]));
}

#[test]
fn a_place_where_nothing_can_be_written_is_told_at_once() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("file"), "").unwrap();
    let below = dir.path().join("file/checkpoints/x");
    let refused = RunDir::claim(&claim(&below, "a")).unwrap_err();
    let line = refused.to_string();
    assert_eq!(refused.fault(), Fault::Environment);
    assert!(line.contains("checkpoints cannot be written to") && line.contains("output_dir"), "{line}");
    let left: Vec<_> = fs::read_dir(dir.path()).unwrap().collect();
    assert_eq!(left.len(), 1);
}
