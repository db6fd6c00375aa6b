//! The text of a scrape. [OpenMetrics 1.0.0](https://github.com/prometheus/OpenMetrics/blob/v1.0.0/specification/OpenMetrics.md) and
//! Prometheus' text format have the same lines for samples; what stands above them differs.

use super::{Definition, Format, Kind};
use prometheus::core::Collector;
use prometheus::{Histogram, IntCounterVec};
use std::collections::BTreeMap;
use std::fmt::Write as _;

/// Characters of a label's value.
const VALUE_MAX: usize = 128;

/// What was measured at one moment. Metrics come out in the order of their names.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Page {
    families: BTreeMap<&'static str, Family>,
}

#[derive(Clone, Debug, PartialEq)]
struct Family {
    name: &'static str,
    kind: &'static str,
    unit: Option<&'static str>,
    help: &'static str,
    /// Its samples, as they are written.
    lines: String,
}

impl Page {
    /// Adds a sample with the values of its labels, in the order of the definition.
    pub fn put(&mut self, definition: &'static Definition, labels: &[&str], value: f64) {
        debug_assert_eq!(labels.len(), definition.labels.len(), "{}", definition.name);
        let lines = &mut self.family(definition).lines;
        lines.push_str(definition.name);
        write_labels(lines, definition.labels.iter().copied().zip(labels.iter().copied()));
        lines.push(' ');
        write_number(lines, value);
        lines.push('\n');
    }

    /// As `put`, if there is a value.
    pub fn put_some(&mut self, definition: &'static Definition, labels: &[&str], value: Option<f64>) {
        if let Some(value) = value {
            self.put(definition, labels, value);
        }
    }

    /// 1 or 0.
    pub fn put_flag(&mut self, definition: &'static Definition, labels: &[&str], is_so: bool) {
        self.put(definition, labels, f64::from(is_so));
    }

    /// All counts that there are.
    pub fn put_counters(&mut self, definition: &'static Definition, counters: &IntCounterVec) {
        for family in counters.collect() {
            for metric in family.get_metric() {
                // They come in the order of their names.
                let value = |label: &&str| {
                    let known = metric.get_label().iter().find(|pair| pair.name() == *label);
                    known.map(|pair| pair.value()).unwrap_or_default()
                };
                let values: Vec<&str> = definition.labels.iter().map(value).collect();
                self.put(definition, &values, metric.get_counter().get_value());
            }
        }
    }

    pub fn put_histogram(&mut self, definition: &'static Definition, histogram: &Histogram) {
        let lines = &mut self.family(definition).lines;
        for family in histogram.collect() {
            for metric in family.get_metric() {
                let known = metric.get_histogram();
                let (name, count) = (definition.name, known.get_sample_count());
                for bucket in known.get_bucket() {
                    // What is observed meanwhile is in the buckets before it is in the count.
                    let below = bucket.cumulative_count().min(count);
                    let _ = writeln!(lines, "{name}_bucket{{le=\"{:?}\"}} {below}", bucket.upper_bound());
                }
                let _ = writeln!(lines, "{name}_bucket{{le=\"+Inf\"}} {count}");
                let _ = write!(lines, "{name}_sum ");
                write_number(lines, known.get_sample_sum());
                let _ = writeln!(lines, "\n{name}_count {count}");
            }
        }
    }

    fn family(&mut self, definition: &'static Definition) -> &mut Family {
        self.families.entry(definition.name).or_insert_with(|| Family {
            name: definition.family(),
            kind: match definition.kind {
                Kind::Gauge => "gauge",
                Kind::Counter => "counter",
                Kind::Histogram { .. } => "histogram",
            },
            unit: definition.unit(),
            help: definition.help,
            lines: String::new(),
        })
    }

    /// Takes over what another page has of other metrics.
    pub fn add(&mut self, other: Page) {
        self.families.extend(other.families);
    }

    pub fn write(&self, format: Format) -> String {
        let length: usize = self.families.values().map(|family| family.lines.len() + 300).sum();
        let mut text = String::with_capacity(length);
        for (sample, family) in &self.families {
            let Family { name, kind, unit, help, lines } = family;
            let name = match format {
                Format::Text => sample,
                Format::OpenMetrics => name,
            };
            let _ = writeln!(text, "# TYPE {name} {kind}");
            if let (Format::OpenMetrics, Some(unit)) = (format, unit) {
                let _ = writeln!(text, "# UNIT {name} {unit}");
            }
            let _ = write!(text, "# HELP {name} ");
            write_escaped(&mut text, help.chars(), format == Format::OpenMetrics);
            text.push('\n');
            text.push_str(lines);
        }
        if format == Format::OpenMetrics {
            text.push_str("# EOF\n");
        }
        text
    }
}

fn write_labels<'a>(text: &mut String, labels: impl Iterator<Item = (&'a str, &'a str)>) {
    let mut before = '{';
    for (name, value) in labels {
        text.push(before);
        text.push_str(name);
        text.push_str("=\"");
        write_escaped(text, value.chars().take(VALUE_MAX), true);
        text.push('"');
        before = ',';
    }
    if before == ',' {
        text.push('}');
    }
}

fn write_escaped(text: &mut String, signs: impl Iterator<Item = char>, quotes: bool) {
    for sign in signs {
        match sign {
            '\\' => text.push_str("\\\\"),
            '\n' => text.push_str("\\n"),
            '"' if quotes => text.push_str("\\\""),
            sign => text.push(sign),
        }
    }
}

fn write_number(text: &mut String, value: f64) {
    /// Up to here every whole number is exact.
    const WHOLE_MAX: f64 = (1u64 << 53) as f64;
    let written = match value {
        _ if value.is_nan() => write!(text, "NaN"),
        f64::INFINITY => write!(text, "+Inf"),
        f64::NEG_INFINITY => write!(text, "-Inf"),
        _ if value.fract() == 0.0 && value.abs() <= WHOLE_MAX => write!(text, "{}", value as i64),
        _ => write!(text, "{value:?}"),
    };
    written.expect("a String takes everything");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::At;

    static LOSS: Definition = Definition {
        name: "fleet_loss",
        kind: Kind::Gauge,
        labels: &["job", "name"],
        at: At::Worker,
        help: "A \"loss\" \\ so",
    };
    static BYTES: Definition = Definition {
        name: "fleet_sent_bytes_total",
        kind: Kind::Counter,
        labels: &["to"],
        at: At::Worker,
        help: "What was sent",
    };
    static TIME: Definition = Definition {
        name: "fleet_turn_seconds",
        kind: Kind::Histogram { first: 0.5, factor: 2.0, buckets: 2 },
        labels: &[],
        at: At::Worker,
        help: "Of a turn",
    };

    #[test]
    fn both_formats_are_written_by_their_rules() {
        let mut page = Page::default();
        page.put(&LOSS, &["job-1", "a\"b\\c\nd"], f64::NAN);
        page.put(&LOSS, &["job-2", ""], -1.5e-9);
        let counters = BYTES.counters();
        counters.with_label_values(&["b"]).inc_by(7);
        page.put_counters(&BYTES, &counters);
        let time = TIME.histogram();
        [0.25, 0.5, 0.75, 9.0].into_iter().for_each(|seconds| time.observe(seconds));
        page.put_histogram(&TIME, &time);
        let samples = "fleet_loss{job=\"job-1\",name=\"a\\\"b\\\\c\\nd\"} NaN\nfleet_loss{job=\"job-2\",name=\"\"} -1.5e-9\n";
        let turns = "fleet_turn_seconds_bucket{le=\"0.5\"} 2\nfleet_turn_seconds_bucket{le=\"1.0\"} 3\nfleet_turn_seconds_bucket{le=\"+Inf\"} 4\nfleet_turn_seconds_sum 10.5\nfleet_turn_seconds_count 4\n";
        assert_eq!(
            page.write(Format::OpenMetrics),
            format!(
                "# TYPE fleet_loss gauge\n# HELP fleet_loss A \\\"loss\\\" \\\\ so\n{samples}\
                 # TYPE fleet_sent_bytes counter\n# UNIT fleet_sent_bytes bytes\n# HELP fleet_sent_bytes What was sent\n\
                 fleet_sent_bytes_total{{to=\"b\"}} 7\n\
                 # TYPE fleet_turn_seconds histogram\n# UNIT fleet_turn_seconds seconds\n# HELP fleet_turn_seconds Of a turn\n{turns}# EOF\n"
            )
        );
        assert_eq!(
            page.write(Format::Text),
            format!(
                "# TYPE fleet_loss gauge\n# HELP fleet_loss A \"loss\" \\\\ so\n{samples}\
                 # TYPE fleet_sent_bytes_total counter\n# HELP fleet_sent_bytes_total What was sent\n\
                 fleet_sent_bytes_total{{to=\"b\"}} 7\n\
                 # TYPE fleet_turn_seconds histogram\n# HELP fleet_turn_seconds Of a turn\n{turns}"
            )
        );
    }

    #[test]
    fn numbers_are_what_prometheus_reads() {
        let written = |value| {
            let mut text = String::new();
            write_number(&mut text, value);
            text
        };
        for (value, text) in [
            (0.0, "0"),
            (-3.0, "-3"),
            (1e15, "1000000000000000"),
            (1e300, "1e300"),
            (0.1, "0.1"),
            (f64::INFINITY, "+Inf"),
            (f64::NEG_INFINITY, "-Inf"),
            (f64::NAN, "NaN"),
        ] {
            assert_eq!(written(value), text);
        }
    }

    #[test]
    fn a_label_has_a_bounded_length_and_an_empty_page_ends_too() {
        let mut page = Page::default();
        assert_eq!(
            (page.write(Format::Text), page.write(Format::OpenMetrics)),
            (String::new(), "# EOF\n".into())
        );
        page.put(&BYTES, &[&"é".repeat(1_000)], 1.0);
        assert!(page.write(Format::Text).ends_with(&format!("{{to=\"{}\"}} 1\n", "é".repeat(VALUE_MAX))));
    }
}
