//! What a program says of its own command line, all from the definitions that read it: completions for shells, pages for `man`, a chapter
//! in Markdown. Every program has two commands for that, `completions` and `manual`.

use clap::builder::{PossibleValue, ValueHint};
use clap::{Arg, ArgMatches, Command, value_parser};
use clap_complete::Shell;
use std::fmt::Write;
use std::io;
use std::path::PathBuf;

const COMPLETIONS: &str = "completions";
const MANUAL: &str = "manual";

/// The same command, with the two that `answer` answers.
pub fn with_commands(command: Command) -> Command {
    let shells = ["bash", "zsh", "fish"].map(PossibleValue::new);
    let shell = Arg::new("shell").value_name("SHELL").required(true).value_parser(shells);
    let completions = Command::new(COMPLETIONS)
        .about("Print what completes this program's commands and options in a shell")
        .long_about(
            "Print what completes this program's commands and options in a shell\n\nPut it where the shell looks for it, such as \
             ~/.local/share/bash-completion/completions/ with the program's name, a folder of zsh's $fpath with an underscore before the name, or \
             ~/.config/fish/completions/ with the name and .fish.",
        )
        .arg(shell);
    let pages = Arg::new("man").long("man").value_name("DIR").value_parser(value_parser!(PathBuf));
    let manual =
        Command::new(MANUAL).about("Print all commands and options of this program in Markdown").arg(
            pages.help("Write a page for `man` of each command into this directory, which is there, instead"),
        );
    command.subcommand(completions).subcommand(manual)
}

/// What one of the two commands has to say, if it was asked for. `command` has them both.
pub fn answer(command: &Command, matches: &ArgMatches) -> Option<io::Result<String>> {
    let (name, matches) = matches.subcommand()?;
    let command = command.clone().mut_args(hinted).mut_subcommands(with_hints);
    match name {
        COMPLETIONS => {
            let shell: &String = matches.get_one("shell").expect("it is required");
            let shell = shell.parse().expect("only names of shells are taken");
            Some(Ok(completions(command, shell)))
        }
        MANUAL => Some(match matches.get_one::<PathBuf>("man") {
            Some(dir) => clap_mangen::generate_to(command, dir).map(|()| String::new()),
            None => Ok(markdown(command)),
        }),
        _ => None,
    }
}

fn completions(mut command: Command, shell: Shell) -> String {
    let (name, mut text) = (command.get_name().to_owned(), Vec::new());
    clap_complete::generate(shell, &mut command, name, &mut text);
    let text = String::from_utf8(text).expect("names and help of commands are text");
    if shell == Shell::Bash { with_files(&text) } else { text }
}

/// A command without commands of its own is followed by what bash completes where nothing else fits, files; its options come after a hyphen.
/// clap_complete lists them without one.
fn with_files(script: &str) -> String {
    const ALL: &str = r#"COMPREPLY=( $(compgen -W "${opts}" -- "${cur}") )"#;
    let (mut text, mut has_commands, mut is_inside) = (String::new(), true, false);
    for line in script.lines() {
        let trimmed = line.trim_start();
        if let Some(words) = trimmed.strip_prefix("opts=\"") {
            has_commands = words.trim_end_matches('"').split(' ').any(|word| !word.starts_with('-'));
        }
        let line = match trimmed {
            _ if has_commands => line.to_owned(),
            ALL if !is_inside => line.replace(ALL, "COMPREPLY=()"),
            condition if condition.starts_with("if [[ ${cur} == -* || ") => {
                is_inside = true;
                let indent = &line[..line.len() - trimmed.len()];
                format!("{indent}if [[ ${{cur}} == -* ]] ; then")
            }
            "fi" => {
                is_inside = false;
                line.to_owned()
            }
            _ => line.to_owned(),
        };
        text.push_str(&line);
        text.push('\n');
    }
    text
}

fn with_hints(command: Command) -> Command {
    command.mut_args(hinted).mut_subcommands(with_hints)
}

/// How a value is completed follows from what it is called.
fn hinted(arg: Arg) -> Arg {
    let name = arg.get_value_names().and_then(|names| names.first()).map_or("", |name| name.as_str());
    let hint = match name {
        _ if !arg.get_action().takes_values() => return arg,
        _ if name.ends_with("DIR") => ValueHint::DirPath,
        _ if name.contains("FILE") => ValueHint::FilePath,
        "PROGRAM" => ValueHint::CommandName,
        "HOST" => ValueHint::Hostname,
        _ if arg.get_value_hint() == ValueHint::AnyPath => ValueHint::FilePath,
        _ => ValueHint::Other,
    };
    arg.value_hint(hint)
}

/// A chapter: the program, then each of its commands that is not hidden, with all options.
fn markdown(mut command: Command) -> String {
    command.build();
    let mut text = String::new();
    section(&command, &mut text);
    text
}

fn section(command: &Command, text: &mut String) {
    let name = command.get_bin_name().unwrap_or_else(|| command.get_name());
    let depth = name.split(' ').count() + 1;
    let about = command.get_long_about().or(command.get_about()).map(|about| about.to_string());
    let usage = command.clone().render_usage().to_string();
    let usage = usage.trim_start_matches("Usage:").lines().map(str::trim).collect::<Vec<_>>().join("\n");
    write!(text, "{} `{name}`\n\n", "#".repeat(depth)).expect(TO_MEMORY);
    write!(text, "{}\n\n```\n{usage}\n```\n\n", escaped(about.unwrap_or_default().trim())).expect(TO_MEMORY);
    let own = |arg: &&Arg| {
        !arg.is_hide_set()
            && !["help", "version"].contains(&arg.get_id().as_str())
            && !is_inherited(command, arg)
    };
    let arguments: Vec<&Arg> = command.get_arguments().filter(own).collect();
    if !arguments.is_empty() {
        text.push_str("| | |\n|---|---|\n");
        arguments.into_iter().for_each(|arg| row(arg, text));
        text.push('\n');
    }
    let commands = command.get_subcommands().filter(|command| !command.is_hide_set());
    commands.filter(|command| command.get_name() != "help").for_each(|command| section(command, text));
}

/// A global option is told of where it is defined.
fn is_inherited(command: &Command, arg: &Arg) -> bool {
    arg.is_global_set() && command.get_bin_name().is_some_and(|name| name.contains(' '))
}

fn row(arg: &Arg, text: &mut String) {
    let values = match arg.get_action().takes_values() {
        true => arg.to_string(),
        false => arg.get_long().map_or_else(String::new, |long| format!("--{long}")),
    };
    let short = arg.get_short().map_or_else(String::new, |short| format!("-{short}, "));
    let help = arg.get_long_help().or(arg.get_help()).map(|help| help.to_string()).unwrap_or_default();
    let mut told = vec![help.split_whitespace().collect::<Vec<_>>().join(" ")];
    let words: Vec<_> = arg.get_possible_values().iter().map(said).collect();
    if !words.is_empty() && arg.get_action().takes_values() {
        told.push(format!("One of {}", words.join(", ")));
    }
    let defaults: Vec<_> = arg.get_default_values().iter().map(|value| value.to_string_lossy()).collect();
    if !defaults.is_empty() && arg.get_action().takes_values() {
        told.push(format!("Default: `{}`", defaults.join(" ")));
    }
    if let Some(variable) = arg.get_env() {
        told.push(format!("Also taken from `{}`", variable.to_string_lossy()));
    }
    let told =
        told.into_iter().map(|part| part.trim_end_matches('.').to_owned()).filter(|part| !part.is_empty());
    let told = escaped(&told.collect::<Vec<_>>().join(". "));
    writeln!(text, "| `{short}{}` | {told} |", values.replace('|', "\\|")).expect(TO_MEMORY);
}

/// Prose in which nothing is a mark but what stands between backticks.
fn escaped(text: &str) -> String {
    let parts = text.split('`').enumerate().map(|(i, part)| match i % 2 {
        0 => part.replace('*', "\\*").replace('<', "\\<").replace('|', "\\|"),
        _ => part.replace('|', "\\|"),
    });
    parts.collect::<Vec<_>>().join("`")
}

fn said(value: &PossibleValue) -> String {
    match value.get_help() {
        Some(help) => format!("`{}` ({help})", value.get_name()),
        None => format!("`{}`", value.get_name()),
    }
}

const TO_MEMORY: &str = "a text in memory takes all that is written";

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    /// Does it.
    #[derive(Parser)]
    #[command(name = "prog", version)]
    struct Cli {
        /// Where
        #[arg(long, global = true, value_name = "NAME|DIR")]
        place: Option<String>,
        #[command(subcommand)]
        command: Act,
    }

    #[derive(clap::Subcommand)]
    enum Act {
        /// Run it
        Run {
            /// Of a file
            #[arg(short = 'n', long, default_value_t = 3)]
            lines: u32,
            #[arg(long, value_name = "DIR")]
            model: PathBuf,
            /// Nobody's business
            #[arg(long, hide = true)]
            secret: bool,
            /// How
            #[arg(long, value_parser = ["fast", "slow"])]
            speed: Option<String>,
            file: PathBuf,
        },
    }

    fn said_to(line: &[&str]) -> String {
        let command = with_commands(<Cli as clap::CommandFactory>::command());
        let matches = command.clone().try_get_matches_from([&["prog"], line].concat()).unwrap();
        answer(&command, &matches).unwrap().unwrap()
    }

    #[test]
    fn a_command_is_told_with_its_options_and_without_what_is_hidden() {
        let text = said_to(&["manual"]);
        let run = text.split("### `prog run`").nth(1).unwrap();
        assert!(text.starts_with("## `prog`\n\nDoes it\n"), "{text}");
        assert!(text.contains("| `--place <NAME\\|DIR>` | Where |"), "{text}");
        assert!(run.contains("prog run [OPTIONS] --model <DIR> <FILE>\n"), "{run}");
        assert!(run.contains("| `-n, --lines <LINES>` | Of a file. Default: `3` |"), "{run}");
        assert!(run.contains("| `--speed <SPEED>` | How. One of `fast`, `slow` |"), "{run}");
        assert!(!text.contains("secret") && !run.contains("place"), "{text}");
    }

    #[test]
    fn shells_are_told_what_a_value_is() {
        let fish = said_to(&["completions", "fish"]);
        assert!(fish.contains("-l model -r -f -a \"(__fish_complete_directories)\""), "{fish}");
        assert!(said_to(&["completions", "zsh"]).contains(":DIR:_files -/"));
        assert!(said_to(&["completions", "bash"]).contains("compgen -W \"fast slow\""));
    }

    #[test]
    fn every_command_has_a_page() {
        let dir = tempfile::tempdir().unwrap();
        said_to(&["manual", "--man", &dir.path().display().to_string()]);
        let pages = std::fs::read_dir(dir.path()).unwrap();
        let mut pages: Vec<_> = pages.map(|page| page.unwrap().file_name().into_string().unwrap()).collect();
        pages.sort();
        assert_eq!(pages, ["prog-completions.1", "prog-manual.1", "prog-run.1", "prog.1"]);
        let page = std::fs::read_to_string(dir.path().join("prog-run.1")).unwrap();
        assert!(page.contains(".SH OPTIONS") && page.contains("\\-\\-model"), "{page}");
    }
}
