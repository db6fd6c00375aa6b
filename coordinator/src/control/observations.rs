//! What was seen of the agents, here and at the other coordinators. Never in the log: all of it may be lost, and a new leader gets it
//! told anew within a report's time.
//!
//! Every coordinator reports to the leader what has changed; the leader puts the reports together. Only ages travel, so no clock is
//! compared with another, and a report that was long under way makes a node look younger than it is, never older.

use super::peer::{Report, SIGHTINGS_MAX, Sighting};
use super::{Action, Control, Now, PeerMessage};
use crate::planner::{LEASE_MS, Observed, Seen};
use crate::raft::disk::Disk;
use fleet_common::ids::{NodeId, ReplicaId};
use std::collections::{BTreeMap, BTreeSet};

/// Between two reports to the leader.
pub(super) const REPORT_EVERY_MS: u64 = 250;
/// A report that was not taken after this long is made again.
const REPORT_RETRY_MS: u64 = 500;
/// What a coordinator said of its agents' connections counts for this long; then they are taken for out of touch.
const REPORT_FRESH_MS: u64 = 1_500;
/// Agents that left are remembered for this long, so that everybody hears of it.
const REMEMBER_MS: u64 = 2 * LEASE_MS;

#[derive(Default)]
pub(super) struct Observations {
    /// Agents held here, and those that left lately.
    own: BTreeMap<NodeId, Seen>,
    /// Of the agents held here, those whose sighting the leader has not got.
    changed: BTreeSet<NodeId>,
    /// To whom, and in which term, reports go.
    leader: Option<(ReplicaId, u64)>,
    whole_due: bool,
    /// The next report shall not wait for its time.
    urgent: bool,
    in_flight: Option<InFlight>,
    last_seq: u64,
    last_report_ms: u64,
    /// On the leader: what the others report.
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
    nodes: BTreeMap<NodeId, Seen>,
}

impl Observations {
    /// The agent is there, and will be connected when its greeting is over. The leader hears of it at once: it shall not call the
    /// node lost for what was before.
    pub fn greets(&mut self, node: NodeId, now: Now) {
        let connected = self.own.get(&node).is_some_and(|seen| seen.connected);
        self.see(node, Seen { connected, heard_ms: now.mono_ms });
        self.urgent = true;
    }

    pub fn connected(&mut self, node: NodeId, now: Now) {
        self.see(node, Seen { connected: true, heard_ms: now.mono_ms });
    }

    pub fn heard(&mut self, node: NodeId, now: Now) {
        if self.own.get(&node).is_some_and(|seen| seen.connected) {
            self.see(node, Seen { connected: true, heard_ms: now.mono_ms });
        }
    }

    pub fn disconnected(&mut self, node: NodeId) {
        if let Some(seen) = self.own.get(&node) {
            let heard_ms = seen.heard_ms;
            self.see(node, Seen { connected: false, heard_ms });
        }
    }

    fn see(&mut self, node: NodeId, seen: Seen) {
        self.own.insert(node, seen);
        self.changed.insert(node);
    }

    /// The best that is known of every node: connected if anybody holds its agent, heard when it was heard last by anybody.
    pub fn merged(&self, now: Now, leader_since_ms: u64) -> Observed {
        let mut nodes = self.own.clone();
        for other in self.others.values() {
            let fresh = now.mono_ms.saturating_sub(other.reported_ms) <= REPORT_FRESH_MS;
            for (node, seen) in &other.nodes {
                let best = nodes.entry(*node).or_insert(Seen { connected: false, heard_ms: seen.heard_ms });
                best.connected |= seen.connected && fresh;
                best.heard_ms = best.heard_ms.max(seen.heard_ms);
            }
        }
        Observed { leader_since_ms, nodes }
    }

    /// Anybody holds the node's agent, as far as is known here.
    pub fn is_connected(&self, node: NodeId, now: Now) -> bool {
        let connected = |nodes: &BTreeMap<NodeId, Seen>| nodes.get(&node).is_some_and(|seen| seen.connected);
        let fresh = |other: &&Other| now.mono_ms.saturating_sub(other.reported_ms) <= REPORT_FRESH_MS;
        connected(&self.own) || self.others.values().filter(fresh).any(|other| connected(&other.nodes))
    }

    pub fn reported_lately(&self, replica: ReplicaId, now: Now) -> bool {
        self.others
            .get(&replica)
            .is_some_and(|other| now.mono_ms.saturating_sub(other.reported_ms) <= REPORT_FRESH_MS)
    }

    /// Coordinators that could lead: heard lately, and with room for writes.
    pub fn fit_to_lead(&self, replica: ReplicaId, now: Now) -> bool {
        self.reported_lately(replica, now) && self.others.get(&replica).is_some_and(|other| !other.read_only)
    }

    /// On the leader: those that said lately whether they can write.
    pub fn writers(&self, now: Now) -> impl Iterator<Item = (ReplicaId, bool)> {
        let fresh = move |other: &Other| now.mono_ms.saturating_sub(other.reported_ms) <= REPORT_FRESH_MS;
        self.others.iter().filter(move |(_, other)| fresh(other)).map(|(id, other)| (*id, !other.read_only))
    }

    fn take(&mut self, from: ReplicaId, report: Report, now: Now) {
        let other = self.others.entry(from).or_default();
        if !report.whole && report.seq < other.seq {
            return;
        }
        if report.whole {
            other.nodes.clear();
        }
        other.seq = report.seq;
        other.reported_ms = now.mono_ms;
        other.read_only = report.read_only;
        for Sighting { node, connected, heard_ms_ago } in report.nodes {
            let heard_ms = now.mono_ms.saturating_sub(heard_ms_ago);
            other.nodes.insert(node, Seen { connected, heard_ms });
        }
    }

    /// Forgets agents that left long ago.
    pub fn forget(&mut self, now: Now) {
        let keep = |_: &NodeId, seen: &mut Seen| {
            seen.connected || now.mono_ms.saturating_sub(seen.heard_ms) < REMEMBER_MS
        };
        self.own.retain(keep);
        self.others.values_mut().for_each(|other| other.nodes.retain(keep));
        self.others.retain(|_, other| now.mono_ms.saturating_sub(other.reported_ms) < REMEMBER_MS);
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
            if !self.urgent && now.mono_ms.saturating_sub(report.sent_ms) < REPORT_RETRY_MS {
                return None;
            }
            self.changed.extend(&report.nodes);
        }
        self.urgent = false;
        if self.whole_due {
            self.changed = self.own.keys().copied().collect();
        }
        let told: Vec<NodeId> = self.changed.iter().copied().take(SIGHTINGS_MAX).collect();
        let sighting = |node: &NodeId| {
            let seen = self.own.get(node)?;
            let heard_ms_ago = now.mono_ms.saturating_sub(seen.heard_ms);
            Some(Sighting { node: *node, connected: seen.connected, heard_ms_ago })
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
        let leader_since_ms = self.lead.as_ref().map_or(now.mono_ms, |lead| lead.since_ms);
        self.observations.merged(now, leader_since_ms)
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
        self.observations.take(from, report, now);
        self.out.push(Action::ToPeer { to: from, message: PeerMessage::ObservationsTaken { seq } });
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
