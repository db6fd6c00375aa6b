//! A small model, and jobs that go on from it.

use crate::{Finished, Running, TinyJob, World};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

const WORDS: [&str; 7] = ["harbour", "winter", "lantern", "river", "stone", "morning", "letters"];

/// The checkpoint that the summary names.
pub fn checkpoint(done: &Finished) -> PathBuf {
    PathBuf::from(done.summary()["checkpoint"].as_str().unwrap_or_else(|| panic!("none: {}", done.all())))
}

/// A world in which a small model has been trained, and the model.
pub fn with_a_base() -> (World, PathBuf) {
    let world = World::new();
    let base = TinyJob { run_name: "base", ..TinyJob::default() };
    let base = checkpoint(&world.launch(2, &base, &[]).finish().expect(0));
    (world, base)
}

/// A job file that trains an adapter beside `base`.
pub fn job(world: &World, base: &Path, run_name: &str) -> String {
    let text = TinyJob { run_name: "adapter", max_steps: 30, save_steps: 10, ..TinyJob::default() }.toml();
    let (before, rest) = text.split_once("[model]").expect("a table of a job");
    let (_, after) = rest.split_once("[data]").expect("a table of a job");
    let text = format!("{before}[model]\npath = {base:?}\n\n[data]{after}");
    let text = text.replace("run_name = \"adapter\"", &format!("run_name = {run_name:?}"));
    world.write(&format!("{run_name}.toml"), text).display().to_string()
}

/// Each with `--set` before it.
pub fn sets<'a>(all: &[&[&'a str]]) -> Vec<&'a str> {
    all.concat().into_iter().flat_map(|set| ["--set", set]).collect()
}

/// `fleet launch -n RANKS --json FILE` with these settings over it.
pub fn launch(world: &World, ranks: &str, file: &str, more: &[&[&str]]) -> Running {
    world.start("fleet", &[&["launch", "-n", ranks, "--json", file], &sets(more)[..]].concat())
}

/// Runs that are struck until one has steps left.
const ATTEMPTS: usize = 5;
/// So that the first one has many steps left.
const OFTEN: &str = "save_steps=1";

/// What a job came to in one piece, and once more, killed behind a checkpoint and resumed: the same losses. `launch` takes the run's name and
/// settings.
pub fn whole_and_resumed(world: &World, launch: impl Fn(&str, &[&str]) -> Running) -> [Finished; 2] {
    let whole = launch("whole", &[]).finish().expect(0);
    let attempt = |number: usize| {
        let name = format!("killed-{number}");
        let mut killed = launch(&name, &[OFTEN]);
        killed.until("checkpoint", |line| line["event"] == "checkpoint" && line["path"].is_string());
        world.strike_all();
        let is_struck = killed.finish().code() == 128 + 9;
        world.is_empty_soon();
        is_struck.then(|| launch(&name, &[OFTEN, "resume_from_checkpoint=latest"]).finish().expect(0))
    };
    // A run may have taken its last step before it is struck.
    let resumed = (0..ATTEMPTS).filter_map(attempt).find(|resumed| !resumed.losses().is_empty());
    let resumed = resumed.expect("nothing was ever left to do");
    let (losses, all) = (resumed.losses(), whole.losses());
    let first = losses[0].0;
    assert!(first > 1, "it began anew: {}", resumed.all());
    assert_eq!(losses, all[first as usize - 1..], "{}", resumed.what);
    [whole, resumed]
}

/// The same losses, but for what the order of sums makes of them: relative to them, or to 0.1.
pub fn are_close(one: &[(u64, f64)], other: &[(u64, f64)], bound: f64, what: &str) {
    assert_eq!(one.len(), other.len(), "{what}");
    for (a, b) in one.iter().zip(other) {
        assert!((a.1 - b.1).abs() <= bound * a.1.max(0.1), "{what}, step {}: {} and {}", a.0, a.1, b.1);
    }
}

/// Rows of instructions whose answers follow a rule, as one array of JSON.
pub fn instructions(count: usize) -> String {
    array(
        count,
        |one, two| json!({"instruction": format!("Write the {one} and the {two}."), "input": "", "output": format!("{two} {two}")}),
    )
}

/// Pairs of which a rule says the better answer, as one array of JSON.
pub fn pairs(count: usize) -> String {
    array(
        count,
        |one, two| json!({"prompt": format!("{one} {two}:"), "chosen": format!(" {one} {one}"), "rejected": format!(" the of {two}")}),
    )
}

fn array(count: usize, row: impl Fn(&str, &str) -> Value) -> String {
    Value::Array((0..count).map(|n| row(WORDS[n % 7], WORDS[n / 7 % 7])).collect()).to_string()
}
