//! Who is let in, and who must leave again. Both sockets ask here; the raft thread says what has changed.
//!
//! An allow-list: a certificate counts only if the applied state has a member of this number with this key. One of whom it has not heard is
//! refused, after a look at a newer state (`mod.rs`); that of a coordinator also by what the other coordinators say, since without them
//! there is no newer state to look at.

use crate::cluster::State;
use crate::cluster::admitted::{Admitted, cut_off};
use crate::cluster::members::ReplicaRecord;
use fleet_common::ids::ReplicaId;
use fleet_common::net::{self, KeyHash, Peer, Socket, Turned};
use fleet_common::protocol::{CoordinatorAddress, Member, Role};
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
/// Members of whom this state has not heard, and for whom a newer one is looked at; of them from one address. Each has a certificate of the
/// cluster's CA.
const LOOKS_MAX: usize = 64;
const LOOKS_PER_ADDRESS_MAX: usize = 16;
/// Coordinators that others vouch for.
const VOUCHED_MAX: usize = 64;

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
    admitted: BTreeMap<Member, Admitted>,
    admins: BTreeSet<Member>,
    /// Coordinators of which the state has not heard, and others have.
    vouched: BTreeMap<ReplicaId, KeyHash>,
    roster: Vec<(CoordinatorAddress, KeyHash)>,
    held: BTreeMap<Member, Vec<Held>>,
    clients: usize,
    members: usize,
    shaking: [Waiting; 2],
    joining: Waiting,
    looking: Waiting,
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
    Looking(IpAddr),
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

    /// A place for a stranger for whom a newer state is looked at.
    pub fn stranger(self: &Arc<Self>, address: IpAddr) -> Option<Pass> {
        let entered = self.lock().looking.enter(address, LOOKS_MAX, LOOKS_PER_ADDRESS_MAX);
        entered.then(|| Pass { gate: self.clone(), place: Place::Looking(address) })
    }

    /// Whether the holder of this certificate, whose key has this hash, has anything to do at this socket. `false`: nobody here has heard of
    /// him.
    pub fn admit(&self, socket: Socket, peer: &Peer, key: &KeyHash) -> Result<bool, Turned> {
        let Peer { member, cluster_id, .. } = peer;
        if *cluster_id != self.cluster_id {
            return Err(Turned::Away("this certificate is of another cluster".into()));
        }
        let known = {
            let inner = self.lock();
            if inner.revoked.contains(member) {
                return Err(Turned::Forever(cut_off(*member)));
            }
            inner.key_of(*member)
        };
        if known.is_some_and(|known| known != *key) {
            return Err(Turned::Away(format!(
                "this certificate of {member} is not for the key with which {member} joined; use the one that it was given, or join again with a token"
            )));
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
            _ => Ok(known.is_some()),
        }
    }

    /// Whether who connects as this coordinator, or answers as it, may be it as far as is known here.
    pub fn may_be(&self, replica: ReplicaId, key: &KeyHash) -> bool {
        self.lock().key_of(Member::Coordinator(replica)).is_none_or(|known| known == *key)
    }

    /// Another coordinator knows these, or they answer where the cluster said that they are. What the state says counts more.
    pub fn vouch(&self, coordinators: impl IntoIterator<Item = (ReplicaId, KeyHash)>) {
        let mut inner = self.lock();
        for (replica, key) in coordinators {
            let member = Member::Coordinator(replica);
            let news = !inner.admitted.contains_key(&member) && !inner.revoked.contains(&member);
            if news && inner.vouched.len() < VOUCHED_MAX {
                inner.vouched.entry(replica).or_insert(key);
            }
        }
    }

    /// The registered coordinators, each with its key, for others.
    pub fn roster(&self) -> Vec<(CoordinatorAddress, KeyHash)> {
        self.lock().roster.clone()
    }

    /// How a member was let in; `None` where the state has not heard of him.
    pub fn known(&self, member: Member) -> Option<Admitted> {
        self.lock().admitted.get(&member).copied()
    }

    pub fn is_admin(&self, member: Member) -> bool {
        self.lock().admins.contains(&member)
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
            Role::Client | Role::Admin => (inner.clients, CLIENTS_MAX, PER_CLIENT_MAX),
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
        inner.admitted = state.admitted().clone();
        let with_key = |(replica, record): (&ReplicaId, &ReplicaRecord)| {
            let admitted = state.admitted().get(&Member::Coordinator(*replica))?;
            Some((record.address.clone(), admitted.key))
        };
        inner.roster = state.replicas().iter().filter_map(with_key).collect();
        inner.admins = inner.admitted.keys().copied().filter(|member| state.is_admin(*member)).collect();
        let Inner { admitted, revoked, vouched, .. } = &mut *inner;
        vouched.retain(|replica, _| {
            let member = Member::Coordinator(*replica);
            !admitted.contains_key(&member) && !revoked.contains(&member)
        });
    }

    /// These are members, or are known better, from now on.
    pub fn add(&self, state: &State, new: &[Member]) {
        let mut inner = self.lock();
        for member in new {
            let Some(admitted) = state.admitted().get(member) else { continue };
            inner.admitted.insert(*member, *admitted);
            if state.is_admin(*member) {
                inner.admins.insert(*member);
            }
        }
    }

    /// Connections that are here, by who made them.
    pub fn connections_by_kind(&self) -> [(&'static str, usize); 3] {
        let inner = self.lock();
        let of = |role: Role| {
            let held = inner.held.iter().filter(|(member, _)| member.role() == role);
            held.map(|(_, held)| held.len()).sum()
        };
        [("client", of(Role::Client)), ("worker", of(Role::Worker)), ("coordinator", of(Role::Coordinator))]
    }

    /// Connections of the workers and clients that are here.
    pub fn connections(&self) -> Vec<Connection> {
        let inner = self.lock();
        let held = inner.held.iter().filter(|(member, _)| member.role() != Role::Coordinator);
        held.flat_map(|(_, held)| held).map(|held| held.connection.clone()).collect()
    }
}

impl Inner {
    fn key_of(&self, member: Member) -> Option<KeyHash> {
        let vouched = || match member {
            Member::Coordinator(replica) => self.vouched.get(&replica).copied(),
            Member::Worker(_) | Member::Client(_) => None,
        };
        self.admitted.get(&member).map(|admitted| admitted.key).or_else(vouched)
    }

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
            Place::Looking(address) => inner.looking.leave(*address),
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

/// What somebody is told of whom no state has heard.
pub fn stranger(member: Member) -> Turned {
    let why = format!("{member} was never admitted to this cluster; join again with a new token");
    match member.role() {
        // It would take this for its own removal.
        Role::Coordinator => Turned::Away(why),
        _ => Turned::Forever(why),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::commands::{Change, RevokeMember};
    use crate::cluster::tests::{Script, redeem, token};
    use fleet_common::ids::UserId;

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
        let admit = |socket, peer: &Peer| gate.admit(socket, peer, &[3; 32]);
        assert!(admit(Socket::Clients, &client).is_ok() && admit(Socket::Members, &client).is_err());
        assert!(admit(Socket::Members, &worker).is_ok());
        assert!(admit(Socket::Members, &other).is_ok() && admit(Socket::Clients, &other).is_err());
        let Err(Turned::Away(why)) = admit(Socket::Members, &copy) else { panic!() };
        assert!(why.contains("runs twice"), "{why}");
        let foreign = Peer { cluster_id: "d".into(), ..worker.clone() };
        assert!(admit(Socket::Members, &foreign).is_err());
        gate.lock().revoked.insert(worker.member);
        assert!(matches!(admit(Socket::Members, &worker), Err(Turned::Forever(_))));
    }

    #[test]
    fn only_who_was_let_in_is_known_and_only_with_the_key_that_he_had() {
        let gate = Gate::new("c", ReplicaId(1));
        let peer = |member| Peer { member, name: "x".into(), cluster_id: "c".into() };
        let (user, stranger) = (Member::Client(UserId(1)), Member::Client(UserId(77_777_777)));
        let mut script = Script::with_replicas(1);
        script.run(token("a", Role::Admin, 1));
        gate.follow(&script.state);
        let admit = |member, key| gate.admit(Socket::Clients, &peer(member), &[key; 32]);
        assert_eq!(admit(user, 3), Ok(false), "it has not joined yet");
        script.run(redeem("a", "ann"));
        gate.add(&script.state, &[user]);
        assert_eq!(admit(user, 3), Ok(true));
        assert!(gate.is_admin(user) && !gate.is_admin(stranger));
        let Err(Turned::Away(why)) = admit(user, 4) else { panic!("another key") };
        assert!(why.contains("not for the key with which user-1 joined"), "{why}");
        assert_eq!(admit(stranger, 3), Ok(false));
        script.run(Change::RevokeMember(RevokeMember { member: user }));
        gate.follow(&script.state);
        assert!(matches!(admit(user, 3), Err(Turned::Forever(_))));
    }

    #[test]
    fn a_coordinator_that_others_vouch_for_is_known_until_the_state_says_more() {
        let gate = Gate::new("c", ReplicaId(1));
        let mut script = Script::with_replicas(2);
        gate.follow(&script.state);
        let admit = |replica, key| {
            let peer = Peer {
                member: Member::Coordinator(ReplicaId(replica)),
                name: "x".into(),
                cluster_id: "c".into(),
            };
            gate.admit(Socket::Members, &peer, &[key; 32])
        };
        assert_eq!(admit(3, 9), Ok(false));
        gate.vouch([(ReplicaId(2), [9; 32]), (ReplicaId(3), [9; 32])]);
        assert!(admit(2, 9).is_err(), "the state knows another key");
        assert_eq!(admit(3, 9), Ok(true));
        assert!(admit(3, 8).is_err() && !gate.may_be(ReplicaId(3), &[8; 32]));
        script.admit_coordinator();
        gate.follow(&script.state);
        assert!(gate.lock().vouched.is_empty());
        assert_eq!(admit(3, 3), Ok(true));
    }
}
