//! What happened in a gang on one node, in order and each event once. The last event ends this part of the gang.

use crate::cluster::checkpoints::wake_holders;
use crate::cluster::records::{Part, bounded_stall};
use crate::cluster::{Answer, Context, Effect, State};
use fleet_common::events::{Event, EventBatch, EventBody};
use fleet_common::ids::NodeId;
use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RecordEvents {
    /// Who says so; must be where the gang was placed.
    pub node: NodeId,
    pub batch: EventBatch,
}

impl RecordEvents {
    /// It is told of a job that was asked to stop, or ends this part of one.
    pub(super) fn ends_a_job(&self, state: &State) -> bool {
        let stops = state.jobs.get(&self.batch.job).is_some_and(|job| job.stop.is_some());
        stops || self.batch.events.iter().any(|event| matches!(event.body, EventBody::Finished(_)))
    }

    /// Leaves out lines and measurements. The numbers of the events stay.
    pub(super) fn thin(&mut self) {
        for event in &mut self.batch.events {
            match &event.body {
                EventBody::Log { line, .. } => {
                    event.body = EventBody::LeftOut { lines: 1, bytes: line.len() as u64 };
                }
                EventBody::Memory { .. } | EventBody::Stall(_) => {
                    event.body = EventBody::LeftOut { lines: 0, bytes: 0 }
                }
                _ => {}
            }
        }
    }

    pub(super) fn apply(self, state: &mut State, context: &mut Context) -> Answer {
        let EventBatch { job: id, generation, first_seq, events } = self.batch;
        let end_seq = first_seq.saturating_add(events.len() as u64);
        let outdated = Answer::EventsTaken { seq: end_seq.saturating_sub(1) };
        let Some(job) = state.jobs.get_mut(&id).filter(|job| !job.state.is_final()) else { return outdated };
        let Some(at) = job.placement.as_mut().filter(|at| at.generation == generation) else {
            return outdated;
        };
        let live = |part: &&mut Part| part.node == self.node && !part.finished;
        let Some(part) = at.parts.iter_mut().find(live) else { return outdated };
        let next_seq = part.next_seq;
        if first_seq > next_seq {
            return Answer::EventsGap { next_seq };
        }
        let known = (next_seq - first_seq) as usize;
        if known < events.len() {
            part.next_seq = end_seq;
            let leads = part.first_rank == 0;
            context.effects.push(Effect::Job(id));
            for event in &events[known..] {
                match &event.body {
                    EventBody::Memory { pss_mib, .. } => {
                        part.memory_mib = Some(pss_mib.iter().fold(0, |sum, mib| sum.saturating_add(*mib)));
                    }
                    EventBody::Stall(stall) => part.stall = stall.as_ref().map(bounded_stall),
                    _ => {}
                }
            }
            let overfull = state.retention.is_overfull();
            for event in merged(events.into_iter().skip(known)) {
                state.take_report(id, self.node, &event.body, context);
                match &event.body {
                    EventBody::DataReady(_) => state.has_checkpoint(id, self.node),
                    EventBody::CheckpointLost { manifest_sha256, why } => {
                        state.checkpoint_lost(id, self.node, manifest_sha256, why, context);
                    }
                    EventBody::CheckpointsRemoved { hosts, manifests } => {
                        state.checkpoints_removed(id, hosts, manifests);
                    }
                    EventBody::Started { .. } => {
                        state.jobs.get(&id).into_iter().for_each(|job| wake_holders(job, context));
                        state.wake_superseded(context);
                    }
                    _ => {}
                }
                match event.body {
                    EventBody::Finished(outcome) => {
                        state.end_part(id, self.node, outcome, context);
                        break;
                    }
                    EventBody::Stall(_)
                    | EventBody::Listening(_)
                    | EventBody::CheckpointLost { .. }
                    | EventBody::CheckpointsRemoved { .. } => {}
                    _ => {
                        if let Some(job) = state.jobs.get_mut(&id).filter(|_| leads || is_local(&event.body))
                        {
                            job.tell(id, event, overfull, context);
                        }
                    }
                }
            }
        }
        Answer::EventsTaken { seq: end_seq.max(next_seq) - 1 }
    }
}

/// Tells of the node that says it. All else is said by the part with rank 0, for the whole job.
fn is_local(body: &EventBody) -> bool {
    matches!(
        body,
        EventBody::Log { .. }
            | EventBody::LeftOut { .. }
            | EventBody::Memory { .. }
            | EventBody::CheckpointFailed { .. }
    )
}

/// Neighbours that say how much was left out become one.
fn merged(events: impl Iterator<Item = Event>) -> Vec<Event> {
    let mut merged: Vec<Event> = Vec::new();
    for event in events {
        if let EventBody::LeftOut { lines, bytes } = event.body
            && let Some(EventBody::LeftOut { lines: all_lines, bytes: all_bytes }) =
                merged.last_mut().map(|last| &mut last.body)
        {
            *all_lines = all_lines.saturating_add(lines);
            *all_bytes = all_bytes.saturating_add(bytes);
        } else {
            merged.push(event);
        }
    }
    merged
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::commands::Change;
    use crate::cluster::tests::{Script, checkpoint, finished, step};
    use fleet_common::events::{Culprit, Event, Outcome, Stall};
    use fleet_common::ids::JobId;
    use fleet_common::protocol::JobState;

    fn record(script: &mut Script, job: JobId, first_seq: u64, bodies: Vec<EventBody>) -> Answer {
        script.tell(job, 1, first_seq, bodies)
    }

    fn running() -> (Script, JobId) {
        let mut script = Script::with_node(4);
        let job = script.submit(2);
        script.assign(job);
        (script, job)
    }

    #[test]
    fn a_stall_is_shown_while_it_lasts_and_not_kept() {
        let (mut script, job) = running();
        let what = "rank 1 has not come".repeat(1_000);
        let stall = Stall { since_unix_ms: 7, what, culprit: Culprit::Silent };
        record(&mut script, job, 1, vec![step(1), EventBody::Stall(Some(stall.clone()))]);
        let shown = |script: &Script| script.state.jobs()[&job].stall().cloned();
        script.tell(job, 1, 3, vec![EventBody::Started { step: 0, parameters: 1, device: "cpu".into() }]);
        let seen = shown(&script).unwrap();
        assert!(seen.since_unix_ms == 7 && stall.what.starts_with(&seen.what) && seen.what.len() <= 2_000);
        assert_eq!(script.state.jobs()[&job].events, 2);
        record(&mut script, job, 4, vec![EventBody::Stall(None), step(2)]);
        assert_eq!((shown(&script), script.steps_in_history(job)), (None, vec![1, 2]));
        record(&mut script, job, 6, vec![EventBody::Stall(Some(stall)), finished()]);
        assert_eq!(shown(&script), None, "nothing that has ended waits");
    }

    #[test]
    fn of_several_nodes_the_one_tells_of_a_stall_that_sees_whose_it_is() {
        let mut script = Script::with_nodes(&[2, 2, 2]);
        let job = script.submit(6);
        script.place(job, &[(1, 2), (2, 2), (3, 2)]);
        let started = EventBody::Started { step: 0, parameters: 1, device: "cpu".into() };
        let told = |culprit, since_unix_ms, what: &str| {
            EventBody::Stall(Some(Stall { since_unix_ms, what: what.to_owned(), culprit }))
        };
        script.tell(job, 1, 1, vec![started, told(Culprit::Waits, 1, "rank 1, in a call")]);
        script.tell(job, 2, 1, vec![told(Culprit::Stopped, 3, "rank 3, stopped")]);
        script.tell(job, 3, 1, vec![told(Culprit::Stopped, 2, "rank 5, stopped")]);
        let shown = |script: &Script| script.state.jobs()[&job].stall().map(|stall| stall.what.clone());
        assert_eq!(shown(&script).as_deref(), Some("rank 5, stopped"), "it was the first");
        script.tell(job, 3, 2, vec![EventBody::Stall(None)]);
        assert_eq!(shown(&script).as_deref(), Some("rank 3, stopped"));
        script.tell(job, 2, 2, vec![told(Culprit::Silent, 3, "rank 3, in backward")]);
        assert_eq!(shown(&script).as_deref(), Some("rank 3, in backward"), "before one that waits itself");
    }

    #[test]
    fn an_overlapping_batch_adds_only_what_is_new() {
        let (mut script, job) = running();
        assert_eq!(record(&mut script, job, 1, vec![step(1), step(2)]), Answer::EventsTaken { seq: 2 });
        assert_eq!(
            record(&mut script, job, 1, vec![step(1), step(2), step(3)]),
            Answer::EventsTaken { seq: 3 }
        );
        assert_eq!(record(&mut script, job, 1, vec![step(1)]), Answer::EventsTaken { seq: 3 });
        assert_eq!(script.state.jobs()[&job].events, 3);
        assert_eq!(script.steps_in_history(job), [1, 2, 3]);
    }

    #[test]
    fn a_gap_is_refused_with_the_place_to_resend_from() {
        let (mut script, job) = running();
        record(&mut script, job, 1, vec![step(1)]);
        assert_eq!(record(&mut script, job, 3, vec![step(3)]), Answer::EventsGap { next_seq: 2 });
        assert_eq!(script.state.jobs()[&job].events, 1);
    }

    #[test]
    fn started_makes_it_run_and_finished_ends_it() {
        let (mut script, job) = running();
        record(
            &mut script,
            job,
            1,
            vec![EventBody::Started { step: 0, parameters: 1, device: "cpu".into() }],
        );
        assert_eq!(script.state.jobs()[&job].state, JobState::Running);
        record(&mut script, job, 2, vec![step(7), finished()]);
        let ended = &script.state.jobs()[&job];
        assert_eq!((ended.state, ended.progress.step, ended.work.is_none()), (JobState::Succeeded, 7, true));
        assert_eq!(script.state.slots_used(script.node()), 0);
        assert_eq!(record(&mut script, job, 3, vec![finished()]), Answer::EventsTaken { seq: 3 });
        assert_eq!(script.state.jobs()[&job].events, 3);
    }

    #[test]
    fn a_stopped_job_is_cancelled() {
        let (mut script, job) = running();
        record(&mut script, job, 1, vec![EventBody::Finished(Outcome::Stopped { steps: 3 })]);
        assert_eq!(script.state.jobs()[&job].state, JobState::Cancelled);
    }

    #[test]
    fn only_as_many_checkpoints_are_valid_as_are_kept_on_disk() {
        let (mut script, job) = running();
        let keep = u64::from(script.state.jobs()[&job].keep_checkpoints);
        record(&mut script, job, 1, (1..=keep + 2).map(checkpoint).collect());
        let steps: Vec<u64> =
            script.state.jobs()[&job].checkpoints.iter().map(|known| known.record.step).collect();
        assert_eq!(steps, (3..=keep + 2).collect::<Vec<_>>());
    }

    fn line(text: &str) -> EventBody {
        EventBody::Log { rank: Some(0), level: fleet_common::events::Level::Info, line: text.into() }
    }

    #[test]
    fn a_job_has_so_many_bytes_of_lines_whatever_agents_send() {
        let (mut script, job) = running();
        let long = "x".repeat(1 << 20);
        let mut seq = 1;
        for _ in 0..200 {
            record(&mut script, job, seq, vec![line(&long), step(seq)]);
            seq += 2;
        }
        let told = |script: &Script| -> (u64, u64) {
            let mut counted = (0, 0);
            for event in script.events(job) {
                match &event.body {
                    EventBody::Log { line, .. } => counted.0 += line.len() as u64,
                    EventBody::LeftOut { lines, bytes } => {
                        assert_eq!(*bytes, lines << 20);
                        counted.1 += lines;
                    }
                    _ => {}
                }
            }
            counted
        };
        assert!(told(&script).0 <= crate::cluster::records::LOGGED_BYTES_MAX);
        record(&mut script, job, seq, vec![finished()]);
        let (bytes, left_out) = told(&script);
        assert_eq!(((bytes >> 20) + left_out, script.steps_in_history(job).len()), (200, 200));
        assert!(script.last_event_is_finished(job));
    }

    #[test]
    fn beyond_its_share_of_the_history_a_job_is_followed_and_only_checkpoints_and_its_end_are_kept() {
        let (mut script, job) = running();
        let share = crate::cluster::records::HISTORY_BYTES_MAX;
        script.state.jobs.get_mut(&job).unwrap().bytes = share;
        let failed = EventBody::CheckpointFailed { step: 3, error: "full".into() };
        record(&mut script, job, 1, vec![step(1), failed, step(2), checkpoint(2), step(3)]);
        let known = &script.state.jobs()[&job];
        assert_eq!((known.progress.step, known.checkpoints.len()), (3, 1));
        record(&mut script, job, 6, vec![finished()]);
        let bodies: Vec<_> = script.events(job).iter().map(|event| event.body.clone()).collect();
        assert_eq!(bodies.len(), 3, "{bodies:?}");
        assert!(matches!(&bodies[0], EventBody::Log { line, .. } if line.contains("not kept any more")));
        assert!(matches!(bodies[1], EventBody::Checkpoint(_)) && script.last_event_is_finished(job));
    }

    #[test]
    fn what_is_thinned_keeps_its_numbers_and_leads_to_the_end() {
        let (mut script, job) = running();
        let node = script.node();
        let told = |first_seq, bodies: Vec<EventBody>| {
            let events = bodies.into_iter().map(|body| Event { unix_ms: 1, body }).collect();
            RecordEvents { node, batch: EventBatch { job, generation: 1, first_seq, events } }
        };
        let mut talk = told(1, vec![line("a"), line("bc"), step(1), line("d")]);
        assert!(!talk.ends_a_job(&script.state), "it runs, and nobody wants it to stop");
        let cancel = crate::cluster::commands::CancelJob { job, stop: crate::cluster::records::Stop::Now };
        script.run(Change::CancelJob(cancel));
        assert!(talk.ends_a_job(&script.state));
        talk.thin();
        assert_eq!(script.run(Change::RecordEvents(talk)), Answer::EventsTaken { seq: 4 });
        let bodies: Vec<_> = script.events(job).iter().map(|event| event.body.clone()).collect();
        let left_out = |lines, bytes| EventBody::LeftOut { lines, bytes };
        assert_eq!(bodies, [left_out(2, 3), step(1), left_out(1, 1)]);
        let end = told(5, vec![finished()]);
        assert!(end.ends_a_job(&script.state));
        script.run(Change::RecordEvents(end));
        assert!(script.state.jobs()[&job].state.is_final());
    }

    #[test]
    fn another_node_or_generation_changes_nothing() {
        let (mut script, job) = running();
        for (node, generation) in [(NodeId(2), 1), (NodeId(1), 2)] {
            let batch = EventBatch {
                job,
                generation,
                first_seq: 1,
                events: vec![Event { unix_ms: 1, body: finished() }],
            };
            assert_eq!(
                script.run(Change::RecordEvents(RecordEvents { node, batch })),
                Answer::EventsTaken { seq: 1 }
            );
        }
        assert_eq!(script.state.jobs()[&job].state, JobState::Starting);
    }
}
