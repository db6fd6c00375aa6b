//! A machine that runs a coordinator: its disk, its clocks, its process, and the driver around `Control` that the server has too.

use super::net::{ConnId, Site};
use super::queue::{MS, Micros, SECOND};
use super::world::{Answered, Event, Payload, Purpose, Question, World};
use fleet_common::ids::{NodeId, ReplicaId};
use fleet_common::protocol::{FromAgent, Member, Reply, ToAgent};
use fleet_coordinator::cluster::State;
use fleet_coordinator::control::{
    AGENT_BATCHES_MAX, Action, Call, Control, Input, Now, PeerMessage, Session, Status, TICK_MS,
};
use fleet_coordinator::raft::memory::MemoryDisk;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

/// The wall clock when a run begins: some morning.
const EPOCH_MS: u64 = 1_800_000_000_000;
/// Messages to a coordinator that wait for a connection; beyond it the oldest goes. The server has the same kind of limit.
const WAITING_MAX: usize = 512;
/// A process that stands still is asked so often whether it goes on.
const EMIT_AGAIN: Micros = 5 * MS;
/// After a connection that did not come about.
const DIAL_AGAIN: Micros = 200 * MS;

/// A write and its sync take so long on a good disk, about.
pub const SYNC: Micros = 500;

/// Who stood still for longer has lost connections, and must not hold the silence against anybody.
const STANDSTILL: Micros = 5 * SECOND / 2;

/// A machine's clocks: the wall clock may be wrong by hours, the other one runs a little too fast or too slow.
#[derive(Clone, Copy, Debug, Default)]
pub struct Clock {
    pub wall_offset_ms: i64,
    pub drift_ppm: i64,
}

impl Clock {
    pub fn mono_ms(self, now: Micros) -> u64 {
        let drifted = i128::from(now) * i128::from(1_000_000 + self.drift_ppm) / 1_000_000;
        (drifted / 1000) as u64
    }

    pub fn unix_ms(self, now: Micros) -> u64 {
        (EPOCH_MS + now / MS).saturating_add_signed(self.wall_offset_ms)
    }
}

/// How a process shall end when its disk's fuse has burnt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Doom {
    Killed,
    /// Keeps so many of the unsynced batches.
    PowerFailure(usize),
}

#[derive(Debug, Default)]
struct Link {
    conn: Option<ConnId>,
    ready: bool,
    waiting: VecDeque<PeerMessage>,
    not_before: Micros,
}

/// An agent's connection as this coordinator has it.
#[derive(Debug)]
struct Held {
    conn: ConnId,
    /// Batches of events that are with `Control`.
    taken: usize,
    /// What is not read from the connection yet.
    unread: VecDeque<FromAgent>,
}

pub struct Host {
    pub number: u32,
    pub disk: Arc<MemoryDisk>,
    pub clock: Clock,
    /// Its member of the cluster; a host whose disk was lost gets another one.
    pub replica: Option<ReplicaId>,
    pub control: Option<Control<MemoryDisk>>,
    pub life: u64,
    pub paused: bool,
    pub paused_at: Micros,
    /// A write and its sync take so long.
    pub sync: Micros,
    pub doom: Option<Doom>,
    /// Why its replica does not take part any more.
    pub retired: Option<String>,
    /// Its disk was spoilt on purpose.
    pub damaged: bool,
    /// A copy that somebody made of its disk.
    pub copied: Option<MemoryDisk>,
    /// Since when nothing was wrong with the process and its disk.
    pub stable_since: Micros,
    /// The term in which it leads, and since when it has done so without standing still for long.
    pub led_in: Option<u64>,
    pub leads_since: Micros,
    /// How far its log was looked at, as a leader and as far as it is committed, and at which position its state was compared last.
    pub logged: u64,
    pub checked: u64,
    pub compared: u64,
    inbox: VecDeque<Input>,
    busy_until: Micros,
    run_planned: bool,
    links: BTreeMap<ReplicaId, Link>,
    /// Coordinators that were removed: their connections are closed and refused.
    refused: BTreeSet<ReplicaId>,
    sessions: BTreeMap<Session, Held>,
    calls: BTreeMap<Call, ConnId>,
    numbers: u64,
}

impl Host {
    /// A fault of its disk has ended; there may be another one.
    pub fn is_stable_from(&mut self, now: Micros) {
        let well = self.sync == SYNC && !self.disk.is_full();
        self.stable_since = if well { now } else { Micros::MAX };
    }

    pub fn new(number: u32, clock: Clock) -> Host {
        Host {
            number,
            disk: Arc::new(MemoryDisk::default()),
            clock,
            replica: None,
            control: None,
            life: 0,
            paused: false,
            paused_at: 0,
            sync: SYNC,
            doom: None,
            retired: None,
            damaged: false,
            copied: None,
            stable_since: 0,
            led_in: None,
            leads_since: 0,
            logged: 0,
            checked: 0,
            compared: 0,
            inbox: VecDeque::new(),
            busy_until: 0,
            run_planned: false,
            links: BTreeMap::new(),
            refused: BTreeSet::new(),
            sessions: BTreeMap::new(),
            calls: BTreeMap::new(),
            numbers: 0,
        }
    }

    pub fn site(&self) -> Site {
        Site::Host(self.number)
    }

    pub fn now(&self, now: Micros) -> Now {
        Now { mono_ms: self.clock.mono_ms(now), unix_ms: self.clock.unix_ms(now) }
    }

    /// Has a replica that takes part.
    pub fn counts(&self) -> bool {
        self.replica.is_some() && self.retired.is_none()
    }

    pub fn is_serving(&self) -> bool {
        self.control.is_some() && !self.paused
    }

    fn number(&mut self) -> u64 {
        self.numbers += 1;
        self.life << 32 | self.numbers
    }

    /// The process begins with this core.
    pub fn begin(&mut self, control: Control<MemoryDisk>) {
        self.refused = removed_coordinators(control.state());
        self.control = Some(control);
        self.led_in = None;
        self.paused = false;
        self.doom = None;
        self.inbox.clear();
        self.busy_until = 0;
        self.run_planned = false;
        self.links.clear();
        self.sessions.clear();
        self.calls.clear();
        self.numbers = 0;
    }
}

impl World {
    /// Something happened to a coordinator.
    pub fn tell_control(&mut self, number: u32, input: Input) {
        let now = self.queue.now();
        let Some(host) = self.hosts.get_mut(&number).filter(|host| host.control.is_some()) else { return };
        host.inbox.push_back(input);
        if host.paused || host.run_planned {
            return;
        }
        host.run_planned = true;
        let (at, life) = (host.busy_until.max(now), host.life);
        self.queue.at(at, Event::Run { host: number, life });
    }

    pub fn on_tick(&mut self, number: u32, life: u64) {
        let Some(host) = self.hosts.get(&number).filter(|host| host.life == life && host.control.is_some())
        else {
            return;
        };
        let period = (TICK_MS * MS) as i64 * 1_000_000 / (1_000_000 + host.clock.drift_ppm);
        let (period, paused) = (period as u64, host.paused);
        if !paused {
            self.knock(number);
            self.tell_control(number, Input::Tick);
        }
        self.queue.after(period, Event::Tick { host: number, life });
    }

    /// After a pause: what came meanwhile is looked at in any order of its sources.
    pub fn resume_host(&mut self, number: u32) {
        let now = self.queue.now();
        let ticks_first = self.random.chance(1, 2);
        let Some(host) = self.hosts.get_mut(&number).filter(|host| host.paused) else { return };
        host.paused = false;
        host.run_planned = false;
        if now > host.paused_at + STANDSTILL {
            host.leads_since = now;
        }
        if host.stable_since != Micros::MAX {
            host.stable_since = now;
        }
        // What was about to leave when it was stopped goes first.
        host.busy_until = host.busy_until.max(now + 2 * EMIT_AGAIN);
        let site = host.site();
        if ticks_first {
            host.inbox.push_front(Input::Tick);
        } else {
            let (calls, others) = std::mem::take(&mut host.inbox)
                .into_iter()
                .partition::<VecDeque<Input>, _>(|input| matches!(input, Input::Client { .. }));
            host.inbox = calls.into_iter().chain(others).collect();
        }
        self.net.pause(site, false);
        self.tell_control(number, Input::Tick);
    }

    /// One round of the coordinator's thread: all that waits, one sync, then what is to be done.
    pub fn on_run(&mut self, number: u32, life: u64) {
        let now = self.queue.now();
        let Some(host) = self.hosts.get_mut(&number).filter(|host| host.life == life && !host.paused) else {
            return;
        };
        host.run_planned = false;
        let at = host.now(now);
        let Some(control) = host.control.as_mut() else { return };
        for input in std::mem::take(&mut host.inbox) {
            control.handle(at, input);
        }
        let syncs = host.disk.syncs();
        // What is sent before the sync leaves at once, and stays sent if the host dies in the middle of it.
        let (disk, mut early, mut late) = (&host.disk, Vec::new(), Vec::new());
        let done = control.process(at, &mut |to, message| {
            let sent = if disk.syncs() == syncs { &mut early } else { &mut late };
            sent.push(Action::ToPeer { to, message });
        });
        let busy = control.busy();
        let synced = host.disk.syncs() != syncs;
        let done = done.map(|actions| late.into_iter().chain(actions).collect::<Vec<_>>());
        if !early.is_empty() {
            self.emit(number, early);
        }
        let Some(host) = self.hosts.get_mut(&number) else { return };
        match done {
            Ok(actions) => {
                self.look_at_host(number);
                let Some(host) = self.hosts.get_mut(&number) else { return };
                if synced {
                    let mean = host.sync;
                    host.busy_until = now + mean / 2 + self.random.range(0..mean + 1);
                    let until = host.busy_until;
                    if !actions.is_empty() {
                        self.queue.at(until, Event::Emit { host: number, life, actions });
                    }
                } else {
                    self.emit(number, actions);
                }
                if busy && let Some(host) = self.hosts.get_mut(&number).filter(|host| !host.run_planned) {
                    host.run_planned = true;
                    let at = host.busy_until.max(now);
                    self.queue.at(at, Event::Run { host: number, life });
                }
            }
            Err(error) if host.disk.is_dead() => {
                let doom = host.doom.unwrap_or(Doom::Killed);
                self.say(format_args!("host-{number} breaks off: {error}"));
                self.crash_host(number, doom);
            }
            Err(error) => self.control_failed(number, &error.to_string()),
        }
    }

    pub fn on_emit(&mut self, number: u32, life: u64, actions: Vec<Action>) {
        match self.hosts.get(&number).filter(|host| host.life == life && host.control.is_some()) {
            Some(host) if host.paused => {
                self.queue.after(EMIT_AGAIN, Event::Emit { host: number, life, actions });
            }
            Some(_) => self.emit(number, actions),
            None => {}
        }
    }

    fn emit(&mut self, number: u32, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::ToPeer { to, message } => self.send_peer(number, to, message),
                Action::ToAgent { session, message } => self.send_agent(number, session, message),
                Action::AgentTaken { session } => {
                    if let Some(held) = self.host(number).sessions.get_mut(&session) {
                        held.taken = held.taken.saturating_sub(1);
                        self.read_on(number, session);
                    }
                }
                Action::CloseAgent { session, message, fatal } => {
                    self.send_agent(number, session, ToAgent::Refused { message, fatal });
                    if let Some(held) = self.host(number).sessions.remove(&session) {
                        self.net.close(held.conn, 1);
                    }
                }
                Action::Reply { call, reply } => {
                    let more = matches!(reply, Reply::Event { .. });
                    self.answer(number, call, Answered::Reply(reply), !more);
                    if more {
                        self.tell_control(number, Input::Taken { call, replies: 1 });
                    }
                }
                Action::Joined { call, result } => self.answer(number, call, Answered::Joined(result), true),
                Action::Proposed { call, result } => {
                    self.answer(number, call, Answered::Proposed(result), true);
                }
                Action::Members => self.follow_members(number),
                // Nobody has certificates here.
                Action::Looked { .. } | Action::Admitted(_) => {}
                Action::SendCa { to, der } => {
                    let key = fleet_common::net::PrivateKey::new(der.clone());
                    self.send_peer(number, to, PeerMessage::Ca { der, key });
                }
                Action::KeepCa { der, .. } => self.tell_control(number, Input::HoldsCa(der)),
                Action::Alarm(what) => self.say(format_args!("host-{number} is alarmed: {what}")),
                Action::Decided(why) => self.say(format_args!("host-{number} decides: {why}")),
                Action::Removed(why) => self.retire(number, &why),
            }
        }
    }

    fn host(&mut self, number: u32) -> &mut Host {
        self.hosts.get_mut(&number).expect("only hosts that exist act")
    }

    fn answer(&mut self, number: u32, call: Call, answered: Answered, last: bool) {
        let Some(&conn) = self.host(number).calls.get(&call) else { return };
        self.send(conn, 1, Payload::Answered(answered), 400);
        if last {
            self.host(number).calls.remove(&call);
            self.net.close(conn, 1);
        }
    }

    fn send_agent(&mut self, number: u32, session: Session, message: ToAgent) {
        if let Some(conn) = self.host(number).sessions.get(&session).map(|held| held.conn) {
            self.send(conn, 1, Payload::ToAgent(message), 400);
        }
    }

    fn send_peer(&mut self, number: u32, to: ReplicaId, message: PeerMessage) {
        let now = self.queue.now();
        self.look_at_message(number, &message);
        let Some(&target) = self.addresses.get(&to) else { return };
        if self.host(number).refused.contains(&to) {
            return; // the server has no link to it any more
        }
        let link = self.host(number).links.entry(to).or_default();
        match link.conn {
            Some(conn) if link.ready => {
                let bytes = size_of_message(&message);
                self.send(conn, 0, Payload::Peer(message), bytes);
            }
            Some(_) => link.wait(message),
            None if now < link.not_before => {}
            None => {
                link.wait(message);
                self.dial_peer(number, to, target);
            }
        }
    }

    fn dial_peer(&mut self, number: u32, to: ReplicaId, target: u32) {
        let now = self.queue.now();
        let connected = self.net.connect(Site::Host(number), Site::Host(target), now, &mut self.random);
        let life = self.host(number).life;
        match connected {
            Some((conn, at)) => {
                let Some(from) = self.host(number).replica else { return };
                self.purposes.insert(conn, Purpose::Peer { from, to });
                self.host(number).links.entry(to).or_default().conn = Some(conn);
                self.queue.at(at[0], Event::Connected { conn, end: 0 });
            }
            None => {
                let link = self.host(number).links.entry(to).or_default();
                link.not_before = now + SECOND + DIAL_AGAIN;
                self.queue.after(SECOND, Event::PeerUnreachable { host: number, life, peer: to });
            }
        }
    }

    /// The gate and the links of the server.
    fn follow_members(&mut self, number: u32) {
        let Some(host) = self.hosts.get_mut(&number) else { return };
        let (Some(control), Some(me)) = (&host.control, host.replica) else { return };
        host.refused = removed_coordinators(control.state());
        let refused = host.refused.clone();
        for (conn, purpose) in &self.purposes {
            match purpose {
                Purpose::Peer { from, to } if *to == me && refused.contains(from) => self.net.close(*conn, 1),
                Purpose::Peer { from, to } if *from == me && refused.contains(to) => self.net.close(*conn, 0),
                _ => {}
            }
        }
    }

    /// One that was taken out, or hears of no leader, may have nothing to say, but tries to connect as the server does all the time.
    fn knock(&mut self, number: u32) {
        let Some(host) = self.hosts.get(&number) else { return };
        let lost = |status: Status| status.removed.is_some() || status.leader.is_none();
        let Some(control) = host.control.as_ref().filter(|it| lost(it.status())) else { return };
        let known = control.state().replicas().keys().copied();
        let now = self.queue.now();
        let idle = |to: &ReplicaId| {
            host.links.get(to).is_none_or(|link| link.conn.is_none() && now >= link.not_before)
        };
        let others = known.filter(|to| Some(*to) != host.replica && idle(to));
        let others: Vec<(ReplicaId, u32)> =
            others.filter_map(|to| Some((to, *self.addresses.get(&to)?))).collect();
        others.into_iter().for_each(|(to, target)| self.dial_peer(number, to, target));
    }

    pub fn on_peer_unreachable(&mut self, number: u32, life: u64, peer: ReplicaId) {
        if let Some(host) = self.hosts.get_mut(&number).filter(|host| host.life == life) {
            host.links.entry(peer).or_default().waiting.clear();
            self.tell_control(number, Input::PeerLost(peer));
        }
    }

    pub fn peer_connected(&mut self, number: u32, to: ReplicaId, conn: ConnId) {
        let me = self.host(number).replica;
        let target = self.addresses.get(&to).and_then(|target| self.hosts.get(target));
        let refused = me.is_some_and(|me| target.is_some_and(|target| target.refused.contains(&me)));
        let Some(link) = self.host(number).links.get_mut(&to).filter(|link| link.conn == Some(conn)) else {
            return;
        };
        if refused {
            *link = Link { not_before: Micros::MAX, ..Link::default() };
            self.net.close(conn, 0);
            return self.tell_control(number, Input::RefusedBy(to));
        }
        link.ready = true;
        for message in std::mem::take(&mut link.waiting) {
            let bytes = size_of_message(&message);
            self.send(conn, 0, Payload::Peer(message), bytes);
        }
    }

    /// An agent's connection has come.
    pub fn agent_connected(&mut self, number: u32, conn: ConnId, node: NodeId) {
        let Some(host) = self.hosts.get_mut(&number).filter(|host| host.control.is_some()) else { return };
        let session = host.number();
        host.sessions.insert(session, Held { conn, taken: 0, unread: VecDeque::new() });
        self.sessions_of.insert(conn, session);
        self.tell_control(number, Input::AgentConnected { session, node });
    }

    pub fn host_hears(&mut self, number: u32, conn: ConnId, payload: Payload) {
        match (payload, self.purposes.get(&conn).cloned()) {
            (Payload::Peer(message), Some(Purpose::Peer { from, .. })) => {
                self.notice_peer(number, from);
                self.note_report(number, &message);
                self.tell_control(number, Input::Peer { from, message });
            }
            (Payload::FromAgent(message), Some(Purpose::Agent { node })) => {
                self.oracle.heard(node, number, self.queue.now());
                let Some(&session) = self.sessions_of.get(&conn) else { return };
                if matches!(message, FromAgent::Heartbeat { .. }) {
                    self.tell_control(number, Input::AgentHeard { node });
                } else if let Some(held) = self.host(number).sessions.get_mut(&session) {
                    held.unread.push_back(message);
                    self.read_on(number, session);
                }
            }
            (Payload::Question(question), Some(Purpose::Call)) => {
                let call = self.host(number).number();
                self.host(number).calls.insert(call, conn);
                let input = match question {
                    Question::Client { caller, frame } => Input::Client { call, caller, frame },
                    Question::Join { redeem, request } => Input::Join { call, redeem, request },
                    Question::Propose { request, change } => {
                        Input::Propose { call, request: request.into(), by: None, change }
                    }
                };
                self.tell_control(number, input);
            }
            _ => {}
        }
    }

    /// A coordinator that speaks is there: the server dials it at once, and gives up a connection to an earlier process of it.
    fn notice_peer(&mut self, number: u32, from: ReplicaId) {
        let now = self.queue.now();
        let Some(link) = self.hosts.get_mut(&number).and_then(|host| host.links.get_mut(&from)) else {
            return;
        };
        if link.conn.is_some_and(|conn| !self.net.is_open(conn, 1)) {
            *link = Link::default();
            self.tell_control(number, Input::PeerLost(from));
        } else if link.not_before != Micros::MAX {
            link.not_before = link.not_before.min(now);
        }
    }

    /// What a leader is told of agents at other coordinators.
    fn note_report(&mut self, number: u32, message: &PeerMessage) {
        let PeerMessage::Observations(report) = message else { return };
        let leads = |host: &Host| host.control.as_ref().is_some_and(|control| control.replica().leads());
        if !self.hosts.get(&number).is_some_and(leads) {
            return;
        }
        let now = self.queue.now();
        for seen in &report.nodes {
            self.oracle.told(seen.node, number, now.saturating_sub(seen.heard_ms_ago * MS), now);
        }
    }

    /// Reads from an agent's connection as long as it has credit.
    fn read_on(&mut self, number: u32, session: Session) {
        loop {
            let Some(held) = self.host(number).sessions.get_mut(&session) else { return };
            let is_batch = match held.unread.front() {
                Some(FromAgent::Events(_)) if held.taken == AGENT_BATCHES_MAX => return,
                Some(FromAgent::Events(_)) => true,
                Some(_) => false,
                None => return,
            };
            held.taken += usize::from(is_batch);
            let Some(message) = held.unread.pop_front() else { return };
            self.tell_control(number, Input::Agent { session, message });
        }
    }

    /// A connection ended as seen from here.
    pub fn host_loses(&mut self, number: u32, conn: ConnId) {
        let purpose = self.purposes.get(&conn).cloned();
        let Some(host) = self.hosts.get_mut(&number) else { return };
        match purpose {
            Some(Purpose::Peer { to, .. }) => {
                let Some(link) = host.links.get_mut(&to).filter(|link| link.conn == Some(conn)) else {
                    return;
                };
                *link = Link { not_before: self.queue.now() + DIAL_AGAIN, ..Link::default() };
                self.tell_control(number, Input::PeerLost(to));
            }
            Some(Purpose::Agent { .. }) => {
                let Some(session) = self.sessions_of.get(&conn).copied() else { return };
                if host.sessions.remove(&session).is_some() {
                    self.tell_control(number, Input::AgentLost { session });
                }
            }
            Some(Purpose::Call) => {
                let call = host.calls.iter().find(|(_, of)| **of == conn).map(|(call, _)| *call);
                if let Some(call) = call {
                    host.calls.remove(&call);
                    self.tell_control(number, Input::CallLost(call));
                }
            }
            None => {}
        }
    }
}

impl Link {
    fn wait(&mut self, message: PeerMessage) {
        if self.waiting.len() == WAITING_MAX {
            self.waiting.pop_front();
        }
        self.waiting.push_back(message);
    }
}

fn removed_coordinators(state: &State) -> BTreeSet<ReplicaId> {
    let coordinator = |member| match member {
        Member::Coordinator(replica) => Some(replica),
        Member::Worker(_) | Member::Client(_) => None,
    };
    state.revoked().filter_map(coordinator).collect()
}

fn size_of_message(message: &PeerMessage) -> usize {
    match message {
        PeerMessage::Raft(bytes) => bytes.len(),
        _ => 300,
    }
}
