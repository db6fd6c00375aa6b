//! `fleet runs`: runs that clients recorded, and the series of any run.

use super::{ListArgs, OutputArgs, Target, connect, list, local_runs, plot};
use crate::client::{Client, block_on, unexpected};
use crate::failure::Failure;
use crate::{json, out, places, text};
use fleet_common::exit;
use fleet_common::protocol::{Point, Reply, Request, RunKey, RunState, RunView};
use serde_json::{Value, json};
use std::path::PathBuf;

/// List recorded runs, or show one with its series
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(clap::Subcommand)]
enum Action {
    /// List runs that clients recorded, newest first; training jobs are runs too and are listed by `fleet jobs`, those of `fleet launch` with --local
    Ls {
        /// Instead those whose checkpoints lie on this machine
        #[arg(long)]
        local: bool,
        /// The output_dir of the jobs whose runs these are
        #[arg(long, value_name = "DIR", requires = "local", default_value = "training_output")]
        dir: PathBuf,
        #[command(flatten)]
        list: ListArgs,
    },
    /// Show a run: its newest values, and with --points all of them
    Show {
        /// Such as run-3 or job-7
        run: RunKey,
        /// Print every point of every series
        #[arg(long)]
        points: bool,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Draw series of runs as curves in one picture
    Plot(plot::Args),
}

pub fn run(args: Args, cluster: Target<'_>) -> Result<u8, Failure> {
    if let Action::Ls { local: true, dir, list } = &args.action {
        local_runs::list(dir, list.lines, list.output.json)?;
        return Ok(exit::SUCCEEDED);
    }
    let mut client = connect(cluster)?;
    match args.action {
        Action::Ls { list: args, .. } => {
            let take = |reply| match reply {
                Reply::Runs(listing) => Ok(listing),
                other => Err(other),
            };
            list(&mut client, &args, Request::Runs, take, json::run, |runs| {
                print(runs);
                if runs.is_empty() {
                    out::note(
                        "no client has recorded a run; training jobs are listed by `fleet jobs`, and those of `fleet launch` by `fleet runs ls --local`",
                    );
                }
            })?;
        }
        Action::Plot(args) => block_on(plot::draw(&mut client, &args))?,
        Action::Show { run, points, output } => block_on(show(&mut client, run, points, &output))?,
    }
    Ok(exit::SUCCEEDED)
}

async fn show(client: &mut Client, run: RunKey, points: bool, output: &OutputArgs) -> Result<(), Failure> {
    let view = view(client, run).await?;
    if !output.json {
        print(std::slice::from_ref(&view));
        view.last.iter().for_each(|(series, value)| out::line(&format!("{series}: {value}")));
    }
    let mut all: Vec<Point> = Vec::new();
    if points {
        each_points(client, run, |points| all.extend(points)).await?;
    }
    if output.json {
        let mut value = json::run(&view);
        if points {
            value["series"] = all.iter().map(|point| json!(point)).collect::<Value>();
        }
        out::json(&value);
    } else if points {
        let row = |point: &Point| vec![point.series.clone(), point.step.to_string(), point.value.to_string()];
        out::table(&["SERIES", "STEP", "VALUE"], &all.iter().map(row).collect::<Vec<_>>());
    }
    Ok(())
}

pub async fn view(client: &mut Client, run: RunKey) -> Result<RunView, Failure> {
    match client.ask(Request::Run(run)).await? {
        Reply::Run(view) => Ok(*view),
        other => Err(unexpected(&other)),
    }
}

/// Hands over all points of a run, in pieces.
pub async fn each_points(
    client: &mut Client,
    run: RunKey,
    mut take: impl FnMut(Vec<Point>),
) -> Result<(), Failure> {
    let mut from = Some(1);
    while let Some(next) = from {
        match client.ask(Request::RunMetrics { run, from: next }).await? {
            Reply::Points { points, next } => {
                take(points);
                from = next;
            }
            other => return Err(unexpected(&other)),
        }
    }
    Ok(())
}

fn print(runs: &[RunView]) {
    let now = places::unix_ms();
    let rows: Vec<_> = runs
        .iter()
        .map(|run| {
            let state = match run.state {
                RunState::Open => "open",
                RunState::Succeeded => "succeeded",
                RunState::Failed => "failed",
            };
            vec![
                run.run.to_string(),
                run.name.clone(),
                state.to_owned(),
                run.points.to_string(),
                format!("{} ago", text::age(now.saturating_sub(run.started_unix_ms))),
            ]
        })
        .collect();
    out::table(&["RUN", "NAME", "STATE", "POINTS", "STARTED"], &rows);
}
