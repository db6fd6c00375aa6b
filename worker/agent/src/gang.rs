//! One gang of ranks from `StartGang` to its committed `Finished` event. Pure: inputs and the time in, actions out.
//!
//! ```text
//! preparing --cache ready, and peers known--> running --all ranks gone--> sweeping --nothing of it is left--> finished --all events committed--> (forgotten)
//!     |  ranks load libtorch meanwhile   |
//!     +------- a failure or a stop ------+--> ending: the rest are killed after a grace (those of a program get SIGTERM before), then swept
//! ```

mod end;
mod meeting;
mod refusal;

use crate::agent::{Action, Config, Now, Place, Room};
use crate::figures::Figures;
use crate::last_lines::LastLines;
use crate::stall::{LOOK_PERIOD, Sight, Standing, Standings, Told, Watch};
use crate::straggler::Straggler;
use crate::stream::EventStream;
use crate::verdict::{self, Cause, Exit, Suspicion};
use fleet_common::events::{
    DataStats, Endpoint, Event, EventBody, FailureKind, JobError, Level, Outcome, Stall,
};
use fleet_common::exit::Fault;
use fleet_common::ids::{Generation, JobId, Rank};
use fleet_common::job::{Job, Resume};
use fleet_common::lines::{self, LINE_MAX};
use fleet_common::protocol::{FromRank, Gang, ToRank, Work};
use meeting::Hosts;
use refusal::refuse;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

/// After the first failure the others may still say what they know, so that the true culprit is found.
pub const BLAME_GRACE: Duration = Duration::from_millis(500);
/// For the other ranks of a program, between the SIGTERM that the first failure brings them and the kill: what torchrun gives.
pub const PEER_GRACE: Duration = Duration::from_secs(30);
/// Between a polite request to stop with a deadline (the agent ends, a program is stopped) and the kill.
pub const STOP_GRACE: Duration = Duration::from_secs(10);
/// For ranks that are done, to leave on their own.
pub const EXIT_GRACE: Duration = Duration::from_secs(5);
/// Between two looks at the ranks' memory.
pub const MEMORY_PERIOD: Duration = Duration::from_secs(5);
/// Ranks of one gang on one node; so many can share memory.
pub const RANKS_MAX: u32 = 64;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GangId {
    pub job: JobId,
    pub generation: Generation,
}

impl GangId {
    /// What `Display` writes.
    pub fn parse(text: &str) -> Option<GangId> {
        let (job, generation) = text.rsplit_once('.')?;
        let id = GangId { job: job.parse().ok()?, generation: generation.parse().ok()? };
        (id.to_string() == text).then_some(id)
    }
}

impl fmt::Display for GangId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.job, self.generation)
    }
}

/// What happens to a gang.
#[derive(Clone, Debug)]
pub enum GangInput {
    Rank(Rank, FromRank),
    /// What a rank printed.
    Lines {
        rank: Rank,
        level: Level,
        lines: Vec<String>,
    },
    /// The process is gone and everything it wrote has been read.
    Exited {
        rank: Rank,
        at: Duration,
        exit: Exit,
    },
    /// There is no process and there will be none.
    SpawnFailed {
        rank: Rank,
        error: String,
    },
    /// Where its ranks can be called by those of other nodes, in rank order.
    Listening(Vec<Endpoint>),
    /// The token cache and the checkpoint to resume from.
    Prepared(Result<Prepared, JobError>),
    /// What it was to go on from cannot be had: why, in one line. The cluster says what becomes of it.
    CheckpointLost {
        manifest_sha256: String,
        why: String,
    },
    /// Nothing that the ranks started lives any more, but for so many that are to die and could not yet.
    Swept {
        left: usize,
    },
    /// A line about the preparation.
    Progress(Level, String),
    /// In MiB and rank order; zeros for ranks that are gone.
    Memory {
        rss_mib: Vec<u64>,
        pss_mib: Vec<u64>,
    },
    /// Where the ranks are, in their order.
    Looked(Vec<Sight>),
}

#[derive(Clone, Debug, PartialEq)]
pub struct Prepared {
    pub cache_dir: PathBuf,
    pub stats: DataStats,
    pub resume: Option<PathBuf>,
    /// For `RankStart::run`.
    pub run: String,
}

/// A signal to the rank's process group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blow {
    /// SIGHUP.
    HangUp,
    /// SIGINT.
    Interrupt,
    /// SIGUSR1.
    User1,
    /// SIGUSR2.
    User2,
    /// SIGTERM.
    Terminate,
    /// SIGKILL.
    Kill,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// With a checkpoint, however long that takes.
    WhenSaved,
    /// With a checkpoint within `STOP_GRACE`.
    Soon,
    Now,
}

#[derive(Debug, Default)]
struct RankState {
    exit: Option<Exit>,
    done: Option<Outcome>,
    struck: bool,
    last_lines: LastLines,
}

#[derive(Debug)]
enum Kind {
    Train(Box<Job>),
    Program,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Preparing,
    Running,
    /// All ranks are gone; what they left behind is being ended.
    Sweeping,
    Finished,
}

/// What becomes of a gang that is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// The cluster has recorded all its events.
    Recorded,
    /// The cluster cannot record its events: it must be told otherwise that the gang is over.
    Unrecordable,
}

/// A gang that the agent knows. Invariant: after `Phase::Finished` the stream ends with the only `Finished` event.
#[derive(Debug)]
pub struct Supervised {
    id: GangId,
    kind: Kind,
    /// Ranks are counted from here within the job, and from 0 on this node: everywhere but in what leaves the agent.
    first_rank: Rank,
    world_size: u32,
    hosts: Hosts,
    phase: Phase,
    ranks: Vec<RankState>,
    /// Of each rank that trains.
    places: Vec<Place>,
    /// Kept until the ranks start.
    prepared: Option<Prepared>,
    /// The ranks of other nodes are known, or there are none.
    met: bool,
    stream: EventStream,
    stop: Option<Stop>,
    suspicions: Vec<Suspicion>,
    /// The agent's own reason for the failure.
    own_error: Option<JobError>,
    /// The coordinator's idea of the stream is another one.
    unrecordable: bool,
    /// When a program that was sent another signal gets SIGTERM.
    terminate_at: Option<Duration>,
    kill_at: Option<Duration>,
    /// When the gang's time is over, and how many seconds it had.
    expires_at: Option<(Duration, u64)>,
    /// It has had its time and is being ended for it.
    expired: Option<u64>,
    sample_at: Duration,
    look_at: Duration,
    watch: Watch,
    straggler: Straggler,
    standings: Standings,
    last_step: u64,
    peak_rss_mib: Vec<u64>,
    peak_pss_mib: Vec<u64>,
    /// Their sums when they were told last.
    told_memory_mib: [u64; 2],
}

impl Supervised {
    /// Where its ranks compute, as long as they may.
    pub fn places(&self) -> &[Place] {
        if self.phase == Phase::Finished { &[] } else { &self.places }
    }

    /// Takes the gang on: its ranks are spawned at once, so that they load libtorch while the data is prepared.
    pub fn start(gang: Gang, room: &Room, config: &Config, now: Now, out: &mut Vec<Action>) -> Supervised {
        let id = GangId { job: gang.job, generation: gang.generation };
        let kind = match &gang.work {
            Work::Program(_) => Ok(Kind::Program),
            Work::Train { job_json } => {
                // A job that asks for its newest checkpoint looks on its own node first, where it has only one.
                let looks = gang.generation == 1 && gang.nodes <= 1;
                let resumed = |mut job: Job| {
                    if let Some(point) = &gang.resume
                        && !(looks && job.checkpoint.resume == Resume::Latest)
                    {
                        job.checkpoint.resume = Resume::Path(point.path.clone().into());
                    }
                    Kind::Train(Box::new(job))
                };
                Job::from_json(job_json).map(resumed).map_err(|e| {
                    let message =
                        format!("the job cannot be read: {e}; is the coordinator of another version?");
                    verdict::agent_error(FailureKind::Refused, Fault::Input, &config.name, message)
                })
            }
        };
        let (kind, refusal) = match kind {
            Ok(kind) => (kind, None),
            Err(error) => (Kind::Program, Some(error)),
        };
        let places = match (&refusal, &kind) {
            (None, Kind::Train(job)) => (0..gang.ranks)
                .map(|rank| config.place(job, rank, (gang.ranks, gang.world_size), &room.taken))
                .collect(),
            _ => Ok(Vec::new()),
        };
        let refusal = refusal.or_else(|| refuse(&gang, &kind, room.unfit.as_deref(), &places, config));
        let (preparing, count) = match (&kind, &refusal) {
            (_, Some(_)) => (false, 0),
            (Kind::Train(_), None) => (true, gang.ranks),
            (Kind::Program, None) => (false, gang.ranks),
        };
        let mut supervised = Supervised {
            id,
            kind,
            first_rank: gang.first_rank,
            world_size: gang.world_size,
            hosts: Hosts { index: gang.node_index, count: gang.nodes },
            phase: if preparing { Phase::Preparing } else { Phase::Running },
            ranks: (0..count).map(|_| RankState::default()).collect(),
            places: places.unwrap_or_default(),
            prepared: None,
            met: gang.nodes <= 1,
            stream: EventStream::new(id.job, id.generation, config.lines),
            stop: None,
            suspicions: Vec::new(),
            own_error: refusal,
            unrecordable: false,
            terminate_at: None,
            kill_at: None,
            expires_at: gang.max_time_ms.map(|ms| (now.mono + Duration::from_millis(ms), ms / 1_000)),
            expired: None,
            sample_at: now.mono + MEMORY_PERIOD,
            look_at: now.mono + LOOK_PERIOD,
            watch: Watch::new(gang.first_rank, gang.world_size),
            straggler: Straggler::new(gang.first_rank, &config.name),
            standings: Standings::default(),
            last_step: 0,
            peak_rss_mib: vec![0; count as usize],
            peak_pss_mib: vec![0; count as usize],
            told_memory_mib: [0; 2],
        };
        if supervised.own_error.is_some() {
            supervised.finish(config, now);
            return supervised;
        }
        if let Kind::Train(job) = &supervised.kind {
            let (leads, alone) = (supervised.first_rank == 0, gang.nodes == 1);
            let (job, resume) = (job.clone(), gang.resume.clone());
            out.push(Action::Prepare { gang: id, job, resume, leads, alone });
        }
        out.push(Action::Spawn(Box::new(gang)));
        supervised
    }

    pub fn handle(&mut self, input: GangInput, config: &Config, now: Now, out: &mut Vec<Action>) {
        if let GangInput::Swept { left } = input {
            if self.phase == Phase::Sweeping {
                self.swept(left, config, now);
            }
            return;
        }
        if self.is_ending() {
            return;
        }
        match input {
            GangInput::Rank(rank, message) => self.on_message(rank, message, now, out),
            GangInput::Lines { rank, level, lines } => {
                lines.iter().for_each(|line| self.on_line(Some(rank), level, line, now));
            }
            GangInput::Progress(level, line) => self.on_line(None, level, &line, now),
            GangInput::Exited { rank, at, exit } => self.on_exit(rank, at, exit, now, out),
            GangInput::SpawnFailed { rank, error } => {
                let message = format!("rank {} could not be started: {error}", self.global(rank));
                let (kind, fault) = (FailureKind::NotStarted, Fault::Environment);
                let error = verdict::agent_error(kind, fault, &config.name, message);
                if let Some(state) = self.ranks.get_mut(rank as usize) {
                    state.exit = Some(Exit::Code(127));
                }
                self.suspect(rank, now.mono, Cause::Said(error), now, out);
            }
            GangInput::Listening(endpoints) => self.push(now, EventBody::Listening(endpoints)),
            GangInput::Prepared(Ok(prepared)) => self.on_prepared(prepared, config, now, out),
            GangInput::Prepared(Err(error)) => self.fail(error, now),
            GangInput::CheckpointLost { manifest_sha256, why } => {
                self.push(now, EventBody::CheckpointLost { manifest_sha256, why });
            }
            GangInput::Memory { rss_mib, pss_mib } => self.on_memory(&rss_mib, &pss_mib, now),
            GangInput::Looked(sights) => self.on_look(&sights, now),
            GangInput::Swept { .. } => {}
        }
        self.tick(config, now, out);
    }

    /// Asks the gang to end. A stronger request replaces a weaker one.
    pub fn stop(&mut self, how: Stop, config: &Config, now: Now, out: &mut Vec<Action>) {
        let known = self.stop;
        if self.is_ending() || known == Some(Stop::Now) || known == Some(how) {
            return;
        }
        self.stop = Some(how);
        let before_training = self.phase == Phase::Preparing;
        if how == Stop::Now || before_training {
            self.kill_within(Duration::ZERO, now);
        } else {
            match self.kind {
                Kind::Program => {
                    self.kill_within(STOP_GRACE, now);
                    if known.is_none() {
                        self.strike_living(Blow::Terminate, out);
                    }
                }
                Kind::Train(_) => {
                    if how == Stop::Soon {
                        self.kill_within(STOP_GRACE, now);
                    }
                    if known.is_none() {
                        self.to_living(out, |gang, rank| Action::ToRank {
                            gang,
                            rank,
                            message: ToRank::Stop,
                        });
                    }
                }
            }
        }
        self.tick(config, now, out);
    }

    /// Passes a signal on to a program, as if its ranks ran in a terminal of their own; where that asks it to end, sterner ones follow.
    /// Training is stopped otherwise.
    pub fn pass_on(&mut self, blow: Blow, now: Now, out: &mut Vec<Action>) {
        if self.is_ending() || !matches!(self.kind, Kind::Program) {
            return;
        }
        if !matches!(blow, Blow::User1 | Blow::User2) {
            if self.stop.is_some() {
                return;
            }
            self.stop = Some(Stop::WhenSaved);
            self.terminate_at = Some(now.mono + STOP_GRACE);
            self.kill_within(2 * STOP_GRACE, now);
        }
        self.strike_living(blow, out);
    }

    /// Ends the gang for a reason that is the agent's own.
    pub fn fail(&mut self, error: JobError, now: Now) {
        if !self.is_ending() {
            self.own_error.get_or_insert(error);
            self.kill_within(Duration::ZERO, now);
        }
    }

    /// Does what is due: kills, looks at memory, sweeps.
    pub fn tick(&mut self, config: &Config, now: Now, out: &mut Vec<Action>) {
        if self.is_ending() {
            return;
        }
        if let Some((at, seconds)) = self.expires_at
            && now.mono >= at
        {
            self.expires_at = None;
            self.expired = Some(seconds);
            return self.stop(Stop::Soon, config, now, out);
        }
        if self.terminate_at.is_some_and(|at| now.mono >= at) {
            self.terminate_at = None;
            self.strike_living(Blow::Terminate, out);
        }
        if self.kill_at.is_some_and(|at| now.mono >= at) {
            self.kill_at = None;
            for (rank, state) in
                self.ranks.iter_mut().enumerate().filter(|(_, state)| state.exit.is_none() && !state.struck)
            {
                state.struck = true;
                out.push(Action::Strike { gang: self.id, rank: rank as Rank, blow: Blow::Kill });
            }
        }
        self.stream.tell_in_time(now.unix_ms, now.mono);
        if self.ranks.iter().all(|state| state.exit.is_some()) {
            self.phase = Phase::Sweeping;
            self.kill_at = None;
            out.push(Action::Sweep(self.id));
        } else if now.mono >= self.sample_at {
            self.sample_at = now.mono + MEMORY_PERIOD;
            out.push(Action::SampleMemory(self.id));
        }
        if self.can_stall() && now.mono >= self.look_at {
            self.look_at = now.mono + LOOK_PERIOD;
            out.push(Action::Look(self.id));
        }
    }

    /// When `tick` has something to do.
    pub fn deadline(&self) -> Option<Duration> {
        if self.is_ending() {
            return None;
        }
        let expires_at = self.expires_at.map(|(at, _)| at);
        let look_at = self.can_stall().then_some(self.look_at);
        let once = self.kill_at.into_iter().chain(self.terminate_at).chain(expires_at);
        once.chain(look_at).chain([self.sample_at]).min()
    }

    pub fn stream(&mut self) -> &mut EventStream {
        &mut self.stream
    }

    /// What its events told.
    pub fn figures(&self) -> &Figures {
        self.stream.figures()
    }

    /// Its ranks on this node.
    pub fn ranks(&self) -> usize {
        self.ranks.len()
    }

    pub fn is_crowded(&self) -> bool {
        self.stream.is_crowded()
    }

    pub fn is_finished(&self) -> bool {
        self.phase == Phase::Finished
    }

    pub fn needs_libtorch(&self) -> bool {
        matches!(self.kind, Kind::Train(_))
    }

    /// All ranks are gone.
    fn is_ending(&self) -> bool {
        matches!(self.phase, Phase::Sweeping | Phase::Finished)
    }

    /// Its ranks train together, and none has come to its end.
    fn can_stall(&self) -> bool {
        let trains = matches!(self.kind, Kind::Train(_)) && self.world_size > 1;
        let over = |state: &RankState| state.done.is_some() || state.exit.is_some();
        trains && self.phase == Phase::Running && self.suspicions.is_empty() && !self.ranks.iter().any(over)
    }

    /// Set once it is finished, and every event is committed or never can be.
    pub fn fate(&self) -> Option<Fate> {
        match (self.is_finished(), self.unrecordable) {
            (true, true) => Some(Fate::Unrecordable),
            (true, false) if self.stream.is_drained() => Some(Fate::Recorded),
            _ => None,
        }
    }

    /// The coordinator expects `next_seq` next.
    pub fn resend_from(&mut self, next_seq: u64, config: &Config, now: Now, out: &mut Vec<Action>) {
        match self.stream.resend_from(next_seq) {
            Ok(committed) => self.on_committed(&committed, out),
            Err(diverged) => {
                // No event of this gang can be recorded any more: it must not go on unseen.
                self.unrecordable = true;
                let (kind, fault) = (FailureKind::Node, Fault::Environment);
                self.fail(verdict::agent_error(kind, fault, &config.name, diverged.to_string()), now);
            }
        }
    }

    /// Events that the coordinator has committed: a checkpoint among them is valid now.
    pub fn on_committed(&mut self, events: &[Event], out: &mut Vec<Action>) {
        let alive = self.ranks.first().is_some_and(|rank| rank.exit.is_none());
        for event in events.iter().filter(|_| alive) {
            if let EventBody::Checkpoint(record) = &event.body {
                let message = ToRank::CheckpointCommitted { step: record.step };
                out.push(Action::ToRank { gang: self.id, rank: 0, message });
            }
        }
    }

    fn on_message(&mut self, rank: Rank, message: FromRank, now: Now, out: &mut Vec<Action>) {
        match message {
            FromRank::Event(event) => self.on_event(rank, event, now, out),
            FromRank::Done(outcome) => {
                if let Some(state) = self.ranks.get_mut(rank as usize) {
                    state.done = Some(outcome);
                    out.push(Action::SampleMemory(self.id));
                }
                if self.ranks.iter().all(|state| state.done.is_some() || state.exit.is_some()) {
                    self.kill_within(EXIT_GRACE, now);
                }
            }
            FromRank::Failed(error) => self.suspect(rank, now.mono, Cause::Said(error), now, out),
        }
    }

    fn on_event(&mut self, rank: Rank, mut event: Event, now: Now, out: &mut Vec<Action>) {
        match event.body {
            // The rank would take it for valid when it is committed, and rotate older ones away.
            EventBody::Checkpoint(ref record) => {
                if let Some(flaw) = record.flaw() {
                    let (step, error) = (record.step, format!("its manifest is not whole: {flaw}"));
                    event.body = EventBody::CheckpointFailed { step, error };
                }
            }
            EventBody::Log { level, line, .. } => return self.on_line(Some(rank), level, &line, now),
            // How the gang ended is the agent's to say, when all ranks are gone.
            EventBody::Finished(_) => return,
            EventBody::Step(step) => self.last_step = step.step,
            EventBody::Started { .. } => {
                self.sample_at = now.mono + MEMORY_PERIOD;
                out.push(Action::SampleMemory(self.id));
            }
            _ => {}
        }
        self.stream.push(event, now.mono);
    }

    fn on_line(&mut self, rank: Option<Rank>, level: Level, line: &str, now: Now) {
        if let Some(state) = rank.and_then(|rank| self.ranks.get_mut(rank as usize)) {
            state.last_lines.push(level, line);
        }
        let rank = rank.map(|rank| self.global(rank));
        for line in lines::pieces(line, LINE_MAX) {
            self.push(now, EventBody::Log { rank, level, line: line.to_owned() });
        }
    }

    fn on_exit(&mut self, rank: Rank, at: Duration, exit: Exit, now: Now, out: &mut Vec<Action>) {
        let trains = matches!(self.kind, Kind::Train(_));
        let global = self.global(rank);
        let Some(state) = self.ranks.get_mut(rank as usize).filter(|state| state.exit.is_none()) else {
            return;
        };
        state.exit = Some(exit);
        let expected = state.struck || (self.stop.is_some() && !trains);
        let done = state.done.is_some();
        let reported = self.suspicions.iter().any(|suspicion| suspicion.rank == global);
        match exit {
            _ if expected => {}
            _ if done && exit.is_success() => {}
            _ if done => {
                let line = format!("rank {global} had done its work but did not leave cleanly: {exit:?}");
                self.push(now, EventBody::Log { rank: None, level: Level::Warn, line });
            }
            Exit::Signal(signal) => self.suspect(rank, at, Cause::Signal(signal), now, out),
            Exit::Code(0) if !trains => {}
            Exit::Code(_) if reported => {}
            Exit::Code(code) => self.suspect(rank, at, Cause::Code(code), now, out),
        }
        if trains && !done && !expected {
            out.push(Action::AbortCollectives { gang: self.id, rank });
        }
    }

    fn on_memory(&mut self, rss_mib: &[u64], pss_mib: &[u64], now: Now) {
        for (peak, seen) in
            self.peak_rss_mib.iter_mut().zip(rss_mib).chain(self.peak_pss_mib.iter_mut().zip(pss_mib))
        {
            *peak = (*peak).max(*seen);
        }
        let anyone_done = self.ranks.iter().any(|state| state.done.is_some());
        if !anyone_done {
            self.push_memory(now);
        }
    }

    fn on_look(&mut self, sights: &[Sight], now: Now) {
        if !self.can_stall() {
            return;
        }
        let told = [self.watch.look(now.mono, sights), self.straggler.look(now.mono, sights)];
        for told in told.into_iter().flatten() {
            match told {
                Told::Stalls(line) => self.on_line(None, Level::Warn, &line, now),
                Told::GoesOn(line) => self.on_line(None, Level::Info, &line, now),
            }
        }
        let standing = self.watch.standing().or(self.straggler.standing());
        if let Some(standing) = self.standings.news(standing, now.mono) {
            let stall = standing.map(|Standing { since, what, culprit }| Stall {
                since_unix_ms: now.unix_ms.saturating_sub(now.mono.saturating_sub(since).as_millis() as u64),
                what,
                culprit,
            });
            self.push(now, EventBody::Stall(stall));
        }
    }

    /// What was told is a peak: it is told again when it has grown.
    fn push_memory(&mut self, now: Now) {
        let told = &mut self.told_memory_mib;
        let grown = [&self.peak_rss_mib, &self.peak_pss_mib].map(|peaks| peaks.iter().sum());
        if self.peak_rss_mib.iter().any(|&mib| mib > 0) && *told != grown {
            *told = grown;
            let body = EventBody::Memory {
                first_rank: self.first_rank,
                rss_mib: self.peak_rss_mib.clone(),
                pss_mib: self.peak_pss_mib.clone(),
            };
            self.push(now, body);
        }
    }

    fn suspect(&mut self, rank: Rank, at: Duration, cause: Cause, now: Now, out: &mut Vec<Action>) {
        let first = self.suspicions.is_empty();
        let end = match (&self.kind, &cause) {
            (Kind::Program, _) => now.mono + PEER_GRACE,
            // A signal needs no further evidence; the rest may wait for a better explanation.
            (Kind::Train(_), Cause::Signal(_)) => at,
            (Kind::Train(_), _) => at + BLAME_GRACE,
        };
        self.suspicions.push(Suspicion { at, rank: self.global(rank), cause });
        self.kill_at = Some(self.kill_at.map_or(end, |known| known.min(end)));
        if first && matches!(self.kind, Kind::Program) {
            self.strike_living(Blow::Terminate, out);
        }
    }

    /// The number of a rank of this node within the job.
    pub fn global(&self, rank: Rank) -> Rank {
        self.first_rank.saturating_add(rank)
    }

    fn kill_within(&mut self, grace: Duration, now: Now) {
        let at = now.mono + grace;
        self.kill_at = Some(self.kill_at.map_or(at, |known| known.min(at)));
    }

    fn strike_living(&self, blow: Blow, out: &mut Vec<Action>) {
        self.to_living(out, |gang, rank| Action::Strike { gang, rank, blow });
    }

    fn to_living(&self, out: &mut Vec<Action>, action: impl Fn(GangId, Rank) -> Action) {
        let living = self.ranks.iter().enumerate().filter(|(_, state)| state.exit.is_none());
        out.extend(living.map(|(rank, _)| action(self.id, rank as Rank)));
    }

    fn swept(&mut self, left: usize, config: &Config, now: Now) {
        if left > 0 {
            let line = format!(
                "{left} processes that the ranks started hang in the kernel of {} and end when it lets them go",
                config.name
            );
            self.push(now, EventBody::Log { rank: None, level: Level::Warn, line });
        }
        self.finish(config, now);
    }

    fn push(&mut self, now: Now, body: EventBody) {
        self.stream.push(Event { unix_ms: now.unix_ms, body }, now.mono);
    }
}
