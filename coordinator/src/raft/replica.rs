//! One replica: raft-rs, its log and the cluster's state. The owner ticks it, hands it proposals and peers' messages, and takes what
//! comes out of `process`.
//!
//! Nothing leaves `process` as answered that is not durable. When the disk is full the replica stands still: it keeps what raft wanted
//! written and goes on from there when there is room. No clock, no threads, no network.

use super::disk::{Batch, Disk, DiskError, Durability};
use super::history;
use super::log::{LogError, LogStore, Position};
use super::logger::logger;
use crate::cluster::{Answer, Command, Effect, State};
use fleet_common::codec;
use prost::Message as _;
use raft::eraftpb::{ConfChange, ConfChangeV2, ConfState, Entry, EntryType, HardState, Message};
use raft::{Config, RawNode, Ready, StateRole, Storage};
use std::sync::Arc;

/// Ticks of silence after which a follower asks for an election, at least; raft adds up to as many again at random.
pub const ELECTION_TICKS: usize = 10;
/// Ticks between a leader's heartbeats.
pub const HEARTBEAT_TICKS: usize = 2;
/// A snapshot is taken when the log has grown by this much since the last one: bounds the time to restart.
const SNAPSHOT_BYTES: usize = 8 << 20;
const SNAPSHOT_ENTRIES: u64 = 10_000;
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
    #[error("raft cannot go on: {0}")]
    Raft(#[from] raft::Error),
    #[error("entry {index} cannot be understood; it was written by a newer version of fleet ({why})")]
    UnknownCommand { index: u64, why: String },
    #[error("the state in the snapshot cannot be read: {0}")]
    State(String),
}

impl From<DiskError> for ReplicaError {
    fn from(error: DiskError) -> Self {
        ReplicaError::Log(error.into())
    }
}

/// Why a proposal was not taken. Nothing of it will happen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Declined {
    NotLeader,
    Busy,
    TooLarge,
    DiskFull(String),
}

/// What came of a round.
#[derive(Debug, Default)]
pub struct Output {
    /// Proposals that are durable and applied.
    pub answers: Vec<(Ticket, Answer)>,
    pub effects: Vec<Effect>,
    /// Reads that may look at the state now.
    pub reads: Vec<Ticket>,
}

/// What raft wanted written when the disk was full.
struct Stuck {
    ready: Ready,
    staged: super::log::Staged,
}

pub struct Replica<D: Disk> {
    node: RawNode<LogStore<D>>,
    state: State,
    applied: Position,
    /// As of `applied`.
    conf: ConfState,
    /// Rows of applied commands that are not on the disk yet. The log has the commands, so nothing is lost with them.
    rows: Batch,
    /// Reads that wait for the state to come to an index.
    reads: Vec<(u64, Ticket)>,
    bytes_since_snapshot: usize,
    stuck: Option<Stuck>,
    full: Option<String>,
}

impl<D: Disk> Replica<D> {
    /// Makes the first replica of a new cluster.
    pub fn create(disk: Arc<D>, id: u64, voters: &[u64], state: State) -> Result<Self, ReplicaError> {
        let encoded = codec::encode_record(&state).map_err(|error| ReplicaError::State(error.to_string()))?;
        Self::start(LogStore::create(disk, id, voters, encoded)?, state)
    }

    /// Continues from what is on the disk; `None` when it is empty.
    pub fn open(disk: Arc<D>) -> Result<Option<Self>, ReplicaError> {
        let Some(log) = LogStore::open(disk)? else { return Ok(None) };
        let state = codec::decode_record(&log.snapshot_state()?)
            .map_err(|error| ReplicaError::State(error.to_string()))?;
        Self::start(log, state).map(Some)
    }

    fn start(log: LogStore<D>, state: State) -> Result<Self, ReplicaError> {
        let id = log.replica();
        let (applied, conf) = (log.snapshot_position(), log.conf().clone());
        let config = Config {
            id,
            applied: applied.index,
            election_tick: ELECTION_TICKS,
            heartbeat_tick: HEARTBEAT_TICKS,
            max_size_per_msg: MESSAGE_BYTES,
            max_committed_size_per_ready: MESSAGE_BYTES,
            max_uncommitted_size: UNCOMMITTED_BYTES,
            check_quorum: true,
            pre_vote: true,
            ..Config::default()
        };
        let mut node = RawNode::new(&config, log, &logger())?;
        if conf.voters == [id] && conf.voters_outgoing.is_empty() {
            node.campaign()?;
        }
        let (rows, reads) = (Batch::default(), Vec::new());
        Ok(Replica {
            node,
            state,
            applied,
            conf,
            rows,
            reads,
            bytes_since_snapshot: 0,
            stuck: None,
            full: None,
        })
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

    /// Leads, and a quorum has confirmed it by committing an entry of this term.
    pub fn leads(&self) -> bool {
        self.node.raft.state == StateRole::Leader && self.node.raft.commit_to_current_term()
    }

    /// No other replica can have committed anything that this one has not applied.
    pub fn is_alone(&self) -> bool {
        self.conf.voters == [self.id()] && self.conf.voters_outgoing.is_empty()
    }

    /// Why nothing can be written at the moment.
    pub fn full(&self) -> Option<&str> {
        self.full.as_deref()
    }

    pub fn tick(&mut self) {
        if self.stuck.is_none() {
            self.node.tick();
        }
    }

    /// A message from another replica. One that does not fit is dropped; raft sends it again.
    pub fn step(&mut self, message: Message) {
        if self.stuck.is_none() {
            // Errors here are about the message, for example one from a replica that was removed.
            let _ = self.node.step(message);
        }
    }

    /// Proposes a command; its answer comes out of `process` under this ticket, or never if leadership is lost.
    pub fn propose(&mut self, ticket: Ticket, command: &Command) -> Result<(), Declined> {
        if let Some(why) = &self.full {
            return Err(Declined::DiskFull(why.clone()));
        }
        if self.node.raft.state != StateRole::Leader {
            return Err(Declined::NotLeader);
        }
        let data = codec::encode(command).map_err(|_| Declined::TooLarge)?;
        if data.len() > COMMAND_MAX {
            return Err(Declined::TooLarge);
        }
        self.node.propose(ticket.to_be_bytes().to_vec(), data).map_err(|_| Declined::Busy)
    }

    /// Asks for a linearizable read; the ticket comes out of `process`. May vanish while a leader is not confirmed: ask again.
    pub fn read_index(&mut self, ticket: Ticket) {
        if self.stuck.is_none() {
            self.node.read_index(ticket.to_be_bytes().to_vec());
        }
    }

    /// Does all that raft wants done. `send` gets messages for peers, a leader's before its own disk is asked, all others after.
    pub fn process(&mut self, send: &mut dyn FnMut(Message)) -> Result<Output, ReplicaError> {
        let mut output = Output::default();
        match self.round(send, &mut output) {
            Ok(()) => self.full = None,
            Err(ReplicaError::Log(LogError::Disk(error @ DiskError::Full(_)))) => {
                self.full = Some(error.to_string())
            }
            Err(error) => return Err(error),
        }
        Ok(output)
    }

    /// Tries to make a full disk usable; `process` then goes on where it stopped.
    pub fn recover(&mut self) -> Result<(), ReplicaError> {
        match self.node.store().disk().recover() {
            Ok(()) | Err(DiskError::Full(_)) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn round(&mut self, send: &mut dyn FnMut(Message), output: &mut Output) -> Result<(), ReplicaError> {
        if let Some(Stuck { ready, staged }) = self.stuck.take() {
            self.persist(ready, staged, send, output)?;
        }
        while self.node.has_ready() {
            let mut ready = self.node.ready();
            ready.take_messages().into_iter().for_each(&mut *send);
            let reads = ready.take_read_states();
            self.reads
                .extend(reads.into_iter().filter_map(|read| Some((read.index, ticket(&read.request_ctx)?))));
            let staged = if ready.snapshot().is_empty() {
                self.node.store().stage(ready.take_entries(), ready.hs().cloned())?
            } else {
                self.node.store().stage_installation(ready.snapshot(), ready.hs().cloned())?
            };
            let committed = ready.take_committed_entries();
            self.apply(committed, output)?;
            self.persist(ready, staged, send, output)?;
        }
        self.write_rows()?;
        self.reads.retain(|(index, ticket)| {
            let wait = *index > self.applied.index;
            if !wait {
                output.reads.push(*ticket);
            }
            wait
        });
        self.compact()
    }

    /// Makes a `Ready` durable and lets raft go on with it.
    fn persist(
        &mut self,
        mut ready: Ready,
        staged: super::log::Staged,
        send: &mut dyn FnMut(Message),
        output: &mut Output,
    ) -> Result<(), ReplicaError> {
        let durability = if ready.must_sync() { Durability::Synced } else { Durability::Written };
        if let Err(error) = self.node.mut_store().write(&staged, durability) {
            self.stuck = Some(Stuck { ready, staged });
            return Err(error.into());
        }
        if !ready.snapshot().is_empty() {
            self.install(&ready)?;
        }
        ready.take_persisted_messages().into_iter().for_each(&mut *send);
        let mut light = self.node.advance_append(ready);
        light.take_messages().into_iter().for_each(&mut *send);
        self.apply(light.take_committed_entries(), output)?;
        self.node.advance_apply_to(self.applied.index);
        Ok(())
    }

    fn install(&mut self, ready: &Ready) -> Result<(), ReplicaError> {
        let snapshot = ready.snapshot();
        let metadata = snapshot.get_metadata();
        self.state =
            codec::decode_record(&snapshot.data).map_err(|error| ReplicaError::State(error.to_string()))?;
        self.applied = Position { index: metadata.index, term: metadata.term };
        self.conf = metadata.get_conf_state().clone();
        self.rows = Batch::default();
        self.bytes_since_snapshot = 0;
        Ok(())
    }

    fn apply(&mut self, entries: Vec<Entry>, output: &mut Output) -> Result<(), ReplicaError> {
        for entry in entries {
            let index = entry.index;
            self.bytes_since_snapshot += entry.data.len();
            match entry.get_entry_type() {
                EntryType::EntryNormal if entry.data.is_empty() => {}
                EntryType::EntryNormal => {
                    let command: Command = codec::decode(&entry.data)
                        .map_err(|error| ReplicaError::UnknownCommand { index, why: error.to_string() })?;
                    let applied = self.state.apply(index, command);
                    for row in &applied.history {
                        history::stage(row, &mut self.rows)?;
                    }
                    output.effects.extend(applied.effects);
                    output.answers.extend(ticket(&entry.context).map(|ticket| (ticket, applied.answer)));
                }
                EntryType::EntryConfChange => {
                    let change = ConfChange::decode(&entry.data[..])
                        .map_err(|error| ReplicaError::UnknownCommand { index, why: error.to_string() })?;
                    self.conf = self.node.apply_conf_change(&change)?;
                }
                EntryType::EntryConfChangeV2 => {
                    let change = ConfChangeV2::decode(&entry.data[..])
                        .map_err(|error| ReplicaError::UnknownCommand { index, why: error.to_string() })?;
                    self.conf = self.node.apply_conf_change(&change)?;
                }
            }
            self.applied = Position { index, term: entry.term };
        }
        Ok(())
    }

    /// Writes the history of what was applied, and with it how far the log is committed. Not synced: the log has it all.
    fn write_rows(&mut self) -> Result<(), ReplicaError> {
        let commit = self.commit_index();
        if self.rows.is_empty() && self.node.store().hard_state().commit == commit {
            return Ok(());
        }
        let hard = HardState { commit, ..self.node.store().hard_state().clone() };
        let mut staged = self.node.store().stage(Vec::new(), Some(hard))?;
        staged.batch.ops.extend(self.rows.ops.iter().cloned());
        self.node.mut_store().write(&staged, Durability::Written)?;
        self.rows = Batch::default();
        Ok(())
    }

    fn compact(&mut self) -> Result<(), ReplicaError> {
        let entries = self.applied.index - self.node.store().snapshot_position().index;
        if self.bytes_since_snapshot >= SNAPSHOT_BYTES || entries >= SNAPSHOT_ENTRIES {
            self.snapshot()?;
        }
        Ok(())
    }

    /// Makes the applied state durable, so that the log before it is not needed any more.
    pub fn snapshot(&mut self) -> Result<(), ReplicaError> {
        let state =
            codec::encode_record(&self.state).map_err(|error| ReplicaError::State(error.to_string()))?;
        let staged = self.node.store().stage_compaction(self.applied, self.conf.clone(), state)?;
        self.node.mut_store().write(&staged, Durability::Synced)?;
        self.bytes_since_snapshot = 0;
        Ok(())
    }

    /// First entry that is still in the log.
    pub fn first_index(&self) -> u64 {
        self.node.store().first_index().unwrap_or_default()
    }
}

fn ticket(bytes: &[u8]) -> Option<Ticket> {
    bytes.try_into().ok().map(u64::from_be_bytes)
}

#[cfg(test)]
#[path = "replica_tests.rs"]
mod tests;
