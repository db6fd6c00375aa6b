//! What was meant with a line that `launch` or `submit` cannot read: torchrun takes a program where fleet takes a job file, and other trainers take
//! their settings as options.

use crate::failure::Failure;
use clap::CommandFactory;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use fleet_common::job::{self, Job, JobFileError, Warning};
use std::ffi::OsString;
use std::path::Path;

/// The error that says it, if it is known.
pub fn cure(error: &clap::Error, line: &[OsString]) -> Option<String> {
    let words: Vec<&str> = line.iter().map(|word| word.to_str()).collect::<Option<_>>()?;
    let command = *words.get(1).filter(|command| ["launch", "submit"].contains(command))?;
    match error.kind() {
        ErrorKind::UnknownArgument => {
            let Some(ContextValue::String(unknown)) = error.get(ContextKind::InvalidArg) else { return None };
            let at =
                words.iter().rposition(|word| word == unknown || word.starts_with(&format!("{unknown}=")))?;
            let of_other = || of_the_other(command, words[at]);
            setting(&words[at..]).or_else(of_other).or_else(|| program(command, &words, at))
        }
        // A job file, and settings behind `--`.
        ErrorKind::ArgumentConflict => {
            let at = words.iter().position(|word| *word == "--")? + 1;
            setting(&words[at..])
        }
        _ => None,
    }
}

/// `--max_steps 5` where `--set max_steps=5` is wanted.
fn setting(words: &[&str]) -> Option<String> {
    let option = words.first()?.strip_prefix("--")?;
    let (name, value) = match option.split_once('=') {
        Some((name, value)) => (name, value),
        None => (option, words.get(1).copied().filter(|value| !value.starts_with("--")).unwrap_or("VALUE")),
    };
    let key = name.replace('-', "_");
    job::keys().find(|known| *known == key)?;
    Some(format!("settings of a job file are given with --set: `--set {key}={value}` instead of `--{name}`"))
}

/// `launch --nodes 2` where `submit --nodes 2` is wanted.
fn of_the_other(command: &str, option: &str) -> Option<String> {
    let name = option.strip_prefix("--")?.split('=').next()?;
    let (other, why) = match command {
        "launch" => {
            ("submit", "which hands a job to a cluster; `fleet launch` runs it on this machine alone")
        }
        _ => ("launch", "which runs a job on this machine alone; `fleet submit` hands it to a cluster"),
    };
    let commands = crate::Cli::command();
    let mut options = commands.find_subcommand(other)?.get_arguments().filter(|option| !option.is_hide_set());
    options.find(|option| option.get_long() == Some(name))?;
    Some(format!("`--{name}` is an option of `fleet {other}`, {why}"))
}

/// `launch -n 2 python3 train.py` where `launch -n 2 -- python3 train.py` is wanted.
fn program(command: &str, words: &[&str], unknown: usize) -> Option<String> {
    let (before, program) = (words.get(unknown.checked_sub(2)?)?, words[unknown - 1]);
    let is_value = before.starts_with('-') && !FLAGS.contains(before);
    if program == command || program.starts_with('-') || is_value || is_job_file(program) {
        return None;
    }
    Some(format!("a program stands behind `--`: `fleet {}`", behind_hyphens(&words[1..], unknown - 2)))
}

/// Options without a value.
const FLAGS: [&str; 3] = ["--json", "--wait", "--queue"];

/// As `job::load`.
pub fn load_job(path: &Path, sets: &[String], here: &Path) -> Result<(Job, Vec<Warning>), Failure> {
    job::load(path, sets, here).map_err(|error| match error {
        JobFileError::Extension { .. } => match no_job_file(path, std::env::args_os()) {
            Some(cure) => Failure::input(format!("{error}; {cure}")),
            None => error.into(),
        },
        error => error.into(),
    })
}

/// What to do with this path in the place of a job file, if it is none.
fn no_job_file(path: &Path, line: impl Iterator<Item = OsString>) -> Option<String> {
    let words: Vec<String> = line.skip(1).map(|word| word.into_string().ok()).collect::<Option<_>>()?;
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let at = words.iter().rposition(|word| Path::new(word) == path)?;
    if is_job_file(words[at]) || !["launch", "submit"].contains(&words[0]) {
        return None;
    }
    Some(format!("a program stands behind `--`: `fleet {}`", behind_hyphens(&words, at)))
}

fn behind_hyphens(words: &[&str], program: usize) -> String {
    let mut words = words.to_vec();
    let is_python = words[program].ends_with(".py");
    words.splice(program..program, ["--"].into_iter().chain(is_python.then_some("python3")));
    words.join(" ")
}

fn is_job_file(word: &str) -> bool {
    let ending = Path::new(word).extension().and_then(|ending| ending.to_str());
    ending.is_some_and(|ending| {
        ["toml", "yaml", "yml", "json", "jsonc"].contains(&ending.to_lowercase().as_str())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use fleet_common::arguments;

    fn told(line: &str) -> Option<String> {
        let words: Vec<OsString> = line.split(' ').map(OsString::from).collect();
        let command = arguments::with_the_rule(crate::Cli::command());
        cure(&command.try_get_matches_from(&words).expect_err(line), &words)
    }

    #[test]
    fn a_setting_as_an_option_is_told_as_one_for_set() {
        for line in [
            "fleet launch job.toml --max_steps 5",
            "fleet launch job.toml --max-steps=5",
            "fleet launch -n 2 job.toml -- --max_steps 5",
            "fleet submit job.toml --max_steps 5",
        ] {
            assert!(
                told(line).is_some_and(|told| told.contains("`--set max_steps=5`")),
                "{line}: {:?}",
                told(line)
            );
        }
        assert_eq!(told("fleet launch job.toml --colour red"), None);
        assert_eq!(told("fleet jobs --max_steps 5"), None);
    }

    #[test]
    fn an_option_of_submit_is_told_to_who_launches_and_the_other_way_round() {
        let says = |line: &str, part: &str| {
            assert!(told(line).is_some_and(|told| told.contains(part)), "{line}: {:?}", told(line))
        };
        says("fleet launch -n 2 --nodes 2 job.toml", "`--nodes` is an option of `fleet submit`");
        says("fleet launch job.toml --max-time=2h", "`--max-time` is an option of `fleet submit`");
        says("fleet submit job.toml --data-dir d", "`--data-dir` is an option of `fleet launch`");
    }

    #[test]
    fn a_program_without_its_hyphens_is_told_with_them() {
        let table = [
            ("fleet launch -n 2 python3 train.py", "`fleet launch -n 2 -- python3 train.py`"),
            ("fleet launch python3 -u train.py --lr 1", "`fleet launch -- python3 -u train.py --lr 1`"),
            ("fleet submit -n 8 ./train.py x", "`fleet submit -n 8 -- python3 ./train.py x`"),
            ("fleet launch --json python3 train.py", "`fleet launch --json -- python3 train.py`"),
            ("fleet launch -n 2 ./run fast", "`fleet launch -n 2 -- ./run fast`"),
        ];
        for (line, wanted) in table {
            assert!(told(line).is_some_and(|told| told.contains(wanted)), "{line}: {:?}", told(line));
        }
        assert_eq!(told("fleet launch job.toml again"), None);
        for line in
            ["fleet launch --nonsense", "fleet launch -n 2 --nonsense", "fleet launch --json --nonsense"]
        {
            assert_eq!(told(line), None);
        }
        let line = || ["fleet", "launch", "-n", "2", "train.py"].map(OsString::from).into_iter();
        let told = no_job_file(Path::new("train.py"), line()).unwrap();
        assert!(told.contains("`fleet launch -n 2 -- python3 train.py`"), "{told}");
        assert_eq!(
            no_job_file(
                Path::new("job.toml"),
                ["fleet", "launch", "job.toml"].map(OsString::from).into_iter()
            ),
            None
        );
    }
}
