//! Everything there is, the events that happen to it, and the loop.

use super::burst::{BurstEvent, Bursts};
use super::client::Client;
use super::engine::{Engine, EngineEvent};
use super::faults::Mend;
use super::host::{Doom, Host};
use super::machine::Machine;
use super::net::{ConnId, Net, NetEvent, Site};
use super::oracle::{self, Oracle};
use super::queue::{MINUTE, MS, Micros, Queue, SECOND};
use super::random::Random;
use super::scale::Scale;
use super::trace::Trace;
use super::watch::Watch;
use fleet_agent::agent;
use fleet_agent::gang::GangId;
use fleet_common::ids::{NodeId, ReplicaId};
use fleet_common::protocol::{ClientFrame, FromAgent, Member, Refusal, Reply, ToAgent};
use fleet_coordinator::cluster::commands::{Change, RedeemToken};
use fleet_coordinator::cluster::members::Standing;
use fleet_coordinator::cluster::session::RequestId;
use fleet_coordinator::cluster::{self};
use fleet_coordinator::control::{Action, Admission, PeerMessage, Session};
use fleet_coordinator::raft::disk::{Disk, Table};
use prost::Message as _;
use raft::eraftpb::{Entry, Message, MessageType};
use std::collections::BTreeMap;
use std::fmt;

/// Between two looks at the network and its timeouts.
const LOOK: Micros = 250 * MS;
/// Between two comparisons of all replicas.
const COMPARE: Micros = SECOND;
/// For everything to be well after the faults have ended: the longest queue of jobs that a run can have.
const CALM: Micros = 60 * MINUTE;

pub enum Event {
    Look,
    Compare,
    Connected { conn: ConnId, end: usize },
    Arrives { conn: ConnId, end: usize, payload: Box<Payload> },
    Tick { host: u32, life: u64 },
    Run { host: u32, life: u64 },
    Emit { host: u32, life: u64, actions: Vec<Action> },
    PeerUnreachable { host: u32, life: u64, peer: ReplicaId },
    Dial { machine: u32, life: u64 },
    AgentDue { machine: u32, life: u64 },
    ToAgentCore { machine: u32, life: u64, input: Box<agent::Input> },
    Engine(GangId, EngineEvent),
    ClientNext { client: u32 },
    ClientRetry { client: u32, tries: u32 },
    Burst(BurstEvent),
    Fault,
    Mend(Mend),
    Calm,
}

#[derive(Clone, Debug)]
pub enum Payload {
    Peer(PeerMessage),
    FromAgent(FromAgent),
    ToAgent(ToAgent),
    Question(Question),
    Answered(Answered),
}

#[derive(Clone, Debug)]
pub enum Question {
    Client { caller: Member, frame: ClientFrame },
    Join { redeem: RedeemToken, request: RequestId },
    Propose { request: RequestId, change: Change },
}

#[derive(Clone, Debug)]
pub enum Answered {
    Reply(Reply),
    Joined(Result<Admission, Refusal>),
    Proposed(Result<cluster::Answer, Refusal>),
}

/// What a connection is for. The first end is who made it.
#[derive(Clone, Debug)]
pub enum Purpose {
    Peer { from: ReplicaId, to: ReplicaId },
    Agent { node: NodeId },
    Call,
}

pub struct World {
    pub seed: u64,
    pub queue: Queue<Event>,
    pub random: Random,
    pub trace: Trace,
    pub net: Net<Payload>,
    pub purposes: BTreeMap<ConnId, Purpose>,
    pub sessions_of: BTreeMap<ConnId, Session>,
    pub hosts: BTreeMap<u32, Host>,
    /// Where each coordinator that was ever there is.
    pub addresses: BTreeMap<ReplicaId, u32>,
    pub machines: BTreeMap<u32, Machine>,
    pub clients: BTreeMap<u32, Client>,
    pub bursts: Bursts,
    /// In a world of large gangs.
    pub scale: Option<Box<Scale>>,
    pub engine: Engine,
    pub oracle: Oracle,
    pub watch: Watch,
    pub fault_every: Micros,
    pub calm: bool,
    pub calm_at: Micros,
    pub violation: Option<String>,
    pub done: bool,
    pub events: u64,
}

impl World {
    pub fn say(&mut self, text: fmt::Arguments<'_>) {
        self.trace.line(self.queue.now(), text);
    }

    /// The first violation ends the run.
    pub fn violated(&mut self, what: String) {
        if self.violation.is_none() {
            self.say(format_args!("VIOLATION: {what}"));
            self.violation = Some(what);
        }
    }

    /// Runs until all is well at the end, or something is not.
    pub fn run(&mut self) {
        while self.violation.is_none() && !self.done {
            let Some(event) = self.queue.pop() else { break };
            self.events += 1;
            self.on_event(event);
            if self.calm && self.queue.now() > self.calm_at + CALM {
                let why = self.unwell().unwrap_or_default();
                self.say_how_coordinators_stand();
                self.violated(format!("{} min after all faults ended {why}", CALM / MINUTE));
            }
        }
    }

    pub fn on_event(&mut self, event: Event) {
        match event {
            Event::Look => {
                for event in self.net.look(self.queue.now(), &mut self.random) {
                    self.on_net(event);
                }
                self.queue.after(LOOK, Event::Look);
            }
            Event::Compare => self.compare_all(),
            Event::Connected { conn, end } => self.connected(conn, end),
            Event::Arrives { conn, end, payload } => self.arrives(conn, end, *payload),
            Event::Tick { host, life } => self.on_tick(host, life),
            Event::Run { host, life } => self.on_run(host, life),
            Event::Emit { host, life, actions } => self.on_emit(host, life, actions),
            Event::PeerUnreachable { host, life, peer } => self.on_peer_unreachable(host, life, peer),
            Event::Dial { machine, life } => self.on_dial(machine, life),
            Event::AgentDue { machine, life } => self.on_agent_due(machine, life),
            Event::ToAgentCore { machine, life, input } => {
                if self.machines.get(&machine).is_some_and(|machine| machine.life == life) {
                    self.tell_agent_core(machine, *input);
                }
            }
            Event::Engine(id, event) => self.on_engine(id, event),
            Event::ClientNext { client } => self.on_client_next(client),
            Event::ClientRetry { client, tries } => self.on_client_retry(client, tries),
            Event::Burst(event) => self.on_burst(event),
            Event::Fault => self.on_fault(),
            Event::Mend(mend) => self.on_mend(mend),
            Event::Calm => {
                self.calm_at = self.queue.now();
                self.calm_down();
            }
        }
    }

    // ---- network ------------------------------------------------------------------------------------------------------

    pub fn send(&mut self, conn: ConnId, from_end: usize, payload: Payload, bytes: usize) {
        let now = self.queue.now();
        let counted = self.scale.as_mut().and_then(|scale| scale.count(&payload));
        let bytes = counted.unwrap_or(bytes);
        if let Some(event) = self.net.send(conn, from_end, payload, bytes, now, &mut self.random) {
            self.on_net(event);
        }
    }

    fn on_net(&mut self, event: NetEvent<Payload>) {
        match event {
            NetEvent::Arrives { at, conn, end, payload } => {
                self.queue.at(at, Event::Arrives { conn, end, payload: Box::new(payload) });
            }
            NetEvent::Lost { conn, site: Site::Host(host) } => self.host_loses(host, conn),
            NetEvent::Lost { conn, site: Site::Machine(machine) } => self.machine_loses(machine, conn),
            NetEvent::Lost { conn, site: Site::Client(_) } if self.bursts.owns(conn) => {
                self.burst_loses(conn)
            }
            NetEvent::Lost { conn, site: Site::Client(client) } => self.client_loses(client, conn),
        }
    }

    fn connected(&mut self, conn: ConnId, end: usize) {
        if !self.net.is_open(conn, end) {
            return;
        }
        let purpose = self.purposes.get(&conn).cloned();
        match (self.net.site(conn, end), purpose) {
            (Some(Site::Host(host)), Some(Purpose::Peer { to, .. })) => self.peer_connected(host, to, conn),
            (Some(Site::Host(host)), Some(Purpose::Agent { node })) => self.agent_connected(host, conn, node),
            (Some(Site::Machine(machine)), _) => self.machine_connected(machine, conn),
            (Some(Site::Client(_)), _) if self.bursts.owns(conn) => self.burst_connected(conn),
            (Some(Site::Client(client)), _) => self.client_connected(client, conn),
            _ => {}
        }
    }

    fn arrives(&mut self, conn: ConnId, end: usize, payload: Payload) {
        if !self.net.is_open(conn, end) {
            return;
        }
        match (self.net.site(conn, end), payload) {
            (Some(Site::Host(host)), payload) => self.host_hears(host, conn, payload),
            (Some(Site::Machine(machine)), Payload::ToAgent(message)) => {
                self.machine_hears(machine, conn, message)
            }
            (Some(Site::Client(_)), Payload::Answered(answered)) if self.bursts.owns(conn) => {
                self.burst_hears(conn, answered)
            }
            (Some(Site::Client(client)), Payload::Answered(answered)) => {
                self.client_hears(client, conn, answered)
            }
            _ => {}
        }
    }

    // ---- what the simulation looks at -----------------------------------------------------------------------------------

    /// A message of a coordinator is about to leave.
    pub fn look_at_message(&mut self, host: u32, message: &PeerMessage) {
        let PeerMessage::Raft(bytes) = message else { return };
        let seen = match Message::decode(&bytes[..]) {
            Ok(message) => {
                if message.get_msg_type() == MessageType::MsgRequestVoteResponse && !message.reject {
                    self.after_a_vote(host);
                }
                self.trace.count(message.from << 48 ^ message.to << 40 ^ message.term << 20 ^ message.index);
                self.watch.sent(&message)
            }
            Err(error) => Err(format!("a message of raft cannot be read: {error}")),
        };
        if let Err(what) = seen {
            self.violated(what);
        }
    }

    /// A coordinator has worked: what it has newly logged and committed is looked at.
    pub fn look_at_host(&mut self, number: u32) {
        let now = self.queue.now();
        let Some(host) = self.hosts.get_mut(&number) else { return };
        let Some(control) = &host.control else { return };
        let replica = control.replica();
        let (commit, applied) = (replica.commit_index(), replica.applied_index());
        let status = control.status();
        if host.led_in != status.leading_since_ms.map(|_| status.term) {
            host.led_in = status.leading_since_ms.map(|_| status.term);
            host.leads_since = now;
        }
        if replica.leads() {
            let last = host.disk.last_key(Table::Log).map_or(0, |key| super::watch::index_of(&key));
            for index in host.logged.max(commit).max(last.saturating_sub(4096)) + 1..=last {
                if let Some(entry) = entry_at(host, index) {
                    let times = (host.clock.unix_ms(now), now);
                    self.oracle.logged(number, host.leads_since, &entry, times);
                }
            }
            host.logged = last;
        } else {
            host.logged = 0;
        }
        let mut found = Vec::new();
        let removed = host.disk.take_removed_log();
        for index in host.checked + 1..=commit {
            let was_removed = || removed.get(&index.to_be_bytes()[..]).and_then(|row| entry_of(row));
            let Some(entry) = entry_at(host, index).or_else(was_removed) else { continue };
            found.push(self.oracle.committed(&entry));
        }
        host.checked = host.checked.max(commit);
        let moved = applied != host.compared;
        let compared = if moved && applied % 16 == 0 {
            host.compared = applied;
            self.oracle.compare(control.state(), applied)
        } else {
            Ok(())
        };
        for done in found {
            match done {
                Ok(Some(done)) => {
                    if let Some(line) = done.line {
                        self.say(format_args!("{line}"));
                    }
                    if let Some(loss) = done.loss {
                        self.judge_loss(&loss);
                    }
                }
                Ok(None) => {}
                Err(what) => self.violated(format!("host-{number}: {what}")),
            }
        }
        if let Err(what) = compared {
            self.violated(format!("host-{number}: {what}"));
        }
    }

    fn judge_loss(&mut self, loss: &oracle::Loss) {
        if let Some(what) = self.oracle.too_early(loss) {
            self.violated(what);
        }
        for (host, heard) in self.oracle.witnesses(loss) {
            let since = heard.saturating_sub(oracle::SETTLED);
            let steady = |number: u32| {
                self.hosts.get(&number).is_some_and(|host| host.is_serving() && host.stable_since < since)
            };
            let (one, leader) = (Site::Host(host), Site::Host(loss.by.leader));
            let near = host == loss.by.leader
                || self.net.good_since(one, leader, since) && self.net.good_since(leader, one, since);
            if steady(host) && steady(loss.by.leader) && near {
                self.violated(format!(
                    "{} was called lost by host-{} at {:.3}, and host-{host} had heard it at {:.3}",
                    loss.node,
                    loss.by.leader,
                    loss.by.at as f64 / 1e6,
                    heard as f64 / 1e6
                ));
            }
        }
    }

    fn compare_all(&mut self) {
        self.queue.after(COMPARE, Event::Compare);
        let mut found = Vec::new();
        for host in self.hosts.values() {
            if let Some(control) = &host.control {
                let same = self.oracle.compare(control.state(), control.replica().applied_index());
                found.extend(same.err().map(|what| format!("host-{}: {what}", host.number)));
            }
        }
        found.into_iter().for_each(|what| self.violated(what));
        if self.calm && self.queue.now() > self.calm_at + 5 * SECOND && self.unwell().is_none() {
            self.check_histories();
            self.done = true;
        }
    }

    fn check_histories(&mut self) {
        let mut found = Vec::new();
        for host in self.hosts.values().filter(|host| host.control.is_some()) {
            found.extend(
                self.oracle
                    .compare_history(&host.disk, self.oracle.applied())
                    .err()
                    .map(|what| format!("host-{}: {what}", host.number)),
            );
        }
        found.into_iter().for_each(|what| self.violated(what));
    }

    /// Why the cluster is not as it should be after some time of calm; `None` when it is.
    pub fn unwell(&self) -> Option<String> {
        let members = self.hosts.values().filter(|host| host.retired.is_none());
        for host in members {
            let Some(control) = &host.control else {
                return Some(format!("host-{} is not there", host.number));
            };
            let applied = control.replica().applied_index();
            if applied != self.oracle.applied() {
                return Some(format!(
                    "host-{} has applied {applied} of {}",
                    host.number,
                    self.oracle.applied()
                ));
            }
        }
        for (replica, record) in self.oracle.state().replicas() {
            let there = self.addresses.get(replica).and_then(|host| self.hosts.get(host));
            if there.is_none_or(|host| host.control.is_none()) || record.standing != Standing::Voter {
                return Some(format!("{replica} is {:?} and not all there", record.standing));
            }
        }
        if !self
            .hosts
            .values()
            .any(|host| host.control.as_ref().is_some_and(|control| control.replica().leads()))
        {
            return Some("nobody leads".to_owned());
        }
        let away = |machine: &&Machine| machine.expelled || machine.node.is_none() || machine.agent.is_none();
        if let Some(machine) = self.machines.values().find(away) {
            return Some(format!("machine-{} is not there", machine.number));
        }
        if let Some(job) = self.oracle.unfinished().first() {
            let slots: Vec<u32> = self.machines.values().map(|machine| machine.slots).collect();
            let Some(record) = self.oracle.state().jobs().get(job) else {
                return Some(format!("{job} is gone"));
            };
            let (state, ranks, wish) = (record.state, record.world_size, &record.wish);
            return Some(format!(
                "{job} is {state:?} with {ranks} ranks and {wish:?} on machines with {slots:?}"
            ));
        }
        if !self.bursts.is_empty() {
            return Some("a process waits for an answer".to_owned());
        }
        let waiting = self.clients.iter().find(|(_, client)| !client.is_idle());
        waiting.map(|(number, _)| format!("client-{number} waits for an answer"))
    }

    fn say_how_coordinators_stand(&mut self) {
        let one = |host: &Host| match &host.control {
            Some(control) => format!("host-{}: {:?}", host.number, control.status()),
            None => format!("host-{} is not there: {:?}", host.number, host.retired),
        };
        let lines: Vec<String> = self.hosts.values().map(one).collect();
        lines.iter().for_each(|line| self.say(format_args!("{line}")));
    }

    // ---- coordinators as processes ------------------------------------------------------------------------------------

    pub fn crash_host(&mut self, number: u32, doom: Doom) {
        let Some(host) = self.hosts.get_mut(&number) else { return };
        if host.control.take().is_none() {
            return;
        }
        self.oracle.forgets(number);
        match doom {
            Doom::Killed => host.disk.restart(),
            Doom::PowerFailure(kept) => host.disk.lose_power(kept),
        }
        host.doom = None;
        let site = host.site();
        self.net.down(site);
        self.restart_later(number);
    }

    /// Something on the disk cannot be trusted, or the process met what it must not go on with.
    pub fn control_failed(&mut self, number: u32, why: &str) {
        let Some(host) = self.hosts.get_mut(&number) else { return };
        if !host.damaged {
            self.violated(format!("host-{number} cannot go on: {why}"));
            return;
        }
        self.retire(number, why);
    }
}

fn entry_at(host: &Host, index: u64) -> Option<Entry> {
    let sealed = host.disk.get(Table::Log, &index.to_be_bytes()).expect("a disk in memory can be read")?;
    entry_of(&sealed)
}

/// The row ends with its checksum, which the replica itself looks at.
fn entry_of(sealed: &[u8]) -> Option<Entry> {
    Entry::decode(&sealed[..sealed.len().checked_sub(8)?]).ok()
}
