//! What this coordinator knows, in numbers: from its state, its observations and what it has applied. With or without a leader.

use super::{Control, Now};
use crate::cluster::records::JobRecord;
use crate::raft::disk::Disk;
use fleet_common::ids::{JobId, ReplicaId};
use fleet_common::metrics::Page;
use fleet_common::metrics::coordinator::*;
use fleet_common::protocol::JobState;

impl<D: Disk> Control<D> {
    pub fn measure(&self, now: Now) -> Page {
        let mut page = Page::default();
        self.measure_raft(now, &mut page);
        self.measure_nodes(now, &mut page);
        self.measure_jobs(now, &mut page);
        page
    }

    fn measure_raft(&self, now: Now, page: &mut Page) {
        let (status, state) = (self.status(), self.state());
        page.put(&RAFT_TERM, &[], status.term as f64);
        page.put_flag(&RAFT_IS_LEADER, &[], self.lead.is_some());
        page.put_flag(&RAFT_HAS_LEADER, &[], status.leader.is_some());
        page.put_flag(&RAFT_IS_VOTER, &[], status.voter);
        page.put(&RAFT_COMMIT_INDEX, &[], status.commit_index as f64);
        page.put(&RAFT_APPLIED_INDEX, &[], status.applied_index as f64);
        page.put(&RAFT_LEADER_CHANGES, &[], self.leader_changes as f64);
        page.put(&RAFT_PROPOSALS, &[], self.replica.proposals() as f64);
        page.put(&RAFT_CONTRADICTIONS, &[], status.contradictions as f64);
        let voters = state.voters();
        page.put(&RAFT_MEMBERS, &["voter"], voters as f64);
        page.put(&RAFT_MEMBERS, &["learner"], (state.replicas().len() - voters) as f64);
        page.put_flag(&READ_ONLY, &[], status.read_only.is_some());
        page.put(&HISTORY_DAMAGED_TABLES, &[], status.damaged_tables as f64);
        page.put(&HISTORY_MENDED_ROWS, &[], status.rows_mended as f64);
        page.put(&STATE_BYTES, &[], self.replica.state_bytes() as f64);
        page.put(&LOG_BYTES, &[], self.replica.log_bytes() as f64);
        page.put(&HISTORY_BYTES, &[], state.retention().bytes() as f64);
        page.put(&AGENTS, &[], status.agents as f64);
        if self.lead.is_none() {
            return;
        }
        let others = self.replica.progress();
        let reachable = others.iter().filter(|other| other.voter && self.is_active(other, now)).count();
        page.put(&RAFT_MEMBERS_REACHABLE, &[], (reachable + usize::from(status.voter)) as f64);
        for other in others {
            let lag = status.commit_index.saturating_sub(other.matched);
            page.put(&RAFT_MEMBER_LAG, &[&ReplicaId(other.id).to_string()], lag as f64);
        }
    }

    fn measure_nodes(&self, now: Now, page: &mut Page) {
        let nodes = self.state().nodes();
        page.put(&NODES, &[], nodes.len() as f64);
        page.put(&NODES_DRAINING, &[], nodes.values().filter(|node| node.drained).count() as f64);
        let used: u64 = self.state().slots_in_use().values().map(|slots| u64::from(*slots)).sum();
        page.put(&SLOTS_USED, &[], used as f64);
        if self.lead.is_none() {
            return;
        }
        let seen = self.observed(now);
        let (mut connected, mut slots) = (0, 0);
        for (id, node) in nodes {
            let up = seen.nodes.get(id).is_some_and(|seen| seen.connected);
            if up {
                connected += 1;
                slots += u64::from(node.slots);
            }
            page.put_flag(&NODE_UP, &[&id.to_string(), &node.name], up);
        }
        page.put(&NODES_CONNECTED, &[], f64::from(connected));
        page.put(&SLOTS, &[], slots as f64);
    }

    fn measure_jobs(&self, now: Now, page: &mut Page) {
        let (state, tally) = (self.state(), self.replica.tally());
        let unfinished = || state.jobs().iter().filter(|(_, job)| !job.state.is_final());
        for (name, wanted) in [
            ("queued", JobState::Queued),
            ("starting", JobState::Starting),
            ("running", JobState::Running),
            ("stopping", JobState::Stopping),
        ] {
            let count = unfinished().filter(|(_, job)| job.state == wanted).count();
            page.put(&JOBS, &[name], count as f64);
        }
        for (outcome, count) in
            [("succeeded", tally.succeeded), ("failed", tally.failed), ("cancelled", tally.cancelled)]
        {
            page.put(&JOBS_ENDED, &[outcome], count as f64);
        }
        let queued = unfinished().filter(|(_, job)| job.state == JobState::Queued);
        let oldest = queued.filter_map(|(id, job)| tally.queued_since(*id, job)).min();
        page.put(
            &QUEUE_OLDEST_SECONDS,
            &[],
            oldest.map_or(0.0, |since| now.unix_ms.saturating_sub(since) as f64 / 1e3),
        );
        page.put_histogram(&QUEUE_WAIT_SECONDS, &tally.waits);
        page.put(&CHECKPOINTS_RECORDED, &[], tally.checkpoints as f64);
        page.put(&CHECKPOINT_FAILURES, &[], tally.checkpoint_failures as f64);
        let checkpoints: usize = state.jobs().values().map(|job| job.checkpoints.len()).sum();
        page.put(&CHECKPOINTS, &[], checkpoints as f64);
        page.put(&EXPORTS, &[], state.retention().exports() as f64);
        page.put(&DRIFT_PROFILES, &[], state.retention().profiles() as f64);
        unfinished().for_each(|(id, job)| self.measure_job(*id, job, page));
    }

    fn measure_job(&self, id: JobId, job: &JobRecord, page: &mut Page) {
        let name = id.to_string();
        let labels = [name.as_str()];
        page.put(&JOB_RANKS, &labels, f64::from(job.world_size));
        page.put_flag(&JOB_STALLED, &labels, job.stall().is_some());
        page.put(&JOB_RESTARTS, &labels, job.generation.saturating_sub(1) as f64);
        let seconds = |unix_ms: u64| unix_ms as f64 / 1e3;
        page.put_some(&JOB_STARTED, &labels, job.placement.as_ref().map(|at| seconds(at.placed_unix_ms)));
        let newest = job.checkpoints.last();
        page.put_some(&JOB_LAST_CHECKPOINT, &labels, newest.map(|known| seconds(known.unix_ms)));
        if job.trains && job.generation > 0 {
            page.put(&JOB_STEP, &labels, job.progress.step as f64);
        }
        let total_steps = Some(job.progress.total_steps).filter(|steps| *steps > 0);
        page.put_some(&JOB_TOTAL_STEPS, &labels, total_steps.map(|steps| steps as f64));
        page.put_some(&JOB_LOSS, &labels, job.progress.loss);
        page.put_some(&JOB_EVAL_LOSS, &labels, job.progress.eval_loss);
        page.put_some(&JOB_TOKENS_PER_SECOND, &labels, job.progress.tokens_per_s);
        let Some(trend) = self.replica.tally().trend(id) else { return };
        page.put_some(&JOB_LEARNING_RATE, &labels, trend.learning_rate);
        page.put_some(&JOB_GRADIENT_NORM, &labels, trend.gradient_norm);
        page.put_some(&JOB_LAST_STEP, &labels, trend.last_step_unix_ms.map(seconds));
        for (part, seconds) in trend.times.iter().flat_map(|times| times.parts()) {
            page.put(&JOB_STEP_SECONDS, &[&name, part], seconds);
        }
    }
}
