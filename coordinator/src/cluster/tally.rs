//! What one replica has applied, counted, and what is known of the progress of its unfinished jobs beyond their records. Not part of the
//! state: it begins anew with the process.

use super::commands::Change;
use super::history::HistoryRow;
use super::records::JobRecord;
use super::{Applied, Effect, State};
use fleet_common::events::{EventBody, Outcome, Times};
use fleet_common::ids::JobId;
use fleet_common::metrics::coordinator::QUEUE_WAIT_SECONDS;
use fleet_common::protocol::JobState;
use prometheus::Histogram;
use std::collections::BTreeMap;

pub struct Tally {
    /// Entries up to here were applied before this process began, and are not counted.
    known_index: u64,
    pub succeeded: u64,
    pub failed: u64,
    pub cancelled: u64,
    pub checkpoints: u64,
    pub checkpoint_failures: u64,
    /// For how long jobs had waited for their places.
    pub waits: Histogram,
    trends: BTreeMap<JobId, Trend>,
}

/// What the events of an unfinished job told last.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Trend {
    pub learning_rate: Option<f64>,
    pub gradient_norm: Option<f64>,
    pub times: Option<Times>,
    /// By the clock of the coordinator that led.
    pub last_step_unix_ms: Option<u64>,
    step: u64,
    /// Since when it is back in the queue.
    queued_unix_ms: Option<u64>,
}

/// What a command is about that `Tally::note` cannot see in its result.
pub struct Intent {
    unix_ms: u64,
    assigns: Option<JobId>,
}

impl Intent {
    pub fn of(unix_ms: u64, change: &Change) -> Intent {
        let assigns = match change {
            Change::AssignGang(assign) => Some(assign.job),
            _ => None,
        };
        Intent { unix_ms, assigns }
    }
}

impl Tally {
    /// Of a replica whose log was committed up to this index when it was opened.
    pub fn new(known_index: u64) -> Tally {
        Tally {
            known_index,
            succeeded: 0,
            failed: 0,
            cancelled: 0,
            checkpoints: 0,
            checkpoint_failures: 0,
            waits: QUEUE_WAIT_SECONDS.histogram(),
            trends: BTreeMap::new(),
        }
    }

    /// The command at this index was applied, with this state as its result.
    pub fn note(&mut self, index: u64, intent: &Intent, applied: &Applied, state: &State) {
        let counts = index > self.known_index;
        for row in &applied.history {
            if let HistoryRow::Event { job, event, .. } = row {
                self.note_event(*job, &event.body, counts);
            }
        }
        for effect in &applied.effects {
            if let Effect::Job(id) = effect {
                self.note_job(*id, state.jobs().get(id), intent.unix_ms);
            }
        }
        let Some(id) = intent.assigns else { return };
        let placed = state.jobs().get(&id).filter(|job| !job.state.is_final());
        let placed = placed.and_then(|job| Some((job, job.placement.as_ref()?.placed_unix_ms)));
        if let Some((job, placed_unix_ms)) = placed.filter(|(_, placed)| *placed == intent.unix_ms) {
            let since = self.queued_since(id, job);
            if let Some(since) = since.filter(|_| counts) {
                self.waits.observe(placed_unix_ms.saturating_sub(since) as f64 / 1e3);
            }
            self.trends.entry(id).or_default().queued_unix_ms = None;
        }
    }

    fn note_event(&mut self, id: JobId, body: &EventBody, counts: bool) {
        let counted = match body {
            EventBody::Checkpoint(_) => Some(&mut self.checkpoints),
            EventBody::CheckpointFailed { .. } => Some(&mut self.checkpoint_failures),
            EventBody::Finished(Outcome::Succeeded { .. }) => Some(&mut self.succeeded),
            EventBody::Finished(Outcome::Failed(_)) => Some(&mut self.failed),
            EventBody::Finished(Outcome::Stopped { .. }) => Some(&mut self.cancelled),
            _ => None,
        };
        if let Some(counted) = counted {
            *counted += u64::from(counts);
        }
        match body {
            EventBody::Step(step) => {
                let trend = self.trends.entry(id).or_default();
                trend.learning_rate = Some(step.lr);
                trend.gradient_norm = Some(step.grad_norm);
            }
            EventBody::Times(times) => self.trends.entry(id).or_default().times = Some(*times),
            _ => {}
        }
    }

    fn note_job(&mut self, id: JobId, job: Option<&JobRecord>, unix_ms: u64) {
        let Some(job) = job.filter(|job| !job.state.is_final()) else {
            self.trends.remove(&id);
            return;
        };
        let trend = self.trends.entry(id).or_default();
        if job.progress.step != trend.step {
            trend.step = job.progress.step;
            trend.last_step_unix_ms = Some(unix_ms);
        }
        if job.state == JobState::Queued && job.generation > 0 {
            trend.queued_unix_ms.get_or_insert(unix_ms);
        }
    }

    /// The state was replaced by a snapshot.
    pub fn replaced(&mut self, state: &State) {
        let unfinished = |id: &JobId| state.jobs().get(id).is_some_and(|job| !job.state.is_final());
        self.trends.retain(|id, _| unfinished(id));
    }

    pub fn trend(&self, id: JobId) -> Option<&Trend> {
        self.trends.get(&id)
    }

    /// Since when a job waits for a place; `None` where it came back to the queue and this replica was not there.
    pub fn queued_since(&self, id: JobId, job: &JobRecord) -> Option<u64> {
        match self.trends.get(&id).and_then(|trend| trend.queued_unix_ms) {
            None if job.generation <= 1 => Some(job.submitted_unix_ms),
            since => since,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::Command;
    use crate::cluster::commands::{AssignGang, DrainNode, RecordEvents};
    use crate::cluster::tests::{Script, checkpoint, finished, step, stopped};
    use fleet_common::events::{Event, EventBatch};
    use fleet_common::ids::NodeId;

    /// A script whose commands are noted.
    struct Noted {
        script: Script,
        tally: Tally,
    }

    impl Noted {
        fn run(&mut self, at: u64, change: Change) {
            let Script { state, index, .. } = &mut self.script;
            *index += 1;
            let intent = Intent::of(at, &change);
            let command = Command { unix_ms: at, request: None, by: None, why: None, change };
            let applied = state.apply(*index, command);
            self.tally.note(*index, &intent, &applied, state);
        }

        fn place(&mut self, at: u64, job: JobId) {
            let generation = self.script.state.jobs()[&job].generation + 1;
            self.run(at, Change::AssignGang(AssignGang { job, generation, parts: vec![(NodeId(1), 1)] }));
        }

        fn tell(&mut self, at: u64, job: JobId, first_seq: u64, bodies: Vec<EventBody>) {
            let events = bodies.into_iter().map(|body| Event { unix_ms: 5, body }).collect();
            let generation = self.script.state.jobs()[&job].generation;
            let batch = EventBatch { job, generation, first_seq, events };
            self.run(at, Change::RecordEvents(RecordEvents { node: NodeId(1), batch }));
        }
    }

    /// A job that waits since 1,000; entries up to `known` were applied before.
    fn noted(known: u64) -> (Noted, JobId) {
        let mut script = Script::with_node(4);
        let job = script.at(1_000).submit_training(1);
        (Noted { script, tally: Tally::new(known) }, job)
    }

    #[test]
    fn what_is_applied_is_counted_once_and_what_a_restart_applies_again_is_not() {
        for (known, times) in [(0, 1), (u64::MAX, 0)] {
            let (mut noted, job) = noted(known);
            noted.place(4_000, job);
            let saved = vec![step(1), checkpoint(1), finished()];
            noted.tell(5_000, job, 1, saved.clone());
            noted.tell(6_000, job, 1, saved);
            let tally = &noted.tally;
            assert_eq!((tally.checkpoints, tally.succeeded, tally.failed), (times, times, 0));
            assert_eq!(
                (tally.waits.get_sample_count(), tally.waits.get_sample_sum()),
                (times, 3.0 * times as f64)
            );
            assert_eq!(tally.trend(job), None, "it has ended");
        }
    }

    #[test]
    fn a_job_is_followed_and_waits_again_from_its_return_to_the_queue() {
        let (mut noted, job) = noted(0);
        noted.place(4_000, job);
        let times = Times { step: 2, steps: 2, data_s: 0.5, ..Times::default() };
        noted.tell(5_000, job, 1, vec![step(1)]);
        noted.tell(6_000, job, 2, vec![step(2), EventBody::Times(times)]);
        noted.tell(7_000, job, 4, vec![EventBody::Times(times)]);
        let trend = noted.tally.trend(job).unwrap();
        assert_eq!((trend.learning_rate, trend.times), (Some(1e-3), Some(times)));
        assert_eq!(trend.last_step_unix_ms, Some(6_000), "its times are no step");
        noted.run(8_000, Change::DrainNode(DrainNode { node: NodeId(1), now: true }));
        noted.tell(9_000, job, 5, vec![stopped(2)]);
        let record = &noted.script.state.jobs()[&job];
        assert_eq!(record.state, JobState::Queued);
        assert_eq!(noted.tally.queued_since(job, record), Some(9_000));
        assert_eq!(noted.tally.cancelled, 0, "it goes on");
    }
}
