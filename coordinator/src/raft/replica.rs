//! One replica: raft-rs, its log and the cluster's state. The owner ticks it, hands it proposals and peers' messages, and takes what
//! comes out of `process`.
//!
//! Nothing leaves `process` as answered that is not durable. When the disk is full the replica stands still: it keeps what raft wanted
//! written and goes on from there when there is room. No clock, no threads, no network, no randomness: the election timeout is a
//! function of a seed, the replica and the term.

mod evidence;
mod rounds;
mod transfers;

use super::disk::{Batch, Disk, DiskError, Durability};
use super::history;
use super::image::{self, ImageError};
use super::log::{Keep, LogError, LogStore, Position};
use super::logger::logger;
use super::marks::{Mark, Marks};
use super::shape::{BadMessage, Fits};
use super::transfer::{Announced, Incoming, Unfit};
use crate::cluster::retention::Removal;
use crate::cluster::tally::Tally;
use crate::cluster::{Answer, Command, Effect, State};
use fleet_common::codec;
use raft::eraftpb::{ConfChange, ConfChangeType, ConfState, Message, MessageType};
use raft::{Config, ProgressState, RawNode, Ready, StateRole, Storage};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Ticks of silence after which a follower asks for an election, at least; up to as many again by replica and term.
pub const ELECTION_TICKS: usize = 10;
/// Ticks between a leader's heartbeats.
pub const HEARTBEAT_TICKS: usize = 2;
/// A snapshot is taken when the log has grown by some times the state's own size: bounds what is written for it.
const SNAPSHOT_STATES: usize = 4;
/// Ticks that a snapshot is kept for a receiver that does not ask for more of it: ten seconds.
const TRANSFER_LEASE_TICKS: u64 = 200;
/// Messages with entries that a peer may have unanswered.
const INFLIGHT_MAX: usize = 128;
/// Proposals that are not committed yet.
const UNCOMMITTED_BYTES: u64 = 32 << 20;
/// Entries in one message to a peer, and entries applied at once.
const MESSAGE_BYTES: u64 = 1 << 20;
/// A command with its envelope; leaves room for the entry's own fields in a frame.
pub const COMMAND_MAX: usize = 4 << 20;

/// Names a proposal or a read; unique among those under way, over restarts too.
pub type Ticket = u64;

#[derive(Debug, thiserror::Error)]
pub enum ReplicaError {
    #[error(transparent)]
    Log(#[from] LogError),
    /// The others have another past. Which one is right only people can say.
    #[error(
        "{0}: a coordinator's disk was put back to an older state, and what was acknowledged since is missing there; this coordinator stops, and its directory has what it says: keep it, and see \"When coordinators contradict each other\" in docs/operating.md"
    )]
    Contradicted(String),
    #[error("raft cannot go on: {0}")]
    Raft(#[from] raft::Error),
    #[error("entry {index} cannot be understood; it was written by a newer version of fleet ({why})")]
    UnknownCommand { index: u64, why: String },
    #[error(transparent)]
    State(#[from] ImageError),
    #[error(
        "the snapshot of replica-{from} has format {found}, this program knows {}; use the version of fleet that runs there",
        image::FORMAT
    )]
    NewerSnapshot { from: u64, found: u32 },
}

impl From<DiskError> for ReplicaError {
    fn from(error: DiskError) -> Self {
        ReplicaError::Log(error.into())
    }
}

/// When snapshots are taken and in which pieces they travel. The simulator makes them small, so that all of it happens often.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// A snapshot is taken when the log has grown by so many bytes or entries since the last one: bounds the time to restart.
    pub snapshot_bytes: usize,
    pub snapshot_entries: u64,
    /// Entries kept behind a snapshot for replicas that are a little behind: a restart's worth at a high rate.
    pub keep_behind: u64,
    /// Bytes of them.
    pub keep_behind_bytes: u64,
    /// Bytes of the whole log with which it is cut though somebody fetches the snapshot, who has to begin anew then.
    pub fetched_log_bytes: u64,
    /// Content of one chunk, but for a single row that is larger.
    pub chunk_bytes: usize,
}

impl Default for Sizes {
    fn default() -> Self {
        Sizes {
            snapshot_bytes: 16 << 20,
            snapshot_entries: 50_000,
            keep_behind: 10_000,
            keep_behind_bytes: 16 << 20,
            fetched_log_bytes: 512 << 20,
            chunk_bytes: 256 << 10,
        }
    }
}

/// Why a proposal was not taken. Nothing of it will happen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Declined {
    NotLeader,
    Busy,
    TooLarge,
    DiskFull(String),
    /// Another change of membership is under way.
    Pending,
    /// It makes no sense for the members that there are.
    Misfit(String),
}

/// A change of who takes part. One at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Membership {
    /// Gets the log and does not vote.
    AddLearner(u64),
    /// Makes a learner a voter.
    Promote(u64),
    Remove(u64),
}

/// How far another replica is, as the leader knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    pub id: u64,
    pub voter: bool,
    /// It has the log up to here.
    pub matched: u64,
    /// Heard since the last check of the quorum, one to two election timeouts ago.
    pub recent_active: bool,
    pub snapshot_pending: bool,
}

/// What came of a round.
#[derive(Debug, Default)]
pub struct Output {
    /// Proposals that are durable and applied.
    pub answers: Vec<(Ticket, Answer)>,
    pub effects: Vec<Effect>,
    /// Reads that may look at the state now.
    pub reads: Vec<Ticket>,
    /// The state was replaced by a snapshot; the effects of what was skipped are not told.
    pub installed: bool,
}

/// What raft wanted written when the disk was full.
struct Stuck {
    ready: Ready,
    staged: super::log::Staged,
}

/// Why a replica must stop.
enum Doom {
    /// It has lost what it had acknowledged.
    Forgot(String),
    /// What it has committed is contradicted.
    Contradicted(String),
    /// The others have left it behind with a snapshot that it cannot read.
    NewerSnapshot { from: u64, found: u32 },
}

pub struct Replica<D: Disk> {
    node: RawNode<LogStore<D>>,
    state: State,
    applied: Position,
    /// As of `applied`.
    conf: ConfState,
    /// The members changed since it was last made durable how far the log is committed.
    members_changed: bool,
    /// Rows of applied commands that are not on the disk yet. The log has the commands, so nothing is lost with them.
    rows: Batch,
    /// Of `rows`, what is removed.
    removals: Vec<Removal>,
    /// Reads that wait for the state to come to an index.
    reads: Vec<(u64, Ticket)>,
    bytes_since_snapshot: usize,
    stuck: Option<Stuck>,
    full: Option<String>,
    /// The disk is closed until there is room, and cannot be read either.
    blind: bool,
    /// A message has shown that this replica must stop.
    doomed: Option<Doom>,
    marks: Marks,
    /// The marks changed since they were written last, at which tick that was.
    marks_changed: bool,
    marks_written: u64,
    seed: u64,
    sizes: Sizes,
    ticks: u64,
    incoming: Option<Incoming>,
    /// The last snapshot that came whole and made no sense, and why. It is not fetched again.
    unreadable: Option<(Announced, String)>,
    /// Who fetches the snapshot, and until which tick it is kept for them.
    outgoing: BTreeMap<u64, u64>,
    /// The snapshot's state while somebody fetches it.
    outgoing_state: Option<Vec<u8>>,
    tally: Tally,
    /// Commands put into the log so far.
    proposals: u64,
}

impl<D: Disk> Replica<D> {
    /// Makes a replica of a new cluster. `seed` decides the election timeouts.
    pub fn create(
        disk: Arc<D>,
        id: u64,
        voters: &[u64],
        state: State,
        seed: u64,
    ) -> Result<Self, ReplicaError> {
        let log = LogStore::create(disk, id, voters, image::encode(&state)?)?;
        Self::start(log, state, seed)
    }

    /// Makes a replica that waits to be added to a cluster. It has no members, cannot vote, and takes everything from a leader's
    /// snapshot.
    pub fn join(disk: Arc<D>, id: u64, cluster_id: &str, seed: u64) -> Result<Self, ReplicaError> {
        let state = State::new(cluster_id.to_owned());
        let log = LogStore::join(disk, id, image::encode(&state)?)?;
        Self::start(log, state, seed)
    }

    /// Makes the only replica of a cluster whose state at this position (index and term) comes from a backup. Positions go on from there,
    /// because the history is kept under them.
    pub fn restore(
        disk: Arc<D>,
        id: u64,
        (index, term): (u64, u64),
        state: State,
        seed: u64,
    ) -> Result<Self, ReplicaError> {
        // A backup is read while the coordinator runs: it may have rows that its state does not count any more.
        let mut batch = Batch::default();
        state.removals().iter().for_each(|removal| history::stage_removal(removal, &mut batch));
        disk.write(&batch, Durability::Written)?;
        let log = LogStore::begin(disk, id, Position { index, term }, &[id], image::encode(&state)?)?;
        Self::start(log, state, seed)
    }

    /// Continues from what is on the disk; `None` when it is empty. A damaged or shortened log is an error: such a replica must not
    /// take part any more.
    pub fn open(disk: Arc<D>, seed: u64) -> Result<Option<Self>, ReplicaError> {
        let Some(log) = LogStore::open(disk)? else { return Ok(None) };
        let state = log.snapshot_state().inspect_err(|error| log.mark(error))?;
        let state = image::decode(&state)?;
        Self::start(log, state, seed).map(Some)
    }

    fn start(log: LogStore<D>, state: State, seed: u64) -> Result<Self, ReplicaError> {
        let id = log.replica();
        let (applied, conf) = (log.snapshot_position(), log.conf().clone());
        let tally = Tally::new(log.hard_state().commit);
        let marks = log.marks().inspect_err(|error| log.mark(error))?;
        let config = Config {
            id,
            applied: applied.index,
            election_tick: ELECTION_TICKS,
            heartbeat_tick: HEARTBEAT_TICKS,
            max_size_per_msg: MESSAGE_BYTES,
            max_inflight_msgs: INFLIGHT_MAX,
            max_committed_size_per_ready: MESSAGE_BYTES,
            max_uncommitted_size: UNCOMMITTED_BYTES,
            check_quorum: true,
            pre_vote: true,
            ..Config::default()
        };
        let mut node = RawNode::new(&config, log, &logger())?;
        if conf.voters == [id] {
            node.campaign()?;
        }
        Ok(Replica {
            node,
            state,
            applied,
            conf,
            members_changed: false,
            rows: Batch::default(),
            removals: Vec::new(),
            reads: Vec::new(),
            bytes_since_snapshot: 0,
            stuck: None,
            full: None,
            blind: false,
            doomed: None,
            marks,
            marks_changed: false,
            marks_written: 0,
            seed,
            sizes: Sizes::default(),
            ticks: 0,
            incoming: None,
            unreadable: None,
            outgoing: BTreeMap::new(),
            outgoing_state: None,
            tally,
            proposals: 0,
        })
    }

    /// The same with other sizes.
    pub fn sized(self, sizes: Sizes) -> Self {
        Replica { sizes, ..self }
    }

    pub fn state(&self) -> &State {
        &self.state
    }

    pub fn id(&self) -> u64 {
        self.node.raft.id
    }

    pub fn term(&self) -> u64 {
        self.node.raft.term
    }

    pub fn leader(&self) -> Option<u64> {
        Some(self.node.raft.leader_id).filter(|id| *id != raft::INVALID_ID)
    }

    pub fn commit_index(&self) -> u64 {
        self.node.raft.raft_log.committed
    }

    pub fn applied_index(&self) -> u64 {
        self.applied.index
    }

    /// What it has applied since it was opened.
    pub fn tally(&self) -> &Tally {
        &self.tally
    }

    pub fn proposals(&self) -> u64 {
        self.proposals
    }

    /// Bytes of the state in the last snapshot.
    pub fn state_bytes(&self) -> u64 {
        self.node.store().state_bytes()
    }

    /// Bytes of the entries that are in the log.
    pub fn log_bytes(&self) -> u64 {
        self.node.store().bytes()
    }

    /// Leads, and a quorum has confirmed it by committing an entry of this term.
    pub fn leads(&self) -> bool {
        self.node.raft.state == StateRole::Leader && self.node.raft.commit_to_current_term()
    }

    /// No other replica can have committed anything that this one has not applied. What is in the log and not applied yet may be the
    /// admission of others: a replica that has just been opened knows its members as of its snapshot.
    pub fn is_alone(&self) -> bool {
        let logged = self.node.store().last_index();
        self.conf.voters == [self.id()] && logged.is_ok_and(|last| self.applied.index >= last)
    }

    /// The members, as of `applied_index`.
    pub fn conf(&self) -> &ConfState {
        &self.conf
    }

    pub fn is_voter(&self) -> bool {
        self.conf.voters.contains(&self.id())
    }

    /// The others have gone on without this one. One that was never let in was not removed.
    pub fn was_removed(&self) -> bool {
        !self.conf.voters.is_empty() && !self.is_voter() && !self.conf.learners.contains(&self.id())
    }

    /// How far the others are; empty where this replica does not lead.
    pub fn progress(&self) -> Vec<Progress> {
        if self.node.raft.state != StateRole::Leader {
            return Vec::new();
        }
        let id = self.id();
        let others = self.node.raft.prs().iter().filter(|(other, _)| **other != id);
        let mut progress: Vec<Progress> = others
            .map(|(other, progress)| Progress {
                id: *other,
                voter: self.conf.voters.contains(other),
                matched: progress.matched,
                recent_active: progress.recent_active,
                snapshot_pending: progress.state == ProgressState::Snapshot,
            })
            .collect();
        progress.sort_by_key(|progress| progress.id);
        progress
    }

    /// Why nothing can be written at the moment.
    pub fn full(&self) -> Option<&str> {
        self.full.as_deref()
    }

    pub fn tick(&mut self) {
        if self.is_halted() {
            return;
        }
        self.ticks += 1;
        let timeout =
            ELECTION_TICKS as u64 + spread(self.seed, self.id(), self.term()) % ELECTION_TICKS as u64;
        self.node.raft.set_randomized_election_timeout(timeout as usize);
        // The only voter leads as soon as it wants to, and raft-rs panics when its log is not on its disk then.
        if self.conf.voters != [self.id()] || self.is_settled() {
            self.node.tick();
        }
        self.end_silent_transfers();
        self.note_acknowledged();
    }

    /// A message from another replica, whom the caller has authenticated as `message.from`. An error means that it made no sense.
    pub fn step(&mut self, message: Message) -> Result<(), BadMessage> {
        if self.is_halted() {
            return Ok(());
        }
        let fits = self.fits();
        if self.is_halted() {
            return Ok(());
        }
        fits.check(&message)?;
        self.note_term(&message);
        if let Some(what) = self.contradiction(&message) {
            self.doomed = Some(Doom::Contradicted(what));
            return Ok(());
        }
        match message.get_msg_type() {
            // A leader never sends this for more than was acknowledged to it.
            MessageType::MsgHeartbeat
                if message.term >= self.term() && message.commit > self.node.raft.raft_log.last_index() =>
            {
                self.doomed = Some(Doom::Forgot(format!(
                    "it acknowledged the entries up to {} to replica-{} and ends at {}",
                    message.commit,
                    message.from,
                    self.node.raft.raft_log.last_index()
                )));
            }
            MessageType::MsgSnapshot => self.announced(message)?,
            // Errors here are about the message, for example one from a replica that was removed.
            _ => drop(self.node.step(message)),
        }
        Ok(())
    }

    /// A leader has a snapshot for this replica.
    fn announced(&mut self, message: Message) -> Result<(), BadMessage> {
        let (from, term) = (message.from, message.term);
        let index = message.get_snapshot().get_metadata().index;
        match Incoming::new(message) {
            Ok(new) if self.unreadable.as_ref().is_some_and(|(known, _)| *known == new.announced()) => {}
            Ok(new) => {
                let known = self.incoming.as_mut().is_some_and(|incoming| incoming.renew(&new));
                if !known {
                    self.incoming = Some(new);
                }
            }
            Err(Unfit::Format(found)) if term >= self.term() && index > self.commit_index() => {
                self.doomed = Some(Doom::NewerSnapshot { from, found });
            }
            Err(_) => return Err(BadMessage("its snapshot is described by nothing")),
        }
        Ok(())
    }

    /// raft must not be asked for anything: it waits for the disk, or was told something untrue.
    fn is_halted(&self) -> bool {
        self.stuck.is_some() || self.blind || self.node.store().has_failed()
    }

    fn fits(&self) -> Fits {
        let log = &self.node.raft.raft_log;
        Fits {
            id: self.id(),
            last_index: log.last_index(),
            committed: log.committed,
            committed_term: log.term(log.committed).unwrap_or_default(),
            settled: self.is_settled(),
        }
    }

    /// It leads, or all of its log is on its disk.
    fn is_settled(&self) -> bool {
        let (raft, log) = (&self.node.raft, &self.node.raft.raft_log);
        raft.state == StateRole::Leader || log.persisted == log.last_index()
    }

    /// A message to this replica could not be delivered.
    pub fn report_unreachable(&mut self, id: u64) {
        if !self.is_halted() {
            self.node.report_unreachable(id);
        }
    }

    /// Gives leadership to a voter that is up to date or nearly so. May fail silently: look who leads after an election timeout.
    pub fn transfer_leadership(&mut self, to: u64) {
        if !self.is_halted() {
            self.node.transfer_leader(to);
        }
    }

    /// A change of the members is in the log and not applied yet.
    pub fn is_changing_members(&self) -> bool {
        self.node.raft.has_pending_conf()
    }

    /// Proposes a change of the members, together with the command that records it: both happen, or neither when the state machine
    /// rejects the command.
    pub fn propose_membership(
        &mut self,
        ticket: Ticket,
        change: Membership,
        command: &Command,
    ) -> Result<(), Declined> {
        let context = self.admit(command)?;
        if self.is_changing_members() {
            return Err(Declined::Pending);
        }
        let is = |members: &[u64], id: u64| members.contains(&id);
        let (kind, node_id, fits) = match change {
            Membership::AddLearner(id) => {
                let new = !is(&self.conf.voters, id) && !is(&self.conf.learners, id);
                (ConfChangeType::AddLearnerNode, id, new)
            }
            Membership::Promote(id) => (ConfChangeType::AddNode, id, is(&self.conf.learners, id)),
            Membership::Remove(id) => {
                let known = is(&self.conf.voters, id) || is(&self.conf.learners, id);
                (ConfChangeType::RemoveNode, id, known && id != self.id())
            }
        };
        if !fits {
            return Err(Declined::Misfit(format!("{change:?} does not fit the members {:?}", self.conf)));
        }
        let mut entry = ConfChange { node_id, context, ..ConfChange::default() };
        entry.set_change_type(kind);
        let proposed = self.node.propose_conf_change(ticket.to_be_bytes().to_vec(), entry);
        self.proposed(proposed)
    }

    /// Proposes a command; its answer comes out of `process` under this ticket, or never if leadership is lost.
    pub fn propose(&mut self, ticket: Ticket, command: &Command) -> Result<(), Declined> {
        let data = self.admit(command)?;
        let proposed = self.node.propose(ticket.to_be_bytes().to_vec(), data);
        self.proposed(proposed)
    }

    fn proposed(&mut self, proposed: raft::Result<()>) -> Result<(), Declined> {
        self.proposals += u64::from(proposed.is_ok());
        proposed.map_err(|_| Declined::Busy)
    }

    /// The command's bytes, if anything can be proposed here and now.
    fn admit(&self, command: &Command) -> Result<Vec<u8>, Declined> {
        if let Some(why) = &self.full {
            return Err(Declined::DiskFull(why.clone()));
        }
        if self.node.raft.state != StateRole::Leader || self.node.raft.lead_transferee.is_some() {
            return Err(Declined::NotLeader);
        }
        let data = codec::encode(command).map_err(|_| Declined::TooLarge)?;
        if data.len() > COMMAND_MAX { Err(Declined::TooLarge) } else { Ok(data) }
    }

    /// Asks for a linearizable read, on any replica; the ticket comes out of `process`. May vanish while a leader is not confirmed:
    /// ask again.
    pub fn read_index(&mut self, ticket: Ticket) {
        if !self.is_halted() {
            self.node.read_index([self.id().to_be_bytes(), ticket.to_be_bytes()].concat());
        }
    }
}

fn unknown(index: u64, why: impl ToString) -> ReplicaError {
    ReplicaError::UnknownCommand { index, why: why.to_string() }
}

/// A number that is as good as random, the same for the same seed, replica and term (SplitMix64's mixer, Steele et al. 2014).
fn spread(seed: u64, id: u64, term: u64) -> u64 {
    let mut z = [seed, id, term]
        .iter()
        .fold(0u64, |z, part| (z ^ part).wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(29));
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

fn ticket(bytes: &[u8]) -> Option<Ticket> {
    bytes.try_into().ok().map(u64::from_be_bytes)
}

#[cfg(test)]
mod tests;
