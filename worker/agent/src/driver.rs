//! The agent's driver: brings what happens to `Agent` in one queue and does what it says. It decides nothing itself.

mod told;

use crate::agent::{Action, Agent, Config, Input, Now, Past};
use crate::container::{Container, Leader, Remains};
use crate::gang::{Blow, GangId, GangInput};
use crate::http;
use crate::lend::Lender;
use crate::link::{self, LinkEvent};
use crate::memory;
use crate::output;
use crate::panics;
use crate::prepare::{self, Place, Unprepared};
use crate::processes;
use crate::rank_io::{self, Deliveries};
use crate::ranks::{Launcher, NewGang, Seat, Warm};
use crate::records::Records;
use crate::relay::Relay;
use crate::signals::Signals;
use crate::spawn::{Exited, Sweep};
use crate::stall::Sight;
use fleet_checkpoint::RunDir;
use fleet_collectives::{Abort, RankReport, Segment};
use fleet_common::ids::{NodeId, Rank};
use fleet_common::net::Identity;
use fleet_common::protocol::{FromAgent, Gang, Network, OutputWish, Peer, Superseded, ToRank};
use fleet_common::{exit, terminal};
use nix::sys::signal::Signal as Number;
use rand::SeedableRng;
use std::collections::{BTreeMap, VecDeque};
use std::future::pending;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tokio::signal::unix::Signal;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;

/// Messages of ranks that wait for the driver; more make the senders wait.
const MESSAGES_MAX: usize = 1024;
/// Chunks of output that wait, each of at most 16 KiB.
const LINES_MAX: usize = 64;
/// For the last packet to leave the socket.
const CLOSING: Duration = Duration::from_millis(50);

/// A node that is ready to take part.
pub(crate) struct Ready {
    pub config: Config,
    /// What earlier processes of this worker have written down.
    pub past: Past,
    pub launcher: Launcher,
    pub records: Records,
    /// The newest one of this node.
    pub identity: watch::Receiver<Identity>,
    /// Of checkpoints, to other nodes.
    pub lender: Option<Lender>,
    pub relay: Option<Relay>,
    pub http: Option<http::Server>,
    /// Why no rank can run here.
    pub unfit: Option<String>,
    pub node: link::Node,
    pub signals: Signals,
    pub child: Signal,
    pub exits: mpsc::UnboundedReceiver<Exited>,
}

impl Ready {
    /// Takes part until the agent is told to end; returns the exit code.
    pub async fn drive(self) -> anyhow::Result<u8> {
        let Ready { config, launcher, unfit, relay, http, signals, child, exits, .. } = self;
        let (events_sender, link_events) = mpsc::channel(MESSAGES_MAX);
        let cluster_id = self.node.identity.cluster_id.clone();
        let link = tokio::spawn(link::keep(self.node, events_sender, rand::rngs::StdRng::from_os_rng()));
        let trains = unfit.is_none() && relay.is_none();
        let warm = if trains { launcher.warm(config.slots).await } else { None };
        let (messages_sender, messages) = mpsc::channel(MESSAGES_MAX);
        let (lines_sender, lines) = mpsc::channel(LINES_MAX);
        let (asker, scrapes) = mpsc::channel(http::WAITING_MAX);
        let http_at = http.as_ref().map(|server| server.at);
        if let Some(server) = http {
            tokio::spawn(server.run(asker));
        }
        let driver = Driver {
            agent: Agent::new(config.clone(), self.past),
            name: config.name,
            cluster_id,
            http_at,
            begin: Instant::now(),
            launcher,
            records: self.records,
            identity: self.identity,
            lender: self.lender,
            gangs: BTreeMap::new(),
            attended: BTreeMap::new(),
            outbox: None,
            warm,
            inputs: unfit.map(|line| Input::Probed(Err(line))).into_iter().collect(),
            messages_sender,
            lines_sender,
            relay,
        };
        driver.run(Sources { signals, child, exits, link_events, messages, lines, scrapes, link }).await
    }
}

/// Everything that the driver waits for.
struct Sources {
    signals: Signals,
    child: Signal,
    exits: mpsc::UnboundedReceiver<Exited>,
    link_events: mpsc::Receiver<LinkEvent>,
    messages: mpsc::Receiver<(GangId, GangInput)>,
    lines: mpsc::Receiver<(GangId, GangInput)>,
    scrapes: mpsc::Receiver<oneshot::Sender<http::Told>>,
    link: JoinHandle<()>,
}

/// A gang's processes, what holds them, and its shared memory.
struct Running {
    container: Container,
    ranks: Vec<Option<Child>>,
    segment: Option<Segment>,
    /// Where all ranks of a gang on several nodes can be called, once that is known.
    peers: Vec<Peer>,
}

struct Child {
    pid: u32,
    shm_fd: Option<i32>,
    seat: Option<Seat>,
    to_rank: mpsc::UnboundedSender<ToRank>,
}

struct Driver {
    agent: Agent,
    name: String,
    cluster_id: String,
    /// Where its metrics are.
    http_at: Option<SocketAddr>,
    begin: Instant,
    launcher: Launcher,
    records: Records,
    /// The newest one of this node.
    identity: watch::Receiver<Identity>,
    /// Of checkpoints, to other nodes.
    lender: Option<Lender>,
    gangs: BTreeMap<GangId, Running>,
    /// Living ranks by process id, each with whom to tell of its end.
    attended: BTreeMap<u32, oneshot::Sender<Exited>>,
    outbox: Option<mpsc::UnboundedSender<FromAgent>>,
    warm: Option<Warm>,
    /// Inputs that the driver itself has to offer.
    inputs: VecDeque<Input>,
    messages_sender: mpsc::Sender<(GangId, GangInput)>,
    lines_sender: mpsc::Sender<(GangId, GangInput)>,
    relay: Option<Relay>,
}

impl Driver {
    async fn run(mut self, mut sources: Sources) -> anyhow::Result<u8> {
        let mut stopped_by = None;
        loop {
            let input = match self.inputs.pop_front() {
                Some(input) => Some(input),
                None => {
                    let accepts_lines = self.agent.accepts_lines(self.now());
                    tokio::select! {
                        biased;
                        signal = sources.signals.next() => self.on_signal(signal, &mut stopped_by),
                        _ = sources.child.recv() => {
                            self.launcher.spawner.reap();
                            None
                        }
                        Some(exited) = sources.exits.recv() => self.on_exit(exited),
                        Some(asks) = sources.scrapes.recv() => {
                            let _ = asks.send(self.told()); // whoever asked may be gone
                            None
                        }
                        event = sources.link_events.recv() => match event {
                            None => {
                                let why = sources.link.await.map_or_else(panics::said, |()| "it ended".to_owned());
                                eprintln!("error: the connection to the cluster cannot be kept, by a fault of fleet: {why}");
                                self.end_all();
                                return Ok(exit::JOB_FAILED);
                            }
                            Some(LinkEvent::Connected(outbox)) => {
                                self.outbox = Some(outbox);
                                Some(Input::Connected)
                            }
                            Some(LinkEvent::Message(message)) => Some(Input::Message(message)),
                            Some(LinkEvent::Disconnected) => {
                                self.outbox = None;
                                Some(Input::Disconnected)
                            }
                            Some(LinkEvent::Hopeless(error)) => {
                                eprintln!("error: {}", terminal::plain(&error.to_string()));
                                self.end_all();
                                return Ok(error.exit_code());
                            }
                        },
                        Some((gang, input)) = sources.messages.recv() => Some(Input::Gang(gang, input)),
                        Some((gang, input)) = sources.lines.recv(), if accepts_lines => Some(Input::Gang(gang, input)),
                        () = sleep_until(self.deadline()) => Some(Input::Tick),
                    }
                }
            };
            let Some(input) = input else { continue };
            self.end_ranks_that_waited_too_long();
            for action in self.agent.handle(self.now(), input) {
                if let Action::Exit { refused } = action {
                    self.end_all();
                    drop((self.outbox.take(), sources.link_events));
                    let _ = tokio::time::timeout(CLOSING, sources.link).await;
                    if let Some(message) = refused {
                        let message = terminal::plain(&message);
                        eprintln!("error: the coordinator refuses this node: {message}");
                        return Ok(exit::REFUSED_INPUT);
                    }
                    return Ok(stopped_by.unwrap_or(exit::SUCCEEDED));
                }
                self.perform(action).await;
            }
        }
    }

    fn on_signal(&self, signal: Number, stopped_by: &mut Option<u8>) -> Option<Input> {
        match (signal, &self.relay) {
            (Number::SIGHUP, Some(_)) => Some(Input::PassOn(Blow::HangUp)),
            (Number::SIGINT, Some(_)) => Some(Input::PassOn(Blow::Interrupt)),
            (Number::SIGUSR1, Some(_)) => Some(Input::PassOn(Blow::User1)),
            (Number::SIGUSR2, Some(_)) => Some(Input::PassOn(Blow::User2)),
            (Number::SIGPIPE | Number::SIGIO, Some(relay)) => {
                relay.close(signal == Number::SIGIO);
                None
            }
            // The ranks here are those of several people's jobs, who did not ask for it.
            (Number::SIGUSR1 | Number::SIGUSR2, None) => {
                tracing::info!(%signal, "a signal that a worker does not pass on");
                None
            }
            _ => {
                stopped_by.get_or_insert(128 + signal as u8);
                Some(Input::Stop)
            }
        }
    }

    fn now(&self) -> Now {
        let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Now { mono: self.begin.elapsed(), unix_ms: unix.as_millis() as u64 }
    }

    fn deadline(&self) -> Option<Instant> {
        let agent = self.agent.deadline().map(|deadline| self.begin + deadline);
        agent.into_iter().chain(self.warm.as_ref().map(|warm| warm.until)).min()
    }

    async fn perform(&mut self, action: Action) {
        match action {
            Action::Send(message) => {
                if let Some(outbox) = &self.outbox {
                    let _ = outbox.send(message); // lost with its connection; sent again on the next
                }
            }
            Action::Registered(node) => {
                self.records.settled();
                announce(node, self.http_at);
            }
            Action::Spawn(gang) => self.spawn(&gang).await,
            Action::Prepare { gang, job, resume, leads, alone } => {
                let sender = self.messages_sender.clone();
                let place = Place {
                    node: self.name.clone(),
                    identity: self.identity.borrow().clone(),
                    leads,
                    alone,
                    run: format!("{}/{}", self.cluster_id, gang.job),
                    resume,
                };
                let (node, progress_sender) = (self.name.clone(), sender.clone());
                let work = move || {
                    let progress = |level, line| {
                        let _ = progress_sender.blocking_send((gang, GangInput::Progress(level, line)));
                    };
                    prepare::prepare(&job, place, &progress)
                };
                tokio::spawn(async move {
                    let input = match prepare::in_a_thread(gang.job, node, work).await {
                        Ok(prepared) => GangInput::Prepared(Ok(prepared)),
                        Err(Unprepared::Failed(error)) => GangInput::Prepared(Err(error)),
                        Err(Unprepared::Lost { manifest_sha256, why }) => {
                            GangInput::CheckpointLost { manifest_sha256, why }
                        }
                    };
                    let _ = sender.send((gang, input)).await; // the agent ends
                });
            }
            Action::Meet { gang, peers } => {
                if let Some(running) = self.gangs.get_mut(&gang) {
                    running.peers = peers;
                }
            }
            Action::ToRank { gang, rank, mut message } => {
                if let Some(running) = self.gangs.get(&gang)
                    && let Some(Some(child)) = running.ranks.get(rank as usize)
                {
                    if let ToRank::Start(start) = &mut message {
                        start.shm_fd = child.shm_fd;
                        start.network = child.seat.as_ref().map(|seat| Network {
                            peers: running.peers.clone(),
                            key: seat.key.clone(),
                            listener_fd: seat.listener_fd,
                        });
                    }
                    let _ = child.to_rank.send(message); // a rank that is gone is reported by its exit
                }
            }
            Action::Strike { gang, rank, blow } => {
                if let Some(child) = self.child(gang, rank) {
                    self.launcher.spawner.strike(child.pid, blow);
                }
            }
            Action::AbortCollectives { gang, rank } => {
                if let Some(segment) = self.gangs.get(&gang).and_then(|running| running.segment.as_ref()) {
                    segment.abort(Abort::RankDied(rank as usize));
                }
            }
            Action::SampleMemory(gang) => self.sample_memory(gang),
            Action::Look(gang) => self.look(gang),
            Action::ReadOutput(wish) => self.read_output(wish),
            Action::Lend(loans) => {
                if let Some(lender) = &self.lender {
                    lender.lend(loans);
                }
            }
            Action::Remove(checkpoints) => self.remove(checkpoints),
            Action::Forget(gang) => {
                tracing::info!(%gang, "gang ended");
                self.records.forget(gang);
                self.gangs.remove(&gang);
            }
            Action::Sweep(gang) => self.sweep(gang),
            Action::Reconnect => self.outbox = None,
            Action::Exit { .. } => {} // the loop's own
        }
    }

    async fn spawn(&mut self, gang: &Gang) {
        let id = GangId { job: gang.job, generation: gang.generation };
        tracing::info!(gang = %id, ranks = gang.ranks, "starting ranks");
        let warm = match self.warm.take() {
            Some(warm) if warm.fits(gang) => Some(warm),
            other => {
                other.into_iter().for_each(|warm| warm.end(&self.launcher.spawner));
                None
            }
        };
        let container = match &warm {
            Some(warm) => Ok(warm.container().clone()),
            None => self.launcher.containers.create(),
        };
        let recorded = container.and_then(|container| {
            self.records.begin(id, &container)?;
            Ok(container)
        });
        let new = match (recorded, warm) {
            (Ok(_), Some(warm)) => warm.take(),
            (Ok(container), None) => self.launcher.gang(gang, container).await,
            (Err(error), warm) => {
                warm.into_iter().for_each(|warm| warm.end(&self.launcher.spawner));
                NewGang::failed(Container::default(), gang.ranks, &error.to_string())
            }
        };
        let living = new.ranks.iter().flatten().filter_map(|rank| Leader::of(rank.started.pid));
        self.records.started(id, &new.container, living.collect());
        if !new.endpoints.is_empty() {
            let listening = GangInput::Listening(new.endpoints.clone());
            self.inputs.push_back(Input::Gang(id, listening));
        }
        let dir = self.records.dir_of(id);
        let running = self.attend(id, new, &dir);
        self.gangs.insert(id, running);
    }

    /// Ends what is left of a gang whose ranks are gone, and says so when that is done.
    fn sweep(&mut self, id: GangId) {
        let Some(running) = self.gangs.get(&id) else { return };
        let (remains, adopted) = (Remains::from(&running.container), self.attended.is_empty());
        let swept = self.launcher.spawner.sweep(Sweep { remains, adopted });
        let sender = self.messages_sender.clone();
        tokio::spawn(async move {
            let left = swept.await.unwrap_or(0);
            let _ = sender.send((id, GangInput::Swept { left })).await; // the agent ends
        });
    }

    fn attend(&mut self, id: GangId, new: NewGang, dir: &Path) -> Running {
        let mut ranks = Vec::new();
        for (rank, new_rank) in new.ranks.into_iter().enumerate() {
            let rank = rank as Rank;
            let child = new_rank.and_then(|new_rank| {
                let (pid, shm_fd, seat) = (new_rank.started.pid, new_rank.shm_fd, new_rank.seat);
                let log = rank_log(dir, rank);
                let deliveries = Deliveries {
                    key: id,
                    messages: self.messages_sender.clone(),
                    lines: self.lines_sender.clone(),
                    relay: self.relay.clone(),
                };
                let io =
                    rank_io::attend(rank, new_rank.started, new_rank.socket, &log, deliveries, self.begin);
                let io = io.map_err(|error| error.to_string())?;
                self.attended.insert(pid, io.exited);
                Ok(Child { pid, shm_fd, seat, to_rank: io.to_rank })
            });
            if let Err(error) = &child {
                self.inputs.push_back(Input::Gang(id, GangInput::SpawnFailed { rank, error: error.clone() }));
            }
            ranks.push(child.ok());
        }
        Running { container: new.container, ranks, segment: new.segment, peers: Vec::new() }
    }

    /// Answers on the connection on which it was asked.
    fn read_output(&self, wish: OutputWish) {
        let Some(outbox) = self.outbox.clone() else { return };
        let OutputWish { ticket, job, generation, local_rank, from } = wish;
        let log = rank_log(&self.records.dir_of(GangId { job, generation }), local_rank);
        tokio::spawn(async move {
            let read = panics::blocking(move || output::read(&log, from)).await;
            let result = read.and_then(|piece| piece);
            let _ = outbox.send(FromAgent::Output { ticket, result }); // whoever asked has lost it with the connection
        });
    }

    /// Tells on the connection on which it was told. Without that it is told again, and finds them gone.
    fn remove(&self, checkpoints: Vec<Superseded>) {
        let Some(outbox) = self.outbox.clone() else { return };
        tokio::spawn(async move {
            let manifests = checkpoints.iter().map(|one| one.manifest_sha256.clone()).collect();
            let done = panics::blocking(move || checkpoints.iter().for_each(retire)).await;
            if let Err(panic) = done {
                tracing::warn!("old checkpoints stay: {panic}");
            }
            let _ = outbox.send(FromAgent::Removed { manifests }); // as above
        });
    }

    fn child(&self, gang: GangId, rank: Rank) -> Option<&Child> {
        self.gangs.get(&gang)?.ranks.get(rank as usize)?.as_ref()
    }

    fn on_exit(&mut self, exited: Exited) -> Option<Input> {
        if let Some(rank) = self.attended.remove(&exited.pid) {
            let _ = rank.send(exited); // its task reports it once all output is read
            return None;
        }
        let warm = self.warm.take_if(|warm| warm.contains(exited.pid))?;
        let reason = warm.died(exited, &self.launcher)?;
        tracing::warn!("{reason}");
        Some(Input::Probed(Err(reason)))
    }

    fn sample_memory(&mut self, id: GangId) {
        let Some(running) = self.gangs.get(&id) else { return };
        let sample = |child: &Option<Child>| {
            let living = child.as_ref().filter(|child| self.attended.contains_key(&child.pid));
            living.and_then(|child| memory::of_process(child.pid)).unwrap_or_default()
        };
        let samples: Vec<memory::Memory> = running.ranks.iter().map(sample).collect();
        let rss_mib = samples.iter().map(|memory| memory.peak_rss).collect();
        let pss_mib = samples.iter().map(|memory| memory.pss).collect();
        self.inputs.push_back(Input::Gang(id, GangInput::Memory { rss_mib, pss_mib }));
    }

    fn look(&mut self, id: GangId) {
        let Some(Running { ranks, segment: Some(segment), .. }) = self.gangs.get(&id) else { return };
        let sight = |(child, report): (&Option<Child>, RankReport)| {
            let child = child.as_ref().filter(|child| self.attended.contains_key(&child.pid))?;
            let seen = processes::look(child.pid)?;
            Some(Sight { report, pid: child.pid, stopped: seen.stopped, cpu: seen.cpu })
        };
        let sights: Option<Vec<Sight>> = ranks.iter().zip(segment.report()).map(sight).collect();
        if let Some(sights) = sights {
            self.inputs.push_back(Input::Gang(id, GangInput::Looked(sights)));
        }
    }

    fn end_ranks_that_waited_too_long(&mut self) {
        if let Some(warm) = self.warm.take_if(|warm| Instant::now() >= warm.until) {
            warm.end(&self.launcher.spawner);
        }
    }

    /// No child outlives the agent.
    fn end_all(&mut self) {
        self.launcher.spawner.end_all(self.launcher.containers.all());
    }
}

/// What cannot be removed is told and stays.
fn retire(checkpoint: &Superseded) {
    let Superseded { path, manifest_sha256 } = checkpoint;
    match RunDir::retire(Path::new(path), manifest_sha256) {
        Ok(true) => tracing::info!("removed {path}: newer checkpoints of its run have its place"),
        Ok(false) => {}
        Err(error) => tracing::warn!("an old checkpoint stays: {error}"),
    }
}

/// Where the output of a rank lies, which is counted from 0 on this node.
fn rank_log(gang_dir: &Path, local_rank: Rank) -> PathBuf {
    gang_dir.join(format!("rank-{local_rank}.log"))
}

async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
        None => pending().await,
    }
}

/// The first line on stdout, for whoever started the agent.
fn announce(node: NodeId, http: Option<SocketAddr>) {
    use std::io::Write;
    let mut line = serde_json::json!({ "node": node.to_string(), "pid": std::process::id() });
    if let Some(at) = http {
        line["http"] = at.to_string().into();
    }
    let mut stdout = std::io::stdout();
    let _ = writeln!(stdout, "{line}").and_then(|()| stdout.flush()); // a closed stdout does not matter to the cluster
    tracing::info!(%node, "registered");
}
