//! `fleet runs plot`: series of runs as curves.

use super::runs::{each_points, view};
use crate::client::Client;
use crate::failure::Failure;
use crate::out;
use fleet_common::files;
use fleet_common::protocol::{RunKey, RunView};
use fleet_plot::{Chart, Run, STEP_TIMES, Stands, chart};
use std::path::{Path, PathBuf};

#[derive(clap::Args)]
pub struct Args {
    /// Such as job-7 or run-3
    #[arg(required = true, value_name = "RUN")]
    runs: Vec<RunKey>,
    /// Which series: loss, lr, tokens_per_s, ...; once for each of several; step_times for the parts of a step's time
    #[arg(long = "metric", value_name = "NAME", default_value = "loss")]
    metrics: Vec<String>,
    /// The picture: .svg or .png
    #[arg(long, value_name = "FILE", default_value = "curves.svg")]
    out: PathBuf,
    /// A logarithmic scale
    #[arg(long)]
    log: bool,
    /// Each value is the mean of so many up to it
    #[arg(long, value_name = "N", default_value_t = 0)]
    smooth: usize,
}

#[derive(Clone, Copy)]
enum Format {
    Svg,
    Png,
}

pub async fn draw(client: &mut Client, args: &Args) -> Result<(), Failure> {
    let format = format_of(&args.out)?;
    let mut runs = Vec::new();
    for run in &args.runs {
        let (view, curves) = curves(client, *run).await?;
        runs.push((label(&view), curves));
    }
    let named: Vec<(String, &Run)> = runs.iter().map(|(label, run)| (label.clone(), run)).collect();
    let drawn = chart(&named, &args.metrics);
    if drawn.series.iter().all(|series| series.points.is_empty()) {
        return Err(Failure::input(nothing(&named, &args.metrics)));
    }
    let drawn = Chart { log: args.log, smooth: args.smooth, ..drawn };
    let bytes = match format {
        Format::Svg => drawn.svg(Stands::Alone).into_bytes(),
        Format::Png => drawn.png(),
    };
    files::write_atomic(&args.out, &bytes).map_err(|e| Failure::io("write", &args.out, &e))?;
    out::line(&args.out.display().to_string());
    Ok(())
}

/// A run with all its series.
pub async fn curves(client: &mut Client, run: RunKey) -> Result<(RunView, Run), Failure> {
    let view = view(client, run).await?;
    let mut curves = Run::default();
    each_points(client, run, |points| {
        points.iter().for_each(|point| curves.push(&point.series, point.step, point.value));
    })
    .await?;
    Ok((view, curves))
}

/// What a run is called beside others.
fn label(view: &RunView) -> String {
    if view.name.is_empty() { view.run.to_string() } else { format!("{} ({})", view.name, view.run) }
}

fn format_of(path: &Path) -> Result<Format, Failure> {
    match path.extension().and_then(|ending| ending.to_str()) {
        Some("svg") => Ok(Format::Svg),
        Some("png") => Ok(Format::Png),
        _ => Err(Failure::input(format!("--out {} ends neither in .svg nor in .png", path.display()))),
    }
}

fn nothing(runs: &[(String, &Run)], metrics: &[String]) -> String {
    let wanted = metrics.join("` or `");
    let mut names: Vec<&str> = runs.iter().flat_map(|(_, run)| run.curves().map(|(name, _)| name)).collect();
    names.sort_unstable();
    names.dedup();
    let runs: Vec<&str> = runs.iter().map(|(label, _)| label.as_str()).collect();
    match (names.is_empty(), metrics == [STEP_TIMES]) {
        (true, _) => format!("nothing is recorded of {} yet", runs.join(", ")),
        (false, true) if runs.len() > 1 => format!("{STEP_TIMES} are drawn of one run at a time"),
        _ => format!("there is no `{wanted}` in {}; there is {}", runs.join(", "), names.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_there_is_told_with_what_is() {
        let mut run = Run::default();
        run.push("reward", 1, 0.5);
        let runs = [("mine (run-3)".to_owned(), &run)];
        assert_eq!(
            nothing(&runs, &["loss".to_owned()]),
            "there is no `loss` in mine (run-3); there is reward"
        );
        assert!(format_of(Path::new("curves.pdf")).is_err());
    }
}
