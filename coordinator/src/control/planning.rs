//! Asks the planner again and again while this replica leads, and proposes what it decides.

use super::asks::{Asker, Outcome, What};
use super::{Action, Control, Now};
use crate::cluster::Answer;
use crate::planner::{self, Why};
use crate::raft::disk::Disk;
use fleet_common::protocol::Refusal;

/// At the latest; wake-ups come sooner. Leases run out without one.
const PLAN_EVERY_MS: u64 = 250;
/// Decisions of one round; the rest is decided in the next one.
const DECISIONS_MAX: usize = 256;

impl<D: Disk> Control<D> {
    /// Plans if it is time to. Never while earlier decisions are under way: they would be made twice.
    pub(super) fn plan(&mut self, now: Now) {
        let due = self.plan_now || now.mono_ms.saturating_sub(self.planned_ms) >= PLAN_EVERY_MS;
        if !due || self.lead.is_none() || self.read_only().is_some() || self.decisions > 0 {
            return;
        }
        (self.plan_now, self.planned_ms) = (false, now.mono_ms);
        let observed = self.observed(now);
        let mut planned = planner::plan(self.replica.state(), &observed, now.mono_ms, now.unix_ms);
        planned.truncate(DECISIONS_MAX);
        self.decisions = planned.len();
        for (change, why) in planned {
            self.ask(now, Asker::Planner(why.clone()), What::decision(change, why));
        }
    }

    pub(super) fn planned(&mut self, why: Why, result: Result<Outcome, Refusal>) {
        self.decisions = self.decisions.saturating_sub(1);
        // What is refused has been overtaken; the next round sees how things are.
        if matches!(result, Ok(Outcome::Answer(answer)) if !matches!(answer, Answer::Rejected(_))) {
            self.out.push(Action::Decided(why));
        }
    }
}
