//! Thousands of simulated nodes: each joined with a token, connected with its own certificate, and saying every second that it lives.
//!
//! Three coordinators hold them. Measured: what the coordinators use, how long a heartbeat takes to be acknowledged, and, after one
//! coordinator's kill -9, how long until every node has been acknowledged again.

use crate::fleet::Fleet;
use crate::load::Cluster;
use crate::measure;
use anyhow::{Context, Result, bail};
use fleet_common::codec;
use fleet_common::net::{self, Identity, JoinToken};
use fleet_common::protocol::{AgentHello, FromAgent, PROTOCOL_VERSION, ToAgent};
use quinn::Endpoint;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

const HEARTBEAT: Duration = Duration::from_secs(1);
/// Nodes that join or connect at once: the load generator shares the machine with what it measures.
const AT_ONCE: usize = 32;
/// Between looks at all of them.
const LOOK: Duration = Duration::from_millis(50);
/// That the simulated nodes share.
const SOCKETS: usize = 16;
/// A heartbeat that takes longer than this is a lost connection.
const PATIENCE: Duration = Duration::from_secs(3);

/// What a node tells the rest of the benchmark.
#[derive(Default)]
struct Beat {
    /// Milliseconds since the begin, plus one, of the last acknowledgement; 0 before the first.
    acknowledged_ms: AtomicU64,
    /// Which coordinator holds it, by port of its member socket.
    port: AtomicU64,
}

impl Beat {
    /// By a welcome or an answer to a heartbeat.
    fn acknowledged(&self, common: &Common) {
        self.acknowledged_ms.store(common.begin.elapsed().as_millis() as u64 + 1, Ordering::Relaxed);
    }

    fn is_since(&self, ms: u64) -> bool {
        self.acknowledged_ms.load(Ordering::Relaxed) > ms
    }
}

struct Common {
    begin: Instant,
    addresses: Vec<String>,
    latencies: std::sync::Mutex<Vec<Duration>>,
    connecting: Semaphore,
    /// Nodes on machines of their own have one each; here so many would use more of the machine than what is measured.
    sockets: Vec<Endpoint>,
}

pub async fn run(bin: &Path, dir: &Path, count: usize, length: Duration) -> Result<()> {
    let mut fleet = Fleet::start(bin, dir, 3).await?;
    let token = std::fs::read_to_string(fleet.data_dir(0).join("tokens/worker.token"))?;
    let token: JoinToken = token.trim().parse()?;
    let clients: Vec<String> = (0..3).map(|n| Ok(fleet.endpoint(n)?.quic)).collect::<Result<_>>()?;
    let addresses: Vec<String> = (0..3).map(|n| Ok(fleet.endpoint(n)?.member)).collect::<Result<_>>()?;

    let begin = Instant::now();
    let identities = join_all(count, &token, &clients).await?;
    println!("\n{count} nodes joined in {:.1} s", begin.elapsed().as_secs_f64());

    let common = Arc::new(Common {
        begin,
        addresses,
        latencies: std::sync::Mutex::default(),
        connecting: Semaphore::new(AT_ONCE),
        sockets: (0..SOCKETS)
            .map(|_| Ok(Endpoint::client("127.0.0.1:0".parse()?)?))
            .collect::<Result<_>>()?,
    });
    let beats: Vec<Arc<Beat>> = (0..count).map(|_| Arc::default()).collect();
    let mut tasks = JoinSet::new();
    let connecting = Instant::now();
    for (n, (identity, beat)) in identities.into_iter().zip(beats.clone()).enumerate() {
        tasks.spawn(live(n, identity, beat, common.clone()));
    }
    all_since(&beats, 0, Duration::from_secs(300)).await?;
    println!("all connected and acknowledged after {:.1} s", connecting.elapsed().as_secs_f64());

    tokio::time::sleep(Duration::from_secs(3)).await;
    common.latencies.lock().expect("nobody panics holding it").clear();
    let before: Vec<f64> = (0..3).map(|n| Ok(fleet.usage(n)?.0)).collect::<Result<_>>()?;
    let start = Instant::now();
    tokio::time::sleep(length).await;
    let took = start.elapsed();
    let latencies = std::mem::take(&mut *common.latencies.lock().expect("nobody panics holding it"));
    let after: Vec<(f64, f64)> = (0..3).map(|n| fleet.usage(n)).collect::<Result<_>>()?;
    let cpu: f64 = after.iter().zip(&before).map(|((cpu, _), before)| cpu - before).sum();
    let sample = measure::sample(latencies, took, cpu);
    println!("| nodes | heartbeats/s | p50 ms | p99 ms | cores of three coordinators | MiB of each |");
    println!("|---|---|---|---|---|---|");
    let memory: Vec<String> = after.iter().map(|(_, mib)| format!("{mib:.0}")).collect();
    println!(
        "| {count} | {:.0} | {:.2} | {:.2} | {:.2} | {} |",
        sample.puts_per_s,
        sample.p50_ms,
        sample.p99_ms,
        sample.cores,
        memory.join(" + ")
    );

    let leader = fleet.leader().await?;
    let port = u64::from(port_of(&common.addresses[leader])?);
    let held: Vec<Arc<Beat>> =
        beats.iter().filter(|beat| beat.port.load(Ordering::Relaxed) == port).cloned().collect();
    let killed_ms = common.begin.elapsed().as_millis() as u64;
    fleet.kill(leader)?;
    println!("after kill -9 of the leader, which held {} of them, acknowledged again:", held.len());
    for percent in [50, 90, 99, 100] {
        let enough = held.len() * percent / 100;
        while held.iter().filter(|beat| beat.is_since(killed_ms + 1)).count() < enough {
            if common.begin.elapsed().as_millis() as u64 > killed_ms + 60_000 {
                bail!("fewer than {percent} % of them within 60 s");
            }
            tokio::time::sleep(LOOK).await;
        }
        let back_ms = common.begin.elapsed().as_millis() as u64 - killed_ms;
        println!("  {percent} % within {:.1} s", back_ms as f64 / 1e3);
    }
    all_since(&beats, killed_ms + 1, Duration::from_secs(60)).await?;
    let back_ms = common.begin.elapsed().as_millis() as u64 - killed_ms;
    println!("  and all {count} nodes within {:.1} s", back_ms as f64 / 1e3);
    tasks.shutdown().await;
    Ok(())
}

async fn join_all(count: usize, token: &JoinToken, clients: &[String]) -> Result<Vec<Identity>> {
    let permits = Arc::new(Semaphore::new(AT_ONCE / 2));
    let mut joins = JoinSet::new();
    for n in 0..count {
        let (token, clients, permits) = (token.clone(), clients.to_vec(), permits.clone());
        joins.spawn(async move {
            let _permit = permits.acquire_owned().await?;
            Ok::<_, anyhow::Error>(net::join(&clients, &token, &format!("sim-{n}")).await?.identity)
        });
    }
    let mut identities = Vec::with_capacity(count);
    while let Some(joined) = joins.join_next().await {
        identities.push(joined??);
    }
    Ok(identities)
}

/// Connects for ever.
async fn live(n: usize, identity: Identity, beat: Arc<Beat>, common: Arc<Common>) {
    // Spread over the coordinators, as nodes are that find them in different orders.
    let mut addresses = common.addresses.clone();
    addresses.rotate_left(n % common.addresses.len());
    loop {
        let _ended = session(n, &identity, &addresses, &beat, &common).await;
        // The one that was lost comes last, and the others share those that it held.
        let lost = beat.port.load(Ordering::Relaxed);
        addresses.sort_by_key(|address| port_of(address).is_ok_and(|port| u64::from(port) == lost));
        addresses.swap(0, (n / common.addresses.len()) % 2);
    }
}

async fn session(
    n: usize,
    identity: &Identity,
    addresses: &[String],
    beat: &Beat,
    common: &Common,
) -> Result<()> {
    let permit = common.connecting.acquire().await?;
    let connection = net::connect_from(&common.sockets[n % SOCKETS], addresses, identity).await?;
    let (mut send, mut receive) = connection.open_bi().await?;
    let hello = AgentHello {
        version: PROTOCOL_VERSION,
        name: format!("sim-{n}"),
        slots: 8,
        device: "cpu".into(),
        program_version: "bench".into(),
        labels: Default::default(),
        host: "127.0.0.1".into(),
        checkpoint_port: 0,
        process: 1,
        gangs: Vec::new(),
        lost: Vec::new(),
        earlier: Vec::new(),
    };
    codec::write_frame(&mut send, &FromAgent::Hello(hello)).await?;
    let welcome = tokio::time::timeout(PATIENCE, codec::read_frame(&mut receive)).await??;
    let Some(ToAgent::Welcome { .. }) = welcome else { bail!("not welcome: {welcome:?}") };
    drop(permit);
    beat.acknowledged(common);
    beat.port.store(u64::from(connection.remote_address().port()), Ordering::Relaxed);
    // Not all in the same instant.
    tokio::time::sleep(HEARTBEAT.mul_f64((n % 997) as f64 / 997.0)).await;
    let mut every = tokio::time::interval(HEARTBEAT);
    loop {
        every.tick().await;
        let sent = Instant::now();
        codec::write_frame(&mut send, &FromAgent::Heartbeat { unix_ms: 0 }).await?;
        loop {
            match tokio::time::timeout(PATIENCE, codec::read_frame(&mut receive)).await?? {
                Some(ToAgent::Heard { .. }) => break,
                Some(_) => {}
                None => bail!("closed"),
            }
        }
        common.latencies.lock().expect("nobody panics holding it").push(sent.elapsed());
        beat.acknowledged(common);
    }
}

/// Until every node was acknowledged after this time.
async fn all_since(beats: &[Arc<Beat>], since_ms: u64, patience: Duration) -> Result<()> {
    let begin = Instant::now();
    loop {
        let missing = beats.iter().filter(|beat| !beat.is_since(since_ms)).count();
        if missing == 0 {
            return Ok(());
        }
        if begin.elapsed() > patience {
            bail!("{missing} of {} nodes were not acknowledged within {patience:?}", beats.len());
        }
        tokio::time::sleep(LOOK).await;
    }
}

fn port_of(address: &str) -> Result<u16> {
    Ok(address.rsplit(':').next().context("no port")?.parse()?)
}
