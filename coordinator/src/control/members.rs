//! Which coordinators there are: this one's record of itself, promotion of learners that have caught up, removal, and whom leadership
//! goes to. One change at a time, and none that would leave fewer than a majority of those that are heard.

use super::asks::{Asker, Outcome, Unproposed, What, invalid, unavailable};
use super::{Action, Control, Now, PeerMessage, SERVES_LEVEL};
use crate::cluster::Answer;
use crate::cluster::Command;
use crate::cluster::admitted::Membership;
use crate::cluster::commands::{COMMAND_LEVEL, Change, DescribeReplica, PromoteReplica, RegisterReplica};
use crate::cluster::members::{Standing, clip};
use crate::planner::Why;
use crate::raft::disk::Disk;
use crate::raft::replica::{self, Declined, Ticket};
use fleet_common::ids::ReplicaId;
use fleet_common::protocol::{Member, Refusal, RefusalKind};
use std::sync::Arc;

/// Between attempts to have this coordinator's record set right.
const DESCRIBE_EVERY_MS: u64 = 1_000;
/// Between looks at the learners, and at who should lead.
const LOOK_EVERY_MS: u64 = 250;
/// A learner that lacks no more entries than this has caught up: some rounds of a busy cluster.
const CAUGHT_UP: u64 = 1_000;

impl<D: Disk> Control<D> {
    pub(super) fn me(&self) -> ReplicaId {
        ReplicaId(self.replica.id())
    }

    /// Part of the cluster as far as is known here.
    pub(super) fn is_member(&self) -> bool {
        self.is_in_raft(self.me())
    }

    fn is_in_raft(&self, replica: ReplicaId) -> bool {
        let conf = self.replica.conf();
        conf.voters.contains(&replica.0) || conf.learners.contains(&replica.0)
    }

    /// Whether the cluster's record has another address of this coordinator, at which the others look for it.
    pub(super) fn has_moved(&self) -> bool {
        let record = self.replica.state().replicas().get(&self.me());
        record.is_some_and(|record| record.address != self.myself.address)
    }

    pub(super) fn is_revoked(&self, member: Member) -> bool {
        self.replica.state().membership(member) == Membership::Revoked
    }

    /// Sees to it that the cluster's record of this coordinator is right: it is registered, with its address and what it knows.
    pub(super) fn describe_myself(&mut self, now: Now) {
        if self.describing || now.mono_ms < self.describe_at_ms {
            return;
        }
        self.describe_at_ms = now.mono_ms + DESCRIBE_EVERY_MS;
        let (address, version) = (self.myself.address.clone(), self.myself.version.clone());
        let level = COMMAND_LEVEL;
        let change = match self.replica.state().replicas().get(&self.me()) {
            None => {
                let name = self.myself.name.clone();
                Change::RegisterReplica(RegisterReplica { address, name, version, level })
            }
            Some(record)
                if record.address != address || record.version != clip(&version) || record.level != level =>
            {
                Change::DescribeReplica(DescribeReplica { address, version, level })
            }
            Some(_) => match self.ca_to_report() {
                Some(change) => change,
                None => return,
            },
        };
        self.describing = true;
        self.ask(now, Asker::Myself, What::change(None, change));
    }

    /// Every coordinator can say where all of them are scraped.
    pub(super) fn tell_where_i_serve(&mut self) {
        let me = self.me();
        let others = self.replica.state().replicas().iter();
        let others = others.filter(|(id, record)| **id != me && record.level >= SERVES_LEVEL);
        for to in others.map(|(id, _)| *id).collect::<Vec<_>>() {
            let http = self.myself.http.clone();
            self.out.push(Action::ToPeer { to, message: PeerMessage::Serves { http } });
        }
    }

    pub(super) fn serves(&mut self, from: ReplicaId, http: &str) {
        let http = clip(http);
        if self.http.get(&from) != Some(&http) {
            let known = Arc::make_mut(&mut self.http);
            known.insert(from, http);
            let state = self.replica.state();
            known.retain(|id, _| {
                *id == from || *id == ReplicaId(self.replica.id()) || state.replicas().contains_key(id)
            });
        }
    }

    pub(super) fn described(&mut self) {
        self.describing = false;
    }

    /// Promotes who has caught up, and gives leadership away if this replica cannot write.
    pub(super) fn look_after_members(&mut self, now: Now) {
        if self.lead.is_none() || now.mono_ms.saturating_sub(self.members_ms) < LOOK_EVERY_MS {
            return;
        }
        self.members_ms = now.mono_ms;
        if self.read_only().is_some() {
            return self.hand_over(now);
        }
        if self.promoting {
            return;
        }
        let commit = self.replica.commit_index();
        let ready = self.replica.progress().into_iter().find(|peer| {
            let known = self.replica.state().replicas().get(&ReplicaId(peer.id));
            !peer.voter
                && !peer.snapshot_pending
                && peer.matched + CAUGHT_UP >= commit
                && self.is_active(peer, now)
                && known.is_some_and(|record| record.standing == Standing::Learner)
        });
        if let Some(peer) = ready {
            let replica = ReplicaId(peer.id);
            let why = format!("{replica} has caught up and gets its vote");
            let change = Change::PromoteReplica(PromoteReplica { replica });
            self.promoting = true;
            self.ask(now, Asker::Members(why.clone()), What::decision(change, why));
        }
    }

    pub(super) fn members_changed(&mut self, why: Why, result: Result<Outcome, Refusal>) {
        self.promoting = false;
        if matches!(result, Ok(Outcome::Answer(answer)) if !matches!(answer, Answer::Rejected(_))) {
            self.out.push(Action::Decided(why));
        }
    }

    /// Heard lately. Raft's own mark is wiped at every election timeout, so a report counts as well.
    pub(super) fn is_active(&self, peer: &replica::Progress, now: Now) -> bool {
        peer.recent_active || self.observations.reported_lately(ReplicaId(peer.id), now)
    }

    /// Gives leadership to the voter that is most up to date among those that can write.
    pub(super) fn hand_over(&mut self, now: Now) {
        if let Some(to) = self.successor(now) {
            self.replica.transfer_leadership(to.0);
        }
    }

    fn successor(&self, now: Now) -> Option<ReplicaId> {
        let peers = self
            .replica
            .progress()
            .into_iter()
            .filter(|peer| peer.voter && self.observations.fit_to_lead(ReplicaId(peer.id), now));
        peers.max_by_key(|peer| (peer.matched, peer.id)).map(|peer| ReplicaId(peer.id))
    }

    /// Puts a command into the leader's log that may change the members.
    pub(super) fn propose_by_kind(
        &mut self,
        now: Now,
        ticket: Ticket,
        command: &Command,
    ) -> Result<Result<(), Declined>, Unproposed> {
        // What was done already is only looked up, whatever stands in its way now.
        if command.request.is_some_and(|stamp| self.state().has_answered(stamp.id)) {
            return Ok(self.replica.propose(ticket, command));
        }
        let change = match &command.change {
            Change::DescribeNode(it) => {
                self.may_describe(now, it)?;
                self.observations.speaks(it.node, now);
                return Ok(self.replica.propose(ticket, command));
            }
            Change::RegisterReplica(it) if !self.is_in_raft(it.address.replica) => {
                replica::Membership::AddLearner(it.address.replica.0)
            }
            Change::PromoteReplica(it) if self.replica.conf().learners.contains(&it.replica.0) => {
                replica::Membership::Promote(it.replica.0)
            }
            // Before its preconditions: the change under way may be this one, asked for at another coordinator.
            Change::RemoveReplica(_) if self.replica.is_changing_members() => {
                return Ok(Err(Declined::Pending));
            }
            Change::RemoveReplica(it) if self.is_in_raft(it.replica) => {
                self.may_remove(now, it.replica)?;
                replica::Membership::Remove(it.replica.0)
            }
            _ => return Ok(self.replica.propose(ticket, command)),
        };
        Ok(self.replica.propose_membership(ticket, change, command))
    }

    /// Refuses a removal that would leave no majority of voters that are heard. A leader gives its leadership away first.
    fn may_remove(&mut self, now: Now, replica: ReplicaId) -> Result<(), Unproposed> {
        let voters = &self.replica.conf().voters;
        let stay: Vec<u64> = voters.iter().copied().filter(|voter| *voter != replica.0).collect();
        let peers = self.replica.progress();
        let active = |peer: &replica::Progress| stay.contains(&peer.id) && self.is_active(peer, now);
        let me = usize::from(stay.contains(&self.replica.id()));
        let heard = me + peers.iter().filter(|peer| active(peer)).count();
        if stay.is_empty() {
            let why = format!("{replica} is the only coordinator that votes; add another one first");
            return Err(Unproposed::Refused(invalid(why)));
        }
        if voters.contains(&replica.0) && heard <= stay.len() / 2 {
            let why = format!(
                "without {replica} the cluster could decide nothing: of the {} voting coordinators that would be left only {heard} {} heard; bring the others back first",
                stay.len(),
                if heard == 1 { "is" } else { "are" }
            );
            return Err(Unproposed::Refused(Refusal { kind: RefusalKind::Later, message: why }));
        }
        if replica == self.me() {
            // Where nobody can take everything, somebody who is heard will do: this is taken in the reserve.
            let heard =
                || peers.iter().filter(|peer| active(peer)).max_by_key(|peer| (peer.matched, peer.id));
            let next = self.successor(now).or_else(|| heard().map(|peer| ReplicaId(peer.id)));
            let Some(next) = next else {
                let why = "no other coordinator can lead at the moment; try again";
                return Err(Unproposed::Refused(unavailable(why)));
            };
            self.replica.transfer_leadership(next.0);
            return Err(Unproposed::Elsewhere);
        }
        Ok(())
    }
}
