//! Shapes as SVG: classes for colours, so that light and dark are a matter of style.

use crate::axis::words;
use crate::escape::escape;
use crate::shapes::{Anchor, COLOURS, DASHES, Ink, Shape, Size};
use crate::{Chart, Stands};
use std::fmt::Write;

/// Colours of all charts, for light and for dark.
pub const STYLE: &str = include_str!("style.css");

pub fn render(chart: &Chart, shapes: &[Shape], stands: Stands) -> String {
    let (width, height) = (chart.width, chart.height);
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" class=\"plot\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" height=\"{height}\" role=\"img\"><title>{}</title><desc>{}</desc>",
        escape(&chart.title),
        escape(&in_words(chart))
    );
    if stands == Stands::Alone {
        out +=
            &format!("<style>{STYLE}</style><rect class=\"paper\" width=\"{width}\" height=\"{height}\"/>");
    }
    shapes.iter().for_each(|shape| write(shape, &mut out));
    out += "</svg>";
    out
}

fn write(shape: &Shape, out: &mut String) {
    match shape {
        Shape::Line { points, ink } => {
            let (class, dashes) = match ink {
                Ink::Grid => ("grid".to_owned(), &[][..]),
                Ink::Axis => ("axis".to_owned(), &[][..]),
                Ink::Series(n) => (format!("line s{}", n % COLOURS), DASHES[n % COLOURS]),
                Ink::Faint(n) => (format!("line faint s{}", n % COLOURS), &[][..]),
            };
            *out += &format!("<path class=\"{class}\" fill=\"none\" d=\"");
            path(points, 'M', out);
            // A line to where it is: a dot.
            if points.len() == 1 {
                *out += "h0";
            }
            *out += "\"";
            if !dashes.is_empty() {
                let lengths: Vec<String> = dashes.iter().map(f64::to_string).collect();
                *out += &format!(" stroke-dasharray=\"{}\"", lengths.join(" "));
            }
            *out += "/>";
        }
        Shape::Area { upper, lower, series } => {
            *out += &format!("<path class=\"area s{}\" d=\"", series % COLOURS);
            path(upper, 'M', out);
            let back: Vec<_> = lower.iter().rev().copied().collect();
            path(&back, 'L', out);
            *out += "z\"/>";
        }
        Shape::Text { at: (x, y), text, anchor, size } => {
            let anchor = match anchor {
                Anchor::Start => "start",
                Anchor::Middle => "middle",
                Anchor::End => "end",
            };
            let class = match size {
                Size::Title => "title",
                Size::Label => "label",
            };
            // A string takes everything.
            let _ = write!(
                out,
                "<text class=\"{class}\" x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" font-size=\"{}\">{}</text>",
                size.px(),
                escape(text)
            );
        }
    }
}

/// Absolute places to a tenth of a pixel.
fn path(points: &[(f64, f64)], first: char, out: &mut String) {
    for (n, (x, y)) in points.iter().enumerate() {
        let _ = match n {
            0 => write!(out, "{first}{x:.1} {y:.1}"),
            1 => write!(out, "L{x:.1} {y:.1}"),
            _ => write!(out, " {x:.1} {y:.1}"),
        };
    }
}

/// For those who do not see it.
fn in_words(chart: &Chart) -> String {
    let of = |series: &crate::Series| {
        let numbers: Vec<(f64, f64)> = series.points.iter().copied().filter(|(_, y)| y.is_finite()).collect();
        let (Some(first), Some(last)) = (numbers.first(), numbers.last()) else {
            return format!("{}: no points", series.name);
        };
        let say = |y: f64| words(y, y.abs() / 1000.0);
        let low = numbers.iter().map(|(_, y)| *y).fold(f64::INFINITY, f64::min);
        let high = numbers.iter().map(|(_, y)| *y).fold(f64::NEG_INFINITY, f64::max);
        format!(
            "{}: from {} at {} {} to {} at {}, lowest {}, highest {}",
            series.name,
            say(first.1),
            chart.x,
            first.0,
            say(last.1),
            last.0,
            say(low),
            say(high)
        )
    };
    chart.series.iter().map(of).collect::<Vec<_>>().join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Series;

    fn chart(name: &str) -> Chart {
        let points = vec![(1.0, 5.0), (2.0, 3.0), (3.0, 2.5)];
        let series = ["a", name].map(|name| Series { name: name.into(), points: points.clone() });
        Chart { title: name.into(), series: series.into(), ..Chart::default() }
    }

    #[test]
    fn a_name_is_never_markup() {
        let text = chart("</title><script>alert(1)</script>\" onload=\"x").svg(Stands::Alone);
        assert!(!text.contains("<script") && !text.contains("\" onload"), "{text}");
        assert_eq!(text.matches("<title>").count(), 1);
    }

    #[test]
    fn series_differ_in_more_than_their_colour_and_words_say_what_is_seen() {
        let text = chart("b").svg(Stands::InPage);
        assert!(text.contains("class=\"line s0\"") && text.contains("class=\"line s1\""), "{text}");
        assert!(text.contains("stroke-dasharray=\"7 3\""), "{text}");
        assert!(
            text.contains("a: from 5.000 at step 1 to 2.500 at 3, lowest 2.500, highest 5.000"),
            "{text}"
        );
        assert!(!text.contains("<style") && chart("b").svg(Stands::Alone).contains("prefers-color-scheme"));
    }
}
