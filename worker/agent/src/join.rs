//! `worker join`: all that a node needs before it takes part.

use crate::accelerator::{Found, accelerator};
use crate::agent::{Accelerator, Config};
use crate::budget::Rates;
use crate::cgroup;
use crate::container::{Containers, Remains};
use crate::coordinators::Coordinators;
use crate::doors::Ports;
use crate::driver::Ready;
use crate::http::Server;
use crate::lend::Lender;
use crate::link;
use crate::program::Base;
use crate::ranks::Launcher;
use crate::records::Records;
use crate::relay::{Relay, Streams};
use crate::signals::Signals;
use crate::spawn::Spawner;
use anyhow::Context;
use fleet_common::metrics::target;
use fleet_common::net::Identity;
use fleet_common::{exit, files};
use std::collections::BTreeMap;
use std::net::{SocketAddr, ToSocketAddrs, UdpSocket};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};

/// For what an earlier process of this worker left behind to end.
const REMAINS_MAX: Duration = Duration::from_secs(10);

/// What `worker join` was asked for.
#[derive(Debug)]
pub struct Options {
    pub coordinators: Coordinators,
    pub data_dir: PathBuf,
    /// `None`: one per accelerator, else one.
    pub slots: Option<u32>,
    pub device: DeviceWish,
    pub labels: BTreeMap<String, String>,
    /// Where other nodes reach this one; `None`: the address from which it reaches the coordinators.
    pub host: Option<String>,
    /// Where ranks that train listen for those of other nodes.
    pub rank_ports: Ports,
    /// Of UDP, where other nodes fetch checkpoints; `None`: any that is free.
    pub checkpoint_port: Option<u16>,
    /// Where metrics are served.
    pub http: Option<SocketAddr>,
    /// What programs find in their environment before what their job sets.
    pub programs: Base,
    /// How much of a gang's output goes to the coordinators.
    pub lines: Rates,
    /// A `fleet launch` started this worker for one program: it hears what that prints, gives it what it reads itself, and has its signals passed on.
    pub relay: Option<Streams>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum DeviceWish {
    Auto,
    Cpu,
    Cuda,
    Mps,
}

/// Runs the agent until it is told to end; returns the exit code.
pub async fn run(options: Options, identity: Identity) -> anyhow::Result<u8> {
    let signals = Signals::listen(options.relay.is_some())?;
    let mut child = signal(SignalKind::child())?; // before there is a child
    let cgroups = cgroup::find();
    match &cgroups {
        Ok(dir) => tracing::info!(dir = %dir.display(), "ranks run in control groups"),
        Err(why) => tracing::info!(
            %why,
            "ranks run without control groups; a process that leaves its session and clears its environment is found only when no rank runs"
        ),
    }
    let process: u64 = rand::random();
    let (records, found) = Records::open(&options.data_dir, process, cgroups.clone().ok())?;
    end_what_is_left(&found.remains).await;
    let (exits_sender, mut exits) = mpsc::unbounded_channel(); // at most one for each living child
    let spawner = Spawner::start(exits_sender).context("cannot start the spawning thread")?;
    let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get() as u32);
    let relay = options.relay.map(|_| Relay::over_stdout()).transpose().context("--relay needs a pipe")?;
    let containers = Containers::new(process, cgroups.ok());
    let host = options.host.unwrap_or_else(|| own_address(options.coordinators.given()));
    let launcher = Launcher {
        spawner,
        containers: Arc::new(containers),
        fleet_rank: Launcher::fleet_rank_beside()?,
        cores,
        programs: options.programs,
        relay: options.relay,
        ports: options.rank_ports,
        host: host.clone(),
    };

    let computes_on = accelerator(&launcher, options.device, &mut exits, &mut child).await;
    let Found { accelerator, unfit, no_cuda } = match computes_on {
        Ok(computes_on) => computes_on,
        Err(line) => {
            eprintln!("error: {line}");
            return Ok(exit::ENVIRONMENT);
        }
    };
    let slots = options.slots.unwrap_or(match accelerator {
        Accelerator::Cuda { devices } => devices.max(1),
        Accelerator::Cpu | Accelerator::Mps => 1,
    });
    let http = match options.http {
        Some(at) => Some(Server::listen(at, &host, &options.data_dir).await?),
        None => None,
    };
    let mut labels = options.labels;
    labels.remove(target::LABEL);
    labels.extend(http.as_ref().map(|server| (target::LABEL.to_owned(), target::label_of(server.at))));
    let (shown, newest) = watch::channel(identity.clone());
    let lender = match &relay {
        Some(_) => None,
        None => lender(&host, options.checkpoint_port, &options.data_dir, &newest)?,
    };
    let config = Config {
        name: identity.name.clone(),
        slots,
        accelerator,
        no_cuda,
        cores,
        program_version: env!("CARGO_PKG_VERSION").to_owned(),
        labels,
        host,
        checkpoint_port: lender.as_ref().map_or(0, |lender| lender.port),
        process,
        lines: options.lines,
    };
    let node = link::Node {
        identity,
        identity_dir: options.data_dir.join("identity"),
        coordinators: options.coordinators,
        shown,
        mark: None,
    };
    let ready = Ready {
        config,
        past: found.past,
        launcher,
        records,
        identity: newest,
        lender,
        relay,
        http,
        unfit,
        node,
        signals,
        child,
        exits,
    };
    ready.drive().await
}

/// A port that was asked for and cannot be had is an error; without one this node lends nothing. It is kept: who reads here while this
/// worker starts again finds it.
fn lender(
    host: &str,
    port: Option<u16>,
    data_dir: &Path,
    identity: &watch::Receiver<Identity>,
) -> anyhow::Result<Option<Lender>> {
    if let Some(port) = port {
        let lender = Lender::start(host, port, identity.clone());
        return lender
            .map(Some)
            .map_err(|why| anyhow::anyhow!("other nodes cannot fetch checkpoints here: {why}"));
    }
    let kept = data_dir.join("checkpoint-port");
    let last = files::read_optional(&kept).ok().flatten().and_then(|text| text.trim().parse().ok());
    let started = Lender::start(host, last.unwrap_or(0), identity.clone());
    match started.or_else(|_| Lender::start(host, 0, identity.clone())) {
        Ok(lender) => {
            if last != Some(lender.port) {
                files::write_atomic(&kept, format!("{}\n", lender.port).as_bytes())?;
            }
            Ok(Some(lender))
        }
        Err(why) => {
            tracing::warn!(%why, "other nodes cannot fetch checkpoints that lie here");
            Ok(None)
        }
    }
}

/// The address of this machine on the way to the first coordinator that has one. Nothing is sent.
fn own_address(addrs: &[String]) -> String {
    let on_the_way = |addr: &String| {
        let to = addr.to_socket_addrs().ok()?.next()?;
        let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let socket = UdpSocket::bind(any).ok()?;
        socket.connect(to).ok()?;
        Some(socket.local_addr().ok()?.ip().to_string())
    };
    addrs.iter().find_map(on_the_way).unwrap_or_else(|| "127.0.0.1".to_owned())
}

/// Kills what an earlier process of this worker left behind, and waits until it is gone. What the kernel does not let go was struck and can
/// do nothing any more.
async fn end_what_is_left(remains: &Remains) {
    let end = Instant::now() + REMAINS_MAX;
    let mut seen = 0;
    loop {
        let left = remains.kill();
        seen = seen.max(left);
        if left == 0 || Instant::now() > end {
            remains.remove();
            if seen > 0 {
                tracing::warn!(
                    processes = seen,
                    still_there = left,
                    "ended what an earlier process of this worker had left"
                );
            }
            return;
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}
