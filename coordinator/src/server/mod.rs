//! The coordinator as a process: one raft thread, a QUIC server for agents, clients and joiners, and HTTP for people.
//!
//! Everything here may be lost and started again: what is outstanding follows from the state and from what agents say when they
//! come back.

mod agents;
mod clients;
mod control;
pub mod driver;
mod http;
mod joins;
mod metrics;
mod roster;
mod setup;
mod space;
mod views;

use crate::raft::disk::Disk;
use crate::raft::history::History;
use anyhow::{Context, Result};
use driver::{Driver, Handle};
use fleet_common::endpoint::Endpoint;
use fleet_common::net::{self, Accepted, ClusterCa};
use fleet_common::protocol::Role;
use metrics::Metrics;
use roster::Roster;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tracing::{debug, info, warn};

/// Connections at once: the nodes of a large cluster and some clients.
const CONNECTIONS_MAX: usize = 12_000;
/// Joins at once: each costs a signature and a commit.
const JOINS_MAX: usize = 32;

/// What `coordinator start` was told.
#[derive(Clone, Debug)]
pub struct Options {
    pub data_dir: PathBuf,
    /// For QUIC. Port 0: the one of before, else a free one.
    pub listen: SocketAddr,
    /// For HTTP; port 0 likewise.
    pub http: SocketAddr,
    /// `HOST:PORT` under which others find this coordinator, where that is not `listen`.
    pub advertise: Option<String>,
}

/// What all connections share.
pub(crate) struct Shared {
    pub handle: Handle,
    pub roster: Arc<Roster>,
    pub history: History<dyn Disk>,
    pub ca: ClusterCa,
    pub metrics: Metrics,
    pub joins: Semaphore,
    /// Host names under which HTTP may be asked, besides loopback.
    pub hosts: Vec<String>,
}

/// A running coordinator. Dropping it without `stop` is like a crash, which is safe.
pub struct Coordinator {
    endpoint: Endpoint,
    quic: quinn::Endpoint,
    driver: Option<driver::Thread>,
    tasks: JoinSet<()>,
    _lock: std::fs::File,
}

impl Coordinator {
    /// Starts on a data directory, making a new cluster if it is empty. Returns when it listens and leads.
    pub async fn start(options: Options) -> Result<Coordinator> {
        let prepared = setup::prepare(&options)?;
        let (quic, http) = listen(&options, &prepared).await?;
        let endpoint = Endpoint {
            pid: std::process::id(),
            quic: options.advertise.clone().unwrap_or(quic.local_addr()?.to_string()),
            http: http.local_addr()?.to_string(),
            cluster_id: prepared.ca.cluster_id().to_owned(),
            ca_fingerprint: prepared.ca.fingerprint(),
        };

        let roster = Arc::new(Roster::new());
        let history = History::new(prepared.disk.clone());
        let space = space::probe(&prepared.raft_dir);
        let waker = roster.clone();
        let driver = Driver::new(prepared.replica, space, Box::new(move |effects| waker.wake(effects)));
        let (handle, thread) = driver.spawn().context("cannot start the raft thread")?;
        handle.until_leading().await?;

        let hosts = [&endpoint.quic, &endpoint.http].map(|address| http::host_of(address).to_owned());
        let shared = Arc::new(Shared {
            handle,
            roster,
            history,
            ca: prepared.ca,
            metrics: Metrics::new()?,
            joins: Semaphore::new(JOINS_MAX),
            hosts: hosts.into(),
        });
        setup::write_credentials(&options.data_dir, &shared).await?;
        endpoint.store(&options.data_dir)?;
        info!(
            "listening on {} (HTTP {}); join a worker with: worker join {} --token-file {}",
            endpoint.quic,
            endpoint.http,
            endpoint.quic,
            setup::token_path(&options.data_dir, Role::Worker).display()
        );

        let mut tasks = JoinSet::new();
        tasks.spawn(control::run(shared.clone()));
        tasks.spawn(http::run(shared.clone(), http));
        tasks.spawn(accept(shared, quic.clone()));
        Ok(Coordinator { endpoint, quic, driver: Some(thread), tasks, _lock: prepared.lock })
    }

    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// Returns when the coordinator cannot go on, with the reason.
    pub async fn failed(&mut self) -> anyhow::Error {
        match &mut self.driver {
            Some(driver) => driver.failed().await,
            None => std::future::pending().await,
        }
    }

    /// Stops cleanly: peers are told, the log is closed.
    pub async fn stop(mut self) {
        self.tasks.shutdown().await;
        self.quic.close(0u32.into(), b"the coordinator is stopping");
        if let Some(driver) = self.driver.take() {
            driver.stop().await;
        }
        self.quic.wait_idle().await;
    }
}

/// Binds both sockets. With port 0 the ports of the last start come first, so that agents and clients find a restarted coordinator.
async fn listen(options: &Options, prepared: &setup::Prepared) -> Result<(quinn::Endpoint, TcpListener)> {
    let before = Endpoint::load(&options.data_dir).ok().flatten();
    let again = |address: SocketAddr, before: Option<&str>| {
        let port = before.and_then(|before| before.rsplit_once(':')).and_then(|(_, port)| port.parse().ok());
        port.filter(|_| address.port() == 0).map(|port| SocketAddr::new(address.ip(), port))
    };
    let quic = again(
        options.listen,
        before.as_ref().filter(|_| options.advertise.is_none()).map(|before| before.quic.as_str()),
    )
    .and_then(|address| net::serve(address, &prepared.identity).ok())
    .map_or_else(|| net::serve(options.listen, &prepared.identity), Ok)?;
    let http = match again(options.http, before.as_ref().map(|before| before.http.as_str())) {
        Some(address) => TcpListener::bind(address).await.ok(),
        None => None,
    };
    let http = match http {
        Some(http) => http,
        None => TcpListener::bind(options.http).await.with_context(|| {
            format!(
                "cannot listen on {} for HTTP; stop what uses that port or choose another with --http",
                options.http
            )
        })?,
    };
    if !options.http.ip().is_loopback() {
        warn!(
            "HTTP is open to other machines on {}: anyone who reaches it can read what the cluster does",
            options.http
        );
    }
    Ok((quic, http))
}

async fn accept(shared: Arc<Shared>, quic: quinn::Endpoint) {
    let mut connections = JoinSet::new();
    while let Some(incoming) = quic.accept().await {
        while connections.try_join_next().is_some() {}
        if connections.len() >= CONNECTIONS_MAX {
            incoming.refuse();
            continue;
        }
        connections.spawn(serve(shared.clone(), incoming));
    }
}

async fn serve(shared: Arc<Shared>, incoming: quinn::Incoming) {
    let from = incoming.remote_address();
    let (connection, accepted) = match net::accept(incoming).await {
        Ok(accepted) => accepted,
        Err(error) => return debug!("{from} did not get in: {error}"),
    };
    match accepted {
        Accepted::Join => joins::serve(&shared, &connection).await,
        Accepted::Peer(peer) if peer.cluster_id != shared.ca.cluster_id() => {
            connection.close(1u32.into(), b"this certificate is of another cluster");
        }
        Accepted::Peer(peer) => match (peer.role, peer.node) {
            (Role::Worker, Some(node)) => agents::serve(&shared, &connection, node).await,
            (Role::Client, _) => clients::serve(shared, &connection).await,
            _ => connection.close(1u32.into(), b"this certificate is for neither a worker nor a client"),
        },
    }
}
