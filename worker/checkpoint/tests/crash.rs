//! A process with three writers is killed at every call that changes a file or a directory, one after the other: the checkpoint of before
//! stays, the new one is there whole or not at all, also on each of two disks. At the first rename everything has been synced, so a power cut finds
//! no more and no less.

#![cfg(all(target_os = "linux", target_arch = "x86_64"))] // calls are told apart by their numbers
#![allow(clippy::unwrap_used)] // helpers of tests panic as tests do

use fleet_checkpoint::{
    CheckpointError, Claim, Disks, Dtype, PartWriter, RunDir, TensorRef, Writer, inspect, latest,
    manifest_sha256, model_file, optimizer_file, step_dir, verify,
};
use nix::libc;
use nix::sys::ptrace::{self, Options};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const WORLD: usize = 3;

fn write_part(part: &mut PartWriter, rank: usize, step: u64) {
    let (name, data) = (format!("w{rank}"), vec![step as u8; 64]);
    let whole = TensorRef { name: &name, dtype: Dtype::U8, shape: &[64], first: 0, data: &data };
    part.write_safetensors(&model_file(rank, WORLD), &[whole]).unwrap();
    let kept = TensorRef { name: "m", shape: &[64 * WORLD], first: 64 * rank, ..whole };
    part.write_safetensors(&optimizer_file(rank, WORLD), &[kept]).unwrap();
}

fn save(dir: &Path, step: u64) {
    let run =
        RunDir::claim(&Claim { dir, run: "r", resumed: None, overwrite: false, until: None, reads: &[] })
            .unwrap();
    let mut writer = Writer::begin(&run, step).unwrap().of("ddp", WORLD as u32);
    let ticket = writer.ticket();
    std::thread::scope(|scope| {
        for rank in 1..WORLD {
            scope.spawn(move || {
                let mut part = PartWriter::join(dir, step, ticket, rank as u32);
                write_part(&mut part, rank, step);
                part.hand_in().unwrap();
            });
        }
        write_part(writer.part(), 0, step);
        writer.finish_together(1.0, &|| true).unwrap();
    });
}

/// Not a test: is killed on its way.
#[test]
#[ignore = "run by another test, with FLEET_TEST_DIR"]
fn child_saves() {
    if let Some(dir) = std::env::var_os("FLEET_TEST_DIR") {
        save(Path::new(&dir), 2);
    }
}

/// Disks of two hosts, of which the second has one rank.
fn disks(dir: &Path) -> [PathBuf; 2] {
    [dir.join("disk-0"), dir.join("disk-1")]
}

fn save_apart(dir: &Path, step: u64) {
    let names = vec!["a".to_owned(), "b".to_owned()];
    let apart = Disks::new(vec![0, 0, 1], &[0, 1], names);
    let places = disks(dir);
    let claim = |dir: &PathBuf| {
        RunDir::claim(&Claim { dir, run: "r", resumed: None, overwrite: true, until: None, reads: &[] })
            .unwrap()
    };
    let runs = places.each_ref().map(claim);
    let begin = |disk: usize| {
        let writer = Writer::begin(&runs[disk], step).unwrap().of("fsdp", WORLD as u32);
        writer.among(apart.clone(), disk)
    };
    let mut writers = [begin(0), begin(1)];
    let mut other = PartWriter::join(&places[0], step, writers[0].ticket(), 1);
    write_part(&mut other, 1, step);
    other.hand_in().unwrap();
    for (writer, rank) in writers.iter_mut().zip([0, 2]) {
        write_part(writer.part(), rank, step);
        writer.collect(&|| false).unwrap();
    }
    let handed = writers.each_ref().map(Writer::handed);
    let serial = writers.iter().map(|writer| writer.ticket().serial).max().unwrap();
    for (disk, writer) in writers.iter_mut().enumerate() {
        writer.numbered(serial);
        writer.take_in(1 - disk, &handed[1 - disk]).unwrap();
        writer.prepare(1.0).unwrap();
    }
    writers.into_iter().for_each(|writer| drop(writer.publish().unwrap()));
}

/// Not a test: is killed on its way.
#[test]
#[ignore = "run by another test, with FLEET_TEST_DIR"]
fn child_saves_apart() {
    if let Some(dir) = std::env::var_os("FLEET_TEST_DIR") {
        save_apart(Path::new(&dir), 2);
    }
}

/// What a process does with files, as it is about to do it.
#[derive(Debug)]
enum Call {
    Write(PathBuf),
    Sync(PathBuf),
    Other,
    Rename,
}

impl Call {
    fn of(thread: Pid) -> Option<Call> {
        let registers = ptrace::getregs(thread).ok()?;
        let path = || fs::read_link(format!("/proc/{thread}/fd/{}", registers.rdi)).unwrap_or_default();
        match registers.orig_rax as libc::c_long {
            libc::SYS_write | libc::SYS_pwrite64 => Some(Call::Write(path())),
            libc::SYS_fsync | libc::SYS_fdatasync => Some(Call::Sync(path())),
            libc::SYS_rename | libc::SYS_renameat | libc::SYS_renameat2 => Some(Call::Rename),
            libc::SYS_mkdir | libc::SYS_mkdirat | libc::SYS_unlink | libc::SYS_unlinkat | libc::SYS_rmdir => {
                Some(Call::Other)
            }
            libc::SYS_openat if registers.rdx & libc::O_CREAT as u64 != 0 => Some(Call::Other),
            _ => None,
        }
    }
}

/// Lets a child save below `dir`, in `places`, and kills it at its call number `at`, from 1. Whether it came to its end before that; `None` where
/// nobody may look at the calls of a process.
#[allow(clippy::zombie_processes, reason = "it is waited for by its number")]
fn killed_at(child: &str, dir: &Path, places: &[&Path], at: usize) -> Option<bool> {
    let script = r#"kill -STOP $$; exec "$0" --exact "$1" --ignored"#;
    let mut command = Command::new("sh");
    command.args(["-c", script]).arg(std::env::current_exe().unwrap()).arg(child);
    let mut child = command.env("FLEET_TEST_DIR", dir).stdout(std::process::Stdio::null()).spawn().unwrap();
    let pid = Pid::from_raw(child.id() as i32);
    waitpid(pid, Some(WaitPidFlag::WUNTRACED)).unwrap();
    if ptrace::attach(pid).is_err() {
        child.kill().unwrap();
        child.wait().unwrap();
        return None;
    }
    waitpid(pid, Some(WaitPidFlag::__WALL)).unwrap();
    let options = Options::PTRACE_O_TRACESYSGOOD | Options::PTRACE_O_TRACECLONE | Options::PTRACE_O_EXITKILL;
    ptrace::setoptions(pid, options).unwrap();
    kill(pid, Signal::SIGCONT).unwrap();
    ptrace::syscall(pid, None).unwrap();
    let (mut calls, mut within, mut unsynced, mut synced) =
        (0, BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
    // Another test has children of its own in this process.
    let mine = WaitPidFlag::__WALL | WaitPidFlag::__WNOTHREAD;
    loop {
        match waitpid(None, Some(mine)).unwrap() {
            WaitStatus::PtraceSyscall(thread) => {
                // Every second stop is the call's end.
                if !within.remove(&thread) {
                    within.insert(thread);
                    if let Some(call) = Call::of(thread) {
                        calls += 1;
                        match &call {
                            Call::Write(path) => drop(unsynced.insert(path.clone())),
                            Call::Sync(path) => {
                                unsynced.remove(path);
                                synced.insert(path.clone());
                            }
                            Call::Rename if !places.iter().any(|place| has_handed_in_all(place)) => {}
                            Call::Rename => {
                                let lost: Vec<_> =
                                    unsynced.iter().filter(|path| is_of_checkpoint(path)).collect();
                                assert!(lost.is_empty(), "not synced before the rename: {lost:?}");
                                let directory =
                                    synced.iter().filter(|path| path.is_dir() && is_of_checkpoint(path));
                                // Nowhere is one renamed before all are as far.
                                let waiting = places.iter().filter(|place| has_handed_in_all(place)).count();
                                assert_eq!(directory.count(), waiting, "synced: {synced:?}");
                                let renamed = places.iter().filter(|place| step_dir(place, 2).exists());
                                assert_eq!(waiting + renamed.count(), places.len());
                            }
                            Call::Other => {}
                        }
                        if calls == at {
                            kill(pid, Signal::SIGKILL).unwrap();
                        }
                    }
                }
                let _ = ptrace::syscall(thread, None); // it may have been killed
            }
            WaitStatus::Exited(ended, code) if ended == pid => {
                assert_eq!(code, 0);
                return Some(true);
            }
            WaitStatus::Signaled(ended, signal, _) if ended == pid => {
                assert_eq!(signal, Signal::SIGKILL);
                return Some(false);
            }
            WaitStatus::Stopped(thread, signal) => {
                let passed =
                    Some(signal).filter(|signal| !matches!(signal, Signal::SIGSTOP | Signal::SIGTRAP));
                let _ = ptrace::syscall(thread, passed);
            }
            WaitStatus::PtraceEvent(thread, ..) => drop(ptrace::syscall(thread, None)),
            _ => {}
        }
    }
}

/// The manifest is there, so the rename that comes is that of the directory.
fn has_handed_in_all(dir: &Path) -> bool {
    let entries = fs::read_dir(dir).unwrap().flatten();
    entries
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(".tmp-step"))
        .any(|entry| entry.path().join("manifest.json").exists())
}

fn is_of_checkpoint(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.to_string_lossy().contains(".tmp-step") && !name.starts_with(".part-")
}

const SKIPPED: &str = "skipped: this machine does not let a process look at another one's calls";

#[test]
fn a_kill_at_any_call_leaves_the_checkpoint_of_before_and_the_new_one_whole_or_not_at_all() {
    let dir = tempfile::tempdir().unwrap();
    save(dir.path(), 1);
    let (mut before, mut after) = (0, 0);
    for at in 1.. {
        match killed_at("child_saves", dir.path(), &[dir.path()], at) {
            None => return println!("{SKIPPED}"),
            Some(true) => break,
            Some(false) => {}
        }
        verify(&step_dir(dir.path(), 1)).unwrap();
        let found = latest(dir.path()).unwrap();
        assert_eq!(found.passed_over.len(), 0, "call {at}: {:?}", found.passed_over);
        match found.newest.unwrap().1.step {
            1 => before += 1,
            _ => after += 1,
        }
        if at % 10 == 0 {
            save(dir.path(), 2);
            verify(&step_dir(dir.path(), 2)).unwrap();
            let names = fs::read_dir(dir.path())
                .unwrap()
                .map(|entry| entry.unwrap().file_name().into_string().unwrap());
            assert_eq!(names.filter(|name| name.starts_with(".tmp-")).count(), 0, "what was left is removed");
        }
        let _ = fs::remove_dir_all(step_dir(dir.path(), 2)); // where it had come so far
    }
    assert!(before > 30 && after > 0, "{before} calls before the rename and {after} after it");
}

/// Whether all that one disk has of a checkpoint is there and as it was written.
fn is_whole_part(dir: &Path) -> bool {
    let (_, wrong) = inspect(dir).unwrap();
    matches!(&wrong[..], [CheckpointError::Partial { .. }])
}

fn temporaries(place: &Path) -> usize {
    let names = fs::read_dir(place).unwrap().map(|entry| entry.unwrap().file_name());
    names.filter(|name| name.to_string_lossy().starts_with(".tmp-")).count()
}

#[test]
fn of_two_disks_each_has_its_part_of_the_one_before_and_of_the_new_one_all_or_nothing() {
    let dir = tempfile::tempdir().unwrap();
    save_apart(dir.path(), 1);
    let places = disks(dir.path());
    let [a, b] = places.each_ref().map(PathBuf::as_path);
    let mut seen = [0, 0, 0];
    for at in 1.. {
        match killed_at("child_saves_apart", dir.path(), &[a, b], at) {
            None => return println!("{SKIPPED}"),
            Some(true) => break,
            Some(false) => {}
        }
        assert!([a, b].iter().all(|place| is_whole_part(&step_dir(place, 1))), "call {at}");
        let new: Vec<PathBuf> =
            [a, b].iter().map(|place| step_dir(place, 2)).filter(|dir| dir.exists()).collect();
        assert!(new.iter().all(|dir| is_whole_part(dir)), "call {at}: {new:?}");
        seen[new.len()] += 1;
        if at % 10 == 0 || new.len() == 1 {
            save_apart(dir.path(), 2);
            let manifests = [a, b].map(|place| manifest_sha256(&step_dir(place, 2)).unwrap());
            assert_eq!(manifests[0], manifests[1], "the next save puts right what was half there");
            assert_eq!((temporaries(a), temporaries(b)), (0, 0), "what was left is removed");
        }
        let _ = [a, b].map(|place| fs::remove_dir_all(step_dir(place, 2))); // where it had come so far
    }
    assert!(seen[0] > 30 && seen[1] > 0, "calls before, between and after the renames: {seen:?}");
}
