//! Rules about the source that no compiler checks: who may link libtorch, where `unsafe` lives, who makes files,
//! and that every command that people are told to type exists.

#![allow(clippy::unwrap_used)] // in a test an unwrap is an assertion

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

fn cargo_tree(args: &[&str]) -> String {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
    let output =
        Command::new(cargo).current_dir(root()).args(["tree", "--offline"]).args(args).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Names of the workspace's packages in what `cargo tree` printed.
fn own_packages(tree: &str) -> Vec<String> {
    let own = |line: &str| {
        let name = line.trim_start_matches(|c: char| !c.is_ascii_alphanumeric()).split(' ').next()?;
        (line.contains(&format!("({}", root().display()))).then(|| name.to_owned())
    };
    let mut names: Vec<String> = tree.lines().filter_map(own).collect();
    names.sort();
    names.dedup();
    names
}

#[test]
fn only_the_rank_reaches_libtorch() {
    let tree = cargo_tree(&["--workspace", "--edges", "all", "--invert", "torch-sys"]);
    assert_eq!(own_packages(&tree), ["fleet-rank"], "{tree}");
}

#[test]
fn only_the_coordinator_reaches_rocksdb_and_the_simulator_goes_without() {
    let tree = cargo_tree(&["--workspace", "--edges", "all", "--invert", "librocksdb-sys"]);
    assert_eq!(own_packages(&tree), ["fleet-coordinator", "fleet-tests"], "{tree}");
    let tree = cargo_tree(&["--package", "fleet-tests", "--edges", "all", "--prefix", "none"]);
    let found =
        tree.lines().find(|line| ["librocksdb-sys", "torch-sys"].iter().any(|name| line.starts_with(name)));
    assert_eq!(found, None, "`cargo run -p fleet-tests --bin simulate` builds in a moment");
}

#[test]
fn there_is_one_tls_provider() {
    let tree = cargo_tree(&["--workspace", "--edges", "normal,build", "--prefix", "none"]);
    let found: Vec<&str> =
        tree.lines().filter(|line| line.starts_with("aws-lc-") || line.starts_with("openssl-sys")).collect();
    assert_eq!(found, Vec::<&str>::new());
}

/// Folders that may hold `unsafe`; ARCHITECTURE.md says which and why.
const UNSAFE_HOMES: [&str; 5] = [
    "kernels",
    "worker/collectives/src/shm",
    "worker/collectives/src/nccl",
    "worker/rank/src/shim",
    // Maps files into memory, for all readers of weights and token caches.
    "common/src/mapped.rs",
];

#[test]
fn unsafe_code_lives_only_in_its_homes() {
    let mut found = Vec::new();
    let mut files = 0;
    for folder in ["common", "coordinator", "worker", "kernels", "fleet", "tests", "bench"] {
        visit(&root().join(folder), &mut |path, text| {
            files += 1;
            let relative = path.strip_prefix(root()).unwrap();
            if !UNSAFE_HOMES.iter().any(|home| relative.starts_with(home)) {
                let lines = text.lines().enumerate().filter(|(_, line)| is_unsafe(line));
                found.extend(
                    lines.map(|(at, line)| format!("{}:{}: {}", relative.display(), at + 1, line.trim())),
                );
            }
        });
    }
    assert!(files > 50, "the source was not found");
    assert_eq!(found, Vec::<String>::new(), "unsafe code outside its homes");
}

fn is_unsafe(line: &str) -> bool {
    let code = line.split("//").next().unwrap_or_default();
    let words = ["unsafe {", "unsafe fn ", "unsafe impl ", "unsafe extern ", "allow(unsafe_code"];
    // This file names them in quotes.
    words.iter().any(|word| code.contains(word) && !code.contains(&format!("\"{word}")))
}

/// Crates whose files are fleet's own; what ranks write is the user's.
const KEEPERS: [&str; 4] = ["common/src", "coordinator/src", "fleet/src", "worker/agent/src"];
/// What makes them, and what writes to the kernel's own file systems, which have no modes of ours.
const MAKERS: [&str; 2] = ["common/src/files.rs", "worker/agent/src/cgroup.rs"];

#[test]
fn what_fleet_keeps_is_made_private_in_one_place() {
    // Each gives what it makes the mode that the umask leaves.
    let makers = [
        "File::create",
        "fs::write(",
        "OpenOptions::new(",
        "create_dir_all(",
        "fs::create_dir(",
        "DirBuilder::new(",
    ];
    let mut found = Vec::new();
    for folder in KEEPERS {
        visit(&root().join(folder), &mut |path, text| {
            let relative = path.strip_prefix(root()).unwrap().display().to_string();
            if relative.contains("tests") || MAKERS.contains(&relative.as_str()) {
                return;
            }
            let code = text.split("#[cfg(test)]").next().unwrap_or_default();
            let lines = code.lines().enumerate().filter(|(_, line)| {
                // A method of another type may end in the same words.
                makers.iter().any(|maker| {
                    line.match_indices(maker)
                        .any(|(at, _)| !line[..at].ends_with(|c: char| c.is_alphanumeric()))
                })
            });
            found.extend(lines.map(|(at, line)| format!("{relative}:{}: {}", at + 1, line.trim())));
        });
    }
    assert_eq!(found, Vec::<String>::new(), "use common/src/files.rs");
}

/// What messages and documents tell people to type: `fleet NAME NAME --option`, in backticks.
#[test]
fn every_command_that_is_named_exists() {
    let mut helps = BTreeMap::new();
    let (mut named, mut wrong) = (0, Vec::new());
    let mut look = |path: &Path, text: &str| {
        for (at, line) in text.lines().enumerate() {
            for command in line.split('`').skip(1).step_by(2) {
                let words: Vec<&str> = command.split_whitespace().collect();
                let [program @ ("fleet" | "coordinator" | "worker"), rest @ ..] = &words[..] else {
                    continue;
                };
                named += 1;
                if let Err(why) = is_a_command(program, rest, &mut helps) {
                    wrong.push(format!("{}:{}: `{command}`: {why}", path.display(), at + 1));
                }
            }
        }
    };
    for package in ["common/src", "coordinator/src", "fleet/src", "worker/agent/src"] {
        visit(&root().join(package), &mut look);
    }
    for document in ["README.md", "docs/operating.md", "docs/security.md"] {
        let path = root().join(document);
        look(&path, &std::fs::read_to_string(&path).unwrap());
    }
    assert!(named > 100, "{named}");
    assert_eq!(wrong, Vec::<String>::new());
}

fn is_a_command(
    program: &str,
    rest: &[&str],
    helps: &mut BTreeMap<Vec<String>, Option<String>>,
) -> Result<(), String> {
    // A program by itself, a placeholder, or what clap does not know: how a worker starts a rank.
    let begins = rest.first().is_some_and(|first| first.starts_with(|c: char| c.is_ascii_lowercase()));
    if !begins || (program, rest) == ("worker", &["exec-rank"]) {
        return Ok(());
    }
    let mut help = |path: &[String]| {
        let run = || {
            let output =
                Command::new(fleet_tests::program(program)).args(path).arg("--help").output().unwrap();
            output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
        };
        let key = [&[program.to_owned()], path].concat();
        helps.entry(key).or_insert_with(run).clone()
    };
    let (mut path, mut shown) = (Vec::new(), None);
    let is_name = |word: &str| word.starts_with(|c: char| c.is_ascii_lowercase());
    for word in
        rest.iter().filter_map(|word| word.split(['|', '\\', ',']).next()).take_while(|word| is_name(word))
    {
        path.push(word.to_owned());
        match help(&path) {
            Some(text) => shown = Some(text),
            None => break,
        }
    }
    let Some(shown) = shown else { return Err("there is no such command".into()) };
    let options = rest.iter().take_while(|word| **word != "--").filter(|word| word.starts_with("--"));
    for option in options {
        let option: String = option.chars().take_while(|c| c.is_ascii_lowercase() || *c == '-').collect();
        if !shown.split(|c: char| c.is_whitespace() || c == ',').any(|word| word == option) {
            return Err(format!("it has no {option}"));
        }
    }
    Ok(())
}

fn visit(folder: &Path, each: &mut impl FnMut(&Path, &str)) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            visit(&path, each);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            each(&path, &std::fs::read_to_string(&path).unwrap());
        }
    }
}
