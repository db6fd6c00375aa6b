//! Connecting to the first coordinator that answers.

use super::identity::Identity;
use super::listen::remote;
use super::peer::{COORDINATOR_DNS, Peer};
use super::verdict::{Failure, NOT_OUR_COORDINATOR, summarise};
use super::{Link, NetError, Socket, limits, tls};
use crate::protocol::Role;
use quinn::crypto::rustls::QuicClientConfig;
use quinn::{ClientConfig, Connection, Endpoint};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, OnceLock};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

/// A connection that the other side has welcomed.
#[derive(Debug)]
pub struct Reached {
    pub connection: Connection,
    /// Which of the coordinator's sockets it is.
    pub socket: Socket,
    /// `Authorities::mark` of what the cluster trusts. A member that trusts others renews its certificate.
    pub mark: [u8; 32],
}

/// Connects to the first of these coordinators (`HOST:PORT`) that answers and accepts this identity.
pub async fn connect(addrs: &[String], identity: &Identity) -> Result<Connection, NetError> {
    reach(addrs, identity).await.map(|reached| reached.connection)
}

/// Like `connect`, from a socket that others use too: a thousand connections need no thousand sockets.
pub async fn connect_from(
    local: &Endpoint,
    addrs: &[String],
    identity: &Identity,
) -> Result<Connection, NetError> {
    first(Some(local), addrs, identity).await.map(|reached| reached.connection)
}

/// Like `connect`. The addresses are tried in their order, each as soon as the one before was silent for a moment or has failed.
pub async fn reach(addrs: &[String], identity: &Identity) -> Result<Reached, NetError> {
    first(None, addrs, identity).await
}

/// Without a socket each attempt has its own.
async fn first(local: Option<&Endpoint>, addrs: &[String], identity: &Identity) -> Result<Reached, NetError> {
    let mut attempts = JoinSet::new();
    let mut rest = addrs.iter().cloned().enumerate();
    let mut failures = Vec::new();
    loop {
        let next = rest.next();
        let more = next.is_some();
        if let Some((position, addr)) = next {
            let refused = Arc::new(OnceLock::new());
            let config = client_config(identity, refused.clone())?;
            let (local, cluster_id) = (local.cloned(), identity.cluster_id.clone());
            attempts.spawn(async move {
                let attempt = welcomed(local, &addr, config, &cluster_id).await;
                let failed = |failure| other_cluster(refused.get(), &cluster_id).unwrap_or(failure).at(&addr);
                (position, attempt.map_err(failed))
            });
        }
        tokio::select! {
            Some(done) = attempts.join_next() => match done.map_err(|error| NetError::Lost(error.to_string()))? {
                (_, Ok(reached)) => return Ok(reached),
                (position, Err(failure)) => failures.push((position, failure)),
            },
            () = sleep(limits::STAGGER), if more => {}
            else => break,
        }
    }
    failures.sort_by_key(|(position, _)| *position);
    Err(summarise(failures.into_iter().map(|(_, failure)| failure).collect()))
}

/// Whether the certificate that was not believed is of another cluster, by its own account: nobody else would say so.
fn other_cluster(refused: Option<&Vec<u8>>, ours: &str) -> Option<Failure> {
    let theirs = Peer::from_certificate(refused?).ok()?.cluster_id;
    let why = format!("this address belongs to another cluster, {theirs}, and this side to {ours}");
    (theirs != ours).then_some(Failure::OtherCluster(why))
}

fn client_config(identity: &Identity, refused: Arc<OnceLock<Vec<u8>>>) -> Result<ClientConfig, NetError> {
    let crypto = QuicClientConfig::try_from(tls::client(identity, refused)?);
    let crypto = crypto.map_err(|e| NetError::Tls(e.to_string()))?;
    let mut config = ClientConfig::new(Arc::new(crypto));
    config.transport_config(limits::connecting(match identity.role() {
        Role::Client | Role::Admin => Link::Client,
        Role::Worker => Link::Agent,
        Role::Coordinator => Link::Coordinator,
    }));
    Ok(config)
}

/// A connection to one `HOST:PORT` once the coordinator of that cluster has said welcome.
async fn welcomed(
    local: Option<Endpoint>,
    addr: &str,
    config: ClientConfig,
    cluster_id: &str,
) -> Result<Reached, Failure> {
    let work = async {
        let connection = attempt(local, addr, config).await?;
        let peer = remote(&connection).map_err(Failure::Refused)?;
        if peer.member.role() != Role::Coordinator || peer.cluster_id != cluster_id {
            return Err(Failure::Refused(NOT_OUR_COORDINATOR.into()));
        }
        let mut welcome = connection.accept_uni().await?;
        let (mut byte, mut mark) = ([0], [0; 32]);
        let read = async {
            welcome.read_exact(&mut byte).await?;
            welcome.read_exact(&mut mark).await
        };
        match (read.await, Socket::try_from(byte[0])) {
            (Ok(()), Ok(socket)) => Ok(Reached { connection, socket, mark }),
            (Err(_), _) if connection.close_reason().is_some() => Err(connection.closed().await.into()),
            _ => Err(Failure::Refused("the two sides have different versions of fleet".into())),
        }
    };
    timeout(limits::CONNECT_DEADLINE, work).await.unwrap_or_else(|_| Err(silent()))
}

fn silent() -> Failure {
    Failure::Silent(format!("no answer within {} s", limits::CONNECT_DEADLINE.as_secs()))
}

/// A connection to the first address of one `HOST:PORT`, whoever answers there.
pub(super) async fn attempt(
    local: Option<Endpoint>,
    addr: &str,
    config: ClientConfig,
) -> Result<Connection, Failure> {
    let work = async {
        let mut last = Failure::Silent("the name has no address".into());
        let resolved = tokio::net::lookup_host(addr).await;
        for address in resolved.map_err(|error| {
            Failure::Silent(format!("not an address like HOST:PORT, or of no known host ({error})"))
        })? {
            match handshake(local.clone(), address, config.clone()).await {
                Ok(connection) => return Ok(connection),
                Err(failure) => last = failure,
            }
        }
        Err(last)
    };
    timeout(limits::CONNECT_DEADLINE, work).await.unwrap_or_else(|_| Err(silent()))
}

async fn handshake(
    local: Option<Endpoint>,
    address: SocketAddr,
    config: ClientConfig,
) -> Result<Connection, Failure> {
    let local = local.map_or_else(|| Endpoint::client((from(address.ip()), 0).into()), Ok);
    let local = local.map_err(|error| Failure::Silent(error.to_string()))?;
    let connecting = local.connect_with(config, address, COORDINATOR_DNS);
    let connecting = connecting.map_err(|error| Failure::Silent(error.to_string()))?;
    Ok(connecting.await?)
}

/// Where a socket to this address is bound: what stays on this machine cannot be reached from others.
fn from(to: IpAddr) -> IpAddr {
    match to {
        IpAddr::V4(to) if to.is_loopback() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(to) if to.is_loopback() => Ipv6Addr::LOCALHOST.into(),
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_goes_elsewhere_is_sent_from_everywhere() {
        let bound = |to: &str| from(to.parse().unwrap()).to_string();
        assert_eq!([bound("127.0.0.1"), bound("127.3.2.1"), bound("::1")], ["127.0.0.1", "127.0.0.1", "::1"]);
        assert_eq!([bound("10.0.0.1"), bound("fd00::1")], ["0.0.0.0", "::"]);
    }
}
