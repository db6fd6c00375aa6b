//! How a rank reaches its peers: those of its host through a shared segment, those of other hosts over connections.

use fleet_collectives::net::{Key, Listener, PublicKey, RankAddress, Rendezvous};
use fleet_collectives::{HostCollective, Segment, SharedHost, ShmCollective};
use fleet_common::protocol::{Network, Peer, RankStart};
use fleet_learn::{Error, Result, shim};
use std::net::{SocketAddr, ToSocketAddrs};
use std::os::fd::AsRawFd;
use std::time::Duration;

/// Longest wait for a peer: the others wait while rank 0 writes a checkpoint. A dead peer ends the gang at once by other means.
pub const DEADLINE: Duration = Duration::from_secs(900);

/// Longest wait for the ranks of other hosts to come.
const MEETING: Duration = Duration::from_secs(120);

/// The peers, where there are any. `encryption` is for what goes between hosts. A collective call.
pub fn join(start: &RankStart, encryption: bool) -> Result<Option<Box<dyn SharedHost>>> {
    let mut gang: Box<dyn SharedHost> = match &start.network {
        None if start.world_size == 1 => return Ok(None),
        None => Box::new(of_host(start)?),
        Some(network) => Box::new(across(start, network, encryption)?),
    };
    gang.set_deadline(DEADLINE);
    Ok(Some(gang))
}

/// The ranks of this host.
fn of_host(start: &RankStart) -> Result<ShmCollective> {
    let (rank, ranks) = (start.local_rank as usize, start.local_world_size as usize);
    let alone;
    let fd = match start.shm_fd {
        Some(fd) => fd,
        None if ranks == 1 => {
            alone = Segment::create(1, start.generation)?;
            alone.fd().as_raw_fd()
        }
        None => {
            let why = "the agent gave no shared segment to a gang of several ranks";
            return Err(Error::Environment(why.into()));
        }
    };
    Ok(ShmCollective::attach(fd, rank, ranks, start.generation)?)
}

fn across(start: &RankStart, network: &Network, encryption: bool) -> Result<HostCollective> {
    let listener = shim::inherited_listener(network.listener_fd)
        .map_err(|e| Error::Environment(format!("the agent gave no socket to call this rank on: {e}")))?;
    let ranks = network.peers.iter().map(address_of).collect::<Result<_>>()?;
    let rendezvous =
        Rendezvous { generation: start.generation, rank: start.rank as usize, ranks, encryption };
    let key = Key::from_pkcs8(network.key.secret_der().to_vec())?;
    let net = Listener::try_from(listener)?.connect(&rendezvous, &key, MEETING)?;
    Ok(HostCollective::new(of_host(start)?, net)?)
}

fn address_of(peer: &Peer) -> Result<RankAddress> {
    let found: Option<SocketAddr> =
        (peer.address.as_str(), peer.port).to_socket_addrs().ok().and_then(|mut found| found.next());
    let address = found.ok_or_else(|| {
        Error::Environment(format!(
            "the address `{}` of a node of this job cannot be found from here; join that worker with an address that other nodes know",
            peer.address
        ))
    })?;
    Ok(RankAddress { host: peer.host as usize, address, key: PublicKey(peer.key.clone()) })
}
