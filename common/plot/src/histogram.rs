//! Distributions: how often a quantity was where.

use crate::{Chart, Series};

/// One distribution: bounds of its bins, rising, one more than there are counts.
#[derive(Clone, Copy, Debug)]
pub struct Bins<'a> {
    pub edges: &'a [f64],
    pub counts: &'a [u64],
}

/// Distributions of one quantity over each other, each as the outline of its bars: the share of all samples in each bin.
pub fn histogram(title: &str, distributions: &[(String, Bins)]) -> Chart {
    let series =
        distributions.iter().map(|(name, bins)| Series { name: name.clone(), points: outline(bins) });
    Chart {
        title: title.to_owned(),
        x: String::new(),
        y: "share of samples".to_owned(),
        series: series.collect(),
        ..Chart::default()
    }
}

fn outline(bins: &Bins) -> Vec<(f64, f64)> {
    let all = bins.counts.iter().fold(0u64, |sum, count| sum.saturating_add(*count)).max(1) as f64;
    let sound = bins.edges.iter().all(|edge| edge.is_finite()) && bins.edges.is_sorted();
    let (Some(first), Some(last), true) = (bins.edges.first(), bins.edges.last(), sound) else {
        return Vec::new();
    };
    let bars = bins.edges.windows(2).zip(bins.counts).flat_map(|(bin, count)| {
        let share = *count as f64 / all;
        [(bin[0], share), (bin[1], share)]
    });
    std::iter::once((*first, 0.0)).chain(bars).chain([(*last, 0.0)]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_are_shares_and_begin_and_end_on_the_ground() {
        let bins = Bins { edges: &[0.0, 1.0, 3.0], counts: &[1, 3] };
        let chart = histogram("length", &[("a".into(), bins)]);
        assert_eq!(
            chart.series[0].points,
            [(0.0, 0.0), (0.0, 0.25), (1.0, 0.25), (1.0, 0.75), (3.0, 0.75), (3.0, 0.0)]
        );
        let broken = Bins { edges: &[1.0, f64::NAN], counts: &[1] };
        assert!(histogram("x", &[("a".into(), broken)]).series[0].points.is_empty());
    }
}
