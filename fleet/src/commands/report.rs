//! `fleet report`: a run as one page of HTML, to be kept or sent.

use super::{Target, checkpoints, connect, pages, plot, submit};
use crate::client::{Client, block_on};
use crate::failure::Failure;
use crate::html::Html;
use crate::{out, places, text};
use fleet_common::exit;
use fleet_common::files;
use fleet_common::ids::JobId;
use fleet_common::protocol::{ExportView, JobView, PAGE_MAX, Reply, Request, RunKey, RunState, RunView};
use fleet_plot::{Run, STEP_TIMES, chart};
use serde_json::Value;
use std::path::PathBuf;

/// Write a run as one HTML page: settings, curves, checkpoints, outcome
#[derive(clap::Args)]
pub struct Args {
    /// Such as job-7 or run-3
    run: RunKey,
    /// The page
    #[arg(long, value_name = "FILE", default_value = "report.html")]
    out: PathBuf,
}

pub fn run(args: Args, cluster: Target<'_>) -> Result<u8, Failure> {
    let mut client = connect(cluster)?;
    let page = block_on(page(&mut client, args.run))?;
    files::write_atomic(&args.out, page.as_bytes()).map_err(|e| Failure::io("write", &args.out, &e))?;
    out::line(&args.out.display().to_string());
    Ok(exit::SUCCEEDED)
}

async fn page(client: &mut Client, run: RunKey) -> Result<String, Failure> {
    let (view, curves) = plot::curves(client, run).await?;
    let title = if view.name.is_empty() { run.to_string() } else { format!("{} ({run})", view.name) };
    let mut page = Html::new(&title, &format!("written by fleet on {}", text::date(places::unix_ms())));
    match run {
        RunKey::Job(id) => {
            let job = submit::job_view(client, id).await?;
            outcome(&mut page, &job);
            draw(&mut page, &curves);
            saved(&mut page, client, id).await?;
            settings(&mut page, &job.job_json);
        }
        RunKey::Own(_) => {
            page.facts(&own(&view));
            draw(&mut page, &curves);
        }
    }
    Ok(page.end())
}

fn outcome(page: &mut Html, job: &JobView) {
    let nodes: Vec<&str> = job.parts.iter().map(|part| part.name.as_str()).collect();
    let of = if job.total_steps > 0 { format!(" of {}", job.total_steps) } else { String::new() };
    let mut facts = vec![
        ("State", job.reason.clone()),
        ("Steps", format!("{}{of}", job.step)),
        ("Loss", text::loss(job.loss)),
        ("Evaluation loss", text::loss(job.eval_loss)),
        ("Tokens per second", job.tokens_per_s.map_or("-".to_owned(), |speed| text::thousands(speed as u64))),
        ("Ranks", job.world_size.to_string()),
        ("Nodes", nodes.join(", ")),
        ("Submitted", text::date(job.submitted_unix_ms)),
    ];
    facts.extend(job.finished_unix_ms.map(|at| ("Ended", text::date(at))));
    page.facts(&named(facts));
    if let Some(error) = &job.error {
        page.heading("Error");
        page.line(&error.message);
        page.lines(&error.last_lines);
    }
}

fn own(view: &RunView) -> Vec<(String, String)> {
    let state = match view.state {
        RunState::Open => "open",
        RunState::Succeeded => "succeeded",
        RunState::Failed => "failed",
    };
    let mut facts = vec![("State", state.to_owned()), ("Started", text::date(view.started_unix_ms))];
    facts.extend(view.finished_unix_ms.map(|at| ("Ended", text::date(at))));
    facts.push(("Points", text::thousands(view.points)));
    named(facts)
}

/// Loss and evaluations in one picture, the parts of a step in another, and each other series in its own.
fn draw(page: &mut Html, curves: &Run) {
    page.heading("Curves");
    let names: Vec<&str> = curves.curves().map(|(name, _)| name).collect();
    let together = [vec!["loss", "eval_loss"], vec![STEP_TIMES], vec!["memory_mib"]];
    let shown = |name: &str| {
        let of_time = name.ends_with("_s") && !name.contains("per");
        of_time || name.starts_with("memory_mib[") || ["loss", "eval_loss"].contains(&name)
    };
    let alone = names.iter().filter(|name| !shown(name)).map(|name| vec![*name]);
    for metrics in together.into_iter().chain(alone) {
        let metrics: Vec<String> = metrics.into_iter().map(str::to_owned).collect();
        let drawn = chart(&[(String::new(), curves)], &metrics);
        if drawn.series.iter().any(|series| !series.points.is_empty()) {
            page.chart(&drawn);
        }
    }
    if names.is_empty() {
        page.line("No points are recorded.");
    }
}

async fn saved(page: &mut Html, client: &mut Client, job: JobId) -> Result<(), Failure> {
    page.heading("Checkpoints");
    let checkpoints = checkpoints::list(client, Some(job)).await?;
    let row = |view: &fleet_common::protocol::CheckpointView| {
        vec![
            view.checkpoint.step.to_string(),
            text::loss(Some(view.checkpoint.loss)),
            format!("{}B", text::short(view.checkpoint.bytes)),
            text::date(view.unix_ms),
            view.checkpoint.path.clone(),
            view.checkpoint.manifest_sha256.clone(),
        ]
    };
    match checkpoints.is_empty() {
        true => page.line("None is recorded."),
        false => page.table(
            &["Step", "Loss", "Size", "Saved", "Path", "SHA-256 of the manifest"],
            &checkpoints.iter().map(row).collect::<Vec<_>>(),
        ),
    }
    let exports = pages(client, PAGE_MAX as usize, Request::Exports, |reply| match reply {
        Reply::Exports(listing) => Ok(listing),
        other => Err(other),
    });
    let exports: Vec<ExportView> =
        exports.await?.into_iter().filter(|export| export.record.job == job).collect();
    if !exports.is_empty() {
        page.heading("Exports");
        let row = |view: &ExportView| {
            vec![
                view.export.to_string(),
                view.record.format.clone(),
                view.record.step.to_string(),
                format!("{}B", text::short(view.record.bytes)),
                view.record.path.clone(),
            ]
        };
        page.table(
            &["Export", "Format", "Step", "Size", "Path"],
            &exports.iter().map(row).collect::<Vec<_>>(),
        );
    }
    Ok(())
}

/// Every setting of a training job by its key.
fn settings(page: &mut Html, job_json: &str) {
    let Ok(job) = serde_json::from_str::<Value>(job_json) else { return };
    let mut facts = Vec::new();
    flatten("", &job, &mut facts);
    page.heading("Settings");
    page.facts(&facts);
}

fn flatten(key: &str, value: &Value, out: &mut Vec<(String, String)>) {
    match value {
        Value::Object(fields) => {
            for (name, value) in fields {
                let key = if key.is_empty() { name.clone() } else { format!("{key}.{name}") };
                flatten(&key, value, out);
            }
        }
        Value::Null => {}
        Value::String(text) => out.push((key.to_owned(), text.clone())),
        value => out.push((key.to_owned(), value.to_string())),
    }
}

fn named(facts: Vec<(&str, String)>) -> Vec<(String, String)> {
    facts.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}
