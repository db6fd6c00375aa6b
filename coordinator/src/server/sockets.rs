//! What a coordinator listens on: a socket for clients and joiners, one for agents and coordinators, and HTTP. Each of the first two has
//! a runtime and a thread of its own, so that neither waits for the other's work.

use super::places::{DEFAULT_HTTP, DEFAULT_LISTEN};
use super::{Places, setup};
use anyhow::{Context, Result};
use fleet_common::endpoint::Endpoint;
use fleet_common::net::{self, Identity, Socket};
use std::net::SocketAddr;
use std::path::Path;
use tokio::net::TcpListener;
use tokio::runtime::Handle;
use tokio::sync::oneshot;

/// A runtime on a thread of its own; ends when dropped.
pub struct Lane {
    handle: Handle,
    /// Ends the thread when it is dropped.
    _stop: oneshot::Sender<()>,
}

impl Lane {
    pub fn start(name: &str) -> Result<Lane> {
        // Its work is many small pieces: one thread does them without handing them around.
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.context("cannot start an event loop")?;
        let handle = runtime.handle().clone();
        let (stop, stopped) = oneshot::channel::<()>();
        std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                // An error says that the sender is gone, which is what was waited for.
                let _ = runtime.block_on(stopped);
            })
            .context("cannot start a thread")?;
        Ok(Lane { handle, _stop: stop })
    }

    pub fn handle(&self) -> &Handle {
        &self.handle
    }
}

pub struct Sockets {
    pub clients: quinn::Endpoint,
    pub members: quinn::Endpoint,
    pub http: TcpListener,
    /// As others find them.
    pub client_address: String,
    pub member_address: String,
}

/// Binds all three. With port 0 the ports of the last start come first, so that agents and clients find a restarted coordinator.
pub async fn listen(
    places: &Places,
    data_dir: &Path,
    identity: &Identity,
    clients: &Lane,
    members: &Lane,
) -> Result<Sockets> {
    let before = setup::last_endpoint(data_dir);
    let before = |of: fn(&Endpoint) -> &str, advertised: bool| {
        before.as_ref().filter(|_| !advertised).and_then(|endpoint| port(of(endpoint)))
    };
    let listen = places.listen.unwrap_or(DEFAULT_LISTEN);
    let clients = {
        let _entered = clients.handle().enter();
        serve(listen, before(|e| &e.quic, places.advertise.is_some()), Socket::Clients, identity)?
    };
    let client_at = clients.local_addr()?;
    let member_listen = places.member_listen.unwrap_or_else(|| {
        // The next port, where the first one was chosen by whoever started this.
        let port = if listen.port() == 0 { 0 } else { listen.port().saturating_add(1) };
        SocketAddr::new(listen.ip(), port)
    });
    let members = {
        let _entered = members.handle().enter();
        let before = before(|e| &e.member, places.member_advertise.is_some());
        serve(member_listen, before, Socket::Members, identity)?
    };
    let member_at = members.local_addr()?;
    let http_listen = places.http.unwrap_or(DEFAULT_HTTP);
    let http = http(http_listen, before(|e| &e.http, false)).await?;
    Ok(Sockets {
        client_address: places.client_address(client_at),
        member_address: places.member_address(member_at),
        clients,
        members,
        http,
    })
}

fn port(address: &str) -> Option<u16> {
    address.rsplit_once(':')?.1.parse().ok()
}

fn serve(
    listen: SocketAddr,
    before: Option<u16>,
    socket: Socket,
    identity: &Identity,
) -> Result<quinn::Endpoint> {
    let again = before.filter(|_| listen.port() == 0).map(|port| SocketAddr::new(listen.ip(), port));
    let again = again.and_then(|address| net::serve(address, socket, identity).ok());
    Ok(again.map_or_else(|| net::serve(listen, socket, identity), Ok)?)
}

async fn http(listen: SocketAddr, before: Option<u16>) -> Result<TcpListener> {
    if let Some(port) = before.filter(|_| listen.port() == 0)
        && let Ok(listener) = TcpListener::bind((listen.ip(), port)).await
    {
        return Ok(listener);
    }
    TcpListener::bind(listen).await.with_context(|| {
        format!("cannot listen on {listen} for HTTP; stop what uses that port or choose another with --http")
    })
}
