//! How a run begins, and how coordinators and machines come and go.

use super::burst::Bursts;
use super::client::{Client, OPERATOR, Want};
use super::engine::Engine;
use super::host::{Clock, Host};
use super::machine::Machine;
use super::net::{Net, Site};
use super::oracle::Oracle;
use super::queue::{Micros, Queue, SECOND};
use super::random::{Random, mix};
use super::trace::Trace;
use super::watch::Watch;
use super::world::{Event, World};
use fleet_common::ids::ReplicaId;
use fleet_common::protocol::{CoordinatorAddress, Member, Role};
use fleet_coordinator::cluster::commands::{COMMAND_LEVEL, Change, CreateToken, RedeemToken, SetRetention};
use fleet_coordinator::cluster::members::{ReplicaRecord, Standing};
use fleet_coordinator::cluster::{Command, State};
use fleet_coordinator::control::{Control, Myself, TICK_MS};
use fleet_coordinator::raft::history::History;
use fleet_coordinator::raft::replica::{Replica, Sizes};
use std::collections::BTreeMap;

/// Index of the log at which the first state counts as known.
const GENESIS: u64 = 1;
/// Small, so that snapshots are taken and travel often.
const SIZES: Sizes = Sizes {
    snapshot_bytes: 1 << 20,
    snapshot_entries: 150,
    keep_behind: 30,
    keep_behind_bytes: 8 << 10,
    fetched_log_bytes: 256 << 10,
    chunk_bytes: 4 << 10,
};
/// So little that a run removes much of its history.
const RETENTION: SetRetention = SetRetention { age_ms: Some(20 * 60 * 1000), bytes: Some(200 << 10) };
const CLUSTER: &str = "simulated";
const VERSION: &str = "0";
const CLIENTS_MAX: u32 = 7;
const SECRET: [u8; 32] = [7; 32];

impl World {
    pub fn new(seed: u64, faults_end: Micros, print: bool) -> World {
        let mut random = Random::new(seed);
        let state = genesis(3);
        let fault_every = [4, 15, 15, 40][random.index(4)] * SECOND;
        let mut world = World::empty(seed, random, &state, fault_every, print);
        world.found();
        world.people();
        world.queue.after(0, Event::Look);
        world.queue.after(SECOND, Event::Compare);
        world.queue.after(10 * SECOND, Event::Fault);
        world.queue.at(faults_end, Event::Calm);
        world
    }

    /// In which nobody is yet.
    pub fn empty(seed: u64, random: Random, state: &State, fault_every: Micros, print: bool) -> World {
        World {
            seed,
            queue: Queue::default(),
            trace: Trace::new(print),
            net: Net::default(),
            purposes: BTreeMap::new(),
            sessions_of: BTreeMap::new(),
            hosts: BTreeMap::new(),
            addresses: BTreeMap::new(),
            machines: BTreeMap::new(),
            clients: BTreeMap::new(),
            bursts: Bursts::default(),
            scale: None,
            engine: Engine::default(),
            oracle: Oracle::new(state.clone(), GENESIS),
            watch: Watch::default(),
            fault_every,
            calm: false,
            calm_at: 0,
            violation: None,
            done: false,
            events: 0,
            random,
        }
    }

    /// Starts the three coordinators that the state begins with.
    pub fn found(&mut self) {
        let state = self.oracle.state().clone();
        for number in 1..=3 {
            let clock = self.clock();
            let mut host = Host::new(number, clock);
            host.replica = Some(ReplicaId(u64::from(number)));
            let id = u64::from(number);
            let created = Replica::create(host.disk.clone(), id, &[1, 2, 3], state.clone(), self.seed);
            drop(created.expect("an empty disk takes a new replica"));
            self.hosts.insert(number, host);
            self.addresses.insert(ReplicaId(id), number);
            self.start_host(number);
        }
    }

    fn people(&mut self) {
        for number in 0..self.random.range(4..u64::from(CLIENTS_MAX) + 1) as u32 {
            self.net.up(Site::Client(number), 1);
            let think = self.random.range(SECOND / 2..4 * SECOND);
            self.clients.insert(number, Client::new(number, think));
            let after = self.random.range(SECOND..10 * SECOND);
            if number != OPERATOR {
                self.queue.after(after, Event::ClientNext { client: number });
            }
        }
        self.begin_bursts();
        self.order_token(token(Role::Worker));
        for number in 1..=self.random.range(2..7) as u32 {
            let (slots, clock) = (1 + self.random.range(0..8) as u32, self.clock());
            self.machines.insert(number, Machine::new(number, slots, clock));
            let name = format!("machine-{number}");
            self.order_join(Want::JoinMachine(number), redeem(Role::Worker, name));
        }
    }

    pub fn clock(&mut self) -> Clock {
        let wall_offset_ms = self.random.range(0..2000) as i64 - 1000;
        Clock { wall_offset_ms, drift_ppm: self.random.range(0..400) as i64 - 200 }
    }

    /// Starts the coordinator of a host from what is on its disk.
    pub fn start_host(&mut self, number: u32) {
        let now = self.queue.now();
        let Some(host) = self.hosts.get_mut(&number) else { return };
        let (None, None, Some(id)) = (&host.control, &host.retired, host.replica) else { return };
        host.disk.restart();
        host.life += 1;
        let life = host.life;
        let seed = mix(self.seed ^ u64::from(number) << 40 ^ life << 20);
        let opened = match Replica::open(host.disk.clone(), seed) {
            Ok(None) => Replica::join(host.disk.clone(), id.0, CLUSTER, seed).map(Some),
            opened => opened,
        };
        let replica = match opened {
            Ok(Some(replica)) => replica.sized(SIZES),
            Ok(None) => return self.control_failed(number, "its disk is empty"),
            Err(error) => return self.control_failed(number, &error.to_string()),
        };
        // What was put back keeps no promise: that it is found is another rule.
        let promised = match host.damaged {
            true => Ok(()),
            false => self.watch.restarted(id.0, replica.term(), replica.commit_index(), &host.disk),
        };
        let myself = Myself {
            address: address_of(id, number),
            name: format!("host-{number}"),
            version: VERSION.into(),
            http: String::new(),
            seeds: self.addresses.keys().copied().filter(|known| *known != id).collect(),
        };
        let history = History::new(host.disk.clone());
        let at = host.now(now);
        host.begin(Control::new(replica, history, myself, seed, at));
        if host.stable_since != Micros::MAX {
            host.stable_since = now;
        }
        host.logged = 0;
        let first = u64::from(number) * 7 + self.random.range(0..TICK_MS);
        self.net.up(Site::Host(number), life);
        self.queue.after(first * 1000, Event::Tick { host: number, life });
        self.say(format_args!("host-{number} starts as {id}"));
        if let Err(what) = promised {
            self.violated(what);
        }
    }

    /// A machine has its certificate.
    pub fn machine_joined(&mut self, number: u32, member: Member) {
        let Member::Worker(node) = member else {
            self.violated(format!("machine-{number} joined and is {member}"));
            return;
        };
        if let Some(machine) = self.machines.get_mut(&number).filter(|machine| machine.node.is_none()) {
            machine.node = Some(node);
            self.say(format_args!("machine-{number} is {node}"));
            self.start_agent(number);
        }
    }

    /// An agent has ended by itself. Somebody starts it again, with a new identity if it was cut off.
    pub fn agent_exited(&mut self, number: u32) {
        if self.machines.get(&number).is_some_and(|machine| machine.expelled) {
            return self.join_again(number);
        }
        self.queue.after(SECOND, Event::Mend(super::faults::Mend::StartAgent(number)));
    }
}

fn address_of(replica: ReplicaId, host: u32) -> CoordinatorAddress {
    CoordinatorAddress { replica, client: format!("host-{host}:1"), member: format!("host-{host}:2") }
}

fn token_of(role: Role) -> &'static str {
    match role {
        Role::Coordinator => "coordinator",
        Role::Worker => "worker",
        Role::Client => "client",
        Role::Admin => "admin",
    }
}

pub fn token(role: Role) -> CreateToken {
    let id = token_of(role).into();
    CreateToken { id, secret_sha256: SECRET, role, ttl_ms: 1 << 50, uses: 1000 }
}

pub fn redeem(role: Role, name: String) -> RedeemToken {
    RedeemToken { id: token_of(role).into(), secret_sha256: SECRET, name, key: [0; 32] }
}

/// A cluster of these coordinators, in which there are tokens for everybody already, and the clients have joined.
pub fn genesis(founders: u64) -> State {
    let founder = |id: u64| {
        let record = ReplicaRecord {
            address: address_of(ReplicaId(id), id as u32),
            name: format!("host-{id}"),
            version: VERSION.into(),
            level: COMMAND_LEVEL,
            joined_unix_ms: 0,
            standing: Standing::Voter,
        };
        (ReplicaId(id), record)
    };
    let mut state = State::founded(CLUSTER.into(), (1..=founders).map(founder).collect());
    let mut change = |change| {
        state.apply(GENESIS, Command { unix_ms: 0, request: None, by: None, why: None, change });
    };
    change(Change::SetRetention(RETENTION));
    for role in [Role::Coordinator, Role::Client, Role::Admin] {
        change(Change::CreateToken(token(role)));
    }
    (0..CLIENTS_MAX).for_each(|number| {
        let role = if number == OPERATOR { Role::Admin } else { Role::Client };
        change(Change::RedeemToken(redeem(role, format!("client-{number}"))));
    });
    state
}
