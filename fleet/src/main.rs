//! `fleet`: the command line. Starts in milliseconds; links neither torch nor raft nor RocksDB, but starts the programs that do.

mod client;
mod cluster;
mod commands;
mod doubt;
mod environment;
mod failure;
mod json;
mod launch;
mod out;
mod places;
mod programs;
mod report;
mod session;
mod text;

use clap::{Parser, Subcommand};
use failure::Failure;
use fleet_common::exit;
use fleet_common::telemetry::{self, LogFormat};
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
    Logs(commands::logs::Args),
    Cancel(commands::cancel::Args),
    Events(commands::events::Args),
    Drain(commands::drain::Args),
    Undrain(commands::drain::UndrainArgs),
    Runs(commands::runs::Args),
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
    Generate(commands::generate::Args),
    Config(commands::config::Args),
}

fn main() -> ExitCode {
    let started_unix_ms = places::unix_ms();
    let cli = Cli::parse();
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
        Command::Logs(args) => commands::logs::run(args, cluster),
        Command::Cancel(args) => commands::cancel::run(args, cluster),
        Command::Events(args) => commands::events::run(args, cluster),
        Command::Drain(args) => commands::drain::run(args, cluster),
        Command::Undrain(args) => commands::drain::undo(args, cluster),
        Command::Runs(args) => commands::runs::run(args, cluster),
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
        Command::Generate(args) => commands::generate::run(args),
        Command::Config(args) => commands::config::run(args),
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
