//! Decisions, runs with their series, exports and profiles.

use super::{View, not_found, removed, unreadable};
use crate::cluster::history::Decision;
use crate::cluster::records::JobRecord;
use crate::cluster::runs::RunRecord;
use crate::raft::disk::{Disk, Table};
use fleet_common::events::{Event, EventBody};
use fleet_common::ids::{ExportId, JobId, ProfileId, RunId};
use fleet_common::protocol::{
    DecisionView, ExportView, JobState, Listing, POINTS_MAX, Page, Point, ProfileView, Refusal, RunKey,
    RunState, RunView,
};
use std::ops::Range;

/// Events of a job that are looked through for one answer.
const EVENTS_MAX: usize = 2_000;
/// Events before those that are looked through for the step to which the first of them belongs.
const BEFORE_MAX: u64 = 64;

impl<D: Disk + ?Sized> View<'_, D> {
    pub(super) fn decisions(&self, page: Page) -> Result<Listing<DecisionView>, Refusal> {
        let show = |number, Decision { unix_ms, why }| Some(DecisionView { number, unix_ms, why });
        self.page(page, self.state.last_decision(), Table::Decisions, |_| Vec::new(), show)
    }

    /// The runs of clients. Training jobs are runs too and are listed as jobs.
    pub(super) fn runs(&self, page: Page) -> Result<Listing<RunView>, Refusal> {
        let remembered = |numbers: Range<u64>| {
            let runs = self.state.runs().range(RunId(numbers.start)..RunId(numbers.end));
            runs.map(|(id, run)| (id.0, own_run(id.0, run))).collect()
        };
        let show = |id, run: RunRecord| Some(own_run(id, &run));
        self.page(page, self.state.last_run(), Table::Runs, remembered, show)
    }

    pub(super) fn run(&self, run: RunKey) -> Result<RunView, Refusal> {
        match run {
            RunKey::Job(id) => {
                let job = self.record(id)?;
                if !job.trains {
                    return Err(not_found(format!("{id} runs a program, which records no series")));
                }
                Ok(job_run(id, &job))
            }
            RunKey::Own(id) => {
                if let Some(run) = self.state.runs().get(&id) {
                    return Ok(own_run(id.0, run));
                }
                let run: Option<RunRecord> = self.history.row(Table::Runs, id.0).map_err(unreadable)?;
                run.map(|run| own_run(id.0, &run)).ok_or_else(|| {
                    self.no_such(id.0, self.state.last_run(), &id.to_string(), "fleet runs ls")
                })
            }
        }
    }

    /// Points from the `from`-th batch (or, of a job, event) on, and where to go on.
    pub(super) fn points(&self, run: RunKey, from: u64) -> Result<(Vec<Point>, Option<u64>), Refusal> {
        self.run(run)?;
        let from = from.max(1);
        match run {
            RunKey::Job(id) => {
                let events = self.history.events(id, from, EVENTS_MAX).map_err(unreadable)?;
                // Behind the last one there is one more look, which finds nothing.
                let next = events.last().map(|(index, _)| index + 1);
                let mut step = self.step_before(id, from)?;
                let points = events.into_iter().flat_map(|(_, event)| {
                    step = step_of(&event).or(step);
                    points_of(&event, step)
                });
                Ok((points.collect(), next))
            }
            RunKey::Own(id) => {
                let mut points = Vec::new();
                let mut next = from;
                while points.len() < POINTS_MAX {
                    let batch = self.history.points(id, next).map_err(unreadable)?;
                    let Some(batch) = batch else { return Ok((points, None)) };
                    points.extend(batch);
                    next += 1;
                }
                Ok((points, Some(next)))
            }
        }
    }

    /// Of the step that was told last before this event.
    fn step_before(&self, id: JobId, event: u64) -> Result<Option<u64>, Refusal> {
        let begin = event.saturating_sub(BEFORE_MAX).max(1);
        if begin == event {
            return Ok(None);
        }
        let events = self.history.events(id, begin, (event - begin) as usize).map_err(unreadable)?;
        Ok(events.iter().rev().find_map(|(_, event)| step_of(event)))
    }

    pub(super) fn exports(&self, page: Page) -> Result<Listing<ExportView>, Refusal> {
        self.page(page, self.state.last_export(), Table::Exports, |_| Vec::new(), |_, export| Some(export))
    }

    pub(super) fn export(&self, id: ExportId) -> Result<ExportView, Refusal> {
        let export = self.history.row(Table::Exports, id.0).map_err(unreadable)?;
        export
            .ok_or_else(|| self.no_such(id.0, self.state.last_export(), &id.to_string(), "fleet exports ls"))
    }

    /// Without their histograms.
    pub(super) fn profiles(&self, page: Page) -> Result<Listing<ProfileView>, Refusal> {
        let show = |_, mut profile: ProfileView| {
            for feature in &mut profile.record.features {
                (feature.edges, feature.counts) = (Vec::new(), Vec::new());
            }
            Some(profile)
        };
        // A profile may have many features.
        let page = Page { max: page.max.min(20), ..page };
        self.page(page, self.state.last_profile(), Table::Profiles, |_| Vec::new(), show)
    }

    pub(super) fn profile(&self, id: ProfileId) -> Result<ProfileView, Refusal> {
        let profile = self.history.row(Table::Profiles, id.0).map_err(unreadable)?;
        profile.ok_or_else(|| {
            self.no_such(id.0, self.state.last_profile(), &id.to_string(), "fleet profiles ls")
        })
    }

    /// Never given out, or removed.
    fn no_such(&self, number: u64, last: u64, what: &str, lists: &str) -> Refusal {
        match number > 0 && number <= last {
            true => removed(self.state, what, self.unix_ms),
            false => not_found(format!("there is no {what}; `{lists}` lists them")),
        }
    }
}

fn own_run(id: u64, run: &RunRecord) -> RunView {
    RunView {
        run: RunKey::Own(RunId(id)),
        name: run.name.clone(),
        state: run.state,
        started_unix_ms: run.started_unix_ms,
        finished_unix_ms: run.finished_unix_ms,
        points: run.points,
        last: run.last.iter().map(|(name, value)| (name.clone(), *value)).collect(),
    }
}

fn job_run(id: JobId, job: &JobRecord) -> RunView {
    let progress = &job.progress;
    let last =
        [("loss", progress.loss), ("eval_loss", progress.eval_loss), ("tokens_per_s", progress.tokens_per_s)];
    RunView {
        run: RunKey::Job(id),
        name: job.name.clone(),
        state: match job.state {
            JobState::Succeeded => RunState::Succeeded,
            JobState::Failed | JobState::Cancelled => RunState::Failed,
            _ => RunState::Open,
        },
        started_unix_ms: job.submitted_unix_ms,
        finished_unix_ms: job.finished_unix_ms,
        points: job.events,
        last: last.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?))).collect(),
    }
}

fn step_of(event: &Event) -> Option<u64> {
    match &event.body {
        EventBody::Step(at) => Some(at.step),
        EventBody::Started { step, .. } => Some(*step),
        _ => None,
    }
}

/// `step`: that of which was told last.
fn points_of(event: &Event, step: Option<u64>) -> Vec<Point> {
    let point =
        |series: &str, step, value| Point { series: series.into(), step, value, unix_ms: event.unix_ms };
    match &event.body {
        EventBody::Step(at) => vec![
            point("loss", at.step, at.loss),
            point("lr", at.step, at.lr),
            point("grad_norm", at.step, at.grad_norm),
            point("tokens_per_s", at.step, at.tokens_per_s),
        ],
        EventBody::Eval(at) => {
            vec![point("eval_loss", at.step, at.loss), point("bits_per_byte", at.step, at.bits_per_byte)]
        }
        EventBody::Times(at) => {
            at.parts().map(|(name, seconds)| point(&format!("{name}_s"), at.step, seconds)).to_vec()
        }
        EventBody::Metrics(at) => {
            at.values.iter().map(|(name, value)| point(name, at.step, *value)).collect()
        }
        // Of the ranks of one node, shared pages counted once.
        EventBody::Memory { first_rank, pss_mib, .. } => {
            let name = format!("memory_mib[{first_rank}..{}]", u64::from(*first_rank) + pss_mib.len() as u64);
            let mib = pss_mib.iter().fold(0u64, |sum, of| sum.saturating_add(*of));
            step.map(|step| point(&name, step, mib as f64)).into_iter().collect()
        }
        _ => Vec::new(),
    }
}
