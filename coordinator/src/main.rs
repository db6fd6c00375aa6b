//! `coordinator`: starts a replica of the control plane, adds one to a cluster, saves and restores one.

use anyhow::{Context, Result};
use clap::{Args, Parser, Subcommand};
use fleet_common::net::{CERTIFICATE_LIFE, JoinToken, NetError, TokenError};
use fleet_common::protocol::Role;
use fleet_common::telemetry::{self, LogFormat};
use fleet_common::{arguments, exit, files, signals, terminal};
use fleet_coordinator::server::operator::{self, Step};
use fleet_coordinator::server::{Coordinator, Options, Places, backup, behind, restore};
use std::io::Write;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};
use tracing::info;

/// The control plane of a fleet cluster.
#[derive(Parser)]
#[command(name = "coordinator", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Start a coordinator; on an empty data directory this makes a new cluster.
    Start(Start),
    /// Add a coordinator to a cluster, with a token made there, and run it. Later it is started with `coordinator start`.
    Join(Join),
    /// Write all that a coordinator has recorded to a file. It may be running. The file contains the CA's private key.
    Backup(Backup),
    /// Make a cluster of one coordinator from a backup, in an empty data directory.
    Restore(Restore),
    /// Replace the cluster's CA, beside a running coordinator: a new one is made, to which all members move by themselves; then --finish
    /// ends trust in the old one.
    RotateCa(RotateCa),
}

#[derive(Args)]
struct Start {
    #[command(flatten)]
    run: Run,
    /// Fail rather than make a new cluster, should the data directory be empty.
    #[arg(long)]
    expect_existing: bool,
}

#[derive(Args)]
struct Join {
    /// A coordinator's address for clients, HOST:PORT; several separated by commas.
    #[arg(value_delimiter = ',', required = true)]
    addr: Vec<String>,
    /// A token for coordinators (`fleet token create --role coordinator`). Also taken from FLEET_TOKEN.
    #[arg(long)]
    token: Option<String>,
    /// File that holds the token.
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    #[command(flatten)]
    run: Run,
}

#[derive(Args)]
struct Backup {
    /// The coordinator's data directory.
    #[arg(long, value_name = "DIR", default_value = "fleet-data")]
    data_dir: PathBuf,
    /// Where to write the backup.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Leave out what is damaged and cannot be read, and say what that is.
    #[arg(long)]
    salvage: bool,
    /// Also where this coordinator does not have all that the cluster has recorded.
    #[arg(long)]
    allow_behind: bool,
}

#[derive(Args)]
struct Restore {
    /// The backup.
    file: PathBuf,
    /// Directory to make, which must hold no coordinator.
    #[arg(long, value_name = "DIR", default_value = "fleet-data")]
    data_dir: PathBuf,
}

#[derive(Args)]
struct RotateCa {
    /// The coordinator's data directory, whose credential is an admin's.
    #[arg(long, value_name = "DIR", default_value = "fleet-data")]
    data_dir: PathBuf,
    /// Say how far it is, and change nothing.
    #[arg(long, conflicts_with = "finish")]
    status: bool,
    /// The old CA is not trusted any more. Refused while workers or clients have not moved.
    #[arg(long)]
    finish: bool,
    /// Finish also if some have not moved. They join again with a token.
    #[arg(long, requires = "finish")]
    force: bool,
}

#[derive(Args)]
struct Run {
    /// Where the cluster's CA, log and tokens are kept.
    #[arg(long, value_name = "DIR", default_value = "fleet-data")]
    data_dir: PathBuf,
    /// Where clients connect and members join (QUIC); port 0 takes a free one [default: as at the last start, at first 127.0.0.1:7070].
    #[arg(long, value_name = "ADDR")]
    listen: Option<SocketAddr>,
    /// Where workers and other coordinators connect (QUIC) [default: as at the last start, at first the port after the one of --listen].
    #[arg(long, value_name = "ADDR")]
    member_listen: Option<SocketAddr>,
    /// Under which address others find this coordinator, where that is not the one of --listen [default: as at the last start].
    #[arg(long, value_name = "HOST:PORT")]
    advertise: Option<String>,
    /// Under which address workers and coordinators find it, where that is not the host of --advertise with the port of --member-listen
    /// [default: as at the last start].
    #[arg(long, value_name = "HOST:PORT")]
    member_advertise: Option<String>,
    /// Where people and Prometheus look (HTTP); port 0 takes a free one [default: as at the last start, at first 127.0.0.1:7080]. On other
    /// addresses than loopback it is served over TLS, to whoever has a login of `fleet web token` or a certificate of the cluster.
    #[arg(long, value_name = "ADDR")]
    http: Option<SocketAddr>,
    /// A certificate for it in PEM, with those that lead to its CA [default: one that the cluster's CA makes].
    #[arg(long, value_name = "FILE", requires = "http_key")]
    http_cert: Option<PathBuf>,
    /// The key of --http-cert, in PEM.
    #[arg(long, value_name = "FILE", requires = "http_cert")]
    http_key: Option<PathBuf>,
    /// Name of this coordinator in listings.
    #[arg(long)]
    name: Option<String>,
    /// How long certificates hold, such as 30d; they are renewed when a third is left.
    #[arg(long, value_name = "TIME", value_parser = life, default_value = "30d")]
    certificate_life: Duration,
    /// auto, human or json.
    #[arg(long, value_name = "FORMAT", default_value = "auto")]
    log_format: LogFormat,
    /// Stop when this process, which started this one, ends.
    #[arg(long, value_name = "PID")]
    die_with_parent: Option<u32>,
}

/// Certificates shorter than this could end before they are renewed.
const LIFE_MIN: Duration = Duration::from_secs(3);

fn life(text: &str) -> Result<Duration, String> {
    let bad = || "write it like 12h or 30d, at least 3s and at most 30d".to_owned();
    let (number, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()));
    let seconds = match unit {
        "" | "s" => 1,
        "m" => 60,
        "h" => 3600,
        "d" => 86_400,
        _ => return Err(bad()),
    };
    let life = number.parse::<u32>().ok().and_then(|number| u64::from(number).checked_mul(seconds));
    let life = life.map(Duration::from_secs);
    life.filter(|life| (LIFE_MIN..=CERTIFICATE_LIFE).contains(life)).ok_or_else(bad)
}

fn main() -> ExitCode {
    signals::mind_no_file_limit();
    // RocksDB makes its files as the process may; a coordinator starts no programs.
    files::restrict_process();
    let done = match arguments::parse::<Cli>().command {
        Command::Start(start) => run(start.run, start.expect_existing, None),
        Command::Join(join) => token(&join).and_then(|token| run(join.run, false, Some((join.addr, token)))),
        Command::Backup(args) => save(&args),
        Command::Restore(args) => load(&args),
        Command::RotateCa(args) => rotate_ca(&args),
    };
    match done {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("error: {}", terminal::plain(&format!("{error:#}")));
            let net = error.downcast_ref::<NetError>().map(NetError::exit_code);
            let io = error.downcast_ref::<std::io::Error>().map(std::io::Error::kind);
            let input = (io == Some(std::io::ErrorKind::InvalidInput)).then_some(exit::REFUSED_INPUT);
            let refused = error.downcast_ref::<operator::Refused>().map(operator::Refused::exit_code);
            let token = error.downcast_ref::<TokenError>().map(TokenError::exit_code);
            let unknown = error.is::<operator::Undecided>().then_some(exit::UNKNOWN);
            ExitCode::from(unknown.or(net).or(token).or(input).or(refused).unwrap_or(exit::ENVIRONMENT))
        }
    }
}

fn token(join: &Join) -> Result<JoinToken> {
    let env = std::env::var("FLEET_TOKEN").ok();
    let given = JoinToken::from_sources(join.token_file.as_deref(), env.as_deref(), join.token.as_deref())?;
    Ok(JoinToken::expect(given, Role::Coordinator)?)
}

fn save(args: &Backup) -> Result<u8> {
    telemetry::init(LogFormat::Auto, "warn");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.context("cannot start an event loop")?;
    // Asked first: a coordinator that is not behind has at least this when it is read.
    let committed = runtime.block_on(behind::committed(&args.data_dir));
    let at_least = match &committed {
        Ok(committed) if !args.allow_behind => *committed,
        _ => 0,
    };
    let Backup { data_dir, out, salvage, .. } = args;
    let summary = backup::backup(backup::Wanted { data_dir, out, salvage: *salvage, at_least })?;
    println!(
        "{}: cluster {} up to entry {}; it contains the CA's private key, so keep it as secret as that",
        args.out.display(),
        summary.cluster_id,
        summary.log_index
    );
    match committed {
        Ok(committed) if committed > summary.log_index => eprintln!(
            "warning: this coordinator is behind the cluster by {} entries: that is at entry {committed}",
            committed - summary.log_index
        ),
        Ok(_) => {}
        Err(why) => eprintln!(
            "warning: whether the cluster has recorded more than that is not known ({why}); compare with `fleet coordinators ls`"
        ),
    }
    say_what_is_missing(&summary);
    Ok(exit::SUCCEEDED)
}

fn load(args: &Restore) -> Result<u8> {
    telemetry::init(LogFormat::Auto, "warn");
    let summary = restore::restore(&args.file, &Options::local(args.data_dir.clone()))?;
    println!(
        "{}: cluster {} as it was at entry {}; start it with `coordinator start --data-dir {}` and join the others anew",
        args.data_dir.display(),
        summary.cluster_id,
        summary.log_index,
        args.data_dir.display()
    );
    say_what_is_missing(&summary);
    Ok(exit::SUCCEEDED)
}

fn say_what_is_missing(summary: &backup::Summary) {
    for gap in &summary.left_out {
        eprintln!("warning: damaged and left out: {gap}");
    }
}

fn rotate_ca(args: &RotateCa) -> Result<u8> {
    telemetry::init(LogFormat::Auto, "warn");
    let step = match (args.status, args.finish) {
        (true, _) => Step::Status,
        (_, true) => Step::Finish { force: args.force },
        _ => Step::Begin,
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let said =
        runtime.context("cannot start an event loop")?.block_on(operator::rotate_ca(&args.data_dir, step))?;
    println!("{said}");
    Ok(exit::SUCCEEDED)
}

fn run(run: Run, expect_existing: bool, join: Option<(Vec<String>, JoinToken)>) -> Result<u8> {
    telemetry::init(run.log_format, "info");
    if let Some(parent) = run.die_with_parent {
        fleet_common::parent::die_with(parent)?;
    }
    let options = Options {
        data_dir: run.data_dir,
        places: Places {
            listen: run.listen,
            member_listen: run.member_listen,
            http: run.http,
            advertise: run.advertise,
            member_advertise: run.member_advertise,
            http_cert: run.http_cert,
            http_key: run.http_key,
        },
        expect_existing,
        name: run.name,
        certificate_life: run.certificate_life,
    };
    // This thread only waits for the end; the work is done on others.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.context("cannot start an event loop")?.block_on(serve(options, join))
}

async fn serve(options: Options, join: Option<(Vec<String>, JoinToken)>) -> Result<u8> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let start = async {
        match join {
            Some((addrs, token)) => Coordinator::join(&addrs, &token, options).await,
            None => Coordinator::start(options).await,
        }
    };
    let mut coordinator = tokio::select! {
        started = start => started?,
        _ = terminate.recv() => return Ok(exit::SIGTERM),
        _ = interrupt.recv() => return Ok(exit::SIGINT),
    };
    // Whoever started this one may have stopped listening; that is no reason to stop.
    let _ = writeln!(std::io::stdout(), "{}", serde_json::to_string(coordinator.endpoint())?);
    let code = tokio::select! {
        error = coordinator.failed() => return Err(error),
        _ = terminate.recv() => exit::SIGTERM,
        _ = interrupt.recv() => exit::SIGINT,
    };
    info!("stopping");
    coordinator.stop().await;
    Ok(code)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn certificates_hold_for_a_time_between_seconds_and_a_month() {
        assert_eq!(life("30d"), Ok(CERTIFICATE_LIFE));
        assert_eq!(life("12h"), Ok(Duration::from_secs(43_200)));
        for bad in ["", "d", "1s", "31d", "5w", "-1h", "99999999999d"] {
            assert!(life(bad).is_err(), "{bad}");
        }
    }
}
