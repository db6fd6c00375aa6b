//! Command lines, read by one rule: an option takes whatever follows it. A prompt may begin with a hyphen, and so may a name, a secret or a
//! number. Only of paths there is a doubt, since what they name is often made: one that reads as another option is refused.

use crate::terminal::plain;
use crate::{exit, manual};
use clap::builder::{OsStringValueParser, TypedValueParser};
use clap::error::ErrorKind;
use clap::{Arg, Command, Parser};
use std::any::TypeId;
use std::ffi::OsString;
use std::io::Write;
use std::path::PathBuf;

/// Reads this process's command line. Where there is an error, or help was asked for, it ends the process, as `Parser::parse` does.
pub fn parse<P: Parser>() -> P {
    parse_or(|_, _| None)
}

/// The same. Where `cure` knows what was meant with this line that could not be read, that is the error.
pub fn parse_or<P: Parser>(cure: impl Fn(&clap::Error, &[OsString]) -> Option<String>) -> P {
    let command = manual::with_commands(with_the_rule(P::command()));
    let mut matches = command.clone().try_get_matches().unwrap_or_else(|error| {
        let line: Vec<OsString> = std::env::args_os().collect();
        let Some(cure) = cure(&error, &line) else {
            end(named(error, P::command(), line.into_iter()));
        };
        eprintln!("error: {}", plain(&cure));
        std::process::exit(exit::REFUSED_INPUT.into())
    });
    if let Some(answer) = manual::answer(&command, &matches) {
        say(answer);
    }
    P::from_arg_matches_mut(&mut matches).unwrap_or_else(|error| end(error.format(&mut P::command())))
}

/// Prints an error or the help that was asked for, and ends the process. A reader that has gone away has read enough.
fn end(error: clap::Error) -> ! {
    let code = error.exit_code();
    match error.print().and_then(|()| std::io::stdout().flush()) {
        Err(why) if code == 0 && why.kind() != std::io::ErrorKind::BrokenPipe => {
            eprintln!("error: what was to be printed could not be written: {why}");
            std::process::exit(exit::ENVIRONMENT.into())
        }
        _ => std::process::exit(code),
    }
}

/// Prints what was asked for, and ends the process.
fn say(text: std::io::Result<String>) -> ! {
    let mut out = std::io::stdout().lock();
    let said = text.and_then(|text| out.write_all(text.as_bytes()).and_then(|()| out.flush()));
    match said {
        Err(why) if why.kind() != std::io::ErrorKind::BrokenPipe => {
            eprintln!("error: what was asked for could not be written: {why}");
            std::process::exit(exit::ENVIRONMENT.into())
        }
        _ => std::process::exit(exit::SUCCEEDED.into()),
    }
}

/// The same error; of an argument that is not UTF-8 where there has to be text, with that argument.
fn named(error: clap::Error, mut command: Command, mut line: impl Iterator<Item = OsString>) -> clap::Error {
    match line.find(|arg| arg.to_str().is_none()) {
        Some(arg) if error.kind() == ErrorKind::InvalidUtf8 => {
            let arg = arg.to_string_lossy();
            command.error(ErrorKind::InvalidUtf8, format!("the argument `{}` is not UTF-8", plain(&arg)))
        }
        _ => error,
    }
}

/// The same command, in which options take whatever follows them.
pub fn with_the_rule(command: Command) -> Command {
    command.mut_args(takes_what_follows).mut_subcommands(with_the_rule)
}

fn takes_what_follows(arg: Arg) -> Arg {
    if arg.is_positional() || !arg.get_action().takes_values() {
        return arg;
    }
    let is_path = arg.get_value_parser().type_id() == TypeId::of::<PathBuf>();
    let arg = arg.allow_hyphen_values(true);
    if is_path { arg.value_parser(OsStringValueParser::new().try_map(path)) } else { arg }
}

fn path(text: OsString) -> Result<PathBuf, String> {
    match text.to_str().filter(|text| text.starts_with("--")) {
        Some(option) => {
            Err(format!("this is an option, and a path is wanted; a path of that name is `./{option}`"))
        }
        None => Ok(text.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq, Parser)]
    struct Cli {
        #[arg(long, global = true)]
        cluster: Option<String>,
        #[command(subcommand)]
        command: Act,
    }

    #[derive(Debug, PartialEq, clap::Subcommand)]
    enum Act {
        Run {
            #[arg(long)]
            prompt: Option<String>,
            #[arg(short, long)]
            number: Option<f64>,
            #[arg(long)]
            dir: Option<PathBuf>,
            #[arg(long = "set")]
            sets: Vec<String>,
            #[arg(long)]
            json: bool,
            file: Option<PathBuf>,
            #[arg(last = true)]
            program: Vec<OsString>,
        },
    }

    fn read(line: &[&str]) -> Result<Cli, String> {
        let matches = with_the_rule(<Cli as clap::CommandFactory>::command())
            .try_get_matches_from([&["x", "run"], line].concat());
        let cli =
            matches.and_then(|mut matches| <Cli as clap::FromArgMatches>::from_arg_matches_mut(&mut matches));
        cli.map_err(|error| error.to_string())
    }

    #[test]
    fn an_option_takes_whatever_follows() {
        for text in ["- item", "-1", "--help", "--json", "--- a/file.txt", "--", "-", "", "-n 3"] {
            let Act::Run { prompt, json, .. } = read(&["--prompt", text, "--json"]).unwrap().command;
            assert_eq!((prompt.as_deref(), json), (Some(text), true));
        }
        assert_eq!(read(&["--cluster", "-x"]).unwrap().cluster.as_deref(), Some("-x"));
        let Act::Run { number, sets, .. } =
            read(&["-n", "-1.5", "--set", "-a=-1", "--set", "--b"]).unwrap().command;
        assert_eq!((number, sets), (Some(-1.5), vec!["-a=-1".to_owned(), "--b".to_owned()]));
        let error = read(&["--number", "--json"]).unwrap_err();
        assert!(error.contains("invalid value '--json' for '--number"), "{error}");
        assert!(read(&["--prompt"]).unwrap_err().contains("a value is required"));
    }

    #[test]
    fn what_is_not_text_is_named_where_text_is_wanted() {
        use std::os::unix::ffi::OsStringExt;
        let odd = OsString::from_vec(b"gr\xfcn".to_vec());
        let command = || with_the_rule(<Cli as clap::CommandFactory>::command());
        let line = |option: &str| ["x".into(), "run".into(), option.into(), odd.clone()];
        let error = command().try_get_matches_from(line("--prompt")).unwrap_err();
        let error = named(error, command(), line("--prompt").into_iter());
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().contains("the argument `gr\u{fffd}n` is not UTF-8"), "{error}");
        assert!(command().try_get_matches_from(line("--dir")).is_ok(), "a path is bytes");
    }

    #[test]
    fn a_path_is_not_mistaken_for_the_option_after_it() {
        let Act::Run { dir, file, .. } = read(&["--dir", "-d", "job"]).unwrap().command;
        assert_eq!((dir, file), (Some("-d".into()), Some("job".into())));
        let error = read(&["--dir", "--json"]).unwrap_err();
        assert!(error.contains("'--dir <DIR>'") && error.contains("`./--json`"), "{error}");
    }

    #[test]
    fn what_is_no_value_of_an_option_is_read_as_ever() {
        let Act::Run { json, program, .. } = read(&["--json", "--", "prog", "--json", "-x"]).unwrap().command;
        assert_eq!((json, program), (true, ["prog", "--json", "-x"].map(OsString::from).to_vec()));
        assert!(read(&["--nonsense"]).unwrap_err().contains("unexpected argument"));
    }
}
