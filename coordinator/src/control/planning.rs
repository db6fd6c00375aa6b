//! Asks the planner again and again while this replica leads, and proposes what it decides.

use super::asks::{Asker, Outcome, What};
use super::{Action, Control, Now, Room};
use crate::cluster::Answer;
use crate::planner::{self, Why};
use crate::raft::disk::Disk;
use fleet_common::protocol::Refusal;

/// At the latest; wake-ups come sooner. Leases run out without one.
const PLAN_EVERY_MS: u64 = 250;
/// A process that stood still for so long has lost its connections, and one that could not plan for so long, because its disk was full or what
/// it had decided was under way, was no leader that the others report to. Neither can say that anybody was silent meanwhile.
const STANDSTILL_MS: u64 = 2_000;
/// Nodes for which a plan may take a millisecond: a large cluster that reconnects does not plan at every greeting.
const NODES_PER_MS: u64 = 100;
/// Decisions of one round; the rest is decided in the next one.
const DECISIONS_MAX: usize = 256;

impl<D: Disk> Control<D> {
    /// Plans if it is time to.
    pub(super) fn plan(&mut self, now: Now) {
        let gap_ms = if self.plan_now { self.plan_gap_ms().min(PLAN_EVERY_MS) } else { PLAN_EVERY_MS };
        if now.mono_ms.saturating_sub(self.planned_ms) < gap_ms || !self.may_plan() {
            return;
        }
        if now.mono_ms.saturating_sub(self.planned_ms) >= STANDSTILL_MS {
            self.observations.begin_anew();
        }
        (self.plan_now, self.planned_ms) = (false, now.mono_ms);
        let there = self.replica.state().nodes().iter().filter(|(_, record)| !record.lost);
        self.observations.expect(there.map(|(node, _)| *node), now);
        // What is reported while there is no room for it is heard when there is.
        let heard = matches!(self.room, Room::Enough);
        self.observations.await_reports(self.replica.state().unreported().filter(|_| heard), now);
        self.observations.await_stops(self.replica.state().stuck_stops(), now);
        let observed = self.observed(now);
        let mut planned = planner::plan(self.replica.state(), &observed, now.mono_ms, now.unix_ms);
        if !matches!(self.room, Room::Enough) {
            planned.retain(|(change, _)| change.frees(self.replica.state()));
        }
        planned.truncate(DECISIONS_MAX);
        self.decisions = planned.len();
        for (change, why) in planned {
            self.ask(now, Asker::Planner(why.clone()), What::decision(change, why));
        }
    }

    /// The next round will plan, whenever it comes.
    pub(super) fn plans_at_once(&self) -> bool {
        self.plan_now && self.plan_gap_ms() == 0 && self.may_plan()
    }

    /// Never while earlier decisions are under way: they would be made twice.
    fn may_plan(&self) -> bool {
        let writes = self.replica.full().is_none() && !matches!(self.room, Room::None(_));
        self.lead.is_some() && self.decisions == 0 && writes
    }

    fn plan_gap_ms(&self) -> u64 {
        self.replica.state().nodes().len() as u64 / NODES_PER_MS
    }

    pub(super) fn planned(&mut self, why: Why, result: Result<Outcome, Refusal>) {
        self.decisions = self.decisions.saturating_sub(1);
        // What is refused has been overtaken; the next round sees how things are.
        if matches!(result, Ok(Outcome::Answer(answer)) if !matches!(answer, Answer::Rejected(_))) {
            self.out.push(Action::Decided(why));
        }
    }
}
