//! Measures what history costs: 10,000 finished runs with 1,000,000 points, recorded through a replica's log on RocksDB, then the
//! memory of the process and the time to open it again.
//!
//! `cargo run -p fleet-coordinator --example history [RUNS [POINTS_PER_RUN]]`

use anyhow::{Context, Result};
use fleet_common::ids::RunId;
use fleet_common::protocol::Point;
use fleet_coordinator::cluster::commands::{Change, FinishRun, RecordMetrics, StartRun};
use fleet_coordinator::cluster::{Command, State};
use fleet_coordinator::raft::history::History;
use fleet_coordinator::raft::replica::Replica;
use fleet_coordinator::raft::rocks::RocksDisk;
use std::sync::Arc;
use std::time::Instant;

/// Commands that share a sync.
const TOGETHER: usize = 64;

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1).map(|text| text.parse::<u64>());
    let runs = arguments.next().transpose()?.unwrap_or(10_000);
    let points = arguments.next().transpose()?.unwrap_or(100);
    let dir = tempfile::tempdir()?;
    let raft = dir.path().join("raft");
    let begun = Instant::now();
    record(&raft, runs, points)?;
    println!("recorded {runs} runs with {} points in {:.1} s", runs * points, begun.elapsed().as_secs_f64());
    println!(
        "memory while recording: {} MiB at the most, {} MiB at the end",
        memory("VmHWM")?,
        memory("VmRSS")?
    );

    let begun = Instant::now();
    let disk = Arc::new(RocksDisk::open(&raft)?);
    let mut replica = Replica::open(disk.clone(), 1)?.context("the log is gone")?;
    replica.process(&mut |_| {})?;
    let seconds = begun.elapsed().as_secs_f64();
    println!("opened again and caught up in {seconds:.2} s, applied to {}", replica.applied_index());
    let history = History::new(disk);
    let begun = Instant::now();
    let mut read = 0;
    for run in 1..=runs {
        read += history.points(RunId(run), 1)?.context("a run has lost its points")?.len() as u64;
    }
    println!("read {read} points back in {:.2} s", begun.elapsed().as_secs_f64());
    println!("memory at the end: {} MiB", memory("VmRSS")?);
    anyhow::ensure!(read == runs * points, "points are missing");
    Ok(())
}

fn record(dir: &std::path::Path, runs: u64, points: u64) -> Result<()> {
    let disk = Arc::new(RocksDisk::open(dir)?);
    let mut replica = Replica::create(disk, 1, &[1], State::new("measured".into()), 1)?;
    let mut ticket = 0;
    let mut waiting = 0;
    let mut propose = |replica: &mut Replica<RocksDisk>, change| -> Result<()> {
        ticket += 1;
        waiting += 1;
        let command = Command { unix_ms: ticket, request: None, by: None, why: None, change };
        replica.propose(ticket, &command).map_err(|declined| anyhow::anyhow!("{declined:?}"))?;
        if waiting >= TOGETHER {
            waiting = 0;
            replica.process(&mut |_| {})?;
        }
        Ok(())
    };
    replica.process(&mut |_| {})?;
    for run in (1..=runs).map(RunId) {
        propose(&mut replica, Change::StartRun(StartRun { name: format!("run number {run}") }))?;
        let point = |step| Point { series: "loss".into(), step, value: 1.0 / step as f64, unix_ms: step };
        let points = (1..=points).map(point).collect();
        propose(&mut replica, Change::RecordMetrics(RecordMetrics { run, points }))?;
        propose(&mut replica, Change::FinishRun(FinishRun { run, succeeded: true }))?;
    }
    replica.process(&mut |_| {})?;
    anyhow::ensure!(replica.state().last_run() == runs, "runs are missing");
    Ok(())
}

/// A line of `/proc/self/status`, in MiB.
fn memory(line: &str) -> Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let value = status.lines().find_map(|text| text.strip_prefix(line)?.strip_prefix(':'));
    let kib: u64 = value.and_then(|text| text.split_whitespace().next()).context("no such line")?.parse()?;
    Ok(kib >> 10)
}
