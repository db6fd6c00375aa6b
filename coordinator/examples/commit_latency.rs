//! Measures what a change costs: the disk's sync alone, and a client's request over QUIC, through the log, until its durable answer.
//!
//! `cargo run -p fleet-coordinator --example commit_latency [DIR]`; prints milliseconds and requests per second.

use fleet_common::codec::{read_frame, write_frame};
use fleet_common::ids::{ClientId, JobId};
use fleet_common::net::{self, Identity};
use fleet_common::protocol::{ClientFrame, Reply, Request};
use fleet_coordinator::server::{Coordinator, Options};
use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

const SYNCS: usize = 200;
const REQUESTS: usize = 2_000;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let parent = std::env::args().nth(1).unwrap_or_else(|| std::env::temp_dir().display().to_string());
    let dir = tempfile::tempdir_in(parent)?;
    print("write and sync of 256 bytes", sync_times(dir.path())?, Duration::ZERO);
    let options = Options::local(dir.path().join("data"));
    let began = Instant::now();
    let coordinator = Coordinator::start(options.clone()).await?;
    println!("first start: {:.0} ms", began.elapsed().as_secs_f64() * 1e3);
    let identity = Identity::load(&options.data_dir.join("client"))?
        .ok_or_else(|| anyhow::anyhow!("no client identity"))?;
    let address = coordinator.endpoint().quic.clone();
    for clients in [1, 16, 64] {
        let began = Instant::now();
        let tasks: Vec<_> = (0..clients)
            .map(|at| {
                tokio::spawn(client(
                    address.clone(),
                    identity.clone(),
                    (clients * 1000 + at) as u128,
                    REQUESTS / clients,
                ))
            })
            .collect();
        let mut times = Vec::new();
        for task in tasks {
            times.extend(task.await??);
        }
        print(&format!("change, {clients} clients"), times, began.elapsed());
    }
    coordinator.stop().await;
    let began = Instant::now();
    let coordinator = Coordinator::start(options).await?;
    println!("restart: {:.0} ms", began.elapsed().as_secs_f64() * 1e3);
    coordinator.stop().await;
    Ok(())
}

/// Cancels a job that does not exist: a whole trip through session, log and state that leaves the state small.
async fn client(
    address: String,
    identity: Identity,
    id: u128,
    requests: usize,
) -> anyhow::Result<Vec<Duration>> {
    let connection = net::connect(&[address], &identity).await?;
    let mut times = Vec::with_capacity(requests);
    for seq in 1..=requests as u64 {
        let began = Instant::now();
        let (mut send, mut receive) = connection.open_bi().await?;
        let request = Request::Cancel { job: JobId(u64::MAX), now: true };
        write_frame(&mut send, &ClientFrame::change(ClientId(id), seq, request)).await?;
        send.finish()?;
        let reply: Option<Reply> = read_frame(&mut receive).await?;
        anyhow::ensure!(
            matches!(reply, Some(Reply::Refused(_))),
            "not the answer that was expected: {reply:?}"
        );
        times.push(began.elapsed());
    }
    Ok(times)
}

fn sync_times(dir: &Path) -> anyhow::Result<Vec<Duration>> {
    let mut file = std::fs::File::create(dir.join("sync"))?;
    let mut times = Vec::new();
    for _ in 0..SYNCS {
        let began = Instant::now();
        file.write_all(&[7; 256])?;
        file.sync_data()?;
        times.push(began.elapsed());
    }
    Ok(times)
}

fn print(what: &str, mut times: Vec<Duration>, total: Duration) {
    times.sort();
    let at = |share: f64| times[((times.len() - 1) as f64 * share) as usize].as_secs_f64() * 1e3;
    let rate = if total.is_zero() {
        String::new()
    } else {
        format!(", {:.0}/s", times.len() as f64 / total.as_secs_f64())
    };
    println!("{what}: median {:.2} ms, p99 {:.2} ms{rate}", at(0.5), at(0.99));
}
