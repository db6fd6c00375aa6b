//! `worker join --http`: whether the worker lives, and what it measures. Reads only.

use crate::gpu::Gpus;
use crate::machine::{self, RankProcess};
use crate::panics;
use anyhow::Context as _;
use fleet_common::http::{
    Body, Incoming, Limits, Method, Request, Response, accept, host, host_of, is_of_this_machine, plain,
    serve,
};
use fleet_common::metrics::{Format, Page};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

const LIMITS: Limits =
    Limits { connections: 16, head: 8 << 10, asking: Duration::from_secs(5), taking: Duration::from_secs(5) };
/// For the agent to say how it is: it does one thing after the other, none of which takes long.
const PATIENCE: Duration = Duration::from_secs(5);
/// Scrapes that wait for the agent.
pub const WAITING_MAX: usize = 16;

/// What the agent says of itself.
#[derive(Debug)]
pub struct Told {
    pub is_connected: bool,
    pub page: Page,
    /// Those that live.
    pub ranks: Vec<RankProcess>,
}

/// Asks the agent.
pub type Asker = mpsc::Sender<oneshot::Sender<Told>>;

pub struct Server {
    listener: TcpListener,
    pub at: SocketAddr,
    /// Name or address of this node, by which it may be asked besides loopback and the address where it listens.
    host: String,
    data_dir: PathBuf,
}

struct Shared {
    asker: Asker,
    hosts: [String; 2],
    data_dir: PathBuf,
    gpus: OnceLock<Gpus>,
}

/// An address, or a port on loopback.
pub fn address(text: &str) -> Result<SocketAddr, String> {
    let port = || text.parse().ok().map(|port: u16| SocketAddr::from(([127, 0, 0, 1], port)));
    let wrong = || format!("`{text}` is no address; write it like 9100 or 0.0.0.0:9100");
    text.parse().ok().or_else(port).ok_or_else(wrong)
}

impl Server {
    pub async fn listen(at: SocketAddr, host: &str, data_dir: &Path) -> anyhow::Result<Server> {
        let listener = TcpListener::bind(at).await.with_context(|| {
            format!("cannot listen on {at} for HTTP; stop what uses that port or choose another with --http")
        })?;
        if !at.ip().is_loopback() {
            tracing::warn!("metrics are open to other machines on {at}: anyone who reaches it can read them");
        }
        let at = listener.local_addr()?;
        Ok(Server { listener, at, host: host.to_owned(), data_dir: data_dir.to_owned() })
    }

    /// Serves until it is dropped.
    pub async fn run(self, asker: Asker) {
        let Server { listener, at, host, data_dir } = self;
        let shared =
            Arc::new(Shared { asker, hosts: [host, at.ip().to_string()], data_dir, gpus: OnceLock::new() });
        serve(listener, LIMITS, None, move |request| respond(shared.clone(), request)).await;
    }
}

async fn respond(shared: Arc<Shared>, request: Request<Incoming>) -> Response<Body> {
    let Some(named) = host(request.headers()) else { return text(400, "a request has exactly one Host") };
    let known = shared.hosts.iter().any(|known| known.eq_ignore_ascii_case(host_of(named)));
    if !known && !is_of_this_machine(named) {
        return text(421, "this Host is not served here; ask by the worker's address");
    }
    if request.method() != Method::GET {
        return text(405, "only GET is served here");
    }
    let format = Format::wanted(accept(request.headers()));
    match request.uri().path().trim_end_matches('/') {
        "/healthz" => match ask(&shared).await {
            Some(told) if told.is_connected => text(200, "ok"),
            // Its ranks go on: nobody shall end it for that.
            Some(_) => text(200, "degraded: no coordinator holds this worker"),
            None => text(503, "the worker does not answer"),
        },
        "/metrics" => match ask(&shared).await {
            Some(told) => match panics::blocking(move || page(&shared, told, format)).await {
                Ok(page) => plain(200, format.content_type(), page),
                Err(panic) => text(500, &panic),
            },
            None => text(503, "the worker does not answer"),
        },
        _ => text(404, "there is /healthz and /metrics"),
    }
}

async fn ask(shared: &Shared) -> Option<Told> {
    let (sink, told) = oneshot::channel();
    shared.asker.try_send(sink).ok()?;
    timeout(PATIENCE, told).await.ok()?.ok()
}

/// What the agent told with what the kernel and the driver say: they may take their time.
fn page(shared: &Shared, told: Told, format: Format) -> String {
    let Told { mut page, ranks, .. } = told;
    machine::measure(&shared.data_dir, &mut page);
    machine::measure_ranks(&ranks, &mut page);
    shared.gpus.get_or_init(Gpus::find).measure(&ranks, &mut page);
    page.write(format)
}

fn text(status: u16, line: &str) -> Response<Body> {
    plain(status, "text/plain; charset=utf-8", format!("{line}\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_alone_is_on_loopback() {
        for (text, at) in [("9100", "127.0.0.1:9100"), ("0.0.0.0:0", "0.0.0.0:0"), ("[::1]:9", "[::1]:9")] {
            assert_eq!(address(text).unwrap().to_string(), at);
        }
        for bad in ["", "x", "70000", "localhost:80", ":80"] {
            assert!(address(bad).unwrap_err().contains("9100"), "{bad}");
        }
    }
}
