//! A machine of the cluster: the real agent's core and the driver around it.

use super::host::Clock;
use super::jobs;
use super::net::{ConnId, Site};
use super::queue::{MS, Micros, SECOND};
use super::world::{Event, Payload, Purpose, World};
use fleet_agent::agent::{Accelerator, Action, Agent, Config, Input, Now, Past};
use fleet_agent::budget::Rates;
use fleet_agent::gang::{GangId, GangInput};
use fleet_common::ids::NodeId;
use fleet_common::protocol::ToAgent;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

const BACKOFF_FIRST: Micros = 50 * MS;
const BACKOFF_LONGEST: Micros = 2 * SECOND;

pub struct Machine {
    pub number: u32,
    pub clock: Clock,
    pub slots: u32,
    pub labels: BTreeMap<String, String>,
    /// Its identity, once it has joined.
    pub node: Option<NodeId>,
    pub disk: Records,
    pub agent: Option<Agent>,
    pub life: u64,
    pub paused: bool,
    /// It was cut off, and joins again under another identity when its agent has noticed.
    pub expelled: bool,
    begun: Micros,
    conn: Option<ConnId>,
    backoff: Micros,
    inbox: VecDeque<Input>,
    /// When the next `Event::AgentDue` comes.
    due: Option<Micros>,
}

/// What a worker writes down of what it starts; it is durable before anything is started.
#[derive(Debug, Default)]
pub struct Records {
    /// The process that used the disk last, and those before it that no welcome has settled.
    processes: Vec<u64>,
    gangs: BTreeSet<GangId>,
}

impl Machine {
    pub fn new(number: u32, slots: u32, clock: Clock) -> Machine {
        Machine {
            number,
            clock,
            slots,
            labels: jobs::labels(number),
            node: None,
            disk: Records::default(),
            agent: None,
            life: 0,
            paused: false,
            expelled: false,
            begun: 0,
            conn: None,
            backoff: BACKOFF_FIRST,
            inbox: VecDeque::new(),
            due: None,
        }
    }

    pub fn site(&self) -> Site {
        Site::Machine(self.number)
    }

    pub fn now(&self, now: Micros) -> Now {
        let mono = self.clock.mono_ms(now - self.begun);
        Now { mono: Duration::from_millis(mono), unix_ms: self.clock.unix_ms(now) }
    }

    fn config(&self) -> Config {
        Config {
            name: format!("machine-{}", self.number),
            slots: self.slots,
            accelerator: Accelerator::Cpu,
            no_cuda: None,
            cores: self.slots,
            program_version: "0".into(),
            labels: self.labels.clone(),
            host: format!("machine-{}", self.number),
            checkpoint_port: 1,
            process: self.life,
            lines: Rates::USUAL,
        }
    }
}

impl World {
    /// Starts the agent of a machine that has joined.
    pub fn start_agent(&mut self, number: u32) {
        let now = self.queue.now();
        let Some(machine) = self.machines.get_mut(&number) else { return };
        if machine.agent.is_some() || machine.node.is_none() {
            return;
        }
        let forgets = !machine.disk.processes.is_empty() && self.random.chance(1, 12);
        if forgets {
            machine.disk = Records::default();
        }
        machine.life += 1;
        machine.begun = now;
        let past = Past { processes: machine.disk.processes.clone(), gangs: machine.disk.gangs.clone() };
        machine.disk.processes.push(machine.life);
        machine.agent = Some(Agent::new(machine.config(), past));
        machine.paused = false;
        machine.conn = None;
        machine.backoff = BACKOFF_FIRST;
        machine.inbox.clear();
        machine.due = None;
        let (site, life) = (machine.site(), machine.life);
        self.net.up(site, life);
        self.say(format_args!("machine-{number} starts its agent"));
        self.sweep_machine(number);
        if forgets {
            self.say(format_args!("fault: the records on machine-{number} are gone"));
            self.oracle.records_lost = true;
        }
        self.queue.after(0, Event::Dial { machine: number, life });
    }

    /// The agent's process is killed. Some of its ranks end with it; others live on until the next one sweeps.
    pub fn kill_agent(&mut self, number: u32) {
        if self.drop_agent(number) {
            self.orphan_ranks_of(number);
        }
    }

    /// The machine stops from one moment to the other, for good.
    pub fn lose_machine(&mut self, number: u32) {
        self.leave(number);
    }

    /// The agent ends by itself, and ends its ranks before.
    fn leave(&mut self, number: u32) {
        if self.drop_agent(number) {
            self.sweep_machine(number);
        }
    }

    fn drop_agent(&mut self, number: u32) -> bool {
        let Some(machine) = self.machines.get_mut(&number) else { return false };
        let there = machine.agent.take().is_some();
        if there {
            let site = machine.site();
            self.net.down(site);
        }
        there
    }

    pub fn pause_agent(&mut self, number: u32) {
        if let Some(machine) = self.machines.get_mut(&number).filter(|machine| machine.agent.is_some()) {
            machine.paused = true;
            let site = machine.site();
            self.net.pause(site, true);
        }
    }

    pub fn resume_agent(&mut self, number: u32) {
        let Some(machine) = self.machines.get_mut(&number).filter(|machine| machine.paused) else { return };
        machine.paused = false;
        let waiting = std::mem::take(&mut machine.inbox);
        let site = machine.site();
        self.net.pause(site, false);
        self.tell_agent_core(number, Input::Tick);
        waiting.into_iter().for_each(|input| self.tell_agent_core(number, input));
    }

    pub fn on_dial(&mut self, number: u32, life: u64) {
        let now = self.queue.now();
        let Some(machine) = self.machines.get(&number).filter(|machine| machine.life == life) else { return };
        let (true, None, Some(node)) = (machine.agent.is_some(), machine.conn, machine.node) else { return };
        if machine.paused {
            self.queue.after(100 * MS, Event::Dial { machine: number, life });
            return;
        }
        // All are tried side by side, as `net::connect` does, and any of those that answer may be the first.
        let mut targets: Vec<u32> = self.addresses.values().copied().collect();
        let mut connected = None;
        while connected.is_none() && !targets.is_empty() {
            let target = targets.swap_remove(self.random.index(targets.len()));
            connected = self.net.connect(Site::Machine(number), Site::Host(target), now, &mut self.random);
        }
        let Some(machine) = self.machines.get_mut(&number) else { return };
        match connected {
            Some((conn, at)) => {
                machine.conn = Some(conn);
                self.purposes.insert(conn, Purpose::Agent { node });
                self.queue.at(at[0], Event::Connected { conn, end: 0 });
                self.queue.at(at[1], Event::Connected { conn, end: 1 });
            }
            None => self.dial_later(number),
        }
    }

    fn dial_later(&mut self, number: u32) {
        let Some(machine) = self.machines.get_mut(&number) else { return };
        let (longest, life) = (machine.backoff, machine.life);
        machine.backoff = (longest * 2).min(BACKOFF_LONGEST);
        let wait = self.random.range(longest / 2..longest + 1);
        self.queue.after(wait, Event::Dial { machine: number, life });
    }

    pub fn machine_connected(&mut self, number: u32, conn: ConnId) {
        if self.machines.get(&number).is_some_and(|machine| machine.conn == Some(conn)) {
            let host = self.net.site(conn, 1);
            self.say(format_args!(
                "machine-{number} is connected to {}",
                host.map_or_else(String::new, |host| host.to_string())
            ));
            self.tell_agent_core(number, Input::Connected);
        }
    }

    pub fn machine_hears(&mut self, number: u32, conn: ConnId, message: ToAgent) {
        let Some(machine) = self.machines.get_mut(&number).filter(|machine| machine.conn == Some(conn))
        else {
            return;
        };
        if matches!(message, ToAgent::Welcome { .. }) {
            machine.backoff = BACKOFF_FIRST;
        }
        self.tell_agent_core(number, Input::Message(message));
    }

    pub fn machine_loses(&mut self, number: u32, conn: ConnId) {
        let Some(machine) = self.machines.get_mut(&number).filter(|machine| machine.conn == Some(conn))
        else {
            return;
        };
        machine.conn = None;
        self.say(format_args!("machine-{number} has lost its coordinator"));
        self.tell_agent_core(number, Input::Disconnected);
        self.dial_later(number);
    }

    pub fn on_agent_due(&mut self, number: u32, life: u64) {
        let now = self.queue.now();
        let Some(machine) = self.machines.get_mut(&number).filter(|machine| machine.life == life) else {
            return;
        };
        if machine.due.is_some_and(|due| due <= now) {
            machine.due = None;
            self.tell_agent_core(number, Input::Tick);
        }
    }

    pub fn tell_agent_core(&mut self, number: u32, input: Input) {
        let now = self.queue.now();
        let Some(machine) = self.machines.get_mut(&number) else { return };
        let at = machine.now(now);
        let Some(agent) = machine.agent.as_mut() else { return };
        if machine.paused {
            machine.inbox.push_back(input);
            return;
        }
        for action in agent.handle(at, input) {
            self.perform(number, action);
        }
        self.plan_agent(number);
    }

    /// Sees to it that the agent gets its `Tick` in time.
    fn plan_agent(&mut self, number: u32) {
        let now = self.queue.now();
        let Some(machine) = self.machines.get_mut(&number) else { return };
        let Some(deadline) = machine.agent.as_ref().and_then(Agent::deadline) else { return };
        let wait = deadline.saturating_sub(machine.now(now).mono).as_micros() as Micros;
        // The agent counts whole milliseconds of a clock that may be slow.
        let at = now + wait + wait / 1000 + MS;
        if machine.due.is_none_or(|due| at < due) {
            machine.due = Some(at);
            let life = machine.life;
            self.queue.at(at, Event::AgentDue { machine: number, life });
        }
    }

    fn perform(&mut self, number: u32, action: Action) {
        match action {
            Action::Send(message) => {
                if let Some(conn) = self.machines[&number].conn {
                    self.send(conn, 0, Payload::FromAgent(message), 400);
                }
            }
            Action::Registered(_) => {
                if let Some(machine) = self.machines.get_mut(&number) {
                    machine.disk.processes = vec![machine.life];
                }
            }
            Action::Spawn(gang) => {
                if let Some(machine) = self.machines.get_mut(&number) {
                    machine.disk.gangs.insert(GangId { job: gang.job, generation: gang.generation });
                }
                self.spawn(number, &gang);
            }
            Action::Prepare { gang, job, resume, .. } => self.prepare(number, gang, &job, resume),
            Action::Meet { gang, peers } => self.meet(number, gang, peers),
            Action::ToRank { gang, rank, message } => self.tell_rank(number, gang, rank, message),
            Action::Strike { gang, rank, blow } => self.strike(number, gang, rank, blow),
            Action::AbortCollectives { gang, .. } => self.abort_collectives(gang, number),
            Action::SampleMemory(gang) => {
                // Zeros are not passed on, and so keep the log short.
                let input = GangInput::Memory { rss_mib: Vec::new(), pss_mib: Vec::new() };
                self.tell_agent_later(number, Input::Gang(gang, input));
            }
            // Files are made up as well, and so is who can get them.
            Action::Lend(_) => {}
            // Nobody asks in here: what is printed is made up.
            Action::ReadOutput(_) => {}
            // Nor is there a segment in which one could see them.
            Action::Look(_) => {}
            Action::Sweep(gang) => {
                self.tell_agent_later(number, Input::Gang(gang, GangInput::Swept { left: 0 }))
            }
            Action::Forget(gang) => {
                if let Some(machine) = self.machines.get_mut(&number) {
                    machine.disk.gangs.remove(&gang);
                }
                self.say(format_args!("machine-{number} forgets {gang}"));
            }
            Action::Reconnect => {
                if let Some(conn) = self.machines.get_mut(&number).and_then(|machine| machine.conn) {
                    self.net.close(conn, 0);
                    self.machine_loses(number, conn);
                }
            }
            Action::Exit { refused } => {
                let why = refused.unwrap_or_else(|| "it was asked to end".into());
                self.say(format_args!("machine-{number} ends its agent: {why}"));
                self.leave(number);
                self.agent_exited(number);
            }
        }
    }

    pub(super) fn tell_agent_later(&mut self, number: u32, input: Input) {
        let life = self.machines[&number].life;
        self.queue.after(MS, Event::ToAgentCore { machine: number, life, input: Box::new(input) });
    }
}
