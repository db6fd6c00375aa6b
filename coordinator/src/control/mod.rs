//! One coordinator without the world: its replica of the log and the state, the agents it holds, the clients it answers, and what it
//! and the other coordinators ask of each other.
//!
//! Pure: no clock, no sockets, no threads, and no randomness but the seed that is passed in. `handle` takes what happened and
//! touches no disk; `process` does the work of all that was handled since, with one sync of the disk, and returns what is to be done.
//! After the same inputs at the same times two `Control`s do the same. The tokio driver and the simulator both drive this code.
//!
//! How a thing gets done, whoever asks for it:
//! - A change is proposed by the leader; another coordinator passes it on (`PeerMessage::Propose`) under its own ticket and sees that
//!   ticket come back when it applies the entry, so the answer needs no second way and survives the leader. Passed on again after a
//!   second or when the leader changes: every change carries a request id or is idempotent by itself.
//! - A query is answered by the leader, which alone has all observations, after a ReadIndex; `stale` ones by whoever is asked.
//! - A watch and an agent's orders come from the local state, once a ReadIndex has made sure that it is new enough.
//!
//! What the driver does: it authenticates (`Input` carries who somebody is by his certificate), encodes, signs certificates, makes
//! tokens, acknowledges heartbeats, and keeps to the two credits `AGENT_BATCHES_MAX` and `REPLIES_MAX`.

mod agents;
mod asks;
mod calls;
mod custody;
mod greeting;
mod io;
mod leaving;
mod measures;
mod members;
mod observations;
mod outputs;
mod past;
mod peer;
mod planning;
mod reads;
mod repairs;
mod retention;
mod session;
mod transfers;
mod views;
mod watches;

pub use calls::{READER, stamp};
pub use io::{
    AGENT_BATCHES_MAX, Action, Admission, Call, ControlError, Input, Myself, Now, REPLIES_MAX, Room, Session,
    Status, TICK_MS,
};
pub use peer::{PeerMessage, Report, SERVES_LEVEL, SIGHTINGS_MAX, Sighting, Told};

use crate::cluster::admitted::Membership;
use crate::cluster::members::clip;
use crate::cluster::{Effect, State};
use crate::planner::Observed;
use crate::raft::disk::Disk;
use crate::raft::history::History;
use crate::raft::replica::{Replica, Ticket};
use agents::Agents;
use asks::Ask;
use calls::Calls;
use fleet_common::ids::{JobId, NodeId, ReplicaId};
use fleet_common::protocol::Member;
use greeting::Greeting;
use leaving::Leaving;
use observations::Observations;
use outputs::Outputs;
use past::Past;
use prost::Message as _;
use raft::eraftpb::Message;
use reads::Reads;
use repairs::Repairs;
use retention::Forgets;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use transfers::Transfers;
use watches::Watches;

/// Open calls of clients, joiners and the driver: what a thousand impatient users have.
pub const CALLS_MAX: usize = 4_096;
/// Agents at one coordinator: all of a cluster of 10,000 nodes, and as many again that reconnect.
pub const AGENTS_MAX: usize = 20_000;
/// Between looks at what is seldom due.
const HOUSEKEEPING_MS: u64 = 1_000;
/// Between attempts to use a disk again that could not be written.
const RECOVER_EVERY_MS: u64 = 250;

/// Invariants: what is in `out` was caused by what is durable, unless it is a message that raft allows before; a ticket belongs to
/// one ask at most; every call in `calls` will be answered or was given up by its caller.
pub struct Control<D: Disk> {
    replica: Replica<D>,
    history: History<D>,
    myself: Myself,
    last_ticket: Ticket,
    lead: Option<Lead>,
    asks: BTreeMap<Ticket, Ask>,
    reads: Reads,
    calls: Calls,
    watches: Watches,
    agents: Agents,
    observations: Observations,
    greeting: Greeting,
    past: Past,
    /// Times that another coordinator said that the past is contradicted, or this one was told what cannot be.
    contradictions: u64,
    /// What was said last of each one that did so or had to stop, until it is taken out or comes back with the same past.
    contradicting: BTreeMap<ReplicaId, String>,
    /// What the queries of this round see of them.
    seen: Option<Observed>,
    transfers: Transfers,
    repairs: Repairs,
    outputs: Outputs,
    /// When it was looked last whether anything of the history is to be removed, or that is under way.
    forgets: Forgets,
    room: Room,
    /// `Action::Members` is due.
    members_changed: bool,
    /// Certificate of the newest CA of which the key is on this coordinator's disk.
    holds_ca: Option<Vec<u8>>,
    /// Since this coordinator was taken out.
    leaving: Option<Leaving>,
    /// When this coordinator last led or was heard by who leads.
    in_touch_ms: u64,
    plan_now: bool,
    planned_ms: u64,
    /// Decisions of the planner that are under way.
    decisions: usize,
    promoting: bool,
    members_ms: u64,
    describing: bool,
    describe_at_ms: u64,
    housekeeping_ms: u64,
    recovered_ms: u64,
    /// Who led, and in which term, when it was looked last.
    followed: (Option<u64>, u64),
    /// Who led last, and in which term; and how often that has become another.
    led: Option<(u64, u64)>,
    leader_changes: u64,
    /// Where each coordinator is asked over HTTP.
    http: Arc<BTreeMap<ReplicaId, String>>,
    /// Something was handed to raft since its last round.
    raft_touched: bool,
    out: Vec<Action>,
}

/// Leadership that a quorum has confirmed.
struct Lead {
    term: u64,
    since_ms: u64,
}

impl<D: Disk> Control<D> {
    /// `seed` makes the tickets of this life of the coordinator: it must be another one at every start.
    pub fn new(replica: Replica<D>, history: History<D>, myself: Myself, seed: u64, now: Now) -> Self {
        // Tickets are in the log: one of another coordinator or of an earlier life must not be taken for one of this.
        let http = Arc::new(BTreeMap::from([(ReplicaId(replica.id()), myself.http.clone())]));
        let last_ticket = spread(seed ^ replica.id().rotate_left(32));
        Control {
            replica,
            history,
            myself,
            last_ticket,
            lead: None,
            asks: BTreeMap::new(),
            reads: Reads::default(),
            calls: Calls::default(),
            watches: Watches::default(),
            agents: Agents::default(),
            observations: Observations::default(),
            greeting: Greeting::new(now),
            past: Past::default(),
            contradictions: 0,
            contradicting: BTreeMap::new(),
            seen: None,
            transfers: Transfers::default(),
            repairs: Repairs::default(),
            outputs: Outputs::default(),
            forgets: Forgets::default(),
            room: Room::Enough,
            members_changed: false,
            holds_ca: None,
            leaving: None,
            in_touch_ms: now.mono_ms,
            plan_now: false,
            planned_ms: now.mono_ms,
            decisions: 0,
            promoting: false,
            members_ms: now.mono_ms,
            describing: false,
            describe_at_ms: now.mono_ms,
            housekeeping_ms: now.mono_ms,
            recovered_ms: now.mono_ms,
            followed: (None, 0),
            led: None,
            leader_changes: 0,
            http,
            raft_touched: true,
            out: Vec::new(),
        }
    }

    /// Takes what happened. Cheap, and touches no disk.
    pub fn handle(&mut self, now: Now, input: Input) {
        match input {
            Input::Tick => self.tick(now),
            Input::Peer { from, message } => self.peer_said(now, from, message),
            Input::PeerLost(peer) => self.replica.report_unreachable(peer.0),
            Input::RefusedBy(peer) => self.removal_is_known_to(now, peer),
            Input::AgentConnected { session, node } => self.agent_connected(now, session, node),
            Input::Agent { session, message } => self.agent_said(now, session, message),
            Input::AgentHeard { node } => self.observations.heard(node, now),
            Input::AgentLost { session } => self.agent_lost(session),
            Input::Client { call, caller, frame } => self.take_client(now, call, caller, frame),
            Input::Taken { call, replies } => self.replies_taken(call, replies),
            Input::CallLost(call) => drop(self.calls.remove(call)),
            Input::Join { call, redeem, request } => self.take_join(now, call, redeem, request),
            Input::Propose { call, request, by, change } => self.take_change(now, call, request, by, change),
            Input::Look(call) => self.take_look(call),
            Input::HoldsCa(der) => self.holds_ca = Some(der),
            Input::Room(room) => self.room = room,
            Input::StepDown => self.hand_over(now),
        }
    }

    fn tick(&mut self, now: Now) {
        // What is asked here is answered before the greeting, and no later than it is over.
        self.look_after_past(now);
        self.look_after_greeting(now);
        if self.has_greeted() {
            self.replica.tick();
        }
        self.repairs.tick();
        if self.leaving.is_some() {
            return self.look_after_leaving(now);
        }
        self.look_after_asks(now);
        self.look_after_reads(now);
        self.look_after_agents(now);
        self.look_after_members(now);
        if now.mono_ms.saturating_sub(self.housekeeping_ms) >= HOUSEKEEPING_MS {
            self.housekeeping_ms = now.mono_ms;
            self.describe_myself(now);
            self.look_after_watches(now);
            self.look_after_joins(now);
            self.look_after_ca(now);
            self.tell_where_i_serve();
            self.look_after_outputs(now);
            self.look_after_retention(now);
            self.observations.forget(now);
            let state = self.replica.state();
            let revoked = |id| state.membership(Member::Coordinator(id)) == Membership::Revoked;
            self.contradicting.retain(|id, _| !revoked(*id));
        }
    }

    fn peer_said(&mut self, now: Now, from: ReplicaId, message: PeerMessage) {
        if self.is_revoked(Member::Coordinator(from)) || self.has_left() {
            return;
        }
        match message {
            PeerMessage::Raft(bytes) => {
                // One that does not fit is dropped; raft sends what matters again.
                if let Ok(message) = Message::decode(&bytes[..])
                    && message.from == from.0
                    && self.takes_part_with(now, from)
                    && let (term, Err(bad)) = (message.term, self.replica.step(message))
                    && bad.contradicts()
                    && term >= self.replica.term()
                {
                    self.alarm(from, format!("{from}: {bad}"));
                }
            }
            PeerMessage::Propose { ticket, command } => self.propose_for(now, from, ticket, *command),
            PeerMessage::Query { ticket, request } => self.query_for(from, ticket, request),
            PeerMessage::Told { ticket, told } => self.told(now, from, ticket, told),
            PeerMessage::Observations(report) => self.take_report(now, from, report),
            PeerMessage::ObservationsTaken { seq } => self.report_taken(now, from, seq),
            PeerMessage::Output { ticket, said } => self.output_said(now, from, ticket, said),
            PeerMessage::Marks { marks, asks } => self.take_marks(now, from, marks, asks),
            PeerMessage::ComparePast(theirs) => self.past_is_compared(from, &theirs),
            PeerMessage::Past(theirs) => self.take_past(from, theirs),
            PeerMessage::Stops { why } => self.alarm(from, format!("{from} stops: {}", clip(&why))),
            PeerMessage::Fetch(fetch) => self.transfers.want(from, fetch),
            PeerMessage::Chunk(chunk) => self.transfers.arrived(from, *chunk),
            PeerMessage::FetchRows(wanted) => self.repairs.want(from, wanted),
            PeerMessage::Rows(told) => self.repairs.arrived(from, *told),
            PeerMessage::Serves { http } => self.serves(from, &http),
            PeerMessage::WantCa { der } => self.ca_is_wanted(from, der),
            PeerMessage::Ca { der, key } => self.ca_came(der, key),
            // The driver's own: it has the links, and holds certificates against them.
            PeerMessage::Coordinators(_) => {}
        }
    }

    /// Does the work of all that was handled since the last call: one sync of the disk for all of it. `send` gets raft's messages while
    /// it goes on, a leader's before the sync, so that the followers' disks work at the same time as this one.
    pub fn process(
        &mut self,
        now: Now,
        send: &mut dyn FnMut(ReplicaId, PeerMessage),
    ) -> Result<Vec<Action>, ControlError> {
        if !self.has_left()
            && let Err(error) = self.round(now, send)
        {
            let ControlError::Replica(why) = &error;
            self.say_last_words(why, send);
            return Err(error);
        }
        Ok(std::mem::take(&mut self.out))
    }

    /// Something that cannot be if all disks have what they acknowledged.
    fn alarm(&mut self, from: ReplicaId, what: String) {
        self.contradictions += 1;
        let what = format!("{what}; see \"When coordinators contradict each other\" in docs/operating.md");
        self.contradicting.insert(from, what.clone());
        self.out.push(Action::Alarm(what));
    }

    fn round(&mut self, now: Now, send: &mut dyn FnMut(ReplicaId, PeerMessage)) -> Result<(), ControlError> {
        self.seen = None;
        self.recover(now)?;
        self.take_chunk()?;
        self.plan(now);
        self.record_events(now);
        self.ask_for_reads(now);
        self.raft_touched = false;
        let output = self.replica.process(&mut |message| {
            send(ReplicaId(message.to), PeerMessage::Raft(message.encode_to_vec()));
        })?;
        self.note_leadership(now);
        for (ticket, answer) in output.answers {
            self.answered(now, ticket, answer);
        }
        if output.installed {
            self.everything_is_new();
        }
        self.note(output.effects);
        self.announce_members();
        self.confirmed_reads(now, output.reads);
        if let Some(why) = self.replica.full().map(str::to_owned) {
            self.refuse_for_lack_of_room(now, &why);
        }
        self.give_orders();
        self.serve_watches();
        self.exchange_chunks(now)?;
        self.look_after_history(now);
        self.report(now);
        if self.replica.was_removed() || self.is_revoked(Member::Coordinator(self.me())) {
            self.leave(now);
        }
        Ok(())
    }

    /// There is work left that waits for no input: call `process` again when its actions are under way.
    pub fn busy(&self) -> bool {
        let waits = self.raft_touched || self.plans_at_once() || self.reads.are_busy();
        !self.has_left() && (waits || self.watches.are_busy() || self.agents.are_busy())
    }

    fn recover(&mut self, now: Now) -> Result<(), ControlError> {
        let due = now.mono_ms.saturating_sub(self.recovered_ms) >= RECOVER_EVERY_MS;
        if due && self.replica.full().is_some() && !matches!(self.room, Room::None(_)) {
            self.recovered_ms = now.mono_ms;
            self.replica.recover()?;
        }
        Ok(())
    }

    /// Notes who leads since the last round. Asks follow the leader at once, and the leader's own plans end with its leadership.
    fn note_leadership(&mut self, now: Now) {
        let term = self.replica.term();
        match &self.lead {
            Some(lead) if lead.term != term || !self.replica.leads() => {
                self.lead = None;
                self.drop_leaders_asks();
                (self.decisions, self.promoting) = (0, false);
                self.forgets.under_way = false;
            }
            None if self.replica.leads() => {
                self.lead = Some(Lead { term, since_ms: now.mono_ms });
                self.observations.begin_anew();
                self.plan_now = true;
            }
            _ => {}
        }
        let follows = (self.replica.leader(), term);
        if self.followed != follows {
            self.followed = follows;
            if let Some(leads) = self.replica.leader().map(|leader| (leader, term))
                && let Some(before) = self.led.replace(leads)
            {
                self.leader_changes += u64::from(before != leads);
            }
            // First who is there, then what they want.
            self.report(now);
            self.look_after_asks(now);
            if let Some(leader) = self.replica.leader().map(ReplicaId).filter(|leader| *leader != self.me()) {
                self.compare_past_with(leader);
            }
        }
        self.note_past();
    }

    fn note(&mut self, effects: Vec<Effect>) {
        let mut nodes: BTreeSet<NodeId> = BTreeSet::new();
        let mut jobs: BTreeSet<JobId> = BTreeSet::new();
        let mut members = false;
        let mut admitted = Vec::new();
        for effect in effects {
            match effect {
                Effect::Plan => self.plan_now = true,
                Effect::Node(node) => drop(nodes.insert(node)),
                Effect::Job(job) => drop(jobs.insert(job)),
                Effect::Members => members = true,
                Effect::Admitted(member) => admitted.push(member),
            }
        }
        self.wake_agents(nodes.into_iter());
        self.wake_watches(&jobs);
        if !admitted.is_empty() {
            self.out.push(Action::Admitted(admitted));
        }
        if members {
            self.members_are_new();
        }
    }

    fn members_are_new(&mut self) {
        self.members_changed = true;
        self.close_revoked_agents();
    }

    /// The driver acts on what cannot be forgotten: who is refused for good relies on it.
    fn announce_members(&mut self) {
        if self.members_changed && self.replica.full().is_none() {
            self.members_changed = false;
            self.out.push(Action::Members);
        }
    }

    /// The state was replaced as a whole, by a snapshot.
    fn everything_is_new(&mut self) {
        self.plan_now = true;
        self.wake_all_watches();
        self.wake_all_agents();
        self.members_are_new();
    }

    pub fn state(&self) -> &State {
        self.replica.state()
    }

    pub fn replica(&self) -> &Replica<D> {
        &self.replica
    }

    pub fn history(&self) -> &History<D> {
        &self.history
    }

    /// Why nothing, or not everything, can be written here.
    fn read_only(&self) -> Option<&str> {
        self.replica.full().or(self.room.why())
    }

    /// The disk cannot be written, and the others go on without this replica: what it knows may be old.
    fn is_stuck(&self) -> bool {
        self.replica.full().is_some() && !self.replica.is_alone()
    }

    pub fn status(&self) -> Status {
        Status {
            leader: self.replica.leader().map(ReplicaId),
            term: self.replica.term(),
            commit_index: self.replica.commit_index(),
            applied_index: self.replica.applied_index(),
            leading_since_ms: self.lead.as_ref().map(|lead| lead.since_ms),
            voter: self.replica.is_voter(),
            read_only: self.read_only().map(str::to_owned),
            damaged: self.repairs.damaged(),
            damaged_tables: self.repairs.damaged_tables(),
            rows_mended: self.repairs.mended(),
            removed: self.leaving.as_ref().map(|leaving| leaving.why.clone()),
            contradictions: self.contradictions,
            unreadable_snapshot: self.replica.unreadable_snapshot().map(str::to_owned),
            contradicting: self.contradicting.values().next().cloned(),
            http: self.http.clone(),
            agents: self.agents.len(),
            calls: self.calls.len(),
        }
    }
}

/// A number that is as good as random (SplitMix64's mixer, Steele et al. 2014).
fn spread(seed: u64) -> u64 {
    let z = seed.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests;
