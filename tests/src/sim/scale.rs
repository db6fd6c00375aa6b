//! One gang after the other on many hosts, with the real coordinators and agents and no faults but those that are asked for: how long it takes
//! until all ranks have met, until all are gone, and how much is said for it.

use super::client::{Client, OPERATOR, Want};
use super::engine::EngineEvent;
use super::jobs;
use super::machine::Machine;
use super::mesh::{self, Mesh, RANKS};
use super::net::Site;
use super::queue::{MINUTE, Micros, SECOND};
use super::random::Random;
use super::setup::{genesis, redeem, token};
use super::world::{Event, Payload, World};
use fleet_agent::gang::GangId;
use fleet_agent::verdict::{Exit, agent_error};
use fleet_collectives::CollectiveError;
use fleet_common::codec::encoded_len;
use fleet_common::events::{FailureKind, JobError};
use fleet_common::exit::Fault;
use fleet_common::ids::{JobId, NodeId, Rank};
use fleet_common::protocol::{Request, Role, SubmitJob, ToAgent, Wish, Work};

/// Nothing of this takes longer.
const PATIENCE: Micros = 10 * MINUTE;

/// What a world of this kind counts and knows beside the ordinary.
#[derive(Debug, Default)]
pub struct Scale {
    pub mesh: Mesh,
    /// When all ranks of the gang had met.
    met: Option<Micros>,
    /// Messages of coordinators to agents, and all their bytes.
    pub messages: u64,
    pub bytes: u64,
    /// The largest of them.
    pub largest: u64,
    /// Of the list of ranks, as each agent gets it.
    pub list: u64,
}

impl Scale {
    /// Counts what is sent; the answer is its size.
    pub fn count(&mut self, payload: &Payload) -> Option<usize> {
        let Payload::ToAgent(message) = payload else { return None };
        let bytes = encoded_len(message).ok()?;
        self.messages += 1;
        self.bytes += bytes as u64;
        self.largest = self.largest.max(bytes as u64);
        if matches!(message, ToAgent::MeetPeers { .. }) {
            self.list = bytes as u64;
        }
        Some(bytes)
    }

    /// The last rank was told of the others; the answer is when all have met.
    pub fn all_told(&mut self) -> Micros {
        let met = self.mesh.all_met();
        self.met = Some(met);
        self.mesh.clear();
        met
    }
}

/// What was seen with so many hosts. Times are in seconds.
#[derive(Clone, Debug, PartialEq)]
pub struct Figures {
    pub hosts: u32,
    pub ranks: u32,
    pub start: Start,
    /// A rank is killed.
    pub death: End,
    /// The job is cancelled.
    pub stop: End,
    /// A machine has no power any more.
    pub lost: End,
    /// The job goes back to the queue by `fleet drain --now` and starts anew, from then on.
    pub again: f64,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Start {
    /// From the decision where the ranks shall be, until every agent has told its ranks of all others.
    pub told: f64,
    /// Until every rank is connected to every other.
    pub met: f64,
    /// Of the list of all ranks that every agent gets.
    pub list_bytes: u64,
    /// That coordinators send to agents for it.
    pub sent_bytes: u64,
    /// That the log grows by.
    pub log_bytes: u64,
}

#[derive(Clone, Debug, PartialEq)]
pub struct End {
    /// Until the last rank is gone.
    pub gone: f64,
    /// Until the cluster has recorded the end of the job.
    pub recorded: f64,
    pub log_bytes: u64,
    /// What is said of it.
    pub error: Option<JobError>,
}

/// Runs gangs of `hosts` times eight ranks. `Err`: what did not hold.
pub fn run(hosts: u32, seed: u64, print: bool) -> Result<Figures, String> {
    let mut world = World::of_gangs(hosts, seed, print);
    world.until("all machines have joined", |world| {
        world.oracle.state().nodes().len() == hosts as usize && world.nobody_waits()
    })?;
    let (job, start) = world.begin_gang("death")?;
    let death = world.end_gang(job, World::kill_a_rank)?;
    let (job, _) = world.begin_gang("stop")?;
    let stop = world.end_gang(job, |world, id| world.order_cancel(id.job))?;
    let (job, _) = world.begin_gang("again")?;
    let again = world.start_again(job)?;
    world.end_gang(job, |world, id| world.order_cancel(id.job))?;
    let (job, _) = world.begin_gang("lost")?;
    let lost = world.end_gang(job, World::cut_the_power)?;
    Ok(Figures { hosts, ranks: hosts * RANKS, start, death, stop, lost, again })
}

impl World {
    /// Three coordinators and so many machines, whose ranks do nothing by chance.
    fn of_gangs(machines: u32, seed: u64, print: bool) -> World {
        let state = genesis(3);
        let mut world = World::empty(seed, Random::new(seed), &state, 0, print);
        world.scale = Some(Box::default());
        world.found();
        world.net.up(Site::Client(OPERATOR), 1);
        world.clients.insert(OPERATOR, Client::new(OPERATOR, SECOND));
        world.order_token(token(Role::Worker));
        for number in 1..=machines {
            let clock = world.clock();
            world.machines.insert(number, Machine::new(number, RANKS, clock));
            world.order_join(Want::JoinMachine(number), redeem(Role::Worker, format!("machine-{number}")));
        }
        world.queue.after(0, Event::Look);
        world.queue.after(SECOND, Event::Compare);
        world
    }

    /// Lets things happen until it is so.
    fn until(&mut self, what: &str, holds: impl Fn(&World) -> bool) -> Result<Micros, String> {
        let latest = self.queue.now() + PATIENCE;
        while !holds(self) {
            let event = self.queue.pop().ok_or("nothing happens any more")?;
            self.events += 1;
            self.on_event(event);
            if let Some(violation) = &self.violation {
                return Err(violation.clone());
            }
            if self.queue.now() > latest {
                return Err(format!("{what}: not within {} min", PATIENCE / MINUTE));
            }
        }
        Ok(self.queue.now())
    }

    fn nobody_waits(&self) -> bool {
        self.clients.values().all(Client::is_idle)
            && self.machines.values().all(|machine| machine.agent.is_some())
    }

    fn scale(&mut self) -> &mut Scale {
        self.scale.as_mut().expect("a world of gangs")
    }

    fn job_of(&self, name: &str) -> Option<JobId> {
        self.oracle.state().jobs().iter().find(|(_, job)| job.name == name).map(|(id, _)| *id)
    }

    /// Submits a job over all machines, and waits until its ranks have met.
    fn begin_gang(&mut self, name: &str) -> Result<(JobId, Start), String> {
        let hosts = self.machines.len() as u32;
        let work = Work::Train { job_json: jobs::training(name, 1_000_000, 0).to_json() };
        let wish = Wish { nodes: Some(hosts), queue: true, ..Wish::default() };
        let submit = Request::Submit(SubmitJob { world_size: hosts * RANKS, work, wish });
        self.order_request(Want::Submit { name: name.to_owned() }, submit);
        self.until("the job is placed", |world| {
            let job = world.job_of(name).and_then(|job| world.oracle.state().jobs().get(&job));
            job.is_some_and(|job| job.placement.is_some())
        })?;
        let job = self.job_of(name).ok_or("the job is gone")?;
        let (placed, log) = (self.queue.now(), self.oracle.log_bytes);
        let sent = self.scale().bytes;
        let (told, met) = self.until_met()?;
        let seconds = |at: Micros| (at - placed) as f64 / 1e6;
        let start = Start {
            told: seconds(told),
            met: seconds(met),
            list_bytes: self.scale().list,
            sent_bytes: self.scale().bytes - sent,
            log_bytes: self.oracle.log_bytes - log,
        };
        Ok((job, start))
    }

    /// When all ranks had been told of each other, and when they had met.
    fn until_met(&mut self) -> Result<(Micros, Micros), String> {
        self.scale().met = None;
        let told = self.until("all ranks are told", |world| {
            world.scale.as_ref().is_some_and(|scale| scale.met.is_some())
        })?;
        let met = self.scale().met.unwrap_or(told);
        self.until("all ranks have met", |world| world.queue.now() >= met + 2 * mesh::STEP)?;
        Ok((told, met))
    }

    /// Something happens to a gang that runs, and all of it ends.
    fn end_gang(&mut self, job: JobId, happens: impl FnOnce(&mut World, GangId)) -> Result<End, String> {
        let generation = self.oracle.state().jobs().get(&job).map_or(0, |record| record.generation);
        let id = GangId { job, generation };
        let (begins, log) = (self.queue.now(), self.oracle.log_bytes);
        happens(self, id);
        let gone = self.until("all ranks are gone", |world| world.engine.living().is_empty())?;
        let recorded = self.until("the end is recorded", |world| {
            world.oracle.state().jobs().get(&job).is_none_or(|job| job.state.is_final())
        })?;
        let seconds = |at: Micros| (at - begins) as f64 / 1e6;
        Ok(End {
            gone: seconds(gone),
            recorded: seconds(recorded),
            log_bytes: self.oracle.log_bytes - log,
            error: self.oracle.state().jobs().get(&job).and_then(|job| job.error.clone()),
        })
    }

    /// A rank in the middle gets a SIGKILL.
    fn kill_a_rank(&mut self, id: GangId) {
        let world = self.machines.len() as u32 * RANKS;
        let dead = victim(world);
        self.oracle.excuse(id.job, "one of its ranks was killed");
        let now = self.queue.now();
        self.queue.after(0, Event::Engine(id, EngineEvent::Gone(dead, Exit::Signal(9))));
        for parting in mesh::after_death(dead, world, now) {
            // As `fleet-rank` says it.
            let rank = parting.error.culprit().map(|rank| rank as Rank);
            let kind = match parting.error {
                CollectiveError::Aborted { .. } => FailureKind::Told,
                _ => FailureKind::Peer,
            };
            let error = agent_error(kind, Fault::Job, "", parting.error.to_string());
            let error = JobError { rank, node: None, ..error };
            self.queue.at(parting.at, Event::Engine(id, EngineEvent::Failed(parting.rank, Box::new(error))));
        }
    }

    /// A machine in the middle is gone from one moment to the other, with its agent and its ranks.
    fn cut_the_power(&mut self, id: GangId) {
        self.oracle.excuse(id.job, "one of its machines was lost");
        let machine = self.machines.len() as u32 / 2 + 1;
        self.lose_machine(machine);
    }

    /// Back to the queue and placed anew: no rank of the new start may live beside one of the old.
    fn start_again(&mut self, job: JobId) -> Result<f64, String> {
        let begins = self.queue.now();
        let node = NodeId(1);
        self.order_drain(node);
        self.until("the job is back in the queue", |world| {
            world.oracle.state().jobs().get(&job).is_some_and(|job| job.placement.is_none())
        })?;
        if let Some(id) = self.engine.living().keys().next() {
            return Err(format!("{id} is back in the queue and has living ranks"));
        }
        self.order_undrain();
        let (_, met) = self.until_met()?;
        let generation = self.oracle.state().jobs().get(&job).map_or(0, |record| record.generation);
        match generation {
            2 => Ok((met - begins) as f64 / 1e6),
            other => Err(format!("the second start has generation {other}")),
        }
    }
}

/// Which rank is killed of so many.
pub fn victim(world: u32) -> Rank {
    world / 2 + 3
}

/// As a table in Markdown.
pub fn table(all: &[Figures]) -> String {
    let mut text = String::from(
        "| hosts x ranks | told, ms | met, ms | list, KiB | to agents, MiB | log, KiB | a death: gone, ms | recorded, ms | a stop: gone, ms | started again, ms | a host lost: gone, s |\n|---|---|---|---|---|---|---|---|---|---|---|\n",
    );
    for figures in all {
        let Figures { hosts, start, death, stop, lost, again, .. } = figures;
        let ms = |seconds: f64| format!("{:.0}", seconds * 1e3);
        let kib = |bytes: u64| format!("{:.1}", bytes as f64 / 1024.0);
        let cells = [
            format!("{hosts} x {RANKS}"),
            ms(start.told),
            ms(start.met),
            kib(start.list_bytes),
            format!("{:.2}", start.sent_bytes as f64 / f64::from(1 << 20)),
            kib(start.log_bytes),
            ms(death.gone),
            ms(death.recorded),
            ms(stop.gone),
            ms(*again),
            format!("{:.1}", lost.gone),
        ];
        text.push_str(&format!("| {} |\n", cells.join(" | ")));
    }
    text
}
