//! What a run recorded, as curves; and charts of it.

use crate::{Chart, Curve, Series};
use std::collections::BTreeMap;

/// Series of one run that are kept. A run may record any names.
const SERIES_MAX: usize = 64;

/// A name for all parts of a step's time, which are drawn one on top of the other.
pub const STEP_TIMES: &str = "step_times";
/// Series of those parts, in the order in which they are drawn.
const PARTS: [&str; 7] =
    ["data_s", "forward_s", "backward_s", "communication_s", "waiting_s", "optimizer_s", "checkpoint_s"];

/// Curves of one run, by the names of their series.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Run {
    curves: BTreeMap<String, Curve>,
}

impl Run {
    pub fn push(&mut self, series: &str, step: u64, value: f64) {
        if let Some(curve) = self.curves.get_mut(series) {
            curve.push(step as f64, value);
        } else if self.curves.len() < SERIES_MAX {
            self.curves.entry(series.to_owned()).or_default().push(step as f64, value);
        }
    }

    pub fn curves(&self) -> impl Iterator<Item = (&str, &Curve)> {
        self.curves.iter().map(|(name, curve)| (name.as_str(), curve))
    }

    /// Those that a metric names: `memory_mib` also `memory_mib[0..4]`, that of some ranks.
    fn of<'a>(&'a self, metric: &'a str) -> impl Iterator<Item = (&'a str, &'a Curve)> {
        let is_part = move |name: &str| {
            name.strip_prefix(metric).is_some_and(|rest| rest.is_empty() || rest.starts_with('['))
        };
        self.curves().filter(move |(name, _)| is_part(name))
    }
}

/// Runs, each with what it is called, in one chart of these metrics.
pub fn chart(runs: &[(String, &Run)], metrics: &[String]) -> Chart {
    let title = metrics.first().cloned().unwrap_or_default();
    if let ([(_, run)], true) = (runs, title == STEP_TIMES) {
        return step_times(run);
    }
    let mut series = Vec::new();
    for metric in metrics {
        for (label, run) in runs {
            for (name, curve) in run.of(metric) {
                let name = match (runs.len(), metrics.len()) {
                    (1, _) => name.to_owned(),
                    (_, 1) if name == metric => label.clone(),
                    _ => format!("{label} {name}"),
                };
                series.push(Series { name, points: curve.points().to_vec() });
            }
        }
    }
    Chart { title, series, ..Chart::default() }
}

fn step_times(run: &Run) -> Chart {
    let part = |name: &&str| {
        let points = run.curves.get(*name).map_or_else(Vec::new, |curve| curve.points().to_vec());
        Series { name: name.trim_end_matches("_s").to_owned(), points }
    };
    let series: Vec<Series> = PARTS.iter().map(part).collect();
    Chart { title: "seconds of a step".to_owned(), series, stacked: true, ..Chart::default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(names: &[&str]) -> Run {
        let mut run = Run::default();
        names.iter().for_each(|name| run.push(name, 1, 2.0));
        run
    }

    fn names(runs: &[&Run], metrics: &[&str]) -> Vec<String> {
        let runs: Vec<(String, &Run)> =
            runs.iter().enumerate().map(|(n, run)| (format!("job-{n}"), *run)).collect();
        let metrics: Vec<String> = metrics.iter().map(|metric| (*metric).to_owned()).collect();
        chart(&runs, &metrics).series.into_iter().map(|series| series.name).collect()
    }

    #[test]
    fn a_line_is_called_by_what_tells_it_from_the_others() {
        let one = run(&["loss", "eval_loss", "memory_mib[0..2]", "memory_mib[2..4]", "losses"]);
        let other = run(&["loss"]);
        assert_eq!(names(&[&one], &["loss", "eval_loss"]), ["loss", "eval_loss"]);
        assert_eq!(names(&[&one], &["memory_mib"]), ["memory_mib[0..2]", "memory_mib[2..4]"]);
        assert_eq!(names(&[&one, &other], &["loss"]), ["job-0", "job-1"]);
        assert_eq!(
            names(&[&one, &other], &["loss", "eval_loss"]),
            ["job-0 loss", "job-1 loss", "job-0 eval_loss"]
        );
    }

    #[test]
    fn any_number_of_names_takes_little_room() {
        let mut run = Run::default();
        (0..1_000).for_each(|n| run.push(&n.to_string(), 1, 0.0));
        assert_eq!(run.curves().count(), SERIES_MAX);
    }

    #[test]
    fn parts_of_a_step_are_one_whole() {
        let mut timed = Run::default();
        PARTS.iter().for_each(|part| timed.push(part, 1, 0.5));
        assert_eq!(names(&[&timed], &[STEP_TIMES])[..3], ["data", "forward", "backward"]);
        assert!(chart(&[(String::new(), &timed)], &[STEP_TIMES.to_owned()]).stacked);
    }
}
