//! A run's directory from the outside: nobody's finished model is removed, and nobody trains for nothing.

#![allow(clippy::unwrap_used)] // in a test an unwrap is an assertion

use fleet_tests::{Finished, TinyJob, World};
use nix::sys::signal::Signal;
use std::collections::BTreeSet;
use std::fs;

fn steps(world: &World, run: &str) -> BTreeSet<String> {
    let entries = fs::read_dir(world.path("out/checkpoints").join(run)).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.starts_with("step-")).collect()
}

/// Why the job failed, in one line. Nothing was trained.
fn refusal(done: &Finished) -> String {
    assert!(done.losses().is_empty(), "{}", done.all());
    done.summary()["error"]["message"]
        .as_str()
        .unwrap_or_else(|| panic!("no error: {}", done.all()))
        .to_owned()
}

fn set_of(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

#[test]
fn a_second_run_beside_a_finished_model_is_refused_and_told_its_choices() {
    let world = World::new();
    let job = TinyJob { max_steps: 6, save_steps: 3, ..TinyJob::default() };
    let launch = |more: &[&str]| world.launch(1, &job, more).finish();
    launch(&[]).expect(0);
    assert_eq!(steps(&world, "tiny"), set_of(&["step-00000003", "step-00000006"]));

    let refused = launch(&["--set", "seed=8"]).expect(2);
    for choice in ["resume_from_checkpoint", "run_name", "overwrite = true"] {
        assert!(refusal(&refused).contains(choice), "{}", refused.all());
    }
    assert_eq!(steps(&world, "tiny"), set_of(&["step-00000003", "step-00000006"]));

    let longer = launch(&["--set", "resume_from_checkpoint=latest", "--set", "max_steps=9"]).expect(0);
    assert_eq!(longer.losses().first().unwrap().0, 7);
    launch(&["--set", "run_name=other"]).expect(0);
    assert_eq!(steps(&world, "tiny"), set_of(&["step-00000003", "step-00000006", "step-00000009"]));

    launch(&["--set", "seed=8", "--set", "overwrite=true", "--set", "save_steps=4"]).expect(0);
    assert_eq!(steps(&world, "tiny"), set_of(&["step-00000004", "step-00000006"]));
}

#[test]
fn of_two_runs_at_once_in_one_directory_the_second_is_refused() {
    let world = World::new();
    let job = TinyJob { max_steps: 100_000, save_steps: 20, ..TinyJob::default() };
    let mut first = world.launch(1, &job, &[]);
    first.until("a step", |line| line["event"] == "step");
    let second = world.launch(1, &job, &["--set", "seed=8", "--set", "max_steps=20"]).finish().expect(2);
    assert!(refusal(&second).contains("another job is writing its checkpoints"), "{}", second.all());
    first.signal(Signal::SIGINT);
    let first = first.finish();
    let last = first.events("checkpoint").last().unwrap()["path"].as_str().unwrap().to_owned();
    assert!(fs::metadata(&last).unwrap().is_dir(), "{}", first.all());
}

#[test]
fn a_model_that_a_run_starts_from_is_not_overwritten() {
    let world = World::new();
    let job = TinyJob { max_steps: 2, ..TinyJob::default() };
    world.launch(1, &job, &[]).finish().expect(0);
    let text = job.toml();
    let (before, _) = text.split_once("[model]").unwrap();
    let (_, after) = text.split_once("[data]").unwrap();
    let model = "out/checkpoints/tiny/step-00000002";
    let file = world.write("tune.toml", format!("{before}[model]\npath = \"{model}\"\n[data]{after}"));
    let (file, set) = (file.display().to_string(), ["--set", "overwrite=true"]);
    let launch = ["launch", "-n", "1", "--json", &file];
    let refused = world.run("fleet", &[&launch[..], &set].concat()).expect(2);
    assert!(
        refusal(&refused).contains(&format!("{model}, which overwrite = true would remove")),
        "{}",
        refused.all()
    );
    assert_eq!(steps(&world, "tiny"), set_of(&["step-00000002"]));
    world.run("fleet", &[&launch[..], &["--set", "run_name=tuned"]].concat()).expect(0);

    // Once it has a checkpoint of its own it needs no other.
    fs::remove_dir_all(world.path("out/checkpoints/tiny")).unwrap();
    let more = ["--set", "run_name=tuned", "--set", "resume_from_checkpoint=latest", "--set", "max_steps=4"];
    let done = world.run("fleet", &[&launch[..], &more].concat()).expect(0);
    assert_eq!(done.losses().first().unwrap().0, 3);
    assert!(done.all().contains("model.path") && done.all().contains("is gone"), "{}", done.all());
}

#[test]
fn where_checkpoints_cannot_be_written_nothing_is_trained() {
    let world = World::new();
    world.write("file", "");
    let refused =
        world.launch(1, &TinyJob::default(), &["--set", "output_dir=file/below"]).finish().expect(4);
    let line = refusal(&refused);
    assert!(
        line.contains("checkpoints cannot be written to") && line.contains("file is not a directory"),
        "{line}"
    );
}

#[test]
fn job_files_with_names_of_any_script_are_runs_of_their_own() {
    let world = World::new();
    let text = TinyJob { max_steps: 1, ..TinyJob::default() }.toml().replace("run_name = \"tiny\"\n", "");
    for name in ["训练一", "训练二"] {
        let file = world.write(&format!("{name}.toml"), &text).display().to_string();
        world.run("fleet", &["launch", "-n", "1", "--json", &file]).expect(0);
        assert_eq!(steps(&world, name), set_of(&["step-00000001"]));
    }
}
