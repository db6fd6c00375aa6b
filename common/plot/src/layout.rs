//! From a chart to shapes: axes, marks, legend and lines get their places.

use crate::axis::Axis;
use crate::curve::{extremes, smooth};
use crate::shapes::{Anchor, Ink, Place, Shape, Size};
use crate::{Chart, Series};

/// Names in a legend are cut here.
const NAME_MAX: usize = 40;
/// Between two entries of a legend, and the length of the stroke before each name.
const GAP: f64 = 14.0;
const STROKE: f64 = 20.0;
const ROW: f64 = 16.0;

/// The rectangle in which the lines are.
struct Field {
    left: f64,
    right: f64,
    top: f64,
    bottom: f64,
}

pub fn shapes(chart: &Chart) -> Vec<Shape> {
    let (width, height) = (f64::from(chart.width), f64::from(chart.height));
    let mut out = Vec::new();
    let mut top = 6.0;
    if !chart.title.is_empty() {
        out.push(text((8.0, top + 12.0), &cut(&chart.title, 120), Anchor::Start, Size::Title));
        top += 20.0;
    }
    top = legend(chart, width, top, &mut out);
    let stacked = chart.stacked.then(|| stack(&chart.series, width));
    let values: Box<dyn Iterator<Item = f64> + '_> = match &stacked {
        Some(parts) => Box::new(parts.iter().flat_map(|(upper, _)| upper.iter().map(|(_, y)| *y))),
        None => Box::new(chart.series.iter().flat_map(|of| of.points.iter().map(|(_, y)| *y))),
    };
    let log = chart.log && !chart.stacked;
    let y = Axis::over(values, log, 0.05).map(|axis| if chart.stacked { axis.with_zero() } else { axis });
    let x = Axis::over(chart.series.iter().flat_map(|of| of.points.iter().map(|(x, _)| *x)), false, 0.0);
    let (Some(x), Some(y)) = (x, y) else {
        let some = chart.series.iter().any(|of| !of.points.is_empty());
        let why = match (some, log) {
            (false, _) => "no points yet",
            (true, true) => "nothing above zero, which a log scale needs",
            (true, false) => "no value is a number",
        };
        out.push(text((width / 2.0, height / 2.0), why, Anchor::Middle, Size::Label));
        return out;
    };
    let marks = y.ticks(((height - top) / 40.0).max(2.0) as usize);
    let widest = marks.iter().map(|(_, label)| Size::Label.width(label)).fold(16.0, f64::max);
    let field = Field { left: widest + 14.0, right: width - 14.0, top: top + 8.0, bottom: height - 34.0 };
    axes(chart, &field, &x, &marks, &mut out);
    let at = |(px, py): &Place| Some((field.x(x.place(*px)?), field.y(y.place(*py)?)));
    match &stacked {
        Some(parts) => {
            for (series, (upper, lower)) in parts.iter().enumerate() {
                let (upper, lower) =
                    (upper.iter().filter_map(at).collect(), lower.iter().filter_map(at).collect());
                out.push(Shape::Area { upper, lower, series });
            }
        }
        None => {
            let columns = (field.right - field.left).max(1.0) as usize;
            let smoothed = chart.smooth > 1;
            for (n, of) in chart.series.iter().enumerate() {
                let ink = if smoothed { Ink::Faint(n) } else { Ink::Series(n) };
                lines(&extremes(&of.points, columns), ink, at, &mut out);
            }
            for (n, of) in chart.series.iter().enumerate().filter(|_| smoothed) {
                let means = smooth(&of.points, chart.smooth);
                lines(&extremes(&means, columns), Ink::Series(n), at, &mut out);
            }
        }
    }
    out
}

impl Field {
    fn x(&self, at: f64) -> f64 {
        self.left + at * (self.right - self.left)
    }

    fn y(&self, at: f64) -> f64 {
        self.bottom - at * (self.bottom - self.top)
    }
}

/// A stroke and a name for each series where there are several, or one with a name of its own; returns where it ends.
fn legend(chart: &Chart, width: f64, top: f64, out: &mut Vec<Shape>) -> f64 {
    if chart.series.len() < 2 && chart.series.iter().all(|of| of.name.is_empty() || of.name == chart.title) {
        return top;
    }
    let (mut left, mut row) = (8.0, top + 8.0);
    for (n, of) in chart.series.iter().enumerate() {
        let name = cut(&of.name, NAME_MAX);
        let wide = STROKE + 5.0 + Size::Label.width(&name);
        if left > 8.0 && left + wide > width - 8.0 {
            (left, row) = (8.0, row + ROW);
        }
        // A patch of an area, a stroke of a line.
        match chart.stacked {
            true => {
                let side = |y| vec![(left + 4.0, y), (left + 16.0, y)];
                out.push(Shape::Area { upper: side(row - 5.0), lower: side(row + 5.0), series: n });
            }
            false => {
                out.push(Shape::Line { points: vec![(left, row), (left + STROKE, row)], ink: Ink::Series(n) })
            }
        }
        out.push(text((left + STROKE + 5.0, row + 4.0), &name, Anchor::Start, Size::Label));
        left += wide + GAP;
    }
    row + ROW / 2.0
}

fn axes(chart: &Chart, field: &Field, x: &Axis, marks: &[(f64, String)], out: &mut Vec<Shape>) {
    for (at, label) in marks {
        let y = field.y(*at);
        out.push(Shape::Line { points: vec![(field.left, y), (field.right, y)], ink: Ink::Grid });
        out.push(text((field.left - 6.0, y + 4.0), label, Anchor::End, Size::Label));
    }
    let corner = [(field.left, field.top), (field.left, field.bottom), (field.right, field.bottom)];
    out.push(Shape::Line { points: corner.to_vec(), ink: Ink::Axis });
    let about = ((field.right - field.left) / 90.0).max(2.0) as usize;
    for (at, label) in x.ticks(about) {
        let x = field.x(at);
        out.push(Shape::Line { points: vec![(x, field.bottom), (x, field.bottom + 4.0)], ink: Ink::Axis });
        // Those at the ends stay inside.
        let half = Size::Label.width(&label) / 2.0;
        let within = x.min(f64::from(chart.width) - half - 2.0);
        out.push(text((within, field.bottom + 16.0), &label, Anchor::Middle, Size::Label));
    }
    let below = field.bottom + 29.0;
    if !chart.x.is_empty() {
        out.push(text((field.right, below), &cut(&chart.x, NAME_MAX), Anchor::End, Size::Label));
    }
    if !chart.y.is_empty() {
        out.push(text((8.0, below), &cut(&chart.y, NAME_MAX), Anchor::Start, Size::Label));
    }
}

/// Between gaps.
fn lines(points: &[Place], ink: Ink, at: impl Fn(&Place) -> Option<Place>, out: &mut Vec<Shape>) {
    let placed: Vec<Option<Place>> = points.iter().map(at).collect();
    for part in placed.split(Option::is_none).filter(|part| !part.is_empty()) {
        out.push(Shape::Line { points: part.iter().flatten().copied().collect(), ink });
    }
}

/// The upper and the lower line of each part: means over stretches of some pixels, so that all have them at the same places.
fn stack(series: &[Series], width: f64) -> Vec<(Vec<Place>, Vec<Place>)> {
    let bins = (width / 4.0).max(1.0) as usize;
    let all = || series.iter().flat_map(|of| of.points.iter().map(|(x, _)| *x));
    let (first, last) =
        all().fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), x| (low.min(x), high.max(x)));
    let wide = (last - first).max(f64::MIN_POSITIVE);
    let bin = |x: f64| (((x - first) / wide * bins as f64) as usize).min(bins - 1);
    let mut filled = vec![false; bins];
    all().for_each(|x| filled[bin(x)] = true);
    let mut below = vec![0.0; bins];
    let part = |of: &Series| {
        let mut sums = vec![(0.0, 0u32); bins];
        for (x, y) in of.points.iter().filter(|(_, y)| y.is_finite() && *y >= 0.0) {
            let (sum, count) = &mut sums[bin(*x)];
            (*sum, *count) = (*sum + y, *count + 1);
        }
        let (mut upper, mut lower) = (Vec::new(), Vec::new());
        for at in (0..bins).filter(|at| filled[*at]) {
            // From the first place to the last, so that the areas are as wide as the axis.
            let x = if at + 1 == bins { last } else { first + wide * at as f64 / bins as f64 };
            lower.push((x, below[at]));
            below[at] += sums[at].0 / f64::from(sums[at].1.max(1));
            upper.push((x, below[at]));
        }
        (upper, lower)
    };
    series.iter().map(part).collect()
}

fn text(at: Place, text: &str, anchor: Anchor, size: Size) -> Shape {
    Shape::Text { at, text: text.to_owned(), anchor, size }
}

fn cut(text: &str, max: usize) -> String {
    match text.chars().count() > max {
        true => text.chars().take(max - 1).chain(['…']).collect(),
        false => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chart(points: Vec<(f64, f64)>) -> Chart {
        let series = vec![Series { name: "loss".into(), points }];
        Chart { title: "loss".into(), series, ..Chart::default() }
    }

    fn drawn(chart: &Chart) -> Vec<Vec<Place>> {
        let of = |shape| match shape {
            Shape::Line { points, ink: Ink::Series(_) } => Some(points),
            _ => None,
        };
        shapes(chart).into_iter().filter_map(of).collect()
    }

    #[test]
    fn a_gap_parts_a_line_and_a_point_between_gaps_is_a_dot() {
        let nan = f64::NAN;
        let lines =
            drawn(&chart(vec![(1.0, 1.0), (2.0, 2.0), (3.0, nan), (4.0, 1.0), (5.0, nan), (6.0, 2.0)]));
        assert_eq!(lines.iter().map(Vec::len).collect::<Vec<_>>(), [2, 1, 1]);
    }

    #[test]
    fn a_million_points_are_some_thousands_of_places_inside_the_picture() {
        let points = (0..1_000_000).map(|n| (f64::from(n), f64::from(n % 97))).collect();
        let lines = drawn(&chart(points));
        let all: Vec<Place> = lines.concat();
        assert!(all.len() < 4 * 720, "{}", all.len());
        assert!(all.iter().all(|(x, y)| (0.0..=720.0).contains(x) && (0.0..=280.0).contains(y)));
    }

    #[test]
    fn what_has_no_numbers_says_so() {
        let says = |chart: &Chart, words: &str| {
            shapes(chart)
                .iter()
                .any(|shape| matches!(shape, Shape::Text { text, .. } if text.contains(words)))
        };
        assert!(says(&chart(Vec::new()), "no points yet"));
        assert!(says(&chart(vec![(1.0, f64::NAN)]), "no value is a number"));
        assert!(says(&Chart { log: true, ..chart(vec![(1.0, -1.0)]) }, "log scale"));
    }

    #[test]
    fn parts_lie_on_top_of_each_other() {
        let part = |name: &str, y| Series { name: name.into(), points: vec![(1.0, y), (2.0, y)] };
        let chart = Chart { stacked: true, series: vec![part("a", 1.0), part("b", 3.0)], ..Chart::default() };
        let parts = stack(&chart.series, 720.0);
        assert_eq!(parts[1].1, parts[0].0);
        assert_eq!(parts[1].0, [(1.0, 4.0), (2.0, 4.0)]);
        // Also where one has fewer points than the other, as after they were thinned out.
        let chart = Chart {
            series: vec![part("a", 1.0), Series { points: vec![(2.0, 3.0)], ..part("b", 3.0) }],
            ..chart
        };
        let parts = stack(&chart.series, 720.0);
        assert_eq!(parts[1].0, [(1.0, 1.0), (2.0, 4.0)]);
    }
}
