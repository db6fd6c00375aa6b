//! The same load on both sides, in turn.

use crate::burn::Burn;
use crate::etcd::Etcd;
use crate::fleet::Fleet;
use crate::measure::{Sample, fsync_ms, median, sample, worst};
use anyhow::{Context, Result};
use std::path::Path;
use std::time::{Duration, Instant};
use tokio::task::JoinSet;

/// Connections that the clients of one load share, on both sides.
const CONNECTIONS: usize = 16;
/// Between two attempts at one survivor after a kill, on both sides.
const ATTEMPT_EVERY: Duration = Duration::from_millis(20);
/// For a cluster to settle after a member came back.
const SETTLE: Duration = Duration::from_secs(2);

pub struct Plan {
    pub rounds: usize,
    pub seconds: Duration,
    pub clients: Vec<usize>,
}

/// A durable change of 256 bytes.
pub trait Put: Clone + Send + 'static {
    fn put(&mut self) -> impl Future<Output = Result<()>> + Send;
}

/// Three members.
pub trait Cluster {
    type Client: Put;
    const NAME: &'static str;

    async fn leader(&self) -> Result<usize>;
    async fn term(&self) -> Result<u64>;
    /// Clients of one member that share some connections.
    async fn clients(&self, at: usize, count: usize, connections: usize) -> Result<Vec<Self::Client>>;
    fn kill(&mut self, n: usize) -> Result<()>;
    /// Returns when the member takes part again.
    async fn restart(&mut self, n: usize) -> Result<()>;
    /// Processor seconds of all members so far.
    fn cpu_s(&self) -> Result<f64>;
}

pub async fn beside_etcd(bin: &Path, disk: &Path, plan: &Plan, kills: usize, burn: Duration) -> Result<()> {
    let mut etcd = Etcd::start(&disk.join("etcd")).await.context("etcd (Debian: etcd-server)")?;
    let mut fleet = Fleet::start(bin, &disk.join("fleet"), 3).await.context("fleet")?;
    println!("fsync of 256 bytes: median {:.3} ms on {}", fsync_ms(disk)?, disk.display());
    println!(
        "clients share {CONNECTIONS} connections to the leader; medians of {} rounds, in turn\n",
        plan.rounds
    );
    println!("| clients | | puts/s | p50 ms | p99 ms | cores | throughput | p99 |");
    println!("|---|---|---|---|---|---|---|---|");
    for count in &plan.clients {
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for _ in 0..plan.rounds {
            ours.push(round(&fleet, *count, plan.seconds).await?);
            theirs.push(round(&etcd, *count, plan.seconds).await?);
        }
        let of = |samples: &[Sample], value: fn(&Sample) -> f64| median(samples.iter().map(value));
        let ratio = |value: fn(&Sample) -> f64| of(&ours, value) / of(&theirs, value);
        for (name, samples) in [(Fleet::NAME, &ours), (Etcd::NAME, &theirs)] {
            let ratios = if name == Fleet::NAME {
                format!("{:.2} x | {:.2} x", ratio(|s| s.puts_per_s), ratio(|s| s.p99_ms))
            } else {
                "|".to_owned()
            };
            println!(
                "| {count} | {name} | {:.0} | {:.2} | {:.2} | {:.2} | {ratios} |",
                of(samples, |s| s.puts_per_s),
                of(samples, |s| s.p50_ms),
                of(samples, |s| s.p99_ms),
                of(samples, |s| s.cores),
            );
        }
    }
    if burn > Duration::ZERO {
        println!();
        calm(&fleet, burn).await?;
        calm(&etcd, burn).await?;
    }
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for _ in 0..kills {
        ours.push(failover(&mut fleet).await?);
        theirs.push(failover(&mut etcd).await?);
    }
    if kills > 0 {
        println!(
            "\nfailover over {kills} kills of the leader, to the first change that a survivor acknowledges:"
        );
        for (name, times) in [(Fleet::NAME, &ours), (Etcd::NAME, &theirs)] {
            let each: Vec<String> = times.iter().map(|time| format!("{time:.2}")).collect();
            let (median, worst) = (median(times.iter().copied()), worst(times));
            println!("  {name}: median {median:.2} s, worst {worst:.2} s ({})", each.join(" "));
        }
    }
    Ok(())
}

async fn round<C: Cluster>(cluster: &C, count: usize, length: Duration) -> Result<Sample> {
    let clients = cluster.clients(cluster.leader().await?, count, CONNECTIONS).await?;
    let (cpu, start) = (cluster.cpu_s()?, Instant::now());
    let mut tasks = JoinSet::new();
    for mut client in clients {
        tasks.spawn(async move {
            let mut latencies = Vec::new();
            while start.elapsed() < length {
                let begin = Instant::now();
                client.put().await?;
                latencies.push(begin.elapsed());
            }
            Ok::<_, anyhow::Error>(latencies)
        });
    }
    let mut latencies = Vec::new();
    while let Some(done) = tasks.join_next().await {
        latencies.extend(done??);
    }
    Ok(sample(latencies, start.elapsed(), cluster.cpu_s()? - cpu))
}

/// Elections while four threads keep all cores busy and a client writes.
async fn calm<C: Cluster>(cluster: &C, length: Duration) -> Result<()> {
    let before = cluster.term().await?;
    let burn = Burn::start(4);
    let sample = round(cluster, 1, length).await?;
    drop(burn);
    println!(
        "{}: {} elections in {} s with four busy threads; {:.0} puts/s, p99 {:.1} ms",
        C::NAME,
        cluster.term().await? - before,
        length.as_secs(),
        sample.puts_per_s,
        sample.p99_ms
    );
    Ok(())
}

/// Seconds from the leader's kill -9 to the first change that one of the others acknowledges.
async fn failover<C: Cluster>(cluster: &mut C) -> Result<f64> {
    let leader = cluster.leader().await?;
    let mut survivors = Vec::new();
    for n in (0..3).filter(|n| *n != leader) {
        survivors.extend(cluster.clients(n, 1, 1).await?);
    }
    for client in &mut survivors {
        client.put().await?;
    }
    let start = Instant::now();
    cluster.kill(leader)?;
    let mut attempts = JoinSet::new();
    let mut every = tokio::time::interval(ATTEMPT_EVERY);
    let took = loop {
        tokio::select! {
            _ = every.tick() => for client in &survivors {
                let mut client = client.clone();
                attempts.spawn(async move { client.put().await.is_ok() });
            },
            Some(Ok(true)) = attempts.join_next() => break start.elapsed(),
        }
    };
    attempts.shutdown().await;
    cluster.restart(leader).await?;
    tokio::time::sleep(SETTLE).await;
    Ok(took.as_secs_f64())
}
