//! What messages and documents tell people to type exists: commands with their options, and the keys of a job file.

#![allow(clippy::unwrap_used)] // in a test an unwrap is an assertion

use fleet_common::job;
use fleet_tests::source::{root, texts, visit};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;

const PACKAGES: [&str; 5] = ["common/src", "coordinator/src", "fleet/src", "worker", "deploy"];
const DOCUMENTS: [&str; 5] =
    ["README.md", "docs/operating.md", "docs/security.md", "bench/README.md", "bench/control/README.md"];

/// `fleet NAME NAME --option`, in backticks.
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
    PACKAGES.iter().for_each(|package| visit(package, &mut look));
    for document in DOCUMENTS {
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

/// Options that the programs give each other and help texts do not show.
const HIDDEN: [&str; 2] = ["--inherit-env", "--relay"];

/// Options of other programs: `hf download`.
const OF_OTHERS: [&str; 1] = ["--local-dir"];

/// Everything that looks like an option, wherever it stands in a text of the source.
#[test]
fn every_option_that_a_message_names_exists() {
    let programs = ["fleet", "coordinator", "worker", "fleet-rank"];
    let known: BTreeSet<String> = programs.iter().flat_map(|program| all_options(program, &[])).collect();
    assert!(known.len() > 60, "{known:?}");
    let (mut named, mut wrong) = (0, Vec::new());
    let mut look = |path: &Path, source: &str| {
        if is_test(path) {
            return;
        }
        for (line, text) in texts(source) {
            for word in text.split(|c: char| !c.is_ascii_lowercase() && c != '-') {
                let is_option = word.strip_prefix("--").is_some_and(|name| {
                    name.starts_with(|c: char| c.is_ascii_lowercase()) && !name.ends_with('-')
                });
                named += usize::from(is_option);
                let is_known = known.contains(word) || HIDDEN.contains(&word) || OF_OTHERS.contains(&word);
                if is_option && !is_known {
                    wrong.push(format!("{}:{line}: {word}", path.display()));
                }
            }
        }
    };
    PACKAGES.iter().for_each(|package| visit(package, &mut look));
    assert!(named > 50, "{named}");
    assert_eq!(wrong, Vec::<String>::new());
}

/// The options of a program and of all its commands, as their help texts list them.
fn all_options(program: &str, path: &[String]) -> Vec<String> {
    let help = Command::new(fleet_tests::program(program)).args(path).arg("--help").output().unwrap();
    let help = String::from_utf8(help.stdout).unwrap();
    let words = help.split(|c: char| !c.is_ascii_alphanumeric() && c != '-');
    let mut options: Vec<String> =
        words.filter(|word| word.starts_with("--") && word.len() > 2).map(str::to_owned).collect();
    let commands =
        help.lines().skip_while(|line| *line != "Commands:").skip(1).take_while(|line| !line.is_empty());
    for name in commands.filter_map(|line| line.strip_prefix("  ")?.split_whitespace().next()) {
        if name != "help" {
            options.extend(all_options(program, &[path, &[name.to_owned()]].concat()));
        }
    }
    options
}

/// `table.key`, `[table] key` and `key = value`, in a text of the source and in the documents.
#[test]
fn every_key_that_a_message_names_exists() {
    let known: BTreeSet<&str> = job::keys().collect();
    let (mut named, mut wrong) = (0, Vec::new());
    let mut look = |place: String, text: &str| {
        for key in keys_in(text) {
            named += 1;
            if !known.contains(key.as_str()) {
                wrong.push(format!("{place}: {key}"));
            }
        }
    };
    for package in PACKAGES {
        visit(package, &mut |path, source| {
            // Where the keys are defined they stand without their tables; a model has keys of its own.
            let of_others = path.ends_with("job/fields.rs") || path.starts_with("common/src/model");
            if !is_test(path) && !of_others {
                // A text of one word there is a name that other tools have.
                let names_others = path.ends_with("job/elsewhere.rs");
                texts(source)
                    .iter()
                    .filter(|(_, text)| !names_others || text.contains(' '))
                    .for_each(|(line, text)| look(format!("{}:{line}", path.display()), text));
            }
        });
    }
    for document in DOCUMENTS {
        let text = std::fs::read_to_string(root().join(document)).unwrap();
        for (line, text) in text.lines().enumerate() {
            look(format!("{document}:{}", line + 1), text);
        }
    }
    assert!(named > 80, "{named}");
    assert_eq!(wrong, Vec::<String>::new());
}

fn is_test(path: &Path) -> bool {
    path.components().any(|part| part.as_os_str().to_string_lossy().contains("tests"))
}

/// What a text calls by the name of a job file's key.
fn keys_in(text: &str) -> Vec<String> {
    let tables: BTreeSet<&str> =
        job::keys().filter_map(|key| key.rsplit_once('.')).map(|(table, _)| table).collect();
    let word = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "_.".contains(c);
    let mut keys = Vec::new();
    for part in text.split(|c: char| !word(c)).map(|part| part.trim_matches('.')) {
        let in_table =
            !tables.contains(part) && part.rsplit_once('.').is_some_and(|(table, _)| tables.contains(table));
        let is_file = [".json", ".safetensors", ".bin", ".model", ".toml", ".rs", ".md"]
            .iter()
            .any(|end| part.ends_with(end));
        let is_weight = part.starts_with("model.layers") || part.ends_with(".weight");
        if in_table && !is_file && !is_weight {
            keys.push(part.to_owned());
        }
    }
    for table in &tables {
        for (_, rest) in
            text.match_indices(&format!("[{table}] ")).map(|(at, found)| text.split_at(at + found.len()))
        {
            let key: String = rest.chars().take_while(|c| word(*c)).collect();
            keys.push(format!("{table}.{key}"));
        }
    }
    for (before, _) in text.match_indices(" = ").map(|(at, _)| text.split_at(at)) {
        let key: String =
            before.chars().rev().take_while(|c| word(*c)).collect::<Vec<_>>().into_iter().rev().collect();
        let before = before.strip_suffix(key.as_str()).and_then(|before| before.chars().next_back());
        if key.len() > 1 && before.is_none_or(|c| " `(\"".contains(c)) {
            keys.push(key);
        }
    }
    keys
}
