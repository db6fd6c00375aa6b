//! What cannot work is refused in one line that names the thing, with its exit code, and nothing half done.

#![allow(clippy::unwrap_used)] // in a test an unwrap is an assertion

use fleet_tests::{Finished, Running, TinyJob, World, program};
use serde_json::Value;
use std::collections::BTreeSet;
use std::fs;
use std::os::unix::process::CommandExt;
use std::process::Command;

/// Launches the job with these settings over it, which must be refused with `code` and a line that has all of `texts`.
fn refused(world: &World, sets: &[&str], code: i32, texts: &[&str]) {
    let job = world.job(&TinyJob::default()).display().to_string();
    let sets: Vec<&str> = sets.iter().flat_map(|set| ["--set", set]).collect();
    let done = world.run("fleet", &[&["launch", "-n", "1", &job], sets.as_slice()].concat());
    is_refused(done, code, texts);
    assert!(!world.path("out/checkpoints").exists(), "something was begun");
    world.is_empty_soon();
}

fn is_refused(done: Finished, code: i32, texts: &[&str]) {
    let done = done.expect(code);
    let line = done.says("error: ");
    for text in texts {
        assert!(line.contains(text), "`{text}` is missing: {}", done.all());
    }
    assert_eq!(done.stderr.matches("error: ").count(), 1, "one line: {}", done.all());
}

#[test]
fn settings_that_are_wrong_or_contradict_each_other() {
    let world = World::new();
    refused(&world, &["batch_sise=4"], 2, &["unknown key `batch_sise`", "did you mean `batch_size`?"]);
    refused(&world, &["max_steps=many"], 2, &["`max_steps`", "whole number"]);
    refused(&world, &["model.hidden_size=66"], 2, &["hidden_size (66) is not a multiple", "64 or 72"]);
    let twice = TinyJob { more: "per_device_train_batch_size = 8", ..TinyJob::default() };
    let file = world.write("twice.toml", twice.toml()).display().to_string();
    let done = world.run("fleet", &["launch", &file]);
    is_refused(
        done,
        2,
        &["`per_device_train_batch_size` is 8", "`batch_size`", "another name of it", "keep one"],
    );
    let file = world.write("broken.toml", "max_steps = = 3\n").display().to_string();
    is_refused(world.run("fleet", &["launch", &file]), 2, &["broken.toml:1", "not valid TOML"]);
    is_refused(world.run("fleet", &["launch", "absent.toml"]), 2, &["absent.toml"]);
    // A summary ends the output also then.
    let done = world.run("fleet", &["launch", "--json", &file]).expect(2);
    assert_eq!(done.summary()["status"], "failed");
    assert_eq!(done.summary()["error"]["exit_code"], 2);
}

#[test]
fn a_value_may_begin_with_a_hyphen_for_the_program_behind_fleet_generate_too() {
    let world = World::new();
    let generate = ["generate", "--model", "none", "--prompt", "- item"];
    for (option, value) in [("--temperature", "-1"), ("--top-p", "-0.5")] {
        let done = world.run("fleet-rank", &[&generate[..], &[option, value]].concat());
        is_refused(done, 2, &[&format!("{option} is {value}")]);
    }
}

#[test]
fn data_that_cannot_be_read() {
    let world = World::new();
    refused(&world, &["data.path=nowhere.txt"], 2, &["nowhere.txt does not exist"]);
    world.write("empty.txt", "");
    refused(&world, &["data.path=empty.txt"], 2, &["empty.txt"]);
    world.write("latin1.txt", b"caf\xe9 au lait");
    refused(&world, &["data.path=latin1.txt"], 2, &["latin1.txt is not UTF-8", "offset 3"]);
    world.write("open.csv", "id,text\n1,a\n2,\"never closed\n3,c\n");
    refused(&world, &["data.path=open.csv"], 2, &["open.csv, line 3", "a quote is opened and never closed"]);
    fs::create_dir(world.path("folder")).unwrap();
    world.write("folder/a.txt", "good text");
    world.write("folder/b.txt", "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n");
    refused(&world, &["data.path=folder"], 2, &["folder/b.txt is a Git LFS pointer", "`git lfs pull`"]);
    let tokenizer = r#"{"version": "1.0", "added_tokens": [], "decoder": {"type": "Fuse"},
        "model": {"type": "BPE", "merges": [], "vocab": {"a": 0, "n": 1, " ": 2, "</s>": 3}}}"#;
    world.write("few.json", tokenizer);
    let few = ["tokenizer.path=few.json"];
    refused(&world, &few, 2, &["the tokenizer drops", "of the data (such as `", "tokenizer.path"]);
}

#[test]
fn every_kind_of_data_in_a_folder_is_read_or_named() {
    let world = World::new();
    let texts: Vec<String> =
        fs::read_to_string(world.path("corpus.jsonl")).unwrap().lines().map(str::to_owned).collect();
    fs::create_dir(world.path("folder")).unwrap();
    world.write("folder/array.json", format!("[{}]", texts[..30].join(",\n")));
    world.write("folder/Q.TSV", "id\ttext\n1\t\"Stop, he cried\n2\t5\" pipe\n");
    world.write("folder/notes.rst", "not asked for");
    std::os::unix::fs::symlink("../corpus.jsonl", world.path("folder/linked.jsonl")).unwrap();
    for run_name in ["built", "cached"] {
        let job = world.job(&TinyJob { run_name, max_steps: 1, ..TinyJob::default() }).display().to_string();
        let args = ["launch", "-n", "1", &job, "--set", "data.path=folder"];
        let told = world.run("fleet", &args).expect(0).all();
        assert!(told.contains("left out: 1 that data.include does not name (notes.rst)"), "{told}");
        assert!(told.contains("read 92 rows of 3 files"), "{told}");
        assert_eq!(told.contains("from the cache"), run_name == "cached", "{told}");
    }
}

#[test]
fn data_that_is_too_little_for_the_job() {
    let world = World::new();
    refused(&world, &["model.vocab_size=30000"], 2, &["30000", "vocab"]);
    refused(&world, &["max_seq_len=200000"], 2, &["max_seq_len", "200000"]);
}

#[test]
fn checkpoints_that_are_missing_foreign_damaged_or_of_another_shape() {
    let world = World::new();
    let good = TinyJob { run_name: "good", max_steps: 2, ..TinyJob::default() };
    let done = world.launch(1, &good, &[]).finish().expect(0);
    let checkpoint = done.summary()["checkpoint"].as_str().unwrap().to_owned();
    let job = world.job(&TinyJob::default()).display().to_string();
    let resume = |from: &str, more: &[&str]| {
        let from = format!("resume_from_checkpoint={from}");
        world.run("fleet", &[&["launch", "-n", "1", &job, "--set", &from], more].concat())
    };
    is_refused(resume("out/absent", &[]), 2, &["no checkpoint at", "out/absent"]);
    is_refused(resume("home", &[]), 2, &["home is not a fleet checkpoint"]);
    is_refused(resume(&checkpoint, &["--set", "model.hidden_size=32"]), 2, &["does not fit this job"]);
    let weights = format!("{checkpoint}/model.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&weights, bytes).unwrap();
    is_refused(resume(&checkpoint, &[]), 2, &["damaged", "model.safetensors"]);
    assert!(!world.path("out/checkpoints/tiny").exists(), "something was begun");
}

#[test]
fn a_value_that_begins_with_a_hyphen_is_a_value() {
    let world = World::new();
    let job = TinyJob { run_name: "good", max_steps: 2, ..TinyJob::default() };
    let done = world.launch(1, &job, &[]).finish().expect(0);
    let model = done.summary()["checkpoint"].as_str().unwrap().to_owned();
    for prompt in ["- a list item", "-1", "--help", "--- a/file.txt"] {
        let ask = ["generate", "--model", &model, "--prompt", prompt, "--max-new-tokens", "2", "--json"];
        for program in ["fleet", "fleet-rank"] {
            assert!(world.run(program, &ask).expect(0).stdout.concat().contains("prompt_tokens"), "{prompt}");
        }
    }
    let wrong = ["generate", "--model", &model, "--prompt", "x", "--temperature", "-1"];
    is_refused(world.run("fleet", &wrong), 2, &["--temperature is -1; give 0 or a positive number"]);
    for command in ["launch", "submit", "config"] {
        let done = world.run("fleet", &[command, "job.toml", "--sett", "seed=1"]).expect(2);
        assert!(done.stderr.contains("a similar argument exists: '--set'"), "{}", done.all());
    }
    let done = world.run("coordinator", &["start", "--data-dir", "--expect-existing"]).expect(2);
    assert!(
        done.stderr.contains("'--data-dir <DIR>'") && done.stderr.contains("`./--expect-existing`"),
        "{}",
        done.all()
    );
}

#[test]
fn a_machine_without_libtorch() {
    let world = World::new();
    let rank = program("fleet-rank");
    let libraries = Command::new("ldd").arg(&rank).output().unwrap();
    let libraries = String::from_utf8_lossy(&libraries.stdout).into_owned();
    let torch =
        libraries.lines().find_map(|line| line.trim().strip_prefix("libtorch_cpu.so => ")?.split(' ').next());
    let folder =
        std::path::Path::new(torch.unwrap_or_else(|| panic!("no libtorch: {libraries}"))).parent().unwrap();
    let job = world.job(&TinyJob::default()).display().to_string();
    let (fleet, script) = (program("fleet").display().to_string(), "exec \"$@\"");
    let Some(mut command) = world.on_a_disk_of("1M", folder, script, &[&fleet, "launch", "-n", "2", &job])
    else {
        return;
    };
    command.process_group(0);
    let done = Running::start(command).finish();
    is_refused(done, 4, &["libtorch"]);
    world.is_empty_soon();
}

/// Launches the job with its output on a disk of `size` on which a file of `filler` lies. `None` where that is not allowed.
fn launch_on_a_disk(world: &World, size: &str, filler: &str, job: &TinyJob) -> Option<Running> {
    let out = world.path("out");
    fs::create_dir(&out).unwrap();
    let (file, fleet) = (world.job(job).display().to_string(), program("fleet").display().to_string());
    // The namespace ends with its last process, so what is on the disk is told before.
    let script = format!(
        "head -c {filler} /dev/zero > out/filler; \"$@\"; code=$?; find out/checkpoints -type f -printf 'left %P\\n' >&2; exit $code"
    );
    let args = [&fleet, "launch", "-n", "1", "--json", &file];
    world.on_a_disk_of(size, &out, &script, &args).map(Running::start)
}

/// Saved checkpoints as paths, failed ones as errors; of the failed nothing may be left.
fn saved_and_failed(done: &Finished) -> (Vec<String>, Vec<String>) {
    let (failed, saved): (Vec<_>, Vec<_>) =
        done.events("checkpoint").into_iter().partition(|event| event["path"].is_null());
    let text = |event: &Value, key: &str| event[key].as_str().unwrap_or_else(|| panic!("{event}")).to_owned();
    let saved: Vec<String> = saved.iter().map(|event| text(event, "path")).collect();
    let left: BTreeSet<&str> =
        done.stderr.lines().filter_map(|line| line.strip_prefix("left tiny/")?.split('/').next()).collect();
    let names: BTreeSet<&str> = saved.iter().filter_map(|path| path.rsplit('/').next()).collect();
    assert_eq!(left, names, "{}", done.all());
    (saved, failed.iter().map(|event| text(event, "error")).collect())
}

#[test]
fn a_disk_that_is_full_for_a_while_costs_a_checkpoint_and_not_the_job() {
    let world = World::new();
    let job = TinyJob { max_steps: 400, save_steps: 100, ..TinyJob::default() };
    let Some(mut launch) = launch_on_a_disk(&world, "8M", "6M", &job) else { return };
    launch.until("failed checkpoint", |line| line["event"] == "checkpoint" && line["path"].is_null());
    // The disk is seen through the process that mounted it.
    fs::remove_file(format!("/proc/{}/root{}", launch.pid(), world.path("out/filler").display())).unwrap();
    let done = launch.finish().expect(0);
    assert_eq!(done.losses().len(), 400);
    let (saved, failed) = saved_and_failed(&done);
    assert!(failed[0].contains("step 200") && failed[0].contains("No space left on device"), "{failed:?}");
    assert!(
        saved[0].ends_with("step-00000100") && saved.last().unwrap().ends_with("step-00000400"),
        "{saved:?}"
    );
    world.is_empty_soon();
}

#[test]
fn on_a_full_disk_the_oldest_checkpoints_make_room_for_the_next() {
    let world = World::new();
    let job = TinyJob { max_steps: 80, save_steps: 20, ..TinyJob::default() };
    // There is room for two checkpoints and not for three, and `save_total_limit` is 9.
    let Some(launch) = launch_on_a_disk(&world, "8M", "5M", &job) else { return };
    let done = launch.finish().expect(0);
    let events = done.events("checkpoint");
    assert!(events.len() == 4 && events.iter().all(|event| event["path"].is_string()), "{}", done.all());
    assert!(done.all().contains("the disk is full: removed "), "{}", done.all());
    let left: BTreeSet<&str> =
        done.stderr.lines().filter_map(|line| line.strip_prefix("left tiny/")?.split('/').next()).collect();
    assert_eq!(left, ["step-00000060", "step-00000080"].into(), "{}", done.all());
    world.is_empty_soon();
}

#[test]
fn a_disk_that_is_full_at_the_end_is_a_failure_that_names_it_and_keeps_the_last_checkpoint() {
    let world = World::new();
    let job = TinyJob { max_steps: 60, save_steps: 20, ..TinyJob::default() };
    let Some(launch) = launch_on_a_disk(&world, "8M", "6M", &job) else { return };
    let done = launch.finish().expect(4);
    let (saved, failed) = saved_and_failed(&done);
    assert_eq!((saved.len(), failed.len()), (1, 2), "{}", done.all());
    let summary = done.summary();
    assert_eq!(
        (&summary["checkpoint"], &summary["steps"]),
        (&saved[0].as_str().into(), &60.into()),
        "{summary}"
    );
    let message = summary["error"]["message"].as_str().unwrap_or_default();
    for said in
        ["step 60", "No space left on device", "make room: a checkpoint takes ", " bytes, and ", " are free"]
    {
        assert!(message.contains(said), "{message}");
    }
    world.is_empty_soon();
}
