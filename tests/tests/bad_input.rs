//! What cannot work is refused in one line that names the thing, with its exit code, and nothing half done.

use fleet_tests::{Finished, TinyJob, World, program};
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
    refused(&world, &["model.hidden_size=66"], 2, &["`model.hidden_size` (66) is not divisible", "64 or 68"]);
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
fn data_that_cannot_be_read() {
    let world = World::new();
    refused(&world, &["data.path=nowhere.txt"], 2, &["nowhere.txt does not exist"]);
    world.write("empty.txt", "");
    refused(&world, &["data.path=empty.txt"], 2, &["empty.txt"]);
    world.write("latin1.txt", b"caf\xe9 au lait");
    refused(&world, &["data.path=latin1.txt"], 2, &["latin1.txt is not UTF-8", "offset 3"]);
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
    let done = fleet_tests::Running::start(command).finish();
    is_refused(done, 4, &["libtorch"]);
    world.is_empty_soon();
}

#[test]
fn a_disk_that_is_full_while_saving_costs_the_checkpoint_and_not_the_job() {
    let world = World::new();
    let out = world.path("out");
    fs::create_dir(&out).unwrap();
    let job = TinyJob { max_steps: 80, save_steps: 20, ..TinyJob::default() };
    let file = world.job(&job).display().to_string();
    let fleet = program("fleet").display().to_string();
    // The namespace ends with its last process, so what is on the disk is told before.
    let script = "\"$@\"; code=$?; find out/checkpoints -type f -printf 'left %P %s\\n' >&2; exit $code";
    let Some(command) =
        world.on_a_disk_of("3M", &out, script, &[&fleet, "launch", "-n", "1", "--json", &file])
    else {
        return;
    };
    let done = fleet_tests::Running::start(command).finish().expect(0);
    assert_eq!(done.losses().len(), 80);
    let (failed, saved): (Vec<_>, Vec<_>) =
        done.events("checkpoint").into_iter().partition(|event| event["path"].is_null());
    assert!(
        !failed.is_empty() && !saved.is_empty(),
        "the disk is of the wrong size for this test: {}",
        done.all()
    );
    for event in &failed {
        assert!(event["error"].as_str().unwrap_or_default().contains("No space left on device"), "{event}");
    }
    let last = saved.last().unwrap()["path"].as_str().unwrap();
    assert_eq!(done.summary()["checkpoint"], last);
    let name = last.rsplit('/').next().unwrap();
    done.says(&format!("left tiny/{name}/model.safetensors"));
    let left =
        done.stderr.lines().filter(|line| line.starts_with("left ") && line.contains("model.safetensors"));
    assert_eq!(left.count(), saved.len(), "a half checkpoint was left: {}", done.all());
    world.is_empty_soon();
}
