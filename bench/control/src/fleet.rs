//! fleet's side: coordinator processes, and clients that record metrics of 256 bytes.

use crate::load::{Cluster, Put};
use crate::proc::Server;
use anyhow::{Context, Result, anyhow, bail};
use fleet_common::codec;
use fleet_common::endpoint::Endpoint;
use fleet_common::ids::{ClientId, RunId};
use fleet_common::net::{self, Identity};
use fleet_common::protocol::{ClientFrame, ClusterView, Point, Reply, Request, Role};
use quinn::Connection;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// For a coordinator to listen and to be a voter.
const PATIENCE: Duration = Duration::from_secs(30);

pub struct Fleet {
    bin: PathBuf,
    dir: PathBuf,
    members: Vec<Option<Server>>,
    run: RunId,
    clients: AtomicU64,
}

impl Fleet {
    pub async fn start(bin: &Path, dir: &Path, members: usize) -> Result<Fleet> {
        std::fs::create_dir_all(dir)?;
        let mut fleet = Fleet {
            bin: bin.to_owned(),
            dir: dir.to_owned(),
            members: Vec::new(),
            run: RunId(0),
            clients: AtomicU64::new(0),
        };
        for n in 0..members {
            fleet.members.push(None);
            fleet.launch(n).await?;
        }
        let started =
            fleet.ask(0, ClientFrame::change(ClientId(99), 1, Request::StartRun { name: "bench".into() }));
        fleet.run = match started.await? {
            Reply::RunStarted(run) => run,
            other => bail!("no run was started: {other:?}"),
        };
        Ok(fleet)
    }

    pub fn data_dir(&self, n: usize) -> PathBuf {
        self.dir.join(format!("c{n}"))
    }

    async fn launch(&mut self, n: usize) -> Result<()> {
        let data = self.data_dir(n);
        let mut command = Command::new(self.bin.join("coordinator"));
        if n == 0 || data.join("endpoint.json").exists() {
            command.arg("start");
        } else {
            let first = self.endpoint(0)?;
            let create = Request::CreateToken { role: Role::Coordinator, ttl_s: 600, uses: 1 };
            let client = ClientId(100 + n as u128);
            let text = match self.ask(0, ClientFrame::change(client, 1, create)).await? {
                Reply::Token { text } => text,
                other => bail!("no token was made: {other:?}"),
            };
            command.args(["join", &first.quic]).env("FLEET_TOKEN", text);
        }
        command.arg("--data-dir").arg(&data);
        for flag in ["--listen", "--member-listen", "--http"] {
            command.args([flag, "127.0.0.1:0"]);
        }
        let log = self.dir.join(format!("c{n}.log"));
        let _ = std::fs::remove_file(data.join("ready"));
        self.members[n] = Some(Server::start(&mut command, &log)?);
        let begin = std::time::Instant::now();
        loop {
            if let Ok(Reply::Coordinators(all)) = self.ask(n, ClientFrame::query(Request::Coordinators)).await
                && all.iter().filter(|it| it.voter).count() > n.min(self.members.len() - 1)
            {
                return Ok(());
            }
            if begin.elapsed() > PATIENCE {
                bail!("coordinator {n} is no voter after {PATIENCE:?}; see {}", log.display());
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    pub fn endpoint(&self, n: usize) -> Result<Endpoint> {
        Endpoint::load(&self.data_dir(n))?.context("the coordinator has not listened yet")
    }

    /// One client's identity serves for all coordinators.
    fn identity(&self) -> Result<Identity> {
        Identity::load(&self.data_dir(0).join("client"))?.context("there is no client identity yet")
    }

    pub async fn connect(&self, n: usize) -> Result<Connection> {
        let (at, identity) = ([self.endpoint(n)?.quic], self.identity()?);
        Ok(tokio::time::timeout(Duration::from_secs(2), net::connect(&at, &identity)).await??)
    }

    async fn ask(&self, n: usize, frame: ClientFrame) -> Result<Reply> {
        exchange(&self.connect(n).await?, &frame).await
    }

    async fn stand(&self, n: usize) -> Result<ClusterView> {
        match self.ask(n, ClientFrame::query(Request::ClusterStatus)).await? {
            Reply::Cluster(view) => Ok(view),
            other => Err(anyhow!("{other:?}")),
        }
    }

    /// Processor seconds and MiB of one coordinator.
    pub fn usage(&self, n: usize) -> Result<(f64, f64)> {
        self.members[n].as_ref().context("it is dead")?.usage()
    }
}

impl Cluster for Fleet {
    type Client = FleetClient;
    const NAME: &'static str = "fleet";

    async fn leader(&self) -> Result<usize> {
        for n in (0..self.members.len()).filter(|n| self.members[*n].is_some()) {
            if let Ok(view) = self.stand(n).await
                && let Some(leader) = view.leader
            {
                for m in 0..self.members.len() {
                    if self.members[m].is_some() && self.endpoint(m)?.replica == leader {
                        return Ok(m);
                    }
                }
            }
        }
        Err(anyhow!("no coordinator leads"))
    }

    async fn term(&self) -> Result<u64> {
        Ok(self.stand(self.leader().await?).await?.term)
    }

    async fn clients(&self, at: usize, count: usize, connections: usize) -> Result<Vec<FleetClient>> {
        let mut shared = Vec::new();
        for _ in 0..connections.min(count) {
            shared.push(self.connect(at).await?);
        }
        let since = match exchange(&shared[0], &ClientFrame::query(Request::Position)).await? {
            Reply::Position(since) => since,
            other => bail!("{other:?}"),
        };
        let client = |n: usize| FleetClient {
            since,
            connection: shared[n % shared.len()].clone(),
            id: ClientId(1000 + u128::from(self.clients.fetch_add(1, Ordering::Relaxed))),
            seq: Arc::new(AtomicU64::new(0)),
            run: self.run,
        };
        Ok((0..count).map(client).collect())
    }

    fn kill(&mut self, n: usize) -> Result<()> {
        self.members[n].take().context("it is dead already")?.kill()
    }

    async fn restart(&mut self, n: usize) -> Result<()> {
        self.launch(n).await
    }

    fn cpu_s(&self) -> Result<f64> {
        self.members.iter().flatten().map(|server| Ok(server.usage()?.0)).sum()
    }
}

#[derive(Clone)]
pub struct FleetClient {
    connection: Connection,
    id: ClientId,
    /// Where the log was before its first put.
    since: u64,
    seq: Arc<AtomicU64>,
    run: RunId,
}

impl Put for FleetClient {
    async fn put(&mut self) -> Result<()> {
        let seq = self.seq.fetch_add(1, Ordering::Relaxed) + 1;
        let request = Request::RecordMetrics { run: self.run, points: payload(seq) };
        let frame = ClientFrame { since: self.since, ..ClientFrame::change(self.id, seq, request) };
        match exchange(&self.connection, &frame).await? {
            Reply::Done => Ok(()),
            other => Err(anyhow!("{other:?}")),
        }
    }
}

/// Eight points that take 256 bytes when encoded: a name of 14 bytes and its length, a step of 1 to 3, a value of 8, a time of 9.
fn payload(step: u64) -> Vec<Point> {
    let point = |n: u64| Point {
        series: format!("throughput/{n:03}"),
        step: step % 50_000,
        value: step as f64 * 1.000_1 + n as f64,
        unix_ms: 1_795_000_000_000 + step,
    };
    (0..8).map(point).collect()
}

async fn exchange(connection: &Connection, frame: &ClientFrame) -> Result<Reply> {
    let (mut send, mut receive) = connection.open_bi().await?;
    codec::write_frame(&mut send, frame).await?;
    send.finish()?;
    codec::read_frame(&mut receive).await?.context("the stream ended without an answer")
}

#[cfg(test)]
mod tests {
    use super::payload;

    #[test]
    fn the_payload_is_as_large_as_the_peers() {
        let bytes = fleet_common::codec::encode(&payload(20_000)).unwrap().len();
        assert!((256..=290).contains(&bytes), "{bytes}");
    }
}
