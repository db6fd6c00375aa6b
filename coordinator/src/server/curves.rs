//! Curves of runs as pictures. What was read of a run is kept, so that one that is watched is read on and not anew.

use super::Shared;
use super::http::ask;
use crate::http::{Distributions, Picture};
use fleet_common::protocol::{Refusal, RefusalKind, Reply, Request, RunKey};
use fleet_plot::{Bins, Chart, Run, chart, histogram};
use serde::Serialize;
use std::sync::{Arc, Mutex, PoisonError};

/// Runs of which curves are kept; of each a bounded number of points.
const RUNS_MAX: usize = 12;

/// The runs that were read of late, the latest at the end.
#[derive(Default)]
pub struct Curves {
    kept: Mutex<Vec<(RunKey, Arc<tokio::sync::Mutex<Kept>>)>>,
}

struct Kept {
    run: Run,
    /// Where reading goes on.
    next: u64,
}

/// A series of a run.
#[derive(Debug, Serialize)]
pub struct SeriesView {
    name: String,
    /// Of its newest point.
    step: f64,
    value: f64,
}

/// What this coordinator has of them: recorded facts, perhaps not the newest.
pub async fn picture(shared: &Shared, picture: Picture) -> Result<String, Refusal> {
    let mut runs = Vec::new();
    for run in &picture.runs {
        runs.push(read(shared, *run).await?);
    }
    let drawn = tokio::task::spawn_blocking(move || {
        let runs: Vec<(String, &Run)> = runs.iter().map(|(label, run)| (label.clone(), run)).collect();
        let Picture { log, smooth, frame, metrics, .. } = picture;
        frame.draw(Chart { log, smooth, ..chart(&runs, &metrics) })
    });
    drawn.await.map_err(|error| Refusal {
        kind: RefusalKind::Invalid,
        message: format!("the picture could not be drawn: {error}"),
    })
}

/// One feature of profiles, over each other.
pub async fn distributions(shared: &Shared, of: Distributions) -> Result<String, Refusal> {
    let mut found = Vec::new();
    for profile in &of.profiles {
        let view = match ask(shared, Request::Profile(*profile), true).await {
            Reply::Profile(view) => *view,
            Reply::Refused(refusal) => return Err(refusal),
            _ => return Err(unfit()),
        };
        let label = format!("{} ({profile})", view.record.name);
        found.extend(
            view.record
                .features
                .into_iter()
                .filter(|one| one.name == of.feature)
                .map(|one| (label.clone(), one)),
        );
    }
    let bins = found.iter().map(|(label, one)| {
        let bins = Bins { edges: &one.edges, counts: &one.counts };
        (label.clone(), bins)
    });
    let drawn: Vec<(String, Bins)> = bins.collect();
    Ok(of.frame.draw(histogram(&of.feature, &drawn)))
}

pub async fn series(shared: &Shared, run: RunKey) -> Result<Vec<SeriesView>, Refusal> {
    let (_, run) = read(shared, run).await?;
    let view = |(name, curve): (&str, &fleet_plot::Curve)| {
        let (step, value) = curve.points().last().copied()?;
        Some(SeriesView { name: name.to_owned(), step, value })
    };
    Ok(run.curves().filter_map(view).collect())
}

/// What a run is called, and all of it that is recorded.
async fn read(shared: &Shared, run: RunKey) -> Result<(String, Run), Refusal> {
    let view = match ask(shared, Request::Run(run), true).await {
        Reply::Run(view) => *view,
        Reply::Refused(refusal) => return Err(refusal),
        _ => return Err(unfit()),
    };
    let kept = shared.curves.of(run);
    let mut kept = kept.lock().await;
    loop {
        match ask(shared, Request::RunMetrics { run, from: kept.next }, true).await {
            Reply::Points { points, next } => {
                points.iter().for_each(|point| kept.run.push(&point.series, point.step, point.value));
                match next.filter(|next| *next > kept.next) {
                    Some(next) => kept.next = next,
                    None => break,
                }
            }
            Reply::Refused(refusal) => return Err(refusal),
            _ => return Err(unfit()),
        }
    }
    let label = if view.name.is_empty() { run.to_string() } else { format!("{} ({run})", view.name) };
    Ok((label, kept.run.clone()))
}

impl Curves {
    fn of(&self, run: RunKey) -> Arc<tokio::sync::Mutex<Kept>> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let known = kept.iter().position(|(of, _)| *of == run).map(|at| kept.remove(at).1);
        let known =
            known.unwrap_or_else(|| Arc::new(tokio::sync::Mutex::new(Kept { run: Run::default(), next: 1 })));
        kept.push((run, known.clone()));
        let over = kept.len().saturating_sub(RUNS_MAX);
        kept.drain(..over);
        known
    }
}

fn unfit() -> Refusal {
    Refusal { kind: RefusalKind::Invalid, message: "the cluster gave an answer that does not fit".to_owned() }
}
