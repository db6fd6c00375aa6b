//! Several coordinators in one thread: a clock that the test turns, wires that can be cut, and agents that send heartbeats.

use super::super::*;
use crate::cluster::commands::{COMMAND_LEVEL, Change, RedeemToken};
use crate::cluster::members::{ReplicaRecord, Standing};
use crate::cluster::session::RequestId;
use crate::cluster::tests::{address, redeem, token};
use crate::cluster::{Answer, Command, State};
use crate::raft::history::History;
use crate::raft::memory::MemoryDisk;
use crate::raft::replica::Replica;
use fleet_common::codec;
use fleet_common::events::{Event, EventBatch, EventBody};
use fleet_common::ids::{ClientId, JobId, NodeId, ReplicaId, UserId};
use fleet_common::net::PrivateKey;
use fleet_common::protocol::{
    AgentHello, ClientFrame, FromAgent, Member, PROTOCOL_VERSION, Refusal, Reply, Request, Role, ToAgent,
};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

pub(super) type TestControl = Control<MemoryDisk>;
pub(super) const USER: Member = Member::Client(UserId(1));

pub(super) struct Net {
    pub now: Now,
    pub controls: BTreeMap<u64, TestControl>,
    pub disks: BTreeMap<u64, Arc<MemoryDisk>>,
    wire: VecDeque<(u64, u64, PeerMessage)>,
    /// Coordinators that nothing reaches and that reach nobody.
    pub cut: BTreeSet<u64>,
    pub replies: BTreeMap<Call, Vec<Reply>>,
    pub joined: BTreeMap<Call, Result<Admission, Refusal>>,
    pub proposed: BTreeMap<Call, Result<Answer, Refusal>>,
    pub looked: BTreeMap<Call, Result<(), Refusal>>,
    /// What each session was told.
    pub told: BTreeMap<Session, Vec<ToAgent>>,
    pub closed: BTreeMap<Session, (String, bool)>,
    pub taken: BTreeMap<Session, usize>,
    pub decided: Vec<String>,
    pub alarms: Vec<(u64, String)>,
    /// Coordinators that had to stop, and why.
    pub stopped: BTreeMap<u64, String>,
    pub removed: BTreeMap<u64, String>,
    /// Whose connections each coordinator refuses for ever.
    gates: BTreeMap<u64, BTreeSet<u64>>,
    /// Sessions whose agents send heartbeats: their coordinator and node.
    pub hearts: BTreeMap<Session, (u64, NodeId)>,
    last_number: u64,
}

pub(super) fn program() -> Request {
    let work = fleet_common::protocol::Work::Program(fleet_common::protocol::Program {
        argv: vec!["true".into()],
        working_dir: "/".into(),
        env: vec![],
    });
    Request::Submit(fleet_common::protocol::SubmitJob {
        world_size: 1,
        work,
        wish: fleet_common::protocol::Wish { queue: true, ..Default::default() },
    })
}

pub(super) fn frame(client: u128, seq: u64, request: Request) -> ClientFrame {
    ClientFrame::change(ClientId(client), seq, request)
}

pub(super) fn hello(process: u64, gangs: Vec<(JobId, u64)>) -> AgentHello {
    let (name, device, program_version) = ("box".into(), "cpu".into(), "0".into());
    AgentHello {
        version: PROTOCOL_VERSION,
        name,
        slots: 8,
        device,
        program_version,
        labels: Default::default(),
        host: "h".into(),
        checkpoint_port: 0,
        process,
        gangs,
        lost: vec![],
        earlier: vec![],
    }
}

pub(super) fn events(job: JobId, first_seq: u64, bodies: Vec<EventBody>) -> FromAgent {
    let events = bodies.into_iter().map(|body| Event { unix_ms: 5, body }).collect();
    FromAgent::Events(EventBatch { job, generation: 1, first_seq, events })
}

fn myself(id: u64, seeds: &[u64]) -> Myself {
    let seeds = seeds.iter().map(|id| ReplicaId(*id)).collect();
    Myself {
        address: address(id),
        name: format!("c{id}"),
        version: "0".into(),
        http: format!("c{id}:3"),
        seeds,
    }
}

impl Net {
    /// Coordinators 1 to `voters`, one of which leads. `USER` is an admin.
    pub fn new(voters: u64) -> Net {
        Net::with_ca(voters, Vec::new())
    }

    /// Whose CA has this certificate.
    pub fn with_ca(voters: u64, ca_der: Vec<u8>) -> Net {
        let record = |id| ReplicaRecord {
            address: address(id),
            name: format!("c{id}"),
            version: "0".into(),
            level: COMMAND_LEVEL,
            joined_unix_ms: 0,
            standing: Standing::Voter,
        };
        let founders = (1..=voters).map(|id| (ReplicaId(id), record(id))).collect();
        let mut state = State::founded("test".into(), founders).trusting(ca_der, BTreeMap::new());
        for change in [token("root", Role::Admin, 1), redeem("root", "root")] {
            state.apply(1, Command { unix_ms: 0, request: None, by: None, why: None, change });
        }
        assert!(state.is_admin(USER));
        let mut net = Net {
            now: Now { mono_ms: 1_000_000, unix_ms: 5_000_000 },
            controls: BTreeMap::new(),
            disks: BTreeMap::new(),
            wire: VecDeque::new(),
            cut: BTreeSet::new(),
            replies: BTreeMap::new(),
            joined: BTreeMap::new(),
            proposed: BTreeMap::new(),
            looked: BTreeMap::new(),
            told: BTreeMap::new(),
            closed: BTreeMap::new(),
            taken: BTreeMap::new(),
            decided: Vec::new(),
            alarms: Vec::new(),
            stopped: BTreeMap::new(),
            removed: BTreeMap::new(),
            gates: BTreeMap::new(),
            hearts: BTreeMap::new(),
            last_number: 1_000,
        };
        let ids: Vec<u64> = (1..=voters).collect();
        for id in 1..=voters {
            let disk = Arc::new(MemoryDisk::default());
            let replica = Replica::create(disk.clone(), id, &ids, state.clone(), 7).unwrap();
            net.start(id, disk, replica, &[]);
        }
        net.run_until("a leader", |net| net.leader().is_some());
        net
    }

    fn start(&mut self, id: u64, disk: Arc<MemoryDisk>, replica: Replica<MemoryDisk>, seeds: &[u64]) {
        let history = History::new(disk.clone());
        self.last_number += 1;
        let control = Control::new(replica, history, myself(id, seeds), self.last_number, self.now);
        self.controls.insert(id, control);
        self.disks.insert(id, disk);
    }

    /// A new coordinator that knows of the others.
    pub fn join(&mut self, id: u64) {
        self.join_as(id, Arc::new(MemoryDisk::default()));
    }

    /// The same on this empty disk.
    pub fn join_as(&mut self, id: u64, disk: Arc<MemoryDisk>) {
        let replica = Replica::join(disk.clone(), id, "test", 7).unwrap();
        let seeds: Vec<u64> = self.controls.keys().copied().collect();
        self.start(id, disk, replica, &seeds);
    }

    /// The process ends without warning.
    pub fn kill(&mut self, id: u64) {
        self.controls.remove(&id);
        self.gates.remove(&id);
        self.hearts.retain(|_, (at, _)| *at != id);
        self.wire.retain(|(from, to, _)| *from != id && *to != id);
        self.controls
            .values_mut()
            .for_each(|control| control.handle(self.now, Input::PeerLost(ReplicaId(id))));
    }

    /// The process starts again, after a power failure.
    pub fn restart(&mut self, id: u64) {
        let disk = Arc::new(self.disks[&id].after_power_failure(0));
        self.restart_from(id, disk);
    }

    /// The process starts again, from this disk.
    pub fn restart_from(&mut self, id: u64, disk: Arc<MemoryDisk>) {
        let replica = Replica::open(disk.clone(), 7).unwrap().unwrap();
        self.start(id, disk, replica, &[]);
    }

    pub fn number(&mut self) -> u64 {
        self.last_number += 1;
        self.last_number
    }

    pub fn handle(&mut self, at: u64, input: Input) {
        let now = self.now;
        self.controls.get_mut(&at).unwrap().handle(now, input);
    }

    /// Carries out everything that needs no time.
    pub fn settle(&mut self) {
        for _ in 0..10_000 {
            if self.exchange() {
                return;
            }
        }
        panic!("never quiet");
    }

    /// Everybody works once, then the messages on the wires arrive. Returns whether nothing happened.
    pub fn exchange(&mut self) -> bool {
        let mut quiet = true;
        for id in self.controls.keys().copied().collect::<Vec<_>>() {
            let now = self.now;
            let control = self.controls.get_mut(&id).unwrap();
            let wire = &mut self.wire;
            let mut sent = 0;
            let actions = control.process(now, &mut |to, message| {
                sent += 1;
                wire.push_back((id, to.0, message));
            });
            let actions = match actions {
                Ok(actions) => actions,
                Err(error) => {
                    self.controls.remove(&id);
                    self.stopped.insert(id, error.to_string());
                    continue;
                }
            };
            quiet &= sent == 0 && actions.is_empty() && !control.busy();
            actions.into_iter().for_each(|action| self.act(id, action));
        }
        quiet &= self.wire.is_empty();
        while let Some((from, to, message)) = self.wire.pop_front() {
            let refuses =
                |one: u64, other: u64| self.gates.get(&one).is_some_and(|gate| gate.contains(&other));
            let apart = self.cut.contains(&from) || self.cut.contains(&to) || refuses(from, to);
            if apart || refuses(to, from) || !self.controls.contains_key(&to) {
                continue;
            }
            // As it would travel.
            let message = codec::decode(&codec::encode(&message).unwrap()).unwrap();
            self.handle(to, Input::Peer { from: ReplicaId(from), message });
        }
        quiet
    }

    fn act(&mut self, at: u64, action: Action) {
        match action {
            Action::ToPeer { to, message } => self.wire.push_back((at, to.0, message)),
            Action::ToAgent { session, message } => self.told.entry(session).or_default().push(message),
            Action::AgentTaken { session } => *self.taken.entry(session).or_default() += 1,
            Action::CloseAgent { session, message, fatal } => {
                self.hearts.remove(&session);
                assert!(self.closed.insert(session, (message, fatal)).is_none(), "closed twice");
            }
            Action::Reply { call, reply } => self.replies.entry(call).or_default().push(reply),
            Action::Joined { call, result } => {
                assert!(self.joined.insert(call, result).is_none(), "answered twice");
            }
            Action::Proposed { call, result } => {
                assert!(self.proposed.insert(call, result).is_none(), "answered twice");
            }
            Action::Members => {
                let revoked = self.state(at).revoked();
                let coordinators = revoked.filter_map(|member| match member {
                    Member::Coordinator(replica) => Some(replica.0),
                    _ => None,
                });
                let refused = coordinators.collect();
                self.gates.insert(at, refused);
            }
            Action::Looked { call, result } => {
                assert!(self.looked.insert(call, result).is_none(), "answered twice");
            }
            Action::Admitted(_) => {}
            // A key is as good as any other here.
            Action::SendCa { to, der } => {
                let key = PrivateKey::new(der.clone());
                self.wire.push_back((at, to.0, PeerMessage::Ca { der, key }));
            }
            Action::KeepCa { der, .. } => self.handle(at, Input::HoldsCa(der)),
            Action::Decided(why) => self.decided.push(why),
            Action::Alarm(what) => self.alarms.push((at, what)),
            Action::Removed(why) => assert!(self.removed.insert(at, why).is_none(), "removed twice"),
        }
    }

    pub fn step(&mut self) {
        self.now.mono_ms += TICK_MS;
        self.now.unix_ms += TICK_MS;
        for id in self.controls.keys().copied().collect::<Vec<_>>() {
            self.handle(id, Input::Tick);
        }
        self.knock();
        if self.now.mono_ms.is_multiple_of(1_000) {
            for (at, node) in self.hearts.values().copied().collect::<Vec<_>>() {
                self.handle(at, Input::AgentHeard { node });
            }
        }
        self.settle();
    }

    /// Coordinators try to connect to each other all the time, and some are refused.
    fn knock(&mut self) {
        let reached = |id: &u64| self.controls.contains_key(id) && !self.cut.contains(id);
        let gates = self.gates.iter().filter(|(id, _)| reached(id));
        let refused = gates.flat_map(|(by, gate)| gate.iter().map(|refused| (*by, *refused)));
        for (by, refused) in refused.filter(|(_, refused)| reached(refused)).collect::<Vec<_>>() {
            self.handle(refused, Input::RefusedBy(ReplicaId(by)));
        }
    }

    pub fn run(&mut self, ms: u64) {
        for _ in 0..ms / TICK_MS {
            self.step();
        }
    }

    pub fn run_until(&mut self, what: &str, done: impl Fn(&Net) -> bool) {
        self.settle();
        for _ in 0..600 {
            if done(self) {
                return;
            }
            self.step();
        }
        panic!("{what}: not within 30 seconds");
    }

    /// The one that leads and is reached.
    pub fn leader(&self) -> Option<u64> {
        let leads = |(id, control): (&u64, &TestControl)| {
            (!self.cut.contains(id) && control.status().leading_since_ms.is_some()).then_some(*id)
        };
        self.controls.iter().find_map(leads)
    }

    pub fn leading(&self) -> u64 {
        self.leader().expect("somebody leads")
    }

    pub fn follower(&self) -> u64 {
        let leader = self.leading();
        *self.controls.keys().find(|id| **id != leader && !self.cut.contains(id)).unwrap()
    }

    pub fn state(&self, id: u64) -> &State {
        self.controls[&id].state()
    }

    /// Asks without waiting for the answer.
    pub fn send(&mut self, at: u64, frame: ClientFrame) -> Call {
        let call = self.number();
        self.handle(at, Input::Client { call, caller: USER, frame });
        call
    }

    pub fn reply(&self, call: Call) -> Option<&Reply> {
        self.replies.get(&call).and_then(|replies| replies.last())
    }

    /// As another client than `USER`.
    pub fn ask_as(&mut self, at: u64, caller: Member, frame: ClientFrame) -> Reply {
        let call = self.number();
        self.handle(at, Input::Client { call, caller, frame });
        self.run_until("an answer", |net| net.reply(call).is_some());
        self.reply(call).cloned().unwrap()
    }

    pub fn ask(&mut self, at: u64, frame: ClientFrame) -> Reply {
        let call = self.send(at, frame);
        self.run_until("a reply", |net| net.reply(call).is_some());
        self.reply(call).unwrap().clone()
    }

    pub fn submit(&mut self, at: u64) -> JobId {
        let client = self.number();
        match self.ask(at, frame(client.into(), 1, program())) {
            Reply::Submitted { job } => job,
            other => panic!("{other:?}"),
        }
    }

    pub fn propose(&mut self, at: u64, change: Change) -> Result<Answer, Refusal> {
        let call = self.number();
        let request = RequestId { client: ClientId(call.into()), seq: 1 };
        self.handle(at, Input::Propose { call, request: request.into(), by: None, change });
        self.run_until("an answer", |net| net.proposed.contains_key(&call));
        self.proposed[&call].clone()
    }

    /// Somebody joins with a token of this role.
    pub fn admit(&mut self, at: u64, role: Role) -> Member {
        let id = format!("t{}", self.number());
        self.propose(at, token(&id, role, 1)).unwrap();
        let call = self.number();
        let Change::RedeemToken(redeem) = redeem(&id, "box") else { unreachable!() };
        self.redeem(at, call, redeem);
        self.run_until("an admission", |net| net.joined.contains_key(&call));
        self.joined[&call].clone().unwrap().member
    }

    pub fn redeem(&mut self, at: u64, call: Call, redeem: RedeemToken) {
        let request = RequestId { client: ClientId(call.into()), seq: 1 };
        self.handle(at, Input::Join { call, redeem, request });
    }

    pub fn admit_node(&mut self) -> NodeId {
        match self.admit(self.leading(), Role::Worker) {
            Member::Worker(node) => node,
            other => panic!("{other}"),
        }
    }

    /// An agent connects and greets, and sends heartbeats from now on.
    pub fn connect(&mut self, at: u64, node: NodeId, gangs: Vec<(JobId, u64)>) -> Session {
        self.connect_as(1, at, node, gangs)
    }

    /// The same from this process, of several that hold the same certificate.
    pub fn connect_as(&mut self, process: u64, at: u64, node: NodeId, gangs: Vec<(JobId, u64)>) -> Session {
        self.greet(at, node, hello(process, gangs))
    }

    /// The same with this greeting.
    pub fn greet(&mut self, at: u64, node: NodeId, hello: AgentHello) -> Session {
        let session = self.number();
        self.handle(at, Input::AgentConnected { session, node });
        self.handle(at, Input::Agent { session, message: FromAgent::Hello(hello) });
        self.hearts.insert(session, (at, node));
        session
    }

    pub fn welcome(&mut self, at: u64, node: NodeId, gangs: Vec<(JobId, u64)>) -> Session {
        self.welcome_as(at, node, hello(1, gangs))
    }

    pub fn welcome_as(&mut self, at: u64, node: NodeId, hello: AgentHello) -> Session {
        let session = self.greet(at, node, hello);
        self.run_until("a welcome", |net| {
            net.told.get(&session).is_some_and(|told| told[0] == ToAgent::Welcome { node })
        });
        session
    }

    pub fn say(&mut self, session: Session, message: FromAgent) {
        let (at, _) = self.hearts[&session];
        self.handle(at, Input::Agent { session, message });
    }

    /// Jobs that this session was told to start.
    pub fn started(&self, session: Session) -> Vec<JobId> {
        let told = self.told.get(&session).into_iter().flatten();
        let start = |message: &ToAgent| match message {
            ToAgent::StartGang(gang) => Some(gang.job),
            _ => None,
        };
        told.filter_map(start).collect()
    }

    /// Up to where a job's events were acknowledged on this session.
    pub fn acknowledged(&self, session: Session) -> u64 {
        let told = self.told.get(&session).into_iter().flatten();
        let committed = |message: &ToAgent| match message {
            ToAgent::EventsCommitted { seq, .. } => Some(*seq),
            _ => None,
        };
        told.filter_map(committed).max().unwrap_or_default()
    }

    /// The steps in a job's history, as this coordinator has it.
    pub fn steps(&self, at: u64, job: JobId) -> Vec<u64> {
        let events = self.controls[&at].history().events(job, 1, 10_000).unwrap();
        let step = |(_, event): (u64, Event)| match event.body {
            EventBody::Step(step) => Some(step.step),
            _ => None,
        };
        events.into_iter().filter_map(step).collect()
    }
}
