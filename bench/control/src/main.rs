//! Benchmarks of the control plane with real processes. Prints tables of both sides, measured in turn in one run.
//!
//! `etcd`: three coordinators beside three members of Debian's etcd, each with fsync and mutual TLS, on the same disk: changes of 256
//! bytes at 1, 16 and 256 clients, failover over repeated kills of the leader, and elections while other work fills all cores.
//! `nodes`: coordinators with thousands of simulated nodes that heartbeat.

mod burn;
mod etcd;
mod fleet;
mod load;
mod measure;
mod nodes;
mod proc;

use anyhow::Result;
use clap::{Parser, Subcommand};
use std::path::PathBuf;
use std::time::Duration;

#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Beside etcd.
    Etcd {
        /// Directory of the `coordinator` program.
        #[arg(long, value_name = "DIR", default_value = "target/debug")]
        bin: PathBuf,
        /// Where both sides keep their data.
        #[arg(long, value_name = "DIR")]
        disk: Option<PathBuf>,
        #[arg(long, default_value_t = 5)]
        rounds: usize,
        /// Of one load in one round.
        #[arg(long, default_value_t = 4)]
        seconds: u64,
        #[arg(long, value_delimiter = ',', default_value = "1,16,256")]
        clients: Vec<usize>,
        #[arg(long, default_value_t = 20)]
        kills: usize,
        /// Of other work on all cores.
        #[arg(long, default_value_t = 30)]
        burn_seconds: u64,
    },
    /// Simulated nodes at one heartbeat per second.
    Nodes {
        #[arg(long, value_name = "DIR", default_value = "target/debug")]
        bin: PathBuf,
        #[arg(long, value_name = "DIR")]
        disk: Option<PathBuf>,
        #[arg(long, value_delimiter = ',', default_value = "1000,10000")]
        nodes: Vec<usize>,
        #[arg(long, default_value_t = 20)]
        seconds: u64,
    },
}

fn main() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(async {
        match Cli::parse().command {
            Command::Etcd { bin, disk, rounds, seconds, clients, kills, burn_seconds } => {
                let disk = proc::disk(disk.as_deref())?;
                let plan = load::Plan { rounds, seconds: Duration::from_secs(seconds), clients };
                load::beside_etcd(&bin, disk.path(), &plan, kills, Duration::from_secs(burn_seconds)).await
            }
            Command::Nodes { bin, disk, nodes, seconds } => {
                let disk = proc::disk(disk.as_deref())?;
                for count in nodes {
                    let dir = disk.path().join(format!("nodes-{count}"));
                    nodes::run(&bin, &dir, count, Duration::from_secs(seconds)).await?;
                }
                Ok(())
            }
        }
    })
}
