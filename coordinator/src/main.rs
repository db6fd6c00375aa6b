//! `coordinator`: starts a replica of the control plane.

use anyhow::{Context, Result};
use clap::{Args, Parser, Subcommand};
use fleet_common::exit;
use fleet_common::telemetry::{self, LogFormat};
use fleet_coordinator::server::{Coordinator, Options};
use std::io::Write;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use tokio::signal::unix::{SignalKind, signal};
use tracing::info;

/// The control plane of a fleet cluster.
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Start a coordinator; on an empty data directory this makes a new cluster.
    Start(Start),
}

#[derive(Args)]
struct Start {
    /// Where the cluster's CA, log and tokens are kept.
    #[arg(long, value_name = "DIR", default_value = "fleet-data")]
    data_dir: PathBuf,
    /// Where workers and clients connect (QUIC); port 0 takes a free one.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:7070")]
    listen: SocketAddr,
    /// Under which address others find this coordinator, where that is not the one of --listen.
    #[arg(long, value_name = "HOST:PORT")]
    advertise: Option<String>,
    /// Where people and Prometheus look (HTTP); port 0 takes a free one.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:7080")]
    http: SocketAddr,
    /// auto, human or json.
    #[arg(long, value_name = "FORMAT", default_value = "auto")]
    log_format: LogFormat,
    /// Stop when this process, which started this one, ends.
    #[arg(long, value_name = "PID")]
    die_with_parent: Option<u32>,
}

fn main() -> ExitCode {
    let Cli { command: Command::Start(start) } = Cli::parse();
    telemetry::init(start.log_format, "info");
    match run(start) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(exit::ENVIRONMENT)
        }
    }
}

fn run(start: Start) -> Result<u8> {
    if let Some(parent) = start.die_with_parent {
        fleet_common::parent::die_with(parent)?;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        // Connections wait most of the time; the raft thread is its own.
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start threads")?;
    runtime.block_on(serve(start))
}

async fn serve(start: Start) -> Result<u8> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let options = Options {
        data_dir: start.data_dir,
        listen: start.listen,
        http: start.http,
        advertise: start.advertise,
    };
    let mut coordinator = tokio::select! {
        started = Coordinator::start(options) => started?,
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
