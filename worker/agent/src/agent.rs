//! The agent's decisions, pure: what happened and the time go in, what to do comes out. It opens nothing, waits for nothing, and
//! draws no random numbers; `driver` does what it says. The simulator runs this same code.

use crate::budget::Rates;
use crate::figures::Counts;
use crate::gang::{Blow, Fate, GangId, GangInput, Stop, Supervised};
use crate::verdict;
use fleet_common::capability::Wanted;
use fleet_common::events::{FailureKind, Times};
use fleet_common::exit::Fault;
use fleet_common::ids::{NodeId, Rank};
use fleet_common::job::{Device, Devices, Job};
use fleet_common::metrics::Page;
use fleet_common::metrics::worker::*;
use fleet_common::protocol::{
    AgentHello, FromAgent, Gang, Loan, OutputWish, PROTOCOL_VERSION, Peer, ResumePoint, Superseded, ToAgent,
    ToRank,
};
use fleet_common::signals::AGAIN_AFTER;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// Between two heartbeats; the coordinator calls a node lost after ten of them.
pub const HEARTBEAT: Duration = Duration::from_secs(1);
/// An agent that ends waits this long for its last events to be committed.
pub const FAREWELL: Duration = Duration::from_secs(1);
/// A coordinator that has committed nothing for this long does not hold up the ranks' output any more.
pub const PATIENCE: Duration = Duration::from_secs(2);

/// Both clocks of the node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Now {
    /// Since the agent started. Deadlines are measured on it.
    pub mono: Duration,
    /// Milliseconds since 1970, for people.
    pub unix_ms: u64,
}

/// What this node is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    pub name: String,
    pub slots: u32,
    pub accelerator: Accelerator,
    /// Why a CUDA device that may be there cannot be used.
    pub no_cuda: Option<String>,
    /// Cores that the ranks share.
    pub cores: u32,
    pub program_version: String,
    /// What jobs may ask for.
    pub labels: BTreeMap<String, String>,
    /// Where other nodes reach this one.
    pub host: String,
    /// Where agents of other nodes fetch checkpoints; 0: nowhere.
    pub checkpoint_port: u16,
    /// Drawn when the process began.
    pub process: u64,
    /// How much of a gang's output goes to the coordinators.
    pub lines: Rates,
}

/// What the records on the node's disk say of the worker's processes before this one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Past {
    /// Those whose records are there, oldest first.
    pub processes: Vec<u64>,
    /// Gangs that they had started and whose end the cluster may not know.
    pub gangs: BTreeSet<GangId>,
}

/// What ranks compute on where the job does not say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accelerator {
    Cpu,
    Cuda { devices: u32 },
    Mps,
}

impl Config {
    /// Threads that compute in each of `ranks` ranks.
    pub fn threads(&self, job: &Job, ranks: u32) -> u32 {
        job.threads_per_rank.unwrap_or(self.cores / ranks.max(1)).max(1)
    }

    /// Where a rank of a job with `here` ranks on this node and `world` together computes, or why nowhere, in one line. CUDA devices in `taken` belong to other jobs: a job that
    /// does not name its devices gets others as long as there are any.
    pub fn place(
        &self,
        job: &Job,
        local_rank: Rank,
        (here, world): (u32, u32),
        taken: &BTreeSet<u32>,
    ) -> Result<Place, String> {
        let index_of = |local_rank: Rank| match (&job.devices, self.accelerator) {
            (Devices::Ids(ids), _) => ids.get(local_rank as usize).copied().unwrap_or(local_rank),
            (Devices::Auto | Devices::Count(_), Accelerator::Cuda { devices }) => {
                let mut free = (0..devices).filter(|device| !taken.contains(device));
                free.nth(local_rank as usize).unwrap_or(local_rank)
            }
            (Devices::Auto | Devices::Count(_), _) => local_rank,
        };
        let index = index_of(local_rank);
        let name = &self.name;
        let refusal = |device| Wanted::of(job, device, world).executor().err();
        let on = |device: &str| Place { device: device.to_owned(), note: None };
        let on_cuda = || on(&format!("cuda:{index}"));
        let on_cpu = |why: String| Place {
            device: "cpu".to_owned(),
            note: Some(format!("{why}: training on the CPU")),
        };
        match (job.device, self.accelerator) {
            (Device::Cpu, _) => Ok(on("cpu")),
            (Device::Auto, Accelerator::Cpu) => match &self.no_cuda {
                Some(why) => Ok(on_cpu(why.clone())),
                None => Ok(on("cpu")),
            },
            (Device::Auto, Accelerator::Cuda { devices }) => match refusal(Device::Cuda) {
                Some(refusal) => Ok(on_cpu(refusal.to_string())),
                None => match (0..here).map(index_of).find(|index| *index >= devices) {
                    None => Ok(on_cuda()),
                    Some(missing) => Ok(on_cpu(format!(
                        "{name} has {devices} CUDA devices, the job asks for number {missing}"
                    ))),
                },
            },
            (Device::Auto, Accelerator::Mps) => match refusal(Device::Mps) {
                Some(refusal) => Ok(on_cpu(refusal.to_string())),
                None => Ok(on("mps")),
            },
            (Device::Cuda, Accelerator::Cuda { devices }) if index < devices => match refusal(Device::Cuda) {
                Some(refusal) => Err(refusal.to_string()),
                None => Ok(on_cuda()),
            },
            (Device::Cuda, Accelerator::Cuda { devices }) => Err(format!(
                "{name} has {devices} CUDA devices, the job asks for number {index}; start fewer ranks"
            )),
            (Device::Mps, Accelerator::Mps) => match refusal(Device::Mps) {
                Some(refusal) => Err(refusal.to_string()),
                None => Ok(on("mps")),
            },
            (Device::Cuda, _) => {
                let why = self.no_cuda.as_ref().map(|why| format!(" that works: {why}")).unwrap_or_default();
                Err(format!("{name} has no CUDA device{why}; set device = \"cpu\" or use another node"))
            }
            (Device::Mps, _) => {
                Err(format!("{name} has no Metal device; set device = \"cpu\" or use another node"))
            }
        }
    }
}

/// Where a rank computes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// `cpu`, `cuda:0`, `mps`.
    pub device: String,
    /// Why not where it would be faster.
    pub note: Option<String>,
}

impl Place {
    /// The number of its CUDA device.
    fn cuda(&self) -> Option<u32> {
        self.device.strip_prefix("cuda:")?.parse().ok()
    }
}

/// What a new gang finds on its node.
#[derive(Clone, Debug, Default)]
pub struct Room {
    /// Why no rank can train here, if so.
    pub unfit: Option<String>,
    /// CUDA devices of other gangs.
    pub taken: BTreeSet<u32>,
}

#[derive(Clone, Debug)]
pub enum Input {
    /// A connection to the coordinator is open; nothing was sent on it yet.
    Connected,
    Disconnected,
    Message(ToAgent),
    Gang(GangId, GangInput),
    /// What `fleet-rank --probe` said: nothing, or why ranks cannot run here.
    Probed(Result<(), String>),
    /// The agent shall end: the first time with checkpoints, at once when that is asked again `AGAIN_AFTER` later.
    Stop,
    /// Programs that run get this signal.
    PassOn(Blow),
    /// `Agent::deadline` has passed.
    Tick,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// On the present connection.
    Send(FromAgent),
    /// The first welcome. What earlier processes started is the cluster's knowledge now: they need not be named any more.
    Registered(NodeId),
    /// Record on disk that the gang is being started here, then start all its ranks, for training with a shared segment. Without the
    /// record nothing may be started. Ranks that train on several nodes listen from the beginning: `GangInput::Listening`.
    Spawn(Box<Gang>),
    /// Build or find the token cache, and find and verify the checkpoint to resume from: fetch `resume` where it is not here.
    Prepare {
        gang: GangId,
        job: Box<Job>,
        resume: Option<ResumePoint>,
        /// This node has rank 0, which writes what the run leaves.
        leads: bool,
        /// All of its ranks are here.
        alone: bool,
    },
    /// Where all ranks of a gang on several nodes can be called; before they start.
    Meet {
        gang: GangId,
        peers: Vec<Peer>,
    },
    /// The driver fills in `RankStart::shm_fd` and `network`, which only it knows.
    ToRank {
        gang: GangId,
        rank: Rank,
        message: ToRank,
    },
    Strike {
        gang: GangId,
        rank: Rank,
        blow: Blow,
    },
    /// The rank is gone: those that wait for it in a collective shall not.
    AbortCollectives {
        gang: GangId,
        rank: Rank,
    },
    SampleMemory(GangId),
    /// See where the ranks are: `GangInput::Looked`, if all of them live.
    Look(GangId),
    /// Read a piece of a rank's output from its file and send it.
    ReadOutput(OutputWish),
    /// Other nodes may read these checkpoints here from now on, and no others.
    Lend(Vec<Loan>),
    /// Remove these checkpoints where nobody writes beside them, and tell the cluster: `FromAgent::Removed`.
    Remove(Vec<Superseded>),
    /// All ranks are gone: end whatever else there is of the gang. `GangInput::Swept` says when.
    Sweep(GangId),
    /// The cluster has recorded how the gang ended here: its record goes.
    Forget(GangId),
    /// Close the present connection; the next greeting tells more than the last one.
    Reconnect,
    /// The process ends; with a message if the coordinator does not want it.
    Exit {
        refused: Option<String>,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Link {
    Down,
    /// Hello was sent.
    Greeting,
    Up,
}

#[derive(Debug)]
pub struct Agent {
    config: Config,
    gangs: BTreeMap<GangId, Supervised>,
    /// Gangs that were started here and of which nothing more will be heard, until the cluster knows that.
    lost: BTreeSet<GangId>,
    /// What of it the last greeting told.
    told: BTreeSet<GangId>,
    earlier: Vec<u64>,
    link: Link,
    registered: bool,
    heartbeat_at: Duration,
    /// When the coordinator last committed something, or connected.
    heard_at: Duration,
    /// Why ranks cannot run here.
    unfit: Option<String>,
    /// Other nodes may read checkpoints here.
    lends: bool,
    /// Greetings that a coordinator has answered.
    welcomes: u64,
    /// Of gangs that are forgotten.
    counts: Counts,
    /// When it was first told to end.
    stopping: Option<Duration>,
    /// Set when an ending agent has no living gang any more.
    leave_at: Option<Duration>,
}

impl Agent {
    /// With what the records of earlier processes say. Nothing that they started lives any more.
    pub fn new(config: Config, past: Past) -> Agent {
        Agent {
            config,
            gangs: BTreeMap::new(),
            lost: past.gangs,
            told: BTreeSet::new(),
            earlier: past.processes,
            link: Link::Down,
            registered: false,
            heartbeat_at: Duration::ZERO,
            heard_at: Duration::ZERO,
            unfit: None,
            lends: false,
            welcomes: 0,
            counts: Counts::default(),
            stopping: None,
            leave_at: None,
        }
    }

    pub fn handle(&mut self, now: Now, input: Input) -> Vec<Action> {
        let mut out = Vec::new();
        match input {
            Input::Connected => {
                self.link = Link::Greeting;
                self.heard_at = now.mono;
                self.gangs.values_mut().for_each(|gang| gang.stream().reconnected());
                self.told = self.lost.clone();
                out.push(Action::Send(FromAgent::Hello(self.hello())));
            }
            Input::Disconnected => self.link = Link::Down,
            Input::Message(message) => self.on_message(message, now, &mut out),
            Input::Gang(id, input) => {
                if let Some(gang) = self.gangs.get_mut(&id) {
                    gang.handle(input, &self.config, now, &mut out);
                }
            }
            Input::Probed(Ok(())) => self.unfit = None,
            Input::Probed(Err(reason)) => {
                for gang in self.gangs.values_mut().filter(|gang| gang.needs_libtorch()) {
                    gang.fail(
                        verdict::agent_error(
                            FailureKind::Refused,
                            Fault::Environment,
                            &self.config.name,
                            reason.clone(),
                        ),
                        now,
                    );
                }
                self.unfit = Some(reason);
            }
            Input::Stop => {
                let since = *self.stopping.get_or_insert(now.mono);
                let how = if now.mono.saturating_sub(since) >= AGAIN_AFTER { Stop::Now } else { Stop::Soon };
                self.gangs.values_mut().for_each(|gang| gang.stop(how, &self.config, now, &mut out));
            }
            Input::PassOn(blow) => {
                self.gangs.values_mut().for_each(|gang| gang.pass_on(blow, now, &mut out));
            }
            Input::Tick => {}
        }
        self.gangs.values_mut().for_each(|gang| gang.tick(&self.config, now, &mut out));
        self.forget_what_is_done(&mut out);
        self.send_what_is_due(now, &mut out);
        self.leave_if_done(now, &mut out);
        out
    }

    pub fn is_connected(&self) -> bool {
        self.link == Link::Up
    }

    /// Gangs that are not over, of each job the newest.
    pub fn present(&self) -> impl Iterator<Item = (GangId, &Supervised)> {
        let mut seen = None;
        let mut newest = move |id: &GangId| seen.replace(id.job) != Some(id.job);
        let gangs = self.gangs.iter().rev().filter(move |(id, _)| newest(id));
        gangs.filter(|(_, gang)| !gang.is_finished()).map(|(id, gang)| (*id, gang))
    }

    /// What it knows, in numbers.
    pub fn measure(&self, page: &mut Page) {
        page.put_flag(&WORKER_CONNECTED, &[], self.is_connected());
        page.put(&WORKER_RECONNECTS, &[], self.welcomes.saturating_sub(1) as f64);
        page.put(&WORKER_SLOTS, &[], f64::from(self.config.slots));
        let ranks: usize =
            self.gangs.values().filter(|gang| !gang.is_finished()).map(Supervised::ranks).sum();
        page.put(&WORKER_RANKS, &[], ranks as f64);
        let mut counts = self.counts;
        self.gangs.values().for_each(|gang| counts += gang.figures().counts);
        page.put(&WORKER_OUTPUT_LINES, &[], counts.lines as f64);
        page.put(&WORKER_OUTPUT_LINES_LEFT_OUT, &[], counts.lines_left_out as f64);
        page.put(&CHECKPOINT_BYTES, &[], counts.checkpoint_bytes as f64);
        page.put(&CHECKPOINT_SECONDS, &[], counts.checkpoint_seconds);
        for (id, gang) in self.present() {
            let (job, figures) = (id.job.to_string(), gang.figures());
            page.put_some(&JOB_LOSS, &[&job], figures.step.map(|step| step.loss));
            page.put_some(&JOB_TOKENS_PER_SECOND, &[&job], figures.step.map(|step| step.tokens_per_s));
            for (part, seconds) in figures.times.iter().flat_map(Times::parts) {
                page.put(&JOB_STEP_SECONDS, &[&job, part], seconds);
            }
        }
    }

    /// When `Input::Tick` is wanted next.
    pub fn deadline(&self) -> Option<Duration> {
        let heartbeat = (self.link == Link::Up).then_some(self.heartbeat_at);
        let gangs = self.gangs.values().filter_map(Supervised::deadline);
        gangs.chain(heartbeat).chain(self.leave_at).min()
    }

    /// Whether the ranks' output shall be read on. If not, the coordinator is only a little behind, and ranks that print too
    /// much wait for it as they would for a slow terminal; otherwise lines are read, and dropped if there are too many.
    pub fn accepts_lines(&self, now: Now) -> bool {
        let crowded = self.gangs.values().any(Supervised::is_crowded);
        !crowded || self.link != Link::Up || now.mono.saturating_sub(self.heard_at) > PATIENCE
    }

    fn hello(&self) -> AgentHello {
        let device = match self.config.accelerator {
            Accelerator::Cpu => "cpu",
            Accelerator::Cuda { .. } => "cuda",
            Accelerator::Mps => "mps",
        };
        AgentHello {
            version: PROTOCOL_VERSION,
            name: self.config.name.clone(),
            slots: self.config.slots,
            device: device.to_owned(),
            program_version: self.config.program_version.clone(),
            labels: self.config.labels.clone(),
            host: self.config.host.clone(),
            checkpoint_port: self.config.checkpoint_port,
            process: self.config.process,
            gangs: self.gangs.keys().map(|id| (id.job, id.generation)).collect(),
            lost: self.lost.iter().map(|id| (id.job, id.generation)).collect(),
            earlier: self.earlier.clone(),
        }
    }

    fn on_message(&mut self, message: ToAgent, now: Now, out: &mut Vec<Action>) {
        match message {
            ToAgent::Welcome { node } => {
                self.link = Link::Up;
                self.welcomes += 1;
                self.heartbeat_at = now.mono;
                for known in std::mem::take(&mut self.told) {
                    self.lost.remove(&known);
                    out.push(Action::Forget(known));
                }
                self.earlier.clear();
                if std::mem::take(&mut self.lends) {
                    out.push(Action::Lend(Vec::new())); // the cluster tells again what is lent
                }
                if !self.registered {
                    self.registered = true;
                    out.push(Action::Registered(node));
                }
            }
            ToAgent::StartGang(gang) => self.on_start(gang, now, out),
            ToAgent::StopGang { job, generation, now: at_once } => {
                if let Some(gang) = self.gangs.get_mut(&GangId { job, generation }) {
                    let how = if at_once { Stop::Now } else { Stop::WhenSaved };
                    gang.stop(how, &self.config, now, out);
                }
            }
            ToAgent::MeetPeers { job, generation, peers } => {
                if let Some(gang) = self.gangs.get_mut(&GangId { job, generation }) {
                    gang.meet(peers, &self.config, now, out);
                }
            }
            ToAgent::EventsCommitted { job, generation, seq } => {
                self.heard_at = now.mono;
                let id = GangId { job, generation };
                if let Some(gang) = self.gangs.get_mut(&id) {
                    let committed = gang.stream().committed(seq);
                    gang.on_committed(&committed, out);
                }
            }
            ToAgent::ResendEvents { job, generation, next_seq } => {
                self.heard_at = now.mono;
                let id = GangId { job, generation };
                if let Some(gang) = self.gangs.get_mut(&id) {
                    gang.resend_from(next_seq, &self.config, now, out);
                }
            }
            ToAgent::Lend(loans) => {
                self.lends = !loans.is_empty();
                out.push(Action::Lend(loans));
            }
            ToAgent::Superseded(checkpoints) if checkpoints.is_empty() => {}
            ToAgent::Superseded(checkpoints) => out.push(Action::Remove(checkpoints)),
            ToAgent::ReadOutput(wish) => out.push(Action::ReadOutput(wish)),
            ToAgent::Refused { message, fatal: true } => out.push(Action::Exit { refused: Some(message) }),
            // The connection ends by itself; the next one may go better.
            ToAgent::Refused { fatal: false, .. } => {}
            // The link's own.
            ToAgent::Heard { .. }
            | ToAgent::Coordinators(_)
            | ToAgent::Certificate { .. }
            | ToAgent::Authorities { .. } => {}
        }
    }

    fn on_start(&mut self, gang: Gang, now: Now, out: &mut Vec<Action>) {
        let id = GangId { job: gang.job, generation: gang.generation };
        if self.lost.contains(&id) {
            return; // it was started once
        }
        if self.gangs.range(id..).next().is_some_and(|(known, _)| known.job == id.job) {
            return; // this generation or a newer one is here already
        }
        for (_, older) in self.gangs.range_mut(GangId { generation: 0, ..id }..id) {
            older.stop(Stop::Now, &self.config, now, out);
        }
        let places = self.gangs.values().flat_map(Supervised::places);
        let room = Room { unfit: self.unfit.clone(), taken: places.filter_map(Place::cuda).collect() };
        let mut supervised = Supervised::start(gang, &room, &self.config, now, out);
        if self.stopping.is_some() {
            let message = format!("{} is being shut down", self.config.name);
            let name = &self.config.name;
            let error = verdict::agent_error(FailureKind::Refused, Fault::Environment, name, message);
            supervised.fail(error, now);
        }
        self.gangs.insert(id, supervised);
    }

    fn forget_what_is_done(&mut self, out: &mut Vec<Action>) {
        let (lost, counts) = (&mut self.lost, &mut self.counts);
        self.gangs.retain(|&id, gang| {
            match gang.fate() {
                None => return true,
                Some(Fate::Recorded) => out.push(Action::Forget(id)),
                Some(Fate::Unrecordable) => {
                    lost.insert(id);
                    out.push(Action::Reconnect);
                }
            }
            *counts += gang.figures().counts;
            false
        });
    }

    fn send_what_is_due(&mut self, now: Now, out: &mut Vec<Action>) {
        if self.link != Link::Up {
            return;
        }
        for gang in self.gangs.values_mut() {
            while let Some(batch) = gang.stream().next_batch() {
                out.push(Action::Send(FromAgent::Events(batch)));
            }
        }
        if now.mono >= self.heartbeat_at {
            self.heartbeat_at = now.mono + HEARTBEAT;
            out.push(Action::Send(FromAgent::Heartbeat { unix_ms: now.unix_ms }));
        }
    }

    fn leave_if_done(&mut self, now: Now, out: &mut Vec<Action>) {
        if self.stopping.is_none() || !self.gangs.values().all(Supervised::is_finished) {
            return;
        }
        let leave_at = *self.leave_at.get_or_insert(now.mono + FAREWELL);
        if self.gangs.is_empty() || self.link != Link::Up || now.mono >= leave_at {
            out.push(Action::Exit { refused: None });
        }
    }
}

#[cfg(test)]
mod tests;
