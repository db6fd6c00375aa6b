//! `fleet`: the command line. Starts in milliseconds; links neither torch nor raft nor RocksDB, but starts the programs that do.

mod client;
mod cluster;
mod commands;
mod doubt;
mod environment;
mod failure;
mod html;
mod json;
mod launch;
mod meant;
mod out;
mod places;
mod programs;
mod report;
mod session;
mod text;

use clap::{Parser, Subcommand};
use failure::Failure;
use fleet_common::telemetry::{self, LogFormat};
use fleet_common::{arguments, exit, signals};
use std::process::ExitCode;

/// Trains neural networks on a cluster.
#[derive(Parser)]
#[command(name = "fleet", version, about, max_term_width = 100)]
struct Cli {
    /// A coordinator's data directory, HOST:PORT, or a name; without it the newest local launch
    #[arg(long, global = true, env = "FLEET_CLUSTER", value_name = "NAME|HOST:PORT|DIR")]
    cluster: Option<String>,
    /// Queries are answered from what one coordinator has, which may be old, without asking the others
    #[arg(long, global = true)]
    stale: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Launch(launch::Args),
    Submit(commands::submit::Args),
    Status(commands::status::Args),
    Jobs(commands::jobs::Args),
    Nodes(commands::nodes::Args),
    Top(commands::top::Args),
    Dashboard(commands::dashboard::Args),
    Logs(commands::logs::Args),
    Cancel(commands::cancel::Args),
    Events(commands::events::Args),
    Drain(commands::drain::Args),
    Undrain(commands::drain::UndrainArgs),
    Runs(commands::runs::Args),
    Report(commands::report::Args),
    Checkpoint(commands::checkpoint::Args),
    Checkpoints(commands::checkpoints::Args),
    Exports(commands::exports::Args),
    Profiles(commands::profiles::Args),
    Retention(commands::retention::Args),
    Coordinators(commands::coordinators::Args),
    Secrets(commands::secrets::Args),
    Token(commands::token::Args),
    Members(commands::members::Args),
    Revoke(commands::revoke::Args),
    Login(commands::login::Args),
    Web(commands::web::Args),
    #[command(subcommand)]
    Adapter(commands::adapter::Command),
    #[command(alias = "quantize")]
    Quantise(commands::quantise::Args),
    Generate(commands::generate::Args),
    Serve(commands::serve::Args),
    Logits(commands::logits::Args),
    Eval(commands::eval::Args),
    Config(commands::config::Args),
    Fields(commands::fields::Args),
    Plan(commands::plan::Args),
}

fn main() -> ExitCode {
    signals::mind_no_file_limit();
    let started_unix_ms = places::unix_ms();
    let cli: Cli = arguments::parse_or(meant::cure);
    telemetry::init(LogFormat::Human, "warn");
    // an empty variable is an unset one
    let name = cli.cluster.as_deref().filter(|wish| !wish.is_empty());
    let cluster = commands::Target { name, stale: cli.stale };
    let done = match cli.command {
        Command::Launch(args) => launch::run(args, started_unix_ms),
        Command::Submit(args) => commands::submit::run(args, cluster),
        Command::Status(args) => commands::status::run(args, cluster),
        Command::Jobs(args) => commands::jobs::run(args, cluster),
        Command::Nodes(args) => commands::nodes::run(args, cluster),
        Command::Top(args) => commands::top::run(args, cluster),
        Command::Dashboard(args) => commands::dashboard::run(args, cluster),
        Command::Logs(args) => commands::logs::run(args, cluster),
        Command::Cancel(args) => commands::cancel::run(args, cluster),
        Command::Events(args) => commands::events::run(args, cluster),
        Command::Drain(args) => commands::drain::run(args, cluster),
        Command::Undrain(args) => commands::drain::undo(args, cluster),
        Command::Runs(args) => commands::runs::run(args, cluster),
        Command::Report(args) => commands::report::run(args, cluster),
        Command::Checkpoint(args) => commands::checkpoint::run(args),
        Command::Checkpoints(args) => commands::checkpoints::run(args, cluster),
        Command::Exports(args) => commands::exports::run(args, cluster),
        Command::Profiles(args) => commands::profiles::run(args, cluster),
        Command::Retention(args) => commands::retention::run(args, cluster),
        Command::Coordinators(args) => commands::coordinators::run(args, cluster),
        Command::Secrets(args) => commands::secrets::run(args, cluster),
        Command::Members(args) => commands::members::run(args, cluster),
        Command::Revoke(args) => commands::revoke::run(args, cluster),
        Command::Token(args) => commands::token::run(args, cluster),
        Command::Login(args) => commands::login::run(args),
        Command::Web(args) => commands::web::run(args, cluster),
        Command::Adapter(command) => commands::adapter::run(command),
        Command::Quantise(args) => commands::quantise::run(args),
        Command::Generate(args) => commands::generate::run(args),
        Command::Serve(args) => commands::serve::run(args),
        Command::Logits(args) => commands::logits::run(args),
        Command::Eval(args) => commands::eval::run(args),
        Command::Config(args) => commands::config::run(args),
        Command::Fields(args) => commands::fields::run(args),
        Command::Plan(args) => commands::plan::run(args),
    };
    match (done, out::lost()) {
        (Ok(exit::SUCCEEDED), Some(why)) => {
            out::note(&format!("error: what was to be printed could not be written: {why}"));
            ExitCode::from(exit::ENVIRONMENT)
        }
        (Ok(code), _) => ExitCode::from(code),
        (Err(Failure { code, message }), _) => {
            out::note(&format!("error: {message}"));
            ExitCode::from(code)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    /// Options that do not take a hyphen at the beginning of their value, of all commands.
    fn refusing(command: &clap::Command, path: &str, refusing: &mut Vec<String>) {
        let options = command.get_opts().filter(|arg| arg.get_action().takes_values());
        let wrong = options.filter(|arg| !arg.is_allow_hyphen_values_set());
        refusing.extend(wrong.map(|arg| format!("{path} {arg}")));
        for command in command.get_subcommands() {
            self::refusing(command, &format!("{path} {}", command.get_name()), refusing);
        }
    }

    #[test]
    fn every_option_takes_what_follows_it_and_only_paths_mind_two_hyphens() {
        let command = arguments::with_the_rule(Cli::command());
        let mut wrong = Vec::new();
        refusing(&command, "fleet", &mut wrong);
        assert_eq!(wrong, Vec::<String>::new());
        let read = |words: &[&str]| {
            let line = words.iter().copied().map(|word| if word == "X" { "--x" } else { word });
            command
                .clone()
                .try_get_matches_from(["fleet"].into_iter().chain(line))
                .map_err(|error| error.to_string())
        };
        for takes in [
            "--cluster X jobs",
            "generate --model m --prompt X",
            "eval --model m --data a b --set X",
            "launch job.toml --set X",
            "submit job.toml --set X",
            "submit --id X job.toml",
            "submit --env X -- program",
            "config job.toml --set X",
            "login host:1 --token X",
            "login host:1 --name X",
            "runs plot job-1 --metric X",
        ] {
            let words: Vec<&str> = takes.split(' ').collect();
            assert!(read(&words).is_ok(), "{takes}: {:?}", read(&words).err());
        }
        for path in [
            "generate --model X --prompt p",
            "eval --model m --data a --data X",
            "launch job.toml --data-dir X",
            "runs plot job-1 --out X",
            "report job-1 --out X",
            "status --data-dir X",
            "submit --env-file X -- program",
            "login host:1 --token-file X",
            "token create --role worker --out X",
        ] {
            let words: Vec<&str> = path.split(' ').collect();
            assert!(
                read(&words).is_err_and(|error| error.contains("`./--x`")),
                "{path}: {:?}",
                read(&words).err()
            );
        }
    }
}
