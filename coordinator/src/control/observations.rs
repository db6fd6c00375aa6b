//! What was seen of the agents, here and at the other coordinators. Never in the log: all of it may be lost, and a new leader gets it
//! told anew within a report's time.
//!
//! Two facts, kept apart. Who holds a node's agent changes with every report. When a node was heard last only ever grows: whatever
//! is reported, forgotten, restarted or handed over can make a node look younger than it is, never older. Only ages travel, so no
//! clock is compared with another, and every coordinator tells a new leader all that it knows, not only of its own agents.
//!
//! The leader counts a node's silence from when that node could have been heard: from its registration or its return, from the
//! beginning of this leadership, from when this process went on after it stood still or could not write.

use super::peer::{Report, SIGHTINGS_MAX, Sighting};
use super::{Action, Control, Now, PeerMessage};
use crate::planner::{LEASE_MS, Observed, PartId, Seen};
use crate::raft::disk::Disk;
use fleet_common::ids::{Generation, JobId, NodeId, ReplicaId};
use std::collections::{BTreeMap, BTreeSet};

/// Between two reports to the leader.
pub(super) const REPORT_EVERY_MS: u64 = 250;
/// A report that was not taken after this long is made again.
const REPORT_RETRY_MS: u64 = 500;
/// What a coordinator said of its agents' connections counts for this long; then they are taken for out of touch.
const REPORT_FRESH_MS: u64 = 1_500;
/// What was heard is remembered for this long: twice what the planner asks for.
const REMEMBER_MS: u64 = 2 * LEASE_MS;

#[derive(Default)]
pub(super) struct Observations {
    /// Nodes whose agents are held here.
    held: BTreeSet<NodeId>,
    /// When each node was heard last by anybody, as far as is known here.
    heard: BTreeMap<NodeId, u64>,
    /// On the leader: since when it could have heard each node that it counts on.
    expected: BTreeMap<NodeId, u64>,
    /// On the leader: since when each part of a gang whose report is due could have made it.
    unreported: BTreeMap<PartId, u64>,
    /// On the leader: since when each gang that was asked to stop is seen to stand still.
    stuck: BTreeMap<(JobId, Generation), u64>,
    /// What the leader has not got yet.
    changed: BTreeSet<NodeId>,
    /// To whom, and in which term, reports go.
    leader: Option<(ReplicaId, u64)>,
    whole_due: bool,
    /// The next report shall not wait for its time.
    urgent: bool,
    in_flight: Option<InFlight>,
    last_seq: u64,
    last_report_ms: u64,
    /// On the leader: what the others report of themselves.
    others: BTreeMap<ReplicaId, Other>,
}

struct InFlight {
    seq: u64,
    whole: bool,
    sent_ms: u64,
    nodes: Vec<NodeId>,
}

#[derive(Default)]
struct Other {
    reported_ms: u64,
    seq: u64,
    read_only: bool,
    holds: BTreeSet<NodeId>,
}

impl Other {
    fn is_fresh(&self, now: Now) -> bool {
        now.mono_ms.saturating_sub(self.reported_ms) <= REPORT_FRESH_MS
    }
}

impl Observations {
    /// The agent is there, and will be connected when its greeting is over. The leader hears of it at once: it shall not call the
    /// node lost for what was before.
    pub fn greets(&mut self, node: NodeId, now: Now) {
        self.hear(node, now.mono_ms);
        self.changed.insert(node);
        self.urgent = true;
    }

    pub fn connected(&mut self, node: NodeId, now: Now) {
        self.held.insert(node);
        self.heard(node, now);
    }

    pub fn heard(&mut self, node: NodeId, now: Now) {
        if self.held.contains(&node) {
            self.hear(node, now.mono_ms);
            self.changed.insert(node);
        }
    }

    pub fn disconnected(&mut self, node: NodeId) {
        if self.held.remove(&node) {
            self.changed.insert(node);
        }
    }

    /// On the leader: what another coordinator passes on for this node's agent shows that it is there.
    pub fn speaks(&mut self, node: NodeId, now: Now) {
        self.hear(node, now.mono_ms);
    }

    fn hear(&mut self, node: NodeId, at_ms: u64) {
        let heard_ms = self.heard.entry(node).or_default();
        *heard_ms = at_ms.max(*heard_ms);
    }

    /// On the leader: these nodes should be there. Each gets a whole lease from when it is expected first.
    pub fn expect(&mut self, nodes: impl Iterator<Item = NodeId>, now: Now) {
        let known = std::mem::take(&mut self.expected);
        let since = |node| (node, known.get(&node).copied().unwrap_or(now.mono_ms));
        self.expected = nodes.map(since).collect();
    }

    /// On the leader: these parts of gangs should say where their ranks can be called. Each whose node is connected has the whole time from
    /// when that is so.
    pub fn await_reports(&mut self, parts: impl Iterator<Item = PartId>, now: Now) {
        let known = std::mem::take(&mut self.unreported);
        let connected = parts.filter(|(_, node)| self.is_connected(*node, now));
        let since = |part| (part, known.get(&part).copied().unwrap_or(now.mono_ms));
        self.unreported = connected.map(since).collect();
    }

    /// On the leader: these gangs were asked to stop, and stand still.
    pub fn await_stops(&mut self, stuck: impl Iterator<Item = (JobId, Generation)>, now: Now) {
        let known = std::mem::take(&mut self.stuck);
        let since = |gang| (gang, known.get(&gang).copied().unwrap_or(now.mono_ms));
        self.stuck = stuck.map(since).collect();
    }

    /// No silence counts from before now.
    pub fn begin_anew(&mut self) {
        self.stuck.clear();
        self.expected.clear();
        self.unreported.clear();
    }

    /// All that is known of every node: connected if anybody holds its agent, heard when it was heard last by anybody.
    pub fn merged(&self, now: Now) -> Observed {
        let heard = self.heard.iter().map(|(node, ms)| (*node, Seen { connected: false, heard_ms: *ms }));
        let mut nodes: BTreeMap<NodeId, Seen> = heard.collect();
        let others = self.others.values().filter(|other| other.is_fresh(now));
        for node in others.flat_map(|other| &other.holds).chain(&self.held) {
            if let Some(seen) = nodes.get_mut(node) {
                seen.connected = true;
            }
        }
        Observed {
            nodes,
            counted_from_ms: self.expected.clone(),
            unreported_ms: self.unreported.clone(),
            stuck_ms: self.stuck.clone(),
        }
    }

    /// Anybody holds the node's agent, as far as is known here.
    pub fn is_connected(&self, node: NodeId, now: Now) -> bool {
        let mut others = self.others.values().filter(|other| other.is_fresh(now));
        self.held.contains(&node) || others.any(|other| other.holds.contains(&node))
    }

    pub fn reported_lately(&self, replica: ReplicaId, now: Now) -> bool {
        self.others.get(&replica).is_some_and(|other| other.is_fresh(now))
    }

    /// Coordinators that could lead: heard lately, and with room for writes.
    pub fn fit_to_lead(&self, replica: ReplicaId, now: Now) -> bool {
        self.others.get(&replica).is_some_and(|other| other.is_fresh(now) && !other.read_only)
    }

    /// On the leader: those that said lately whether they can write.
    pub fn writers(&self, now: Now) -> impl Iterator<Item = (ReplicaId, bool)> {
        let fresh = self.others.iter().filter(move |(_, other)| other.is_fresh(now));
        fresh.map(|(id, other)| (*id, !other.read_only))
    }

    /// Whether the report counts. One that does not fits no more to what its sender told before; a whole one is to follow.
    fn take(&mut self, from: ReplicaId, report: Report, now: Now) -> bool {
        for Sighting { node, heard_ms_ago, .. } in &report.nodes {
            self.hear(*node, now.mono_ms.saturating_sub(*heard_ms_ago));
        }
        let other = self.others.entry(from).or_default();
        if !report.whole && report.seq <= other.seq {
            return report.seq == other.seq;
        }
        if report.whole {
            other.holds.clear();
        }
        other.seq = report.seq;
        other.reported_ms = now.mono_ms;
        other.read_only = report.read_only;
        for Sighting { node, connected, .. } in report.nodes {
            match connected {
                true => other.holds.insert(node),
                false => other.holds.remove(&node),
            };
        }
        true
    }

    /// Forgets what counts no more.
    pub fn forget(&mut self, now: Now) {
        let recent = |at_ms: u64| now.mono_ms.saturating_sub(at_ms) < REMEMBER_MS;
        let Observations { held, heard, changed, others, .. } = self;
        heard.retain(|node, heard_ms| held.contains(node) || recent(*heard_ms));
        changed.retain(|node| heard.contains_key(node));
        others.retain(|_, other| recent(other.reported_ms));
    }

    fn taken(&mut self, from: ReplicaId, seq: u64) {
        if self.leader.is_some_and(|(leader, _)| leader == from)
            && let Some(report) = self.in_flight.take_if(|report| report.seq == seq)
        {
            self.whole_due &= !report.whole;
        }
    }

    /// The next report, if one is due.
    fn report(&mut self, to: (ReplicaId, u64), read_only: bool, now: Now) -> Option<Report> {
        if self.leader != Some(to) {
            self.leader = Some(to);
            self.whole_due = true;
            self.in_flight = None;
        } else if !self.urgent && now.mono_ms.saturating_sub(self.last_report_ms) < REPORT_EVERY_MS {
            return None;
        }
        if let Some(report) = &self.in_flight {
            let late = now.mono_ms.saturating_sub(report.sent_ms) >= REPORT_RETRY_MS;
            if !self.urgent && !late {
                return None;
            }
            // Lost on its way, or not what the leader can use: it is told all anew.
            self.whole_due |= late;
            self.changed.extend(&report.nodes);
        }
        self.urgent = false;
        if self.whole_due {
            self.changed = self.heard.keys().copied().collect();
        }
        let told: Vec<NodeId> = self.changed.iter().copied().take(SIGHTINGS_MAX).collect();
        let sighting = |node: &NodeId| {
            let heard_ms_ago = now.mono_ms.saturating_sub(*self.heard.get(node)?);
            Some(Sighting { node: *node, connected: self.held.contains(node), heard_ms_ago })
        };
        let nodes = told.iter().filter_map(sighting).collect();
        for node in &told {
            self.changed.remove(node);
        }
        self.last_seq += 1;
        self.last_report_ms = now.mono_ms;
        let (seq, whole) = (self.last_seq, self.whole_due);
        self.in_flight = Some(InFlight { seq, whole, sent_ms: now.mono_ms, nodes: told });
        Some(Report { seq, whole, nodes, read_only })
    }
}

impl<D: Disk> Control<D> {
    /// All that is known here. Only the leader knows of agents at other coordinators, and only it calls anybody silent.
    pub(super) fn observed(&self, now: Now) -> Observed {
        self.observations.merged(now)
    }

    /// Tells the leader what has changed.
    pub(super) fn report(&mut self, now: Now) {
        let Some(leader) = self.replica.leader().filter(|_| self.leaving.is_none()) else { return };
        if leader == self.replica.id() {
            return self.is_in_touch(now);
        }
        let (to, read_only) = (ReplicaId(leader), self.read_only().is_some());
        if let Some(report) = self.observations.report((to, self.replica.term()), read_only, now) {
            self.out.push(Action::ToPeer { to, message: PeerMessage::Observations(report) });
        }
    }

    pub(super) fn take_report(&mut self, now: Now, from: ReplicaId, report: Report) {
        if self.replica.leader() != Some(self.replica.id()) || report.nodes.len() > SIGHTINGS_MAX {
            return;
        }
        let seq = report.seq;
        self.plan_now |= report.whole;
        if self.observations.take(from, report, now) {
            self.out.push(Action::ToPeer { to: from, message: PeerMessage::ObservationsTaken { seq } });
        }
    }

    pub(super) fn report_taken(&mut self, now: Now, from: ReplicaId, seq: u64) {
        if self.replica.leader() == Some(from.0) {
            self.is_in_touch(now);
        }
        self.observations.taken(from, seq);
    }

    /// The leader is here or answers, and what it decides can be applied.
    fn is_in_touch(&mut self, now: Now) {
        if !self.is_stuck() {
            self.in_touch_ms = now.mono_ms;
        }
    }
}
