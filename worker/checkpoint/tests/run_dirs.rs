//! Who may write checkpoints to a directory, and what rotation may take away there.

#![allow(clippy::unwrap_used)] // helpers of tests panic as tests do

use fleet_checkpoint::{CheckpointError, Claim, MANIFEST_FILE, Manifest, RunDir, Writer, latest, step_dir};
use fleet_common::exit::Fault;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

fn claim<'a>(dir: &'a Path, run: &'a str) -> Claim<'a> {
    Claim { dir, run, resumed: None, overwrite: false, until: None, reads: &[] }
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
    let mut run = RunDir::claim(&claim(dir.path(), "a")).unwrap();
    (1..=5).for_each(|step| drop(save(&run, step)));
    let removed = run.rotate(2, 4, false).unwrap();
    assert_eq!(removed, [step_dir(dir.path(), 1), step_dir(dir.path(), 2)]);
    assert_eq!(steps(dir.path()), pairs(&[(3, "a"), (4, "a"), (5, "a")]));
    assert!(run.rotate(1, 99, false).unwrap().is_empty(), "a step that is not there protects nothing");
    run.rotate(0, 4, false).unwrap();
    assert_eq!(steps(dir.path()), pairs(&[(4, "a"), (5, "a")]));
}

#[test]
fn the_one_that_is_spared_stays_until_another_is() {
    let dir = tempfile::tempdir().unwrap();
    let mut run = RunDir::claim(&claim(dir.path(), "a")).unwrap();
    (1..=5).for_each(|step| drop(save(&run, step)));
    run.spare(2);
    assert_eq!(run.rotate(2, 5, false).unwrap(), [step_dir(dir.path(), 1), step_dir(dir.path(), 3)]);
    assert_eq!(run.make_room(u64::MAX, Some(5)).unwrap(), [step_dir(dir.path(), 4)]);
    assert_eq!(steps(dir.path()), pairs(&[(2, "a"), (5, "a")]));
    save(&run, 6);
    run.spare(7); // which is not there
    run.rotate(1, 6, false).unwrap();
    assert_eq!(steps(dir.path()), pairs(&[(2, "a"), (6, "a")]));
    save(&run, 7);
    run.spare(6);
    run.rotate(1, 7, false).unwrap();
    assert_eq!(steps(dir.path()), pairs(&[(6, "a"), (7, "a")]));
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
    let mut first = RunDir::claim(&claim(dir.path(), "a")).unwrap();
    let path = save(&first, 10);
    save(&first, 20);
    fs::write(path.join(MANIFEST_FILE), "{").unwrap();
    let second = step_dir(dir.path(), 20);
    fs::copy(path.join(MANIFEST_FILE), second.join(MANIFEST_FILE)).unwrap();
    save(&first, 20); // a run that was continued from before a damaged one comes to its step again
    assert_eq!(
        first.rotate(1, 20, false).unwrap(),
        [] as [PathBuf; 0],
        "whose it is cannot be told, so it stays"
    );
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
    let mut second = RunDir::claim(&Claim { resumed: Some(&through), ..claim(dir.path(), "b") }).unwrap();
    fs::remove_file(link).unwrap();
    assert_eq!(second.run(), "a");
    save(&second, 30);
    second.rotate(2, 30, false).unwrap();
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
    let mut new = RunDir::claim(&Claim { overwrite: true, ..claim(dir.path(), "new") }).unwrap();
    assert_eq!(steps(dir.path()), pairs(&[(10, "old"), (20, "old")]));
    save(&new, 10);
    assert_eq!(steps(dir.path()), pairs(&[(10, "new"), (20, "old")]), "the same step is replaced");
    new.rotate(5, 10, false).unwrap();
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
    let mut run = RunDir::claim(&claim(dir.path(), "a")).unwrap();
    let other = save(&RunDir::claim(&claim(elsewhere.path(), "b")).unwrap(), 5);
    fs::rename(other, step_dir(dir.path(), 5)).unwrap();
    let mut writer = Writer::begin(&run, 5).unwrap();
    writer.write_bytes("config.json", b"{}").unwrap();
    let error = writer.finish(1.0).unwrap_err().to_string();
    assert!(error.contains("it is not a checkpoint of this run"), "{error}");
    save(&run, 6);
    run.rotate(1, 6, false).unwrap();
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
fn only_whole_checkpoints_count_and_a_damaged_one_goes_where_a_whole_one_would() {
    let dir = tempfile::tempdir().unwrap();
    let mut run = RunDir::claim(&claim(dir.path(), "a")).unwrap();
    let cut = |step| fs::write(step_dir(dir.path(), step).join("config.json"), "").unwrap();
    (1..=5).for_each(|step| drop(save(&run, step)));
    cut(4);
    run.rotate(2, 5, false).unwrap();
    assert_eq!(steps(dir.path()), pairs(&[(3, "a"), (4, "a"), (5, "a")]));
    drop(run);
    // What an earlier process left is read: a byte may have changed.
    fs::write(step_dir(dir.path(), 3).join("config.json"), "b").unwrap();
    let from = step_dir(dir.path(), 5);
    let mut run = RunDir::claim(&Claim { resumed: Some(&from), ..claim(dir.path(), "a") }).unwrap();
    save(&run, 6);
    assert_eq!(run.rotate(3, 6, false).unwrap(), [] as [PathBuf; 0]);
    assert_eq!(run.rotate(2, 6, false).unwrap(), [step_dir(dir.path(), 3), step_dir(dir.path(), 4)]);
    save(&run, 7);
    fs::remove_file(step_dir(dir.path(), 7).join("config.json")).unwrap();
    assert!(run.rotate(1, 7, false).unwrap().is_empty(), "what is recorded and not whole protects nothing");
}

#[test]
fn room_is_made_from_the_oldest_on_and_one_whole_checkpoint_stays() {
    let dir = tempfile::tempdir().unwrap();
    let mut run = RunDir::claim(&claim(dir.path(), "a")).unwrap();
    (1..=5).for_each(|step| drop(save(&run, step)));
    let manifest = fleet_checkpoint::manifest_sha256(&step_dir(dir.path(), 1)).unwrap();
    assert_eq!(run.make_room(1, Some(4)).unwrap(), [step_dir(dir.path(), 1)]);
    assert_eq!((run.take_removed(), run.take_removed()), (vec![manifest], Vec::new()));
    assert_eq!(run.make_room(u64::MAX, Some(4)).unwrap(), [step_dir(dir.path(), 2), step_dir(dir.path(), 3)]);
    assert!(run.make_room(1, Some(4)).unwrap().is_empty());
    assert!(run.make_room(1, Some(99)).unwrap().is_empty(), "nothing is known to be good");
    assert_eq!(steps(dir.path()), pairs(&[(4, "a"), (5, "a")]));
}

#[test]
fn a_run_that_may_overwrite_others_makes_room_of_theirs_but_for_the_newest() {
    let dir = tempfile::tempdir().unwrap();
    let others = RunDir::claim(&claim(dir.path(), "a")).unwrap();
    (1..=3).for_each(|step| drop(save(&others, step)));
    drop(others);
    let mut run = RunDir::claim(&Claim { overwrite: true, ..claim(dir.path(), "b") }).unwrap();
    assert_eq!(run.make_room(1, None).unwrap(), [step_dir(dir.path(), 1)]);
    assert_eq!(run.make_room(u64::MAX, None).unwrap(), [step_dir(dir.path(), 2)], "one that is whole stays");
    save(&run, 4);
    assert_eq!(run.make_room(u64::MAX, Some(4)).unwrap(), [step_dir(dir.path(), 3)]);
}

#[test]
fn a_link_is_no_checkpoint_and_no_lock() {
    let (dir, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    save(&RunDir::claim(&claim(elsewhere.path(), "a")).unwrap(), 2);
    let mut run = RunDir::claim(&claim(dir.path(), "a")).unwrap();
    symlink(step_dir(elsewhere.path(), 2), step_dir(dir.path(), 2)).unwrap();
    (3..=5).for_each(|step| drop(save(&run, step)));
    run.rotate(2, 5, false).unwrap();
    assert_eq!(steps(dir.path()), pairs(&[(2, "a"), (4, "a"), (5, "a")]));
    assert_eq!(steps(elsewhere.path()), pairs(&[(2, "a")]));
    let mut writer = Writer::begin(&run, 2).unwrap();
    writer.write_bytes("config.json", b"{}").unwrap();
    assert!(writer.finish(1.0).unwrap_err().to_string().contains("step-00000002"));
    drop(run);
    for step in [4, 5] {
        fs::remove_dir_all(step_dir(dir.path(), step)).unwrap();
    }
    assert!(latest(dir.path()).unwrap().newest.is_none());
    let line = RunDir::claim(&claim(dir.path(), "a")).unwrap_err().to_string();
    assert!(line.contains("step-00000002 is not a checkpoint that fleet wrote"), "{line}");
    fs::remove_file(step_dir(dir.path(), 2)).unwrap();

    let target = elsewhere.path().join("precious");
    symlink(&target, dir.path().join(".lock")).unwrap();
    let line = RunDir::claim(&claim(dir.path(), "a")).unwrap_err().to_string();
    assert!(line.contains(".lock is not a file that fleet made; remove it"), "{line}");
    assert!(!target.exists());
}

#[test]
fn what_fleet_did_not_write_is_in_the_way_and_stays() {
    let dir = tempfile::tempdir().unwrap();
    let mut run = RunDir::claim(&Claim { overwrite: true, ..claim(dir.path(), "a") }).unwrap();
    let notes = step_dir(dir.path(), 1).join("notes.txt");
    fs::create_dir(notes.parent().unwrap()).unwrap();
    fs::write(&notes, "mine").unwrap();
    fs::create_dir(step_dir(dir.path(), 2)).unwrap();
    save(&run, 2);
    run.rotate(1, 2, false).unwrap();
    let mut writer = Writer::begin(&run, 1).unwrap();
    writer.write_bytes("config.json", b"{}").unwrap();
    assert!(writer.finish(1.0).unwrap_err().to_string().contains("move it away"));
    assert_eq!(fs::read(&notes).unwrap(), b"mine");
    drop(run);
    let refused = RunDir::claim(&Claim { overwrite: true, ..claim(dir.path(), "b") }).unwrap_err();
    assert_eq!(refused.fault(), Fault::Input);
    assert!(refused.to_string().contains("step-00000001 is not a checkpoint that fleet wrote"), "{refused}");
    // A run that has passed it does not come there again.
    let from = step_dir(dir.path(), 2);
    RunDir::claim(&Claim { resumed: Some(&from), ..claim(dir.path(), "b") }).unwrap();
}

#[test]
fn a_model_that_the_job_reads_is_not_overwritten() {
    let dir = tempfile::tempdir().unwrap();
    let model = save(&RunDir::claim(&claim(dir.path(), "a")).unwrap(), 10);
    let linked = tempfile::tempdir().unwrap();
    symlink(model.join("config.json"), linked.path().join("config.json")).unwrap();
    let overwrite = |reads: &[PathBuf]| {
        RunDir::claim(&Claim { overwrite: true, reads, ..claim(dir.path(), "b") }).map(drop)
    };
    for reads in [model.clone(), model.join("config.json"), linked.path().to_owned()] {
        let refused = overwrite(std::slice::from_ref(&reads)).unwrap_err();
        let line = refused.to_string();
        assert_eq!(refused.fault(), Fault::Input);
        assert!(
            line.contains(&format!("the job reads {}", reads.display())) && line.contains("run_name"),
            "{line}"
        );
    }
    overwrite(&[PathBuf::from("/nowhere"), dir.path().join("other")]).unwrap();
    assert_eq!(steps(dir.path()), pairs(&[(10, "a")]));
}

#[test]
fn latest_is_advised_only_where_something_is_whole() {
    let dir = tempfile::tempdir().unwrap();
    let path = save(&RunDir::claim(&claim(dir.path(), "a")).unwrap(), 10);
    fs::remove_file(path.join("config.json")).unwrap();
    let line = RunDir::claim(&claim(dir.path(), "b")).unwrap_err().to_string();
    assert!(line.contains("none of them whole") && !line.contains("latest"), "{line}");
    let line = fleet_checkpoint::verify(dir.path()).unwrap_err().to_string();
    assert!(line.contains("none of them is whole") && !line.contains("latest"), "{line}");
}

#[test]
fn a_rotation_that_fails_says_that_and_does_what_it_can() {
    let dir = tempfile::tempdir().unwrap();
    let mut run = RunDir::claim(&claim(dir.path(), "a")).unwrap();
    (1..=3).for_each(|step| drop(save(&run, step)));
    let taken = dir.path().join(format!(".tmp-removed-step-00000001-{}", std::process::id()));
    fs::create_dir_all(taken.join("full")).unwrap();
    let error = run.rotate(1, 3, false).unwrap_err();
    assert_eq!(error.fault(), Fault::Environment);
    let line = error.to_string();
    assert!(line.starts_with("cannot remove ") && line.contains("step-00000001: "), "{line}");
    assert_eq!(steps(dir.path()), pairs(&[(1, "a"), (3, "a")]));
}

/// Does it as a user whom modes bind, which they do not bind root, in a directory of that user's.
fn as_somebody<T: Send>(dir: &Path, what: impl FnOnce() -> T + Send) -> T {
    if !nix::unistd::geteuid().is_root() {
        return what();
    }
    const NOBODY: u32 = 65_534;
    std::os::unix::fs::chown(dir, Some(NOBODY), None).unwrap();
    let it = || {
        nix::unistd::setfsuid(NOBODY.into()); // of this thread and those that it starts
        what()
    };
    std::thread::scope(|scope| scope.spawn(it).join().unwrap())
}

fn chmod(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

#[test]
fn a_checkpoint_that_cannot_be_read_now_is_never_replaced_or_passed_over() {
    let dir = tempfile::tempdir().unwrap();
    let at = |step| step_dir(dir.path(), step);
    as_somebody(dir.path(), || {
        let run = RunDir::claim(&claim(dir.path(), "a")).unwrap();
        (1..=3).for_each(|step| drop(save(&run, step * 10)));
        chmod(&at(30).join(MANIFEST_FILE), 0);
        let mut writer = Writer::begin(&run, 30).unwrap();
        writer.write_bytes("config.json", b"{}").unwrap();
        assert!(writer.finish(1.0).unwrap_err().to_string().contains("step-00000030"));
        drop(run);

        let line = latest(dir.path()).unwrap_err().to_string();
        assert!(
            line.contains("step-00000030 cannot be read now: Permission denied")
                && line.contains("make it readable"),
            "{line}"
        );
        let resume = |overwrite, until| {
            let from = at(20);
            RunDir::claim(&Claim { resumed: Some(&from), overwrite, until, ..claim(dir.path(), "b") })
        };
        for overwrite in [false, true] {
            let refused = resume(overwrite, None).unwrap_err();
            assert!(matches!(refused, CheckpointError::Unreadable { .. }), "{refused}");
            assert_eq!(refused.fault(), Fault::Environment);
        }
        resume(false, Some(25)).unwrap(); // which never comes there
        chmod(&at(30), 0o700);
        let fresh = RunDir::claim(&Claim { overwrite: true, ..claim(dir.path(), "b") }).unwrap_err();
        assert!(matches!(fresh, CheckpointError::Unreadable { .. }), "{fresh}");
        let mut far =
            RunDir::claim(&Claim { overwrite: true, until: Some(25), ..claim(dir.path(), "b") }).unwrap();
        save(&far, 11);
        far.rotate(1, 11, false).unwrap();
        assert!(far.make_room(u64::MAX, Some(11)).unwrap().is_empty());
        drop(far);
        chmod(&at(30).join(MANIFEST_FILE), 0o600);
    });
    assert_eq!(steps(dir.path()), pairs(&[(11, "b"), (30, "a")]));
    fleet_checkpoint::verify(&at(30)).unwrap();
}

#[test]
fn a_checkpoint_of_another_version_is_never_replaced_or_passed_over() {
    for (old, new) in [("fleet-checkpoint/3", "fleet-checkpoint/4"), ("{", "{\"more\": 1,")] {
        let dir = tempfile::tempdir().unwrap();
        let at = |step| step_dir(dir.path(), step);
        let run = RunDir::claim(&claim(dir.path(), "a")).unwrap();
        (1..=3).for_each(|step| drop(save(&run, step * 10)));
        let path = at(30).join(MANIFEST_FILE);
        let text = fs::read_to_string(&path).unwrap().replacen(old, new, 1);
        fs::write(&path, &text).unwrap();
        let mut writer = Writer::begin(&run, 30).unwrap();
        writer.write_bytes("config.json", b"{}").unwrap();
        writer.finish(1.0).unwrap_err();
        drop(run);

        let line = latest(dir.path()).unwrap_err().to_string();
        assert!(line.contains("step-00000030 was written by another version of fleet"), "{line}");
        for (overwrite, from) in [(false, Some(at(20))), (true, Some(at(20))), (true, None)] {
            let claim = Claim { resumed: from.as_deref(), overwrite, ..claim(dir.path(), "b") };
            let refused = RunDir::claim(&claim).unwrap_err();
            assert!(matches!(refused, CheckpointError::OtherVersion { .. }), "{refused}");
        }
        let mut far =
            RunDir::claim(&Claim { overwrite: true, until: Some(25), ..claim(dir.path(), "b") }).unwrap();
        save(&far, 11);
        far.rotate(1, 11, false).unwrap();
        assert!(far.make_room(u64::MAX, Some(11)).unwrap().is_empty());
        assert_eq!(fs::read_to_string(&path).unwrap(), text);
    }
}

#[test]
fn a_run_that_continues_is_told_at_once_of_anothers_checkpoints_where_it_would_save() {
    let (dir, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let from = save(&RunDir::claim(&claim(dir.path(), "b")).unwrap(), 10);
    let other = RunDir::claim(&claim(elsewhere.path(), "a")).unwrap();
    for step in [5, 20, 30] {
        fs::rename(save(&other, step), step_dir(dir.path(), step)).unwrap();
    }
    let resume = |overwrite, until| {
        RunDir::claim(&Claim { resumed: Some(&from), overwrite, until, ..claim(dir.path(), "c") })
    };
    for until in [None, Some(20)] {
        let refused = resume(false, until).unwrap_err();
        assert_eq!(refused.fault(), Fault::Input);
        let line = refused.to_string();
        let count = if until.is_none() { "(2, such as step-00000020)" } else { "(1, such as step-00000020)" };
        for said in
            [count, "after step 10", "move them away", "overwrite = true", "run_name", "step-00000010"]
        {
            assert!(line.contains(said), "{line}");
        }
    }
    assert_eq!(resume(false, Some(19)).unwrap().run(), "b", "it ends before them");
    let run = resume(true, None).unwrap();
    save(&run, 20);
    assert_eq!(steps(dir.path()), pairs(&[(5, "a"), (10, "b"), (20, "b"), (30, "a")]));
}

#[test]
fn a_run_that_was_stopped_removes_nothing_of_others() {
    let dir = tempfile::tempdir().unwrap();
    save(&RunDir::claim(&claim(dir.path(), "old")).unwrap(), 10);
    let mut new = RunDir::claim(&Claim { overwrite: true, ..claim(dir.path(), "new") }).unwrap();
    (1..=3).for_each(|step| drop(save(&new, step)));
    new.rotate(1, 3, true).unwrap();
    assert_eq!(steps(dir.path()), pairs(&[(3, "new"), (10, "old")]));
    save(&new, 4);
    new.rotate(1, 4, false).unwrap();
    assert_eq!(steps(dir.path()), pairs(&[(4, "new")]));
}

#[test]
fn a_checkpoint_that_cannot_be_removed_keeps_its_name() {
    let dir = tempfile::tempdir().unwrap();
    let first = step_dir(dir.path(), 1);
    as_somebody(dir.path(), || {
        let mut run = RunDir::claim(&claim(dir.path(), "a")).unwrap();
        (1..=2).for_each(|step| drop(save(&run, step)));
        chmod(&first, 0o555);
        let line = run.rotate(1, 2, false).unwrap_err().to_string();
        assert!(line.contains(&format!("cannot remove {}: Permission denied", first.display())), "{line}");
        assert!(!line.contains("what is left"), "{line}");
    });
    assert_eq!(steps(dir.path()), pairs(&[(1, "a"), (2, "a")]));
    fleet_checkpoint::verify(&first).unwrap();
    // With a folder in it that stays, its files go: what is left is no checkpoint.
    as_somebody(dir.path(), || {
        chmod(&first, 0o755);
        fs::create_dir(first.join("deep")).unwrap();
        fs::write(first.join("deep/file"), "").unwrap();
        chmod(&first.join("deep"), 0o555);
        let mut run = RunDir::claim(&claim(dir.path(), "a")).unwrap();
        let line = run.rotate(1, 2, false).unwrap_err().to_string();
        let is_told = line.contains("what is left of it lies in") || first.join(MANIFEST_FILE).exists();
        assert!(is_told, "{line}");
    });
    for entry in fs::read_dir(dir.path()).unwrap() {
        let deep = entry.unwrap().path().join("deep");
        if deep.exists() {
            chmod(&deep, 0o755);
        }
    }
}

#[test]
fn what_is_in_the_way_to_a_directory_is_named() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("file"), "").unwrap();
    symlink("/nowhere/at/all", dir.path().join("dangling")).unwrap();
    fs::create_dir(dir.path().join("out")).unwrap();
    fs::write(dir.path().join("out/checkpoints"), "").unwrap();
    for (below, what) in [
        ("file/checkpoints/x", "/file is not a directory"),
        ("dangling/checkpoints/x", "/dangling is a link to /nowhere/at/all, which is not there"),
        ("out/checkpoints/x", "/out/checkpoints is not a directory"),
    ] {
        let line = RunDir::claim(&claim(&dir.path().join(below), "a")).unwrap_err().to_string();
        assert!(line.contains(what), "{line}");
    }
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
