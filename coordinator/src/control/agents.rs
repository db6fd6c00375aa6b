//! The agents that this coordinator holds: their greetings, their orders, their events.
//!
//! Orders follow from the state, so a lost wake-up or connection costs nothing. A greeting is answered from a state that is known to be
//! new enough; after that the local state does: what is applied here was decided. Events are acknowledged only when they are committed,
//! and heartbeats never touch the log.

use super::asks::{Asker, Outcome, Unproposed, What, unavailable};
use super::reads::Reader;
use super::session::{AgentSession, Phase};
use super::{AGENT_BATCHES_MAX, AGENTS_MAX, Action, Control, Now, Session};
use crate::cluster::Answer;
use crate::cluster::admitted::cut_off;
use crate::cluster::commands::{Change, DescribeNode, FailJob, RecordEvents, SettleSuperseded};
use crate::cluster::members::{NodeRecord, clean_name};
use crate::cluster::orders::GangStanding;
use crate::planner::LEASE_MS;
use crate::raft::disk::Disk;
use fleet_common::events::EventBatch;
use fleet_common::ids::{JobId, NodeId};
use fleet_common::protocol::{
    AgentHello, EARLIER_MAX, FromAgent, Member, PROTOCOL_VERSION, Refusal, RefusalKind, ToAgent,
};
use std::collections::{BTreeMap, BTreeSet};

/// From the connection to the welcome. An election fits into it.
const GREETING_DEADLINE_MS: u64 = 5_000;
/// Between attempts to record events while nothing can be written.
const RETRY_MS: u64 = 200;
/// Gangs that an agent may know: some thousands run on the largest node, and some have ended.
const GANGS_MAX: usize = 10_000;
/// Without a leader for this long, a coordinator sends its agents to another one, which may have it: they shall be heard there before
/// their lease ends.
const PATIENCE_MS: u64 = LEASE_MS * 2 / 5;

#[derive(Default)]
pub(super) struct Agents {
    sessions: BTreeMap<Session, AgentSession>,
    /// The session that speaks for each node, from its welcome on.
    by_node: BTreeMap<NodeId, Session>,
    /// The newest one of each node that is not welcome yet.
    greeting: BTreeMap<NodeId, Session>,
    /// Sessions for which there may be orders.
    woken: BTreeSet<Session>,
    /// Sessions that may have events to record.
    queued: BTreeSet<Session>,
}

impl Agents {
    pub fn len(&self) -> usize {
        self.sessions.len()
    }

    pub fn are_busy(&self) -> bool {
        !self.queued.is_empty() || !self.woken.is_empty()
    }
}

impl<D: Disk> Control<D> {
    pub(super) fn agent_connected(&mut self, now: Now, session: Session, node: NodeId) {
        let refused = if let Some(leaving) = &self.leaving {
            Some((leaving.why.clone(), false))
        } else if self.is_revoked(Member::Worker(node)) {
            Some((cut_off(Member::Worker(node)), true))
        } else if self.is_stuck() {
            Some(("the disk of this coordinator cannot be written; connect to another one".to_owned(), false))
        } else if self.agents.len() >= AGENTS_MAX {
            Some((format!("this coordinator holds {AGENTS_MAX} agents already; try another one"), false))
        } else {
            None
        };
        if let Some((message, fatal)) = refused {
            return self.out.push(Action::CloseAgent { session, message, fatal });
        }
        if let Some(older) = self.agents.greeting.insert(node, session) {
            self.replace_agent(older, node);
        }
        let greeting = AgentSession::new(node, now.mono_ms + GREETING_DEADLINE_MS);
        self.agents.sessions.insert(session, greeting);
    }

    /// There is a newer session of the same worker.
    fn replace_agent(&mut self, older: Session, node: NodeId) {
        self.agents.sessions.remove(&older);
        let message = format!("{node} has connected anew");
        self.out.push(Action::CloseAgent { session: older, message, fatal: false });
    }

    pub(super) fn agent_lost(&mut self, session: Session) {
        let Some(gone) = self.agents.sessions.remove(&session) else { return };
        if self.agents.greeting.get(&gone.node) == Some(&session) {
            self.agents.greeting.remove(&gone.node);
        }
        if self.agents.by_node.get(&gone.node) == Some(&session) {
            self.agents.by_node.remove(&gone.node);
            self.observations.disconnected(gone.node);
            self.plan_now = true;
        }
    }

    fn close_agent(&mut self, session: Session, message: impl Into<String>, fatal: bool) {
        if self.agents.sessions.contains_key(&session) {
            self.agent_lost(session);
            self.out.push(Action::CloseAgent { session, message: message.into(), fatal });
        }
    }

    pub(super) fn close_all_agents(&mut self, why: &str) {
        for session in self.agents.sessions.keys().copied().collect::<Vec<_>>() {
            self.close_agent(session, why, false);
        }
    }

    pub(super) fn agent_said(&mut self, now: Now, session: Session, message: FromAgent) {
        let Some(agent) = self.agents.sessions.get_mut(&session) else { return };
        match &message {
            FromAgent::Hello(_) => self.observations.greets(agent.node, now),
            _ => self.observations.heard(agent.node, now),
        }
        match message {
            // The driver's own: it has the CA.
            FromAgent::Heartbeat { .. } | FromAgent::Renew { .. } => {}
            FromAgent::Output { ticket, result } => self.output_came(session, ticket, result),
            FromAgent::Removed { manifests } => {
                let known = &agent.superseded;
                let is_known = |sha256: &String| known.iter().any(|one| one.manifest_sha256 == *sha256);
                let (node, manifests) = (agent.node, manifests.into_iter().filter(is_known).collect());
                let change = Change::SettleSuperseded(SettleSuperseded { node, manifests });
                self.ask(now, Asker::Agent(session), What::change(None, change));
            }
            FromAgent::Hello(_) if agent.phase != Phase::Silent => {
                self.close_agent(session, "a worker greets once per connection", false);
            }
            FromAgent::Hello(hello) if hello.version != PROTOCOL_VERSION => {
                let why = format!(
                    "this cluster speaks version {PROTOCOL_VERSION} of the protocol, the worker {}; install the same version of fleet",
                    hello.version
                );
                self.close_agent(session, why, true);
            }
            FromAgent::Hello(hello) if hello.gangs.len() + hello.lost.len() > GANGS_MAX => {
                let count = hello.gangs.len() + hello.lost.len();
                let why = format!("a worker with {count} gangs: {GANGS_MAX} is the limit");
                self.close_agent(session, why, true);
            }
            FromAgent::Hello(hello) if hello.earlier.len() > EARLIER_MAX => {
                let why = format!("a worker names {} processes before it", hello.earlier.len());
                self.close_agent(session, format!("{why}: {EARLIER_MAX} is the limit"), true);
            }
            FromAgent::Hello(hello) => self.take_hello(session, hello),
            FromAgent::Events(_) if agent.phase == Phase::Silent => {
                self.close_agent(session, "a worker greets first", true);
            }
            FromAgent::Events(batch) => {
                if agent.queue(batch) > AGENT_BATCHES_MAX {
                    let why = format!("more than {AGENT_BATCHES_MAX} batches of events at once");
                    return self.close_agent(session, why, false);
                }
                self.agents.queued.insert(session);
            }
        }
    }

    fn take_hello(&mut self, session: Session, hello: AgentHello) {
        let Some(agent) = self.agents.sessions.get_mut(&session) else { return };
        let (node, process) = (agent.node, hello.process);
        agent.hello = Some(hello);
        agent.phase = Phase::Reading;
        if let Some(older) = self.agents.by_node.get(&node).copied() {
            if !self.agents.sessions.get(&older).is_some_and(|older| older.is_of(process)) {
                return self.close_agent(session, double(node), false);
            }
            self.agents.by_node.remove(&node);
            self.replace_agent(older, node);
        }
        self.reads.add(Reader::Greeting(session));
    }

    /// Refuses a worker for a node for which another one speaks, at whichever coordinator. Known to the leader only.
    pub(super) fn may_describe(&self, now: Now, describe: &DescribeNode) -> Result<(), Unproposed> {
        let record = self.replica.state().nodes().get(&describe.node);
        let other = record.is_some_and(|record| ![0, describe.process].contains(&record.process));
        match other && self.observations.is_connected(describe.node, now) {
            true => Err(Unproposed::Refused(unavailable(double(describe.node)))),
            false => Ok(()),
        }
    }

    /// A look at a state that has all that was acknowledged before the agent greeted, and what its greeting has changed.
    pub(super) fn greeting_read(&mut self, now: Now, session: Session) {
        let Some(agent) = self.agents.sessions.get(&session) else { return };
        let (node, phase) = (agent.node, agent.phase);
        let Some(hello) = agent.hello.clone() else { return };
        let state = self.replica.state();
        let Some(record) = state.nodes().get(&node) else {
            let why = format!("{node} is not registered in this cluster; join again with a token");
            return self.close_agent(session, why, true);
        };
        if phase == Phase::Recorded {
            return match record.lost {
                // It was called lost while it greeted.
                true => self.close_agent(session, "the cluster has given this node up; greet again", false),
                false => self.welcome(now, session, &hello),
            };
        }
        if phase == Phase::Described && (record.lost || record.process != hello.process) {
            let why = format!("the record of {node} changed while this worker greeted; greet again");
            return self.close_agent(session, why, false);
        }
        if phase == Phase::Reading && !as_described(node, record, &hello) {
            self.set_phase(session, Phase::Describing);
            let describe = describe(node, hello);
            return self.ask(now, Asker::Agent(session), What::change(None, Change::DescribeNode(describe)));
        }
        let mut changes = Vec::new();
        for (job, generation) in state.lost_gangs(node, &hello.lost) {
            let message = lost_gang(&record.name, job, hello.earlier.is_empty());
            changes.push(Change::FailJob(FailJob { job, generation, node, message }));
        }
        if changes.is_empty() {
            return self.welcome(now, session, &hello);
        }
        self.set_phase(session, Phase::Recording { left: changes.len() });
        for change in changes {
            self.ask(now, Asker::Agent(session), What::change(None, change));
        }
    }

    fn set_phase(&mut self, session: Session, phase: Phase) {
        if let Some(agent) = self.agents.sessions.get_mut(&session) {
            agent.phase = phase;
        }
    }

    /// Welcomes an agent, and tells it how the gangs stand that it knows.
    fn welcome(&mut self, now: Now, session: Session, hello: &AgentHello) {
        let Some(agent) = self.agents.sessions.get_mut(&session) else { return };
        let node = agent.node;
        agent.phase = Phase::Up;
        agent.knows(&hello.gangs);
        self.agents.greeting.remove(&node);
        if let Some(older) = self.agents.by_node.insert(node, session) {
            self.replace_agent(older, node);
        }
        let mut tell = |message| self.out.push(Action::ToAgent { session, message });
        tell(ToAgent::Welcome { node });
        for (job, generation) in hello.gangs.iter().copied() {
            let (seq, wanted) = match self.replica.state().gang_standing(node, job, generation) {
                GangStanding::Wanted { seq } => (seq, true),
                GangStanding::Over { seq } => (seq, false),
                GangStanding::Unwanted => (0, false),
            };
            if seq > 0 {
                tell(ToAgent::EventsCommitted { job, generation, seq });
            }
            if !wanted {
                tell(ToAgent::StopGang { job, generation, now: true });
            }
        }
        self.observations.connected(node, now);
        self.agents.woken.insert(session);
        self.agents.queued.insert(session);
        self.plan_now = true;
    }

    pub(super) fn wake_agents(&mut self, nodes: impl Iterator<Item = NodeId>) {
        let Agents { by_node, woken, .. } = &mut self.agents;
        woken.extend(nodes.filter_map(|node| by_node.get(&node).copied()));
    }

    pub(super) fn wake_all_agents(&mut self) {
        self.agents.woken.extend(self.agents.sessions.keys().copied());
    }

    /// Sends away who was cut off.
    pub(super) fn close_revoked_agents(&mut self) {
        let sessions = self.agents.sessions.iter();
        let revoked = sessions.filter(|(_, agent)| self.is_revoked(Member::Worker(agent.node)));
        for (session, node) in revoked.map(|(session, agent)| (*session, agent.node)).collect::<Vec<_>>() {
            self.close_agent(session, cut_off(Member::Worker(node)), true);
        }
    }

    /// Sends the orders that are new, and away who is not wanted any more.
    pub(super) fn give_orders(&mut self) {
        for session in std::mem::take(&mut self.agents.woken) {
            let Some(agent) = self.agents.sessions.get_mut(&session) else { continue };
            let node = agent.node;
            let state = self.replica.state();
            if agent.phase != Phase::Up {
                continue;
            }
            if state.nodes().get(&node).is_some_and(|record| !agent.is_of(record.process)) {
                self.close_agent(session, double(node), false);
                continue;
            }
            if state.nodes().get(&node).is_none_or(|record| record.lost) {
                self.close_agent(session, "the cluster has given this node up; greet again", false);
                continue;
            }
            let (orders, loans) = (state.orders(node), state.loans(node));
            if agent.loans != loans {
                agent.loans.clone_from(&loans);
                self.out.push(Action::ToAgent { session, message: ToAgent::Lend(loans) });
            }
            let superseded = state.superseded(node);
            if agent.superseded != superseded {
                agent.superseded.clone_from(&superseded);
                self.out.push(Action::ToAgent { session, message: ToAgent::Superseded(superseded) });
            }
            agent.remember_only(&orders);
            for message in orders {
                if agent.is_news(&message) {
                    self.out.push(Action::ToAgent { session, message });
                }
            }
        }
    }

    /// The session that speaks for a node, once it is welcome.
    pub(super) fn session_of(&self, node: NodeId) -> Option<Session> {
        self.agents.by_node.get(&node).copied()
    }

    /// Passes on the events that wait, one piece of every agent at a time.
    pub(super) fn record_events(&mut self, now: Now) {
        for session in std::mem::take(&mut self.agents.queued) {
            let Some(agent) = self.agents.sessions.get_mut(&session) else { continue };
            let (node, mut given_back) = (agent.node, 0);
            let next = agent.next(now.mono_ms, &mut given_back);
            for _ in 0..given_back {
                self.out.push(Action::AgentTaken { session });
            }
            if let Some(batch) = next {
                let change = Change::RecordEvents(RecordEvents { node, batch });
                self.ask(now, Asker::Agent(session), What::change(None, change));
            }
        }
    }

    pub(super) fn agents_change_settled(
        &mut self,
        now: Now,
        session: Session,
        what: What,
        result: Result<Outcome, Refusal>,
    ) {
        let Some(agent) = self.agents.sessions.get_mut(&session) else { return };
        let refusal = match result {
            Ok(Outcome::Answer(Answer::Rejected(refusal))) => {
                return self.close_agent(session, refusal.message, true);
            }
            Ok(Outcome::Answer(answer)) => return self.agents_change_done(now, session, what, answer),
            Ok(Outcome::Reply(_)) => return,
            Err(refusal) => refusal,
        };
        // Not recorded.
        match what {
            What::Change(command) => match command.change {
                Change::RecordEvents(RecordEvents { batch, .. }) if refusal.kind == RefusalKind::Invalid => {
                    let job = batch.job;
                    if agent.halve(batch) {
                        self.agents.queued.insert(session);
                    } else {
                        self.close_agent(session, format!("an event of {job}: {}", refusal.message), true);
                    }
                }
                Change::RecordEvents(RecordEvents { batch, .. }) => {
                    agent.put_back(batch, now.mono_ms + RETRY_MS);
                }
                // It is told of them again with the next orders.
                Change::SettleSuperseded(_) => agent.superseded.clear(),
                _ => self.close_agent(session, refusal.message, !refusal.kind.is_passing()),
            },
            What::Query(_) => {}
        }
    }

    fn agents_change_done(&mut self, now: Now, session: Session, what: What, answer: Answer) {
        let Some(agent) = self.agents.sessions.get_mut(&session) else { return };
        let What::Change(command) = what else { return };
        let Change::RecordEvents(RecordEvents { batch: EventBatch { job, generation, .. }, .. }) =
            command.change
        else {
            // Applied here, so the state has it.
            match &mut agent.phase {
                Phase::Describing => agent.phase = Phase::Described,
                Phase::Recording { left: 1 } => agent.phase = Phase::Recorded,
                Phase::Recording { left } => {
                    *left -= 1;
                    return;
                }
                _ => return,
            }
            return self.greeting_read(now, session);
        };
        let (message, done) = match answer {
            Answer::EventsTaken { seq } => {
                (ToAgent::EventsCommitted { job, generation, seq }, agent.recorded())
            }
            Answer::EventsGap { next_seq } => {
                (ToAgent::ResendEvents { job, generation, next_seq }, agent.gap(job, generation, next_seq))
            }
            other => {
                let why = format!("the events of {job} cannot be recorded: {other:?}");
                return self.close_agent(session, why, false);
            }
        };
        self.out.push(Action::ToAgent { session, message });
        if done {
            self.out.push(Action::AgentTaken { session });
        }
        self.agents.queued.insert(session);
    }

    /// Ends greetings that take too long, tries again what could not be recorded, and sends agents away from a coordinator that has
    /// lost the others.
    pub(super) fn look_after_agents(&mut self, now: Now) {
        let alone = now.mono_ms.saturating_sub(self.in_touch_ms) >= PATIENCE_MS;
        let mut away = Vec::new();
        for (session, agent) in &self.agents.sessions {
            if agent.phase != Phase::Up && now.mono_ms >= agent.deadline_ms {
                away.push((*session, "no greeting in time, or no coordinator leads; connect again"));
            } else if agent.phase == Phase::Up && alone {
                away.push((*session, "this coordinator has lost the others; connect to another one"));
            } else if agent.retry_ms != 0 && now.mono_ms >= agent.retry_ms {
                self.agents.queued.insert(*session);
            }
        }
        for (session, why) in away {
            self.close_agent(session, why, false);
        }
    }
}

fn describe(node: NodeId, hello: AgentHello) -> DescribeNode {
    DescribeNode {
        node,
        name: hello.name,
        slots: hello.slots,
        device: hello.device,
        version: hello.program_version,
        labels: hello.labels,
        host: hello.host,
        checkpoint_port: hello.checkpoint_port,
        process: hello.process,
        earlier: hello.earlier,
    }
}

/// Why a part of a job is over of which its worker can say nothing more.
fn lost_gang(name: &str, job: JobId, same_process: bool) -> String {
    if same_process {
        return format!(
            "the events of {job} on {name} do not fit what the cluster has recorded of it, so its ranks were ended; submit the job again"
        );
    }
    format!(
        "agent restarted: the worker on {name} was started again while it ran {job}, and its ranks were ended; submit the job again"
    )
}

fn double(node: NodeId) -> String {
    format!(
        "another worker is connected as {node}; every worker joins with a data directory of its own, never with a copy"
    )
}

fn as_described(node: NodeId, record: &NodeRecord, hello: &AgentHello) -> bool {
    !record.lost
        && record.name == clean_name(&hello.name, Member::Worker(node))
        && record.slots == hello.slots
        && record.device == hello.device
        && record.version == hello.program_version
        && record.labels == hello.labels
        && record.host == hello.host
        && record.checkpoint_port == hello.checkpoint_port
        && record.process == hello.process
}
