//! Ranks without training: they load, meet, step, save, stop when asked, and die when hit, as `fleet-rank` does, in virtual time.
//!
//! A gang is one thing here even when its ranks are on several machines: it goes on only while all of them live and run.

use super::mesh;
use super::net::Site;
use super::queue::{MS, Micros, SECOND};
use super::random::mix;
use super::world::{Event, World};
use fleet_agent::agent::Input;
use fleet_agent::gang::{Blow, GangId, GangInput, Prepared};
use fleet_agent::verdict::{Exit, agent_error};
use fleet_common::events::{
    CheckpointRecord, DataStats, Endpoint, Event as Told, EventBody, FailureKind, JobError, Outcome, Shard,
    Step,
};
use fleet_common::exit::Fault;
use fleet_common::ids::Rank;
use fleet_common::job::{Job, Resume};
use fleet_common::protocol::{FromRank, Gang, Peer, ResumePoint, ToRank, Work};
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

/// A gang that has not gone on for so long says so and fails; the collectives' deadline.
const STALL: Micros = 60 * SECOND;

#[derive(Clone, Debug)]
pub enum EngineEvent {
    Prepared(u32, Option<PathBuf>),
    /// The checkpoint with this manifest cannot be fetched.
    Lost(u32, String),
    /// A rank without a training job has run its time.
    Ran(Rank),
    Step,
    /// Ranks whose peer is gone notice it.
    Aborted(Rank),
    /// A rank has found why it cannot go on.
    Failed(Rank, Box<JobError>),
    Left(Rank),
    Gone(Rank, Exit),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Loading,
    /// `ToRank::Start` came.
    Started,
    Done,
    /// The process is gone.
    Gone,
}

#[derive(Clone, Debug)]
struct Proc {
    machine: u32,
    /// Its number on that machine.
    local: Rank,
    /// Of the agent whose child it is.
    life: u64,
    stage: Stage,
}

#[derive(Clone, Debug)]
pub struct Run {
    world_size: u32,
    /// Where its ranks can be called: as the first of its nodes was told.
    peers: Option<Vec<Peer>>,
    /// Where they listen, as the agents said.
    endpoints: BTreeMap<Rank, Endpoint>,
    train: Option<Box<Job>>,
    procs: BTreeMap<Rank, Proc>,
    step: u64,
    stepping: bool,
    /// A rank is gone that the others need: they will never meet again.
    broken: bool,
    stop: bool,
    step_takes: Micros,
    stepped_at: Micros,
}

impl Run {
    fn total_steps(&self) -> u64 {
        self.train.as_ref().and_then(|job| job.max_steps).unwrap_or(0)
    }

    /// The number within the job of a machine's rank.
    fn global(&self, machine: u32, local: Rank) -> Option<Rank> {
        let here = |process: &Proc| process.machine == machine && process.local == local;
        self.procs.iter().find(|(_, process)| here(process)).map(|(rank, _)| *rank)
    }

    fn lives(&self) -> impl Iterator<Item = (Rank, &Proc)> {
        self.procs
            .iter()
            .filter(|(_, rank)| rank.stage != Stage::Gone)
            .map(|(rank, process)| (*rank, process))
    }
}

#[derive(Debug, Default)]
pub struct Engine {
    runs: BTreeMap<GangId, Run>,
}

impl Engine {
    /// Gangs with living ranks, each with the machines that they are on.
    pub fn living(&self) -> BTreeMap<GangId, BTreeSet<u32>> {
        let of = |run: &Run| run.lives().map(|(_, process)| process.machine).collect::<BTreeSet<u32>>();
        self.runs.iter().map(|(id, run)| (*id, of(run))).filter(|(_, on)| !on.is_empty()).collect()
    }
}

impl World {
    /// The agent starts its ranks of a gang.
    pub fn spawn(&mut self, machine: u32, gang: &Gang) {
        let id = GangId { job: gang.job, generation: gang.generation };
        let older = self.engine.living();
        if let Some((other, on)) =
            older.iter().find(|(other, _)| other.job == id.job && other.generation != id.generation)
        {
            let on: Vec<String> = on.iter().map(|machine| Site::Machine(*machine).to_string()).collect();
            self.violated(format!(
                "ranks of {id} start on machine-{machine} while ranks of {other} live on {}",
                on.join(", ")
            ));
        }
        let (now, life) = (self.queue.now(), self.machines[&machine].life);
        let train = match &gang.work {
            Work::Train { job_json } => Job::from_json(job_json).ok().map(Box::new),
            Work::Program(_) => None,
        };
        let chance = mix(id.job.0 ^ id.generation << 32);
        let run = self.engine.runs.entry(id).or_insert_with(|| Run {
            world_size: gang.world_size,
            peers: None,
            endpoints: BTreeMap::new(),
            train,
            procs: BTreeMap::new(),
            step: 0,
            stepping: false,
            broken: false,
            stop: false,
            step_takes: if self.scale.is_some() { mesh::STEP } else { 500 * MS + chance % (8 * SECOND) },
            stepped_at: now,
        });
        let mut twice = None;
        for rank in ranks_of(gang) {
            let process = Proc { machine, local: rank - gang.first_rank, life, stage: Stage::Loading };
            if let Some(old) = run.procs.insert(rank, process) {
                twice = Some((
                    rank,
                    if old.stage == Stage::Gone { "was started before" } else { "lives already" },
                ));
            }
        }
        let programs: Vec<Rank> = if run.train.is_none() { ranks_of(gang).collect() } else { Vec::new() };
        if let Some((rank, how)) = twice {
            self.violated(format!("rank {rank} of {id} {how} and is started again on machine-{machine}"));
        }
        for rank in programs {
            let takes = SECOND + mix(chance ^ u64::from(rank)) % (60 * SECOND);
            self.queue.after(takes, Event::Engine(id, EngineEvent::Ran(rank)));
        }
        self.say(format_args!("machine-{machine} starts ranks {:?} of {id}", ranks_of(gang)));
        self.listen(machine, id, gang);
    }

    /// Ranks that train on several machines can be called from the beginning.
    fn listen(&mut self, machine: u32, id: GangId, gang: &Gang) {
        if gang.nodes <= 1 || matches!(gang.work, Work::Program(_)) {
            return;
        }
        let unique = |rank: Rank| mix(id.job.0 ^ id.generation << 20 ^ u64::from(rank) << 40);
        let endpoint = |rank: Rank| Endpoint {
            port: 1024 + (unique(rank) % 60_000) as u16,
            key: unique(rank).to_be_bytes().to_vec(),
        };
        let endpoints: BTreeMap<Rank, Endpoint> = ranks_of(gang).map(|rank| (rank, endpoint(rank))).collect();
        let told = GangInput::Listening(endpoints.values().cloned().collect());
        if let Some(run) = self.engine.runs.get_mut(&id) {
            run.endpoints.extend(endpoints);
        }
        self.tell_agent_later(machine, Input::Gang(id, told));
    }

    /// The agent knows where all ranks can be called: where they listen in this generation, and as every other agent of it does.
    pub fn meet(&mut self, machine: u32, id: GangId, peers: Vec<Peer>) {
        let Some(run) = self.engine.runs.get_mut(&id) else { return };
        let listen = (0..).zip(&peers).all(|(rank, peer)| {
            let of = |endpoint: &Endpoint| endpoint.port == peer.port && endpoint.key == peer.key;
            run.endpoints.get(&rank).is_some_and(of)
        });
        let (all, same) =
            (peers.len() == run.world_size as usize, run.peers.as_ref().is_none_or(|told| *told == peers));
        run.peers = Some(peers);
        if !(all && listen && same) {
            self.violated(format!(
                "machine-{machine} was told of other ranks of {id} than there are, or than others were"
            ));
        }
    }

    /// The agent asks for the token cache and the checkpoint to go on from.
    pub fn prepare(&mut self, machine: u32, id: GangId, job: &Job, point: Option<ResumePoint>) {
        let takes = if self.scale.is_some() { 0 } else { self.random.range(100 * MS..4 * SECOND) };
        let node = self.machines.get(&machine).and_then(|machine| machine.node);
        let chancy = point.filter(|_| self.scale.is_none());
        let elsewhere = chancy.filter(|point| point.holders.iter().all(|holder| Some(holder.node) != node));
        if let Some(point) = elsewhere
            && self.random.chance(1, 4)
        {
            self.oracle.excuse(id.job, "what it goes on from cannot be had");
            self.queue.after(takes, Event::Engine(id, EngineEvent::Lost(machine, point.manifest_sha256)));
            return;
        }
        let resume = match &job.checkpoint.resume {
            Resume::Path(path) => Some(path.clone()),
            _ => None,
        };
        self.queue.after(takes, Event::Engine(id, EngineEvent::Prepared(machine, resume)));
    }

    pub fn tell_rank(&mut self, machine: u32, id: GangId, local: Rank, message: ToRank) {
        let Some(run) = self.engine.runs.get_mut(&id) else { return };
        let Some(rank) = run.global(machine, local) else { return };
        match message {
            ToRank::Start(start) => {
                let alone = run.peers.is_none();
                if start.hosts > 1 && alone {
                    self.violated(format!("rank {rank} of {id} starts and knows no other"));
                    return;
                }
                let now = self.queue.now();
                if let Some(process) =
                    run.procs.get_mut(&rank).filter(|process| process.stage == Stage::Loading)
                {
                    process.stage = Stage::Started;
                    self.scale.iter_mut().for_each(|scale| scale.mesh.told(rank, now));
                }
                if rank == 0 {
                    run.step =
                        start.resume.and_then(|path| path.rsplit('-').next()?.parse().ok()).unwrap_or(0);
                }
                let all = (0..run.world_size)
                    .all(|rank| run.procs.get(&rank).is_some_and(|process| process.stage == Stage::Started));
                if all && !run.stepping {
                    run.stepping = true;
                    let first = self.scale.as_mut().map_or(now + SECOND, |scale| scale.all_told());
                    run.stepped_at = now;
                    let step = run.step;
                    self.rank_says(id, 0, EventBody::Started { step, parameters: 1, device: "cpu".into() });
                    self.queue.at(first, Event::Engine(id, EngineEvent::Step));
                }
            }
            ToRank::Stop => {
                run.stop = true;
                if !run.stepping {
                    // Before the first step there is nothing to save.
                    self.rank_done(id, rank, Outcome::Stopped { steps: 0 });
                }
            }
            ToRank::CheckpointCommitted { .. } => {}
        }
    }

    pub fn strike(&mut self, machine: u32, id: GangId, local: Rank, blow: Blow) {
        let Some(rank) = self.engine.runs.get(&id).and_then(|run| run.global(machine, local)) else { return };
        let (after, exit) = match blow {
            Blow::Kill => (MS, Exit::Signal(9)),
            Blow::User1 | Blow::User2 => return, // nothing that a rank here would end for
            Blow::HangUp | Blow::Interrupt | Blow::Terminate => {
                (self.random.range(MS..500 * MS), Exit::Signal(15))
            }
        };
        self.queue.after(after, Event::Engine(id, EngineEvent::Gone(rank, exit)));
    }

    /// A rank is gone: those that wait for it notice.
    pub fn abort_collectives(&mut self, id: GangId, machine: u32) {
        let Some(run) = self.engine.runs.get(&id) else { return };
        let near: Vec<Rank> =
            run.lives().filter(|(_, process)| process.machine == machine).map(|(rank, _)| rank).collect();
        for rank in near {
            let after = self.random.range(MS..300 * MS);
            self.queue.after(after, Event::Engine(id, EngineEvent::Aborted(rank)));
        }
    }

    /// The agent was killed: some ranks end with it, others do not notice.
    pub fn orphan_ranks_of(&mut self, machine: u32) {
        let (all, spared) = (self.random.chance(1, 2), self.random.range(0..3) as Rank);
        self.end_ranks(machine, |rank| all || rank % 3 != spared);
    }

    /// All ranks that were ever started on the machine are ended, whoever started them.
    pub fn sweep_machine(&mut self, machine: u32) {
        self.end_ranks(machine, |_| true);
    }

    fn end_ranks(&mut self, machine: u32, ends: impl Fn(Rank) -> bool) {
        let mut touched = Vec::new();
        for (id, run) in &mut self.engine.runs {
            for (rank, process) in run.procs.iter_mut().filter(|(_, process)| process.machine == machine) {
                touched.push(id.job);
                if ends(*rank) {
                    run.broken |= process.stage != Stage::Done;
                    process.stage = Stage::Gone;
                }
            }
        }
        for job in touched {
            self.oracle.excuse(job, "the agent of one of its nodes ended");
        }
    }

    /// Something goes wrong in a rank by itself. Returns what.
    pub fn break_a_rank(&mut self) -> Option<String> {
        let living = self.engine.living();
        let ids: Vec<GangId> = living.keys().copied().collect();
        let id = *self.random.pick(&ids)?;
        let ranks: Vec<Rank> = self.engine.runs[&id].lives().map(|(rank, _)| rank).collect();
        let rank = *self.random.pick(&ranks)?;
        self.oracle.excuse(id.job, "one of its ranks broke");
        if self.random.chance(1, 2) {
            let exit = if self.random.chance(1, 2) { Exit::Signal(11) } else { Exit::Code(3) };
            self.queue.after(0, Event::Engine(id, EngineEvent::Gone(rank, exit)));
        } else {
            let error = agent_error(FailureKind::Rank, Fault::Job, "", "the loss is not a number");
            self.tell_agent(id, rank, |local| GangInput::Rank(local, FromRank::Failed(error)));
            self.queue.after(20 * MS, Event::Engine(id, EngineEvent::Gone(rank, Exit::Code(1))));
        }
        Some(format!("rank {rank} of {id} breaks"))
    }

    pub fn on_engine(&mut self, id: GangId, event: EngineEvent) {
        match event {
            EngineEvent::Prepared(machine, resume) => self.prepared(machine, id, resume),
            EngineEvent::Lost(machine, manifest_sha256) => {
                let input = GangInput::CheckpointLost { manifest_sha256, why: "nobody has it".into() };
                self.tell_agent_core(machine, Input::Gang(id, input));
            }
            EngineEvent::Step => self.step(id),
            EngineEvent::Ran(rank) => self.exit(id, rank, Exit::Code(0)),
            EngineEvent::Left(rank) => self.exit(id, rank, Exit::Code(0)),
            EngineEvent::Gone(rank, exit) => self.exit(id, rank, exit),
            EngineEvent::Aborted(rank) => {
                let error = agent_error(FailureKind::Told, Fault::Job, "", "all_reduce: a rank is gone");
                self.rank_fails(id, rank, error);
            }
            EngineEvent::Failed(rank, error) => self.rank_fails(id, rank, *error),
        }
    }

    /// A rank that is not done says so and goes.
    fn rank_fails(&mut self, id: GangId, rank: Rank, error: JobError) {
        let living = |run: &&Run| {
            let process = run.procs.get(&rank);
            process.is_some_and(|process| !matches!(process.stage, Stage::Gone | Stage::Done))
        };
        if self.engine.runs.get(&id).filter(living).is_some() {
            self.tell_agent(id, rank, |local| GangInput::Rank(local, FromRank::Failed(error)));
            self.queue.after(mesh::EXIT, Event::Engine(id, EngineEvent::Gone(rank, Exit::Code(1))));
        }
    }

    fn prepared(&mut self, machine: u32, id: GangId, resume: Option<PathBuf>) {
        let stats = DataStats { documents: 1, train_windows: 1, cached: true, ..DataStats::default() };
        let prepared = Prepared { cache_dir: "/cache".into(), stats, resume, run: id.job.to_string() };
        self.tell_agent_core(machine, Input::Gang(id, GangInput::Prepared(Ok(prepared))));
    }

    fn step(&mut self, id: GangId) {
        let now = self.queue.now();
        let Some(run) = self.engine.runs.get_mut(&id) else { return };
        let total = run.total_steps();
        let broken = run.broken;
        if run.procs.values().all(|process| process.stage == Stage::Gone) {
            return;
        }
        let machines: BTreeSet<u32> = run.procs.values().map(|process| process.machine).collect();
        let apart = |a: u32, b: u32| self.net.path(Site::Machine(a), Site::Machine(b)).cut;
        let cut = machines.iter().any(|a| machines.iter().any(|b| apart(*a, *b)));
        if broken || cut {
            // Ranks on the broken one's machine are told; the others find out by the deadline, or are stopped before.
            if now > run.stepped_at + STALL {
                let waiting: Vec<Rank> = run.lives().map(|(rank, _)| rank).collect();
                self.oracle.excuse(id.job, "its ranks lost each other");
                for rank in waiting {
                    self.queue.after(0, Event::Engine(id, EngineEvent::Aborted(rank)));
                }
            } else {
                self.queue.after(SECOND, Event::Engine(id, EngineEvent::Step));
            }
            return;
        }
        run.stepped_at = now;
        let (takes, stop, world_size) = (run.step_takes, run.stop, run.world_size);
        let save_steps = run.train.as_ref().map_or(0, |job| job.checkpoint.save_steps);
        if stop {
            let step = run.step;
            self.save(id, step);
            (0..world_size).for_each(|rank| self.rank_done(id, rank, Outcome::Stopped { steps: step }));
            return;
        }
        run.step += 1;
        let step = run.step;
        let loss = 1.0 + 1.0 / step as f64;
        let body =
            Step { step, total_steps: total, epoch: 0.0, loss, lr: 0.1, grad_norm: 1.0, tokens_per_s: 1.0 };
        self.rank_says(id, 0, EventBody::Step(body));
        if step >= total || save_steps > 0 && step % save_steps == 0 {
            self.save(id, step);
        }
        if step >= total {
            let outcome = Outcome::Succeeded { steps: step, final_loss: Some(loss), tokens_per_s: 1.0 };
            (0..world_size).for_each(|rank| self.rank_done(id, rank, outcome.clone()));
        } else {
            self.queue.after(takes, Event::Engine(id, EngineEvent::Step));
        }
    }

    fn save(&mut self, id: GangId, step: u64) {
        let record = CheckpointRecord {
            step,
            path: format!("/out/{}/step-{step}", id.job),
            manifest_sha256: format!("{:064x}", mix(step)),
            bytes: 900,
            loss: 1.0,
            writers: 1,
            disks: vec![0],
            shards: vec![Shard {
                writer: 0,
                name: "model".into(),
                bytes: 900,
                sha256: format!("{:064x}", step),
            }],
        };
        self.rank_says(id, 0, EventBody::Checkpoint(record));
    }

    fn rank_done(&mut self, id: GangId, rank: Rank, outcome: Outcome) {
        let Some(process) = self.engine.runs.get_mut(&id).and_then(|run| run.procs.get_mut(&rank)) else {
            return;
        };
        if matches!(process.stage, Stage::Gone | Stage::Done) {
            return;
        }
        process.stage = Stage::Done;
        self.tell_agent(id, rank, |local| GangInput::Rank(local, FromRank::Done(outcome)));
        let leaves = if self.scale.is_some() { mesh::EXIT } else { self.random.range(10 * MS..2 * SECOND) };
        self.queue.after(leaves, Event::Engine(id, EngineEvent::Left(rank)));
    }

    fn exit(&mut self, id: GangId, rank: Rank, exit: Exit) {
        let Some(run) = self.engine.runs.get_mut(&id) else { return };
        let Some(process) = run.procs.get_mut(&rank).filter(|process| process.stage != Stage::Gone) else {
            return;
        };
        let (machine, local) = (process.machine, process.local);
        run.broken |= process.stage != Stage::Done;
        process.stage = Stage::Gone;
        let at = self.machines[&machine].now(self.queue.now()).mono;
        self.tell_agent(id, rank, |_| GangInput::Exited { rank: local, at, exit });
    }

    fn rank_says(&mut self, id: GangId, rank: Rank, body: EventBody) {
        let Some(machine) = self.engine.runs.get(&id).and_then(|run| Some(run.procs.get(&rank)?.machine))
        else {
            return;
        };
        let unix_ms = self.machines[&machine].now(self.queue.now()).unix_ms;
        self.tell_agent(id, rank, |local| GangInput::Rank(local, FromRank::Event(Told { unix_ms, body })));
    }

    /// To the agent whose child the rank is, if it still lives.
    fn tell_agent(&mut self, id: GangId, rank: Rank, input: impl FnOnce(Rank) -> GangInput) {
        let Some(process) = self.engine.runs.get(&id).and_then(|run| run.procs.get(&rank)) else { return };
        let (machine, life) = (process.machine, process.life);
        let input = Box::new(Input::Gang(id, input(process.local)));
        self.queue.after(MS, Event::ToAgentCore { machine, life, input });
    }
}

/// The ranks of a gang that its part here has.
fn ranks_of(gang: &Gang) -> std::ops::Range<Rank> {
    gang.first_rank..gang.first_rank + gang.ranks
}
