//! Runs what a document shows: jobs behind `<!-- job: ROWS -->`, on rows of that kind, and commands behind `<!-- commands -->`.
//!
//! They run as they stand there, in a world that has what they name: a model under `DIR` and `BASE`, the data of each job under its paths, and
//! the last adapter that a job trained under `ADAPTER`, `A` and `B`.

use crate::fine_tuning::checkpoint;
use crate::{Running, World, corpus, program};
use fleet_common::job;
use serde_json::{Value, json};
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

/// How many steps a job takes, which says itself that it takes more, and what suits the small model.
const SETS: [&str; 4] = ["max_steps=2", "max_seq_len=96", "device=cpu", "threads_per_rank=1"];

/// Runs the document's jobs, and then its commands. Returns how many jobs and lines of commands there were.
pub fn run(document: &str) -> (usize, usize) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace is above");
    let text = fs::read_to_string(root.join(document)).expect("the document is there");
    let world = World::new();
    for name in ["DIR", "BASE"] {
        link(&world, name, &root.join("tests/parity/golden/foreign/byte_level"));
    }
    world.write("held_out.txt", "The river is wide. ".repeat(20));
    world.write("ids.json", "[[1, 2, 3]]");
    world.write("asked.jsonl", "\"One river\"\n{\"prompt\": \"Two rivers\"}\n");
    let jobs = jobs(&text);
    for (number, (rows, text)) in jobs.iter().enumerate() {
        let what = format!("{document}, job {}", number + 1);
        let (job, _) =
            job::parse_toml(text, &world.path("")).unwrap_or_else(|error| panic!("{what}: {error}"));
        job.data.paths.iter().for_each(|path| write_rows(path, rows));
        let file = world.write(&format!("job-{}.toml", number + 1), text).display().to_string();
        let sets = SETS.into_iter().flat_map(|set| ["--set", set]);
        let args: Vec<&str> = ["launch", "-n", "1", "--json", &file].into_iter().chain(sets).collect();
        let done = world.run("fleet", &args).expect(0);
        assert_eq!(done.losses().last().map(|(step, _)| *step), Some(2), "{what}: {}", done.all());
        if job.adapter.is_some() {
            ["ADAPTER", "A", "B"].iter().for_each(|name| link(&world, name, &checkpoint(&done)));
        }
    }
    let commands = commands(&text);
    for command in &commands {
        let done = Running::start(shell(&world, command)).finish();
        assert_eq!(done.code(), 0, "{document}: {}", done.all());
    }
    (jobs.len(), commands.len())
}

/// Rows and text of each job.
fn jobs(document: &str) -> Vec<(String, String)> {
    let of = |part: &str| {
        let (rows, rest) = part.split_once(" -->").expect("the mark has an end");
        (rows.to_owned(), block(rest, "```toml\n"))
    };
    document.split("<!-- job: ").skip(1).map(of).collect()
}

/// Each line of commands.
fn commands(document: &str) -> Vec<String> {
    let blocks = document.split("<!-- commands -->").skip(1).map(|rest| block(rest, "```\n"));
    blocks.flat_map(|block| block.lines().map(str::to_owned).collect::<Vec<_>>()).collect()
}

/// What stands in the block that follows at once.
fn block(rest: &str, begin: &str) -> String {
    let block = rest
        .trim_start()
        .strip_prefix(begin)
        .unwrap_or_else(|| panic!("no {begin} behind a mark: {rest:.80}"));
    block.split_once("```").expect("a block has an end").0.to_owned()
}

/// In place of one that is there.
fn link(world: &World, name: &str, target: &Path) {
    let _ = fs::remove_file(world.path(name)); // there may be none
    symlink(target, world.path(name)).expect("the world is writable");
}

/// A line as a shell reads it, which finds the programs.
fn shell(world: &World, line: &str) -> Command {
    let fleet = program("fleet");
    let here = fleet.parent().map(Path::to_path_buf).unwrap_or_default();
    let others = std::env::var_os("PATH").unwrap_or_default();
    let path = std::env::join_paths([here].into_iter().chain(std::env::split_paths(&others)));
    let mut command = world.enter(Command::new("sh"));
    command.args(["-c", line]).env("PATH", path.expect("no folder of ours has a colon in its name"));
    command
}

/// Sixty rows in the file, or in one of the folder where the name has no extension.
fn write_rows(path: &Path, kind: &str) {
    let file = match path.extension() {
        Some(_) => path.to_owned(),
        None => {
            fs::create_dir_all(path).expect("the world is writable");
            path.join("rows.jsonl")
        }
    };
    let rows = match kind {
        "text" => corpus(60),
        "table" => {
            (0..60).fold("question,answer\n".to_owned(), |text, n| text + &format!("say {n},\"well, {n}\"\n"))
        }
        kind => (0..60).map(|n| format!("{}\n", row(kind, n))).collect(),
    };
    fs::write(file, rows).expect("the world is writable");
}

fn row(kind: &str, n: usize) -> Value {
    let (asked, answer) = (format!("say {n}"), format!("it is {n}"));
    match kind {
        "messages" => {
            json!({"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]})
        }
        "rows" => json!({"instruction": asked, "input": "", "output": answer}),
        "pairs" => json!({"prompt": asked, "chosen": answer, "rejected": "no"}),
        kind => panic!("{kind} is no kind of rows"),
    }
}
