//! All fields of a job file as a chapter in Markdown: names and meanings from `SETTINGS`, what a value may be from the parser, which says it of one that
//! cannot be, and defaults from jobs that say nothing.

use super::error::JobFileError;
use super::fields::described_by;
use super::formats::Format;
use super::settings::SETTINGS;
use super::{Job, load};
use crate::model::Family;
use serde_json::{Map, Value, json};
use std::fmt::Write;

/// Where the jobs are that say nothing.
const HERE: &str = "/here";
/// Stands for what a job has to say: no default.
const UNSAID: &str = "UNSAID";
const TO_MEMORY: &str = "a text in memory takes all that is written";

/// The chapter, from its first table on.
pub fn reference() -> String {
    let defaults = defaults();
    let mut text = String::new();
    let mut before = None;
    for (names, meaning) in SETTINGS.iter().filter(|(names, _)| !is_of_config(names[0])) {
        let table = match names[0] {
            "vocab_size" => "model",
            name => name.rsplit_once('.').map_or("", |(table, _)| table),
        };
        if before.replace(table) != Some(table) {
            heading(table, &mut text);
        }
        let default = names.iter().find_map(|name| defaults.iter().find_map(|file| found(file, name)));
        let default = default.map_or_else(String::new, |value| code(&value));
        let wanted = in_a_cell(&wanted(names[0]).unwrap_or_default());
        let meaning = with_others(meaning, names);
        writeln!(text, "| `{}` | {wanted} | {default} | {meaning} |", names[0]).expect(TO_MEMORY);
    }
    new_models(&mut text);
    text
}

/// What jobs come to that say nothing: one that learns text, one that trains an adapter on rows, and what is special to one of preferences.
fn defaults() -> [Map<String, Value>; 3] {
    let mut files = jobs().map(|file| parsed(file).map(|job| job.to_file()).unwrap_or_default());
    files[2].retain(|key, _| key == "dpo");
    files
}

fn jobs() -> [Value; 3] {
    let data = json!({"path": UNSAID});
    let beside_a_model = |task: &str| json!({"task_name": task, "data": data, "model": {"path": UNSAID}});
    let mut of_adapter = beside_a_model("sft");
    of_adapter["adapter"] = json!({"type": "lora"});
    of_adapter["early_stopping"] = json!({"metric": "eval_loss"});
    [json!({"data": data}), of_adapter, beside_a_model("dpo")]
}

fn heading(table: &str, text: &mut String) {
    let title = if table.is_empty() { "The run".to_owned() } else { format!("`[{table}]`") };
    write!(text, "\n## {title}\n\n| key | value | default | what it does |\n|---|---|---|---|\n")
        .expect(TO_MEMORY);
}

fn with_others(meaning: &str, names: &[&str]) -> String {
    let others: Vec<_> = names[1..].iter().map(|name| format!("`{name}`")).collect();
    if others.is_empty() { meaning.to_owned() } else { format!("{meaning}. Also {}", others.join(", ")) }
}

/// Keys that stand in `[model]` as they do in a `config.json`.
fn is_of_config(name: &str) -> bool {
    name.starts_with("model.") && !["model.path", "model.model_type"].contains(&name)
}

fn new_models(text: &mut String) {
    text.push_str(
        "\n## A new model\n\nBeside `model_type`, `[model]` has the keys of the family's `config.json`; `fleet config JOB` shows their defaults, and \
         docs/models.md tells more of them.\n\n| `model_type` | keys |\n|---|---|\n",
    );
    for family in Family::all() {
        let keys = described_by(family).iter().map(|name| format!("`{}`", &name["model.".len()..]));
        writeln!(text, "| `{}` | {} |", family.model_type, keys.collect::<Vec<_>>().join(", "))
            .expect(TO_MEMORY);
    }
    text.push_str("\nKeys of several families:\n\n| key | what it says |\n|---|---|\n");
    for (names, meaning) in SETTINGS.iter().filter(|(names, _)| is_of_config(names[0])) {
        writeln!(text, "| `{}` | {} |", names[0], with_others(meaning, names)).expect(TO_MEMORY);
    }
}

/// What the parser takes there, in its own words: it says them of a table that is none.
fn wanted(name: &str) -> Option<String> {
    jobs().into_iter().find_map(|mut file| {
        put(&mut file, name, json!({"?": {"?": 1}}));
        match parsed(file) {
            Err(JobFileError::Value { wanted, .. }) => Some(wanted),
            _ => None,
        }
    })
}

fn put(file: &mut Value, name: &str, value: Value) {
    // Indexing makes the tables on the way.
    *name.split('.').fold(file, |table, key| &mut table[key]) = value;
}

fn parsed(file: Value) -> Result<Job, JobFileError> {
    let text = file.to_string();
    load::parse(&text, Format::Json, "job", UNSAID.as_ref(), &[], HERE.as_ref()).map(|(job, _)| job)
}

fn found(file: &Map<String, Value>, name: &str) -> Option<Value> {
    let mut keys = name.split('.');
    let first = file.get(keys.next()?)?;
    let value = keys.try_fold(first, |at, key| at.get(key))?;
    (!value.to_string().contains(UNSAID)).then(|| value.clone())
}

/// As a job file has it.
fn code(value: &Value) -> String {
    format!("`{}`", value.to_string().replace(&format!("{HERE}/"), "").replace('|', "\\|"))
}

fn in_a_cell(text: &str) -> String {
    let text = text.trim_end_matches(',').replace('|', "\\|").replace('*', "\\*");
    text.replace(&format!(" to {}", i64::MAX), " on")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_field_says_what_it_takes() {
        let told = SETTINGS.iter().map(|(names, _)| names[0]).filter(|name| !is_of_config(name));
        let silent: Vec<_> = told.filter(|name| wanted(name).is_none()).collect();
        assert_eq!(silent, Vec::<&str>::new());
    }

    #[test]
    fn jobs_that_say_nothing_can_be_read() {
        for file in jobs() {
            assert!(parsed(file.clone()).is_ok(), "{file}: {:?}", parsed(file.clone()).err());
        }
    }

    #[test]
    fn the_chapter_in_docs_is_the_one_of_this_source() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/reference/job.md");
        let there = std::fs::read_to_string(path).unwrap_or_default();
        let is_ours = there.ends_with(&reference());
        assert!(is_ours, "docs/reference/job.md is of another source; `make reference` writes it anew");
    }
}
