//! Who is let in, by what the applied state says of him, and who must leave again. Both sockets ask here; the raft thread says what
//! has changed.

use crate::cluster::State;
use fleet_common::ids::ReplicaId;
use fleet_common::net::{self, Peer, Socket, Turned};
use fleet_common::protocol::{Member, Role};
use quinn::Connection;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv6Addr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tracing::info;

/// Connections of all clients at once.
const CLIENTS_MAX: usize = 4_096;
/// Connections at the members' socket: the nodes of a large cluster, some of them twice, and the coordinators.
const MEMBERS_MAX: usize = 12_000;
/// Connections of one client's certificate, which a person may use from many shells and programs.
const PER_CLIENT_MAX: usize = 512;
/// Connections of one worker or coordinator: the newest counts, older ones are about to end.
const PER_MEMBER_MAX: usize = 4;
/// Handshakes under way at one socket: what one core finishes in a tenth of a second. Others are refused and come again. No address has
/// more of them than are still free: one may have half of them, whole clusters of agents sit behind one, and it takes many to fill all.
const HANDSHAKES_MAX: usize = 256;
/// Above this, an address must prove that it is not made up before anything is computed for it.
const HANDSHAKES_UNPROVEN_MAX: usize = 64;
/// Joiners that have a connection and no answer yet; of them from one address.
const JOINERS_MAX: usize = 256;
const JOINERS_PER_ADDRESS_MAX: usize = 64;

/// What somebody is told who has the identity of this coordinator itself.
pub const TWICE: &str = "runs twice";

pub struct Gate {
    cluster_id: String,
    replica: ReplicaId,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    revoked: BTreeSet<Member>,
    held: BTreeMap<Member, Vec<Held>>,
    clients: usize,
    members: usize,
    shaking: [Waiting; 2],
    joining: Waiting,
}

#[derive(Default)]
struct Waiting {
    all: usize,
    by_address: BTreeMap<IpAddr, usize>,
}

struct Held {
    connection: Connection,
    /// Requests under way on it.
    open: Arc<AtomicUsize>,
}

/// What becomes of an incoming handshake.
pub enum Verdict {
    Shake(Pass),
    /// The address has to prove itself.
    Prove,
    Refuse,
}

/// A place that is given back when this is dropped.
pub struct Pass {
    gate: Arc<Gate>,
    place: Place,
}

enum Place {
    Shaking(Socket, IpAddr),
    Joining(IpAddr),
    Connected { socket: Socket, member: Member, connection: Connection },
}

impl Waiting {
    fn enter(&mut self, address: IpAddr, max: usize, per_address: usize) -> bool {
        let address = owner(address);
        let here = self.by_address.entry(address).or_default();
        let room = self.all < max && *here < per_address;
        if room {
            (self.all, *here) = (self.all + 1, *here + 1);
        } else if *here == 0 {
            self.by_address.remove(&address);
        }
        room
    }

    fn leave(&mut self, address: IpAddr) {
        let address = owner(address);
        self.all -= 1;
        if let Some(here) = self.by_address.get_mut(&address) {
            *here -= 1;
            if *here == 0 {
                self.by_address.remove(&address);
            }
        }
    }
}

impl Gate {
    pub fn new(cluster_id: &str, replica: ReplicaId) -> Arc<Gate> {
        Arc::new(Gate { cluster_id: cluster_id.to_owned(), replica, inner: Mutex::default() })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn incoming(self: &Arc<Self>, socket: Socket, address: IpAddr, proven: bool) -> Verdict {
        let mut inner = self.lock();
        let waiting = &mut inner.shaking[index(socket)];
        if !proven && waiting.all >= HANDSHAKES_UNPROVEN_MAX {
            return Verdict::Prove;
        }
        let free = HANDSHAKES_MAX.saturating_sub(waiting.all);
        match waiting.enter(address, HANDSHAKES_MAX, free) {
            true => Verdict::Shake(Pass { gate: self.clone(), place: Place::Shaking(socket, address) }),
            false => Verdict::Refuse,
        }
    }

    pub fn joiner(self: &Arc<Self>, address: IpAddr) -> Option<Pass> {
        let entered = self.lock().joining.enter(address, JOINERS_MAX, JOINERS_PER_ADDRESS_MAX);
        entered.then(|| Pass { gate: self.clone(), place: Place::Joining(address) })
    }

    /// Whether the holder of this certificate has anything to do at this socket.
    pub fn admit(&self, socket: Socket, peer: &Peer) -> Result<(), Turned> {
        let Peer { member, cluster_id, .. } = peer;
        if *cluster_id != self.cluster_id {
            return Err(Turned::Away("this certificate is of another cluster".into()));
        }
        if self.lock().revoked.contains(member) {
            return Err(Turned::Forever(cut_off(*member)));
        }
        match (socket, member) {
            (Socket::Clients, Member::Coordinator(_)) => {
                Err(Turned::Away("this address is for clients; coordinators meet at the members' one".into()))
            }
            (Socket::Members, Member::Client(_)) => Err(Turned::Away(
                "this address is for workers and coordinators; use the one for clients".into(),
            )),
            (Socket::Members, Member::Coordinator(replica)) if *replica == self.replica => Err(Turned::Away(
                format!("{replica} {TWICE}; a copy of its data directory must not be started"),
            )),
            // A worker may ask at the clients' socket where the members' ones are.
            _ => Ok(()),
        }
    }

    /// Enters a connection that was admitted. Where its member has too many, one that does nothing makes room.
    pub fn enter(
        self: &Arc<Self>,
        socket: Socket,
        member: Member,
        connection: &Connection,
    ) -> Option<(Pass, Arc<AtomicUsize>)> {
        let mut inner = self.lock();
        if inner.revoked.contains(&member) {
            connection.close(net::REVOKED, cut_off(member).as_bytes());
            return None;
        }
        let (all, max, per_member) = match member.role() {
            Role::Client => (inner.clients, CLIENTS_MAX, PER_CLIENT_MAX),
            Role::Worker | Role::Coordinator => (inner.members, MEMBERS_MAX, PER_MEMBER_MAX),
        };
        let held = inner.held.entry(member).or_default();
        if all >= max || held.len() >= per_member {
            // The oldest that has no request under way.
            let Some(idle) = held.iter().position(|held| held.open.load(Ordering::Relaxed) == 0) else {
                connection.close(net::BUSY, b"too many connections; close some or try again");
                return None;
            };
            held.remove(idle).connection.close(net::BUSY, b"closed for a newer connection");
            // Its pass finds nothing to give back but the count, which it does.
        }
        let open = Arc::new(AtomicUsize::new(0));
        held.push(Held { connection: connection.clone(), open: open.clone() });
        *inner.count(socket) += 1;
        let place = Place::Connected { socket, member, connection: connection.clone() };
        Some((Pass { gate: self.clone(), place }, open))
    }

    /// Takes over who is cut off, and ends his connections.
    pub fn follow(&self, state: &State) {
        let revoked: BTreeSet<Member> = state.revoked().collect();
        let mut inner = self.lock();
        for member in revoked.difference(&inner.revoked) {
            for held in inner.held.get(member).into_iter().flatten() {
                held.connection.close(net::REVOKED, cut_off(*member).as_bytes());
                info!("{member} was cut off");
            }
        }
        inner.revoked = revoked;
    }

    pub fn is_revoked(&self, member: Member) -> bool {
        self.lock().revoked.contains(&member)
    }
}

impl Inner {
    fn count(&mut self, socket: Socket) -> &mut usize {
        match socket {
            Socket::Clients => &mut self.clients,
            Socket::Members => &mut self.members,
        }
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        let mut inner = self.gate.lock();
        match &self.place {
            Place::Shaking(socket, address) => inner.shaking[index(*socket)].leave(*address),
            Place::Joining(address) => inner.joining.leave(*address),
            Place::Connected { socket, member, connection } => {
                *inner.count(*socket) -= 1;
                if let Some(held) = inner.held.get_mut(member) {
                    held.retain(|held| held.connection.stable_id() != connection.stable_id());
                    if held.is_empty() {
                        inner.held.remove(member);
                    }
                }
            }
        }
    }
}

/// Who has one IPv6 address has the other ones of its network.
fn owner(address: IpAddr) -> IpAddr {
    const NETWORK: u128 = !0 << 64;
    match address.to_canonical() {
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() & NETWORK).into(),
        address => address,
    }
}

fn index(socket: Socket) -> usize {
    match socket {
        Socket::Clients => 0,
        Socket::Members => 1,
    }
}

fn cut_off(member: Member) -> String {
    match member.role() {
        Role::Coordinator => format!(
            "{member} was removed from the cluster; set its directory aside and join again with a token"
        ),
        Role::Worker | Role::Client => format!("{member} was revoked; join again with a new token"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    /// All the places that one address gets.
    fn take_all(gate: &Arc<Gate>, socket: Socket, from: IpAddr) -> Vec<Pass> {
        let mut passes = Vec::new();
        loop {
            match gate.incoming(socket, from, true) {
                Verdict::Shake(pass) => passes.push(pass),
                Verdict::Refuse => return passes,
                Verdict::Prove => panic!("it has proven itself"),
            }
        }
    }

    #[test]
    fn one_address_does_not_take_all_places_and_gives_them_back() {
        let (one, two) = (address("10.0.0.1"), address("10.0.0.2"));
        for (socket, other) in [(Socket::Clients, Socket::Members), (Socket::Members, Socket::Clients)] {
            let gate = Gate::new("c", ReplicaId(1));
            let mut passes = take_all(&gate, socket, one);
            assert_eq!(passes.len(), HANDSHAKES_MAX / 2);
            assert!(matches!(gate.incoming(socket, two, true), Verdict::Shake(_)));
            assert!(matches!(gate.incoming(socket, two, false), Verdict::Prove));
            assert!(matches!(gate.incoming(other, one, false), Verdict::Shake(_)), "another socket");
            passes.clear();
            assert!(matches!(gate.incoming(socket, one, false), Verdict::Shake(_)));
            assert!(gate.lock().shaking[index(socket)].by_address.is_empty());
        }
    }

    #[test]
    fn a_few_addresses_together_leave_room_for_one_more() {
        let gate = Gate::new("c", ReplicaId(1));
        let taken: Vec<_> =
            (1..=7).map(|n| take_all(&gate, Socket::Members, address(&format!("10.0.0.{n}")))).collect();
        assert!(taken.iter().all(|passes| !passes.is_empty()));
        assert!(matches!(gate.incoming(Socket::Members, address("10.1.0.1"), true), Verdict::Shake(_)));
        let gate = Gate::new("c", ReplicaId(1));
        let _taken = take_all(&gate, Socket::Members, address("fd00::1"));
        assert!(
            matches!(gate.incoming(Socket::Members, address("fd00::2"), true), Verdict::Refuse),
            "one network"
        );
        assert!(matches!(gate.incoming(Socket::Members, address("fd00:0:0:1::2"), true), Verdict::Shake(_)));
    }

    #[test]
    fn a_certificate_opens_only_the_socket_of_its_role() {
        let gate = Gate::new("c", ReplicaId(1));
        let peer = |member| Peer { member, name: "x".into(), cluster_id: "c".into() };
        let client = peer(Member::Client(fleet_common::ids::UserId(1)));
        let worker = peer(Member::Worker(fleet_common::ids::NodeId(1)));
        let other = peer(Member::Coordinator(ReplicaId(2)));
        let copy = peer(Member::Coordinator(ReplicaId(1)));
        assert!(
            gate.admit(Socket::Clients, &client).is_ok() && gate.admit(Socket::Members, &client).is_err()
        );
        assert!(gate.admit(Socket::Members, &worker).is_ok());
        assert!(gate.admit(Socket::Members, &other).is_ok() && gate.admit(Socket::Clients, &other).is_err());
        let Err(Turned::Away(why)) = gate.admit(Socket::Members, &copy) else { panic!() };
        assert!(why.contains("runs twice"), "{why}");
        let foreign = Peer { cluster_id: "d".into(), ..worker.clone() };
        assert!(gate.admit(Socket::Members, &foreign).is_err());
        gate.lock().revoked.insert(worker.member);
        assert!(matches!(gate.admit(Socket::Members, &worker), Err(Turned::Forever(_))));
    }
}
